"""The drop-in: its number, after TRL's own arithmetic, is the advantage that was asked for."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from paretune.errors import ConfigError, RewardError
from paretune.objectives.utilities import scalarize
from paretune.seeds import forked_torch
from paretune.tasks.exact.task import ExactTask
from paretune.training.advantages import advantages, aggregate_advantages
from paretune.training.trl.reward import MultiObjectiveReward
from paretune.training.weightings.base import WEIGHTINGS
from processes import together

TASK = ExactTask(alphabet=4, length=3, prompt_count=4, width=16, layers=1)
W = (0.3, 0.7)
GROUP, BATCH = 4, 16
PROMPTS = ["ab"] * GROUP + ["ba"] * GROUP
TEXTS = ["a", "ab", "abc", "", "aaa", "bb", "aab", "ba"]


def length(completions, **_):
    return [float(len(text)) for text in completions]


def share(completions, **_):
    """Cannot say anything about an empty text, nor about one that starts with d."""
    return [None if not text or text[0] == "d" else text.count("a") / len(text) for text in completions]


def fussy(completions, **_):
    return [None if text.startswith("a") else 2.0 * text.count("b") for text in completions]


def filled(completions, **_):
    """`fussy` as TRL counts it where another objective is scored: 0 instead of None."""
    return [0.0 if score is None else score for score in fussy(completions)]


def rewards_of(functions, texts):
    return np.array([[np.nan if r is None else r for r in function(completions=texts)] for function in functions]).T


ROWS = [{"prompt": prompt.text} for prompt in TASK.prompts("train")]
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}


def trained(kind, reward_funcs, *, rows=ROWS, chat=False, more=None, **settings):
    """TRL's trainer after `max_steps`, 1 unless given: the same prompts and seed for every reward."""
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback

    model, tokenizer = TASK.load()
    if chat:
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig}[kind]
    fixed = {"output_dir": "unused", "per_device_train_batch_size": BATCH, "max_completion_length": 3, "logging_steps": 1, "seed": 3}
    args = config(**{**QUIET, **fixed, "max_steps": 1, "beta": 0.0, "shuffle_dataset": False, **settings})
    made = {"grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer}[kind]
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    trainer = made(model=model, reward_funcs=reward_funcs, args=args, train_dataset=rows, processing_class=tokenizer, **(more or {}))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def one_step(kind, reward_funcs, **settings):
    """Completions and advantages of the last step of TRL's trainer."""
    trainer = trained(kind, reward_funcs, **settings)
    return list(trainer._logs["completion"]), np.array(trainer._logs["advantages"]), trainer.state


@pytest.mark.parametrize(("how", "fields"), [("sum_then_normalize", {}), ("normalize_then_sum", {"scalarize_at": "advantage"})])
def test_trls_own_two_aggregations_come_out_of_it(how, fields):
    """With TRL's two reward functions, TRL's weights and TRL's arithmetic on the one side, the drop-in on the other."""
    theirs = one_step("grpo", [length, fussy], num_generations=GROUP, multi_objective_aggregation=how, reward_weights=list(W))
    reward = MultiObjectiveReward([length, fussy], W, group=GROUP, normalize="group", **fields)
    ours = one_step("grpo", [reward], **reward.settings())
    assert ours[0] == theirs[0]
    assert np.abs(theirs[1]).max() > 0.5
    unscored = np.isnan(rewards_of([length, fussy], ours[0])).any(1)
    assert 0 < unscored.sum() < BATCH
    rows = np.ones(BATCH, bool)
    if how == "sum_then_normalize":  # there TRL counts an unscored objective as 0: only groups without one can agree
        rows = np.repeat(~unscored.reshape(-1, GROUP).any(1), GROUP)
        assert rows.any()
    np.testing.assert_allclose(ours[1][rows], theirs[1][rows], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "theirs", "normalize"),
    [
        ("grpo", {"scale_rewards": "group"}, "group"),
        ("grpo", {"scale_rewards": "batch"}, "batch_returns"),
        ("grpo", {"scale_rewards": "none"}, "none"),
        ("rloo", {"normalize_advantages": False}, "none"),
        ("rloo", {"normalize_advantages": True}, "batch"),
    ],
)
def test_trls_own_scalings_come_out_of_it(kind, theirs, normalize):
    """Two steps, so that RLOO's KL is not 0 in the second. TRL's sums count None as 0, ours only where a function says so."""
    both = {"max_steps": 2, "beta": 0.2, "learning_rate": 1e-2}
    wanted = one_step(kind, [length, fussy], num_generations=GROUP, reward_weights=list(W), **theirs, **both)
    reward = MultiObjectiveReward([length, filled], W, group=GROUP, trainer=kind, normalize=normalize)
    assert reward.settings().get("normalize_advantages", False) == theirs.get("normalize_advantages", False)
    found = one_step(kind, [reward], **reward.settings(), **both)
    assert found[0] == wanted[0]
    assert np.isnan(rewards_of([length, fussy], found[0])).any()
    assert wanted[2].log_history[1]["kl"] != 0
    assert np.abs(wanted[1]).max() > 0.5
    np.testing.assert_allclose(found[1], wanted[1], atol=2e-5)


def test_every_update_of_trls_is_taken():
    """Accumulated, from one draw for two steps, used twice, in another loss, of a stream: the weights are those of plain TRL."""
    from datasets import IterableDataset

    both = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "steps_per_generation": 4, "num_iterations": 2}
    both |= {"loss_type": "dr_grpo", "max_steps": 4, "learning_rate": 1e-2, "beta": 0.1}
    reward = MultiObjectiveReward([length, filled], W, group=GROUP, normalize="group")
    ends = []
    for functions, more in (([length, filled], {"num_generations": GROUP, "reward_weights": list(W)}), ([reward], reward.settings())):
        trainer = trained("grpo", functions, rows=IterableDataset.from_generator(lambda: iter(ROWS * 2)), **both, **more)
        ends.append([parameter.detach().numpy() for parameter in trainer.model.parameters()])
    start = [parameter.detach().numpy() for parameter in TASK.load()[0].parameters()]
    moved, apart = (max(np.abs(a - b).max() for a, b in zip(ends[0], other, strict=True)) for other in (start, ends[1]))
    assert moved > 1e-2
    assert apart < 1e-4
    assert reward.step == 1  # one draw for all four updates


@pytest.mark.parametrize(("kind", "group"), [("grpo", 2), ("rloo", 1)])
def test_an_evaluation_has_a_group_of_its_own(kind, group):
    """Its number is the utility, and it leaves no trace: neither in the weights' memory nor in what has been counted."""
    from datasets import Dataset

    known = [*ROWS, *ROWS[:2]]  # the second batch is smaller
    more = {"eval_dataset": Dataset.from_list(known)}
    reward = MultiObjectiveReward(
        [length, share], W, group=GROUP, trainer=kind, normalize="batch", weighting="ctwa", high=(3, 1), max_unscored=1.0
    )
    both = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": group, "per_device_eval_batch_size": 4 * group}
    state = trained(kind, [reward], more=more, max_steps=2, **both, **reward.settings()).state
    first, evaluated, second = state.log_history[:3]
    assert evaluated["eval_unscored/share"] > 0
    utility = np.dot(W, [evaluated["eval_objectives/length"], evaluated["eval_objectives/share"]])
    assert evaluated["eval_objectives/utility"] == pytest.approx(utility, rel=1e-6)
    assert evaluated["eval_reward"] == pytest.approx(utility, rel=1e-5)
    assert reward.step == 2
    assert (reward.samples, reward.state_dict()) == (2 * BATCH, state.stateful_callbacks["paretune"])
    for line in (first, second):
        assert line["objectives/utility"] == pytest.approx(np.dot(W, [line["objectives/length"], line["objectives/share"]]), rel=1e-6)


def test_the_best_model_is_that_of_the_largest_utility(tmp_path):
    """Normalized, TRL's `reward` says nothing: it is 0 at every step."""
    from datasets import Dataset
    from transformers import EarlyStoppingCallback

    worth = {1: 0.2, 2: 0.9, 3: 0.1, 4: 0.3}

    def planned(completions, trainer_state, **_):
        return [worth.get(trainer_state.global_step, 0.0)] * len(completions)

    reward = MultiObjectiveReward([planned, length], (1.0, 0.0), group=GROUP, normalize="group")
    saved = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    asked = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_objectives/utility", "max_steps": 6}
    more = {"eval_dataset": Dataset.from_list(ROWS), "callbacks": [EarlyStoppingCallback(2)]}
    state = trained("grpo", [reward], more=more, **saved, **asked, **reward.settings()).state
    assert (state.best_metric, state.best_global_step, state.global_step) == (pytest.approx(0.9), 2, 4)
    assert [line["reward"] for line in state.log_history if "reward" in line] == pytest.approx([0.0] * 4)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scalarize_at": "advantage", "normalize": "group"},
        {"scalarize_at": "advantage", "normalize": "batch", "baseline": "leave_one_out"},
        {"aggregation": "mo_grpo"},
        {"scalarizer": "log_product"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())) or "plain",
)
def test_what_trl_trains_on_is_what_the_embedded_learner_would(kind, fields):
    """Objectives that cannot score everything included: nothing of a NaN becomes a 0."""
    reward = MultiObjectiveReward([length, share], W, group=GROUP, trainer=kind, high=(3.0, 1.0), max_unscored=1.0, **fields)
    texts, found, state = one_step(kind, [reward], **reward.settings())
    rewards_NM = rewards_of([length, share], texts)
    assert np.isnan(rewards_NM).any()
    w_NM = np.tile(W, (BATCH, 1))
    baseline = fields.get("baseline", {"grpo": "group_mean", "rloo": "leave_one_out"}[kind])
    if "aggregation" in fields:
        wanted = aggregate_advantages({"name": fields["aggregation"]}, rewards_NM, w_NM, group=GROUP)
    elif "scalarizer" in fields:
        single_N = scalarize(rewards_NM, w_NM, {"name": "log_product"}, low_M=np.zeros(2), high_M=np.array([3.0, 1.0]))
        wanted = advantages(single_N[:, None], np.ones((BATCH, 1)), group=GROUP, baseline=baseline)
    else:
        more = {"at": fields.get("scalarize_at", "reward"), "normalize": fields.get("normalize", "none")}
        wanted = advantages(rewards_NM, w_NM, group=GROUP, baseline=baseline, **more)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert state.stateful_callbacks["paretune"]["samples"] == BATCH
    logged = state.log_history[0]
    assert logged["objectives/share"] == pytest.approx(np.nanmean(rewards_NM[:, 1]), abs=1e-6)
    assert logged["unscored/share"] == np.isnan(rewards_NM[:, 1]).sum()
    assert (logged["weights/length"], logged["weights/share"]) == pytest.approx(W)


def test_without_normalization_the_number_is_the_weighted_reward():
    """So that TRL's own curve of rewards can be read; a missing objective counts as its group's mean, not as 0."""
    reward = MultiObjectiveReward([length, share], W, group=GROUP)
    number_N = np.array(reward(PROMPTS, TEXTS))
    rewards_NM = rewards_of([length, share], TEXTS)
    rewards_NM[3, 1] = np.mean(rewards_NM[:3, 1])
    np.testing.assert_allclose(number_N, rewards_NM @ W, atol=1e-12)


def test_nothing_scored_is_nan():
    def silent(completions, **_):
        return [None] * len(completions)

    reward = MultiObjectiveReward([silent], (1.0,), group=GROUP)
    assert np.isnan(reward(PROMPTS, TEXTS)).all()


def test_too_much_unscored_stops_the_training():
    reward = MultiObjectiveReward([length, fussy], W, group=GROUP)
    for _ in range(31):  # 248 completions are too few to judge by
        reward(PROMPTS, TEXTS)
    with pytest.raises(RewardError, match="'fussy' scores at least 90%"):
        reward(PROMPTS, TEXTS)


STATEFUL = {
    "climb": {"utility": {"name": "log-sum"}},
    "multipliers": {"utility": {"name": "max-min"}},
    "ctwa": {},
    "exp3": {"every": 2},
    "contextual": {},
    "balanced": {},
    "fixed": {},
}


def test_every_weighting_that_needs_no_gradients_is_tried():
    assert set(STATEFUL) == {name for name in WEIGHTINGS if not WEIGHTINGS[name].needs_gramian}


@pytest.mark.parametrize("name", list(STATEFUL))
def test_a_weighting_goes_on_from_the_trainers_checkpoint(name):
    """The trainer's state, as JSON, is all that a fresh object gets."""

    def fresh():
        return MultiObjectiveReward([length, share], W, group=GROUP, high=(3, 1), weighting={"name": name, **STATEFUL[name]}, seed=5)

    def batch(step):
        return [TEXTS[(n * (step + 1) + step) % len(TEXTS)] for n in range(len(TEXTS))]

    state = SimpleNamespace(stateful_callbacks={}, log_history=[], max_steps=8)
    whole = fresh()
    for step in range(6):
        if step == 3:
            kept = SimpleNamespace(**{**vars(state), "stateful_callbacks": json.loads(json.dumps(state.stateful_callbacks))})
        number = whole(PROMPTS, batch(step), trainer_state=state)
    rest = fresh()
    for step in range(3, 6):
        again = rest(PROMPTS, batch(step), trainer_state=kept)
    assert again == number
    assert rest.state_dict() == whole.state_dict()
    forgetful = fresh()
    forgetful(PROMPTS, batch(5))
    assert (forgetful.weights_state == whole.weights_state) == (name == "fixed")


def test_weightings_see_the_price_of_kl_that_the_trainer_logged():
    """max-min with a KL of 2 nats at beta 0.5 sees every return one lower than without: its running mean says so."""
    state = SimpleNamespace(stateful_callbacks={}, log_history=[{"kl": 0.5, "completions/mean_length": 4.0}], max_steps=8)
    means = []
    for beta in (0.0, 0.5):
        weighting = {"name": "multipliers", "utility": {"name": "max-min"}, "decay": 0.0}
        reward = MultiObjectiveReward([length, share], W, group=GROUP, weighting=weighting, beta=beta)
        reward(PROMPTS, TEXTS, trainer_state=copy.deepcopy(state))
        means.append(reward.weights_state["sum"])
    np.testing.assert_allclose(np.subtract(*means), [1.0, 1.0])


class Asking:
    """What a reward function sees of TRL's trainer."""

    def __init__(self, args, functions=("utility",), training=True):
        self.args, self.reward_funcs, self.reward_func_names = args, list(functions), list(functions)
        self.model, self.logged = SimpleNamespace(training=training), {}

    def log_metric(self, name, value):
        self.logged[name] = value


def test_each_training_begins_anew():
    """One object in two trainings: the trainer's state is the memory, so the second does not begin where the first ended."""
    reward = MultiObjectiveReward([length, share], W, group=GROUP, weighting="ctwa", high=(3, 1))
    ends = []
    for _ in range(2):
        state = SimpleNamespace(stateful_callbacks={}, log_history=[], max_steps=2)
        ends.append([reward(PROMPTS, TEXTS, trainer_state=state) for _ in range(2)])
    assert ends[0] == ends[1]
    assert reward.step == 2


@pytest.mark.parametrize(
    ("fields", "measured"),
    [
        ({}, {"utility": 0.3 * 2.0 + 0.7 * 0.5}),
        ({"preference": (1.0, 0.0)}, {"utility": 2.0}),
        ({"weighting": {"name": "climb", "utility": {"name": "log-sum"}}}, {"utility": 0.3 * np.log(2 / 3) + 0.7 * np.log(0.5)}),
        ({"weighting": {"name": "multipliers", "utility": {"name": "max-min", "base": (1.0, 0.0)}}}, {"utility": 0.5 / (2 * 0.7)}),
        (
            {"weighting": {"name": "multipliers", "utility": {"name": "constrained", "thresholds": (None, 0.8)}}},
            {"utility": 0.95, "violation": 0.3},
        ),
        ({"scalarizer": "log_product"}, {"utility": 0.15 * np.log(0.9999 / 3) + 0.35 * np.log(0.25 * 0.75)}),
    ],
)
def test_the_utility_that_is_logged_is_what_the_training_climbs(fields, measured):
    """Means 2 of [0, 3] and 0.5 of [0, 1]."""
    scores = [[1.0, 3.0, 1.0, 3.0], [0.25, 0.75, 0.25, 0.75]]
    objectives = {"first": lambda completions, **_: scores[0], "second": lambda completions, **_: scores[1]}
    reward = MultiObjectiveReward(objectives, fields.pop("preference", W), group=GROUP, high=(3, 1), **fields)
    for training in (True, False):
        asking = Asking(SimpleNamespace(**reward.settings()), training=training)
        reward(["ab"] * 4, TEXTS[:4], log_metric=asking.log_metric)
        found = {
            name.split("/")[1]: value for name, value in asking.logged.items() if name in ("objectives/utility", "objectives/violation")
        }
        assert found == pytest.approx(measured)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": (2, 0)}, r"(?s)low is below high.*length: low 2, high 1"),
        ({"high": (3, float("nan"))}, "high is a finite number"),
        ({"low": ("none", 0)}, "low is as declared"),
        ({"low": 0}, "low is as declared"),
        ({"beta": float("nan")}, "beta is a finite number"),
        ({"beta": -0.1}, "beta is as declared"),
        ({"group": "four"}, "group is as declared"),
        ({"max_unscored": 2}, "max_unscored is as declared"),
        ({"scalarizer": {"name": "log_product", "floor": "low"}}, r"(?s)0 < floor < ceiling.*floor='low'"),
        ({"scalarizer": {"name": "log_product", "ceiling": None}}, r"(?s)0 < floor < ceiling.*ceiling=None"),
        ({"aggregation": {"name": "gd2po", "tau": "half"}}, r"(?s)tau lies between 0 and 1.*tau='half'"),
        ({"aggregation": {"name": "gd2po", "tau": None}}, r"(?s)tau lies between 0 and 1.*tau=None"),
        ({"normalize": None}, r"(?s)normalize is known by its name.*None"),
        ({"normalize": ["none"]}, r"(?s)normalize is known by its name.*\['none'\]"),
    ],
)
def test_numbers_of_a_drop_in_that_are_none_are_refused(given, message):
    """A range that is none made gated rewards, prices and log_product wrong without a word."""
    with pytest.raises(ConfigError, match=message):
        MultiObjectiveReward([length, share], W, **{"group": GROUP, **given})


def test_numbers_of_a_drop_in_may_be_numpys():
    given = {"low": np.array([0, 0]), "high": [np.int64(3), 1.0], "beta": np.float32(0.5), "max_unscored": np.float64(0.5)}
    reward = MultiObjectiveReward([length, share], np.array(W), group=np.int64(GROUP), **given)
    assert (reward.group, reward.beta, reward.objectives.low, reward.objectives.high) == (GROUP, 0.5, (0.0, 0.0), (3.0, 1.0))


def test_what_nobody_scored_has_no_utility():
    reward = MultiObjectiveReward({"a": length, "b": lambda completions, **_: [None] * len(completions)}, W, group=GROUP)
    asking = Asking(SimpleNamespace(**reward.settings()), training=False)
    assert not np.isnan(reward(PROMPTS, TEXTS, log_metric=asking.log_metric)).any()
    assert "objectives/utility" not in asking.logged
    assert asking.logged["unscored/b"] == len(TEXTS)


def _evaluated_in_two():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rows = slice(0, 7) if dist.get_rank() == 0 else slice(7, 12)
    reward = MultiObjectiveReward([length, share], W, group=GROUP)
    asking = Asking(SimpleNamespace(**reward.settings()), training=False)
    number = reward(PROMPTS12[rows], TEXTS12[rows], log_metric=asking.log_metric)
    dist.destroy_process_group()
    return number, asking.logged


def test_an_evaluation_need_not_be_split_evenly():
    reward = MultiObjectiveReward([length, share], W, group=GROUP)
    asking = Asking(SimpleNamespace(**reward.settings()), training=False)
    whole = reward(PROMPTS12, TEXTS12, log_metric=asking.log_metric)
    (first, seen), (second, seen_too) = together(_evaluated_in_two)
    np.testing.assert_allclose([*first, *second], whole, atol=1e-12)
    assert seen == seen_too == pytest.approx(asking.logged)


def _half(fields, broken):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def own(completions, **_):
        if broken and rank == 1:
            raise ValueError("the judge is away")
        return length(completions)

    reward = MultiObjectiveReward([own, share], W, group=GROUP, **fields)
    rows = slice(0, 6) if rank == 0 else slice(6, 12)
    logged = {}
    number = reward(PROMPTS12[rows], TEXTS12[rows], log_metric=logged.__setitem__, completion_ids=[[1, 2]] * 6)
    dist.destroy_process_group()
    return number, logged, reward.state_dict()


PROMPTS12, TEXTS12 = [*PROMPTS, *["cc"] * GROUP], [*TEXTS, "b", "ca", "aca", "cab"]


def test_groups_split_over_processes_are_put_together():
    """Six rows each: the second group is half in one process, half in the other, and a weighting with memory sees them all."""
    fields = {"scalarize_at": "advantage", "normalize": "batch", "weighting": {"name": "ctwa"}, "high": (3.0, 1.0)}
    logged = {}
    single = MultiObjectiveReward([length, share], W, group=GROUP, **fields)
    single.objectives = type(single.objectives)(("own", "share"), single.objectives.low, single.objectives.high)
    whole = single(PROMPTS12, TEXTS12, log_metric=logged.__setitem__, completion_ids=[[1, 2]] * 12)
    (first, seen, state), (second, seen_too, state_too) = together(_half, fields, False)
    np.testing.assert_allclose([*first, *second], whole, atol=1e-12)
    assert seen == seen_too == pytest.approx(logged)
    assert state == state_too == single.state_dict()


def test_an_error_in_one_process_is_raised_in_all():
    for text in together(_half, {}, True):
        assert "RewardError" in text
        assert "the judge is away" in text


class Judges:
    """Async functions, one a method, one an instance: each waits until the other has been asked, too."""

    def __init__(self):
        self.asked, self.loops = 0, set()

    async def first(self, completions, **_):
        self.asked += 1
        self.loops.add(id(asyncio.get_running_loop()))
        while self.asked % 2:
            await asyncio.sleep(0)
        return length(completions)

    async def __call__(self, completions, **_):
        self.asked += 1
        while self.asked % 2:
            await asyncio.sleep(0)
        return share(completions)


def test_async_functions_are_awaited_together():
    """One after the other would never end. All batches have one loop, and a loop that runs already (a notebook's) is no obstacle."""
    judges = Judges()
    reward = MultiObjectiveReward([functools.partial(judges.first), judges, length], (0.2, 0.4, 0.4), group=GROUP)
    assert reward.objectives.names == ("first", "Judges", "length")
    plain = MultiObjectiveReward({"a": length, "b": share, "c": length}, (0.2, 0.4, 0.4), group=GROUP)

    async def notebook():
        return reward(PROMPTS, TEXTS)

    wanted = plain(PROMPTS, TEXTS)
    for found in (reward(PROMPTS, TEXTS), asyncio.run(asyncio.wait_for(notebook(), 20))):
        np.testing.assert_allclose(found, wanted)
    assert len(judges.loops) == 1


@pytest.mark.parametrize("error", [ValueError("the judge is away"), SystemExit("the judge is away")])
def test_an_async_function_that_fails_is_named(error):
    ended = []

    async def away(completions, **_):
        raise error

    async def slow(completions, **_):
        await asyncio.sleep(0.01)
        ended.append(True)
        return length(completions)

    reward = MultiObjectiveReward([away, slow], W, group=GROUP)
    with pytest.raises(RewardError, match=r"(?s)objective 'away'.*the judge is away"):
        reward(PROMPTS, TEXTS)
    assert ended == [True]  # nothing goes on behind the error
    still = MultiObjectiveReward({"slow": slow, "share": share}, W, group=GROUP)
    assert len(still(PROMPTS, TEXTS)) == len(TEXTS)


def test_what_trl_offers_arrives():
    """Columns, the trainer's state, hooks; an environment is the live object, and lists are copies."""
    seen, world, answers = {}, object(), [["x"]] * len(TEXTS)

    def nosy(completions, answer, environments, trainer_state, log_extra, **_):
        seen.update(environments=environments, state=trainer_state)
        answer[0].append("spoiled")
        log_extra("note", list(completions))
        return length(completions)

    reward, extra = MultiObjectiveReward(nosy, (1.0,), group=GROUP), {}
    state = SimpleNamespace(stateful_callbacks={}, log_history=[], max_steps=8)
    given = {"answer": answers, "environments": [world] * len(TEXTS), "trainer_state": state, "log_extra": extra.__setitem__}
    reward(PROMPTS, TEXTS, **given)
    assert answers[0] == ["x"]
    assert seen["state"] is state
    assert seen["environments"][0] is world
    assert extra["note"] == TEXTS


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder with a reward model of one output, and the tokenizer beside it."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = TASK.load()[1]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, initializer_range=0.5, **sizes)
    folder = tmp_path_factory.mktemp("models") / "judge-1b"
    with forked_torch(0):
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("named", "chat"), [(True, False), (False, True)], ids=["by name", "a module reads chats"])
def test_reward_models_score_as_they_do_in_trl(classifier, named, chat):
    from transformers import AutoModelForSequenceClassification

    tokenizer = TASK.load()[1] if chat else None
    if chat:
        tokenizer.chat_template = "{% for message in messages %}{{ message['role'][0] }}{{ message['content'] }}{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS] if chat else ROWS
    given = str(classifier) if named else AutoModelForSequenceClassification.from_pretrained(classifier)
    words = (lambda completions, **_: length([each[0]["content"] for each in completions])) if chat else length
    both = {"rows": rows, "chat": chat}
    tokenizers = {"reward_processing_classes": [tokenizer, None]}
    theirs = {"num_generations": GROUP, "reward_weights": list(W), "scale_rewards": "none", "more": tokenizers}
    wanted = one_step("grpo", [given, words], **both, **theirs)
    reward = MultiObjectiveReward({"judge": given, "length": words}, W, group=GROUP, **tokenizers)
    found = one_step("grpo", [reward], **both, **reward.settings())
    assert found[0] == wanted[0]
    assert reward.rewards_NM[:, 0].std() > 0.01
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)
    assert MultiObjectiveReward([given], (1.0,), group=GROUP, reward_processing_classes=[tokenizer]).objectives.names == ("judge-1b",)


def test_reward_models_that_would_score_at_random(classifier, tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = TASK.load()
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"(?s)every weight of a reward model.*score\.weight"):
        MultiObjectiveReward([str(tmp_path / "lm"), length], W, group=GROUP)
    with pytest.raises(ConfigError, match="nothing at"):
        MultiObjectiveReward([str(tmp_path / "away"), length], W, group=GROUP)
    alone = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(classifier))
    alone.config._name_or_path = ""
    with pytest.raises(ConfigError, match=r"(?s)'LlamaForSequenceClassification', a module.*give reward_processing_classes"):
        MultiObjectiveReward([alone, length], W, group=GROUP)
    alone.config.num_labels = 2
    with pytest.warns(UserWarning, match="2 outputs; the first one"):
        MultiObjectiveReward([alone, length], W, group=GROUP, reward_processing_classes=[AutoTokenizer.from_pretrained(classifier), None])


@pytest.mark.parametrize(
    ("fields", "essential"),
    [
        ({"weighting": {"name": "gradient"}}, "gradients, which a reward function does not see"),
        ({"aggregation": "pama"}, "must have mean 0 in each group"),
        ({"aggregation": "gd2po"}, "must have mean 0 in each group"),
        ({"aggregation": "gdop"}, "did you mean 'gdpo'"),
        ({"scalarizer": "linnear"}, "did you mean 'linear'"),
        ({"scalarize_at": "loss"}, "scalarized at the reward or at the advantage"),
        ({"trainer": "ppo"}, "one of TRL's two online trainers"),
        ({"preference": (0.5, 0.6)}, "non-negative and sum to 1"),
        ({"group": 1}, "group is at least 2"),
        ({"objectives": [length, 3]}, "what TRL takes as a reward function"),
        ({"objectives": {"length": length, "utility": share}}, "columns of their own"),
        ({"objectives": [functools.partial(length), length]}, "names are distinct"),
        ({"reward_processing_classes": [None]}, "1 for 2 objectives"),
    ],
)
def test_bad_requests(fields, essential):
    given = {"objectives": [length, share], "preference": W, "group": GROUP, **fields}
    with pytest.raises(ConfigError) as error:
        MultiObjectiveReward(given.pop("objectives"), given.pop("preference"), **given)
    assert essential in str(error.value)


def test_batches_that_are_no_groups():
    reward = MultiObjectiveReward([length, share], W, group=GROUP)
    with pytest.raises(ConfigError, match="whole groups"):
        reward(PROMPTS[:6], TEXTS[:6])
    with pytest.raises(ConfigError, match="a group holds the completions of one prompt"):
        reward(["x", "y"] * 4, TEXTS)


def test_a_configuration_that_would_change_the_number():
    reward = MultiObjectiveReward([length, share], W, group=GROUP)
    reward.check(SimpleNamespace(**{**reward.settings(), "reward_weights": [1.0]}))
    for name, value in {"scale_rewards": "group", "num_generations": 8, "reward_weights": [2.0]}.items():
        with pytest.raises(ConfigError, match=f"{name}={value!r}".replace("[", r"\[").replace(".", r"\.")):
            reward.check(SimpleNamespace(**{**reward.settings(), name: value}))
    priced = MultiObjectiveReward([length, share], W, group=GROUP, beta=0.1)
    priced.check(SimpleNamespace(**priced.settings(), beta=0.1))
    with pytest.raises(ConfigError, match=r"beta=0\.1 here, beta=0\.04"):
        priced.check(SimpleNamespace(**priced.settings(), beta=0.04))


def test_each_trainer_has_its_configuration(tmp_path):
    """A subclass counts as its base; what is no configuration of that trainer is named, not passed over."""
    import trl
    from trl.experimental.async_grpo import AsyncGRPOConfig
    from trl.experimental.gmpo import GMPOConfig

    rewards = {trainer: MultiObjectiveReward([length, share], W, group=GROUP, trainer=trainer) for trainer in ("grpo", "rloo")}
    quiet = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "per_device_train_batch_size": BATCH}
    for config, trainer in ((trl.GRPOConfig, "grpo"), (GMPOConfig, "grpo"), (trl.RLOOConfig, "rloo")):
        other = {"grpo": "rloo", "rloo": "grpo"}[trainer]
        args = config(**quiet, **rewards[trainer].settings())
        rewards[trainer].check(args)
        with pytest.raises(ConfigError, match=rf"(?s)trainer='{other}' stands under .*{config.__name__}, which has no "):
            rewards[other].check(args)
    for made in (AsyncGRPOConfig, trl.SFTConfig):
        with pytest.raises(ConfigError, match=f"{made.__name__}, which has no "):
            rewards["grpo"].check(made(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_the_trainer_that_asks_is_checked():
    reward = MultiObjectiveReward([length, share], W, group=GROUP, trainer="rloo")
    with pytest.raises(ConfigError, match="GRPOConfig, which has no normalize_advantages"):
        trained("grpo", [reward], num_generations=GROUP)
    good = SimpleNamespace(**reward.settings())
    reward(PROMPTS, TEXTS, log_metric=Asking(good).log_metric)
    with pytest.raises(ConfigError, match=r"(?s)only reward function.*found:  utility, length"):
        reward(PROMPTS, TEXTS, log_metric=Asking(good, ("utility", "length")).log_metric)
    with pytest.raises(ConfigError, match="reward_weights="):
        reward(PROMPTS, TEXTS, log_metric=Asking(SimpleNamespace(**{**reward.settings(), "reward_weights": [0.5]})).log_metric)


@pytest.mark.parametrize("part", ["scalarizer", "aggregation", "weighting"])
@pytest.mark.parametrize("given", [None, 3, ["linear"]])
def test_what_describes_no_part_says_which(part, given):
    with pytest.raises(ConfigError, match=part):
        MultiObjectiveReward([length, share], W, group=GROUP, **{part: given})

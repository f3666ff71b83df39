"""The drop-in: its number, after TRL's own arithmetic, is the advantage that was asked for."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest

from paretune.errors import ConfigError, RewardError
from paretune.objectives.utilities import scalarize
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


def rewards_of(functions, texts):
    return np.array([[np.nan if r is None else r for r in function(completions=texts)] for function in functions]).T


def one_step(kind, reward_funcs, **settings):
    """Completions and advantages of one step of TRL's trainer: the same completions for every reward."""
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback

    model, tokenizer = TASK.load()
    config = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig}[kind]
    args = config(
        output_dir="unused",
        per_device_train_batch_size=BATCH,
        max_completion_length=3,
        max_steps=1,
        beta=0.0,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=3,
        shuffle_dataset=False,
        **settings,
    )
    made = {"grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer}[kind]
    rows = Dataset.from_dict({"prompt": [prompt.text for prompt in TASK.prompts("train")]})
    trainer = made(model=model, reward_funcs=reward_funcs, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
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


async def _later(completions, **_):
    return length(completions)


class _Model:
    forward = staticmethod(length)
    __call__ = staticmethod(length)


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
        ({"objectives": [length, _later]}, "an async function"),
        ({"objectives": [length, "a/reward-model"]}, "a function with TRL's reward signature"),
        ({"objectives": [length, _Model()]}, "`reward-model`"),
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

"""The loop: is its gradient that of J_w, does it reach the optimum, what does it leave behind, and what does it refuse?"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import norm

from learner_cases import SMALL, TASK, W, flat, log_of, moved, spec_of, weights
from paretune.errors import ConfigError, RewardError, TrainingError
from paretune.policy import scoring
from paretune.policy.lora.bank import LoraBank, lora_config
from paretune.policy.mixing.parameter import ParameterMix
from paretune.registry import LEARNERS, describe
from paretune.runs.display import progress_text
from paretune.seeds import forked_torch, generator
from paretune.tasks.base import Task
from paretune.tasks.exact.task import ExactTask
from paretune.training.cost import read_cost
from paretune.training.learners.base import converged
from paretune.training.learners.exact import enumerated_returns
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.loop.run import Run
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Objectives, Prompt

# What it climbs


def z_scores(learner, batches):
    """z of the estimator's mean against the enumerated gradient: along that gradient, and along 8 random directions orthogonal to it."""
    policy, spec = moved(learner), spec_of(learner)
    reward_PM, kl_P, _ = enumerated_returns(policy, TASK, torch.ones(TASK.prompt_count, 1))
    (-(reward_PM @ torch.tensor(W, dtype=torch.float64) - TASK.beta * kl_P).mean()).backward()
    true = flat(policy)
    drawn = []
    for step in range(batches):
        policy.model.zero_grad()
        learner.gradient(policy, learner.collect(policy, TASK, spec, step), beta=TASK.beta)
        drawn.append(flat(policy))
    along = true / np.linalg.norm(true)
    across = generator(0, "directions").normal(size=(8, len(true)))
    across -= np.outer(across @ along, along)
    directions = np.concatenate([along[None], across / np.linalg.norm(across, axis=1, keepdims=True)])
    seen = np.array(drawn) @ directions.T
    return (seen.mean(0) - directions @ true) / (seen.std(0, ddof=1) / np.sqrt(batches))


# Two-sided, over 9 directions. 60 batch means of 64 groups each are close enough to normal for that far out in the tail.
FALSE_ALARM = 1e-4
LIMIT = norm.isf(FALSE_ALARM / 2 / 9)
LARGE = {"rank": 2, "alpha": 4, "samples": 256, "batch": 256, "group": 4}


def test_the_default_estimator_has_the_gradient_of_j_w():
    assert np.abs(z_scores(PolicyGradient(**LARGE), 60)).max() < LIMIT


@pytest.mark.parametrize(
    "biased", [{"kl_in": "loss", "kl_estimator": "k3"}, {"normalize": "group"}, {"length": "token_mean"}], ids=lambda b: [*b.values()][-1]
)
def test_the_same_test_finds_the_biased_variants(biased):
    assert np.abs(z_scores(PolicyGradient(**LARGE, **biased), 60)).max() > LIMIT


def test_several_preferences_in_one_batch_have_the_gradient_of_the_mean_utility():
    """With a preference per prompt there is an adapter per objective and the preference is the gate: against finite sums by hand."""
    learner = PolicyGradient(**LARGE)
    policy, spec = moved(learner, preference=None), spec_of(learner, None)
    assert policy.K == 2
    batch = learner.collect(policy, TASK, spec, 0)
    w_NM = batch.responses.w_NM
    assert (w_NM.reshape(-1, 4, 2) == w_NM.reshape(-1, 4, 2)[:, :1]).all(), "one preference per group"
    assert len(np.unique(w_NM[:, 0])) == 64
    np.testing.assert_allclose(batch.responses.gates_NK.numpy(), w_NM, atol=1e-6)
    utility_N = (w_NM * batch.responses.rewards_NM).sum(1) - TASK.beta * batch.kl_N
    groups = utility_N.reshape(-1, 4)
    np.testing.assert_allclose(batch.advantage_N, ((groups - groups.mean(1, keepdims=True)) * 4 / 3).reshape(-1), atol=1e-12)


def test_it_reaches_the_known_optimum(tmp_path):
    """Attainment of at least 0.97: 0 is the reference, 1 the optimum (which so small a model can express at these two preferences)."""
    task = ExactTask(alphabet=3, length=2, prompt_count=1, width=32, layers=1)
    learner = PolicyGradient(rank=8, alpha=16, samples=4800, batch=96, group=96, lr=1e-2)
    start_M = task.J_M(task.reference_logp_PR("train"), "train")
    for w in ((1.0, 0.0), (0.5, 0.5)):
        cost = learner.train(spec_of(learner, w, task), task, tmp_path / str(w))
        assert (cost.samples, cost.steps) == (4800, 50)
        model, tokenizer = task.load()
        policy = ParameterMix(LoraBank.load(model, {"policy": tmp_path / str(w)}), tokenizer)
        with torch.no_grad():
            rewards_PM, kl_P, _ = enumerated_returns(policy, task, torch.ones(1, 1))
        reached_M = (rewards_PM - task.beta * kl_P[:, None]).mean(0).numpy()
        best_M = task.J_M(task.optimum_logp_PR(np.array(w), "train"), "train")
        assert 0.97 < np.dot(w, reached_M - start_M) / np.dot(w, best_M - start_M) <= 1 + 1e-9


@pytest.mark.parametrize(
    "frugal",
    [{"micro_batch": 2}, {"micro_tokens": 9}, {"checkpointing": True}, {"checkpointing": True, "micro_batch": 8}, {"pieces": True}],
    ids=str,
)
def test_what_saves_memory_changes_no_gradient(frugal, monkeypatch):
    """Against the whole batch at once; with `pieces` the head makes logits for one position at a time."""
    settings = dict(frugal)
    pieces = settings.pop("pieces", False)
    whole, other = PolicyGradient(**SMALL), PolicyGradient(**SMALL, **settings)
    policy, spec = moved(whole), spec_of(whole)
    batch = whole.collect(policy, TASK, spec, 0)
    gradients, losses = [], []
    for learner in (whole, other):
        if learner is other and pieces:
            monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 1)
        policy.model.zero_grad()
        losses.append(learner.gradient(policy, batch, beta=TASK.beta))
        gradients.append(flat(policy))
    assert np.abs(gradients[0]).max() > 1e-3
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-7)
    assert losses[1] == pytest.approx(losses[0], abs=1e-7)
    again = other.collect(policy, TASK, spec, 0)
    np.testing.assert_allclose(again.reference_logp_NT, batch.reference_logp_NT, atol=1e-6)


@pytest.mark.parametrize("found", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=["gpu", "cpu"])
def test_out_of_memory_says_which_knob(found, monkeypatch):
    learner = PolicyGradient(**SMALL)
    policy, spec = moved(learner), spec_of(learner)

    def fail(*_, **__):
        raise found

    monkeypatch.setattr("paretune.training.learners.embedded.draw_step", fail)
    with pytest.raises(TrainingError, match=r"micro_tokens.*checkpointing"):
        learner.collect(policy, TASK, spec, 0)


def test_a_pass_has_whole_groups_where_they_fit():
    learner = PolicyGradient(**SMALL)
    made = learner.collect(moved(learner), TASK, spec_of(learner), 0).responses
    width = made.prompt_ids_PT.shape[1] + made.tokens_NT.shape[1]
    sizes = {
        tokens: {rows.stop - rows.start for rows in made.passes(rows=None, tokens=tokens, group=4)} for tokens in (1, 3 * width, 9 * width)
    }
    assert sizes == {1: {1}, 3 * width: {3, 1}, 9 * width: {8}}
    assert made.passes(rows=None, tokens=None, group=4) == [slice(0, 16)]


def test_the_saved_tensors_shrink():
    """Activations kept for the backward: without checkpointing everything inside the layers, with it their inputs alone."""
    learner, sizes = PolicyGradient(**SMALL), []
    policy = moved(learner)
    made = learner.collect(policy, TASK, spec_of(learner), 0).responses
    for again in (False, True):
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        one = dataclasses.replace(learner, checkpointing=again)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            one.logp(policy, made, slice(0, 16), gates_NK=made.gates_NK)
        sizes.append(sum(kept.values()))
    assert sizes[1] < sizes[0] / 2


# What it leaves behind


def test_a_finished_training(tmp_path):
    learner = PolicyGradient(**SMALL)
    seen = []
    cost = learner.train(spec_of(learner), TASK, tmp_path, progress=seen.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "ledger.json", "train.jsonl"]
    assert read_cost(tmp_path) == cost
    assert (cost.samples, cost.steps, cost.validation_samples) == (64, 4, 0)
    assert 64 <= cost.tokens <= 64 * TASK.length
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    assert seen == [{**line, "steps": 4} for line in lines]
    assert set(lines[0]["rewards"]) == set(TASK.objectives.names)
    assert lines[-1]["samples"] == 64
    assert lines[-1]["lr"] == pytest.approx(learner.lr / 4)
    assert "KL" in progress_text(lines[-1])
    before = weights(tmp_path)
    assert learner.train(spec_of(learner), TASK, tmp_path) == cost, "a second call trains nothing"
    assert weights(tmp_path) == before


def test_the_same_seed_is_the_same_training_and_another_is_not(tmp_path):
    learner = PolicyGradient(**SMALL)
    for name in ("a", "b"):
        learner.train(spec_of(learner), TASK, tmp_path / name)
    other = TrainSpec(task=describe(TASK), learner=describe(learner), preference=W, seed=12)
    learner.train(other, TASK, tmp_path / "c")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_a_start_from_another_training_and_adapters_per_objective(tmp_path):
    learner = PolicyGradient(**SMALL)
    first = spec_of(learner)
    learner.train(first, TASK, tmp_path / "first")
    parents = {first.key: Artifact(first.key, tmp_path / "first", first)}
    idle = PolicyGradient(**{**SMALL, "lr": 1e-12})
    idle.train(spec_of(idle, init_from=(first.key,)), TASK, tmp_path / "second", parents=parents)
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-9, rtol=0)
    both = spec_of(learner, None)
    learner.train(both, TASK, tmp_path / "both")
    folders = Artifact(both.key, tmp_path / "both", both).adapters
    assert [folder.name for folder in folders] == ["adapter-0", "adapter-1"]
    assert LoraBank.load(TASK.load()[0], {folder.name: folder for folder in folders}).count == 2


@pytest.mark.parametrize("name", [name for name in LEARNERS if LEARNERS[name].__module__.startswith("paretune.")])
def test_alpha_follows_rank_unless_it_is_given(name):
    """One scale at every rank, in what is trained and in the key; a rank alone never has the key of an alpha that did not follow."""
    default = LEARNERS.build(name)
    assert describe(default)["alpha"] == 32
    assert describe(dataclasses.replace(default, rank=2)) == describe(dataclasses.replace(default, rank=2, alpha=4))
    assert describe(LEARNERS.build({"name": name, "rank": 2, "alpha": 32}))["alpha"] == 32
    for rank, alpha, scale in ((1, None, 2), (2, None, 2), (24, None, 2), (2, 32, 16)):
        learner = LEARNERS.build({"name": name, "rank": rank, "alpha": alpha, "device": "cpu"})
        policy = learner.start(spec_of(learner, None, fresh=(rank, 3), rule={"name": "identity"}), TASK, {})
        assert {tuple(layer.scalings) for layer in policy.bank.layers} == {(scale, scale)}
        assert lora_config(TASK.load()[0], rank=rank, alpha=alpha, targets="all-linear").lora_alpha == scale * rank  # what trl takes
        assert describe(LEARNERS.build(describe(learner))) == describe(learner)


def test_frozen_adapters_stay_and_fresh_ones_learn_under_the_rule_of_the_training(tmp_path):
    """K = two frozen, then one started from another training, then one fresh; only the last two move, and only they are written."""
    learner = PolicyGradient(**SMALL)
    first = spec_of(learner)
    learner.train(first, TASK, tmp_path / "first")
    parents = {first.key: Artifact(first.key, tmp_path / "first", first)}
    rule = {"name": "constant", "gates_K": [0.5, 0.25, 0.5, 1.0]}
    spec = spec_of(learner, None, frozen_adapters=(first.key, first.key), init_from=(first.key,), fresh=(3,), rule=rule)
    assert spec.parents == (first.key,) * 3
    policy = learner.start(spec, TASK, parents)
    assert policy.K == 4
    assert policy.bank.trainable == policy.bank.names[2:]
    assert {tuple(layer.scalings) for layer in policy.bank._layers} == {(2.0, 2.0, 2.0, 2.0)}, "of every rank alike"
    batch = learner.collect(policy, TASK, spec, 0)
    assert (batch.responses.gates_NK == torch.tensor([0.5, 0.25, 0.5, 1.0])).all()
    learner.train(spec, TASK, tmp_path / "second", parents=parents)
    assert weights(tmp_path / "first") == weights(parents[first.key].path)
    found = Artifact(spec.key, tmp_path / "second", spec).adapters
    assert len(found) == 2
    assert weights(found[0]) != weights(tmp_path / "first")
    wrong = spec_of(learner, None, init_from=(first.key,), fresh=(3,), rule=rule)
    with pytest.raises(ConfigError, match="one gate per adapter"):
        learner.train(wrong, TASK, tmp_path / "third", parents=parents)
    with pytest.raises(ConfigError, match="trains an adapter"):
        learner.train(spec_of(learner, frozen_adapters=(first.key,), fresh=()), TASK, tmp_path / "fourth", parents=parents)


# Prompts, streams, stopping


def test_the_stopping_rule(tmp_path):
    assert not converged([1.0] * 19, 20, 0.015)
    assert converged([0.0] + [1.0] * 20, 20, 0.015)
    assert not converged([1.0, 1.1] * 10, 20, 0.015)
    assert not converged([1.0] * 50, 20, None)
    learner = PolicyGradient(**SMALL, stop_cv=0.9, stop_window=2, validate_every=1, validation_samples=10)
    cost = learner.train(spec_of(learner, scalarizer={"name": "log_product"}), TASK, tmp_path)
    assert (cost.samples, cost.evaluations, cost.validation_samples) == (32, 2, 20)
    assert log_of(tmp_path)[-1]["validation"] < 0


def test_pace():
    learner = PolicyGradient(**{**SMALL, "samples": 160}, warmup=2)
    assert [learner.pace(s) for s in (0, 1, 5, 9)] == pytest.approx([0.5, 0.9, 0.5, 0.1])
    assert PolicyGradient(**SMALL, schedule="cosine").pace(2) == pytest.approx(0.5)
    assert PolicyGradient(**SMALL, schedule="constant").pace(3) == 1


# Rewards outside of their range


def test_rewards_outside_of_their_range_are_counted_in_the_log(tmp_path):
    class Shifted(ExactTask):
        registered_name = "shifted"

        def score(self, prompts, completions):
            return super().score(prompts, completions) * [1.0, -2.0]

    task = Shifted(**{f.name: getattr(TASK, f.name) for f in dataclasses.fields(TASK)})
    learner = PolicyGradient(**SMALL)
    learner.train(spec_of(learner), task, tmp_path / "out")
    lines = log_of(tmp_path / "out")
    assert len(lines) == 2
    for line in lines:
        assert set(line["outside"]) == {"objective_2"}
        found = line["outside"]["objective_2"]
        assert 16 < found["count"] <= 32, "those of a step of 16 and of the one before; a score of 0 is in the range"
        assert -2 <= found["lowest"] < line["rewards"]["objective_2"] < found["highest"] <= 0
    learner.train(spec_of(learner), TASK, tmp_path / "in")
    assert not any("outside" in line for line in log_of(tmp_path / "in"))


# What it refuses


@dataclass(frozen=True)
class Holes(ExactTask):
    """The same task, but the second objective cannot score some responses."""

    every: int = 0

    def score(self, prompts, completions):
        rewards_NM = super().score(prompts, completions)
        if self.every:
            rewards_NM[:: self.every, 1] = np.nan
        return rewards_NM


def holes(every):
    return Holes(alphabet=3, length=2, prompt_count=2, width=16, layers=1, every=every)


def test_unscored_responses_are_counted_and_left_out(tmp_path):
    learner = PolicyGradient(**SMALL, max_unscored=0.5)
    task = holes(4)
    learner.train(spec_of(learner, task=task), task, tmp_path)
    assert log_of(tmp_path)[0]["unscored"] == {"objective_1": 0, "objective_2": 8}
    assert np.isfinite(list(log_of(tmp_path)[-1]["rewards"].values())).all()


def test_too_many_unscored_responses_stop_the_run(tmp_path):
    learner = PolicyGradient(**{**SMALL, "samples": 640})
    with pytest.raises(RewardError) as error:
        learner.train(spec_of(learner, task=holes(4)), holes(4), tmp_path)
    assert error.value.exit_code == 1
    assert "objective_2" in error.value.rule
    assert "64 of 256" in error.value.found, "judged as soon as 256 responses are seen"
    assert (tmp_path / "checkpoint").is_dir()


def steps_of(learner, count):
    """What each of some steps did to all responses of its batch, (log pi_new - log pi_old)^2 / 2 in the mean, and the run's record."""
    policy, spec, run = moved(learner), spec_of(learner), Run(key="k")
    optimizer, kls = learner.new_optimizer(policy.parameters()), []
    for _ in range(count):
        batch = learner.collect(policy, TASK, spec, run.step, run.weighting)
        made = batch.responses
        learner.advance(policy, optimizer, TASK, spec, run)
        with torch.no_grad():
            new_NT = learner.logp(policy, made, slice(0, len(made.tokens_NT)), gates_NK=made.gates_NK)
        kls.append(float((((new_NT.double() - made.logp_NT) * made.mask_NT).sum(1) ** 2).mean()) / 2)
    return np.array(kls), run, flat(policy, values=True)


def test_an_update_that_goes_too_far_is_shortened():
    """At 200 times the learning rate; the bound is kept on all responses, of which 16 are looked at."""
    far = {**SMALL, "lr": 200 * PolicyGradient.lr, "schedule": "constant"}
    free, _, _ = steps_of(PolicyGradient(**far, step_kl=None), 4)
    kept, run, _ = steps_of(PolicyGradient(**far, step_kl=0.04), 4)
    assert run.kl / 10 < 0.04, "the KL so far has no say"
    assert free.mean() > 5 * 0.04, "a training that overshoots"
    assert kept.max() < 3 * 0.04, "on all responses"
    assert kept.mean() > 0.04 / 10, "shortened to the bound, not stopped"
    assert 0 < run.lr_share < 0.5


def test_the_bound_is_a_tenth_of_the_way_so_far_where_that_is_more():
    far = {**SMALL, "lr": 200 * PolicyGradient.lr, "schedule": "constant"}
    near, run, _ = steps_of(PolicyGradient(**far, step_kl=1e-5), 4)
    assert run.kl > 0.02, "a policy that is away from the reference"
    assert 1e-5 * 10 < near.mean() < 3 * run.kl / 10


def test_rounding_is_not_taken_for_a_step(monkeypatch):
    """Log-probabilities that move by themselves, as in bfloat16: a bound below that would shrink a harmless rate to nothing."""
    noise, logp = torch.Generator().manual_seed(3), PolicyGradient.logp

    def rounded(*given, **settings):
        exact_NT = logp(*given, **settings)
        return exact_NT + 0.3 * torch.randn(exact_NT.shape, generator=noise)

    learner = PolicyGradient(**{**SMALL, "schedule": "constant", "lr": 1e-6}, step_kl=1e-4)
    assert steps_of(learner, 8)[1].rounding < 1e-9, "in float32 there is next to none"
    monkeypatch.setattr(PolicyGradient, "logp", rounded)
    policy, spec, run = moved(learner), spec_of(learner), Run(key="k")
    optimizer, shares = learner.new_optimizer(policy.parameters()), []
    for _ in range(12):
        learner.advance(policy, optimizer, TASK, spec, run)
        shares.append(run.lr_share)
        assert 0.01 < run.rounding < 1.0
    assert min(shares) > 0.3


def test_the_learning_rate_comes_back_where_there_is_room():
    learner = PolicyGradient(**{**SMALL, "schedule": "constant"}, step_kl=10.0)
    policy, spec, run = moved(learner), spec_of(learner), Run(key="k", lr_share=0.3)
    optimizer = learner.new_optimizer(policy.parameters())
    shares = []
    for _ in range(7):
        learner.advance(policy, optimizer, TASK, spec, run)
        shares.append(run.lr_share)
    np.testing.assert_allclose(shares, [min(1.0, 0.3 * 1.25**n) for n in range(1, 8)])


def test_a_bound_that_is_not_reached_changes_nothing(monkeypatch):
    """Bit for bit; and far from the bound few updates are looked at: the first, and then one of five."""
    called, logp = [], PolicyGradient.logp
    monkeypatch.setattr(PolicyGradient, "logp", lambda *given, **settings: called.append(1) or logp(*given, **settings))
    _, _, free = steps_of(PolicyGradient(**SMALL, step_kl=None), 6)
    plain = len(called)
    _, run, kept = steps_of(PolicyGradient(**SMALL, step_kl=1e6), 6)
    assert np.array_equal(free, kept)
    assert run.lr_share == 1.0
    assert len(called) - plain == plain + 2 * 2, "before and after the steps 0 and 5"


def test_the_log_has_the_learning_rate_that_a_step_was_taken_with():
    """Not the next one's, which a bound has changed since."""
    learner = PolicyGradient(**{**SMALL, "lr": 200 * PolicyGradient.lr}, step_kl=0.01)
    policy, spec, run = moved(learner), spec_of(learner), Run(key="k")
    optimizer, shares = learner.new_optimizer(policy.parameters()), []
    for step in range(2):
        shares.append(run.lr_share)
        window = [learner.advance(policy, optimizer, TASK, spec, run)]
        used = optimizer.param_groups[0]["lr"]
        assert learner.record(TASK, spec, run, window, [])["lr"] == used == learner.lr * learner.pace(step) * shares[-1]
        assert run.lr_share != shares[-1]


@pytest.mark.parametrize(("bound", "step"), [(None, 1), (0.05, 0)], ids=["found by the next loss", "found by the bound"])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, bound, step):
    learner = PolicyGradient(**{**SMALL, "lr": 1e30, "clip_norm": None, "schedule": "constant", "step_kl": bound})
    with pytest.raises(TrainingError) as error:
        learner.train(spec_of(learner), TASK, tmp_path)
    assert f"at step {step}" in error.value.found
    assert "lower lr (now 1e+30)" in error.value.remedy


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"batch": 10, "group": 4}, "batch=10, group=4"),
        ({"group": 1}, "group=1"),
        ({"samples": 10}, "samples=10, batch=64"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"max_unscored": 2.0}, "max_unscored=2.0"),
        ({"kl_in": "loss"}, "kl_in='loss', kl_estimator='k1'"),
        ({"kl_estimator": "k3"}, "kl_in='reward', kl_estimator='k3'"),
        ({"baseline": "mean"}, "'mean'"),
        ({"learning_rate": 1.0}, "'learning_rate'"),
    ],
)
def test_fields_that_cannot_be_are_refused(given, found):
    with pytest.raises(ConfigError) as error:
        LEARNERS.build({"name": "pg", **given})
    assert found in error.value.found


def test_what_a_spec_may_ask_for(tmp_path):
    learner = PolicyGradient(**SMALL)
    with pytest.raises(ConfigError, match="scalarized at"):
        learner.train(spec_of(learner, scalarize_at="gradient"), TASK, tmp_path)
    with pytest.raises(ConfigError, match="scalarizer"):
        learner.train(spec_of(learner, scalarizer={"name": "tchebycheff"}), TASK, tmp_path)


# Any causal LM

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"


@dataclass(frozen=True)
class Letters(Task):
    """A random Llama over letters with two ids that end a response, chat prompts of several lengths, and counts of letters as scores."""

    objectives = Objectives(("a", "b"), (0.0, 0.0), (1.0, 1.0))
    beta = 0.05
    max_new_tokens = 6
    registered_name, version = "letters", 1

    def load(self):
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        symbols = {s: i for i, s in enumerate(["<pad>", "<eos>", "<end>", ":", *"abcdefgh"])}
        tokens = Tokenizer(models.WordLevel(symbols, unk_token="<pad>"))
        tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        tokens.decoder = decoders.Fuse()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<pad>", chat_template=CHAT)
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(
            vocab_size=len(symbols), max_position_embeddings=64, eos_token_id=[1, 2], pad_token_id=0, bos_token_id=3, **size
        )
        with forked_torch(1):
            model = LlamaForCausalLM(config).eval()
            torch.nn.init.normal_(model.lm_head.weight, std=0.3)  # or no hidden state could make a letter likely
        return model, tokenizer

    def prompts(self, split):
        return [Prompt(messages=({"role": "user", "content": text},)) for text in ("a", "abc", "fghfghfgh")]

    def score(self, prompts, completions):
        assert not any("<" in c for c in completions), "special tokens are not text"
        return np.array([[c.count("a") / 6, c.count("b") / 6] for c in completions])


def test_it_trains_any_causal_lm_on_chat_prompts(tmp_path):
    """Uneven prompts (left padding), two EOS ids, a chat template; the letter that pays becomes more frequent."""
    task = Letters()
    learner = PolicyGradient(rank=4, alpha=8, samples=1920, batch=48, group=8, lr=1e-2, log_every=5, dtype="float32", device="cpu")
    spec = spec_of(learner, (0.0, 1.0), task)
    assert learner.start(spec, task, {}).eos_ids == (1, 2)
    learner.train(spec, task, tmp_path)
    lines = log_of(tmp_path)
    assert lines[-1]["rewards"]["b"] > lines[0]["rewards"]["b"] + 0.2
    assert lines[-1]["rewards"]["a"] < lines[0]["rewards"]["a"] + 0.05


def test_bfloat16_models_train(tmp_path):
    learner = PolicyGradient(**SMALL, dtype="bfloat16")
    learner.train(spec_of(learner), TASK, tmp_path)
    from safetensors.torch import load_file

    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "adapter_model.safetensors").values())

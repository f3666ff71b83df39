"""Gates that depend on the prompt: how they are measured, the ridge behind the bandit, and what it learns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from oracles import small_task
from paretune.errors import ConfigError
from paretune.evaluation.evaluate import evaluate
from paretune.methods.contextual import Ridge, learn_gates
from paretune.policy.contextual import Contextual, Features, GateBasis, Pooled, box_lattice
from paretune.policy.family import Family
from paretune.policy.returns import ExactReturns, SampledReturns
from paretune.policy.rules import Identity
from paretune.registry import GATE_RULES, METHODS, describe
from paretune.seeds import generator
from paretune.tasks.preferences import judged_preferences
from paretune.testing.methods import check_method, quick_learner, quick_task, train_plan
from paretune.types import Prompt


@dataclass(frozen=True)
class SameForAll(Identity):
    """The preference itself, said prompt by prompt."""

    def prompt_gates(self, w_WM, prompts):
        return np.repeat(self.gates(w_WM)[:, None], len(prompts), axis=1)


@dataclass(frozen=True)
class ByFirstLetter(Identity):
    """Prompts that begin with `letter` get the first expert alone, others the preference."""

    letter: str = "a"

    def prompt_gates(self, w_WM, prompts):
        gates_WPK = np.repeat(self.gates(w_WM)[:, None], len(prompts), axis=1)
        gates_WPK[:, [p.text[0] == self.letter for p in prompts]] = np.eye(w_WM.shape[1])[0]
        return gates_WPK


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    task, learner = small_task(context=0.8, prompt_count=8), quick_learner(steps=60)
    method = METHODS.build({"name": "experts", "mixing": "parameter"})
    done = train_plan(method, task, learner, tmp_path_factory.mktemp("experts"), seed=0)
    return task, learner, done


def _with(family, rule):
    return replace(family, rule=rule)


@pytest.mark.parametrize("mixing", ["parameter", "logit"])
def test_constant_prompt_gates_are_the_plain_ones(trained, mixing):
    task, learner, done = trained
    plain = METHODS.build({"name": "experts", "mixing": mixing}).policy(task, learner, done, 0)
    told = _with(plain, SameForAll())
    for exact in (True, False):
        one, two = (evaluate(task, family, samples=8, exact=exact).metrics for family in (plain, told))
        assert one == two
    prompts = [p.text for p in task.prompts("test")]
    assert plain.sample(prompts, (0.3, 0.7), n=2) == told.sample(prompts, (0.3, 0.7), n=2)


@pytest.mark.parametrize("mixing", ["parameter", "logit"])
def test_each_prompt_is_measured_and_sampled_at_its_own_gates(trained, mixing):
    """A batch with gates per prompt gives, prompt by prompt, what plain gates give it."""
    task, learner, done = trained
    plain = METHODS.build({"name": "experts", "mixing": mixing}).policy(task, learner, done, 0)
    letter = task.prompts("train")[0].text[0]
    family = _with(plain, ByFirstLetter(letter=letter))
    w_WM = np.array([[0.2, 0.8]])
    prompts = task.prompts("train")
    first_P = np.array([p.text[0] == letter for p in prompts])
    assert 0 < first_P.sum() < len(prompts)
    gates_W = family.gates(w_WM, prompts)
    for measure in (_exact_rewards, _sampled_rewards):
        mixed_PM = measure(task, family, gates_W)
        ours_PM = np.where(first_P[:, None], measure(task, family, np.eye(2)[:1]), measure(task, family, w_WM))
        np.testing.assert_allclose(mixed_PM, ours_PM, atol=1e-6)
    asked = [p.text for p in prompts]
    answers = family.sample(asked, w_WM[0], n=2, seed=3)
    alone, expert = plain.sample(asked, w_WM[0], n=2, seed=3), plain.sample(asked, [1.0, 0.0], n=2, seed=3)
    assert answers == [e if first else a for first, a, e in zip(first_P, alone, expert, strict=True)]


def _exact_rewards(task, family, gates_W):
    return ExactReturns(task, family.policy, "train").at(gates_W).rewards_WSM[0]


def _sampled_rewards(task, family, gates_W):
    return SampledReturns(task, family.policy, "train", samples=task.prompt_count, seed=5).at(gates_W).rewards_WSM[0]


def test_composition_limit_of_gates_per_prompt():
    task = small_task(context=0.6)
    w_PM = generator(0, "limit").dirichlet(np.ones(2), task.prompt_count)
    each = [task.composition_limit_logp_PR(w_M, "train")[p] for p, w_M in enumerate(w_PM)]
    np.testing.assert_allclose(task.composition_limit_logp_PR(w_PM, "train"), np.stack(each), atol=1e-12)


def test_ridge_is_the_closed_form():
    rng = generator(0, "ridge")
    z_NZ, y_NM = rng.normal(size=(40, 6)), rng.normal(size=(40, 3))
    model = Ridge(6, 3)
    for start in range(0, 40, 7):
        model.add(z_NZ[start : start + 7], y_NM[start : start + 7])
    theta_ZM, inverse_ZZ = model.solve(0.7)
    stacked_ZZ = np.concatenate([z_NZ, np.sqrt(0.7) * np.eye(6)])
    expected_ZM = np.linalg.lstsq(stacked_ZZ, np.concatenate([y_NM, np.zeros((6, 3))]), rcond=None)[0]
    np.testing.assert_allclose(theta_ZM, expected_ZM, atol=1e-10)
    x_Z = rng.normal(size=6)
    width = x_Z @ np.linalg.inv(z_NZ.T @ z_NZ + 0.7 * np.eye(6)) @ x_Z
    assert ((inverse_ZZ @ x_Z) ** 2).sum() == pytest.approx(width)


def test_the_basis_is_a_gaussian_process_at_its_landmarks():
    """Inner products of terms are 1 + the kernel, exactly where one of two gates is a landmark; never above the kernel's diagonal."""
    basis, gates_CK = GateBasis(2, landmarks=16, width=0.5, top=1.5), generator(0, "basis").random((20, 2)) * 1.5
    landmarks = box_lattice(2, 1.5, 16)
    found = basis.of(gates_CK) @ basis.of(landmarks).T
    kernel = np.exp(-((gates_CK[:, None] - landmarks[None]) ** 2).sum(-1) / 0.5)
    np.testing.assert_allclose(found, 1 + kernel, atol=1e-5)
    assert basis.terms == 17
    assert ((basis.of(gates_CK) ** 2).sum(1) <= 2 + 1e-6).all()
    far = basis.of(np.array([[90.0, 90.0]]))
    np.testing.assert_allclose(far, np.eye(17)[:1], atol=1e-12)


CENTRES_CMK = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.3, 0.3], [0.6, 0.1]]])  # where each objective peaks, by context


def _peaks(context_N, gates_NK):
    """(N, M) returns of a problem whose answer is known: at w the best gates are sum_m w_m center_m, if w sums to 1."""
    return 1.0 - ((gates_NK[:, None] - CENTRES_CMK[context_N]) ** 2).sum(-1)


def _learned(algorithm="linucb", *, seed=0, rounds=60, noise=0.2, features=None):
    features_PF = np.repeat(np.eye(2), 4, axis=0) if features is None else features
    context_P = np.repeat([0, 1], 4)
    rng = generator(seed, "noise")
    regret = []

    def pull(number, prompt_N, gates_NK):
        y_NM = _peaks(context_P[prompt_N], gates_NK)
        regret.append(float((1 - y_NM).mean()))
        return y_NM + noise * rng.normal(size=y_NM.shape)

    basis = GateBasis(2, landmarks=16, width=0.5, top=1.0)
    learned = learn_gates(
        pull,
        features_PF,
        box_lattice(2, 1.0, 130),
        basis,
        objectives=2,
        rounds=rounds,
        batch=8,
        algorithm=algorithm,
        explore=1.0,
        ridge=0.1,
        between=0.0,
        seed=seed,
    )
    return learned, regret


def _rule(learned, features):
    theta = tuple(tuple(tuple(map(float, row)) for row in rows) for rows in learned.theta_DQM)
    return Contextual(features=features, mean_F=(0.5, 0.5), adapters=2, landmarks=16, width=0.5, top=1.0, theta_DQM=theta)


@pytest.mark.parametrize("algorithm", ["linucb", "thompson"])
def test_a_bandit_learns_the_best_gates_of_each_context_and_preference(algorithm):
    learned, regret = _learned(algorithm)
    assert np.mean(regret[-20:]) < 0.6 * np.mean(regret[:6]), "it exploits what it learned"
    rule = _rule(learned, Features("letters", 1, "ab"))
    w_WM = judged_preferences(2)
    gates_WPK = rule.prompt_gates(w_WM, [Prompt(text="a"), Prompt(text="b")])
    best_WPK = np.einsum("wm,pmk->wpk", w_WM, CENTRES_CMK)
    assert np.abs(gates_WPK - best_WPK).mean() < 0.06
    assert np.abs(gates_WPK[:, 0] - gates_WPK[:, 1]).mean() > 0.15, "the contexts differ"


def test_regret_shrinks_with_the_budget():
    def regret(rounds):
        w_WM = judged_preferences(2)
        found = []
        for seed in range(3):
            rule = _rule(_learned(seed=seed, rounds=rounds, noise=0.5)[0], Features("letters", 1, "ab"))
            gates_WPK = rule.prompt_gates(w_WM, [Prompt(text="a"), Prompt(text="b")])
            found.append(((gates_WPK - np.einsum("wm,pmk->wpk", w_WM, CENTRES_CMK)) ** 2).sum(-1).mean())
        return np.mean(found)

    assert regret(160) < 0.5 * regret(10)


def test_learning_is_deterministic_by_seed_and_skips_what_is_unscored():
    one, two, other = _learned()[0], _learned()[0], _learned(seed=1)[0]
    np.testing.assert_array_equal(one.theta_DQM, two.theta_DQM)
    assert not np.array_equal(one.theta_DQM, other.theta_DQM)

    def pull(number, prompt_N, gates_NK):
        y_NM = _peaks(np.zeros(len(prompt_N), dtype=int), gates_NK)
        y_NM[0, 1] = np.nan
        return y_NM

    lost = learn_gates(
        pull,
        np.zeros((4, 0)),
        box_lattice(2, 1.0, 50),
        GateBasis(2, landmarks=16, width=0.5, top=1.0),
        objectives=2,
        rounds=10,
        batch=4,
        algorithm="linucb",
        explore=1.0,
        ridge=1e-3,
        between=0.01,
        seed=0,
    )
    assert (lost.pulls, lost.unscored) == (40, 10)
    assert np.isfinite(lost.theta_DQM).all()


def test_features_are_read_from_text_alone():
    letters = Features.fitting("auto", [Prompt(text="abc"), Prompt(text="bca")], share=1.0)
    assert (letters.kind, letters.size, letters.symbols) == ("letters", 3, "abc")
    found = letters.of([Prompt(text="abc"), Prompt(text="azc"), Prompt(text="a"), Prompt(text="")])
    np.testing.assert_allclose(found.sum(1) * np.sqrt(3), [3, 2, 1, 0])
    words = Features.fitting("auto", [Prompt(text="write a long poem")], share=0.5)
    assert words.kind == "words"
    chat = Prompt(messages=({"role": "user", "content": "Poem  LONG"},))
    one, two = words.of([chat, Prompt(text="long poem")])
    np.testing.assert_array_equal(one, two)
    assert np.sqrt((one**2).sum()) == pytest.approx(0.5)
    assert Features.fitting("none", [Prompt(text="abc")], share=1.0).of([Prompt(text="x")]).shape == (1, 0)
    assert letters.of([]).shape == (0, 9)  # of `Family.sample([])`


def test_a_rule_survives_json_and_says_what_is_wrong_with_it():
    rule = _rule(_learned(rounds=20)[0], Features("letters", 1, "ab"))
    again = GATE_RULES.build(describe(rule))
    prompts, w_WM = [Prompt(text="a"), Prompt(text="c")], judged_preferences(2)
    np.testing.assert_array_equal(again.prompt_gates(w_WM, prompts), rule.prompt_gates(w_WM, prompts))
    with pytest.raises(ConfigError, match="theta_DQM has a row per feature"):
        GATE_RULES.build({**describe(rule), "landmarks": 9})
    with pytest.raises(ConfigError, match="every row of gates has its returns"):
        Pooled(gates_GK=((0.0, 1.0),), returns_GM=())


def test_static_gates_are_the_best_of_their_grid(trained):
    task, learner, done = trained
    family = METHODS.build({"name": "static-gates", "budget": 16}).policy(task, learner, done, 0)
    grid = box_lattice(2, 1.25, 16)
    measured = ExactReturns(task, family.policy, "train").at(grid)
    rewards_GPM, kl_GP = measured.rewards_WSM, measured.kl_WS
    returns_GM = (rewards_GPM - task.beta * kl_GP[..., None]).mean(1)
    for w_M, gates_K in zip(task.judged(), family.gates(task.judged()), strict=True):
        np.testing.assert_array_equal(gates_K, grid[int((returns_GM @ w_M).argmax())])
    assert family.cost(task.judged()).evaluations == 16


def test_contextual_beats_the_best_static_gates_on_prompts_that_it_saw(trained, tmp_path):
    task, learner, done = trained
    static = METHODS.build("static-gates").policy(task, learner, done, 0)
    # Features count in full: with 8 prompts, the default penalties keep gates so near to common ones that a gain is within what another
    # rounding of the experts' training changes (-.016 to .017).
    told = {"name": "contextual", "rounds": 60, "share": 1.0, "between": 0.0}
    family, blind = (METHODS.build({**told, **f}).policy(task, learner, done, 0) for f in ({}, {"features": "none"}))
    ours, theirs, without = (evaluate(task, f, splits=["train"]) for f in (family, static, blind))
    one, two, three = (e.metrics["splits"]["train"]["attainment"]["mean"] for e in (ours, theirs, without))
    assert one > two + 0.02  # seen: .045 to .066 over instruction sets, threads and roundings
    assert three < two + 0.005  # the gain is the prompt's: without features, the same bandit loses .03 to .08
    assert ours.cost.evaluations == 60
    assert ours.cost.validation_samples == 0
    family.save(tmp_path / "family")
    loaded = Family.load(tmp_path / "family")
    w_WM, prompts = task.judged(), task.prompts("test")
    np.testing.assert_array_equal(loaded.gates(w_WM, prompts), family.gates(w_WM, prompts))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("method", [{"name": "contextual", "rounds": 6, "landmarks": 9}, {"name": "static-gates", "budget": 8}])
def test_conformance(method, count):
    check_method(method, task=quick_task(objective_count=count))


def test_conformance_at_the_logit_level():
    check_method({"name": "contextual", "rounds": 4, "landmarks": 9, "mixing": "logit", "algorithm": "thompson"})


def test_what_a_user_can_get_wrong():
    with pytest.raises(ConfigError, match="top, width, ridge positive"):
        METHODS.build({"name": "contextual", "ridge": 0.0})
    with pytest.raises(ConfigError, match="budget is at least 4"):
        METHODS.build({"name": "static-gates", "budget": 1})

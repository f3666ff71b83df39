"""How objectives relate: against SciPy, closed forms and the task's own dials; what is unknown stays unknown."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr

from paretune.errors import ConfigError
from paretune.evaluation.relations import STATISTICS, _constant_PM, _flat, rank, relate, trade_off_rates
from paretune.registry import TASKS
from paretune.seeds import generator
from paretune.tasks.exact.task import ExactTask
from paretune.types import Objectives

TINY = {"alphabet": 5, "length": 3, "prompt_count": 4, "width": 32, "layers": 1}


@TASKS.register("related-by-tests")
@dataclass(frozen=True)
class Related(ExactTask):
    """An exact task that is sampled, with scores of the tests' own."""

    mode: str = "plain"

    is_exact = False

    @property
    def objectives(self):
        return Objectives(("only",), (0.0,), (1.0,)) if self.mode == "one" else super().objectives

    def score(self, prompts, completions):
        scores_NM = super().score(prompts, completions).copy()
        if self.mode == "constant":
            scores_NM[:, 1] = 0.1
        if self.mode == "half":
            scores_NM[[len(c) < 2 for c in completions], 1] = np.nan
        if self.mode == "never":
            scores_NM[:, 0] = np.nan
        return scores_NM


def repeated(rewards_PRM, count_PR):
    """Integer weights as repetitions: (P, N, M) for SciPy, which knows no weights."""
    return [np.repeat(r_RM, c_R, axis=0) for r_RM, c_R in zip(rewards_PRM, count_PR, strict=True)]


def test_statistics_agree_with_scipy_on_repeated_values():
    """Ties, weights and prompts of different difficulty; a rank that ignores weights, or ranks by prompt, gives other numbers."""
    rng = generator(0, "scipy")
    rewards_PRM = rng.integers(4, size=(3, 7, 3)) + np.arange(3)[:, None, None] * [0.0, 1.0, -1.0]
    count_PR = rng.multinomial(20, np.full(7, 1 / 7), size=3)
    with np.errstate(divide="ignore"):
        logw_PR = np.log(count_PR / 20)
    each = repeated(rewards_PRM, count_PR)
    whole = np.concatenate(each)
    for j, k in ((0, 1), (0, 2), (1, 2)):
        within = np.mean([pearsonr(r[:, j], r[:, k])[0] for r in each])
        assert STATISTICS["within"](rewards_PRM, logw_PR)[j, k] == pytest.approx(within, abs=1e-12)
        assert STATISTICS["overall"](rewards_PRM, logw_PR)[j, k] == pytest.approx(pearsonr(whole[:, j], whole[:, k])[0], abs=1e-12)
        assert STATISTICS["spearman"](rewards_PRM, logw_PR)[j, k] == pytest.approx(spearmanr(whole[:, j], whole[:, k])[0], abs=1e-12)


def test_ranks_are_scipy_s_average_ranks():
    values = generator(1, "ranks").integers(5, size=30).astype(float)
    np.testing.assert_allclose(rank(values, np.full(30, 1 / 30)), (rankdata(values) - 0.5) / 30, atol=1e-12)


def test_trade_off_rates_are_what_a_small_step_towards_one_objective_does():
    """A finite difference along exp(t r_k) times the reference."""
    task = ExactTask(rho=-0.4, scale=3.0, seed=1, **TINY)
    rewards_PRM, logp_PR = task.rewards_PRM("train"), task.reference_logp_PR("train")
    rate_MM = trade_off_rates(rewards_PRM, logp_PR)

    def expected(t, k):
        tilt_PR = logp_PR + t * rewards_PRM[:, :, k]
        p_PR = np.exp(tilt_PR - np.logaddexp.reduce(tilt_PR, axis=1, keepdims=True))
        return np.einsum("pr,prm->m", p_PR, rewards_PRM) / len(p_PR)

    for k in (0, 1):
        moved_M = expected(1e-4, k) - expected(-1e-4, k)
        np.testing.assert_allclose(rate_MM[:, k], moved_M / moved_M[k], rtol=1e-5)
    assert np.diagonal(rate_MM).tolist() == [1, 1]
    np.testing.assert_allclose(trade_off_rates(rewards_PRM[:, :, ::-1], logp_PR), rate_MM[::-1, ::-1], atol=1e-12)


@pytest.mark.parametrize(
    ("dials", "expected"),
    [
        ({"rho": -0.8}, {"rho": -0.8, "sparse": 0.0, "noise": 0.0}),
        ({"rho": 0.3, "objective_count": 3, "scale": 10.0}, {"rho": 0.3, "scale": 10.0, "objective_count": 3}),
        ({"sparse": 0.05, "noise": 0.8}, {"sparse": 0.05, "noise": 0.8}),
        ({"context": 0.8}, {"rho": 0.0, "context": 0.8}),
    ],
)
def test_an_exact_task_is_found_on_its_own_dials(dials, expected):
    found = relate(ExactTask(seed=1, **TINY, **dials))
    tolerance = {"rho": 0.06, "scale": 1.5, "sparse": 0.01, "noise": 0.1, "context": 0.15, "objective_count": 0}
    for name, value in expected.items():
        assert found.dials[name] == pytest.approx(value, abs=tolerance[name]), name
    assert found.exact
    assert found.samples == 0
    assert all(pair["within"].low == pair["within"].value == pair["within"].high for pair in found.pairs)


def test_conflict_is_told_prompt_by_prompt():
    task = ExactTask(context=0.8, seed=1, **TINY)
    found = relate(task)
    assert found.pairs[0]["conflict"] == pytest.approx(0.5)
    assert ((found.within_PMM[:, 0, 1] < 0) == task.contexts("train")).all()
    assert relate(ExactTask(rho=-0.8, seed=1, **TINY)).pairs[0]["conflict"] == 1
    sampled = relate(task, exact=False, group=64)
    assert sampled.pairs[0]["surely_conflict"] == pytest.approx(0.5)
    assert sampled.pairs[0]["surely_agree"] == pytest.approx(0.5)


def test_samples_agree_with_enumeration_and_say_how_far():
    """Ten seeds: each 95 % interval covers the exact value. Seven or fewer would do so with probability 0.01 if the level were kept."""
    task = ExactTask(rho=-0.5, seed=2, **TINY)
    exact = relate(task).pairs[0]
    hits = {"within": 0, "overall": 0, "spearman": 0}
    for seed in range(10):
        sampled = relate(task, exact=False, group=32, seed=seed).pairs[0]
        for name in hits:
            assert sampled[name].low < sampled[name].value < sampled[name].high
            hits[name] += sampled[name].low <= exact[name].value <= sampled[name].high
    assert min(hits.values()) >= 8, hits
    again = relate(task, exact=False, group=32, seed=9).pairs[0]
    assert again == sampled


def test_few_responses_have_no_interval():
    pair = relate(ExactTask(seed=1, **TINY), exact=False, group=8).pairs[0]
    assert np.isfinite(pair["within"].value)
    assert np.isnan([pair["within"].low, pair["within"].high, pair["surely_conflict"], pair["surely_agree"]]).all()


def test_spread_paid_and_flat_of_a_rare_reward():
    task = ExactTask(sparse=0.05, seed=1, **TINY)
    rare = relate(task).objectives[1]
    rates_P = (np.exp(task.reference_logp_PR("train")) * (task.rewards_PRM("train")[:, :, 1] > 0)).sum(1)
    assert rare["paid"] == pytest.approx(rates_P.mean())
    assert rare["flat"] == pytest.approx(((1 - rates_P) ** 8 + rates_P**8).mean())
    payoff = task.rewards_PRM("train")[:, :, 1].max()
    assert rare["spread"] == pytest.approx(payoff * np.sqrt((rates_P * (1 - rates_P)).mean()))


def test_flat_from_draws_is_unbiased():
    """Over all 2 ** 10 outcomes of 10 draws of a coin, the mean estimate is p ** 8 + (1 - p) ** 8."""
    p, total = 0.8, 0.0
    for heads in range(11):
        from math import comb

        chance = comb(10, heads) * p**heads * (1 - p) ** (10 - heads)
        total += chance * _flat(np.array([[heads / 10, 1 - heads / 10]]), np.array([10]), exact=False)
    assert total == pytest.approx(p**8 + (1 - p) ** 8)
    assert np.isnan(_flat(np.array([[1.0]]), np.array([7]), exact=False))


def test_a_constant_reward_has_unknown_correlations_and_is_named():
    """0.1 is chosen because its mean is not exactly 0.1: rounding must not become a correlation."""
    found = relate(Related(mode="constant", seed=1, **TINY))
    assert found.objectives[1]["constant"]
    assert not found.objectives[0]["constant"]
    assert np.isnan(found.within_MM[0, 1])
    assert np.isnan(found.overall_MM[0, 1])
    assert found.pairs[0]["known_prompts"] == 0
    assert np.isnan(found.dials["rho"])
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["pairs"][0]["within"]["value"] is None
    assert written["matrices"]["rate"][0][1] is None


def test_constants_are_seen_through_weights():
    rewards_PRM = np.array([[[1.0, 0.3], [1.0, 0.3], [2.0, 0.7]]])
    with np.errstate(divide="ignore"):
        assert _constant_PM(rewards_PRM, np.log([[0.5, 0.5, 0.0]])).tolist() == [[True, True]]
    assert _constant_PM(rewards_PRM, np.log([[0.4, 0.4, 0.2]])).tolist() == [[False, False]]


def test_unscored_responses_are_counted_and_left_out():
    found = relate(Related(mode="half", seed=1, **TINY), group=32)
    unscored = found.objectives[1]["unscored"]
    assert 0 < unscored < found.samples
    assert found.objectives[0]["unscored"] == 0
    assert found.pairs[0]["within"].n == found.samples - unscored


@pytest.mark.parametrize(
    ("mode", "given", "rule", "shown"),
    [
        ("one", {}, "at least two objectives", "only"),
        ("never", {}, "that all of them could score", "objective_1 64, objective_2 0"),
        ("plain", {"group": 1}, "at least 2 are drawn", "1 responses to 16 prompts"),
        ("plain", {"exact": True}, "enumerated on exact tasks only", "exact = True"),
    ],
)
def test_what_cannot_be_related_is_refused(mode, given, rule, shown):
    with pytest.raises(ConfigError) as error:
        relate(Related(mode=mode, seed=1, **TINY), **given)
    assert rule in str(error.value)
    assert shown in str(error.value)

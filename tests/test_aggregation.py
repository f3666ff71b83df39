"""Aggregations by hand, against `advantages` (which TRL checks), and what all of them keep: names, missing scores, constant rewards."""

import inspect

import numpy as np
import pytest
import torch

from learner_cases import SMALL, TASK, flat, log_of, moved, spec_of
from paretune.errors import ConfigError
from paretune.seeds import generator
from paretune.training import advantages as aggregation
from paretune.training.advantages import AGGREGATIONS, advantages, aggregate_advantages
from paretune.training.combine import Combine
from paretune.training.learners.exact import ExactGradient, aggregated, enumerated
from paretune.training.learners.policy_gradient import PolicyGradient

NAN = np.nan
ALL = [*({"name": name} for name in AGGREGATIONS), {"name": "gd2po", "form": "snr", "tau": 0.6}]
W = np.array([0.75, 0.25])
HAND = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])  # one group; both spreads are 1 / sqrt(3)


def ours(given, returns, w=W, **settings):
    returns = np.asarray(returns, dtype=float)
    given = {"name": given} if isinstance(given, str) else given
    return aggregate_advantages(given, returns, np.tile(w, (len(returns), 1)), group=settings.pop("group", 4), **settings)


def drawn(groups=3, group=4, m=2, seed=0):
    return generator(seed, "aggregation").normal(size=(groups * group, m)) * (1 + np.arange(m))


ROOT3 = 3**0.5
BY_HAND = {
    "grpo": np.array([-0.5, -0.25, 0.25, 0.5]) / np.sqrt((0.25 + 0.0625) * 2 / 3),
    "mo_grpo": np.array([-0.5, -0.25, 0.25, 0.5]) * ROOT3,
    "gdpo": np.array([-0.5, -0.25, 0.25, 0.5]) / np.sqrt((0.25 + 0.0625) * 2 / 3),  # whitened: the spread is 1
    "gd2po": np.array([-1.0, 0.0, 0.0, 1.0]) / 2**0.5,  # rows 1 and 2 disagree; the spread of two is the distance / sqrt(2)
    "dvao": np.array([-0.5, -0.25, 0.25, 0.5]) * ROOT3,
    "rdpo": np.array([-1.0, -0.5, 0.5, 1.0]),  # two levels at ranks 1/4 and 3/4, uncorrelated: whitened to -1 and 1
    "pama": np.array([0.0, 0.0, 0.5, 0.5]) * ROOT3,  # equal means, so the objective with the larger weight is further behind
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_by_hand(name):
    np.testing.assert_allclose(ours(name, HAND), BY_HAND[name], rtol=5e-4)


def test_the_snr_form_drops_only_what_nearly_cancels():
    """Rows 1 and 2 have |sum| / sum| | = (0.75 - 0.25) / 1 = 0.5."""
    np.testing.assert_allclose(ours({"name": "gd2po", "form": "snr", "tau": 0.4}, HAND), ours("gdpo", HAND))
    np.testing.assert_allclose(ours({"name": "gd2po", "form": "snr", "tau": 0.6}, HAND), ours("gd2po", HAND))


def test_a_group_that_disagrees_more_counts_less():
    """Two groups, one in agreement: its two extremes are kept with all their weight, those of the other with half of it."""
    agreed = HAND[[0, 0, 3, 3]]
    got = ours("gd2po", np.concatenate([HAND, agreed]))
    assert got[3] / got[7] == pytest.approx(0.5, rel=1e-3)


def test_dvao_divides_by_the_spread_that_objectives_in_agreement_would_have():
    wide = HAND * [1.0, 10.0]
    centered = wide - wide.mean(0)
    np.testing.assert_allclose(ours("dvao", wide), centered @ W / ((0.75 + 2.5) / ROOT3), rtol=5e-4)
    together = HAND[[0, 0, 3, 3]] * [1.0, 10.0]
    np.testing.assert_allclose(ours("dvao", together), ours("grpo", together), rtol=5e-4)


def test_rdpo_counts_objectives_that_agree_once():
    """Two copies of one reward: one direction of length 1, split evenly."""
    np.testing.assert_allclose(ours("rdpo", HAND[:, [0, 0]]), np.array([-1, -1, 1, 1]) / 2**0.5, rtol=1e-3)


def z_scores(returns, group=4):
    groups = returns.reshape(-1, group, returns.shape[1])
    return ((groups - groups.mean(1, keepdims=True)) / groups.std(1, ddof=1, keepdims=True)).reshape(returns.shape)


def test_under_mo_grpo_two_objectives_contribute_evenly_whatever_their_scales():
    """What its abstract claims: at equal weights the advantage goes as much with one reward as with the other, in every group."""
    returns = drawn(groups=5)
    got = ours("mo_grpo", returns, np.array([0.5, 0.5]))
    for rows in np.arange(20).reshape(5, 4):
        with_each = [np.corrcoef(got[rows], returns[rows, k])[0, 1] for k in (0, 1)]
        assert with_each[0] == pytest.approx(with_each[1], abs=1e-3)
    scaled = ours("mo_grpo", returns * [1000.0, 7.0] + [3.0, -2.0], np.array([0.5, 0.5]))
    np.testing.assert_allclose(scaled, got, atol=1e-3)


def test_dvao_is_bounded_and_follows_the_objective_that_varies():
    """What its abstract claims, for rewards with a heavy tail: a mean of the z-scores, so within the bound of a z-score of 4 samples."""
    returns = np.exp(2 * drawn(groups=50))
    got, z = ours("dvao", returns), z_scores(returns)
    assert np.abs(got).max() <= 3 / 2 + 1e-9
    assert (got <= z.max(1) + 1e-3).all()
    assert (got >= z.min(1) - 1e-3).all()
    np.testing.assert_allclose(ours("dvao", returns * [1e9, 1.0]), z_scores(returns)[:, 0], atol=0.05)
    np.testing.assert_allclose(ours("dvao", returns * [1.0, 1e9]), z_scores(returns)[:, 1], atol=0.05)


def test_rdpo_sees_ranks_only_and_what_it_sums_is_white():
    """Quantiles: any rising function of a reward leaves it as it is. Whitening: its two parts are uncorrelated, of length 1."""
    returns = drawn(groups=50)
    returns[:, 1] += returns[:, 0]
    got = ours("rdpo", returns)
    bent = np.stack([np.exp(returns[:, 0]), returns[:, 1] ** 3], 1)
    np.testing.assert_allclose(ours("rdpo", bent), got, atol=1e-9)
    assert np.corrcoef(returns.T)[0, 1] > 0.3
    parts = np.linalg.solve(np.array([W, W[::-1]]), np.stack([got, ours("rdpo", returns, W[::-1])]))
    np.testing.assert_allclose(parts @ parts.T / len(got), np.eye(2), atol=1e-9)


def test_two_of_them_are_those_that_trl_checks():
    for seed in range(3):
        returns, w = drawn(seed=seed), np.tile(W, (12, 1))
        plain = {"group": 4, "baseline": "group_mean", "normalize": "group"}
        np.testing.assert_allclose(ours("grpo", returns), advantages(returns, w, **plain), atol=1e-9)
        np.testing.assert_allclose(ours("gdpo", returns), advantages(returns, w, at="advantage", **plain), atol=1e-9)
        returns[[2, 7], [0, 1]] = NAN
        np.testing.assert_allclose(ours("gdpo", returns), advantages(returns, w, at="advantage", **plain), atol=1e-9)


@pytest.mark.parametrize("given", ALL, ids=lambda given: "-".join(map(str, given.values())))
def test_names_order_and_scale_of_objectives_responses_and_prompts(given):
    returns, w = drawn(m=3), np.array([0.5, 0.3, 0.2])
    plain = ours(given, returns, w)
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(ours(given, returns[:, ::-1], w[::-1]), plain, atol=1e-9)
    order = np.array([2, 0, 3, 1, 9, 8, 11, 10, 5, 6, 7, 4])  # within groups, and the groups themselves
    np.testing.assert_allclose(ours(given, returns[order], w), plain[order], atol=1e-9)
    np.testing.assert_allclose(ours(given, returns + np.array([5.0, -3.0, 0.1]), w), plain, atol=1e-9)
    np.testing.assert_allclose(ours(given, 50 * returns, w), ours(given, 100 * returns, w), atol=1e-3)


@pytest.mark.parametrize("name", ["grpo", "mo_grpo", "gdpo", "gd2po", "dvao"])
def test_one_objective_leaves_the_z_score(name):
    """Up to the positive number by which the whitening ones divide: the spread of z-scores over the batch."""
    returns = drawn(m=1)
    groups = returns.reshape(3, 4)
    z = ((groups - groups.mean(1, keepdims=True)) / groups.std(1, ddof=1, keepdims=True)).ravel()
    scale = z.std(ddof=1) if name in ("gdpo", "gd2po") else 1.0
    np.testing.assert_allclose(ours(name, returns, np.ones(1)), z / scale, rtol=1e-3)


@pytest.mark.parametrize("given", [*({"name": name} for name in AGGREGATIONS), *({"at": at} for at in ("reward", "advantage"))], ids=str)
def test_a_score_without_weight_is_none(given):
    """The second objective has no weight, and is all that one response has: as if there were no second one."""
    returns, w = drawn(), np.tile([1.0, 0.0], (12, 1))
    returns[[2, 7], 0] = NAN
    for settings in [{}] if "name" in given else [{"normalize": name} for name in ("none", "group", "batch", "batch_returns")]:
        two, one = (
            aggregate_advantages(given, x, y, group=4) if "name" in given else advantages(x, y, group=4, **given, **settings)
            for x, y in ((returns, w), (returns[:, :1], w[:, :1]))
        )
        np.testing.assert_allclose(two, one, atol=1e-12)
        assert (two[[2, 7]] == 0).all()


@pytest.mark.parametrize("given", ALL, ids=lambda given: "-".join(map(str, given.values())))
def test_constant_rewards_and_missing_scores(given):
    constant = drawn()
    constant[:, 1] = 0.4
    for returns in (constant, np.full((12, 2), 0.4), np.full((12, 2), NAN)):
        got = ours(given, returns)
        assert np.isfinite(got).all()
        assert np.abs(got).max() < 10
    assert (ours(given, np.full((12, 2), NAN)) == 0).all()
    assert (ours(given, np.full((12, 2), 0.4)) == 0).all()
    holed = drawn()
    holed[0], holed[5, 0] = NAN, NAN
    got = ours(given, holed)
    assert np.isfinite(got).all()
    assert got[0] == 0, "nothing is known of it"
    lost = np.array([[0.0, NAN], [1.0, NAN], [2.0, NAN], [3.0, NAN]])
    if given["name"] not in ("rdpo", "pama"):
        got = ours(given, lost)
        np.testing.assert_allclose(got / got[3], np.array([-1.5, -0.5, 0.5, 1.5]) / 1.5, rtol=1e-3)


@pytest.mark.parametrize("given", ALL, ids=lambda given: "-".join(map(str, given.values())))
def test_probabilities_are_what_samples_converge_to(given):
    """Rows as often as they are probable, 400 times over, so that n - 1 is n."""
    returns = drawn(groups=2)
    mass = np.tile([0.5, 0.25, 0.125, 0.125], 2)
    often = np.concatenate([np.repeat(np.arange(4) + 4 * p, [4, 2, 1, 1]) for p in (0, 1)])
    many = np.concatenate([np.tile(often[:8], 400), np.tile(often[8:], 400)])
    counted = ours(given, returns[many], group=3200)
    exact = ours(given, returns, mass_N=mass)
    np.testing.assert_allclose(counted, exact[many], atol=2e-3 * max(1.0, np.abs(exact).max()))


def test_the_exact_learner_climbs_what_an_aggregation_says(monkeypatch):
    """An aggregation that only subtracts the mean leaves the gradient of J_w, to the last digit."""
    monkeypatch.setitem(AGGREGATIONS, "plain", lambda g: g.weighted(g.returns_PGM - g.moments(g.returns_PGM, 1)[0]))
    learner = ExactGradient(rank=2, alpha=4)
    policy = moved(learner)
    found = enumerated(policy, TASK, torch.ones(2, 1))
    weights_PM = np.tile([0.3, 0.7], (2, 1))
    value = aggregated(found, Combine(aggregation={"name": "plain"}), weights_PM, TASK, TASK.beta)
    value.backward(retain_graph=True)
    got = flat(policy)
    policy.model.zero_grad()
    ((found.rewards_PM - TASK.beta * found.kl_P[:, None]) @ torch.tensor([0.3, 0.7], dtype=torch.float64)).mean().backward()
    np.testing.assert_allclose(got, flat(policy), atol=1e-6 * np.abs(got).max())


def test_both_learners_follow_it(tmp_path):
    """The sampled learner's advantages are the aggregation of its returns; the exact one's step differs from that of J_w."""
    learner = PolicyGradient(**SMALL)
    spec = spec_of(learner, aggregation={"name": "mo_grpo"})
    policy = moved(learner)
    batch = learner.collect(policy, TASK, spec, 0)
    returns = batch.responses.rewards_NM - TASK.beta * batch.kl_N[:, None]
    np.testing.assert_allclose(batch.advantage_N, ours("mo_grpo", returns, np.array([0.3, 0.7])))
    exact = ExactGradient(rank=2, alpha=4, steps=4, log_every=4)
    for name in ("learner", *AGGREGATIONS):
        exact.train(spec_of(exact, aggregation={"name": name}), TASK, tmp_path / name)
    values = {name: log_of(tmp_path / name)[-1]["value"] for name in ("learner", *AGGREGATIONS)}
    assert len(set(values.values())) == len(values), values


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"aggregation": {"name": "gdppo"}}, "gdppo"),
        ({"aggregation": {"name": "gdpo", "tau": 0.1}}, "tau"),
        ({"aggregation": {"name": "gd2po", "form": "soft"}}, "soft"),
        ({"aggregation": {"name": "gd2po", "tau": 2.0}}, "tau=2.0"),
        ({"aggregation": {"name": "gdpo"}, "scalarize_at": "advantage"}, "scalarize_at='advantage'"),
        ({"aggregation": {"name": "gdpo"}, "scalarizer": {"name": "log_product"}}, "log_product"),
    ],
)
@pytest.mark.parametrize("learner", [PolicyGradient(**SMALL), ExactGradient(rank=2, alpha=4)])
def test_what_cannot_be_is_refused(tmp_path, learner, settings, found):
    with pytest.raises(ConfigError) as error:
        learner.train(spec_of(learner, **settings), TASK, tmp_path)
    assert found in error.value.found


def test_every_aggregation_says_source_differs_hides():
    for function in AGGREGATIONS.values():
        assert all(word in inspect.getdoc(function) for word in ("Source:", "Differs:", "Hides:")), function
    assert set(AGGREGATIONS) <= set(aggregation.__all__)
    assert not Combine.of(spec_of(PolicyGradient(**SMALL))).aggregates

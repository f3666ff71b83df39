"""Weights from Gramians: TorchJD's aggregators on the full Jacobian, the equations that define the others, what a preference does."""

import itertools

import numpy as np
import pytest
import torch

from paretune.errors import ConfigError
from paretune.seeds import forked_torch, generator
from paretune.training.weightings import gramian
from paretune.training.weightings.gramian import AGGREGATORS, aggregate, check_aggregator

torchjd = pytest.importorskip("torchjd.aggregation")
EQUAL = np.full(3, 1 / 3)
W = np.array([0.5, 0.3, 0.2])


def jacobian(conflict=0.6, m=3, seed=0):
    """(m, 40) rows of different lengths, the second against the first."""
    j = generator(seed, "jacobian").normal(size=(m, 40))
    j[1] -= conflict * j[0]
    return j * (1.0 + np.arange(m))[:, None]


def step(name, j, w, seed=0):
    return aggregate(name, j @ j.T, w, seed=seed) @ j


def theirs(kind, j, *args, seed=0, **settings):
    with forked_torch(seed):
        return getattr(torchjd, kind)(*args, **settings)(torch.from_numpy(j)).numpy()


@pytest.mark.parametrize("conflict", [0.0, 0.6, 1.5])
def test_at_equal_preference_they_are_torchjds_on_the_full_jacobian(conflict):
    j = jacobian(conflict)
    for name, kind, settings in (
        ("mgda", "MGDA", {}),
        ("pcgrad", "PCGrad", {}),
        ("cagrad", "CAGrad", {"c": 0.5}),
        ("imtl_g", "IMTLG", {}),
        ("upgrad", "UPGrad", {}),
        ("aligned_mtl", "AlignedMTL", {}),
    ):
        want = theirs(kind, j, **settings)
        np.testing.assert_allclose(step(name, j, EQUAL), want, atol=1e-4 * np.abs(want).max(), err_msg=name)


def test_nash_mtl_has_torchjds_direction():
    """TorchJD 0.18's NashMTL (ECOS; max_norm=0) on the Cholesky factor of this Gramian, recorded: it needs a solver that we do not."""
    g = np.array([[1.0, -0.3, 0.1], [-0.3, 0.8, -0.2], [0.1, -0.2, 2.0]])
    recorded = np.array([1.20160355, 1.48212253, 0.75254456])
    ours = aggregate("nash_mtl", g, EQUAL, seed=0)
    np.testing.assert_allclose(ours / ours.sum(), recorded / recorded.sum(), rtol=1e-6)


def test_a_preference_is_torchjds_preference_vector_or_a_scale_of_the_gradients():
    j, u = jacobian(), W * 3
    vector = torch.from_numpy(W)
    for name, want in (
        ("upgrad", theirs("UPGrad", j, vector)),
        ("aligned_mtl", theirs("AlignedMTL", j, vector)),
        ("pcgrad", theirs("PCGrad", u[:, None] * j)),
        ("cagrad", theirs("CAGrad", u[:, None] * j, c=0.5)),
        ("mgda", theirs("MGDA", j / u[:, None])),
    ):
        np.testing.assert_allclose(step(name, j, W), want, atol=1e-4 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("w", [EQUAL, W, np.array([0.05, 0.9, 0.05])])
def test_what_nash_mtl_imtl_g_and_mgda_promise_at_a_preference(w):
    j = jacobian()
    g = j @ j.T
    a = aggregate("nash_mtl", g, w, seed=0)
    share = a * (g @ a)
    np.testing.assert_allclose(share / share.sum(), w, rtol=1e-6)
    assert (a > 0).all()
    along = (g @ aggregate("imtl_g", g, w, seed=0)) / np.sqrt(np.diag(g))
    np.testing.assert_allclose(along / along.sum(), w, rtol=1e-6)
    assert (along > 0).all()
    orthonormal = aggregate("mgda", np.eye(3), w, seed=0)  # closed form: c_k in proportion to w_k
    np.testing.assert_allclose(orthonormal / orthonormal.sum(), w, atol=0.01)
    assert (j @ step("mgda", j, w) > 0).all()


def test_imtl_g_never_turns_round():
    """Its source divides by the sum of the weights, which may be negative, and then every objective would lose."""
    j = np.array([[-1.0, 2.0, -1.0], [0.0, 1.0, 2.0], [0.0, 1.0, 0.0]])
    assert (j @ theirs("IMTLG", j)).max() < 0
    assert (j @ step("imtl_g", j, EQUAL)).min() > 0


@pytest.mark.parametrize("name", AGGREGATORS)
def test_objectives_without_weight_are_out_and_scales_and_names_do_not_matter(name):
    j = jacobian()
    g = j @ j.T
    np.testing.assert_array_equal(aggregate(name, g, np.array([0.0, 1.0, 0.0]), seed=0), [0, 1, 0])
    two = aggregate(name, g, np.array([0.4, 0.0, 0.6]), seed=0)
    assert two[1] == 0
    np.testing.assert_allclose(two[[0, 2]], aggregate(name, g[np.ix_([0, 2], [0, 2])], np.array([0.4, 0.6]), seed=0))
    np.testing.assert_allclose(aggregate(name, 1e-9 * g, W, seed=0), aggregate(name, g, W, seed=0), rtol=1e-5)
    orders = [(1, 0)] if name == "pcgrad" else itertools.permutations(range(3))  # PCGrad's order is drawn; two have only one other each
    for order in orders:
        at = list(order)
        w = W[at] / W[at].sum()
        back = np.argsort(at)
        permuted = aggregate(name, g[np.ix_(at, at)], w, seed=0)[back]
        plain = aggregate(name, g[: len(at), : len(at)], W[: len(at)] / W[: len(at)].sum(), seed=0)
        np.testing.assert_allclose(permuted, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_gradients_that_vanish_agree_or_oppose_each_other_give_finite_weights(name):
    for g in (np.zeros((2, 2)), np.diag([1.0, 0.0]), np.ones((2, 2)), np.array([[1.0, -1.0], [-1.0, 1.0]]), np.array([[1.0, -2], [-2, 4]])):
        got = aggregate(name, g, np.array([0.7, 0.3]), seed=0)
        assert np.isfinite(got).all(), g


def test_pcgrad_draws_from_its_seed_alone():
    g = (j := jacobian(1.5, m=4)) @ j.T
    w = np.full(4, 0.25)
    before = torch.random.get_rng_state()
    drawn = {tuple(aggregate("pcgrad", g, w, seed=s).round(9)) for s in range(20)}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(drawn) > 1
    assert (aggregate("pcgrad", g, w, seed=3) == aggregate("pcgrad", g, w, seed=3)).all()


def test_a_missing_library_is_an_error_that_names_the_extra(monkeypatch):
    def missing():
        raise ImportError("No module named 'torchjd'")

    check_aggregator.cache_clear()
    monkeypatch.setattr(gramian, "_library", missing)
    try:
        for name in AGGREGATORS:
            if name in ("nash_mtl", "imtl_g"):
                check_aggregator(name)
            else:
                with pytest.raises(ConfigError, match="needs TorchJD") as error:
                    check_aggregator(name)
                assert "paretune[gradient]" in error.value.remedy
    finally:
        check_aggregator.cache_clear()

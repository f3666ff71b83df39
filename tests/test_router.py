"""Experts under a learned router: what it starts from, what it cannot touch, what it learns, and that it is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles import small_task
from paretune.errors import ConfigError
from paretune.evaluation.evaluate import evaluate
from paretune.policy.family import Family
from paretune.policy.returns import ExactReturns
from paretune.policy.rules import Identity
from paretune.registry import LEARNERS, METHODS
from paretune.testing.methods import check_method, quick_learner, quick_task, train_plan


@pytest.fixture(scope="module")
def conflict():
    return small_task(rho=-0.8)


@pytest.fixture(scope="module")
def learner():
    return quick_learner(steps=40)


@pytest.fixture(scope="module")
def done(conflict, learner, tmp_path_factory):
    return train_plan(METHODS.build("router"), conflict, learner, tmp_path_factory.mktemp("router"), seed=0)


@pytest.fixture
def family(conflict, learner, done):
    return METHODS.build("router").policy(conflict, learner, done, 0)


@pytest.fixture
def soup(conflict, learner, done):
    return METHODS.build({"name": "experts", "mixing": "parameter"}).policy(conflict, learner, done, 0)


def _curve(task, family, w_WM):
    return evaluate(task, family, w_WM=w_WM, splits=["train"]).curves["train"].returns_WSM


def _inner():
    return np.stack([np.linspace(0.1, 0.9, 9), np.linspace(0.9, 0.1, 9)], axis=1)


def test_a_router_that_corrects_nothing_is_the_soup(conflict, family, soup):
    w_WM = _inner()
    assert np.abs(_curve(conflict, family, w_WM) - _curve(conflict, soup, w_WM)).max() > 1e-3
    with torch.no_grad():
        for tensor in family.policy.parameters()[1::2]:
            tensor.zero_()
    np.testing.assert_allclose(_curve(conflict, family, w_WM), _curve(conflict, soup, w_WM), atol=1e-6)


def test_vertices_keep_their_experts(conflict, family, soup):
    np.testing.assert_allclose(_curve(conflict, family, np.eye(2)), _curve(conflict, soup, np.eye(2)), atol=1e-6)


def test_learning_lifts_the_soup_where_it_does_harm_at_one_forward(conflict, family, soup):
    w_WM = _inner()
    ours, theirs = (evaluate(conflict, f, w_WM=w_WM, splits=["train"]).metrics["splits"]["train"]["attainment"] for f in (family, soup))
    assert ours["worst"] > theirs["worst"] + 0.1
    assert family.policy.forwards_per_token == 1


def test_gates_differ_between_tokens_and_a_cache_changes_nothing(family):
    ids = torch.tensor([[1, 2, 3, 2], [3, 1, 2, 1]])
    gates = torch.tensor([[0.4, 0.6], [0.7, 0.3]])
    policy = family.policy
    with torch.no_grad():
        whole = policy.forward(ids, gates_NK=gates)
        cache = policy.new_cache(2)
        parts = [policy.forward(ids[:, :3], gates_NK=gates, cache=cache), policy.forward(ids[:, 3:], gates_NK=gates, cache=cache)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
        h = torch.randn(2, 3, policy.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        made = policy._gates(0, h, gates)
    assert made.shape == (2, 3, 2)
    assert (made[:, 0] - made[:, 1]).abs().max() > 1e-3


def test_a_saved_router_is_the_same_router(conflict, family, tmp_path):
    family.save(tmp_path / "family")
    loaded = Family.load(tmp_path / "family")
    for split in ("train", "test"):
        one, two = (ExactReturns(conflict, f.policy, split).logp_PR(np.array([0.4, 0.6])) for f in (family, loaded))
        np.testing.assert_array_equal(one, two)


def test_a_sampled_training_of_a_router_learns_and_resumes(conflict, tmp_path):
    """The router alone is trained; a second run of the same training gives the same file."""
    learner = LEARNERS.build({"name": "pg", "samples": 1280, "rank": 4, "batch": 64})
    method = METHODS.build("router")
    files = []
    for name in ("one", "two"):
        made = train_plan(method, conflict, learner, tmp_path / name, seed=0)
        files.append((made[method.plan(conflict, learner, made, 0)[-1].key].path / "router.safetensors").read_bytes())
        family = method.policy(conflict, learner, made, 0)
    assert files[0] == files[1]
    assert all(float(up.detach().abs().max()) > 0 for up in family.policy.parameters()[1::2])


@pytest.mark.parametrize("bridge", [False, True])
def test_conformance(bridge):
    check_method({"name": "router", "bridge": bridge, "width": 4}, task=quick_task(objective_count=3 if bridge else 2))


def test_what_a_user_can_get_wrong(family):
    with pytest.raises(ConfigError, match="width at least 1"):
        METHODS.build({"name": "router", "width": 0})
    with pytest.raises(ConfigError, match="one row of gates per row"):
        family.policy.forward(torch.tensor([[1, 2]]), gates_NK=torch.ones(1, 2, 2))
    with pytest.raises(ConfigError, match="at least two experts"):
        type(family.policy)(family.policy.bank, family.policy.tokenizer, experts=3)
    assert Identity().gates(np.eye(2)).tolist() == family.gates(np.eye(2)).tolist()

"""The gradients' view: against finite differences, against enumeration, and without the agreement that shared noise feigns."""

import json

import numpy as np
import pytest
import torch

from paretune.errors import ConfigError
from paretune.evaluation.relations import _across, _cosines, _jackknife, _spec, probe
from paretune.seeds import generator
from paretune.tasks.exact.task import ExactTask
from paretune.training.learners.exact import ExactGradient, enumerated_returns
from paretune.training.learners.policy_gradient import PolicyGradient

TINY = {"alphabet": 5, "length": 3, "prompt_count": 4, "width": 32, "layers": 1}
LEARNER = PolicyGradient(rank=8, batch=128, samples=128)


@pytest.fixture(scope="module")
def task():
    return ExactTask(rho=-0.5, scale=2.0, seed=1, **TINY)


@pytest.mark.parametrize("steps", [0, 3])
def test_rates_are_what_a_small_step_along_a_gradient_does(task, steps):
    """J_j against J_k after a step of the adapters along the gradient of J_k, by finite difference."""
    found = probe(task, steps=steps)
    learner = ExactGradient()
    spec = _spec(task, learner, 0)
    policy = learner.start(spec, task, {})
    weights = policy.bank.parameters()
    optimizer = torch.optim.Muon(weights, lr=learner.lr, weight_decay=0.0, momentum=learner.momentum)
    for step in range(steps):
        learner.update(policy, optimizer, task, spec, step)

    def returns_M():
        reward_PM, kl_P, _ = enumerated_returns(policy, task, torch.ones(4, 1))
        return (reward_PM - task.beta * kl_P[:, None]).mean(0)

    for k in (0, 1):
        gradient = torch.autograd.grad(returns_M()[k], weights)
        assert found.norm_M[k] == pytest.approx(float(torch.cat([g.flatten() for g in gradient]).norm()), rel=1e-4)
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                for weight, g in zip(weights, gradient, strict=True):
                    weight += sign * 0.02 * g
                moved.append(returns_M().numpy())
                for weight, g in zip(weights, gradient, strict=True):
                    weight -= sign * 0.02 * g
        difference_M = moved[0] - moved[1]
        np.testing.assert_allclose(found.rate_MM[:, k], difference_M / difference_M[k], atol=0.02)
    assert found.exact
    assert found.samples == 0


def test_at_initialization_only_b_has_a_gradient(task):
    learner = ExactGradient()
    policy = learner.start(_spec(task, learner, 0), task, {})
    reward_PM, _, _ = enumerated_returns(policy, task, torch.ones(4, 1))
    gradients = torch.autograd.grad(reward_PM.mean(), policy.bank.parameters())
    zero = [bool((g == 0).all()) for g in gradients]
    assert sum(zero) * 2 == len(zero)


def test_sampled_cosines_agree_with_enumeration(task):
    exact, sampled = probe(task, learner=LEARNER), probe(task, exact=False, learner=LEARNER, batches=16)
    assert sampled.low_MM[0, 1] < exact.cosine_MM[0, 1] < sampled.high_MM[0, 1]
    assert abs(sampled.cosine_MM[0, 1] - exact.cosine_MM[0, 1]) < 0.2
    np.testing.assert_allclose(sampled.norm_M, exact.norm_M, rtol=0.25)
    assert sampled.samples == 16 * 128
    np.testing.assert_array_equal(probe(task, exact=False, learner=LEARNER, batches=16).cosine_MM, sampled.cosine_MM)


def test_shared_noise_is_not_taken_for_agreement():
    """Orthogonal gradients under noise of correlation 0.9: the mean gradient's cosine is far off, the mean over pairs of batches is not."""
    rng = generator(0, "probe")
    b, d = 40, 400
    one, other = rng.normal(size=(2, b, d))
    truth = np.zeros((2, d))
    truth[0, 0] = truth[1, 1] = 4.0
    noise = np.stack([one, 0.9 * one + np.sqrt(1 - 0.81) * other], axis=1)
    gradients_BMD = truth + noise
    mean_MD = gradients_BMD.mean(0)
    naive = mean_MD[0] @ mean_MD[1] / np.linalg.norm(mean_MD[0]) / np.linalg.norm(mean_MD[1])
    inner = np.einsum("bmd,cnd->bcmn", gradients_BMD, gradients_BMD)
    cosine_MM, _, norm_M = _cosines(_across(inner))
    low_MM, high_MM = _jackknife(inner, cosine_MM)
    assert naive > 0.25
    assert abs(cosine_MM[0, 1]) < 0.12
    assert low_MM[0, 1] < 0 < high_MM[0, 1]
    np.testing.assert_allclose(norm_M, 4.0, rtol=0.1)


def test_a_gradient_below_its_noise_is_unknown():
    cosine_MM, rate_MM, norm_M = _cosines(np.array([[1.0, 0.2], [0.2, -0.1]]))
    assert cosine_MM[0, 0] == 1
    assert np.isnan(cosine_MM[0, 1])
    assert np.isnan(rate_MM[0, 1])
    assert rate_MM[1, 0] == pytest.approx(0.2)
    assert np.isnan(norm_M[1])
    few = np.ones((9, 9, 2, 2))
    assert np.isnan(_jackknife(few, np.ones((2, 2)))).all()


def test_rewards_that_agree_have_gradients_that_agree():
    same, opposed = (probe(ExactTask(rho=rho, seed=1, **TINY)).cosine_MM[0, 1] for rho in (0.95, -0.95))
    assert same > 0.8
    assert opposed < -0.8


def test_a_probe_is_strict_json(task):
    written = json.loads(json.dumps(probe(task).to_json(), allow_nan=False))
    assert written["cosine"][0][0] == pytest.approx(1)
    assert set(written) == {"names", "cosine", "low", "high", "rate", "norm", "steps", "samples", "exact"}


def test_one_batch_is_refused(task):
    with pytest.raises(ConfigError, match="at least 2 batches"):
        probe(task, exact=False, batches=1)

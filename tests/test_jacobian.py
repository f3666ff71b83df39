"""One backward for all objectives, against one ordinary backward per objective; and the steps that both learners take with it."""

import dataclasses

import numpy as np
import pytest
import torch

from learner_cases import SMALL, TASK, flat, moved, spec_of
from paretune.errors import ConfigError, TrainingError
from paretune.seeds import generator
from paretune.tasks.exact.task import ExactTask
from paretune.training.learners.exact import ExactGradient, enumerated_returns
from paretune.training.learners.jacobian import autograd_jacobian, response_jacobian
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.weightings.gramian import aggregate
from test_learner import Letters

THREE = ExactTask(alphabet=3, length=3, prompt_count=3, width=16, layers=2, objective_count=3, rho=0.0)
LARGE = {"rank": 2, "alpha": 4, "samples": 48, "batch": 24, "group": 8, "device": "cpu"}
GRADIENT = {"name": "gradient", "aggregator": "nash_mtl"}


def by_hand(learner, policy, batch, credit_NM):
    """(M, parameters) gradients of the objectives by M ordinary backward passes."""
    rows = []
    for credit_N in credit_NM.T:
        policy.model.zero_grad()
        learner.gradient(policy, dataclasses.replace(batch, advantage_N=credit_N, jacobian=None), beta=0.0)
        rows.append(-flat(policy))
    return np.stack(rows)


def rows_of(jacobian):
    return torch.cat([rows.flatten(1) for rows in jacobian.rows], 1).double().numpy()


@pytest.mark.parametrize("preference", [(0.2, 0.3, 0.5), None], ids=["one adapter", "three gated adapters"])
@pytest.mark.parametrize(
    "settings", [{}, {"micro_batch": 16}, {"micro_batch": 4}, {"length": "token_mean"}, {"temperature": 0.7}, {"group": 2}], ids=str
)
def test_it_is_the_jacobian_of_autograd(preference, settings):
    """In float64, out of the way of rounding; `group` 2 and a part of a group read every response's prompt by itself."""
    learner = PolicyGradient(**{**LARGE, **settings})
    policy = moved(learner, THREE, preference)
    policy.model.double()
    batch = learner.collect(policy, THREE, spec_of(learner, preference, THREE), 0)
    credit_NM = generator(0, "credit").normal(size=(24, 3))
    want = by_hand(learner, policy, batch, credit_NM)
    mask_NT = batch.responses.mask_NT.double()
    share_NT = mask_NT / 24 / (1.0 if learner.length == "sum" else mask_NT.sum(1, keepdim=True))
    options = {"group": learner.group, "temperature": learner.temperature, "micro_batch": learner.micro_batch}
    got = response_jacobian(policy, batch.responses, credit_NM, share_NT, **options)
    np.testing.assert_allclose(rows_of(got), want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(got.gramian_MM, want @ want.T, atol=1e-5 * np.abs(want @ want.T).max())


@pytest.mark.parametrize("small", [1.0, 1e-4], ids=["advantages of about 1", "of about 1e-4"])
def test_gradients_on_a_float16_base_are_those_in_float32(small):
    """Without loss scaling the smaller ones are off by 17 %. Both ways of taking them, in passes and at once."""
    learner = PolicyGradient(**{**LARGE, "micro_batch": 16})
    policy = moved(learner, THREE, None, size=0.05)
    batch = learner.collect(policy, THREE, spec_of(learner, None, THREE), 0)
    credit_NM = small * generator(0, "credit").normal(size=(24, 3))
    want = by_hand(learner, policy, batch, credit_NM)
    policy.model.to(torch.float16)
    for name, tensor in policy.model.named_parameters():
        if "lora_" in name:
            tensor.data = tensor.data.float()
    assert policy.bank.base.dtype == torch.float16
    share_NT = batch.responses.mask_NT.float() / 24
    options = {"group": learner.group, "temperature": 1.0, "micro_batch": learner.micro_batch}
    at_once = rows_of(response_jacobian(policy, batch.responses, credit_NM, share_NT, **options))
    for got in (by_hand(learner, policy, batch, credit_NM), at_once):
        assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


def test_float16_is_nothing_for_the_exact_gradient():
    with pytest.raises(ConfigError, match="needs more range than float16"):
        ExactGradient(dtype="float16")


def test_prompts_of_different_lengths_and_a_frozen_adapter():
    """Left padding in the prompts, two ids that end a response, and an adapter that is not trained between those that are."""
    task, learner = Letters(), PolicyGradient(**LARGE)
    policy = moved(learner, task, None)
    policy.model.double()
    for parameter in policy.bank.parameters_of(0):
        parameter.requires_grad_(False)
    batch = learner.collect(policy, task, spec_of(learner, None, task), 0)
    credit_NM = generator(0, "credit").normal(size=(24, 2))
    want = by_hand(learner, policy, batch, credit_NM)
    share_NT = batch.responses.mask_NT.double() / 24
    got = response_jacobian(policy, batch.responses, credit_NM, share_NT, group=8, temperature=1.0, micro_batch=None)
    assert len(got.rows) == len(policy.bank.parameters()) > 0
    np.testing.assert_allclose(rows_of(got), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("aggregator", ["nash_mtl", "imtl_g", "upgrad", "pcgrad"])
def test_the_sampled_step_is_the_ordinary_backward_on_the_weighted_advantages(aggregator):
    pytest.importorskip("torchjd")
    learner = PolicyGradient(**LARGE)
    policy = moved(learner, THREE, (0.2, 0.3, 0.5))
    spec = spec_of(learner, (0.2, 0.3, 0.5), THREE, weighting={"name": "gradient", "aggregator": aggregator})
    batch = learner.collect(policy, THREE, spec, 0)
    weights_M = aggregate(aggregator, batch.jacobian.gramian_MM, np.array([0.2, 0.3, 0.5]), seed=0)
    if aggregator != "pcgrad":  # which draws from the training's own seed
        np.testing.assert_allclose(batch.weights_NM, np.tile(weights_M / np.abs(weights_M).sum(), (24, 1)))
    policy.model.zero_grad()
    loss = learner.gradient(policy, batch, beta=THREE.beta)
    quick = flat(policy)
    policy.model.zero_grad()
    plain = learner.gradient(policy, dataclasses.replace(batch, jacobian=None), beta=THREE.beta)
    np.testing.assert_allclose(quick, flat(policy), atol=2e-5 * np.abs(quick).max())
    assert loss == pytest.approx(plain, abs=1e-6)


def test_the_gramian_is_that_of_the_returns_with_their_penalty():
    """Advantages by hand: each objective's reward minus beta times the row's KL, compared with the others of its group."""
    learner = PolicyGradient(**LARGE)
    policy = moved(learner, THREE, (0.2, 0.3, 0.5))
    batch = learner.collect(policy, THREE, spec_of(learner, (0.2, 0.3, 0.5), THREE, weighting=GRADIENT), 0)
    returns = (batch.responses.rewards_NM - THREE.beta * batch.kl_N[:, None]).reshape(3, 8, 3)
    credit_NM = ((returns - returns.mean(1, keepdims=True)) * 8 / 7).reshape(24, 3)
    want = by_hand(learner, policy, batch, credit_NM)
    np.testing.assert_allclose(batch.jacobian.gramian_MM, want @ want.T, rtol=1e-3, atol=1e-4 * np.abs(want @ want.T).max())


def test_the_exact_step_is_the_gradient_of_the_weighted_returns():
    learner = ExactGradient(rank=2, alpha=4, steps=3)
    policy = moved(learner, THREE, (0.2, 0.3, 0.5))
    parameters = policy.bank.parameters()
    reward_PM, kl_P, _ = enumerated_returns(policy, THREE, torch.ones(3, 1))
    returns_M = (reward_PM - THREE.beta * kl_P[:, None]).mean(0)
    jacobian = autograd_jacobian(returns_M, parameters)
    weights_M = aggregate("nash_mtl", jacobian.gramian_MM, np.array([0.2, 0.3, 0.5]), seed=0)
    weights_M /= weights_M.sum()
    (-(returns_M * torch.from_numpy(weights_M)).sum()).backward()
    want = flat(policy)
    seen = {}

    class Look(torch.optim.SGD):
        def step(self):
            seen["gradient"] = flat(policy)

    learner.update(policy, Look(parameters, lr=0.0), THREE, spec_of(learner, (0.2, 0.3, 0.5), THREE, weighting=GRADIENT), 0)
    np.testing.assert_allclose(seen["gradient"], want, atol=1e-5 * np.abs(want).max())


def test_at_a_vertex_a_gradient_level_training_is_the_experts(tmp_path):
    """The same gradients, and so the same path up to rounding."""
    from safetensors.torch import load_file

    learner = ExactGradient(rank=2, alpha=4, steps=3)
    for name, weighting in (("plain", {"name": "fixed"}), ("nash", GRADIENT)):
        learner.train(spec_of(learner, (0.0, 1.0), weighting=weighting), TASK, tmp_path / name)
    plain, nash = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "nash"))
    for key in plain:
        torch.testing.assert_close(nash[key], plain[key], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"epochs": 2}, {"kl_in": "loss", "kl_estimator": "k3"}, {"normalize": "batch"}], ids=str)
def test_what_has_no_gradient_of_a_return_is_refused(tmp_path, settings):
    learner = PolicyGradient(**SMALL, **settings)
    with pytest.raises(ConfigError, match="gradients of the returns") as error:
        learner.train(spec_of(learner, weighting=GRADIENT), TASK, tmp_path)
    assert "epochs=" in error.value.found


@pytest.mark.parametrize(
    "settings", [{"scalarize_at": "advantage"}, {"scalarizer": {"name": "log_product"}}, {"aggregation": {"name": "gdpo"}}]
)
@pytest.mark.parametrize("learner", [PolicyGradient(**SMALL), ExactGradient(rank=2, alpha=4)])
def test_two_ways_to_combine_objectives_are_one_too_many(tmp_path, learner, settings):
    with pytest.raises(ConfigError, match="combines the gradients"):
        learner.train(spec_of(learner, weighting=GRADIENT, **settings), TASK, tmp_path)
    with pytest.raises(ConfigError, match="follows one preference"):
        learner.train(spec_of(learner, None, weighting=GRADIENT), TASK, tmp_path)


def test_gradients_that_are_no_numbers_stop_the_run(tmp_path):
    learner = PolicyGradient(**{**SMALL, "lr": 1e30, "clip_norm": None, "schedule": "constant"})
    with pytest.raises(TrainingError):
        learner.train(spec_of(learner, weighting=GRADIENT), TASK, tmp_path)

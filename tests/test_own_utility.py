"""Own-utility attainment on policies whose worth is known in closed form, and what is said where it cannot be known."""

import numpy as np
import pytest
import torch

from oracles import OneHot, TablePolicy, constant_of, optimum_of, small_task
from paretune.evaluation.evaluate import evaluate
from paretune.objectives.utilities import Constrained, LogProduct, LogSum, MaxMin, Tchebycheff, log_product
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.rules import Constant
from paretune.registry import describe
from paretune.seeds import generator
from paretune.tasks.exact.optimum import landmarks, optimum

W_WM = np.array([[0.5, 0.5], [0.2, 0.8]])


@pytest.fixture(scope="module")
def task():
    return small_task(rho=-0.8, seed=2)


def own(task, family, utility, w_WM=W_WM, split="train", **settings):
    family.utility = describe(utility)
    return evaluate(task, family, w_WM=w_WM, splits=[split], **settings).metrics["splits"][split]["own_utility"]


def best_of(task, utility, split="train"):
    """The optimal policy of each of W_WM, for one split."""
    lambda_WM = np.stack([optimum(task, split, utility, w_M).weights_M for w_M in W_WM])
    family = optimum_of(task, lambda_WM)
    family.rule = OneHot(W_WM)
    return family


@pytest.mark.parametrize("utility", [Tchebycheff(), LogSum(), MaxMin(), Constrained()], ids=repr)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_optimum_has_all_and_the_reference_nothing(task, utility, split):
    found = own(task, best_of(task, utility, split), utility, split=split)
    assert found["name"] == utility.registered_name
    assert found["attainment"]["per_preference"] == pytest.approx([1, 1], abs=1e-3)
    assert 0 <= found["gap"] <= 1e-6
    reference = constant_of(task, [0.5, 0.5])
    reference.policy = TablePolicy(task, {s: [task.reference_logp_PR(s)] for s in ("train", "test")})
    assert own(task, reference, utility, split=split)["attainment"]["per_preference"] == pytest.approx([0, 0], abs=1e-6)


def test_it_differs_from_the_linear_attainment(task):
    """The optimum of w . J at (.2, .8) sacrifices objective 1: best for the sum, far below the reference for the worst case."""
    family = optimum_of(task, W_WM)
    got = evaluate(task, family, w_WM=W_WM, splits=["train"]).metrics["splits"]["train"]
    assert got["own_utility"] is None
    assert got["attainment"]["worst"] == pytest.approx(1)
    assert own(task, family, MaxMin())["attainment"]["worst"] < -1


def test_breaking_a_constraint_does_not_pay(task):
    """w . J of the unconstrained optimum exceeds that of the constrained one; charged for what it breaks, it attains less than 1."""
    utility, w_WM = Constrained(), W_WM[1:]
    family = constant_of(task, w_WM[0].tolist())
    found = own(task, family, utility, w_WM=w_WM)
    marks, best = landmarks(task), optimum(task, "train", utility, w_WM[0])
    J_M = task.J_M(task.optimum_logp_PR(w_WM[0], "train"), "train")
    assert w_WM[0] @ J_M > best.value + 1e-3
    assert found["attainment"]["worst"] < 0.5
    assert found["violation"]["worst"] == pytest.approx((marks.reference_M - J_M).max(), abs=1e-6)
    price = best.multipliers_M[0] - w_WM[0, 0]
    charged = w_WM[0] @ J_M - price * (marks.reference_M[0] - J_M[0])
    start = w_WM[0] @ marks.reference_M
    assert found["attainment"]["worst"] == pytest.approx((charged - start) / (best.value - start), abs=1e-4)


def test_no_policy_attains_more_than_1_of_a_constrained_utility(task):
    utility = Constrained(margin=-0.01)
    for first in (0.05, 0.3, 0.5, 0.6, 0.9):
        found = own(task, constant_of(task, [first, 1 - first]), utility)
        assert found["attainment"]["per_preference"] == pytest.approx(np.minimum(found["attainment"]["per_preference"], 1 + 1e-6))


def test_thresholds_that_only_test_prompts_cannot_meet_are_said_so(task):
    """Numbers that just fit the training prompts: on the others attainment is unknown, and the violation is still measured."""
    split = min(("train", "test"), key=lambda s: landmarks(task, s).ideal_M[0])
    other = {"train": "test", "test": "train"}[split]
    between = float((landmarks(task, split).ideal_M[0] + landmarks(task, other).ideal_M[0]) / 2)
    utility = Constrained(thresholds=(between, None))
    family = constant_of(task, [1.0, 0.0])
    fits, misses = own(task, family, utility, split=other), own(task, family, utility, split=split)
    assert fits["unreachable"] is None
    assert fits["attainment"]["undefined"] == 0
    assert f"on the {split} prompts" in misses["unreachable"]
    assert misses["attainment"] == {"mean": None, "worst": None, "per_preference": [None, None], "undefined": 2}
    assert misses["violation"]["worst"] == pytest.approx(between - landmarks(task, split).ideal_M[0], abs=1e-6)


def test_the_product_of_responses(task):
    utility, w_M = LogProduct(), W_WM[1]
    logs = {s: utility.scores(task.rewards_PRM(s), w_M, landmarks(task, s)) for s in ("train", "test")}
    tables = {}
    for split, logs_PR in logs.items():
        tilt_PR = task.reference_logp_PR(split) + logs_PR / task.beta
        tables[split] = [tilt_PR - np.logaddexp.reduce(tilt_PR, axis=1, keepdims=True)]
    family = constant_of(task, [0.5, 0.5])
    family.policy = TablePolicy(task, tables)
    found = own(task, family, utility, w_WM=w_M[None])
    assert found["attainment"]["worst"] == pytest.approx(1, abs=1e-6)
    assert found["violation"] is None


@pytest.fixture(scope="module")
def noisy(task):
    """A random adapter: a policy that can be sampled from, away from the reference."""
    model, tokenizer = task.load()
    bank = LoraBank.attach(model, names=["a"], seed=0, rank=4, alpha=32)
    rng = generator(0, "test adapters")
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.from_numpy(rng.normal(0, 0.1, parameter.shape)).float())
    return Family(ParameterMix(bank, tokenizer), Constant(gates_K=(1.0,)), task.objectives, task.base())


def test_from_samples_only_value_and_gain_are_known(task, noisy):
    """Within 4.5 standard errors of 1,000 samples (false alarm below 1e-4): deviations of J up to .3, slopes of the utility up to 2.2."""
    for utility, error in ((LogSum(), 0.3 * 2.2), (LogProduct(floor=0.05), 1.0)):
        exact = own(task, noisy, utility)
        drawn = own(task, noisy, utility, samples=1000, exact=False)
        assert drawn["attainment"]["undefined"] == 2
        assert (drawn["optimum"], drawn["gap"], drawn["violation"]) == ([None, None], None, None)
        np.testing.assert_allclose(drawn["value"], exact["value"], atol=4.5 * error / np.sqrt(1000))
        assert (np.array(drawn["gain"]) < 0).all(), "a random change costs KL and gains nothing"
    constrained = own(task, noisy, Constrained(), samples=200, exact=False)
    assert constrained["violation"]["worst"] > 0.005


def test_the_scores_of_a_sample_are_the_scalarizer(task):
    rewards_NM = np.array([[0.5, 0.25]])
    marks = landmarks(task)
    expected = log_product(rewards_NM, W_WM[:1], low_M=marks.low_M, high_M=marks.high_M)
    assert LogProduct().scores(rewards_NM, W_WM[0], marks) == pytest.approx(expected)


def test_a_family_on_disk_keeps_its_utility(task):
    family = constant_of(task, [0.2, 0.8])
    own(task, family, Tchebycheff(mu=0.05))
    assert isinstance(family, Family)
    assert family.utility == {"name": "tchebycheff", "version": 1, "mu": 0.05, "ideal": None}

"""The loss against autograd on enumerable distributions: which expectations and which gradients are right."""

import pytest
import torch

from paretune.seeds import forked_torch
from paretune.training.learners.loss import kl_terms, policy_loss

with forked_torch(3):
    THETA = torch.randn(7, dtype=torch.float64)
    REFERENCE = torch.randn(7, dtype=torch.float64).log_softmax(0)
    LOGP = torch.randn(5, 3, dtype=torch.float64) - 2
    OLD = LOGP + 0.3 * torch.randn(5, 3, dtype=torch.float64)
    ADVANTAGE = torch.randn(5, dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)


def gradient(function, at):
    at = at.clone().requires_grad_()
    function(at).backward()
    return at.grad


def kl(theta):
    logp = theta.log_softmax(0)
    return (logp.exp() * (logp - REFERENCE)).sum()


def test_k1_and_k3_have_the_right_expectation_and_k2_nearly():
    logp = THETA.log_softmax(0)
    expected = {name: float((logp.exp() * kl_terms(logp, REFERENCE, name)).sum()) for name in ("k1", "k2", "k3")}
    assert expected["k1"] == pytest.approx(float(kl(THETA)))
    assert expected["k3"] == pytest.approx(float(kl(THETA)))
    near = (THETA + 0.01 * torch.arange(7)).log_softmax(0)
    small = float((near.exp() * kl_terms(near, logp, "k2")).sum())
    assert small == pytest.approx(float((near.exp() * (near - logp)).sum()), rel=0.05)


def test_gradients_of_the_estimators_are_what_the_docstring_says():
    """Expected gradient of each estimator inside a loss: samples are drawn from pi, and only log pi is differentiated."""

    def expected(estimator):
        weight = THETA.softmax(0)
        return gradient(lambda t: (weight * kl_terms(t.log_softmax(0), REFERENCE, estimator)).sum(), THETA)

    true = gradient(kl, THETA)
    torch.testing.assert_close(expected("k1"), torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected("k2"), true)
    reverse = gradient(lambda t: -(REFERENCE.exp() * t.log_softmax(0)).sum(), THETA)
    torch.testing.assert_close(expected("k3"), reverse)  # k3 descends KL(reference || pi)
    assert (expected("k3") - true).norm() > 0.1 * true.norm()
    # As a penalty on the reward (score function times the estimate), k1 is right.
    weight, estimate = THETA.softmax(0), (THETA.log_softmax(0) - REFERENCE)
    torch.testing.assert_close(gradient(lambda t: (weight * estimate * t.log_softmax(0)).sum(), THETA), true)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_on_policy_the_gradient_is_advantage_times_the_score(ratio):
    got = gradient(lambda x: policy_loss(x, MASK, ADVANTAGE, rows=5, ratio=ratio), LOGP)
    torch.testing.assert_close(got, -(ADVANTAGE[:, None] * MASK) / 5)
    exact_old = gradient(lambda x: policy_loss(x, MASK, ADVANTAGE, rows=5, ratio=ratio, old_logp_NT=LOGP), LOGP)
    torch.testing.assert_close(exact_old, got), "clipping does nothing while the policy has not moved"


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_a_mean_over_tokens_divides_each_response_by_its_length(ratio):
    got = gradient(lambda x: policy_loss(x, MASK, ADVANTAGE, rows=5, ratio=ratio, length="token_mean"), LOGP)
    torch.testing.assert_close(got, -(ADVANTAGE[:, None] * MASK) / MASK.sum(1, keepdim=True) / 5)


def test_micro_batches_add_up_to_the_batch():
    whole = policy_loss(LOGP, MASK, ADVANTAGE, rows=5, old_logp_NT=OLD)
    parts = [policy_loss(LOGP[i : i + 2], MASK[i : i + 2], ADVANTAGE[i : i + 2], rows=5, old_logp_NT=OLD[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)


def test_clipping_by_hand():
    """One response, one token: the gradient is the ratio's inside the range, and 0 where clipping gives the smaller gain."""
    one = torch.ones(1, 1, dtype=torch.bool)

    def slope(log_ratio, advantage):
        logp = torch.full((1, 1), log_ratio, dtype=torch.float64)
        old, a = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
        return float(gradient(lambda x: policy_loss(x, one, a, rows=1, old_logp_NT=old, clip_eps=0.2), logp))

    assert slope(0.1, 2.0) == pytest.approx(-2.0 * torch.tensor(0.1).exp().item())
    assert slope(0.5, 2.0) == 0, "already more likely by more than 20 %"
    assert slope(-0.5, 2.0) != 0, "became less likely although it was good: pull it back"
    assert slope(-0.5, -2.0) == 0
    assert slope(0.5, -2.0) != 0


def test_ratios_of_whole_responses_are_exact_importance_weights():
    """E_old[ratio * A] without clipping is E_pi[A], by enumeration: a ratio per token is not."""
    with forked_torch(4):
        first, second = torch.randn(2, 3, dtype=torch.float64).log_softmax(1), torch.randn(2, 3, 3, dtype=torch.float64).log_softmax(2)
        value = torch.randn(9, dtype=torch.float64)

    def logp(i):
        return torch.stack([first[i].repeat_interleave(3), second[i].flatten()], 1)

    new, old, mask = logp(0), logp(1), torch.ones(9, 2, dtype=torch.bool)
    weight = old.sum(1).exp()
    truth = float((new.sum(1).exp() * value).sum())
    gains = {
        ratio: -float(policy_loss(new, mask, weight * value, rows=1, old_logp_NT=old, clip_eps=None, ratio=ratio))
        for ratio in ("sequence", "token")
    }
    assert gains["sequence"] == pytest.approx(truth)
    assert abs(gains["token"] - truth) > 0.01

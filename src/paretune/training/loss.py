"""The policy-gradient loss and the KL estimators: pure functions of log-probabilities.

Everything is per response unless it says otherwise: log-probabilities are *summed* over a response's tokens and divided by the number
of responses. That is what makes the gradient unbiased for the expected return; a mean over tokens (`token_mean`) weighs short
responses more, whatever their reward.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kl_terms", "policy_loss"]


def kl_terms(logp: Tensor, reference_logp: Tensor, estimator: str) -> Tensor:
    """Estimates, element by element, of KL(pi || reference) in nats from the log-probabilities of pi's own samples.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, with d = logp - reference_logp. k1 and k3 have the right expectation.
    Source: Schulman, "Approximating KL divergence" (2020). Differs: nothing.
    Hides: that is about values. Inside a loss, the gradient of k1 has expectation 0, that of k3 is not the gradient of KL(pi || ref),
        and that of k2 is it only for a whole response at once; as a penalty on the reward, k1 alone is unbiased.
    """
    d = logp - reference_logp
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    assert estimator == "k3", estimator
    return torch.expm1(-d) + d


def policy_loss(
    logp_NT: Tensor,
    mask_NT: Tensor,
    advantage_N: Tensor,
    *,
    rows: int,
    old_logp_NT: Tensor | None = None,
    clip_eps: float | None = 0.2,
    ratio: str = "sequence",
    length: str = "sum",
) -> Tensor:
    """Scalar to minimize: minus the mean over `rows` responses of advantage times (clipped) probability ratio.

    `rows` is the size of the whole batch, so that micro-batches add up to it. Without `old_logp_NT` the responses count as drawn
    from the present policy: every ratio is 1, nothing is clipped, and the gradient is that of advantage * log pi.
    `ratio` "sequence" is the probability ratio of whole responses (the exact importance weight), "token" one ratio per token (PPO).
    `length` "sum" adds a response's tokens, "token_mean" divides them by their number (as GRPO was published: biased).

    Source: REINFORCE (Williams 1992); the clipped ratio of PPO (1707.06347).
    Differs: by default one ratio per response and a sum over its tokens; nothing is divided by a length.
    Hides: where a ratio is clipped, and with "token" or "token_mean", the gradient is not that of J_w.
    """
    mask_NT = mask_NT.to(logp_NT.dtype)
    share_N1 = 1.0 if length == "sum" else 1.0 / mask_NT.sum(1, keepdim=True).clamp(min=1.0)
    old_logp_NT = logp_NT.detach() if old_logp_NT is None else old_logp_NT
    change = (logp_NT - old_logp_NT) * mask_NT
    if ratio == "sequence":
        change = (change * share_N1).sum(1, keepdim=True)
    raw = change.exp()
    kept = raw if clip_eps is None else raw.clamp(1.0 - clip_eps, 1.0 + clip_eps)
    advantage_N1 = advantage_N[:, None].to(logp_NT.dtype)
    gain = torch.minimum(raw * advantage_N1, kept * advantage_N1)
    if ratio == "token":
        gain = gain * mask_NT * share_N1
    return -gain.sum() / rows

"""The policy-gradient loss and the KL estimators: pure functions of log-probabilities.

Everything is per response unless it says otherwise: log-probabilities are *summed* over a response's tokens and divided by the number
of responses. That is what makes the gradient unbiased for the expected return; a mean over tokens (`token_mean`) weighs short
responses more, whatever their reward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["clipped_share", "kl_terms", "loss_scale", "policy_loss"]

LEAST = 1e-3  # weights below it are not brought up to 1: other terms of the loss would leave float16's range


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


def loss_scale(dtype: torch.dtype, largest: float) -> float:
    """Loss scaling: by what a loss is multiplied before its backward through layers of `dtype`, and its gradient divided after it.

    A power of two, and 1 unless `dtype` is float16. That has nothing below 6e-8 and few digits below 6e-5, where the gradients of large
    batches and of small advantages are. `largest` is the largest weight of a response in the loss; scaled, it is about 1.

    Source: mixed precision training (Micikevicius et al., 1710.03740).
    Differs: the scale follows from the batch, so that there is no state to keep and no step is skipped.
    Hides: what leaves float16's range all the same is no number, and ends the training with a message.
    """
    return 1.0 if dtype != torch.float16 else 2.0 ** -math.floor(math.log2(max(largest, LEAST)))


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
    raw, kept = _gains(logp_NT, mask_NT, advantage_N, old_logp_NT, clip_eps, ratio, share_N1)
    gain = torch.minimum(raw, kept)
    if ratio == "token":
        gain = gain * mask_NT * share_N1
    return -gain.sum() / rows


def clipped_share(
    logp_NT: Tensor, mask_NT: Tensor, advantage_N: Tensor, *, old_logp_NT: Tensor, clip_eps: float, ratio: str, length: str
) -> float:
    """The share of responses, or with `ratio` "token" of tokens, whose ratio `policy_loss` clips, so that they have no gradient.

    Source: the clipped ratio of PPO (1707.06347). Differs: nothing.
    Hides: a ratio that left the interval on the side where its gradient stays is not counted.
    """
    mask_NT = mask_NT.to(logp_NT.dtype)
    share_N1 = 1.0 if length == "sum" else 1.0 / mask_NT.sum(1, keepdim=True).clamp(min=1.0)
    raw, kept = _gains(logp_NT, mask_NT, advantage_N, old_logp_NT, clip_eps, ratio, share_N1)
    counted = mask_NT if ratio == "token" else torch.ones_like(raw)
    return float(((kept < raw) * counted).sum() / counted.sum().clamp(min=1.0))


def _gains(
    logp_NT: Tensor, mask_NT: Tensor, advantage_N: Tensor, old_NT: Tensor, eps: float | None, ratio: str, share_N1: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Advantage times the ratio, and times the clipped ratio: (N, T) for ratios per token, else (N, 1)."""
    change = (logp_NT - old_NT) * mask_NT
    if ratio == "sequence":
        change = (change * share_N1).sum(1, keepdim=True)
    raw, advantage_N1 = change.exp(), advantage_N[:, None].to(logp_NT.dtype)
    kept = raw if eps is None else raw.clamp(1.0 - eps, 1.0 + eps)
    return raw * advantage_N1, kept * advantage_N1

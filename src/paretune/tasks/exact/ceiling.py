"""Representable ceiling: the best that any policy with the reference's own output head can reach.

A model with a final RMSNorm ends in a state of fixed length, so its logits are z = A u with |u| at most c, A being the head times the
norm's weight: an ellipsoid, up to a constant that softmax does not see. Adapters below the head move u and not A. So at every prefix
only the distributions of that ellipsoid can be had, whatever is trained.

The best of them is found from the last symbol backwards. With V(s, a) the value of a prefix continued by a, V(s) is the maximum of
sum_a p(a) (V(s, a) - beta log p(a) / p_ref(a)). Where the unrestricted maximum lies in the ellipsoid it is taken as it is, in closed form;
elsewhere projected gradient ascent on u finds the restricted one.

Source: ours. Hides: every prefix is free to have a state of its own, which a model of finite rank need not manage, so that this bounds
what can be learned and is not always reached.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from paretune.errors import TaskError
from paretune.tasks.exact.tree import PrefixTree

__all__ = ["ceiling_W", "representable_value_P", "sphere"]

STEPS, TOLERANCE = 2000, 1e-8  # of the ascent: at most, and the nats in a hundred steps at which it ends


def sphere(model: Any) -> tuple[Tensor, float]:
    """(V, D) and the radius c: logits are A u, |u| = c. Raises TaskError where the model does not end in an RMSNorm and a linear head."""
    norm, head = getattr(model.model, "norm", None), model.get_output_embeddings()
    if norm is None or "RMSNorm" not in type(norm).__name__ or getattr(head, "bias", None) is not None:
        raise TaskError(
            "the representable ceiling is that of a final RMSNorm and a head without a bias",
            found=f"{type(norm).__name__} and {type(head).__name__}",
            remedy="leave it out for this model",
        )
    with torch.no_grad():
        A_VD = (head.weight * norm.weight).double()
    return A_VD, float(A_VD.shape[1]) ** 0.5


def ceiling_W(model: Any, tree: PrefixTree, logp_PR: np.ndarray, rewards_PRM: np.ndarray, beta: float, w_WM: np.ndarray) -> np.ndarray:
    """(W,) the representable ceiling in attainment, from the reference and its log-probabilities: 1 where the optimum can be represented.

    Raises TaskError as `sphere` does.
    """
    A_VD, radius = sphere(model)
    ref_PIV, shape = tree.next_logp(torch.from_numpy(logp_PR)), _shape(A_VD)
    found = []
    for w_M in w_WM:
        rewards_PR = rewards_PRM @ w_M
        start = (np.exp(logp_PR) * rewards_PR).sum(1).mean()
        best = beta * logsumexp(logp_PR + rewards_PR / beta, axis=1).mean()
        found.append((_value_P(tree, ref_PIV, rewards_PR, beta, shape, radius).mean() - start) / (best - start))
    return np.array(found)


def representable_value_P(
    tree: PrefixTree, logp_PR: np.ndarray, scores_PR: np.ndarray, beta: float, A_VD: Tensor, radius: float
) -> np.ndarray:
    """(P,) the largest E[score] - beta KL over policies whose every next-symbol distribution is softmax(A u) with |u| <= radius."""
    return _value_P(tree, tree.next_logp(torch.from_numpy(logp_PR)), scores_PR, beta, _shape(A_VD), radius)


def _value_P(
    tree: PrefixTree, ref_PIV: Tensor, scores_PR: np.ndarray, beta: float, shape: tuple[Tensor, Tensor], radius: float
) -> np.ndarray:
    """(P,) as `representable_value_P`, from the reference's next-symbol log-probabilities and the `_shape` of the head."""
    rewards_PR, (basis_VR, half_RR) = torch.from_numpy(scores_PR), shape
    value_PN = rewards_PR[:, tree.starts[tree.length] :]
    for depth in reversed(range(tree.length)):
        here = slice(tree.starts[depth], tree.starts[depth + 1])
        options_PNV = torch.cat([value_PN.unflatten(1, (-1, tree.alphabet)), rewards_PR[:, here, None]], dim=2)
        value_PN = _best(options_PNV.flatten(0, 1), ref_PIV[:, here].flatten(0, 1), beta, basis_VR, half_RR, radius).unflatten(
            0, (len(ref_PIV), -1)
        )
    return value_PN[:, 0].numpy()


def _shape(A_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Of the logits that A reaches, up to a constant: an orthonormal basis (V, R), and (R, R) H so that z = basis H v has |u| = |v|.

    Centered logits z = C A u with C the projection that takes the mean away; of all u for one z the shortest has the length of v.
    """
    centered_VD = A_VD - A_VD.mean(0)
    U_VV, s_V, _ = torch.linalg.svd(centered_VD, full_matrices=False)
    rank = int((s_V > s_V[0] * 1e-10).sum())
    return U_VV[:, :rank], torch.diag(s_V[:rank])


def _best(options_NV: Tensor, ref_NV: Tensor, beta: float, basis_VR: Tensor, half_RR: Tensor, radius: float) -> Tensor:
    """(N,) max over |v| <= radius of sum_a p(a) (options(a) - beta log p(a) / ref(a)), p = softmax(basis H v)."""
    tilt_NV = ref_NV + options_NV / beta
    free_N = beta * tilt_NV.logsumexp(1)
    centered_NV = tilt_NV - tilt_NV.mean(1, keepdim=True)
    v_NR = torch.linalg.solve(half_RR, (centered_NV @ basis_VR).T).T
    length_N1 = v_NR.norm(dim=1, keepdim=True)
    outside_N = (length_N1[:, 0] > radius) | ((v_NR @ half_RR @ basis_VR.T - centered_NV).abs().amax(1) > 1e-6)
    if not outside_N.any():
        return free_N
    target_NV = tilt_NV[outside_N].log_softmax(1)
    v_NR = v_NR[outside_N] * (radius / length_N1[outside_N]).clamp(max=1)
    map_RV = half_RR @ basis_VR.T
    step = 1.0 / float(half_RR.max()) ** 2

    def divergence(v_NR: Tensor) -> tuple[Tensor, Tensor]:
        """KL(p_v | target), and its gradient in v."""
        logp_NV = (v_NR @ map_RV).log_softmax(1)
        ratio_NV, p_NV = logp_NV - target_NV, logp_NV.exp()
        kl_N1 = (p_NV * ratio_NV).sum(1, keepdim=True)
        return kl_N1[:, 0], (p_NV * (ratio_NV - kl_N1)) @ map_RV.T

    best_N, gradient_NR = divergence(v_NR)
    moved_NR, last = v_NR, best_N.clone()
    for turn in range(1, STEPS + 1):  # accelerated, each row beginning anew where it got worse
        ahead_NR = moved_NR - step * gradient_NR
        new_NR = ahead_NR * (radius / ahead_NR.norm(dim=1, keepdim=True)).clamp(max=1)
        kl_N, _ = divergence(new_NR)
        better_N1 = (kl_N <= best_N)[:, None]
        momentum = torch.where(better_N1, (turn - 1) / (turn + 2), 0.0)
        moved_NR = torch.where(better_N1, new_NR + momentum * (new_NR - v_NR), v_NR)
        v_NR, best_N = torch.where(better_N1, new_NR, v_NR), torch.minimum(kl_N, best_N)
        gradient_NR = divergence(moved_NR)[1]
        if turn % 100 == 0:
            if float((last - best_N).max()) < TOLERANCE:
                break
            last = best_N.clone()
    value_N = free_N.clone()
    value_N[outside_N] -= beta * best_N
    return value_N

"""One weight per objective from the M x M inner products of the objectives' gradients.

An aggregator of gradients that is a weighted sum of them needs their Gramian only; most are TorchJD's, with guards. Where a preference
enters:

    upgrad aligned_mtl   as TorchJD's preference vector
    pcgrad cagrad        each gradient is scaled by its relative importance u_k = M w_k (1 at equal preference)
    mgda                 each gradient is divided by u_k: the step gains for all objectives in proportion to u. Scaling by u would turn
                         the preference round, because the shortest vector of a hull leans towards the short gradients
    nash_mtl imtl_g      neither of the two changes when gradients are scaled, so the preference enters the equations themselves:
                         the asymmetric Nash bargain a_k (G a)_k = u_k, and projections on the unit gradients in proportion to u

At equal preference each is TorchJD's own. Objectives with weight 0 are left out, so that at a vertex all of them climb that objective.
Gradients are those of returns, which are climbed; turning all of them round changes no inner product.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from paretune.errors import ConfigError
from paretune.seeds import forked_torch

__all__ = ["AGGREGATORS", "aggregate", "check_aggregator"]

AGGREGATORS = ("mgda", "pcgrad", "cagrad", "nash_mtl", "imtl_g", "upgrad", "aligned_mtl")
RIDGE = 1e-8  # added to the Gramian of unit gradients: opposite ones have no finite bargain


def aggregate(name: str, gramian_MM: np.ndarray, w_M: np.ndarray, *, seed: int, c: float = 0.5) -> np.ndarray:
    """(M,) weights c_k of the objectives' gradients under the preference `w_M`; not normalized, some may be negative.

    `seed` is for PCGrad, which meets the other gradients in random order; `c` is CAGrad's radius.
    Source: MGDA (Sener & Koltun 2018), PCGrad (2001.06782), CAGrad (2110.14048), Nash-MTL (2202.01017), IMTL-G (Liu et al. 2021),
    UPGrad (2406.16232), Aligned-MTL (Senushkin et al. 2023), through TorchJD but for Nash-MTL and IMTL-G.
    Differs: the preference, see above; Nash-MTL is solved by Newton's method on its convex form, which its source linearizes; the
    Gramian is divided by its mean diagonal first, because TorchJD takes what is below 1e-4 for zero.
    Hides: where gradients oppose each other exactly every one of them stops, at any point of the front, whatever the preference.
    """
    kept = np.flatnonzero(w_M > 0)
    weights_M = np.zeros(len(w_M))
    typical = np.trace(gramian_MM[np.ix_(kept, kept)]) / len(kept)
    if len(kept) == 1 or not typical > 0:
        weights_M[kept] = w_M[kept]
        return weights_M
    g_MM, u_M = gramian_MM[np.ix_(kept, kept)] / typical, w_M[kept] * len(kept)
    if name == "nash_mtl":
        weights_M[kept] = _nash(g_MM, u_M)
    elif name == "imtl_g":
        weights_M[kept] = _impartial(g_MM, u_M)
    else:
        scale_M = {"mgda": 1 / u_M, "pcgrad": u_M, "cagrad": u_M}.get(name, np.ones(len(kept)))
        weights_M[kept] = scale_M * _torchjd(name, g_MM * np.outer(scale_M, scale_M), w_M[kept], seed, c)
    return weights_M


def _nash(g_MM: np.ndarray, u_M: np.ndarray) -> np.ndarray:
    """The a > 0 with a_k (G a)_k = u_k: the minimum of a'Ga / 2 - sum_k u_k log a_k, by damped Newton steps."""
    norm_M = np.maximum(np.sqrt(np.diag(g_MM)), 1e-3)  # the bargain is the same for unit gradients
    g_MM = g_MM / np.outer(norm_M, norm_M) + RIDGE * np.eye(len(g_MM))
    a_M = np.sqrt(u_M)
    for _ in range(100):
        slope_M = g_MM @ a_M - u_M / a_M
        step_M = np.linalg.solve(g_MM + np.diag(u_M / a_M**2), -slope_M)
        decrement = -slope_M @ step_M
        if decrement < 1e-20:
            break
        a_M = a_M + step_M / (1 + np.sqrt(decrement / u_M.min()))  # self-concordant: this damping never leaves a > 0
    return a_M / norm_M


def _impartial(g_MM: np.ndarray, u_M: np.ndarray) -> np.ndarray:
    """Weights whose sum has projections on the unit gradients in proportion to u, positive ones; they add up to 1 or -1."""
    v_M = np.linalg.pinv(g_MM, rcond=1e-10, hermitian=True) @ (u_M * np.sqrt(np.diag(g_MM)))
    total = abs(v_M.sum())  # a negative sum, divided by itself, would turn the step round
    return v_M / total if total > 1e-12 else np.zeros(len(v_M))


def _torchjd(name: str, g_MM: np.ndarray, w_M: np.ndarray, seed: int, c: float) -> np.ndarray:
    preference = torch.from_numpy(w_M)
    make = {
        "mgda": lambda library: library.MGDAWeighting(),
        "pcgrad": lambda library: library.PCGradWeighting(),
        "cagrad": lambda library: library.CAGradWeighting(c=c),
        "upgrad": lambda library: library.UPGradWeighting(preference),
        "aligned_mtl": lambda library: library.AlignedMTLWeighting(preference),
    }
    weighting = make[name](_library())
    with forked_torch(seed):  # PCGrad draws from the global stream
        return weighting(torch.from_numpy(g_MM)).numpy()


@lru_cache(maxsize=8)
def check_aggregator(name: str) -> None:
    """ConfigError where the aggregator's library is missing."""
    if name in ("nash_mtl", "imtl_g"):
        return
    try:
        library = _library()
        if name == "upgrad":
            library.UPGradWeighting()
        elif name == "cagrad":
            library.CAGradWeighting(c=0.5)
    except ImportError as error:
        raise ConfigError(
            f"the aggregator {name} needs TorchJD and its solvers", found=str(error), remedy='pip install "paretune[gradient]"'
        ) from None


@lru_cache(maxsize=1)
def _library() -> Any:
    from torchjd import aggregation

    return aggregation

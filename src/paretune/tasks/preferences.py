"""Preferences on the simplex: the judged ones, those that trainings may sample, and those spread over a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paretune.errors import ConfigError
from paretune.seeds import generator

__all__ = ["judged_preferences", "onto_faces", "sample_preferences", "spread_preferences"]

JUDGED_M2 = 11


JUDGED_OTHER = 66


KEEP_OUT = 0.005


JUDGED_SEEDS = (*range(100, 110), *range(200, 210))  # of tasks that are drawn from a seed: nothing is tuned on them


def judged_preferences(count: int) -> np.ndarray:
    """(W, M): 11 evenly spaced for M = 2, 66 seeded interior points of the simplex for M >= 3."""
    if count < 2:
        raise ConfigError(
            "a trade-off needs at least two objectives", found=f"{count}", remedy="add an objective, or train with one reward"
        )
    if count == 2:
        w1 = (np.arange(JUDGED_M2) + 0.5) / JUDGED_M2
        return np.stack([w1, 1.0 - w1], axis=1)
    return generator(0, "judged preferences", count).dirichlet(np.ones(count), size=JUDGED_OTHER)


def sample_preferences(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """(n, M) preferences uniform on the simplex, none within 0.005 (largest coordinate) of a judged one: for training."""
    judged_WM = judged_preferences(count)
    kept = np.empty((0, count))
    while len(kept) < n:
        w_NM = rng.dirichlet(np.ones(count), size=2 * n)
        gap_N = np.abs(w_NM[:, None] - judged_WM[None]).max(-1).min(-1)
        kept = np.concatenate([kept, w_NM[gap_N > KEEP_OUT]])
    return kept[:n]


def spread_preferences(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """(n, M) as `sample_preferences`, each uniform on the simplex, but spread evenly over it together: for the preferences of one batch.

    A randomly shifted additive sequence (Roberts 2018) in the cube, its sorted coordinates' gaps as weights, in a random order. A point
    within 0.005 of a judged preference is mirrored out of that box: passing it over would leave a hole.
    """
    base = 2.0
    for _ in range(60):  # the positive root of x^M = x + 1
        base = (1.0 + base) ** (1.0 / count)
    step_D, shift_D = base ** -np.arange(1.0, count), rng.random(count - 1)
    cuts = np.sort((shift_D + np.arange(n)[:, None] * step_D) % 1.0, axis=1)
    w_NM = rng.permutation(np.diff(cuts, axis=1, prepend=0.0, append=1.0), axis=0)
    judged_WM = judged_preferences(count)
    near_N = np.abs(w_NM[:, None] - judged_WM).max(-1).argmin(-1)
    away_NM = w_NM - judged_WM[near_N]
    gap_N1 = np.abs(away_NM).max(-1, keepdims=True)
    out_NM = judged_WM[near_N] + away_NM / np.maximum(gap_N1, 1e-12) * (2 * KEEP_OUT + 1e-6 - gap_N1)
    w_NM = np.where(gap_N1 <= KEEP_OUT, out_NM, w_NM)
    lost_N = (w_NM < 0).any(-1) | (np.abs(w_NM[:, None] - judged_WM).max(-1).min(-1) <= KEEP_OUT)
    w_NM[lost_N] = sample_preferences(rng, int(lost_N.sum()), count)  # out of the simplex, or into another box: rare
    return w_NM


def onto_faces(w_NM: np.ndarray, objectives: Sequence[int], share: float, rng: np.random.Generator) -> None:
    """Put a share of the rows, in place, on faces of the simplex: a number of objectives from 1 to all but one, which, uniform on these.

    Uniform preferences of six objectives come near a face seldom, and near a vertex never, where people's preferences often are.
    """
    judged_WM = judged_preferences(w_NM.shape[1])
    for row in rng.permutation(len(w_NM))[: round(share * len(w_NM))]:
        while True:
            on = rng.permutation(objectives)[: rng.integers(1, len(objectives))]
            w_NM[row] = 0.0
            w_NM[row, on] = rng.dirichlet(np.ones(len(on)))
            w_NM[row] /= w_NM[row].sum()  # a vertex is 1, not rounded
            if np.abs(w_NM[row] - judged_WM).max(-1).min() > KEEP_OUT:
                break

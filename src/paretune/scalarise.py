"""Vectors of rewards to one number per response: the scalarisers that a `TrainSpec` can name.

A scalariser is `{"name": ..., field: value}`; `linear` is the default and the only one whose optimum the exact tasks know.
The KL penalty is no part of it: the learner subtracts it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from paretune.errors import ConfigError, nearest

__all__ = ["SCALARISERS", "check_scalariser", "linear", "log_product", "scalarise"]


def linear(rewards_NM: np.ndarray, w_NM: np.ndarray) -> np.ndarray:
    """(N,) weighted sums; NaN where any objective with a positive weight is NaN.

    Source: the usual scalarisation ("MORLHF").
    Differs: nothing.
    Hides: the objective with the larger spread dominates; only the convex part of a front can be reached without regularisation.
    """
    return np.where(w_NM > 0, w_NM * rewards_NM, 0.0).sum(-1)


def log_product(
    rewards_NM: np.ndarray,
    w_NM: np.ndarray,
    *,
    low_M: np.ndarray,
    high_M: np.ndarray,
    floor: float = 1e-4,
    ceiling: float = 0.9999,
) -> np.ndarray:
    """(N,) sum_k w_k log clip(r_k, floor, ceiling), each r_k first mapped from [low, high] to [0, 1]; NaN as in `linear`.

    Source: DynaOpt (2403.13578) and EMORL (2505.02579), where rewards lie in [0, 1].
    Differs: objectives with another range are mapped to [0, 1].
    Hides: a reward at its low costs log(floor) = -9.2, so one bad objective outweighs everything else.
    """
    unit_NM = np.clip((rewards_NM - low_M) / (high_M - low_M), floor, ceiling)
    return linear(np.log(unit_NM), w_NM)


SCALARISERS: Mapping[str, Callable[..., np.ndarray]] = {"linear": linear, "log_product": log_product}
FIELDS: Mapping[str, tuple[str, ...]] = {"linear": (), "log_product": ("floor", "ceiling")}


def check_scalariser(scalariser: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `scalarise` can use it."""
    name = str(scalariser.get("name", ""))
    if name not in SCALARISERS:
        raise ConfigError("a scalariser is known by its name", found=repr(name), remedy=nearest(name, SCALARISERS))
    for field in scalariser:
        if field not in ("name", *FIELDS[name]):
            known = ", ".join(FIELDS[name]) or "none"
            raise ConfigError(f"scalariser {name} has the fields that it declares", found=repr(field), remedy=f"its fields: {known}")
    low, high = float(scalariser.get("floor", 1e-4)), float(scalariser.get("ceiling", 0.9999))
    if not 0 < low < high <= 1:
        raise ConfigError(
            "0 < floor < ceiling <= 1", found=f"floor={low:g}, ceiling={high:g}", remedy="leave them out for the published 1e-4 and 0.9999"
        )


def scalarise(
    rewards_NM: np.ndarray, w_NM: np.ndarray, scalariser: Mapping[str, Any], *, low_M: np.ndarray, high_M: np.ndarray
) -> np.ndarray:
    """(N,) one number per response, NaN where it cannot be said. `low_M` and `high_M` are the objectives' ranges."""
    fields = {name: value for name, value in scalariser.items() if name != "name"}
    if scalariser["name"] == "linear":
        return linear(rewards_NM, w_NM)
    return SCALARISERS[scalariser["name"]](rewards_NM, w_NM, low_M=low_M, high_M=high_M, **fields)

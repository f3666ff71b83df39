"""A line of a training's log, made of what the steps since the last one returned; and the watch over what could not be scored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paretune.objectives.base import refuse_unscored
from paretune.training.cost import PHASES
from paretune.training.loop.watch import named_means
from paretune.types import Objectives

__all__ = ["log_record", "watch_unscored"]

WATCHED = 256  # completions over which `max_unscored` is judged, at least


def log_record(
    objectives: Objectives,
    window: Sequence[Mapping[str, Any]],
    *,
    step: int,
    samples: int,
    tokens: int,
    lr: float,
    group: int | None = None,
) -> dict[str, Any]:
    """One line of the log: means over the steps since the last line. A step is its rewards_NM and any numbers by name, None for none.

    Of a number whose name ends in `_max` it is the maximum. `seconds_of`, the seconds of each phase of a step, becomes its speed.
    `outside` is there only where rewards left their declared ranges: see `Objectives.outside`. With `group`, the rows of which lie
    together: `spread`, the standard deviation over responses, and `equal`, the share of groups in which all scores are the same.
    """
    names = objectives.names
    rewards_NM = np.concatenate([row["rewards_NM"] for row in window])
    record: dict[str, Any] = {"step": step, "samples": samples, "tokens": tokens}
    record["rewards"] = named_means(objectives, rewards_NM)
    record["unscored"] = dict(zip(names, np.isnan(rewards_NM).sum(0).tolist(), strict=True))
    if group is not None:
        record["spread"] = {name: float(value) for name, value in zip(names, _spread(rewards_NM), strict=True)}
        record["equal"] = {name: float(value) for name, value in zip(names, _equal(rewards_NM, group), strict=True)}
    record |= {"outside": outside} if (outside := objectives.outside(rewards_NM)) else {}
    for name in dict.fromkeys(name for row in window for name in row if name not in ("rewards_NM", "seconds_of")):
        values = [row[name] for row in window if row.get(name) is not None]
        if name.startswith("weights/"):
            record.setdefault("weights", {})[name.removeprefix("weights/")] = float(np.mean(values))
            continue
        record |= {name: float((np.max if name.endswith("_max") else np.mean)(values))} if values else {}
    return record | _speeds(window) | {"lr": lr}


def _speeds(window: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Generated tokens per second of each phase of a step alone; nothing where a loop does not say."""
    seconds: Counter[str] = Counter()
    for row in window:
        seconds.update(row.get("seconds_of", {}))
    tokens = sum(row["length"] * len(row["rewards_NM"]) for row in window if "seconds_of" in row)
    return {PHASES: {name: round(tokens / max(spent, 1e-9), 1) for name, spent in seconds.items()}} if seconds else {}


def _spread(rewards_NM: np.ndarray) -> np.ndarray:
    """(M,) the standard deviation of what was scored; 0 where nothing was."""
    known_NM = np.isfinite(rewards_NM)
    mean_M = np.where(known_NM, rewards_NM, 0.0).sum(0) / np.maximum(known_NM.sum(0), 1)
    return np.sqrt(np.where(known_NM, (rewards_NM - mean_M) ** 2, 0.0).sum(0) / np.maximum(known_NM.sum(0), 1))


def _equal(rewards_NM: np.ndarray, group: int) -> np.ndarray:
    """(M,) the share of groups in which no two scores differ."""
    rewards_PGM = rewards_NM.reshape(-1, group, rewards_NM.shape[1])
    lowest_PM = np.where(np.isnan(rewards_PGM), np.inf, rewards_PGM).min(1)
    highest_PM = np.where(np.isnan(rewards_PGM), -np.inf, rewards_PGM).max(1)
    return (highest_PM <= lowest_PM).mean(0)


def watch_unscored(
    recent: list[list[int]], rewards_NM: np.ndarray, names: Sequence[str], *, limit: float, last: bool = False
) -> list[list[int]]:
    """The recent batches with this one: completions, then unscored ones per objective. RewardError where these are too many.

    Judged as soon as `WATCHED` completions are seen, and at the `last` batch.
    """
    n = len(rewards_NM)
    recent = [*recent, [n, *np.isnan(rewards_NM).sum(0).tolist()]][-max(1, math.ceil(WATCHED / max(n, 1))) :]
    seen, *unscored_M = np.sum(recent, axis=0).tolist()
    if seen >= WATCHED or last:
        refuse_unscored(names, unscored_M, seen, limit=limit)
    return recent

"""What a training is: a frozen, hashed description, and the published directory that it becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paretune.errors import ConfigError
from paretune.registry import GATE_RULES
from paretune.training.weightings.base import under_terms
from paretune.types import canonical_json, key_of

__all__ = ["FOLDER", "Artifact", "TrainSpec", "gates_of"]

FOLDER = "checkpoint"  # beside a training's files while it runs


@dataclass(frozen=True, eq=False)
class TrainSpec:
    """Everything a training depends on; its `key` names the directory of the result.

    `task`, `learner`, `weighting` and `rule` are descriptions made by `registry.describe` (name, version, every field, content hashes).
    `preference` is the fixed (M,) weighting, or None where the learner samples a preference for every prompt of a batch.

    Axis K of the policy that is trained holds, in this order, the adapters of the artifacts `frozen_adapters` (they stay as they
    are), those of `init_from` (trained on), and new ones of the ranks `fresh`. `rule` turns the preference of a row into its K
    gates. With the defaults a fixed preference trains one adapter whose gate is 1, and sampled ones train one adapter per objective,
    gated by the preference.
    """

    task: Mapping[str, Any]
    learner: Mapping[str, Any]
    preference: tuple[float, ...] | None
    seed: int
    scalarizer: Mapping[str, Any] = field(default_factory=lambda: {"name": "linear"})
    scalarize_at: str = "reward"  # "reward" | "advantage"
    aggregation: Mapping[str, Any] = field(default_factory=lambda: {"name": "learner"})  # see `paretune.training.advantages`
    weighting: Mapping[str, Any] = field(default_factory=lambda: {"name": "fixed"})  # how weights follow from the preference, step by step
    frozen_adapters: tuple[str, ...] = ()
    init_from: tuple[str, ...] = ()
    fresh: tuple[int, ...] | None = None  # None: what the default needs beside those of `init_from`, of the learner's rank
    rule: Mapping[str, Any] | None = None  # None: gate 1, or the preference itself
    active_objectives: tuple[int, ...] | None = None  # sampled preferences give weight to these objectives only; None: to all

    def __post_init__(self):
        """What the task's terms ask of weights becomes part of the weighting, whichever method made the spec."""
        if terms := self.task.get("terms"):
            object.__setattr__(self, "weighting", under_terms(self.weighting, terms))

    @property
    def parents(self) -> tuple[str, ...]:
        """Keys of all artifacts that must be finished before."""
        return (*self.frozen_adapters, *self.init_from)

    def to_json(self) -> dict[str, Any]:
        return json.loads(canonical_json(asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainSpec:
        given = dict(data)
        given["preference"] = None if given["preference"] is None else tuple(given["preference"])
        given["frozen_adapters"], given["init_from"] = tuple(given["frozen_adapters"]), tuple(given["init_from"])
        for name in ("fresh", "active_objectives"):
            given[name] = None if given[name] is None else tuple(given[name])
        return cls(**given)

    @property
    def key(self) -> str:
        return key_of(self.to_json())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainSpec) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Artifact:
    """A published training: `path` holds the adapters in plain PEFT format, the spec, the log and the ledger."""

    key: str
    path: Path
    spec: TrainSpec

    @property
    def adapters(self) -> list[Path]:
        """The folders of the adapters that it trained, in the order of axis K: `path` itself, or adapter-0, adapter-1, ... in it."""
        several = [folder for folder in self.path.glob("adapter-*") if folder.is_dir()]
        return sorted(several, key=lambda folder: int(folder.name.removeprefix("adapter-"))) or [self.path]


def gates_of(spec: TrainSpec, w_NM: np.ndarray, count: int) -> np.ndarray:
    """(N, K) float64 gates of the `count` adapters for rows with the preferences `w_NM`; ConfigError for a rule of other adapters."""
    if spec.rule is None:
        gates_NK = np.ones((len(w_NM), 1)) if spec.preference is not None else np.asarray(w_NM, dtype=np.float64)
    else:
        gates_NK = GATE_RULES.build(spec.rule).gates(w_NM)
    if gates_NK.shape[1] != count:
        raise ConfigError(
            "the rule of a training gives one gate per adapter",
            found=f"{gates_NK.shape[1]} gates for {count} adapters (frozen, started from, fresh)",
            remedy="give one parent or fresh adapter per gate, or name another rule",
        )
    return gates_NK

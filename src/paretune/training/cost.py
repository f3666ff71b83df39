"""What a result cost, counted as if its method had run alone.

Costs combine in two ways. `then` is one after the other: everything adds up, except memory, which is a peak. `beside` is side by
side, on a machine each: the slower one decides for everything that takes time, and what is stored adds up.

The bench trains each distinct training once and shares it between methods. The ledger does not: every method is charged for all
trainings of its own plan, with what their stored ledgers say, whether they were trained just now or taken from another method.

    total          every training and the search, added up
    critical path  per wave of `plan` the maximum, over waves the sum, plus the (serial) search

Always print both: a method with M parallel experts has a critical path of one expert.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from paretune.errors import StoreError
from paretune.files import write_json

__all__ = ["Cost", "as_if_alone", "beside", "read_cost", "then", "write_cost"]

PEAKS = ("memory_bytes",)  # a maximum, however things are arranged
STOCKS = ("storage_bytes",)  # a sum, however things are arranged


@dataclass(frozen=True)
class Cost:
    """Counts, all non-negative. The default is "nothing"."""

    samples: int = 0  # responses drawn for training
    tokens: int = 0  # generated for training, and enumerated by the exact learner
    steps: int = 0  # optimizer steps
    flops: float = 0.0  # floating-point operations, estimated
    seconds: float = 0.0  # wall clock on the machine that ran it
    evaluations: int = 0  # calls of a search's score
    validation_samples: int = 0  # responses drawn for validation, calibration and search; not in `samples`
    memory_bytes: int = 0  # peak
    storage_bytes: int = 0  # of the published files

    def __post_init__(self):
        for name, value in self.to_json().items():
            assert 0 <= value < math.inf, f"{name} = {value}: a cost is a finite count"

    def then(self, other: Cost) -> Cost:
        """Both, one after the other."""
        return self._merge(other, lambda name, a, b: max(a, b) if name in PEAKS else a + b)

    def beside(self, other: Cost) -> Cost:
        """Both, at the same time on a machine each."""
        return self._merge(other, lambda name, a, b: a + b if name in STOCKS else max(a, b))

    def _merge(self, other: Cost, rule: Callable[[str, Any, Any], Any]) -> Cost:
        return Cost(**{name: rule(name, value, getattr(other, name)) for name, value in self.to_json().items()})

    def to_json(self) -> dict[str, float]:
        """Field -> number, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cost:
        return cls(**data)


def then(costs: Iterable[Cost]) -> Cost:
    """All of them, one after the other."""
    return reduce(Cost.then, costs, Cost())


def beside(costs: Iterable[Cost]) -> Cost:
    """All of them, at the same time."""
    return reduce(Cost.beside, costs, Cost())


def as_if_alone(waves: Sequence[Sequence[Cost]], search: Cost | None = None) -> dict[str, Cost]:
    """{"total", "critical_path"} of a method from the costs of its trainings per wave of its plan, and of its outer-level search."""
    search = search or Cost()
    return {
        "total": then(cost for wave in waves for cost in wave).then(search),
        "critical_path": then(beside(wave) for wave in waves).then(search),
    }


def write_cost(folder: Path, cost: Cost) -> None:
    """Store the cost of a training beside its result."""
    write_json(folder / "ledger.json", cost.to_json())


def read_cost(folder: Path) -> Cost:
    """What the stored training in `folder` cost. Raises StoreError where its ledger is missing or damaged."""
    path = folder / "ledger.json"
    try:
        return Cost.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise StoreError(
            "a published training holds its ledger", found=f"{path}: {error}", remedy="run `paretune check`, then remove that directory"
        ) from error

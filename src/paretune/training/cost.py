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

import json
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path

from paretune.errors import StoreError
from paretune.files import write_json
from paretune.types import Cost

__all__ = ["Cost", "as_if_alone", "beside", "read_cost", "then", "write_cost"]


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

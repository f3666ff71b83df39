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

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path

from paretune.errors import StoreError
from paretune.files import read_json, sealed, write_json, write_text
from paretune.types import Cost

__all__ = [
    *("FINISHED", "LEDGER", "LOG", "PHASES", "TIMED", "Cost", "as_if_alone", "beside", "keep_finished", "read_cost", "then", "write_cost"),
]

LOG = "train.jsonl"
PHASES = "tokens_per_s_of"  # in a line of the log: phase -> speed
TIMED = ("seconds", "tokens_per_s", PHASES)  # what a clock says in a line of the log: two runs of one training differ there
LEDGER, FINISHED = "ledger.json", "FINISHED"  # what a training cost; the same with hashes, until the training is published


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


def write_cost(folder: Path, cost: Cost, *, files: Mapping[str, str] | None = None) -> None:
    """Store the cost of a training beside its result; until that is published, with the hashes of its `files`."""
    write_json(folder / LEDGER, cost.to_json() if files is None else sealed({**cost.to_json(), "files": dict(files)}))


def keep_finished(folder: Path) -> None:
    """Keep the ledger with its hashes, where it has such, as FINISHED, while the one to publish is written."""
    if (folder / LEDGER).is_file() and '"sha256"' in (text := (folder / LEDGER).read_text(encoding="utf-8")):
        write_text(folder / FINISHED, text)


def read_cost(folder: Path) -> Cost:
    """What the stored training in `folder` cost. Raises StoreError where its ledger is missing or damaged."""
    path = next(file for name in (FINISHED, LEDGER) if (file := folder / name).is_file() or name == LEDGER)
    rule, remedy = "a published training holds its ledger", "run `paretune check`, then remove that directory"
    known = read_json(path, rule=rule, remedy=remedy)
    try:
        return Cost.from_json({name: value for name, value in known.items() if name not in ("files", "sha256")})
    except (ValueError, TypeError, AssertionError) as error:
        raise StoreError(rule, found=f"{path}: {error}", remedy=remedy) from error

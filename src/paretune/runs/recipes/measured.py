"""What `paretune fit` measures of a family, and keeps beside it for its page and for the cards of its exports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.errors import StoreError
from paretune.files import disk_errors, is_sealed, read_json, sealed, write_json

if TYPE_CHECKING:  # they load torch
    from paretune.policy.family import Family
    from paretune.runs.recipes.recipe import Recipe

__all__ = ["MEASURED", "measure", "measured_at", "read_measured", "said_of"]

MEASURED = "measured.json"  # beside family.json
READ = "measurements are read as they were written"


def measured_at(recipe: Recipe) -> np.ndarray:
    """(W, M) the preferences at which a result is measured: the recipe's, or each objective alone, all alike, and half-way between."""
    from paretune.methods.search import simplex_lattice

    count, given = recipe.task.objectives.count, recipe.preferences
    if given is not None:
        return simplex_lattice(count, given) if isinstance(given, int) else np.array(given)
    alone_MM, alike_M = np.eye(count), np.full(count, 1 / count)
    if count == 2:  # along the line between them
        return np.array([(w, 1 - w) for w in (1.0, 0.75, 0.5, 0.25, 0.0)])
    return np.concatenate([alone_MM, alike_M[None], (alone_MM + alike_M) / 2 if count == 3 else np.empty((0, count))])


def said_of(w_M: Sequence[float], names: Sequence[str]) -> str:
    """A preference in words: "brief only", "mostly brief", "all alike"; else its weights."""
    lead = int(np.argmax(w_M))
    others = [w for k, w in enumerate(w_M) if k != lead]
    if np.isclose(w_M[lead], 1):
        return f"{names[lead]} only"
    if np.allclose(w_M, 1 / len(w_M)):
        return "all alike"
    if np.allclose(others, others[0]) and np.isclose(w_M[lead], (1 + 1 / len(w_M)) / 2):
        return f"mostly {names[lead]}"
    return ", ".join(f"{name} {w:.2g}" for name, w in zip(names, w_M, strict=True))


def measure(recipe: Recipe, family: Family, folder: Path, *, samples: int) -> dict[str, Any]:
    """Measure a family on the recipe's test prompts, `samples` responses per preference, and write it into the family's folder."""
    from paretune.evaluation.evaluate import evaluate

    w_WM = measured_at(recipe)
    found = evaluate(recipe.task, family, w_WM=w_WM, splits=("test",), samples=samples, seed=recipe.seed).metrics["splits"]["test"]
    about = {"split": "test", "samples": samples, "prompts": len(recipe.task.prompts("test")), "beta": recipe.task.beta}
    whole = sealed(json.loads(json.dumps({**about, "preferences": w_WM.tolist(), "measured": found})))
    with disk_errors(folder, "a family"):
        write_json(folder / MEASURED, whole)
    return whole


def read_measured(folder: Path) -> dict[str, Any] | None:
    """What was measured of the family in a folder; None where nothing was. StoreError where it is not what was written."""
    if not (folder / MEASURED).is_file():
        return None
    remedy = "remove it; `paretune fit` measures again"
    found = read_json(folder / MEASURED, rule=READ, remedy=remedy)
    if "sha256" in found and not is_sealed(found):
        raise StoreError(READ, found=f"{folder / MEASURED}: other content", remedy=remedy)
    return found

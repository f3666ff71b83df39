"""Advice on which methods fit a relationship of objectives, read from measured results.

The results are one JSON file that ships with the package, `src/paretune/results/relations.json`; `paretune report ROOT --rows FILE` writes
another. Its key "rows" holds one flat row per method and setting: an exact task and its dials (one left out has its default):

    {"objective_count": 2, "rho": -0.8, "scale": 1.0, "sparse": 0.0, "noise": 0.0, "context": 0.0,
     "method": "experts logit",        as the leaderboard names it
     "category": "meta-policy",        from the method's card
     "learner": "pg",
     "attainment_worst_train": 0.45, "attainment_worst_test": 0.23,
     "n_seeds": 10,                    task seeds behind the row
     "samples": 80000}                 responses drawn, in total; 0 for the exact learner

"task" names the exact task, `exact-v1` where it is left out. More keys may stand there and are not read. Null is unknown. Every sentence
names the rows and the figure that it is read from. The nearest setting always answers; the first sentence says how far it is, dial by dial,
and where one dial is farther than `NEAR`, or unknown, a second one says that the advice is a guess.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from paretune.errors import ConfigError

__all__ = ["DIALS", "RESULTS", "Advice", "advise", "load_rows", "shipped"]

RESULTS = "results/relations.json"
DIALS: dict[str, float] = {"objective_count": 2, "rho": 0.0, "scale": 1.0, "sparse": 0.0, "noise": 0.0, "context": 0.0}
NEEDED = ("method", "category", "learner", "attainment_worst_train", "n_seeds", "samples")
# How far a dial may be from a measured setting that still counts as near.
NEAR = {"objective_count": 0.0, "rho": 0.25, "scale": 0.35, "sparse": 0.5, "noise": 0.5, "context": 0.35}
CLOSE = 0.03  # of attainment: a cheaper method within this of the best one is named
SAID = {
    "objective_count": "number of objectives",
    "rho": "correlation",
    "scale": "ratio of spreads",
    "sparse": "rate of the rarest reward",
    "noise": "noise over spread",
    "context": "change of correlation with the prompt",
}


@dataclass(frozen=True)
class Advice:
    """One sentence, and where it is read from: the file, the rows (counted from 0) and the figure; no rows where it claims nothing."""

    text: str
    rows: tuple[int, ...] = ()
    figure: str = ""
    source: str = RESULTS

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "source": self.source, "rows": list(self.rows), "figure": self.figure}

    def __str__(self) -> str:
        if not self.rows:
            return self.text
        return f"{self.text} [{self.source}: row{'s' if len(self.rows) > 1 else ''} {', '.join(map(str, self.rows))}, {self.figure}]"


def shipped() -> Path | None:
    """The results that came with the package; None where none did."""
    path = Path(str(files("paretune") / "results" / "relations.json"))
    return path if path.is_file() else None


def load_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a results file. Raises ConfigError where it is none, or a row lacks what advice needs."""
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not isinstance(rows, list):
            raise TypeError("rows is no list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = 'give a file as results/relations.json of the package is: {"rows": [...]}'
        raise ConfigError("advice is read from a file of results", found=f"{path.name}: {error!r}", remedy=remedy) from None
    for number, row in enumerate(rows):
        missing = [key for key in NEEDED if not isinstance(row, Mapping) or key not in row]
        if missing:
            raise ConfigError(
                "a row of results names its method, category, learner, attainment, seeds and samples",
                found=f"{path.name}, row {number}: no {', no '.join(missing)}",
                remedy="see the docstring of paretune.evaluation.advice",
            )
    return rows


def advise(
    dials: Mapping[str, float], rows: Sequence[Mapping[str, Any]], *, budget: int | None = None, learner: str = "pg"
) -> list[Advice]:
    """What the rows of the nearest setting say, the rows of `learner` if there are any; `budget` is the most samples in total."""
    settings: dict[tuple[Any, ...], list[tuple[int, Mapping[str, Any]]]] = {}
    for n, row in enumerate(rows):
        if row["attainment_worst_train"] is not None:
            settings.setdefault((row.get("task", "exact-v1"), *_setting(row)), []).append((n, row))
    if not settings:
        return [Advice("No results are committed yet, so there is no advice.")]
    here = {name: float(dials.get(name, default)) for name, default in DIALS.items()}
    gaps = {setting: _gaps(here, setting[1:]) for setting in settings}

    def order(setting: tuple[Any, ...]) -> tuple[float, ...]:
        """Those with more than baselines, nearest first; of equally near ones those with this learner, then with more methods."""
        found = settings[setting]
        bare = all(row["category"] == "baseline" for _, row in found)
        return bare, *_distance(gaps[setting]), all(row["learner"] != learner for _, row in found), -len(found)

    nearest = min(settings, key=order)
    found = settings[nearest]
    learner = learner if any(row["learner"] == learner for _, row in found) else str(found[0][1]["learner"])
    found = [(n, row) for n, row in found if row["learner"] == learner]
    sentences = [_where(here, nearest, gaps[nearest], learner, found), *_far(here, nearest, gaps[nearest], found)]
    affordable = [(n, row) for n, row in found if budget is None or (row["samples"] is not None and row["samples"] <= budget)]
    contest = [(n, row) for n, row in affordable if row["category"] != "baseline"]
    if not contest:
        return [*sentences, _nothing(found, budget)]
    ranked = sorted(contest, key=lambda pair: -pair[1]["attainment_worst_train"])
    return [*sentences, *_best(ranked, budget), *_families(ranked), *_harm(ranked)]


def _setting(row: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(float(row.get(name, default)) for name, default in DIALS.items())


def _gaps(here: Mapping[str, float], setting: tuple[float, ...]) -> dict[str, float]:
    """Per dial, how far apart: scale and rate in decades, infinite where only one side is sparse.

    Where both are sparse, correlation and scale are not compared: a rare event's correlation and spread follow from its rate.
    """
    there = dict(zip(DIALS, setting, strict=True))
    gaps = {name: abs(here[name] - there[name]) for name in DIALS}
    gaps["scale"] = abs(math.log10(max(here["scale"], 1e-9) / there["scale"]))
    if here["sparse"] > 0 and there["sparse"] > 0:
        gaps |= {"sparse": abs(math.log10(here["sparse"] / there["sparse"])), "rho": 0.0, "scale": 0.0}
    elif here["sparse"] > 0 or there["sparse"] > 0:
        gaps["sparse"] = math.inf
    return {name: math.inf if math.isnan(gap) else gap for name, gap in gaps.items()}


def _distance(gaps: Mapping[str, float]) -> tuple[int, float]:
    """First how many dials are too far, then how far all are, each in units of what is near."""
    return sum(gap > NEAR[name] for name, gap in gaps.items()), sum(min(gap, 1e6) / max(NEAR[name], 0.1) for name, gap in gaps.items())


def _where(
    here: Mapping[str, float],
    setting: tuple[Any, ...],
    gaps: Mapping[str, float],
    learner: str,
    found: Sequence[tuple[int, Mapping[str, Any]]],
) -> Advice:
    task, *values = setting
    there = dict(zip(DIALS, values, strict=True))
    shown = ", ".join(f"{name} = {value:g}" for name, value in there.items() if value != DIALS[name])
    seeds = min(int(row["n_seeds"]) for _, row in found)
    few = "" if seeds >= 10 else f"; only {seeds} seed{'s' if seeds > 1 else ''}, so small differences mean nothing"
    apart = [_apart(name, here, there) for name, gap in gaps.items() if gap > 0.005]
    distance = f" Yours: {', '.join(apart)}." if apart else " Yours is the same."
    text = f"Nearest measured setting: {task} with {shown or 'its defaults'}, learner {learner}, {len(found)} methods{few}.{distance}"
    return Advice(text, tuple(n for n, _ in found), "n_seeds")


def _apart(name: str, here: Mapping[str, float], there: Mapping[str, float]) -> str:
    value = "unknown" if math.isnan(here[name]) else f"{here[name]:.3g}"
    return f"{SAID[name]} {value} against {there[name]:.3g}"


def _far(
    here: Mapping[str, float], setting: tuple[Any, ...], gaps: Mapping[str, float], found: Sequence[tuple[int, Mapping[str, Any]]]
) -> list[Advice]:
    """That the advice is a guess, where a dial is too far from what was measured."""
    there = dict(zip(DIALS, setting[1:], strict=True))
    far = [_apart(name, here, there) for name, gap in gaps.items() if not gap <= NEAR[name]]
    if not far:
        return []
    text = f"That is far: {', '.join(far)}. Take what follows as a guess, and measure two or three methods on your own task."
    return [Advice(text, tuple(n for n, _ in found), "n_seeds")]


def _nothing(found: Sequence[tuple[int, Mapping[str, Any]]], budget: int | None) -> Advice:
    """What is said where no method of the setting may be named."""
    paid = [(n, row) for n, row in found if row["category"] != "baseline" and row["samples"] is not None]
    if budget is None or not paid:
        return Advice("Only baselines were measured there.", tuple(n for n, _ in found), "category")
    n, row = min(paid, key=lambda pair: pair[1]["samples"])
    return Advice(f"No method was measured there within {budget:,} samples; the cheapest is {_name(row)}{_cost(row)}.", (n,), "samples")


def _name(row: Mapping[str, Any]) -> str:
    return f"`{row['method']}` ({row['category']})"


def _cost(row: Mapping[str, Any]) -> str:
    return f" with {row['samples']:,} samples" if row["samples"] else ""


def _best(ranked: Sequence[tuple[int, Mapping[str, Any]]], budget: int | None) -> list[Advice]:
    n, best = ranked[0]
    within = f" within {budget:,} samples" if budget is not None else ""
    said = [
        Advice(
            f"Best{within}: {_name(best)}, which reaches {best['attainment_worst_train']:.2f} of the possible gain at the worst preference"
            f"{_cost(best)}.",
            (n,),
            "attainment_worst_train",
        )
    ]
    cheaper = [
        (k, row)
        for k, row in ranked[1:]
        if row["samples"] is not None
        and best["samples"] is not None
        and row["samples"] < best["samples"]
        and row["attainment_worst_train"] >= best["attainment_worst_train"] - CLOSE
    ]
    if cheaper:
        k, row = min(cheaper, key=lambda pair: pair[1]["samples"])
        text = f"Nearly as good and cheaper: {_name(row)}, {row['attainment_worst_train']:.2f}{_cost(row)}."
        said.append(Advice(text, (k, n), "attainment_worst_train, samples"))
    test = best.get("attainment_worst_test")
    if test is not None:
        said.append(Advice(f"On prompts that it was not trained on, {_name(best)} reached {test:.2f}.", (n,), "attainment_worst_test"))
    return said


def _families(ranked: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Advice]:
    """The best method of each category, the categories in the order of these."""
    first: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for n, row in ranked:
        first.setdefault(str(row["category"]), (n, row))
    if len(first) < 2:
        return []
    parts = [f"{category} {row['attainment_worst_train']:.2f} (`{row['method']}`)" for category, (_, row) in first.items()]
    return [Advice(f"Families by their best method: {', '.join(parts)}.", tuple(n for n, _ in first.values()), "attainment_worst_train")]


def _harm(ranked: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Advice]:
    bad = [(n, row) for n, row in ranked if row["attainment_worst_train"] < 0]
    if not bad:
        return []
    names = ", ".join(f"`{row['method']}` ({row['attainment_worst_train']:.2f})" for _, row in bad)
    return [Advice(f"Worse than no training at some preference: {names}.", tuple(n for n, _ in bad), "attainment_worst_train")]

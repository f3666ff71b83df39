"""The page of one family, after `paretune fit`: what it gains over the untrained model, how it trained, and what it says.

Everything is read from the family's folder and from its trainings beside it; nothing is measured anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import LinearNDInterpolator

from paretune.errors import ParetuneError
from paretune.files import disk_errors, write_text
from paretune.policy.card import read_card
from paretune.report.drawing import to_svg
from paretune.report.figures import Figure, Plot, padded
from paretune.report.looks import Look, looks, looks_by_place
from paretune.report.page import render
from paretune.report.tables import Column, Table, minus, short_count, signed
from paretune.runs.recipes.measured import read_measured, said_of
from paretune.runs.store import ARTIFACTS, Store
from paretune.training.cost import LOG
from paretune.types import Estimate

__all__ = [
    *("Fitted", "Training", "findings_of", "front_picture", "load_fitted", "measured_table", "prompts_of", "write_families"),
    "write_fitted",
]

UNTRAINED, YOU = "the untrained model", "you"
FEW = "too few responses to tell"
MORE_CURVES = {  # title -> figure of the log, drawn where a training has it
    "entropy, nats": "entropy",
    "entropy, nats, estimated": "entropy_estimate",
    "largest KL of a response, nats": "kl_max",
    "share that the loss clips": "clipped",
    "spread of advantages": "advantage_spread",
    "gap of sampling and scoring, nats": "logp_gap",
}


@dataclass(frozen=True)
class Training:
    """One training of a family: its label, its description (spec.json), and the lines of its log."""

    label: str
    spec: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    @property
    def looks(self) -> list[Mapping[str, Any]]:
        """What was seen at validation prompts."""
        return [look for record in self.records for look in record.get("looks", ())]


@dataclass(frozen=True)
class Fitted:
    """A family on disk with what `paretune fit` measured (None where it did not) and those of its trainings that lie beside it."""

    folder: Path
    card: Mapping[str, Any]
    found: Mapping[str, Any] | None
    trainings: Sequence[Training] = field(default=())

    @property
    def names(self) -> list[str]:
        return list(self.card["objectives"]["names"])

    @property
    def method(self) -> Mapping[str, Any]:
        return self.card["meta"].get("method") or {"name": "a family"}

    @property
    def w_WM(self) -> list[list[float]]:
        return self.found["preferences"] if self.found else []

    @property
    def measured(self) -> Mapping[str, Any]:
        return self.found["measured"] if self.found else {}

    @property
    def start(self) -> Mapping[str, Any]:
        """The untrained model's scores; unknown in files of earlier versions."""
        return self.measured.get("reference") or {"rewards": [None] * len(self.names)}

    def estimates(self, what: str) -> list[Estimate | None]:
        """Gain or utility at every measured preference."""
        return [_estimate(found) for found in self.measured[what]["per_preference"]] if self.found else []

    @cached_property
    def guards(self) -> Mapping[str, Any]:
        return self.measured.get("guards") or {}


def _estimate(found: Mapping[str, Any] | None) -> Estimate | None:
    if found is None or found["value"] is None:
        return None
    low, high = (np.nan if found[end] is None else found[end] for end in ("low", "high"))
    return Estimate(value=found["value"], low=low, high=high, n=found.get("n", 0))


def load_fitted(folder: Path) -> Fitted:
    """Read a family's folder; its trainings where they lie in the run directory around it."""
    card = read_card(folder)
    store, found = Store(folder.resolve().parent.parent), []
    here = set(store.published(ARTIFACTS)) if (store.root / ARTIFACTS).is_dir() else set()
    labels: dict[str, int] = {}
    for key in card["meta"].get("trainings", ()):
        if key in here:
            spec = json.loads(store.read(key, "spec.json", ARTIFACTS))
            label = _training_label(spec, card["objectives"]["names"])
            labels[label] = labels.get(label, 0) + 1
            lines = store.read(key, LOG, ARTIFACTS).decode("utf-8").splitlines()
            number = f" {labels[label]}" if labels[label] > 1 else ""
            found.append(Training(label + number, spec, [json.loads(line) for line in lines if line]))
    return Fitted(folder, card, read_measured(folder), found)


def _training_label(spec: Mapping[str, Any], names: Sequence[str]) -> str:
    if spec.get("preference") is not None and len(spec["preference"]) == len(names):
        return said_of(spec["preference"], names)
    return "any preference" + (", on top of others" if spec.get("frozen_adapters") else "")


# What is said


def findings_of(fitted: Fitted) -> list[str]:
    """Sentences about what was measured, the most important first; what intervals cannot tell is said to be so."""
    if not fitted.found:
        return [f"A family of {len(fitted.names)} objectives, not measured yet"]
    gains, mean = fitted.estimates("gain"), _estimate(fitted.measured["gain"]["mean"])
    on = f"on {prompts_of(fitted)}"
    if mean is None or not np.isfinite(mean.low):
        told = f": {signed(mean.value)} in utility {on}, and no interval" if mean else ""
        return [f"{FEW.capitalize()} what this family gains over the untrained model{told}.", *_guards_lost(fitted)]
    gain = f"{signed(mean.value)} [{signed(mean.low)}, {signed(mean.high)}]"
    if mean.low > 0:
        first = f"This family gains {gain} in utility over the untrained model, on average over preferences, {on}."
    elif mean.high < 0:
        first = f"This family loses {gain} in utility against the untrained model, on average over preferences, {on}."
    else:
        first = f"{FEW.capitalize()} whether this family gains over the untrained model: {gain} in utility, {on}."
    return [first, *_by_preference(fitted, gains), *_guards_lost(fitted)]


def prompts_of(fitted: Fitted) -> str:
    """The prompts that a family was measured on: with fewer responses than prompts, the first ones."""
    found = fitted.found or {}
    count, samples = found.get("prompts"), found.get("samples")
    fewer = count is not None and samples is not None and samples < count
    return f"{f'the first {samples} of ' if fewer else ''}{'its' if count is None else count} test prompts"


def _by_preference(fitted: Fitted, gains: Sequence[Estimate | None]) -> Iterator[str]:
    known = [(said_of(w_M, fitted.names), gain) for w_M, gain in zip(fitted.w_WM, gains, strict=True) if gain and np.isfinite(gain.low)]
    better, worse = ([said for said, gain in known if test(gain)] for test in (lambda g: g.low > 0, lambda g: g.high < 0))
    unsure = [said for said, gain in known if gain.low <= 0 <= gain.high]
    if better:
        yield f"The gain is above 0 at {'every preference' if len(better) == len(gains) else ', '.join(better)}."
    if worse:
        yield f"Below 0, and surely so, at {', '.join(worse)}."
    if unsure and len(unsure) < len(gains):
        yield f"At {', '.join(unsure)} the interval holds 0: {FEW} there."
    if unsure:
        more = 4 * int((fitted.found or {}).get("samples", 100))
        yield f"More responses narrow the intervals: `paretune fit RECIPE --samples {more}` measures again and trains nothing."


def _guards_lost(fitted: Fitted) -> Iterator[str]:
    for name, guard in fitted.guards.items():
        changes = zip(fitted.w_WM, guard["per_preference"], guard["change"]["per_preference"], strict=True)
        lost = [(change["value"], w_M, now) for w_M, now, change in changes if change["high"] is not None and change["high"] < 0]
        if lost:
            _, w_M, now = min(lost, key=lambda item: item[0])
            before, after = (minus(f"{value:.2f}") for value in (guard["reference"], now))
            yield f"The guard {name} falls from {before} to {after} at {said_of(w_M, fitted.names)}."


# Tables


def measured_table(fitted: Fitted) -> Table:
    """One row for the untrained model and one per preference: mean scores, guards, KL, and the gain in utility with its interval."""
    own = ("preference", "kl", "gain", "gain_low", "gain_high")
    keys = {name: f"score of {name}" if name in own else name for name in (*fitted.names, *fitted.guards)}
    shown = [*(Column(keys[name], name) for name in fitted.names), *(Column(keys[name], f"{name} (guard)") for name in fitted.guards)]
    gain = (Column("gain", "gain", "change"), Column("gain_low", "95 % low", "change"), Column("gain_high", "high", "change"))
    columns = (Column("preference", "preference", "text"), *shown, Column("kl", "KL"), *gain)
    scored = [keys[name] for name in fitted.names]
    start = dict(zip(scored, fitted.start["rewards"], strict=True))
    start |= {keys[name]: guard["reference"] for name, guard in fitted.guards.items()}
    rows: list[dict[str, Any]] = [{"preference": UNTRAINED, **start, "kl": 0.0}]
    for w, w_M in enumerate(fitted.w_WM):
        row = {"preference": said_of(w_M, fitted.names), **dict(zip(scored, fitted.measured["rewards"][w], strict=True))}
        row |= {keys[name]: guard["per_preference"][w] for name, guard in fitted.guards.items()}
        found = fitted.measured["gain"]["per_preference"][w]
        row |= {"kl": fitted.measured["kl"]["per_preference"][w], "gain": found["value"]}
        rows.append(row | {f"gain_{end}": found[end] for end in ("low", "high")})
    return Table("measured", columns, rows)


def _lines(fitted: Fitted) -> list[dict[str, Any]]:
    """The page's rows: gains and utilities with intervals, and where each is drawn, in percent of a line from the lowest to the highest."""
    gains, utilities = fitted.estimates("gain"), fitted.estimates("utility")
    ends = [v for g in gains if g for v in (g.value, g.low, g.high) if np.isfinite(v)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    across = (high - low) or 1.0
    kl_W = fitted.measured["kl"]["per_preference"]
    # Those of returns, which earlier versions have alone, hold the noise of KL too.
    errors_WM = fitted.measured.get("rewards_error") or [[None] * len(fitted.names)] * len(kl_W)
    found = []
    for w, (w_M, gain, utility) in enumerate(zip(fitted.w_WM, gains, utilities, strict=True)):
        line: dict[str, Any] = {"said": said_of(w_M, fitted.names), "gain": gain, "utility": utility, "kl": kl_W[w]}
        line["scores"] = list(zip(fitted.measured["rewards"][w], errors_WM[w], strict=True))
        line["guards"] = [guard["per_preference"][w] for guard in fitted.guards.values()]
        line["unsure"] = gain is not None and not (gain.low > 0 or gain.high < 0)
        if gain is not None:
            known = [v if np.isfinite(v) else gain.value for v in (gain.low, gain.value, gain.high)]
            line["drawn"] = [round(100 * (v - low) / across, 2) for v in (*known, 0.0)]
        found.append(line)
    return found


def _start(fitted: Fitted) -> dict[str, Any]:
    """The untrained model's row."""
    start = fitted.start
    errors_M = start.get("rewards_error") or [None] * len(fitted.names)
    utilities = [_estimate(found) for found in start.get("utility", ())]
    guards = [guard["reference"] for guard in fitted.guards.values()]
    return {"scores": list(zip(start["rewards"], errors_M, strict=True)), "guards": guards, "utilities": utilities}


# Pictures


def _figures(fitted: Fitted) -> dict[str, list[Figure]]:
    found = {"gain": _gain_figure(fitted), "fronts": _front_figures(fitted)} if fitted.found else {}
    return {name: made for name, made in (found | {"training": _training_figures(fitted)}).items() if made}


def _figure(name: str, title: str, plot: Plot) -> Figure:
    return Figure(name, title, f"{title or name}; the numbers are in the table on this page.", {"test": plot.view()})


def _gain_figure(fitted: Fitted) -> list[Figure]:
    known = [(w_M[0], gain) for w_M, gain in zip(fitted.w_WM, fitted.estimates("gain"), strict=True) if gain]
    if len(fitted.names) != 2 or len(known) < 2:
        return []
    known.sort(key=lambda item: item[0])
    ends = [[g.low for _, g in known], [g.high for _, g in known]]
    points = np.array([(w, g.value) for w, g in known])
    plot = Plot([f"weight of {fitted.names[0]}", "gain in utility"], (-0.03, 1.03), padded(points[:, 1], *ends, [0.0]))
    whole = np.isfinite(ends).all()
    plot.draw(str(fitted.method["name"]), points, [f"{fitted.names[0]} {w:.2f}" for w, _ in known], line=True, band=ends if whole else None)
    plot.level(0.0)
    return [_figure("gain", "Gain against preference", plot)]


def front_picture(fitted: Fitted, w_M: np.ndarray) -> str | None:
    """The measured returns as SVG, with where a preference stands between them; None where they cannot be drawn."""
    label, known_WM = str(fitted.method["name"]), np.array(fitted.w_WM)
    returns_WM = np.array(fitted.measured["returns"], dtype=float)
    if len(fitted.names) == 2:
        order = np.argsort(known_WM[:, 0])
        beyond = {"left": np.nan, "right": np.nan}  # what was not measured is not drawn, as with three objectives
        here_M = np.array([np.interp(w_M[0], known_WM[order, 0], returns_WM[order, k], **beyond) for k in (0, 1)])
    elif len(fitted.names) == 3 and len(known_WM) and np.linalg.matrix_rank(known_WM[:, :2] - known_WM[0, :2]) == 2:  # no line
        here_M = LinearNDInterpolator(known_WM[:, :2], returns_WM)(w_M[None, :2])[0]
    else:
        return None
    figures = _front_figures(fitted, here_M)
    known = {**looks({label: fitted.method}), UNTRAINED: Look(12, "cross"), YOU: Look(1, "star")}
    return to_svg([(figure.title, figure.views["test"]) for figure in figures], known, alt=figures[0].alt) if figures else None


def _front_figures(fitted: Fitted, here_M: np.ndarray | None = None) -> list[Figure]:
    names, found = fitted.names, []
    points_WM = np.array(fitted.measured["returns"], dtype=float)
    errors_WM = np.nan_to_num(np.array(fitted.measured["returns_error"], dtype=float))
    start_M = np.array(fitted.start["rewards"], dtype=float)
    start_error_M = np.nan_to_num(np.array(fitted.start.get("rewards_error") or [0.0] * len(names), dtype=float))
    for a, b in combinations(range(len(names)), 2) if len(names) <= 3 else ():
        pair = [a, b]
        known_W, known = np.isfinite(points_WM[:, pair]).all(1), np.isfinite(start_M[pair]).all()
        if not known_W.any():
            continue
        every = np.concatenate([points_WM[known_W][:, pair], start_M[None, pair]])
        half = np.concatenate([errors_WM[known_W][:, pair], start_error_M[None, pair]])
        ranges = [padded(every[:, k] - half[:, k], every[:, k] + half[:, k]) for k in (0, 1)]
        plot = Plot([f"return of {names[k]}" for k in pair], *ranges, both=True)
        line = len(names) == 2
        order = np.argsort([w_M[0] for w_M in fitted.w_WM]) if line else np.arange(len(known_W))
        kept = [w for w in order if known_W[w]]
        said = [said_of(fitted.w_WM[w], names) for w in kept]
        bars = {axis: errors_WM[kept, k].round(6).tolist() for axis, k in zip("xy", pair, strict=True)}
        plot.draw(str(fitted.method["name"]), points_WM[kept][:, pair], said, line=line, error=bars)
        if known:
            bars = {axis: [round(float(start_error_M[k]), 6)] for axis, k in zip("xy", pair, strict=True)}
            plot.draw(UNTRAINED, start_M[None, pair], ["before training"], line=False, error=bars)
        if here_M is not None and np.isfinite(here_M[pair]).all():
            plot.draw(YOU, here_M[None, pair], ["you"], line=False)
        title = f"Returns of {names[a]} and {names[b]}"
        found.append(_figure(f"front-{a}{b}", title, plot))
    return found


def _training_figures(fitted: Fitted) -> list[Figure]:
    """Utility (at validation prompts, where there are some), the reward of each objective, and KL, one curve per training."""
    looked = any(training.looks for training in fitted.trainings)
    what = "utility at validation prompts" if looked else "utility while training"
    series = {what: {t.label: _utility(t, fitted) for t in fitted.trainings}}
    for name in fitted.names:
        series[f"reward {name}"] = {t.label: _curve(t, lambda r, name=name: (r.get("rewards") or {}).get(name)) for t in fitted.trainings}
        series[f"weight of {name}"] = {
            t.label: _curve(t, lambda r, name=name: (r.get("weights") or {}).get(name)) for t in fitted.trainings
        }
    series["KL, nats"] = {t.label: _curve(t, lambda r: r.get("kl")) for t in fitted.trainings}
    for title, name in MORE_CURVES.items():
        series[title] = {t.label: _curve(t, lambda r, name=name: r.get(name)) for t in fitted.trainings}
    found = []
    for number, (title, curves) in enumerate(series.items()):
        known = {label: points for label, points in curves.items() if len(points)}
        if known:
            every = np.concatenate(list(known.values()))
            plot = Plot(["step", title], padded([0.0], every[:, 0]), padded(every[:, 1]))
            for label, points in known.items():
                plot.draw(label, points, [f"step {step:.0f}" for step in points[:, 0]], line=len(points) > 1, plain=len(points) > 30)
            found.append(_figure(f"training-{number}", title[0].upper() + title[1:], plot))
    return found


def _curve(training: Training, read: Any, *, records: Sequence[Mapping[str, Any]] | None = None) -> np.ndarray:
    """(n, 2) step and value where it is known."""
    pairs = [(record.get("step"), read(record)) for record in (training.records if records is None else records)]
    known = [(step, value) for step, value in pairs if step is not None and value is not None and np.isfinite(value)]
    return np.array(known, dtype=float).reshape(-1, 2)


def _utility(training: Training, fitted: Fitted) -> np.ndarray:
    if training.looks:
        return _curve(training, lambda look: look["utility"], records=training.looks)
    weights, beta = training.spec.get("preference"), training.spec.get("task", {}).get("beta")
    if weights is None or beta is None or len(weights) != len(fitted.names):
        return np.empty((0, 2))

    def utility(record: Mapping[str, Any]) -> float | None:
        scores = [(w, (record.get("rewards") or {}).get(name)) for name, w in zip(fitted.names, weights, strict=True) if w > 0]
        if any(score is None for _, score in scores) or record.get("kl") is None:
            return None
        return sum(w * score for w, score in scores) - beta * record["kl"]

    return _curve(training, utility)


# The page


def write_fitted(folder: Path, out: Path | None = None) -> Path:
    """Write index.html beside family.json, or into the folder `out`; returns its path."""
    fitted = load_fitted(folder)
    figures, said = _figures(fitted), findings_of(fitted)
    label = str(fitted.method["name"])
    labels = [training.label for training in fitted.trainings]
    known = {**looks_by_place(labels), **looks({label: fitted.method}), UNTRAINED: Look(12, "cross")}
    few = (label, UNTRAINED, *(labels if len(labels) <= 5 else (labels[0], labels[len(labels) // 2], labels[-1])))
    page = render(
        "family.html.j2",
        figures=[figure for found in figures.values() for figure in found],
        looks=known,
        lead=few,
        fitted=fitted,
        title=said[0],
        label=label,
        findings=said[1:],
        drawn=figures,
        lines=_lines(fitted) if fitted.found else [],
        start=_start(fitted) if fitted.found else None,
        labels=labels,
        warnings=list(fitted.card["meta"].get("warnings", {}).values()),
        facts=_facts(fitted),
        untrained=UNTRAINED,
        few=FEW,
        show=Column("", "").show,
        change=Column("", "", "change"),
    )
    place = (out or folder) / "index.html"
    with disk_errors(place, "a page"):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, page)
    return place


def _facts(fitted: Fitted) -> list[tuple[str, str]]:
    card, meta = fitted.card, fitted.card["meta"]
    base = card["base"]
    facts = [("model", str(base.get("model") or json.dumps(base.get("task"))))]
    facts += [("objectives", ", ".join(fitted.names)), ("method", _plain(meta["method"]))] if meta.get("method") else []
    learners = {json.dumps(training.spec["learner"]): training.spec["learner"] for training in fitted.trainings}
    facts += [("learner", _plain(learner)) for learner in learners.values()]
    facts += [("terms", "; ".join(meta["terms"]))] if meta.get("terms") else []
    facts += [("seed", str(meta["seed"]))] if meta.get("seed") is not None else []
    total = (meta.get("ledger") or {}).get("total")
    if total:
        count = f"{len(meta.get('trainings', ()))} trainings, {short_count(total['samples'])} samples"
        facts.append(("training", f"{count}, {short_count(total['tokens'])} tokens, {total['seconds']:.0f} s"))
    if fitted.found:
        facts.append(("measured", f"{fitted.found['samples']} responses per preference, {fitted.found['split']} prompts"))
    return facts


def _plain(thing: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in thing.items() if value is not None)


def write_families(root: Path, out: Path | None = None) -> tuple[list[tuple[Path, Table | None]], list[ParetuneError]]:
    """The page of every family of a run directory, or of the folder itself where it is one, with what was measured of it; and why some
    have none.

    `out` is another folder for it; of several families, that of a folder for each.
    """
    folders, pages, refused = Store(root).families(), [], []
    for folder in folders:
        try:
            page, fitted = write_fitted(folder, out / folder.name if out and len(folders) > 1 else out), load_fitted(folder)
            pages.append((page, measured_table(fitted) if fitted.found else None))
        except ParetuneError as error:
            refused.append(error)
    return pages, refused

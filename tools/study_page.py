"""The study's page: what benchmarks/results/study.json holds, as findings with intervals, a table and one picture.

Numbers are the worst attainment over the judged preferences, a mean over task seeds. Differences are paired by seed; their 95 % interval is
a bootstrap over seeds (evaluation/stats.py), which there is from ten seeds on. Without one, or where it holds 0, a finding is undecided.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from paretune.evaluation.stats import MIN_UNITS, paired_difference
from paretune.report.tables import SHOWN, minus
from paretune.types import Estimate

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "study.json"
ON = {"train": "training prompts", "test": "new prompts"}
Rows = Mapping[str, Mapping[str, Any]]  # method -> what was measured


@dataclass(frozen=True)
class Claim:
    """One claim of the seed paper; a comparison is what is said of it, methods a and b, the measure, and the relationships, if not all."""

    name: str
    comparisons: tuple[tuple[str, str, str, str, tuple[str, ...]], ...]
    note: str = ""


LARGER = ("M = 3", "M = 5")
CLAIMS = (
    Claim(
        "Meta-policies degrade at specific preferences",
        (
            ("what a preference can lose against the mean, logit mixing minus conditioned", "experts logit", "conditioned", "dip", ()),
            ("the same for the soup of parameters", "experts parameter", "conditioned", "dip", ()),
            ("the same for `bridge`, a meta-policy with a part for what lies between", "bridge", "conditioned", "dip", ()),
        ),
    ),
    Claim(
        "Aggregating hidden states is ahead of parameters and tokens",
        (
            ("hidden states minus parameters", "experts hidden", "experts parameter", "worst", ()),
            ("hidden states minus logits, the token level", "experts hidden", "experts logit", "worst", ()),
            ("one hidden layer below the last minus logits", "hidden-layer", "experts logit", "worst", ()),
        ),
        "Last hidden states under one linear head give the same policy as logits, so that the second difference is 0 up to rounding.",
    ),
    Claim(
        "A meta-policy is more efficient",
        (
            ("EMORL's search on shared experts minus `linear`, which pays for one training more", "emorl-shared", "linear", "worst", ()),
            ("`bridge` minus `linear` at equal trainings", "bridge", "linear", "worst", ()),
            ("`bridge` minus `conditioned` at equal trainings", "bridge", "conditioned", "worst", ()),
        ),
        "A conditioned policy with as many steps needs one model and no experts. What the bridge has instead: its experts stay as they "
        "are, can be used and exchanged alone, and an objective can be added.",
    ),
    Claim(
        "It scales with objectives, and takes new ones",
        (
            ("logit mixing minus `conditioned`", "experts logit", "conditioned", "worst", LARGER),
            ("`bridge` minus `conditioned`", "bridge", "conditioned", "worst", LARGER),
            ("`extended`, its last objective added later, minus `bridge`, trained at once", "extended", "bridge", "worst", LARGER),
        ),
    ),
    Claim(
        "It serves every user's preference (personalization)",
        (
            ("`bridge` minus `uniform`, one policy for all", "bridge", "uniform", "worst", ()),
            ("logit mixing minus `uniform`", "experts logit", "uniform", "worst", ()),
        ),
    ),
    Claim(
        "Its weights explain what it does",
        (
            (
                "its path over preferences agrees with the optimum's, logit mixing minus `conditioned`",
                "experts logit",
                "conditioned",
                "control",
                (),
            ),
        ),
        "Agreement says that a weight moves the returns as it should. Whether people understand a policy better so was asked of nobody.",
    ),
)


def load() -> dict[str, Any] | None:
    """The committed results; None before there are any."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else None


def values(row: Mapping[str, Any], measure: str, split: str) -> dict[int, float]:
    """Task seed -> the measure; "dip" is how far the worst preference lies below the mean."""
    if measure == "dip":
        found = [m - w for m, w in zip(row[f"mean_{split}"], row[f"worst_{split}"], strict=True)]
    else:
        found = row[f"{measure}_{split}"]
    return dict(zip(row["seeds"], found, strict=True))


def difference(rows: Rows, a: str, b: str, measure: str, split: str) -> Estimate | None:
    """a - b, paired by seed; None where one was not measured."""
    if a not in rows or b not in rows:
        return None
    of_a, of_b = (values(rows[name], measure, split) for name in (a, b))
    both = [s for s in sorted(set(of_a) & set(of_b)) if of_a[s] is not None and of_b[s] is not None]
    return paired_difference([of_a[s] for s in both], [of_b[s] for s in both], seed=0) if both else None


def sign(found: Estimate) -> int:
    """1 or -1 where the interval lies on that side of 0, else 0."""
    return 1 if found.low > 0 else -1 if found.high < 0 else 0


def shown(found: Estimate) -> str:
    value = minus(f"{found.value:.2f}")
    if not np.isfinite([found.low, found.high]).all():
        return value
    return f"{value} [{minus(f'{found.low:.2f}')}, {minus(f'{found.high:.2f}')}]"


# The page's parts


def state() -> str:
    """How much is measured, and how to go on."""
    record = load()
    if record is None:
        return "Nothing is measured yet.\n"
    missing, total = record["figures"]["study_cells_missing"], record["cells_declared"]
    parts = []
    for part, relations in record["cells"].items():
        counts = [len(row["seeds"]) for rows in relations.values() for row in rows.values()]
        seeds = str(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        parts.append(f"{part} learner: {len(relations)} relationships, {sum(counts):,} cells, {seeds} seeds each")
    text = f"{total - missing:,.0f} of {total:,} cells are measured ({'; '.join(parts) or 'none'})."
    if missing:
        text += (
            f" **{missing:,.0f} are missing**, so that findings below may be undecided for want of seeds: an interval takes {MIN_UNITS}. "
            "`python benchmarks/study.py --run --out benchmarks/results/study.json` goes on."
        )
    return text + "\n"


def claims() -> str:
    """The seed paper's claims one by one, with the exact learner."""
    record = load()
    relations = {} if record is None else record["cells"].get("exact", {})
    lines = []
    for claim in CLAIMS:
        lines += [f"### {claim.name}: {_verdict(relations, claim)}\n"]
        for comparison in claim.comparisons:
            lines += [f"- {comparison[0][0].upper() + comparison[0][1:]}: {_sentence(relations, comparison)}"]
        lines += ["", claim.note, ""] if claim.note else [""]
    return "\n".join(lines)


def _verdict(relations: Mapping[str, Rows], claim: Claim) -> str:
    """By the first comparison, on new prompts."""
    _, a, b, measure, among = claim.comparisons[0]
    signs = {}
    for name, rows in relations.items():
        if not among or name in among:
            found = difference(rows, a, b, measure, "test")
            signs[name] = 0 if found is None else sign(found)
    holds = [name for name, one in signs.items() if one > 0]
    if not signs or not any(signs.values()):
        return "undecided"
    if len(holds) == len(signs):
        return "holds"
    below = [name for name, one in signs.items() if one < 0]
    return f"holds when: {', '.join(holds)}" if holds else f"does not hold: {', '.join(below)}"


def _sentence(relations: Mapping[str, Rows], comparison: tuple[str, str, str, str, tuple[str, ...]]) -> str:
    """The mean over relationships on both kinds of prompts, at which of them it is decided on new ones, and what both methods cost."""
    _, a, b, measure, among = comparison
    rows = {name: one for name, one in relations.items() if (not among or name in among) and a in one and b in one}
    if not rows:
        return "not measured yet."
    means = [f"{shown(_pooled(rows, a, b, measure, split))} on {ON[split]}" for split in ("test", "train")]
    places: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for name, one in rows.items():
        found = difference(one, a, b, measure, "test")
        value = shown(found) if found is not None else "–"
        few = f", {found.n} seed{'s' * (found.n > 1)}" if found is not None and found.n < MIN_UNITS else ""
        places[0 if found is None else sign(found)].append(f"{name} {value}{few}")
    heads = {1: "Above 0 on new prompts", -1: "Below 0", 0: "Undecided"}
    said = [f"{heads[at]}: {'; '.join(names)}." for at, names in places.items() if names]
    costs = [next(iter(rows.values()))[method]["cost"] for method in (a, b)]
    cost = " against ".join(f"{one['steps']} ({one['steps_path']}, {one['evaluations']} evaluations)" for one in costs)
    return f"{' and '.join(means)}. {' '.join(said)} Steps in total (critical path, search) at {next(iter(rows))}: {cost}."


def _pooled(relations: Mapping[str, Rows], a: str, b: str, measure: str, split: str) -> Estimate:
    """The mean difference over relationships; a seed is drawn with all that was measured on it."""
    parts: list[tuple[float, float, str, int]] = []
    seeds = [set.intersection(*(set(rows[m]["seeds"]) for m in (a, b))) for rows in relations.values()]
    for name, rows in relations.items():
        of_a, of_b = (values(rows[method], measure, split) for method in (a, b))
        known = set.intersection(*seeds)
        parts += [(of_a[s], of_b[s], name, s) for s in sorted(known) if of_a[s] is not None and of_b[s] is not None]
    if not parts:
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    of_a_N, of_b_N, names_N, seeds_N = zip(*parts, strict=True)
    return paired_difference(of_a_N, of_b_N, seed=0, strata_N=names_N, units_N=seeds_N)


def table() -> str:
    """Methods x relationships: worst attainment on new prompts, exact learner, beside what it cost at M = 2."""
    record = load()
    if record is None or not record["cells"]:
        return "Nothing is measured yet.\n"
    names, methods, grid = _grid(record)
    head = ["method", *names, "steps", "critical path", "searches", "forwards per token"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for method, line in zip(methods, grid, strict=True):
        row = next(rows[method] for rows in _best_part(record).values() if method in rows)
        cost = row["cost"]
        tail = [f"{cost['steps']:,}", f"{cost['steps_path']:,}", f"{cost['evaluations']:,}", f"{row['forwards_per_token']:.3g}"]
        lines.append("| " + " | ".join([f"`{method}`", *("–" if v is None else SHOWN["share"](v) for v in line), *tail]) + " |")
    return "\n".join(lines) + "\n"


def _best_part(record: Mapping[str, Any]) -> dict[str, Rows]:
    """relationship -> method -> measured, of the exact learner, or of the sampled one that stands in its place."""
    exact, sampled = (record["cells"].get(part, {}) for part in ("exact", "sampled"))
    order = record["study"]["relationships"]
    instead = record["study"]["parts"]["exact"].get("instead", {})
    chosen = {name: (sampled if name in instead else exact).get(name) for name in order}
    return {name: rows for name, rows in chosen.items() if rows}


def _grid(record: Mapping[str, Any]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Relationships, methods (best mean first), and the mean over seeds of the worst attainment on new prompts."""
    part = _best_part(record)
    methods = list(dict.fromkeys(name for rows in part.values() for name in rows))
    grid = {m: [float(np.mean(rows[m]["worst_test"])) if m in rows else None for rows in part.values()] for m in methods}

    def level(method: str) -> float:
        return float(np.mean([max(-1.0, v) for v in grid[method] if v is not None]))

    methods.sort(key=level, reverse=True)
    return list(part), methods, [grid[m] for m in methods]


# The picture

TITLE = "Worst attainment on new prompts"
STYLE = """<style>text{font:12px system-ui,sans-serif;fill:#1d2430}.q{fill:#5a6472}.b{fill:#5a6472}.o{fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#e8ecf1}.q{fill:#a3adba}.b{fill:#a3adba}.d{fill:#111}.c text{fill:#111}}
.c text{fill:#111;font-size:11px;text-anchor:middle}</style>"""


def picture() -> str:
    """Methods x relationships as a heat map of the worst attainment on new prompts, beside the steps that each method costs."""
    record = load()
    if record is None or not record["cells"]:
        return '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"/>\n'
    names, methods, grid = _grid(record)
    left, top, wide, high, bars = 122, 92, 47, 19, 92
    width, height = left + wide * len(names) + bars + 34, top + high * len(methods) + 34
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"><title>Worst attainment on new prompts</title>'
    ]
    out += [STYLE, f'<text x="4" y="16">{TITLE} (1: the optimum, 0: untrained), and steps in total</text>']
    for j, name in enumerate(names):
        x = left + wide * j + wide / 2
        out.append(f'<text class="q" transform="translate({x:.0f} {top - 8}) rotate(-38)">{escape(name)}</text>')
    part = _best_part(record)
    steps = {m: next(rows[m]["cost"]["steps"] for rows in part.values() if m in rows) for m in methods}
    most = max(steps.values()) or 1
    for i, (method, line) in enumerate(zip(methods, grid, strict=True)):
        y = top + high * i
        out.append(f'<text x="4" y="{y + 13}">{escape(method)}</text><g class="c">')
        for j, value in enumerate(line):
            x = left + wide * j
            out.append(f'<rect x="{x}" y="{y}" width="{wide - 1}" height="{high - 1}" fill="{_fill(value)}"/>')
            shown_as = "–" if value is None else SHOWN["share"](value)
            out.append(f'<text x="{x + wide / 2:.0f}" y="{y + 13}">{escape(shown_as)}</text>')
        bar = left + wide * len(names) + 8
        length = bars * steps[method] / most
        out.append(f'</g><rect class="b" x="{bar}" y="{y + 5}" width="{length:.1f}" height="{high - 11}"/>')
        out.append(f'<text class="q" x="{bar + length + 4:.0f}" y="{y + 13}">{steps[method]}</text>')
    counts = {len(row["seeds"]) for rows in part.values() for row in rows.values()}
    over = f"{'at least ' * (len(counts) > 1)}{min(counts)} task seed{'s' * (min(counts) > 1)}"
    note = f"Means over {over}; exact learner (noisy: sampled). Bars: steps with two objectives."
    out.append(f'<text class="q" x="4" y="{height - 10}">{note}</text></svg>')
    return "\n".join(out) + "\n"


def _fill(value: float | None) -> str:
    """White at 0, blue towards 1, orange towards -1 and below; gray where unknown."""
    if value is None:
        return "#d5d9de"
    share, end = min(abs(value), 1.0), (90, 180, 238) if value > 0 else (255, 146, 72)
    return "#" + "".join(f"{round(255 + (e - 255) * share):02x}" for e in end)

"""Write what the README does not say by hand: its tables and its picture, from the code and from committed results.

    python tools/readme.py               everything from what is in the repository
    python tools/readme.py --root DIR    first take the quick suite's results from a run directory into benchmarks/results/quick.json
    python tools/readme.py --check       exit 1 where the README or the picture differ from what would be written

A generated part stands between `<!-- NAME: made by tools/readme.py -->` and `<!-- end -->`; everything else is left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from paretune.report.catalog import taxonomy
from paretune.report.data import PROMPTS, Results, assemble, load
from paretune.report.figures import attainment_figures, front_figures, to_svg
from paretune.report.tables import Table, glance_table

ROOT = Path(__file__).resolve().parent.parent
QUICK = ROOT / "benchmarks" / "results" / "quick.json"
PICTURE = ROOT / "docs" / "figures" / "front.svg"
BLOCK = re.compile(r"(<!-- (\w+): made by tools/readme\.py -->\n).*?(<!-- end -->)", re.DOTALL)
DRAWN = ("bridge", "linear", "experts parameter", "experts logit", "emorl-shared", "reference", "uniform")  # in the picture

# What each script of `benchmarks/` has to reach: figure, script, what it is, at least (a text where it is something else).
TARGETS = (
    ("sampled_worst_attainment", "expert.py", "experts by the sampled learner, 40,000 samples: worst attainment", 0.94),
    ("exact_worst_attainment", "expert.py", "experts by the exact learner: worst attainment", 0.975),
    (
        "meta_exact_worst",
        "meta.py",
        "experts and a bridge, exact learner, every judged preference at three correlations: worst attainment",
        0.95,
    ),
    ("meta_exact_minus_dedicated", "meta.py", "the same minus a dedicated training where it is worst", -0.02),
    ("meta_sampled_worst", "meta.py", "experts and a bridge, sampled learner, 200,000 samples in all: worst attainment", 0.9),
    ("meta_sampled_worst_m3", "meta.py", "the same for three objectives, 240,000 samples in all", 0.87),
    ("meta_minus_emorl_low", "meta.py", "bridge minus EMORL on the same experts at rho = -.8, mean: lower end of its interval", 0),
    ("meta_minus_emorl_min", "meta.py", "bridge minus EMORL at any preference, correlation and seed: the lowest", -0.01),
    ("conditioned_sampled_worst", "conditioned.py", "one conditioned policy at rho = -.8, 120,000 samples: worst attainment", 0.85),
    ("conditioned_exact_worst", "conditioned.py", "the same, exact learner", 0.93),
    ("conditioned_exact_worst_pblora", "conditioned.py", "the same, by PBLoRA", None),
    ("conditioned_exact_worst_panacea", "conditioned.py", "the same, by Panacea's structure", None),
    ("ray_speedup", "ray_scaling.py", "32 trainings on local Ray, 2 workers against 1, one thread each: times as fast", 1.7),
    ("samples_per_second_ratio", "learner_vs_trl.py", "sampled learner against TRL's GRPOTrainer: samples per second, times", 1.6),
    (
        "own_utility_worst",
        "utility.py",
        "Tchebycheff, max-min, Lagrangian: worst attainment of their own utility",
        0.93,
    ),
    (
        "ols_minus_best_set",
        "support.py",
        "optimistic linear support, 5 trainings: worst attainment less that of the best set of 5 optima",
        -0.05,
    ),
    ("ols_told_minus_best_set", "support.py", "the same, told of the judged preferences", None),
    ("ols_bound_minus_best_set", "support.py", "the same by the published bound, with optimal policies", None),
    ("evaluations_ratio_m3", "search.py", "outer search, M = 3: evaluations of the published one divided by ours", 5),
    ("evaluations_ratio_m5", "search.py", "the same at M = 5", 20),
    ("evaluations_ratio_m8", "search.py", "the same at M = 8, synthetic score", None),
    ("gated_vs_plain_b16", "decode.py", "per-row soups, unmerged, batch 16: share of the plain model's tokens per second", 0.9),
    ("gated_vs_plain_b1", "decode.py", "the same, batch 1", 0.85),
    ("gated_vs_plain_b16_one_thread", "decode.py", "per-row soups with one thread instead of two, batch 16: the same share", None),
    ("gated_vs_plain_b1_one_thread", "decode.py", "the same, batch 1", None),
    ("router_vs_plain_b16", "decode.py", "gates by a router, anew for every token, batch 16: the same share", 0.75),
    ("logit_vs_plain_b16", "decode.py", "logit mixing of 3 experts, batch 16: the same share", 0.30),
    (
        "reflection_min_gain",
        "reflection.py",
        "text task: bridge minus a policy at equal weights, sampled utility, lowest of 66 preferences",
        0,
    ),
    ("reflection_below", "reflection.py", "preferences of 66 at which the interval of that difference lies below 0", "at most 0"),
    ("reflection_vertex_low", "reflection.py", "the same difference at the vertices: lowest end of an interval", "above 0"),
    ("context_gain_low", "context.py", "gates by prompt over the best fixed ones, test prompts, 10 seeds: gain, lower end", "above 0"),
    ("context_gain_mean", "context.py", "the same gain, mean", None),
    ("shared_trunk_logit_vs_plain", "decode.py", "logit mixing of 3 experts that share their lower layers, batch 16: the same share", 0.6),
    ("logit_vs_published_loop", "decode.py", "logit mixing against the published loop (3 full copies, no cache), times", None),
    ("experts_logit_worst_2_layers", "mixings.py", "logit mixing of plain experts, a small exact task: worst attainment", None),
    ("bone_soup_logit_worst_2_layers", "mixings.py", "logit mixing of backbones trained at (.7, .3), same: worst attainment", None),
    (
        "hidden_best_layer_minus_logit_worst_4_layers",
        "mixings.py",
        "hidden states at the best of three layers below the last one, minus logit mixing: worst attainment",
        None,
    ),
    (
        "gradient_vs_linear_m4",
        "gradient.py",
        "slowest gradient-level method, 4 objectives: time per step against linear, times",
        "at most 1.6",
    ),
    ("memory_8_experts", "memory.py", "peak memory of 8 experts of one base, decoding, against 1 expert: times", "at most 1.15"),
    ("memory_step_vs_trl", "memory.py", "peak memory of a training step against TRL's at the same shapes: times", "at most 1.0"),
    ("trl_minus_embedded", "engines.py", "TRL as the engine minus the embedded learner, same samples: attainment", -0.02),
    (
        "dropin_overhead",
        "engines.py",
        "drop-in against plain GRPOTrainer, 4 rewards: CPU time per step, times, minus 1",
        "at most 0.05",
    ),
)

# Files that are not modules and cannot say themselves what they are.


def blocks() -> dict[str, str]:
    """Name -> the Markdown that belongs between its marks."""
    return {"taxonomy": markdown(taxonomy()), "results": _results(), "figures": _figures()}


def picture() -> str | None:
    """Where objectives conflict most: the front, and attainment at every preference. None before results are committed."""
    results = quick()
    if results is None:
        return None
    few = Results([cell for cell in results.cells if cell.label in DRAWN], name=results.name)
    last = few.settings[-1].label
    on = PROMPTS[few.settings[-1].headline]
    titles = (f"{last}, {on}: the exact front", f"{last}, {on}: attainment")
    views = [next(iter(make(few)[-1].views.values())) for make in (front_figures, attainment_figures)]
    alt = f"Two objectives that conflict ({last}, {on}): how near each method comes to the exact Pareto front."
    return to_svg(list(zip(titles, views, strict=True)), alt=alt)


def quick() -> Results | None:
    """The committed results of the quick suite."""
    if not QUICK.is_file():
        return None
    cells = json.loads(QUICK.read_text(encoding="utf-8"))["cells"]
    return assemble({key: cell["record"] for key, cell in cells.items()}, {key: cell["env"] for key, cell in cells.items()}, name="quick")


def take(root: Path) -> None:
    """Copy the quick suite's cells from a run directory, numbers to six digits, each task's front once: with the reference."""
    cells, seen = {}, set()
    for cell in sorted(load(root, suite="quick").cells, key=lambda cell: (cell.record["method"]["name"] != "reference", cell.key)):
        record = {key: value for key, value in cell.record.items() if key not in ("waves", "seconds")}
        task = json.dumps(record["task"], sort_keys=True)
        if task in seen:
            record["fronts"] = None
        seen.add(task)
        cells[cell.key] = {"record": _rounded(record), "env": cell.env}
    QUICK.parent.mkdir(parents=True, exist_ok=True)
    QUICK.write_text(json.dumps({"suite": "quick", "cells": cells}, separators=(",", ":")) + "\n", encoding="utf-8")


def markdown(table: Table) -> str:
    """A table as Markdown."""
    columns = table.shown
    lines = ["| " + " | ".join(c.title for c in columns) + " |"]
    lines.append("|" + "|".join("---" if c.kind in ("text", "yes") else "---:" for c in columns) + "|")
    for row in table.rows:
        cells = [c.show(row.get(c.key)) for c in columns]
        lines.append("| " + " | ".join([f"`{cells[0]}`" if columns[0].key == "name" else cells[0], *cells[1:]]) + " |")
    return "\n".join(lines) + "\n"


def _results() -> str:
    results = quick()
    if results is None:
        return "No results are committed yet.\n"
    table = glance_table(results)
    table = Table(table.name, tuple(c for c in table.columns if c.key != "category"), table.rows)
    commits = sorted({str(cell.env.get("commit"))[:10] for cell in results.cells})
    return markdown(table) + f"\n{len(results.cells)} cells; commit {', '.join(commits)}.\n"


def _figures() -> str:
    measured: dict[str, float] = {}
    for path in sorted([*(ROOT / "benchmarks" / "results").glob("*.json"), *(ROOT / "src" / "paretune" / "results").glob("*.json")]):
        measured |= json.loads(path.read_text(encoding="utf-8")).get("figures", {})
    lines = ["| what | script | at least | measured |", "|---|---|---:|---:|"]
    for name, script, what, least in TARGETS:
        if name in measured:
            wanted = "" if least is None else least if isinstance(least, str) else f"{least:g}"
            lines.append(f"| {what} | `benchmarks/{script}` | {wanted} | {measured[name]:.3g} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "No figures are committed yet.\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: v if k in ("task", "method", "learner") else _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="a run directory that holds the quick suite")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is stale")
    options = parser.parse_args()
    if options.root:
        take(options.root)
    made = blocks()
    page = ROOT / "README.md"
    old = page.read_text(encoding="utf-8")
    wanted = {page: BLOCK.sub(lambda m: f"{m[1]}{made[m[2]]}{m[3]}", old)}
    drawn = picture()
    if drawn is not None:
        wanted[PICTURE] = drawn
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(("stale: " if options.check else "wrote ") + str(path.relative_to(ROOT)))
        if not options.check:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

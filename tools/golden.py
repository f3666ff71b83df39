"""Make `src/paretune/golden/advantages.json`: what published rules make of small batches of rewards, from their formulas.

    python tools/golden.py            write the file anew
    python tools/golden.py --check    write nothing; exit 1 where the file differs from what would be written

Nothing of Paretune computes here. Every rule is its formula, written out with mpmath at 50 digits, so that the library has something
else to be compared with. `None` is an unscored reward.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mpmath as mp

OUT = Path(__file__).resolve().parent.parent / "src" / "paretune" / "golden" / "advantages.json"
EPS = mp.mpf("1e-4")
TINY = mp.mpf("1e-8")
mp.mp.dps = 50

Row = Sequence[Any]  # one response's rewards
Group = Sequence[Row]
Batch = Sequence[Group]
Values = list[list[Any]]  # one number or None for each response, group by group


def known(values: Sequence[Any]) -> list[Any]:
    return [v for v in values if v is not None]


def mean(values: Sequence[Any]) -> Any:
    return mp.fsum(known(values)) / len(known(values)) if known(values) else mp.mpf(0)


def std(values: Sequence[Any]) -> Any:
    """With n - 1 in the denominator; 0 for fewer than two."""
    scored, middle = known(values), mean(values)
    return mp.sqrt(mp.fsum([(v - middle) ** 2 for v in scored]) / (len(scored) - 1)) if len(scored) > 1 else mp.mpf(0)


def columns(batch: Batch, change: Callable[[Sequence[Any]], Sequence[Any]]) -> list[list[list[Any]]]:
    """`change` for each objective of each group; the answer is shaped like the batch."""
    return [list(map(list, zip(*[change(column) for column in zip(*group, strict=True)], strict=True))) for group in batch]


def centered(column: Sequence[Any]) -> list[Any]:
    return [None if v is None else v - mean(column) for v in column]


def z(column: Sequence[Any]) -> list[Any]:
    return [None if v is None else (v - mean(column)) / (std(column) + EPS) for v in column]


def without_own(column: Sequence[Any]) -> list[Any]:
    others = [known([*column[:i], *column[i + 1 :]]) for i in range(len(column))]
    return [None if v is None or not rest else v - mean(rest) for v, rest in zip(column, others, strict=True)]


def summed(batch: Sequence[Sequence[Row]], w: Sequence[Any]) -> Values:
    def one(row: Row) -> Any:
        parts = [weight * v for weight, v in zip(w, row, strict=True) if v is not None]
        return mp.fsum(parts) if parts else None

    return [[one(row) for row in group] for group in batch]


def divided(values: Values, by: Callable[[list[Any]], Any]) -> Values:
    return [[None if v is None else v / by(group) for v in group] for group in values]


def flat(values: Values) -> list[Any]:
    return [v for group in values for v in group]


def whitened(values: Values) -> Values:
    middle, width = mean(flat(values)), std(flat(values)) + EPS
    return [[None if v is None else (v - middle) / width for v in group] for group in values]


def grpo(batch: Batch, w: Sequence[Any]) -> Values:
    return divided(summed(columns(batch, centered), w), lambda group: std(group) + EPS)


def grpo_batch(batch: Batch, w: Sequence[Any]) -> Values:
    """The spread is that of all weighted sums of the batch; what is unscored stands at its group's mean there, or else the batch's."""
    filled = []
    over_all = [mean(column) for column in zip(*[row for group in batch for row in group], strict=True)]
    for group in batch:
        means = [mean(c) if known(c) else whole for c, whole in zip(zip(*group, strict=True), over_all, strict=True)]
        for row in group:
            parts = [weight * (m if v is None else v) for weight, v, m in zip(w, row, means, strict=True)]
            filled.append(mp.fsum(parts) if known(row) else None)
    return divided(summed(columns(batch, centered), w), lambda _: std(filled) + EPS)


def dr_grpo(batch: Batch, w: Sequence[Any]) -> Values:
    return summed(columns(batch, centered), w)


def rloo(batch: Batch, w: Sequence[Any]) -> Values:
    return summed(columns(batch, without_own), w)


def rloo_batch(batch: Batch, w: Sequence[Any]) -> Values:
    values = rloo(batch, w)
    return divided(values, lambda _: std(flat(values)) + EPS)


def mo_grpo(batch: Batch, w: Sequence[Any]) -> Values:
    return summed(columns(batch, z), w)


def gdpo(batch: Batch, w: Sequence[Any]) -> Values:
    return whitened(mo_grpo(batch, w))


def gd2po(batch: Batch, w: Sequence[Any], *, tau: Any = None) -> Values:
    kept: Values = []
    for group in columns(batch, z):
        parts = [[weight * v for weight, v in zip(w, row, strict=True) if v is not None] for row in group]
        stays = []
        for row in parts:
            conflict = any(a > TINY for a in row) and any(a < -TINY for a in row)
            if tau is not None:
                conflict = conflict and abs(mp.fsum(row)) < tau * mp.fsum([abs(a) for a in row])
            stays.append(bool(row) and not conflict)
        share = mp.mpf(sum(stays)) / max(sum(bool(row) for row in parts), 1)
        kept.append([mp.fsum(row) * share if stay else None for row, stay in zip(parts, stays, strict=True)])
    return whitened(kept)


def dvao(batch: Batch, w: Sequence[Any]) -> Values:
    scales = [mp.fsum([weight * std(c) for weight, c in zip(w, zip(*group, strict=True), strict=True)]) + EPS for group in batch]
    values = summed(columns(batch, centered), w)
    return [[None if v is None else v / scale for v in group] for group, scale in zip(values, scales, strict=True)]


def scores(column: Sequence[Any]) -> list[Any]:
    """Normal quantiles of middle ranks; 0 in a constant group."""
    scored = known(column)

    def one(v: Any) -> Any:
        if v is None or len(set(scored)) < 2:
            return mp.mpf(0)
        share = (mp.mpf(sum(o < v for o in scored)) + mp.mpf(sum(o == v for o in scored)) / 2) / len(scored)
        return mp.sqrt(2) * mp.erfinv(2 * min(max(share, EPS), 1 - EPS) - 1)

    return [one(v) for v in column]


def rdpo(batch: Batch, w: Sequence[Any]) -> Values:
    rows = [row for group in columns(batch, scores) for row in group]
    active = [k for k, weight in enumerate(w) if weight > 0 and any(row[k] != 0 for row in rows)]
    out = [[None if v is None else mp.mpf(0) for v in row] for group in batch for row in group]
    if active:
        moments = mp.matrix([[mp.fsum([row[j] * row[k] for row in rows]) / len(rows) for k in active] for j in active])
        values, vectors = mp.eigsy(moments)
        least = max(values) / 100
        root = vectors * mp.diag([1 / mp.sqrt(max(v, least)) for v in values]) * vectors.T
        for row, place in zip(rows, out, strict=True):
            for j, k in enumerate(active):
                if place[k] is not None:
                    place[k] = mp.fsum([row[other] * root[i, j] for i, other in enumerate(active)])
    edges = [0]
    for group in batch:
        edges.append(edges[-1] + len(group))
    return summed([out[a:b] for a, b in pairwise(edges)], w)


def pama(batch: Batch, w: Sequence[Any]) -> Values:
    parts = [[[None if v is None else max(v, mp.mpf(0)) for v in row] for row in group] for group in columns(batch, z)]
    ratios = [mean([row[k] for group in parts for row in group]) / weight if weight > 0 else mp.inf for k, weight in enumerate(w)]
    first = [ratio <= min(ratios) * (1 + mp.mpf("1e-12")) for ratio in ratios]
    return [
        [mp.fsum([v for v, one in zip(row, first, strict=True) if one and v is not None]) / sum(first) for row in group] for group in parts
    ]


FORMULA, OURS, NUMBER = "the source's formula", "ours", "published number"
LEARNER = {"baseline": "group_mean", "normalize": "none", "at": "reward"}
RULES: dict[str, dict[str, Any]] = {
    "grpo": {
        "formula": "r = sum_k w_k r_k; A = (r - mean_group r) / (std_group r + eps)",
        "source": "GRPO (2402.03300), section 4.1.2, outcome supervision, on a weighted sum; TRL's sum_then_normalize",
        "provenance": FORMULA,
        "settings": {"aggregation": {"name": "grpo"}},
    },
    "grpo_batch": {
        "formula": "A = (r - mean_group r) / (std_batch r + eps)",
        "source": "TRL's GRPO with scale_rewards = batch",
        "provenance": FORMULA,
        "settings": {**LEARNER, "normalize": "batch_returns"},
    },
    "dr_grpo": {
        "formula": "A = r - mean_group r",
        "source": "Dr. GRPO (2503.20783), without the spread",
        "provenance": FORMULA,
        "settings": LEARNER,
    },
    "rloo": {
        "formula": "A_i = r_i - mean_{j != i} r_j",
        "source": "RLOO (2402.14740), the leave-one-out baseline",
        "provenance": FORMULA,
        "settings": {**LEARNER, "baseline": "leave_one_out"},
    },
    "rloo_batch": {
        "formula": "A_i = (r_i - mean_{j != i} r_j) / (std_batch of the same + eps)",
        "source": "TRL's RLOO with normalize_advantages",
        "provenance": FORMULA,
        "settings": {**LEARNER, "baseline": "leave_one_out", "normalize": "batch"},
    },
    "mo_grpo": {
        "formula": "A = sum_k w_k (r_k - mean_group r_k) / (std_group r_k + eps)",
        "source": "MO-GRPO (2509.22047), its abstract and how papers that build on it state the rule; the equation was not at hand",
        "provenance": OURS,
        "experimental": True,
        "settings": {"aggregation": {"name": "mo_grpo"}},
    },
    "gdpo": {
        "formula": "a = sum_k w_k (r_k - mean_group r_k) / (std_group r_k + eps); A = (a - mean_batch a) / (std_batch a + eps)",
        "source": "GDPO (2601.05242), equations 4 to 6; TRL's normalize_then_sum",
        "provenance": FORMULA,
        "settings": {"aggregation": {"name": "gdpo"}},
    },
    "gd2po": {
        "formula": "a_k = w_k z_group(r_k); drop where signs differ; A = z_batch(kept share of the group * sum_k a_k), 0 where dropped",
        "source": "GD2PO (2606.16771), hard form; whitened by response instead of by token",
        "provenance": FORMULA,
        "settings": {"aggregation": {"name": "gd2po"}},
    },
    "gd2po_snr": {
        "formula": "the same; drop where signs differ and |sum_k a_k| < 0.2 sum_k |a_k|",
        "source": "GD2PO (2606.16771), SNR form; whitened by response instead of by token",
        "provenance": FORMULA,
        "settings": {"aggregation": {"name": "gd2po", "form": "snr", "tau": 0.2}},
    },
    "dvao": {
        "formula": "A = sum_k w_k (r_k - mean_group r_k) / (sum_k w_k std_group r_k + eps)",
        "source": "DVAO (2605.25604): its abstract alone was at hand; the form is one that agrees with it",
        "provenance": OURS,
        "experimental": True,
        "settings": {"aggregation": {"name": "dvao"}},
    },
    "rdpo": {
        "formula": "s_k = normal quantile of r_k's middle rank in its group; A = sum_k w_k (C^(-1/2) s)_k, C the batch's mean of s s'",
        "source": "RDPO (2605.13641): its abstract alone was at hand; magnitude-awareness is left out",
        "provenance": OURS,
        "experimental": True,
        "settings": {"aggregation": {"name": "rdpo"}},
    },
    "pama": {
        "formula": "A = max(z_group(r_k), 0) of the k with the smallest batch mean of it over w_k",
        "source": "PAMA (2508.07768): the weights are its, what each response keeps is ours",
        "provenance": OURS,
        "experimental": True,
        "settings": {"aggregation": {"name": "pama"}},
    },
}
FUNCTIONS: dict[str, Callable[..., Values]] = {
    "grpo": grpo,
    "grpo_batch": grpo_batch,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "rloo_batch": rloo_batch,
    "mo_grpo": mo_grpo,
    "gdpo": gdpo,
    "gd2po": gd2po,
    "gd2po_snr": lambda batch, w: gd2po(batch, w, tau=mp.mpf("0.2")),
    "dvao": dvao,
    "rdpo": rdpo,
    "pama": pama,
}
# name, why, rows, size of a group, weights; what of it a source printed: rule -> numbers
CASES: list[tuple[str, str, list[list[Any]], int, list[float], dict[str, list[float]]]] = [
    (
        "published-pair",
        "Group one gains one of two rewards, group two both. Summing first sees no difference between the groups.",
        [[0, 0], [0, 1], [0, 0], [1, 1]],
        2,
        [1, 1],
        {"gdpo": [-0.548, 0.548, -1.095, 1.095], "grpo": [-0.707, 0.707, -0.707, 0.707]},
    ),
    ("by-hand", "Every combination of two binary rewards, in one group.", [[0, 0], [0, 1], [1, 0], [1, 1]], 4, [0.75, 0.25], {}),
    (
        "three-rewards",
        "Three rewards of unlike spread, two groups.",
        [[1, 0.2, 5], [0, 0.9, 3], [1, 0.4, 1], [0, 0.1, 2], [1, 0.7, 4], [1, 0.3, 9], [0, 0.8, 2], [1, 0.6, 7]],
        4,
        [0.5, 0.3, 0.2],
        {},
    ),
    (
        "constant-objective",
        "One reward is the same for all: it must add nothing, not a division by zero.",
        [[1, 0], [1, 1], [1, 3], [1, 2]],
        4,
        [0.5, 0.5],
        {},
    ),
    ("all-equal", "Nothing differs within a group: every advantage is 0.", [[2, 3], [2, 3], [1, 4], [1, 4]], 2, [0.5, 0.5], {}),
    ("single-sample-group", "A group of one has nothing to be compared with.", [[1, 0], [0, 1], [3, 2]], 1, [0.5, 0.5], {}),
    (
        "huge-scale",
        "One reward is a million times the other.",
        [[1e6, 0], [2e6, 1], [3e6, 0], [5e6, 1]],
        4,
        [0.5, 0.5],
        {},
    ),
    ("zero-weight", "A reward without weight must not matter.", [[0, 9], [1, -4], [0, 2], [3, 7]], 4, [1, 0], {}),
    (
        "defect-nan-poisons-the-group",
        "One unscored entry. Where means and spreads pass it on, all advantages are NaN and nothing is learned, without a word.",
        [[0, 1], [1, None], [0, 0], [1, 1], [1, 0], [0, 1], [1, 1], [0, 0]],
        4,
        [0.5, 0.5],
        {},
    ),
    (
        "defect-unscored-counts-as-zero",
        "One response has no score at all. Where a sum that skips NaN makes 0 of it, it pulls its group's mean and spread.",
        [[3, 4], [None, None], [5, 4], [4, 6]],
        4,
        [0.5, 0.5],
        {},
    ),
    (
        "defect-unscored-objective",
        "An objective that is unscored in one whole group.",
        [[0, None], [1, None], [0, 1], [1, 3]], 2, [0.5, 0.5], {}),
    (
        "defect-dropped-on-the-sum",
        "All sums are equal while the rewards differ. A filter on the spread of the sum throws the first group away.",
        [[0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1]],
        4,
        [1, 1, 1],
        {},
    ),
    (
        "defect-4000-fold",
        "Seven equal rewards and one other. A spread taken without the odd one is rounding alone, and dividing by it gives thousands.",
        [*[[0.35, 1]] * 7, [-0.25, 1]],
        8,
        [0.5, 0.5],
        {},
    ),
    (
        "defect-spread-of-rounding",
        "A reward that is constant up to the rounding of float32. With a small eps its z-scores are as large as those of any other.",
        [[0.3499999940395355, 0], [0.3500000238418579, 1], [0.3499999940395355, 1], [0.3500000238418579, 0]],
        4,
        [0.5, 0.5],
        {},
    ),
]  # fmt: skip


def made() -> dict[str, Any]:
    cases = []
    for name, why, rows, size, w, printed in CASES:
        exact = [[None if v is None else mp.mpf(v) for v in row] for row in rows]
        batch = [exact[i : i + size] for i in range(0, len(exact), size)]
        expected = {}
        for rule, function in FUNCTIONS.items():
            said = RULES[rule]["provenance"]
            if rule in printed:
                said = NUMBER
            elif any(None in row for row in rows) and rule != "gdpo":
                said = OURS  # sources do not say what an unscored reward is
            values = [float(v or 0) for v in flat(function(batch, [mp.mpf(v) for v in w]))]
            expected[rule] = {"advantages": values, "provenance": said, **({"printed": printed[rule]} if rule in printed else {})}
        cases.append({"name": name, "why": why, "group": size, "weights": w, "rewards": rows, "expected": expected})
    about = "Advantages of multi-reward RL: rows stand group by group, null is unscored, spreads have n - 1, eps is added to each spread."
    return {"about": about, "eps": float(EPS), "rules": RULES, "cases": cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    text = json.dumps(made(), indent=1) + "\n"
    if not parser.parse_args().check:
        OUT.write_text(text, encoding="utf-8")
    elif not OUT.is_file() or OUT.read_text(encoding="utf-8") != text:
        sys.exit(f"{OUT.name} differs from what tools/golden.py makes")


if __name__ == "__main__":
    main()

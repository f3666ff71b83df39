"""What the numbers say, in sentences made from them: what holds up, whether the expected order appears, what hides what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from paretune.report.comparison import baselines, comparison_table, estimate_of, groups, pair_table
from paretune.report.data import PROMPTS, Results, Setting
from paretune.report.tables import CEILING, Column, glance_table, headline, leaderboard, loss_table, minus

__all__ = ["findings"]

FAR = 0.1  # attainments closer than this are not "far apart"


def findings(results: Results) -> list[str]:
    """Sentences about exact tasks, most important first; none about what was not measured. Numbers are the headline's unless they say."""
    exact = {s.label for s in results.settings if s.exact}
    rows = [row for row in leaderboard(results).rows if row["method"] != CEILING and row["setting"] in exact]
    board = [{**row, "worst": worst} for row in rows if (worst := headline(row)) is not None]
    if not board:
        return []
    sentences = [
        _best(results),
        *_sweep(results),
        *_levels(results),
        *_order(results, board),
        *_same(results),
        *_hidden(board),
        *_generalizes(board),
    ]
    return [s for s in sentences if s]


def _best(results: Results) -> str:
    rows = [row for row in glance_table(results).rows if row["category"] != "baseline"]
    if not rows:
        return ""
    first, settings = rows[0], [s for s in results.settings if s.exact]
    where = min(settings, key=lambda setting: first.get(setting.label, np.inf))
    text = f"{first['method']} holds up best: its worst attainment on {PROMPTS[where.headline]} is {_n(first['worst'])}"
    return text + (f", at {where.label}." if len(settings) > 1 else ".")


def _sweep(results: Results) -> list[str]:
    """Who beats the linear sweep on the same task seeds, and does a single policy at its cost? Only where intervals can tell."""
    group = next((g for g in groups(results) if g.exact and g.parts), next((g for g in groups(results) if g.exact), None))
    if group is None or "linear" not in [group.of(label)[0].record["method"]["name"] for label in baselines(group)]:
        return []
    linear = baselines(group)[0]
    rows = [
        (row["method"], row["seeds"], estimate_of(row, "difference_worst"))
        for row in pair_table(results).rows
        if (row["setting"], row["prompts"], row["against"]) == (group.label, group.headline, linear)
    ]
    told = {label: (n, ahead) for label, n, ahead in rows if results.families[label] != "baseline" and ahead and np.isfinite(ahead.low)}
    if not told:
        return []
    best = max(told, key=lambda label: told[label][1].value)
    better = [label for label, (_, ahead) in told.items() if ahead.low > 0]
    on = f"than {linear} on the same {told[best][0]} task seeds ({group.label}, {PROMPTS[group.headline]})"
    text = Column("", "", "change").show(told[best][1])
    count = f"{len(better)} of {len(told)} methods {'has' if len(better) == 1 else 'have'}"
    said = [f"{count} a higher worst attainment {on}, most of all {best}: {text}."]
    if not better:
        said = [f"No method has a surely higher worst attainment {on}; nearest is {best}: {text}."]
    return [*said, *_single(results, group, linear, set(better))]


def _single(results: Results, group: Setting, linear: str, better: set[str]) -> list[str]:
    """Does any single-policy method beat the linear sweep for no more samples (or tokens, where none were drawn)?"""
    table = comparison_table(results).rows
    rows = {row["method"]: row for row in table if (row["setting"], row["prompts"]) == (group.label, group.headline)}
    unit = "samples" if rows[linear]["samples_total"] else "tokens"
    alike = [
        label
        for label, row in rows.items()
        if row["category"] == "single-policy" and label != linear and row[f"{unit}_total"] <= 1.01 * rows[linear][f"{unit}_total"]
    ]
    if not alike:
        return []
    won = [label for label in alike if label in better]
    many = len(alike) > 1
    which = f"{len(alike)} single-policy method{'s' if many else ''} that need{'' if many else 's'} no more {unit} than {linear}"
    if not won:
        return [f"Of the {which}, none is surely better."]
    return [f"Of the {which}, {len(won)} {'is' if len(won) == 1 else 'are'} surely better: {', '.join(won)}."]


def _levels(results: Results) -> list[str]:
    """Where the level at which the same experts are combined matters most, and where least; over several task seeds only."""
    mixings = {str(c.record["method"]["mixing"]): c.label for c in results.cells if c.record["method"]["name"] == "experts"}
    worst: dict[str, dict[str, float]] = {}
    wanted = {group.label: group.headline for group in groups(results) if group.exact and not group.parts}
    for row in comparison_table(results).rows:
        if row["method"] in mixings.values() and wanted.get(row["setting"]) == row["prompts"]:
            worst.setdefault(row["setting"], {})[row["method"]] = row["worst_iqm"]
    spread = {place: max(found.values()) - min(found.values()) for place, found in worst.items() if len(found) > 1}
    if not spread:
        return []
    most, least = max(spread, key=lambda place: spread[place]), min(spread, key=lambda place: spread[place])
    low, high = (pick(worst[most], key=lambda label: worst[most][label]) for pick in (min, max))
    text = (
        f"The level of combination matters most at {most}: the worst attainment (IQM) of the same experts goes from {_n(worst[most][low])} "
        f"({low}) to {_n(worst[most][high])} ({high})"
    )
    return [f"{text}; it matters least at {least}, where the levels differ by {_n(spread[least])}." if least != most else f"{text}."]


def _order(results: Results, board: list[dict[str, Any]]) -> list[str]:
    """Is the soup far below logit mixing where objectives conflict most? If not, say why."""
    soup, logit = (_labels(results, mixing) for mixing in ("parameter", "logit"))
    settings = [s for s in results.settings if s.exact and soup in s.labels and logit in s.labels]
    if soup is None or logit is None or not settings:
        return []
    setting = settings[-1]
    worst = {row["method"]: row["worst"] for row in board if row["setting"] == setting.label}
    on = PROMPTS[setting.headline]
    if worst[logit] - worst[soup] >= FAR:
        return [
            f"The expected order appears at {setting.label}: on {on} the soup of parameters falls to {_n(worst[soup])} at its worst "
            f"preference, mixing logits of the same experts keeps {_n(worst[logit])}."
        ]
    return [
        f"The expected order does not appear at {setting.label}: on {on} the soup of parameters has {_n(worst[soup])} at its worst "
        f"preference, mixing logits of the same experts {_n(worst[logit])}. {_why(results, setting, logit)}"
    ]


def _why(results: Results, setting: Setting, logit: str) -> str:
    rows = {row["method"]: row for row in loss_table(results).rows if row["setting"] == setting.label}
    parts = rows.get(logit)
    if parts is None or parts["composition"] is None:
        return "The loss cannot be split here."
    learning, composition = parts["learning"], parts["composition"]
    text = f"On average logit mixing loses {_n(learning)} against optimal experts mixed alike, and {_n(composition)} by composition"
    if learning > composition:
        return text + ": the experts are too weak for the way of combining them to matter; train them longer."
    if composition < FAR:
        return text + ": these objectives conflict too little for combination to be hard."
    return text + ": experts that moved little from the reference stay where a soup of them is nearly linear; look at their KL."


def _same(results: Results) -> list[str]:
    """Hidden states under one shared linear head are logit mixing: say so where the numbers do."""
    hidden, logit = _labels(results, "hidden"), _labels(results, "logit")
    gaps = []
    for setting in results.settings:
        if hidden in setting.labels and logit in setting.labels and setting.exact:
            one, other = (setting.qualities(str(label), setting.headline) for label in (hidden, logit))
            if one.shape == other.shape and np.isfinite(one).any():
                gaps.append(float(np.nanmax(np.abs(one - other))))
    if not gaps or max(gaps) > 1e-3:
        return []
    return [
        f"{hidden} and {logit} are the same policy: their experts share one linear head (attainments agree to {max(1e-6, max(gaps)):.0e})."
    ]


def _hidden(board: list[dict[str, Any]]) -> list[str]:
    """The widest gap between a good hypervolume and a bad worst attainment."""
    rows = [row for row in board if row["hypervolume_share"] is not None and row["category"] != "baseline"]
    if not rows:
        return []
    row = max(rows, key=lambda r: r["hypervolume_share"] - r["worst"])
    share, worst = row["hypervolume_share"], row["worst"]
    if share < 0.5 or share - worst < 0.2:
        return []
    return [
        f"Hypervolume hides failures: {row['method']} keeps {share:.0%} of it at {row['setting']}, on {PROMPTS[row['prompts']]}, with a "
        f"worst attainment of {_n(worst)}."
    ]


def _generalizes(board: list[dict[str, Any]]) -> list[str]:
    """How much attainment is lost from training to test prompts."""
    both = [row for row in board if row["attainment_mean_train"] is not None and row["attainment_mean_test"] is not None]
    rows = [row for row in both if row["category"] != "baseline"]
    if not rows:
        return []
    row = max(rows, key=lambda r: r["attainment_mean_train"] - r["attainment_mean_test"])
    drop = row["attainment_mean_train"] - row["attainment_mean_test"]
    if drop < 0.02:
        return [
            f"Test prompts cost little: no method loses more than {_n(max(drop, 0.0))} of mean attainment against its training prompts."
        ]
    return [
        f"New prompts cost most for {row['method']} at {row['setting']}: mean attainment {_n(row['attainment_mean_train'])} on training "
        f"prompts, {_n(row['attainment_mean_test'])} on test prompts."
    ]


def _labels(results: Results, mixing: str) -> str | None:
    def is_it(method: Mapping[str, Any]) -> bool:
        return method["name"] == "experts" and method.get("mixing") == mixing

    found = [cell.label for cell in results.cells if is_it(cell.record["method"])]
    return found[0] if found else None


def _n(value: float) -> str:
    return minus(f"{value:.2f}")

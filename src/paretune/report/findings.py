"""What the numbers say, in sentences made from them: what holds up, whether the expected order appears, what hides what."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np

from paretune.report.comparison import baselines, comparison_table, groups, on_headline, pair_table
from paretune.report.data import PROMPTS, Results, Setting
from paretune.report.tables import CEILING, glance_table, headline, leaderboard, loss_table, minus, signed

__all__ = ["findings"]

FAR = 0.1  # attainments closer than this are not "far apart"


def findings(results: Results) -> list[str]:
    """Sentences, most important first: about exact tasks, gains elsewhere, guards that were lost, and what was said while methods trained.

    None about what was not measured. Numbers are the headline's unless they say.
    """
    exact = {s.label for s in results.settings if s.exact}
    rows = [row for row in leaderboard(results).rows if row["method"] != CEILING and row["setting"] in exact]
    board = [{**row, "worst": worst} for row in rows if (worst := headline(row)) is not None]
    contest = [row for row in board if row["category"] != "baseline"]
    seen = [*_gains(results), *_guards(results), *_warned(results)]
    if not board:
        return seen
    sentences = [_best(results), *_sweep(results), _levels(results), _order(results, board), _same(results)]
    found = [*sentences, _hidden(contest), _generalizes(contest), *_known(results), *seen]
    return [sentence for sentence in found if sentence]


def _best(results: Results) -> str:
    """Of the methods that have every setting and seed: a minimum over fewer is no smaller for being better."""
    rows = [row for row in glance_table(results).rows if row["category"] != "baseline"]
    if not rows:
        return ""
    settings = [s for s in results.settings if s.exact]
    counts = {row["method"]: sum(map(len, _known_seeds(settings, row["method"]))) for row in rows}
    whole = [row for row in rows if counts[row["method"]] == max(counts.values())]
    first = whole[0]
    where = min(settings, key=lambda setting: first.get(setting.label, np.inf))
    text = f"{first['method']} holds up best: its worst attainment on {PROMPTS[where.headline]} is {_n(first['worst'])}"
    text += f", at {where.label}" * (len(settings) > 1)
    return text + ("; methods that lack a setting or a seed are not compared." if len(whole) < len(rows) else ".")


def _known_seeds(settings: list[Setting], label: str) -> list[set[str]]:
    """The seeds of each setting at which a method's worst attainment is known."""
    return [{c.unit for c in s.of(label) if c.summary(s.headline, "worst", "attainment") is not None} for s in settings]


def _known(results: Results) -> list[str]:
    """What the frozen head allows at the worst preference, and what the training prompts tell of the test prompts."""
    said = []
    for setting in results.settings:
        lines, at = {split: setting.known(split) for split in setting.splits}, f" at {setting.label}" * (len(results.settings) > 1)
        heads = {split: float(found["representable"].min()) for split, found in lines.items() if "representable" in found}
        lowest = min(heads, key=lambda split: heads[split], default="")
        if heads and heads[lowest] < 0.998:
            most = f"{heads[lowest]:.3f} at the worst preference on {PROMPTS[lowest]}"
            said.append(f"With the frozen head no policy attains more than {most}{at}.")
        test = lines.get("test", {})
        if "blind" in test:
            text = f"On test prompts{at} what is best without the prompt attains {_n(test['blind'].min())} at the worst preference"
            more = f"; what the training prompts' rewards tell allows {_n(test['posterior'].min())}" if "posterior" in test else ""
            said.append(f"{text}{more}.")
    return said


def _gains(results: Results) -> list[str]:
    """Which method gains most at its worst preference where the optimum is not known, and whether there are enough responses to tell."""
    settings = [setting for setting in results.settings if not setting.exact]
    worst: dict[str, dict[str, Any]] = {}
    for label, family in results.families.items():
        each = [cell.measured(s.headline, "gain", "per_preference") or () for s in settings for cell in s.of(label)]
        known = [found for found in chain(*each) if found["value"] is not None]
        if family != "baseline" and known and all(label in setting.labels for setting in settings):
            worst[label] = min(known, key=lambda found: found["value"])
    if not worst:
        return []
    label = max(worst, key=lambda label: worst[label]["value"])
    found, on = worst[label], PROMPTS[settings[0].headline]
    gain = signed(found["value"])
    if found["low"] is None:
        return [f"{label} gains most at its worst preference: {gain} in utility over the untrained model, on {on}."]
    gain = f"{gain} [{signed(found['low'])}, {signed(found['high'])}]"
    if found["low"] > 0:
        return [f"{label} gains most at its worst preference: {gain} in utility over the untrained model, on {on}."]
    if found["high"] < 0:
        return [f"No method gains at every preference: at its worst one, the best of them, {label}, is at {gain} in utility, on {on}."]
    return [
        f"Too few responses to tell whether a method gains at every preference: {label}, the best, is at {gain} at its worst one, on {on}."
    ]


def _sweep(results: Results) -> list[str]:
    """Who beats the linear sweep on the same task seeds, and does a single policy at its cost? Only where intervals can tell."""
    group = next((g for g in groups(results) if g.exact), None)  # all settings together come first
    if group is None or "linear" not in [group.of(label)[0].record["method"]["name"] for label in baselines(group)]:
        return []
    linear = baselines(group)[0]
    pairs = [row for row in on_headline(pair_table(results), [group]) if row["against"] == linear]
    contest = [row for row in pairs if results.families[row["method"]] != "baseline"]
    told = {row["method"]: row for row in contest if row["difference_worst_low"] is not None}
    if not told:
        return []
    best = max(told, key=lambda label: told[label]["difference_worst"])
    better = [label for label, row in told.items() if row["difference_worst_low"] > 0]
    on = f"than {linear} on the same {told[best]['seeds']} seeds ({group.label}, {PROMPTS[group.headline]})"
    ends = [signed(told[best][f"difference_worst{end}"]) for end in ("", "_low", "_high")]
    text = f"{best}: {ends[0]} [{ends[1]}, {ends[2]}]."
    said = f"No method has a surely higher worst attainment {on}; nearest is {text}"
    if better:
        count = f"{len(better)} of {len(told)} methods {'has' if len(better) == 1 else 'have'}"
        said = f"{count} a higher worst attainment {on}, most of all {text}"
    return [said, _single(on_headline(comparison_table(results), [group]), linear, better)]


def _single(board: list[dict[str, Any]], linear: str, better: list[str]) -> str:
    """Does any single-policy method beat the linear sweep for no more samples (or tokens, where none were drawn)?"""
    rows = {row["method"]: row for row in board}
    unit = "samples" if rows[linear]["samples_total"] else "tokens"
    most = 1.01 * rows[linear][f"{unit}_total"]
    alike = [x for x, row in rows.items() if row["category"] == "single-policy" and x != linear and row[f"{unit}_total"] <= most]
    if not alike:
        return ""
    won, s, needs = [label for label in alike if label in better], "s" * (len(alike) > 1), "need" + "s" * (len(alike) == 1)
    which = f"Of the {len(alike)} single-policy method{s} that {needs} no more {unit} than {linear}"
    ahead = f"{len(won)} {'is' if len(won) == 1 else 'are'} surely better: {', '.join(won)}" if won else "none is surely better"
    return f"{which}, {ahead}."


def _levels(results: Results) -> str:
    """Where the level at which the same experts are combined matters most, and where least; over several task seeds only."""
    mixings = {str(c.record["method"]["mixing"]): c.label for c in results.cells if c.record["method"]["name"] == "experts"}
    worst: dict[str, dict[str, float]] = {}
    for row in on_headline(comparison_table(results), [group for group in groups(results) if group.exact and not group.parts]):
        if row["method"] in mixings.values():
            worst.setdefault(row["setting"], {})[row["method"]] = row["worst_iqm"]
    spread = {place: max(found.values()) - min(found.values()) for place, found in worst.items() if len(found) > 1}
    if not spread:
        return ""
    most, least = max(spread, key=lambda place: spread[place]), min(spread, key=lambda place: spread[place])
    (low, bad), (high, good) = (pick(worst[most].items(), key=lambda item: item[1]) for pick in (min, max))
    start = f"The level of combination matters most at {most}: the worst attainment (IQM) of the same experts"
    text = f"{start} goes from {_n(bad)} ({low}) to {_n(good)} ({high})"
    return f"{text}; it matters least at {least}, where the levels differ by {_n(spread[least])}." if least != most else f"{text}."


def _order(results: Results, board: list[dict[str, Any]]) -> str:
    """Is the soup far below logit mixing where objectives conflict most? If not, say why."""
    soup, logit = _label(results, "parameter"), _label(results, "logit")
    known = {(row["setting"], row["method"]): row["worst"] for row in board}
    settings = [s for s in results.settings if {(s.label, soup), (s.label, logit)} <= set(known)]
    if not settings:
        return ""
    setting = settings[-1]
    worst = {method: known[setting.label, method] for method in (soup, logit)}
    far = worst[logit] - worst[soup] >= FAR
    return (
        f"The expected order {'appears' if far else 'does not appear'} at {setting.label}: on {PROMPTS[setting.headline]} the soup of "
        f"parameters {'falls to' if far else 'has'} {_n(worst[soup])} at its worst preference, mixing logits of the same experts "
        f"{'keeps ' if far else ''}{_n(worst[logit])}." + ("" if far else f" {_why(results, setting, logit)}")
    )


def _why(results: Results, setting: Setting, logit: str) -> str:
    parts = next((row for row in loss_table(results).rows if (row["setting"], row["method"]) == (setting.label, logit)), None)
    if parts is None or parts["composition"] is None:
        return "The loss cannot be split here."
    learning, composition = parts["learning"], parts["composition"]
    text = f"On average logit mixing loses {_n(learning)} against optimal experts mixed alike, and {_n(composition)} by composition"
    if learning > composition:
        return text + ": the experts are too weak for the way of combining them to matter; train them longer."
    if composition < FAR:
        return text + ": these objectives conflict too little for combination to be hard."
    return text + ": experts that moved little from the reference stay where a soup of them is nearly linear; look at their KL."


def _same(results: Results) -> str:
    """Hidden states under one shared linear head are logit mixing: say so where the numbers do."""
    hidden, logit = _label(results, "hidden"), _label(results, "logit")
    gaps = []
    for setting in results.settings:
        if hidden in setting.labels and logit in setting.labels and setting.exact:
            one, other = (setting.qualities(label, setting.headline) for label in (hidden, logit))
            if one.shape == other.shape and np.isfinite(one).any():
                gaps.append(float(np.nanmax(np.abs(one - other))))
    if not gaps or max(gaps) > 1e-3:
        return ""
    agree = f"{max(1e-6, max(gaps)):.0e}"
    return f"{hidden} and {logit} are the same policy: their experts share one linear head (attainments agree to {agree})."


def _hidden(contest: list[dict[str, Any]]) -> str:
    """The widest gap between a good hypervolume and a bad worst attainment."""
    rows = [row for row in contest if row["hypervolume_share"] is not None and row["hypervolume_share"] >= 0.5]
    gaps = [row["hypervolume_share"] - row["worst"] for row in rows]
    if max(gaps, default=0.0) < 0.2:
        return ""
    row = rows[gaps.index(max(gaps))]
    share = row["hypervolume_share"]
    where = f"{row['method']} keeps {share:.0%} of it at {row['setting']}, on {PROMPTS[row['prompts']]}"
    return f"Hypervolume hides failures: {where}, with a worst attainment of {_n(row['worst'])}."


def _generalizes(contest: list[dict[str, Any]]) -> str:
    """How much attainment is lost from training to test prompts."""
    means = [(row, row["attainment_mean_train"], row["attainment_mean_test"]) for row in contest]
    known = [found for found in means if found[1] is not None and found[2] is not None]
    if not known:
        return ""
    row, train, test = max(known, key=lambda found: found[1] - found[2])
    if train - test < 0.02:
        lost = _n(max(train - test, 0.0))
        return f"Test prompts cost little: no method loses more than {lost} of mean attainment against its training prompts."
    where = f"{row['method']} at {row['setting']}"
    return f"New prompts cost most for {where}: mean attainment {_n(train)} on training prompts, {_n(test)} on test prompts."


def _guards(results: Results) -> list[str]:
    """The guards that a method surely lost, at the preference where it lost most."""
    lost: dict[tuple[str, str], tuple[float, str]] = {}
    for cell in results.cells:
        names = cell.record["metrics"]["objectives"]
        for name, guard in (cell.measured("test", "guards") or {}).items():
            for w_M, mean, change in zip(cell.w_WM, guard["per_preference"], guard["change"]["per_preference"], strict=True):
                if change["high"] is None or change["high"] >= 0 or change["value"] >= lost.get((cell.label, name), (0.0,))[0]:
                    continue
                at = ", ".join(f"{objective} {w:.2g}" for objective, w in zip(names, w_M, strict=True))
                text = f"{cell.label} lowers the guard {name} from {_n(guard['reference'])} to {_n(mean)} at {at} (test prompts)."
                lost[cell.label, name] = (change["value"], text)
    return [text for _, text in lost.values()]


def _warned(results: Results) -> list[str]:
    """What was said while methods trained, each kind once for a method, with how many of its cells said so."""
    told: dict[tuple[str, str], tuple[str, int]] = {}
    for cell in results.cells:
        for kind, text in cell.record.get("warnings", {}).items():
            first, count = told.get((cell.label, kind), (text, 0))
            told[cell.label, kind] = (first, count + 1)
    many = Counter(cell.label for cell in results.cells)
    return [f"While {label} trained ({count} of {many[label]} cells): {text}." for (label, _), (text, count) in told.items()]


def _label(results: Results, mixing: str) -> str:
    methods = ((cell.label, cell.record["method"]) for cell in results.cells)
    return next((label for label, method in methods if method["name"] == "experts" and method.get("mixing") == mixing), "")


def _n(value: float) -> str:
    return minus(f"{value:.2f}")

"""What is worth saying about a training while it runs: warnings in words, made of its log and of its looks at validation prompts.

Each kind is said once in a training. All of it is arithmetic on records, so that a finished training can be asked again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paretune.files import disk_errors
from paretune.tasks.base import Task
from paretune.training.cost import LOG
from paretune.types import Objectives

__all__ = ["ACT_EVERY", "KL_ROSE", "as_record", "guard_slack", "guarded", "named_means", "read_warnings", "unsaid", "warnings_of"]

KL_ROSE = "kl rose"
ACT_EVERY = 3  # records between two cuts of the learning rate
CUT, RESPONSES = 0.5, 64  # so many of that many responses at least
EQUAL, GROUPS = 0.9, 40
NATS = 0.5  # by which the KL rises without a reward for it
GUARD = 0.05  # of its range, by which a guard falls
SURE = 1.645  # standard errors: what is below has a chance of 5 %

Records = Sequence[Mapping[str, Any]]


def named_means(objectives: Objectives, scores_NM: np.ndarray) -> dict[str, float | None]:
    """Name -> mean of what was scored; None where nothing was."""
    known_M = (~np.isnan(scores_NM)).sum(0)
    means_M = np.nansum(scores_NM, axis=0) / np.maximum(known_M, 1)
    return {name: float(mean) if known else None for name, mean, known in zip(objectives.names, means_M, known_M, strict=True)}


def guarded(guards: Objectives, scores_NG: np.ndarray, first: list[list[float | None]], prompts: Sequence[str]) -> dict[str, Any]:
    """`guards`, their means, and `change`: by how much each differs from `first`, [mean, standard error] of paired differences.

    `first` are the untrained model's scores of the same `prompts`, one name per response; the scores themselves where it is empty, and
    then it is filled. Responses to one prompt change together, so that the error is that of the means of prompts.
    """
    if not first:
        first.extend(as_record(scores_NG))
    change_NG = scores_NG - np.array(first, dtype=np.float64)
    of_N = np.unique(prompts, return_inverse=True)[1]
    change = {}
    for name, change_N in zip(guards.names, change_NG.T, strict=True):
        known = np.isfinite(change_N)
        count_P = np.bincount(of_N[known])
        mean_P = (np.bincount(of_N[known], change_N[known]) / np.maximum(count_P, 1))[count_P > 0]
        if len(mean_P) > 1:
            change[name] = [float(mean_P.mean()), float(mean_P.std(ddof=1) / np.sqrt(len(mean_P)))]
    return {"guards": named_means(guards, scores_NG), "change": change}


def as_record(scores_NG: np.ndarray) -> list[list[float | None]]:
    """Scores as JSON has them: None for what was not scored."""
    return [[None if np.isnan(x) else float(x) for x in row] for row in scores_NG]


def guard_slack(look: Mapping[str, Any], guards: Objectives | None, drop: float | None, *, sure: bool = True) -> float:
    """By how much, in shares of its range, the guard that lost most may yet fall until it has lost `drop`; below 0 where it is beyond.

    What a guard lost is its mean change, and with `sure` the lower end of it at 95 % (one-sided). Inf where nothing is guarded.
    """
    if guards is None or drop is None:
        return np.inf
    ranges = {name: high - low for name, low, high in zip(guards.names, guards.low, guards.high, strict=True)}
    return min((drop + (mean - sure * SURE * error) / ranges[name] for name, (mean, error) in look["change"].items()), default=np.inf)


def warnings_of(records: Records, looks: Records, task: Task, preference: Sequence[float] | None, *, group: int) -> dict[str, str]:
    """Kind -> what is wrong now, what was seen, and what helps. `records` are those of the log, the newest last."""
    names, wanted = task.objectives.names, preference or (1.0,) * task.objectives.count
    if records and "weights" in records[-1] and task.terms is not None and task.terms.schedule is not None:
        wanted = tuple(records[-1]["weights"].values())  # by step, as they are now
    found = {} if task.is_exact else _cut(records, task.max_new_tokens)
    for name, weight in zip(names, wanted, strict=True):
        found |= _equal(records, name, group) if weight > 0 else {}
    weights = np.array(wanted) / sum(wanted)
    return found | _kl_rose(records, names, weights, task.beta) | _guards_fell(looks, task.guards) | _turned_back(looks)


def unsaid(found: Mapping[str, str], records: Records) -> dict[str, Any]:
    """`warnings`, of the kinds that no earlier record has; {} where there are none."""
    said = {kind for record in records for kind in record.get("warnings", ())}
    new = {kind: text for kind, text in found.items() if kind not in said}
    return {"warnings": new} if new else {}


def read_warnings(folder: Path) -> dict[str, str]:
    """Kind -> text of all that was said while a training ran that left its log in `folder`; {} where there is none."""
    path, found = folder / LOG, dict[str, str]()
    with disk_errors(folder):
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        found |= json.loads(line).get("warnings", {}) if '"warnings"' in line else {}
    return found


def _latest(records: Records, samples: int) -> Records:
    """The last records that hold so many samples; none where there are fewer."""
    for start in range(len(records) - 1, -1, -1):
        if _drawn(records, start, len(records)) >= samples:
            return records[start:]
    return ()


def _drawn(records: Records, start: int, stop: int) -> int:
    """The samples of records[start:stop]."""
    return records[stop - 1]["samples"] - (records[start - 1]["samples"] if start else 0)


def _mean(records: Records, *path: str) -> float:
    values = []
    for record in records:
        value: Any = record
        for name in path:
            value = value[name]
        values.append(np.nan if value is None else value)
    return float(np.mean(values))


def _cut(records: Records, limit: int) -> dict[str, str]:
    latest = _latest(records, RESPONSES)
    if not latest or "cut" not in latest[-1] or (share := _mean(latest, "cut")) <= CUT:
        return {}
    return {
        "cut": f"{share:.0%} of the answers were cut off at max_new_tokens = {limit}: what is scored is half an answer. "
        "Raise max_new_tokens, or ask for shorter answers in the prompt (system:)"
    }


def _equal(records: Records, name: str, group: int) -> dict[str, str]:
    latest = _latest(records, GROUPS * group)
    if not latest or (share := _mean(latest, "equal", name)) < EQUAL:
        return {}
    return {
        f"equal {name}": f"`{name}` was equal in {share:.0%} of the groups: from these nothing is learned of it. "
        "Make its score finer, the groups larger (learner.group), or the prompts such that answers differ"
    }


def _kl_rose(records: Records, names: Sequence[str], weights_M: np.ndarray, beta: float) -> dict[str, str]:
    """Over the last six records: the KL rose by NATS, and what it costs more than the reward gained, which is not above its noise."""
    if len(records) < 6:
        return {}
    names, weights_M = [name for name, weight in zip(names, weights_M, strict=True) if weight], weights_M[weights_M != 0]
    count, (kl, reward, noise) = len(records), ([], [], 0.0)
    for start, stop in ((count - 6, count - 3), (count - 3, count)):
        half = records[start:stop]
        kl.append(_mean(half, "kl"))
        reward.append(float(weights_M @ [_mean(half, "rewards", name) for name in names]))
        spread_M = weights_M * [_mean(half, "spread", name) for name in names]
        noise += float(spread_M @ spread_M) / max(_drawn(records, start, stop), 1)
    rose, gained = kl[1] - kl[0], reward[1] - reward[0]
    if not (rose >= NATS and gained < 2 * np.sqrt(noise) and gained < beta * rose):
        return {}
    steps = records[-1]["step"] - records[-4]["step"]
    return {
        KL_ROSE: f"the KL rose from {kl[0]:.2f} to {kl[1]:.2f} nats in {steps} steps, and the reward did not "
        f"({reward[0]:.3f}, then {reward[1]:.3f}): the learning rate is halved. A smaller lr or step_kl keeps it from happening; "
        "prompts set apart (prompts.validation) let the best policy be kept"
    }


def _turned_back(looks: Records) -> dict[str, str]:
    if not looks or "back_to" not in looks[-1]:
        return {}
    lost = ", ".join(f"`{name}` changed by {mean:.3f}" for name, (mean, _) in looks[-1]["change"].items())
    return {
        "turned back": f"a guard was lost at step {looks[-1]['step']} ({lost} against the untrained model): the training went back to "
        f"the policy of step {looks[-1]['back_to']}, with half the learning rate. A larger guard_drop allows more"
    }


def _guards_fell(looks: Records, guards: Objectives | None) -> dict[str, str]:
    if guards is None or len(looks) < 2 or looks[-1]["utility"] <= looks[0]["utility"]:
        return {}
    found = {}
    for name, low, high in zip(guards.names, guards.low, guards.high, strict=True):
        mean, error = looks[-1]["change"].get(name, (0.0, 0.0))
        if mean < -GUARD * (high - low) and mean + 2 * error < 0:
            now, then = looks[-1]["guards"][name], looks[0]["guards"][name]
            found[f"guard {name}"] = (
                f"`{name}` fell from {then:.3f} to {now:.3f} on validation prompts while utility rose from "
                f"{looks[0]['utility']:.3f} to {looks[-1]['utility']:.3f}: the rewards may be met without what they stand for. "
                f"Read some answers; raise beta, or make `{name}` an objective"
            )
    return found

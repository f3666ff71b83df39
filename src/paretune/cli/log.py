"""`paretune log`: the log of a training as a table with a plot for each figure, while it runs and afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from paretune.cli.common import Json, app, examples, print_json, tell
from paretune.errors import ConfigError, shown
from paretune.types import last_words

__all__ = ["log", "sparkline"]

HEX = re.compile(r"[0-9a-f]{4,20}")
BARS = "▁▂▃▄▅▆▇█"
NARROW = 8  # columns of a plot at least
WIDE = 60
FAILED = "FAILED.json"


@dataclass(frozen=True)
class _Training:
    """One training in a run directory, finished or not."""

    root: Path
    key: str

    @property
    def folder(self) -> Path:
        whole = self.root / "artifacts" / self.key
        return whole if whole.is_dir() else self.root / "artifacts" / f".wip-{self.key}"

    @property
    def state(self) -> str:
        if not self.folder.name.startswith("."):
            return "done"
        return "failed" if (self.folder / FAILED).is_file() else "unfinished"

    @cached_property
    def spec(self) -> Mapping[str, Any]:
        try:
            return json.loads((self.folder / "spec.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    @property
    def label(self) -> str:
        from paretune.runs.jobs import label_in

        job = self.root / "logs" / "jobs" / f"train-{self.key}.json"
        if job.is_file():
            return label_in(job)
        weights = self.spec.get("preference")
        at = "" if weights is None else f" at ({', '.join(f'{w:.3g}' for w in weights)})"
        return f"{self.spec.get('learner', {}).get('name', 'a training')}{at}"

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        from paretune.training.loop.loggers import read_log

        return read_log(self.folder)

    def reward(self) -> list[float | None]:
        """The rewards at the training's preference, or all alike, line by line."""
        found: list[float | None] = []
        for record in self.records:
            values = list(record.get("rewards", {}).values())
            w_M = self.spec.get("preference") or [1 / max(len(values), 1)] * len(values)
            known = len(w_M) == len(values) and None not in values
            found.append(float(np.dot(w_M, values)) if known else None)
        return found


@app.command(**examples("paretune log runs/families/bridge-1a2b3c4d", "paretune log runs 3f9c --responses"))
def log(
    target: Annotated[Path, typer.Argument(help="A run directory, a family, a training's folder, or its key.", metavar="RUN|FAMILY|KEY")],
    key: Annotated[str | None, typer.Argument(help="Which training of several: the first digits of its key.")] = None,
    responses: Annotated[bool, typer.Option("--responses", help="Also print the responses to fixed prompts, first and last.")] = False,
    as_json: Json = False,
) -> None:
    """Print and plot the log of a training, running or finished; of several, list them."""
    found = _found(target)
    if key is not None:
        found = _chosen(found, key)
    if len(found) > 1:
        if responses and not as_json:
            rule, remedy = "--responses prints those of one training", "add its key: paretune log RUN KEY --responses"
            raise ConfigError(rule, found=f"{len(found)} trainings", remedy=remedy)
        _list(found, as_json=as_json)
        return
    (one,) = found
    if as_json:
        about = {"key": one.key, "label": one.label, "state": one.state, "folder": str(one.folder)}
        print_json({**about, "records": one.records})
        return
    tell(f"{one.label}\n{one.key}, {one.state}, {_steps(one)}, {one.folder}\n")
    if not one.records:
        tell("its log has no line yet")
        return
    _plot(one.records)
    for kind, text in {kind: text for record in one.records for kind, text in record.get("warnings", {}).items()}.items():
        tell(f"\n{kind}: {text}")
    if kept := one.records[-1].get("kept"):
        tell(f"\nkept: the policy of step {kept['step']}, utility {kept['utility']:.3f} ({kept['utility_at_the_end']:.3f} at the end)")
    if responses:
        _responses(one.records)


def _found(target: Path) -> list[_Training]:
    """The trainings that a target names; ConfigError where it names none."""
    if (target / "family.json").is_file():
        return _of_family(target)
    if (target / "artifacts").is_dir():
        found = list(_in_root(target))
    elif target.is_dir() and target.resolve().parent.name == "artifacts":
        whole = target.resolve()
        found = [_Training(whole.parents[1], whole.name.removeprefix(".wip-"))]
    elif HEX.fullmatch(str(target)) and not target.exists():
        places = [Path(), Path("runs"), *sorted(Path("paretune-runs").glob("*")), *sorted(Path().glob("*/runs"))]
        found = [one for place in places for one in _in_root(place) if one.key.startswith(str(target))]
    else:
        found = []
    if not found:
        raise ConfigError(
            "a log is that of a training: in a run directory, of a family, or named by its key",
            found=f"no training at {shown(str(target))}",
            remedy="give a folder with artifacts/, a family that `paretune fit` wrote, or both: paretune log RUN KEY",
        )
    return found


def _in_root(root: Path) -> Iterator[_Training]:
    """All of a run directory, the newest last."""
    folders = [path for path in (root / "artifacts").glob("*") if path.is_dir() and HEX.fullmatch(path.name.removeprefix(".wip-"))]
    for path in sorted(folders, key=lambda path: path.stat().st_mtime):
        yield _Training(root, path.name.removeprefix(".wip-"))


def _of_family(family: Path) -> list[_Training]:
    from paretune.policy.card import read_card

    root = family.resolve().parents[1]
    trainings = [_Training(root, str(key)) for key in read_card(family)["meta"].get("trainings", ())]
    missing = [one.key for one in trainings if not one.folder.is_dir()]
    if missing or not trainings:
        raise ConfigError(
            "the trainings of a family are in the run directory that it was fitted in",
            found=f"no {root / 'artifacts' / missing[0]}" if missing else f"{family} names no trainings",
            remedy="give that run directory: paretune log RUN",
        )
    return trainings


def _chosen(found: Sequence[_Training], key: str) -> list[_Training]:
    chosen = [one for one in found if one.key.startswith(key)]
    if len(chosen) != 1:
        names = ", ".join(one.key[:8] for one in found[:12])
        raise ConfigError(
            "a key names one training by its first digits", found=f"{shown(key)} is that of {len(chosen)}", remedy=f"one of {names}"
        )
    return chosen


def _list(found: Sequence[_Training], *, as_json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for one in found:
        last = one.records[-1] if one.records else {}
        reward = one.reward()
        row = {"key": one.key[:8], "label": one.label, "state": one.state, "step": last.get("step"), "kl": last.get("kl")}
        rows.append({**row, "reward": reward[-1] if reward else None, "plot": sparkline(reward, 12)})
    if as_json:
        print_json([{**row, "key": one.key, "folder": str(one.folder)} for row, one in zip(rows, found, strict=True)])
        return
    for row in rows:
        tell(f"{row['key']}  {'' if row['reward'] is None else _number(row['reward']):>8}  {row['plot']}".rstrip())
        kl = "" if row["kl"] is None else f", KL {_number(row['kl'])}"
        tell(f"  {row['state']}, step {row['step'] or 0:,}{kl}\n  {row['label']}")
    tell(f"{len(found)} trainings: key and mean reward.\nOne of them: paretune log RUN KEY")


def _steps(one: _Training) -> str:
    if not one.records:
        return "no step yet"
    last = one.records[-1]
    return f"step {last['step']:,}, {last.get('seconds', 0):,.0f} s"


def _plot(records: Sequence[Mapping[str, Any]]) -> None:
    """One row per figure: the first and the last value, the lowest and highest where there is room, and its course."""
    from rich.text import Text

    from paretune.errors import printable
    from paretune.report.terminal import console
    from paretune.training.loop.loggers import figures_of

    lines = [{**figures_of(record), **_looked(record)} for record in records]
    names = [name for name in dict.fromkeys(name for line in lines for name in line) if name not in ("seconds", "samples", "tokens")]
    courses = {name: [line.get(name) for line in lines] for name in names}
    to = console()
    numbers = ("first", "lowest", "highest", "last") if to.width >= 90 else ("first", "last")
    wide = min(max(map(len, names)), max(10, to.width - len(numbers) * 9 - NARROW - 2))
    room = max(NARROW, min(WIDE, to.width - wide - len(numbers) * 9 - 2))
    to.print(Text(f"{'figure':{wide}}" + "".join(f"{name:>9}" for name in numbers) + f"  {'course':{room}}".rstrip(), style="bold"))
    for name, course in courses.items():
        known = [value for value in course if value is not None and np.isfinite(value)]
        if not known:
            continue
        told = {"first": known[0], "lowest": min(known), "highest": max(known), "last": known[-1]}
        short = name if len(name) <= wide else f"…{name[1 - wide :]}" if "/" in name else f"{name[: wide - 1]}…"
        to.print(Text(f"{printable(short):{wide}}" + "".join(f"{_number(told[n]):>9}" for n in numbers) + f"  {sparkline(course, room)}"))


def _looked(record: Mapping[str, Any]) -> dict[str, float]:
    """The newest look at validation prompts of a record."""
    from paretune.training.loop.loggers import figures_of

    looks = record.get("looks") or [{}]
    return figures_of({"look": {name: value for name, value in looks[-1].items() if name != "step"}})


def _number(value: float) -> str:
    """At most eight characters."""
    if abs(value) < 1e-99:
        return "0"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 else f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.1e}"


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A figure in at most `width` characters: means over equal parts, from the lowest to the highest; a space where unknown."""
    known = np.array([np.nan if value is None else value for value in values], dtype=float)
    known[~np.isfinite(known)] = np.nan
    parts = [part[~np.isnan(part)] for part in np.array_split(known, min(width, max(len(known), 1)))]
    means = [part.mean() if len(part) else None for part in parts]
    seen = [mean for mean in means if mean is not None]
    if not seen:
        return ""
    low, high = min(seen), max(seen)
    step = (high - low) / (len(BARS) - 1)
    return "".join(" " if mean is None else BARS[round((mean - low) / step) if step > 0 else 3] for mean in means)


def _responses(records: Sequence[Mapping[str, Any]]) -> None:
    """The answers to each fixed prompt, before the training and now."""
    told = [one for record in records for one in record.get("responses", ())]
    if not told:
        tell("\nno responses were logged: learner.log_samples is 0, or the learner does not sample")
        return
    first, last = told[0], told[-1]
    for before, now in zip(first["answers"], last["answers"], strict=True):
        tell(f"\n> {last_words(before['prompt'])}")
        for step, answer in ((first["step"], before), (last["step"], now)):
            tell(f"  step {step}: {answer['response'].strip()}")

"""Kills bench, fit, tune and report with SIGKILL at seeded random instants, runs them again until they end, and compares everything.

    python tests/kill.py --kills 100
    python tests/kill.py --kills 20 --commands processes     # a training in two processes: one of them is killed, or both

prints a table, and ends with 1 where a number, a log or a file differs from an undisturbed run. `test_killed_suite.py` kills a few times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paretune.report.comparison import write_rows
from paretune.report.data import load
from paretune.report.page import write_page
from paretune.runs.store import Store
from paretune.runs.suite import fit, run_suite
from paretune.runs.tune import read_plan, tune
from paretune.seeds import generator
from paretune.training.cost import TIMED

TASK = {"name": "exact-v1", "alphabet": 3, "length": 2, "prompt_count": 2, "width": 32, "layers": 1}
LEARNER = {"name": "pg", "samples": 96, "batch": 8, "group": 4, "rank": 2, "log_every": 3, "checkpoint_every": 2}
SUITE = {
    "name": "killed",
    "tasks": [{**TASK, "rho": [0.5, -0.5]}],
    "learner": LEARNER,
    "methods": [{"name": "linear", "points": 3}, {"name": "experts", "mixing": ["parameter", "logit"]}],
    "seeds": [0],
}
TUNED = {
    **SUITE,
    "name": "tuned",
    "tasks": [{**TASK, "rho": 0.5}],
    "methods": [{"name": "experts"}],
    "tune": {"learner.lr": [1e-3, 1e-2, "log"]},
}
UNSEEN = (*TIMED, "folder", "sha256")  # what a clock or a place is part of


def bench(root: Path) -> None:
    run_suite(SUITE, root, executor="in-process", progress=False)


def fit_family(root: Path) -> None:
    family = fit(TASK, "experts", learner=LEARNER, root=root, progress=False)
    if not (root / "families" / "mine").exists():
        family.save(root / "families" / "mine")


def search(root: Path) -> None:
    root.mkdir(exist_ok=True)
    (root / "suite.yaml").write_text(json.dumps(TUNED))
    tune(read_plan(root / "suite.yaml"), trials=3, root=root)


def report(root: Path) -> None:
    results = load(root)
    write_page(results, root / "reports" / "killed")
    write_rows(results, root / "rows.json")


def processes(root: Path) -> None:
    settings = {**LEARNER, "samples": 192, "checkpoint_every": 1, "processes": 2}
    fit({**TASK, "prompt_count": 4}, "conditioned", learner=settings, root=root, progress=False)


COMMANDS: dict[str, Callable[[Path], None]] = {
    "bench": bench,
    "fit": fit_family,
    "tune": search,
    "report": report,
    "processes": processes,
}


def start(command: str, root: Path) -> int:
    """A child process that runs the command, and its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(root.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            COMMANDS[command](root)
            code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def ended(command: str, root: Path) -> float:
    """Run the command to its end; the seconds that it took."""
    began = time.monotonic()
    assert os.waitpid(start(command, root), 0)[1] == 0, root.with_suffix(".log").read_text()
    return time.monotonic() - began


def killed(command: str, root: Path, delay: float, *, part: bool = False) -> bool:
    """Start the command and kill it after so many seconds, or with `part` what it started; False where that had ended before."""
    child = start(command, root)
    time.sleep(delay)
    victims = started_by(child) if part else [child]
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    code = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(code) or code == 0, root.with_suffix(".log").read_text()
    return bool(victims) if part else os.WIFSIGNALED(code)


def started_by(process: int) -> list[int]:
    """The processes that another one has started, from the system's table (Linux)."""
    with contextlib.suppress(OSError):
        return [int(found) for found in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def without_clock(value):
    if isinstance(value, dict):
        return {key: without_clock(item) for key, item in value.items() if key not in UNSEEN}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def numbers(root: Path) -> dict[str, object]:
    """Every adapter, log, cost, curve, metric, family, score and page, without what a clock put there."""
    found: dict[str, object] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.suffix == ".jsonl":
            found[name] = [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json" and not name.startswith("logs/") and path.name not in ("env.json", "journal.json"):
            found[name] = without_clock(json.loads(path.read_text()))
        elif path.suffix in (".safetensors", ".html", ".csv", ".svg"):
            found[name] = path.read_bytes()
    return found


@dataclass
class Told:
    """What happened to one command: rounds from an empty directory to the end, kills on the way, and what was not as undisturbed."""

    command: str
    rounds: int = 0
    kills: int = 0
    differences: int = 0
    seconds: float = 0.0


def torment(command: str, kills: int, folder: Path, *, seed: int = 0, a_round: int = 4) -> Told:
    """Kill the command so many times, at most `a_round` times before it may end."""
    told, rng, began = Told(command), generator(seed, "when to kill", command), time.monotonic()
    ready = folder / "ready"  # what the command starts from
    if command == "report":
        ended("bench", ready)
    whole = fresh(ready, folder / "whole")
    lasts = ended(command, whole)
    expected = numbers(whole)
    assert expected, f"{command} leaves something"
    while told.kills < kills:
        root = fresh(ready, folder / f"round-{told.rounds}")
        told.rounds += 1
        left = min(a_round, kills - told.kills)
        while left and killed(command, root, rng.uniform(0.0, lasts), part=command == "processes" and rng.random() < 0.5):
            told.kills, left = told.kills + 1, left - 1
            told.differences += len(Store(root).check()) if root.exists() else 0
        ended(command, root)
        found = numbers(root)
        different = [name for name in {*expected, *found} if expected.get(name) != found.get(name)]
        different += [str(p) for p in root.rglob(".*") if p.name.startswith((".wip-", ".aside-"))] + Store(root).check()
        told.differences += len(different)
        if different:
            print(f"{command}, round {told.rounds}: {sorted(different)[:5]} in {root}", file=sys.stderr)
        else:
            shutil.rmtree(root)
    told.seconds = time.monotonic() - began
    return told


def fresh(ready: Path, root: Path) -> Path:
    """A directory to work in."""
    if ready.exists():
        shutil.copytree(ready, root)
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=["bench", "fit", "tune", "report"])
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("PARETUNE_CACHE", f"{folder}/cache")
        rows = []
        for place, command in enumerate(given.commands):
            share = given.kills // len(given.commands) + (place < given.kills % len(given.commands))
            (Path(folder) / command).mkdir()
            rows.append(torment(command, share, Path(folder) / command, seed=given.seed))
            print(f"{command}: done", file=sys.stderr)
    print(f"{'command':9} {'kills':>6} {'rounds':>7} {'differences':>12} {'seconds':>8}")
    for told in rows:
        print(f"{told.command:9} {told.kills:6} {told.rounds:7} {told.differences:12} {told.seconds:8.0f}")
    return int(any(told.differences for told in rows))


if __name__ == "__main__":
    sys.exit(main())

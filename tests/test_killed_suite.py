"""A suite of real trainings on exact tasks, killed with `kill -9` at random moments: it ends with the numbers of an undisturbed one.

`test_cluster.py` kills workers and drivers around trainings that cost nothing; here learner, checkpoints and evaluation are real.
"""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from kill import torment
from paretune.runs.store import ARTIFACTS, CELLS, Store
from paretune.runs.suite import run_suite
from paretune.seeds import generator
from paretune.training.cost import TIMED

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks a process that has loaded torch"),
    pytest.mark.usefixtures("one_thread"),
]

SUITE = {
    "name": "killed",
    "tasks": [{"name": "exact-v1", "alphabet": 3, "length": 2, "prompt_count": 2, "width": 32, "layers": 1, "rho": [0.5, -0.5]}],
    "learner": {"name": "pg", "samples": 96, "batch": 8, "group": 4, "rank": 2, "log_every": 1, "checkpoint_every": 2},
    "methods": [{"name": "linear", "points": 3}, {"name": "experts", "mixing": ["parameter", "logit"]}],
    "seeds": [0],
}


def start(root):
    """A child process that runs the suite, and its id."""
    child = os.fork()
    if child == 0:
        try:
            run_suite(SUITE, root, executor="in-process", progress=False)
        finally:
            os._exit(0)
    return child


def done_so_far(root):
    """Steps that were logged, and what was published."""
    lines = sum(path.read_text().count("\n") for path in root.glob("artifacts/*/train.jsonl"))
    return lines + len(list(root.glob("*/*/DONE")))


def kill_after(child, root, more, delay):
    """SIGKILL once so much more was done; False where the child had ended before."""
    want, deadline = done_so_far(root) + more, time.monotonic() + 120
    while done_so_far(root) < want:
        assert time.monotonic() < deadline, "no progress within the limit"
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def without_clock(value):
    if isinstance(value, dict):
        return {key: without_clock(item) for key, item in value.items() if key not in TIMED}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def numbers(root):
    """Every adapter, log, cost, curve and metric, without what a clock put there."""
    found = {}
    for path in sorted([*root.glob("artifacts/*/*"), *root.glob("cells/*/*")]):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.name == "train.jsonl":
            found[name] = [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name in ("cell.json", "ledger.json", "spec.json"):
            found[name] = without_clock(json.loads(path.read_text()))
    return found


@pytest.mark.parametrize("command", ["fit", "tune", "report"])
def test_other_commands_killed_end_as_undisturbed_ones(command, tmp_path):
    """`python tests/kill.py --kills 100` does it often, to bench too."""
    told = torment(command, 1, tmp_path, seed=1)
    assert (told.differences, told.kills) == (0, 1)


def test_a_suite_killed_three_times_ends_with_the_same_numbers(tmp_path):
    run_suite(SUITE, tmp_path / "undisturbed", executor="in-process", progress=False)
    expected, root = numbers(tmp_path / "undisturbed"), tmp_path / "killed"
    rng = generator(0, "when to kill a suite")
    for _ in range(3):
        assert kill_after(start(root), root, more=int(rng.integers(3, 20)), delay=rng.uniform(0.0, 0.02)), "killed before its end"
        assert Store(root).check() == [], "what is published is whole"
        assert len(Store(root).published(CELLS)) < 6, "something is left to do"
    summary = run_suite(SUITE, root, executor="in-process", progress=False)
    assert summary.failed == []
    assert summary.trained < 6, "what was finished is not trained again"
    assert numbers(root) == expected
    assert len(Store(root).published(ARTIFACTS)) == len([name for name in expected if name.endswith(".safetensors")]) == 6
    assert len(Store(root).published(CELLS)) == 6
    assert not list(root.glob("*/.wip-*"))

"""Running suites of fakes in a test: `Bench`, used through the fixture `bench` of test_suite.py and test_cluster.py."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from paretune.registry import LEARNERS, METHODS, PLUGIN, TASKS, load_plugin
from paretune.runs.store import Store
from paretune.runs.suite import run_suite

HERE = Path(__file__).parent


@contextlib.contextmanager
def fakes_loaded(monkeypatch):
    """The plugin's classes for one test only: tests elsewhere compare what is registered with what is documented."""
    from paretune.evaluation import evaluate as evaluation

    registries = (TASKS, LEARNERS, METHODS)
    for registry in registries:
        list(registry)  # what ships with Paretune is loaded
    before = [dict(registry._classes) for registry in registries]
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(PLUGIN)}  # of other files' tests
    load_plugin(HERE / "fakes.py")
    (plugin,) = (name for name in sys.modules if name.startswith(PLUGIN))
    monkeypatch.setattr(evaluation, "evaluate", sys.modules[plugin].fake_evaluate)
    try:
        yield sys.modules[plugin]
    finally:
        del sys.modules[plugin]
        sys.modules.update(others)
        for registry, classes in zip(registries, before, strict=True):
            registry._classes = classes


class Bench:
    """A run directory, and the log that the fake learner keeps outside it."""

    def __init__(self, folder: Path, fakes):
        self.root, self.outside, self.fakes = folder / "root", folder / "outside", fakes
        self.outside.mkdir()
        self.store = Store(self.root)

    def run(self, *, executor="in-process", root=None, **suite):
        return run_suite(suite_of(**suite), root or self.root, executor=executor, progress=False)

    def tell(self, *orders: str):
        """`tell("fail-1")`: see fakes.py; `tell()` takes all orders back."""
        for path in self.outside.glob("*-*"):
            path.unlink()
        for order in orders:
            (self.outside / order).touch()

    def log(self, word: str) -> list[str]:
        path = self.outside / "log.txt"
        return [line for line in path.read_text().splitlines() if line.startswith(word)] if path.exists() else []

    def twice(self) -> list[str]:
        """Steps that were computed more than once."""
        return [line for line, count in Counter(self.log("step")).items() if count > 1]

    def start(self, *, workers=2, ray: str | None = None, **suite) -> subprocess.Popen:
        """A driver of its own, the first of its process group; `ray` is the address of a cluster to work on."""
        command = [sys.executable, str(HERE / "fake_driver.py"), str(self.root), json.dumps(suite_of(**suite)), str(workers)]
        command += [] if ray is None else [ray]
        listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's children are born deaf to it
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, **pipes, text=True, start_new_session=True, preexec_fn=listen)

    def wait_for_steps(self, driver: subprocess.Popen, more: int = 1, limit: float = 60.0) -> bool:
        """Until the log has grown by so many steps; False where the driver ended before."""
        want, deadline = len(self.log("step")) + more, time.monotonic() + limit
        while len(self.log("step")) < want and time.monotonic() < deadline:
            if driver.poll() is not None:
                return False
            time.sleep(0.005)
        assert time.monotonic() < deadline, "no step within the limit"
        return True


def suite_of(**given):
    return {"name": "s", "tasks": ["fake-task"], "learner": "fake", "methods": ["fake-method"], "seeds": [1], **given}


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid: int) -> bool:
    """False for zombies too: they compute nothing."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def all_gone(pids: list[int], limit: float = 10.0) -> bool:
    deadline = time.monotonic() + limit
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(alive(pid) for pid in pids)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def results(root: Path) -> dict[str, object]:
    """Everything that a suite computed, without what a clock or the machine put there."""
    found: dict[str, object] = {}
    for path in sorted([*root.glob("artifacts/*/*"), *root.glob("cells/*/*")]):
        name = path.relative_to(root).as_posix()
        if path.name == "cell.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        elif path.name not in ("DONE", "env.json"):  # DONE holds the hash of env.json; `check` looks at both
            found[name] = path.read_bytes()
    return found

"""A plugin with a task, a learner and methods that cost nothing, for tests of the bench: loaded by `load_plugin`, also in workers.

The learner keeps a checkpoint after every step and writes to a log outside the run directory: FAKE_LOG/log.txt. Files in FAKE_LOG
steer it: `fail-<seed>` makes trainings of that seed raise, `die-<seed>` ends the process that runs them, `once-<seed>` kills it
once, `full-<seed>` fills the disk.
Where FAKE_LIGHT is set, a process (a worker, a driver) does not import what ships with Paretune, so that it starts in 0.3 s, not in 3 s.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

from paretune.errors import ConfigError, RewardError
from paretune.registry import LEARNERS, METHODS, TASKS, describe
from paretune.training.cost import Cost
from paretune.training.spec import TrainSpec
from paretune.types import Curve


def fake_evaluate(task, family, *, splits, samples, seed):
    """A family is a list of hex digests here; a curve is made of their digits."""
    digits = np.array([int(c, 16) for c in "".join(family.digests)], dtype=float)
    w_WM = np.array([[0.25, 0.75], [0.75, 0.25]])
    rewards_WSM = np.resize(digits, (2, 3, 2)) / 16
    shape = {"w_WM": w_WM, "rewards_WSM": rewards_WSM, "kl_WS": np.zeros((2, 3)), "prompt_S": np.arange(3), "beta": 0.1, "exact": True}
    curves = {split: Curve(**shape, split=split) for split in splits}
    metrics = {"mean": float(rewards_WSM.mean()), "samples": samples, "seed": seed}
    return SimpleNamespace(curves=curves, metrics=metrics, cost=Cost(evaluations=7, validation_samples=21, seconds=0.5))


if os.environ.get("FAKE_LIGHT") and "torch" not in sys.modules:
    for registry in (TASKS, LEARNERS, METHODS):
        registry.homes = ()
    sys.modules["paretune.evaluation.evaluate"] = ModuleType("paretune.evaluation.evaluate")
    sys.modules["paretune.evaluation.evaluate"].evaluate = fake_evaluate  # type: ignore[attr-defined]


def log(line: str) -> None:
    """One short write to a file opened for appending is not torn, and survives kill -9."""
    handle = os.open(Path(os.environ["FAKE_LOG"]) / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


def told(what: str, seed: int) -> bool:
    return (Path(os.environ["FAKE_LOG"]) / f"{what}-{seed}").exists()


@TASKS.register("fake-task")
@dataclass(frozen=True)
class FakeTask:
    level: float = 0.0
    mode: str = "a"
    shape: tuple[int, ...] = (1,)
    data: str | None = None  # a file whose content counts
    seed: int = 0

    is_exact = False

    def __post_init__(self):
        if self.level > 100:
            raise ConfigError("level is at most 100", found=f"level = {self.level:g}", remedy="lower it")

    @cached_property
    def _content(self):
        return {} if self.data is None else {"data": hashlib.sha256(Path(self.data).read_bytes()).hexdigest()}

    def content(self):
        return self._content


@TASKS.register("fake-unseeded")
@dataclass(frozen=True)
class FakeUnseeded:
    is_exact = False


@LEARNERS.register("fake")
@dataclass(frozen=True)
class FakeLearner:
    steps: int = 4
    pause: float = 0.0
    rate: float = 0.1

    def train(self, spec, task, work, *, parents, progress):
        key, checkpoint = spec.key, work / "checkpoint" / "state.json"
        checkpoint.parent.mkdir(exist_ok=True)
        state = {"step": 0, "value": key + "".join(parents)}
        if checkpoint.exists():
            state = json.loads(checkpoint.read_text())
        began = state["step"]
        for step in range(began, self.steps):
            time.sleep(self.pause)
            if told("fail", spec.seed) and step == 2:
                raise RewardError("a reward is a number", found="'good' from objective polite", remedy="return a float")
            if told("die", spec.seed):
                os._exit(3)
            if step == 3 and told("once", spec.seed):
                with contextlib.suppress(FileNotFoundError):  # another training was first
                    (Path(os.environ["FAKE_LOG"]) / f"once-{spec.seed}").unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
            if told("full", spec.seed) and step == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint")
            state = {"step": step + 1, "value": hashlib.sha256(f"{state['value']} {step}".encode()).hexdigest()}
            aside = checkpoint.with_suffix(".tmp")
            aside.write_text(json.dumps(state))
            aside.replace(checkpoint)
            log(f"step {key} {step}")
            progress({"step": step + 1, "steps": self.steps, "rewards": {"a": 0.5}, "kl": 0.1, "tokens_per_s": 10.0})
        print("this goes to a log, not to the pipe")
        (work / "adapter_config.json").write_text("{}")
        (work / "adapter_model.safetensors").write_text(state["value"])
        log(f"complete {key} from {began}")
        return Cost(samples=10 * self.steps, steps=self.steps, seconds=float(self.steps), memory_bytes=100 + spec.seed, storage_bytes=64)


@METHODS.register("fake-method")
@dataclass(frozen=True)
class FakeMethod:
    """`points` trainings at once, then `stages` waves of one more, each on top of all before."""

    points: int = 2
    stages: int = 0
    mode: str = "x"
    breaks: str = ""

    @dataclass(frozen=True)
    class Card:
        category: str = "baseline"

    card = Card()

    def plan(self, task, learner, done, seed):
        if self.breaks == "plan":
            raise ValueError("no plan")
        shared = {"task": describe(task), "learner": describe(learner), "seed": seed}
        weights = [(k / max(self.points - 1, 1), 1 - k / max(self.points - 1, 1)) for k in range(self.points)]
        specs = [TrainSpec(preference=w, **shared) for w in weights]
        for stage in range(self.stages):
            keys = tuple(spec.key for spec in specs)
            if not all(key in done for key in keys):
                break
            specs.append(TrainSpec(preference=(0.5, 0.5), init_from=keys, **shared))
            assert stage < self.stages
        return specs

    def policy(self, task, learner, done, seed):
        if self.breaks == "policy":
            raise ValueError("no policy")
        digests = [(artifact.path / "adapter_model.safetensors").read_text() for _, artifact in sorted(done.items())] or ["0" * 64]
        return SimpleNamespace(digests=digests, policy=SimpleNamespace(forwards_per_token=1.0), meta={})

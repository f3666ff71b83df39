"""Which training runs when: `plan` is asked after each wave, trainings are shared by key, and a failure stops only what needs it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from paretune.errors import ConfigError, refuse_exit
from paretune.runs.display import Display
from paretune.runs.executors.pool import Executor
from paretune.runs.forecast import Chain, Expected, expected, foreseen
from paretune.runs.jobs import TRAIN, Job, Outcome, failure, train_job
from paretune.runs.store import ARTIFACTS, Store
from paretune.training.spec import Artifact, TrainSpec

__all__ = ["Member", "Schedule", "next_wave"]

MAX_WAVES = 1000


@dataclass(eq=False)
class Member:
    """One method on one task with one seed, on its way: its own waves of trainings, as if nobody else trained."""

    key: str
    label: str
    task: Any
    method: Any
    learner: Any
    seed: int
    spec: Mapping[str, Any] = field(default_factory=dict)  # what the cell's key is made of
    done: dict[str, Artifact] = field(default_factory=dict)
    waves: list[list[str]] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)  # of the last wave, what is not trained yet
    adaptive: bool = False  # its plan looks at results: what it asks for next, only its turn tells
    over: bool = False  # ready, or failed


@refuse_exit()
def next_wave(member: Member) -> dict[str, TrainSpec]:
    """Key -> what the method asks for and has not got; empty when it has all that it needs."""
    specs = member.method.plan(member.task, member.learner, dict(member.done), member.seed)
    wave = {spec.key: spec for spec in specs if spec.key not in member.done}
    if wave and len(member.waves) >= MAX_WAVES:
        raise ConfigError(
            "a plan asks for nothing new after a while",
            found=f"{member.label}: {MAX_WAVES} waves",
            remedy="make `plan` a pure function of its arguments",
        )
    return wave


class Schedule:
    """Drives members to the end. `on_ready` is told when a member's trainings are done and may give one more job; `on_failed` of failures.

    `trained` and `reused` are the keys of the distinct trainings run and found; `broken` maps keys to what their FAILED.json says.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        display: Display,
        *,
        on_ready: Callable[[Member], Job | None],
        on_failed: Callable[[Member, Mapping[str, Any], BaseException | None], None],
        on_done: Callable[[Member], None],
    ):
        self._store, self._executor, self._display = store, executor, display
        self._on_ready, self._on_failed, self._on_done = on_ready, on_failed, on_done
        self._wanted: dict[str, list[Member]] = defaultdict(list)
        self._measured: dict[str, Member] = {}
        self._found: set[str] = set()  # the keys in `trained` and `reused`
        self.specs: dict[str, TrainSpec] = {}
        self.trained: list[str] = []
        self.reused: list[str] = []
        self.broken: dict[str, Mapping[str, Any]] = {}

    def run(self, members: list[Member]) -> None:
        """Until all are over. Raises StoreError where the disk is full."""
        for member in members:
            self._foresee(member)
        for member in members:
            self._advance(member)
        for outcome in self._executor.outcomes():
            key = outcome.job.key
            self._display.finished(outcome)
            if outcome.job.kind == TRAIN:
                self._after_training(outcome)
            elif outcome.error is not None:
                self._on_failed(self._measured[key], outcome.error, outcome.cause)
            else:
                self._on_done(self._measured[key])

    def _advance(self, member: Member) -> None:
        """Ask for the next wave until one has to be waited for, or the member is ready."""
        while True:
            try:
                wave = next_wave(member)
            except Exception as error:
                member.over = True
                self._display.given_up(member.label, str(error), member=member.key)
                self._on_failed(member, failure(error, label=member.label), error)
                return
            if not wave:
                break
            member.waves.append(list(wave))
            if member.adaptive and self._display.shows:
                chain = Chain([[expected(key, spec) for key, spec in wave.items()]], self._cell(member), more=True)
                self._display.foresee(member.key, chain)
            for key, spec in wave.items():
                self._obtain(member, key, spec)
            if member.over or member.waiting:
                return
        member.over = True
        job = self._on_ready(member)
        if member.adaptive:
            self._display.foresee(member.key, None if job is None else Chain([], self._cell(member)))
        if job is not None:
            self._measured[job.key] = member
            self._executor.submit(job)

    def _foresee(self, member: Member) -> None:
        """Tell the display of the waves to come; an artifact that is there already is none of them."""
        if not self._display.shows:
            return
        waves, member.adaptive = foreseen(member.method, member.task, member.learner, member.done, member.seed)
        to_train = [[expected(key, spec) for key, spec in wave.items() if self._store.artifact(key) is None] for wave in waves]
        self._display.foresee(member.key, Chain(to_train, self._cell(member), more=member.adaptive))

    def _cell(self, member: Member) -> Expected | None:
        """How the member is measured; None where it is not, as in a fit."""
        method = member.spec.get("method")
        return None if method is None else Expected(member.key, ((str(member.spec["task"]), str(method)), str(method), "cell"))

    def _obtain(self, member: Member, key: str, spec: TrainSpec) -> None:
        self.specs[key] = spec
        artifact = self._store.artifact(key)
        if artifact is not None:
            member.done[key] = artifact
            if key not in self._found:
                self._found.add(key)
                self.reused.append(key)
        elif key in self.broken:
            self._give_up(member, key, None)
        else:
            member.waiting.add(key)
            if key not in self._wanted:
                job = train_job(self._store, spec, learner=member.learner)
                self._display.wanted(job)
                self._executor.submit(job)
            self._wanted[key].append(member)

    def _after_training(self, outcome: Outcome) -> None:
        key = outcome.job.key
        members = self._wanted.pop(key)
        if outcome.error is not None:
            self._store.fail(ARTIFACTS, key, outcome.error)
            self.broken[key] = outcome.error
            for member in members:
                self._give_up(member, key, outcome.cause)
            return
        self.trained.append(key)
        self._found.add(key)
        artifact = self._store.artifact(key)
        assert artifact is not None, f"the job of {key} ended well and published nothing"
        for member in members:
            member.done[key] = artifact
            member.waiting.discard(key)
            if not member.over and not member.waiting:
                self._advance(member)

    def _give_up(self, member: Member, key: str, cause: BaseException | None) -> None:
        if member.over:
            return
        member.over = True
        error = self.broken[key]
        message = f"its training {key} failed: {error['message']}"
        self._display.given_up(member.label, message, member=member.key)
        self._on_failed(member, {**error, "label": member.label, "message": message, "training": key}, cause)

"""How long a run still takes: what plans will ask for, and how long the like of it took.

A job takes its size times the seconds per size of jobs of its kind, or of the nearest kind of which one has run. What is left is the sum
over all jobs, divided among the workers, and never less than the longest chain of jobs that wait for each other.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paretune.errors import refuse_exit
from paretune.training.cost import PHASES
from paretune.training.spec import Artifact, TrainSpec

__all__ = ["Chain", "Expected", "Forecast", "expected", "foreseen"]

WAVES = 100  # of one plan, that are looked at


@dataclass(frozen=True)
class Expected:
    """A job to come: `kinds` of jobs that take as long, the nearest first, per `size`."""

    key: str
    kinds: tuple[Hashable, ...]
    size: float = 1.0


@dataclass(frozen=True)
class Chain:
    """What a member needs, wave after wave, and how it is measured; `more` where the plan may ask for more."""

    waves: Sequence[Sequence[Expected]]
    cell: Expected | None = None
    more: bool = False


@dataclass
class _Spent:
    seconds: float = 0.0
    size: float = 0.0

    def add(self, seconds: float, size: float) -> None:
        self.seconds, self.size = self.seconds + seconds, self.size + size


@dataclass
class Forecast:
    """Hears of jobs and says how long is left."""

    side_by_side: int = 1
    cells: int = 0  # that were wanted
    drawn: int = 0  # responses that are measured in the end, outside of any job
    _response: float = 0.0  # seconds that one takes, as far as a log has said
    _chains: dict[str, Chain] = field(default_factory=dict)
    _wanted: dict[str, Expected] = field(default_factory=dict)  # trainings that no chain names
    _ended: set[str] = field(default_factory=set)
    _cells_over: int = 0
    _spent: dict[Hashable, _Spent] = field(default_factory=dict)
    _running: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # seconds left, when that was said, seconds in all

    def foresee(self, member: str, chain: Chain | None) -> None:
        self._chains.pop(member, None)
        if chain is not None:
            self._chains[member] = chain

    def given_up(self, member: str) -> None:
        self._chains.pop(member, None)
        self._cells_over += 1

    def wanted(self, key: str) -> None:
        self._wanted[key] = Expected(key, ("training",))

    def progress(self, key: str, record: Mapping[str, Any], now: float) -> None:
        """A running training has logged a record: how far it is, and what sampling, scoring and the reference take of each response."""
        step, steps, seconds = (record.get(name) or 0 for name in ("step", "steps", "seconds"))
        if step and steps:
            self._running[key] = seconds * (steps - step) / step, now, seconds * steps / step
        speeds = [record.get(PHASES, {}).get(name) for name in ("sampling", "rewards", "reference")]
        if all(speeds) and record.get("length"):
            self._response = sum(record["length"] / speed for speed in speeds)

    def ended(self, key: str, seconds: float, *, training: bool) -> None:
        known = self._open(cells=not training).get(key) or Expected(key, ("training" if training else "cell",))
        for kind in known.kinds:
            self._spent.setdefault(kind, _Spent()).add(seconds, known.size)
        self._ended.add(key)
        self._running.pop(key, None)
        self._cells_over += not training

    @property
    def trainings(self) -> int:
        """That are not over, those to come included."""
        return len(self._open())

    def _open(self, *, cells: bool = False) -> dict[str, Expected]:
        """The trainings, or the cells, that are known of and not over."""
        chains = list(self._chains.values())  # another thread may ask while one ends
        if cells:
            return {one.cell.key: one.cell for one in chains if one.cell is not None and one.cell.key not in self._ended}
        told = {job.key: job for one in chains for wave in one.waves for job in wave}
        return {key: job for key, job in {**dict(self._wanted), **told}.items() if key not in self._ended}

    def left(self, now: float) -> tuple[float | None, bool]:
        """Seconds, None while nothing like what is left has run; and whether more may come."""
        open_, cells, running = self._open(), self._open(cells=True), dict(self._running)
        spent = {kind: _Spent(one.seconds, one.size) for kind, one in list(self._spent.items())}
        for key, (_, _, whole) in running.items():
            for kind in open_[key].kinds if key in open_ else ():
                spent.setdefault(kind, _Spent()).add(whole, open_[key].size)
        more = any(chain.more for chain in list(self._chains.values()))
        takes: dict[str, float] = {}
        for key, job in {**open_, **cells}.items():
            rate = next((spent[kind] for kind in job.kinds if kind in spent), None)
            if key in running:
                takes[key] = max(0.0, running[key][0] - (now - running[key][1]))
            elif rate is None or not rate.size:
                return None, more
            else:
                takes[key] = rate.seconds / rate.size * job.size
        others = max(0, self.cells - self._cells_over - len(cells))  # of which nothing is known but their number
        each = spent.get("cell")
        if others and each is None:
            return None, more
        whole = sum(takes.values()) + (others * each.seconds / each.size if others and each else 0.0)
        longest = max((_longest(chain, takes) for chain in list(self._chains.values())), default=0.0)
        return max(whole / self.side_by_side, longest) + self.drawn * self._response, more


def _longest(chain: Chain, takes: Mapping[str, float]) -> float:
    """Seconds of a chain on as many workers as it can use."""
    waves = sum(max((takes.get(job.key, 0.0) for job in wave), default=0.0) for wave in chain.waves)
    return waves + (takes.get(chain.cell.key, 0.0) if chain.cell is not None else 0.0)


class _Unmade(Artifact):
    """A training that is not done: a plan that only asks whether it is goes on, one that looks into it does not."""

    @property
    def path(self) -> Path:  # type: ignore[override]
        raise LookupError(f"{self.key} is not trained yet")

    def __init__(self, key: str, spec: TrainSpec):
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "spec", spec)


def foreseen(method: Any, task: Any, learner: Any, done: Mapping[str, Artifact], seed: int) -> tuple[list[dict[str, TrainSpec]], bool]:
    """The waves that a plan still asks for if all goes well, and whether more may follow that it decides by results."""
    known, waves = dict(done), list[dict[str, TrainSpec]]()
    while len(waves) < WAVES:
        try:
            with refuse_exit():
                specs = method.plan(task, learner, dict(known), seed)
        except Exception:  # whatever a plan does with results that are not there; what is wrong with it, its real turn says
            return waves, True
        wave = {spec.key: spec for spec in specs if spec.key not in known}
        if not wave:
            return waves, False
        waves.append(wave)
        known |= {key: _Unmade(key, spec) for key, spec in wave.items()}
    return waves, True


def expected(key: str, spec: TrainSpec) -> Expected:
    """A training: its size is its learner's budget, and it takes as long as others with as many adapters on the same task."""
    learner = spec.learner
    size = float(learner.get("samples") or learner.get("steps") or 1) * float(learner.get("epochs") or 1)
    adapters = len(spec.parents) + (1 if spec.fresh is None and spec.preference is not None else len(spec.fresh or ()))
    task = str(spec.task)
    name = learner["name"]
    return Expected(key, ((task, name, adapters), (task, name), (name, adapters), name, "training"), size)

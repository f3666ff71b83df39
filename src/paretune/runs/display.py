"""What a person sees of a run, on stderr: bars at a terminal, otherwise a line for everything that ends, and one every half minute."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from paretune.errors import printable
from paretune.runs.jobs import CELL, TRAIN, Job, Outcome

__all__ = ["Bars", "Display", "Lines", "display", "progress_text"]

EVERY = 30.0  # seconds, after which a line says what is running

WORDS = {TRAIN: ("trained", "training"), CELL: ("measured", "cell")}  # done, failed


@dataclass(frozen=True)
class _Running:
    """A training that has logged something: what a line says of it, when that was, and the seconds `left` and in all, if it is known."""

    text: str
    at: float
    left: float = 0.0
    whole: float = 0.0  # 0: not known


class Display:
    """Counts what is wanted and done; shows nothing. `side_by_side` is how many jobs run at a time, for the time left."""

    def __init__(self, *, cells: int, side_by_side: int = 1):
        self.cells, self.cells_done = cells, 0
        self.trainings = self.trainings_done = 0
        self.side_by_side = side_by_side
        self._start = time.monotonic()
        self._spent = {True: [0.0, 0], False: [0.0, 0]}  # is it a training? -> seconds, jobs
        self._running: dict[str, _Running] = {}  # trainings that have logged something

    def wanted(self, job: Job) -> None:
        """A training was asked for."""
        self.trainings += 1

    def progress(self, job: Job, record: Mapping[str, Any]) -> None:
        """A running training logged a record; what it warns of is a line of its own."""
        numbers = ""
        with contextlib.suppress(KeyError, TypeError, ValueError):  # another learner's record may hold less
            numbers = progress_text(record)
        step, steps = record.get("step", 0), record.get("steps")
        text = f"{job.label}: {step}/{steps} {numbers}".rstrip()
        self._running[job.key] = _Running(text, time.monotonic(), *_times(record))
        for text in record.get("warnings", {}).values():
            self.note(f"{job.label}, step {step}: {text}")

    def finished(self, outcome: Outcome) -> None:
        """A job ended, well or not."""
        self._running.pop(outcome.job.key, None)
        spent = self._spent[outcome.job.kind == TRAIN]
        spent[0] += outcome.seconds
        spent[1] += 1
        if outcome.job.kind == TRAIN:
            self.trainings_done += 1
        else:
            self.cells_done += 1
        done, failed = WORDS[outcome.job.kind]
        if outcome.error is None:
            self.note(f"{done} {outcome.job.label} in {_clock(outcome.seconds)}")
        else:
            self.note(f"{failed} {outcome.job.label} failed: {_first_line(outcome.error['message'])}")

    def given_up(self, label: str, message: str) -> None:
        """A cell failed without a job of its own: its plan, or one of its trainings did."""
        self.cells_done += 1
        self.note(f"cell {label} failed: {_first_line(message)}")

    def note(self, text: str) -> None:
        """One line for a person."""

    def state(self) -> str:
        """`trainings 3/6, cells 2/18, 1m12s, 2m05s left`."""
        left = self._left()
        eta = "" if left is None else f", {_clock(left)} left"
        counts = f"trainings {self.trainings_done}/{self.trainings}" + (f", cells {self.cells_done}/{self.cells}" if self.cells else "")
        return f"{counts}, {_clock(time.monotonic() - self._start)}{eta}"

    def _left(self) -> float | None:
        """Seconds: of each kind of job the mean duration, of trainings that run what their steps say; None while a kind is not known."""
        now, left = time.monotonic(), 0.0
        told = [running for running in list(self._running.values()) if running.whole]  # another thread may ask while one ends
        for training, open_jobs in ((True, self.trainings - self.trainings_done), (False, self.cells - self.cells_done)):
            seconds, count = self._spent[training]
            if training:
                left += sum(max(0.0, r.left - (now - r.at)) for r in told)
                open_jobs, seconds, count = open_jobs - len(told), seconds + sum(r.whole for r in told), count + len(told)
            if open_jobs > 0 and not count:
                return None
            left += max(open_jobs, 0) * seconds / max(count, 1)
        return left / self.side_by_side

    def close(self) -> None:
        """Nothing is shown from here on."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Lines(Display):
    """For logs: one line per event; the first training's begin, and every `every` seconds without a line what is running."""

    def __init__(self, *, cells: int, side_by_side: int = 1, stream: IO[str] | None = None, every: float = EVERY):
        super().__init__(cells=cells, side_by_side=side_by_side)
        self._stream, self._every, self._said = stream or sys.stderr, every, time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def wanted(self, job: Job) -> None:
        super().wanted(job)
        if self.trainings == 1:
            self.note(f"training {job.label}")

    def note(self, text: str) -> None:
        self._said = time.monotonic()
        print(printable(f"[{self.state()}] {text}"), file=self._stream, flush=True)

    def close(self) -> None:
        self._closed.set()

    def _beat(self) -> None:
        while not self._closed.wait(self._every / 10):
            if time.monotonic() - self._said >= self._every:
                running = list(self._running.values())
                self.note("; ".join(one.text for one in running) or "at work; nothing was logged yet")


class Bars(Display):
    """For a terminal: the counts, and one bar per running training with its rewards, KL and speed."""

    def __init__(self, *, cells: int, side_by_side: int = 1):
        super().__init__(cells=cells, side_by_side=side_by_side)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task
        from rich.text import Text

        shown = self

        class Words(ProgressColumn):
            """Rendered anew several times per second, so that the clock runs."""

            def render(self, task: Task) -> Text:
                return Text(task.description or shown.state(), no_wrap=True, overflow="ellipsis")

        self._bars = Progress(BarColumn(bar_width=14), Words(), console=Console(stderr=True))
        self._total = self._bars.add_task("", total=None)
        self._bars_of: dict[str, Any] = {}
        self._bars.start()

    def wanted(self, job: Job) -> None:
        super().wanted(job)
        self._update()

    def progress(self, job: Job, record: Mapping[str, Any]) -> None:
        super().progress(job, record)
        if job.key not in self._bars_of:
            self._bars_of[job.key] = self._bars.add_task(job.label, total=None)
        shown = self._running[job.key].text
        self._bars.update(self._bars_of[job.key], total=record.get("steps"), completed=record.get("step", 0), description=shown)

    def finished(self, outcome: Outcome) -> None:
        if (bar := self._bars_of.pop(outcome.job.key, None)) is not None:
            self._bars.remove_task(bar)
        super().finished(outcome)
        self._update()

    def note(self, text: str) -> None:
        self._bars.console.print(printable(text), markup=False, highlight=False)

    def close(self) -> None:
        self._bars.stop()

    def _update(self) -> None:
        wanted, done = self.trainings + self.cells, self.trainings_done + self.cells_done
        self._bars.update(self._total, total=wanted, completed=done)


def display(*, show: bool, cells: int, side_by_side: int = 1) -> Display:
    """The one that fits: nothing, bars at a terminal, or lines."""
    if not show:
        return Display(cells=cells, side_by_side=side_by_side)
    return (Bars if sys.stderr.isatty() else Lines)(cells=cells, side_by_side=side_by_side)


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes = round(seconds) // 60
    return f"{minutes}m{round(seconds) % 60:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no message"


def _times(record: Mapping[str, Any]) -> tuple[float, float]:
    """The seconds that a training still needs and needs in all, if it goes on as it did; zeros where its record does not say."""
    step, steps, seconds = (record.get(name) or 0 for name in ("step", "steps", "seconds"))
    return (seconds * (steps - step) / step, seconds * steps / step) if step and steps else (0.0, 0.0)


def progress_text(record: Mapping[str, Any]) -> str:
    """`polite .61 brief .40 | KL .52 | 5,310 tokens/s` from a record of the log."""
    rewards = " ".join(f"{name} {'?' if value is None else format(value, '.3f')}" for name, value in record["rewards"].items())
    return f"{rewards} | KL {record['kl']:.3f} | {record['tokens_per_s']:,.0f} tokens/s"

"""What a person sees of a run, on stderr: bars at a terminal, otherwise one line per finished training or cell, with the time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

from paretune.errors import printable
from paretune.runs.jobs import CELL, TRAIN, Job, Outcome

__all__ = ["Bars", "Display", "Lines", "display"]

WORDS = {TRAIN: ("trained", "training"), CELL: ("measured", "cell")}  # done, failed


class Display:
    """Counts what is wanted and done; shows nothing. `side_by_side` is how many jobs run at a time, for the time left."""

    def __init__(self, *, cells: int, side_by_side: int = 1):
        self.cells, self.cells_done = cells, 0
        self.trainings = self.trainings_done = 0
        self.side_by_side = side_by_side
        self._start = time.monotonic()
        self._spent = {True: [0.0, 0], False: [0.0, 0]}  # is it a training? -> seconds, jobs

    def wanted(self, job: Job) -> None:
        """A training was asked for."""
        self.trainings += 1

    def progress(self, job: Job, record: Mapping[str, Any]) -> None:
        """A running training logged a record; what it warns of is a line of its own."""
        for text in record.get("warnings", {}).values():
            self.note(f"{job.label}, step {record['step']}: {text}")

    def finished(self, outcome: Outcome) -> None:
        """A job ended, well or not."""
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
        counts = f"trainings {self.trainings_done}/{self.trainings}, cells {self.cells_done}/{self.cells}"
        return f"{counts}, {_clock(time.monotonic() - self._start)}{eta}"

    def _left(self) -> float | None:
        """Seconds, from the mean duration of each kind of job so far; None while one of them is not known."""
        left = 0.0
        for training, open_jobs in ((True, self.trainings - self.trainings_done), (False, self.cells - self.cells_done)):
            seconds, count = self._spent[training]
            if open_jobs and not count:
                return None
            left += open_jobs * seconds / max(count, 1)
        return left / self.side_by_side

    def close(self) -> None:
        """Nothing is shown from here on."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Lines(Display):
    """For logs: one line per event."""

    def __init__(self, *, cells: int, side_by_side: int = 1, stream: IO[str] | None = None):
        super().__init__(cells=cells, side_by_side=side_by_side)
        self._stream = stream or sys.stderr

    def note(self, text: str) -> None:
        print(printable(f"[{self.state()}] {text}"), file=self._stream, flush=True)


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
        self._running: dict[str, Any] = {}
        self._bars.start()

    def wanted(self, job: Job) -> None:
        super().wanted(job)
        self._update()

    def progress(self, job: Job, record: Mapping[str, Any]) -> None:
        from paretune.training.checkpoint import progress_text

        super().progress(job, record)
        if job.key not in self._running:
            self._running[job.key] = self._bars.add_task(job.label, total=None)
        step, steps = record.get("step", 0), record.get("steps")
        numbers = ""
        with contextlib.suppress(KeyError, TypeError, ValueError):  # another learner's record may hold less
            numbers = progress_text(record)
        shown = f"{step}/{steps} {numbers} {job.label}"
        self._bars.update(self._running[job.key], total=steps, completed=step, description=shown)

    def finished(self, outcome: Outcome) -> None:
        if (bar := self._running.pop(outcome.job.key, None)) is not None:
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

"""What a person sees of a run, on stderr: bars at a terminal, otherwise a line for everything that ends, and one every half minute."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO, Any, ClassVar

from paretune.errors import first_line, printable
from paretune.progress import EVERY, clock, instead, spoken
from paretune.runs.forecast import Chain, Forecast
from paretune.runs.jobs import CELL, TRAIN, Job, Outcome

__all__ = ["Bars", "Display", "Lines", "display", "progress_text"]

WORDS = {TRAIN: ("trained", "training"), CELL: ("measured", "cell")}  # done, failed


class Display:
    """Counts what is wanted and done; shows nothing. `side_by_side` is how many jobs run at a time, for the time left."""

    shows: ClassVar[bool] = False

    def __init__(self, *, cells: int, side_by_side: int = 1):
        self.cells, self.cells_done = cells, 0
        self.trainings = self.trainings_done = 0
        self._start = time.monotonic()
        self.forecast = Forecast(side_by_side=side_by_side, cells=cells)
        self._running: dict[str, str] = {}  # what to say of jobs that have told something
        self._logged: set[str] = set()  # trainings that have written a line of their log
        self._said: set[tuple[str, str]] = set()  # warnings, by job and kind

    def wanted(self, job: Job) -> None:
        """A training was asked for."""
        self.trainings += 1
        self.forecast.wanted(job.key)

    def foresee(self, member: str, chain: Chain | None) -> None:
        """What a member still needs, as far as its plan says; None where nothing more."""
        self.forecast.foresee(member, chain)

    def progress(self, job: Job, record: Mapping[str, Any]) -> None:
        """A running job logged a record, whose warnings are lines of their own, or says what it is at."""
        if "doing" in record:
            if job.key not in self._logged:
                self._running[job.key] = f"{job.label}: {record['doing']}"
            return
        numbers = ""
        with contextlib.suppress(KeyError, TypeError, ValueError):  # another learner's record may hold less
            numbers = progress_text(record)
        step, steps = record.get("step", 0), record.get("steps")
        self._logged.add(job.key)
        self._running[job.key] = f"{job.label}: {step}/{steps} {numbers}".rstrip()
        self.forecast.progress(job.key, record, time.monotonic())
        for kind, text in record.get("warnings", {}).items():
            if (job.key, kind) not in self._said:
                self._said.add((job.key, kind))
                self.note(f"{job.label}, step {step}: {text}")

    def finished(self, outcome: Outcome) -> None:
        """A job ended, well or not."""
        self._running.pop(outcome.job.key, None)
        self._logged.discard(outcome.job.key)
        self.forecast.ended(outcome.job.key, outcome.seconds, training=outcome.job.kind == TRAIN)
        if outcome.job.kind == TRAIN:
            self.trainings_done += 1
        else:
            self.cells_done += 1
        done, failed = WORDS[outcome.job.kind]
        if outcome.error is None:
            self.note(f"{done} {outcome.job.label} in {clock(outcome.seconds)}")
        else:
            self.note(f"{failed} {outcome.job.label} failed: {first_line(outcome.error['message'])}")

    def given_up(self, label: str, message: str, *, member: str = "") -> None:
        """A cell failed without a job of its own: its plan, or one of its trainings did."""
        self.cells_done += 1
        self.forecast.given_up(member)
        self.note(f"cell {label} failed: {first_line(message)}")

    def note(self, text: str) -> None:
        """One line for a person."""

    def state(self) -> str:
        """`trainings 3/6, cells 2/18, 1m12s, 2m05s left`; those to come count, as far as plans say, and `over` where they do not."""
        left, more = self.forecast.left(time.monotonic())
        eta = "" if left is None else f", {'over ' if more else ''}{clock(left)} left"
        trainings = max(self.trainings, self.trainings_done + self.forecast.trainings)
        counts = f"trainings {self.trainings_done}/{trainings}" + (f", cells {self.cells_done}/{self.cells}" if self.cells else "")
        return f"{counts}, {clock(time.monotonic() - self._start)}{eta}"

    def close(self) -> None:
        """Nothing is shown from here on."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Lines(Display):
    """For logs: one line per event; the first training's begin, and every `every` seconds without a line what is running."""

    shows = True

    def __init__(self, *, cells: int, side_by_side: int = 1, stream: IO[str] | None = None, every: float = EVERY):
        super().__init__(cells=cells, side_by_side=side_by_side)
        self._stream, self._every, self._spoke = stream or sys.stderr, every, time.monotonic()
        self._closed, self._instead = threading.Event(), contextlib.ExitStack()
        self._instead.enter_context(instead())
        threading.Thread(target=self._beat, daemon=True).start()

    def wanted(self, job: Job) -> None:
        super().wanted(job)
        if self.trainings == 1:
            self.note(f"training {job.label}")

    def note(self, text: str) -> None:
        self._spoke = time.monotonic()
        print(printable(f"[{self.state()}] {text}"), file=self._stream, flush=True)
        spoken()

    def close(self) -> None:
        self._closed.set()
        self._instead.close()

    def _beat(self) -> None:
        while not self._closed.wait(self._every / 10):
            if time.monotonic() - self._spoke >= self._every:
                with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                    self.note("; ".join(list(self._running.values())) or "at work; nothing was logged yet")


class Bars(Display):
    """For a terminal: the counts, and one bar per running training with its rewards, KL and speed."""

    shows = True

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
        self._instead = contextlib.ExitStack()
        self._instead.enter_context(instead())
        self._bars.start()

    def wanted(self, job: Job) -> None:
        super().wanted(job)
        self._update()

    def progress(self, job: Job, record: Mapping[str, Any]) -> None:
        super().progress(job, record)
        if job.key not in self._bars_of:
            self._bars_of[job.key] = self._bars.add_task(job.label, total=None)
        shown = self._running[job.key]
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
        self._instead.close()

    def _update(self) -> None:
        done = self.trainings_done + self.cells_done
        wanted = max(self.trainings, self.trainings_done + self.forecast.trainings) + self.cells
        self._bars.update(self._total, total=wanted, completed=done)


def display(*, show: bool, cells: int, side_by_side: int = 1) -> Display:
    """The one that fits: nothing, bars at a terminal, or lines."""
    if not show:
        return Display(cells=cells, side_by_side=side_by_side)
    return (Bars if sys.stderr.isatty() else Lines)(cells=cells, side_by_side=side_by_side)


def progress_text(record: Mapping[str, Any]) -> str:
    """`polite .61 brief .40 | KL .52 | 5,310 tokens/s` from a record of the log."""
    rewards = " ".join(f"{name} {'?' if value is None else format(value, '.3f')}" for name, value in record["rewards"].items())
    return f"{rewards} | KL {record['kl']:.3f} | {record['tokens_per_s']:,.0f} tokens/s"

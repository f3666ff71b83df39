"""How far long work is: loops say what they are at, `n` of `m`, and whoever shows it to a person listens.

`counted` and `during` say it, `heard` listens. `Heartbeat` shows it on the command line: on stderr, a line within seconds of the command,
and one every half minute without a line.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import IO, TypeVar

from paretune.errors import printable

__all__ = ["EVERY", "Heartbeat", "State", "clock", "counted", "during", "heard", "instead", "spoken"]

FIRST, EVERY = 3.0, 30.0  # seconds, after which a line says what is going on: at the begin, and from then on
OFTEN = 5.0  # seconds between two lines that only say how far a loop is

Listener = Callable[[str, int, int], None]
"""Called with what is done, how many of it are done, and of how many."""

T = TypeVar("T")
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


def counted(what: str, items: Sequence[T], *, size: int = 1) -> Iterator[T]:
    """The items, one after the other; whoever listens hears `what`, n of m. An item counts `size`."""
    of = len(items) * size
    for n, item in enumerate(items):
        _tell(what, n * size, of)
        yield item
    _tell(what, of, of)


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    """One thing that takes a while, such as loading a model."""
    _tell(what, 0, 1)
    try:
        yield
    finally:
        _tell(what, 1, 1)


def _tell(what: str, done: int, of: int) -> None:
    for listener in _listeners.get():
        listener(what, done, of)


@contextlib.contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Let `listener` hear what is done inside, beside those who listen already."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


class State:
    """What was heard and is not over: `measuring 3 of 11, sampling 64 of 128`."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, int]] = {}

    def hear(self, what: str, done: int, of: int) -> None:
        if done >= of:
            self._open.pop(what, None)
        else:
            self._open[what] = done, of

    def text(self) -> str:
        return ", ".join(what if of == 1 else f"{what} {done + 1} of {of}" for what, (done, of) in list(self._open.items()))


_beating: list[Heartbeat] = []  # at most one: that of the command


def spoken() -> None:
    """Somebody else wrote a line for a person."""
    for one in _beating:
        one.said = time.monotonic()


class Heartbeat:
    """Lines on stderr with the time since it began. Quiet while `paused`: then something else tells of the work."""

    def __init__(self, name: str, *, stream: IO[str] | None = None, first: float = FIRST, every: float = EVERY):
        self._name, self._stream, self._first, self._every = name, stream, first, every
        self._began = self.said = time.monotonic()
        self.paused = 0
        self._spoke = False
        self._state, self._closed, self._heard = State(), threading.Event(), contextlib.ExitStack()

    def note(self, text: str) -> None:
        self._spoke, self.said = True, time.monotonic()
        print(printable(f"[{clock(self.said - self._began)}] {text}"), file=self._stream or sys.stderr, flush=True)

    def _hear(self, what: str, done: int, of: int) -> None:
        self._state.hear(what, done, of)
        if done < of and not self.paused and time.monotonic() - self.said > OFTEN:
            self.note(self._state.text())

    def _beat(self) -> None:
        while not self._closed.wait(min(0.25, self._first / 4)):
            silent = time.monotonic() - self.said
            if not self.paused and silent >= (self._every if self._spoke else self._first):
                with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                    self.note(self._state.text() or f"{self._name}: at work")

    def __enter__(self) -> Heartbeat:
        _beating.append(self)
        self._heard.enter_context(heard(self._hear))
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._heard.close()
        _beating.remove(self)


@contextlib.contextmanager
def instead() -> Iterator[None]:
    """Whoever enters this tells of the work, and the command's heartbeat is quiet."""
    for one in _beating:
        one.paused += 1
    try:
        yield
    finally:
        for one in _beating:
            one.paused -= 1
            one.said = time.monotonic()


def clock(seconds: float) -> str:
    """`4.2s`, `1m12s`, `2h01m`."""
    if seconds < 59.95:  # what rounds to 60.0s is 1m00s
        return f"{seconds:.1f}s"
    minutes = round(seconds) // 60
    return f"{minutes}m{round(seconds) % 60:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"

"""Every error that a user can meet, as one tree, and how their messages are written.

    ParetuneError          exit code 1: something failed while it ran
    |-- ConfigError        exit code 2: the user's mistake, found before anything ran
    |   `-- TaskError      a task that cannot be what its dials ask for
    |-- RewardError        an objective returned something that is not a score
    |-- TrainingError      a training cannot go on (non-finite loss, out of memory, ...)
    `-- StoreError         the run directory: damaged, full, or in use
        `-- BusyError      another process works on the same directory

A message always has three parts: the rule, what was found, and the way out.
"""

from __future__ import annotations

import contextlib
import difflib
import html
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "BusyError",
    "ConfigError",
    "ParetuneError",
    "RewardError",
    "StoreError",
    "TaskError",
    "TrainingError",
    "first_line",
    "html_table",
    "nearest",
    "own_code",
    "printable",
    "raised_by",
    "redacted",
    "refuse_exit",
    "shown",
]


class ParetuneError(Exception):
    """Base of all errors; `exit_code` is what the command line returns."""

    exit_code = 1
    place: tuple[str | int, ...] = ()  # of what is wrong, within what was read or built

    def __init__(self, rule: str, *, found: str, remedy: str):
        found, remedy = redacted(found), redacted(remedy)  # a message ends in logs
        parts = (text if len(text) <= 1000 else f"{text[:900]} ... ({len(text)} characters)" for text in (rule, found, remedy))
        rule, found, remedy = parts
        super().__init__(rule, found, remedy)
        self.rule, self.found, self.remedy = rule, found, remedy

    def __str__(self) -> str:
        return f"{self.rule}\n  found:  {self.found}\n  remedy: {self.remedy}"

    def __reduce__(self):  # keyword-only arguments do not survive pickling by default
        return _rebuild, (type(self), self.rule, self.found, self.remedy)


class ConfigError(ParetuneError):
    """The request itself is wrong; nothing was run and nothing was lost."""

    exit_code = 2


class TaskError(ConfigError):
    """A task that misses a dial refuses to exist."""


class RewardError(ParetuneError):
    """An objective raised, or returned a wrong length, a string or an infinity."""


class TrainingError(ParetuneError):
    """A training stopped; its last checkpoint is kept."""


class StoreError(ParetuneError):
    """The run directory cannot be read or written."""


class BusyError(StoreError):
    """Another process holds the run directory."""


def _rebuild(kind: type[ParetuneError], rule: str, found: str, remedy: str) -> ParetuneError:
    return kind(rule, found=found, remedy=remedy)


# What a terminal or a reader's eye would obey instead of showing it: controls but tab and line end, bidi marks, half surrogates.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# How keys look, and what they are called where one stands beside its name. Every repetition is bounded: texts may be long, and hostile.
KEY = re.compile(
    r"\b((sk|pk|rk)[-_](?=[\w-]{0,60}\d)(?=[\w-]{0,60}[a-z])|(hf|gsk|ghp|gho|ghs|glpat|xox[a-z]|nvapi|r8|pplx)[-_](?=[\w-]{0,60}\d))[\w-]{16,}"
    r"|\b(AKIA[0-9A-Z]{16}|AIza[\w-]{30}|eyJ[\w-]{16,200}\.[\w-]{8,}[\w.-]*)|(?<=Bearer )[\w.~+/-]{8,}=*"
)
SECRET = r"(?:(?:api|access|secret|private|auth|subscription|signing)[-_ ]?key|(?:access|auth|api|bearer|refresh|session)[-_ ]?token"
SECRET += r"|passw(?:or)?d|passphrase|pwd|secret|authorization|credentials?|cookie)"
IN_URL = re.compile(
    rf"(:/{{1,2}})[^/\s@?#'\"]{{1,300}}(?=@)|((?:{SECRET}|(?<=[?&])(?:key|token|auth|sig|signature))=)[^&\s'\"#]+", re.IGNORECASE
)
NAMED = re.compile(rf"({SECRET}\\?['\"]?\s{{0,9}}[=:]\s{{0,9}}\\?['\"]?)(?!\*)[^\s'\",}}\\]+", re.IGNORECASE)


def printable(text: str) -> str:
    """The text with control characters, bidi marks and half surrogates as escapes: it can be printed, and moves nothing on a terminal."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def first_line(said: str | BaseException) -> str:
    """The first line of a message, or of an error's; an error without one, such as a bare `assert`, is named by its type."""
    text = str(said).strip()
    none = "no message" if isinstance(said, str) else type(said).__name__
    return text.splitlines()[0] if text else none


def redacted(text: str) -> str:
    """The text with *** in place of keys, passwords and what a URL carries of them."""
    masked = IN_URL.sub(lambda found: f"{found[1] or found[2]}***", str(text))
    return NAMED.sub(r"\1***", KEY.sub("***", masked))


def html_table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A plain table for notebooks; every text is escaped."""
    cells = ["<tr>" + "".join(f"<td>{html.escape(printable(text))}</td>" for text in row) + "</tr>" for row in rows]
    titles = "".join(f"<th>{html.escape(printable(text))}</th>" for text in head)
    top = f"<caption>{html.escape(printable(caption))}</caption><thead><tr>{titles}</tr></thead>"
    return f"<table>{top}<tbody>{''.join(cells)}</tbody></table>"


SHOWN = 60  # names in one message


# What recipes, suites and calls said before version 0.2 -> what they say now.
RENAMED = {
    "distil": "distill",
    "face": "active_objectives",
    "frozen": "frozen_adapters",
    "here": "in-process",
    "labelled": "labeled",
    "level": "mixing",
    "mixer": "mixing",
    "normalise": "normalize",
    "normalised": "normalized",
    "optimiser": "optimizer",
    "quantise": "quantize",
    "scalarise_at": "scalarize_at",
    "scalariser": "scalarizer",
}


def shown(value: Any) -> str:
    """Any value as a message shows it: `repr` on one line of at most 80 characters, without control characters."""
    try:
        text = repr(value)
    except Exception:  # 5,000 digits, or a class of the user's own
        text = f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:81])
    return text if len(text) <= 80 else text[:77] + "..."


INSTALLED = ("stdlib", "platstdlib", "purelib", "platlib")
PACKAGES = (*(sysconfig.get_path(name) for name in INSTALLED), str(Path(__file__).parent), "<frozen")


def raised_by(error: BaseException) -> str:
    """What code of a user's own raised, and where: "ValueError: no (rewards.py, line 3)". Also of `sys.exit` and of broken exceptions."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(PACKAGES):
            place = f" ({Path(file).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    try:
        said = " ".join(str(error).split())[:500]
    except Exception:
        said = "its text raises, too"
    return f"{type(error).__name__}{': ' if said else ''}{said}{place}"


@contextlib.contextmanager
def own_code(kind: type[ParetuneError], rule: str, remedy: str) -> Iterator[None]:
    """Around code of a user's own: whatever it raises, `sys.exit` too, becomes a `kind`; what it prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (KeyboardInterrupt, ParetuneError):
        raise
    except BaseException as error:
        raise kind(rule, found=raised_by(error), remedy=remedy) from error


@contextlib.contextmanager
def refuse_exit() -> Iterator[None]:
    """Turn a `sys.exit` of code that Paretune runs into an error: it would end the work in silence, with any exit code."""
    try:
        yield
    except SystemExit as error:
        rule = "code that Paretune runs returns or raises, and does not end the process"
        raise TrainingError(rule, found=raised_by(error), remedy="raise an error there that says what is wrong") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: what it is called now, else the closest known ones first; of very many, the closest `SHOWN`."""
    known = sorted(known)
    if RENAMED.get(name) in known:
        return f"it is called {RENAMED[name]!r} since version 0.2"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    shown, rest = known, ""
    if len(known) > SHOWN:
        shown = sorted(difflib.get_close_matches(name, known, n=SHOWN, cutoff=0.0))
        rest = f", ... ({len(known)} in all)"
    choices = f"choose one of {', '.join(shown)}{rest}" if known else "nothing is registered here"
    return f"did you mean {close[0]!r}? otherwise {choices}" if close else choices


# How far long work is

"""What a person sees of a run: the counts, the time left, and that nothing in a record can break it."""

import io
import time
from pathlib import Path

import pytest

from paretune.runs import display as display_module
from paretune.runs.display import Bars, Display, Lines, display
from paretune.runs.jobs import CELL, TRAIN, Job, Outcome


def job(kind, n):
    return Job(kind=kind, key=f"{kind}{n}", label=f"{kind} number {n}", task="t", path=Path("x"))


def ended(kind, n, seconds, message=None):
    error = None if message is None else {"message": message}
    return Outcome(job(kind, n), seconds, error)


def test_time_left_from_the_mean_of_each_kind(monkeypatch):
    monkeypatch.setattr(display_module.time, "monotonic", lambda: 1000.0)
    shown = Display(cells=4, side_by_side=2)
    for n in range(6):
        shown.wanted(job(TRAIN, n))
    shown.finished(ended(TRAIN, 0, 100.0))
    shown.finished(ended(TRAIN, 1, 200.0))
    assert shown.state() == "trainings 2/6, cells 0/4, 0.0s", "no cell is known yet"
    shown.finished(ended(CELL, 0, 30.0))
    # 4 trainings of 150 s and 3 cells of 30 s, two at a time
    assert shown.state() == "trainings 2/6, cells 1/4, 0.0s, 5m45s left"
    shown.given_up("a cell", "its training failed")
    assert shown.state() == "trainings 2/6, cells 2/4, 0.0s, 5m30s left"


def test_time_left_from_the_steps_of_what_runs(monkeypatch):
    """Two of four trainings run, two at a time: one is a quarter through after 30 s, the other half after 50 s, told 10 s ago."""
    clock = [1000.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: clock[0])
    shown = Display(cells=0, side_by_side=2)
    for n in range(4):
        shown.wanted(job(TRAIN, n))
    assert "left" not in shown.state()
    shown.progress(job(TRAIN, 0), {"step": 10, "steps": 40, "seconds": 30.0})
    shown.progress(job(TRAIN, 1), {"step": 20, "steps": 40, "seconds": 50.0})
    clock[0] += 10
    # 90 and 50 less 10 each, and two more of (120 + 100) / 2
    assert shown.state().endswith(f", {(80 + 40 + 220) // 2 // 60}m{(80 + 40 + 220) // 2 % 60}s left")
    shown.finished(ended(TRAIN, 1, 80.0))
    # 80, and two of (80 + 120) / 2
    assert shown.state().endswith(", 2m20s left")
    shown.progress(job(TRAIN, 2), {"step": 0})
    assert shown.state().endswith(", 2m20s left"), "a record without times says nothing of time"


def test_lines_say_at_once_what_begins_and_then_what_runs():
    stream = io.StringIO()
    with Lines(cells=0, stream=stream, every=0.05) as shown:
        shown.wanted(job(TRAIN, 0))
        shown.wanted(job(TRAIN, 1))
        assert [line.partition("] ")[2] for line in stream.getvalue().splitlines()] == ["training train number 0"]
        deadline = time.monotonic() + 10
        while "nothing was logged yet" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        shown.progress(job(TRAIN, 0), {"step": 3, "steps": 12, "rewards": {"a": 0.5}, "kl": 0.1, "tokens_per_s": 50.0, "seconds": 6.0})
        while "3/12 a 0.500" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        shown.progress(job(TRAIN, 1), {"step": 4, "warnings": {"cut": "answers were cut off"}})
    text = stream.getvalue()
    assert "at work; nothing was logged yet" in text
    assert "train number 0: 3/12 a 0.500 | KL 0.100 | 50 tokens/s" in text
    assert "] train number 1, step 4: answers were cut off" in text
    time.sleep(0.2)
    assert stream.getvalue() == text, "nothing is said after the end"


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0s"), (59.94, "59.9s"), (60, "1m00s"), (119.7, "2m00s"), (7265, "2h01m")])
def test_durations(seconds, text):
    assert display_module.clock(seconds) == text


def test_lines_show_the_first_line_of_what_failed():
    stream = io.StringIO()
    shown = Lines(cells=1, stream=stream)
    shown.wanted(job(TRAIN, 0))
    shown.finished(ended(TRAIN, 0, 1.0, "a reward is a number\n  found:  'x'"))
    shown.given_up("m on t", "")
    _, first, second = stream.getvalue().splitlines()
    assert first.endswith("] training train number 0 failed: a reward is a number")
    assert second.endswith("] cell m on t failed: no message")


@pytest.mark.parametrize("record", [{}, {"step": 3, "steps": 10}, {"rewards": {"a": None, "b": 0.25}, "kl": 0.5, "tokens_per_s": 1234.5}])
def test_bars_survive_any_record(record, capfd):
    with Bars(cells=1) as shown:
        for n in range(2):
            shown.wanted(job(TRAIN, n))
            shown.progress(job(TRAIN, n), record)
        shown.finished(ended(TRAIN, 0, 1.0))
        shown.finished(ended(TRAIN, 1, 1.0, "[bold]no[/bold]"))
        shown.finished(ended(CELL, 0, 1.0))
    text = capfd.readouterr().err
    assert "trained train number 0 in 1.0s" in text
    assert "failed: [bold]no[/bold]" in text, "messages are not markup"


def test_the_display_that_fits(capsys):
    assert type(display(show=False, cells=0)) is Display
    assert type(display(show=True, cells=0)) is Lines, "here stderr is no terminal"

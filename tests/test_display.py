"""What a person sees of a run: the counts, the time left, and that nothing in a record can break it."""

import io
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


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0s"), (59.94, "59.9s"), (60, "1m00s"), (119.7, "2m00s"), (7265, "2h01m")])
def test_durations(seconds, text):
    assert display_module._clock(seconds) == text


def test_lines_show_the_first_line_of_what_failed():
    stream = io.StringIO()
    shown = Lines(cells=1, stream=stream)
    shown.wanted(job(TRAIN, 0))
    shown.finished(ended(TRAIN, 0, 1.0, "a reward is a number\n  found:  'x'"))
    shown.given_up("m on t", "")
    first, second = stream.getvalue().splitlines()
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

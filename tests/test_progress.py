"""What long work says of itself: loops, the command's heartbeat, the time that is left, and nothing of other libraries."""

import dataclasses
import io
import time
import warnings

import numpy as np
import pytest

from learner_cases import SMALL, TASK
from paretune import progress
from paretune.methods.base import Method
from paretune.progress import Heartbeat, State, clock, counted, during, heard, instead, spoken
from paretune.registry import METHODS
from paretune.runs.forecast import Chain, Expected, Forecast, expected, foreseen
from paretune.runs.suite import fit
from paretune.training.learners.exact import ExactGradient
from paretune.training.learners.policy_gradient import PolicyGradient
from recipe_files import tiny_model, write_recipe


def test_loops_say_n_of_m_to_whoever_listens():
    seen, state = [], State()

    def hear(what, done, of):
        state.hear(what, done, of)
        seen.append(state.text())

    with heard(hear):
        for _ in counted("measuring preference", ["a", "b"]):
            with during("loading the model"):
                pass
        assert list(counted("nothing", [])) == []
    list(counted("unheard", [1]))
    assert seen == [
        "measuring preference 1 of 2",
        "measuring preference 1 of 2, loading the model",
        "measuring preference 1 of 2",
        "measuring preference 2 of 2",
        "measuring preference 2 of 2, loading the model",
        "measuring preference 2 of 2",
        "",
        "",
    ]


def lines_of(stream, count, within=10.0):
    deadline = time.monotonic() + within
    while stream.getvalue().count("\n") < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return [line.partition("] ")[2] for line in stream.getvalue().splitlines()]


def test_a_command_speaks_soon_and_then_now_and_then():
    stream = io.StringIO()
    with Heartbeat("fit", stream=stream, first=0.05, every=0.1):
        assert lines_of(stream, 1) == ["fit: at work"]
        with during("loading the model"):
            assert lines_of(stream, 2)[1] == "loading the model"
        with instead():  # somebody else tells
            told = stream.getvalue()
            time.sleep(0.3)
            assert stream.getvalue() == told
        for n in counted("measuring preference", range(2)):
            assert lines_of(stream, 3 + n)[2 + n].startswith("measuring preference")
    told = stream.getvalue()
    time.sleep(0.2)
    assert stream.getvalue() == told, "nothing is said after the end"
    assert not progress._beating


def test_a_command_that_is_quick_or_speaks_itself_has_no_heartbeat():
    stream = io.StringIO()
    with Heartbeat("ls", stream=stream, first=0.3):
        for _ in range(8):
            time.sleep(0.1)
            spoken()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0s"), (59.94, "59.9s"), (59.97, "1m00s"), (60, "1m00s"), (7265, "2h01m")])
def test_durations(seconds, text):
    assert clock(seconds) == text


# The time that is left


def jobs(*sizes, kind="training"):
    return [Expected(f"{kind} {n}", (kind,), size) for n, size in enumerate(sizes)]


def test_a_job_takes_its_size_and_chains_are_not_side_by_side():
    """Three trainings of sizes 1, 1 and 4, the last after the others: of two workers one is idle at the end."""
    first, second, last = jobs(1, 1, 4)
    forecast = Forecast(side_by_side=2)
    forecast.foresee("m", Chain([[first, second], [last]]))
    assert (forecast.left(0.0), forecast.trainings) == ((None, False), 3)
    forecast.progress(first.key, {"step": 1, "steps": 2, "seconds": 5.0}, now=5.0)
    assert forecast.left(5.0) == (5 + 40, False) or forecast.left(5.0) == (10 + 40, False)
    forecast.ended(first.key, 10.0, training=True)
    forecast.ended(second.key, 12.0, training=True)
    assert forecast.left(12.0) == (pytest.approx(44), False)
    forecast.progress(last.key, {"step": 3, "steps": 4, "seconds": 60.0}, now=100.0)
    assert forecast.left(110.0) == (pytest.approx(10), False), "of a training that runs, what its steps say"
    forecast.ended(last.key, 80.0, training=True)
    assert forecast.left(200.0) == (0, False)


def test_the_nearest_kind_counts_and_cells_have_their_own():
    chain = Chain([[Expected("b", (("pg", 3), "pg"), 2.0)]], Expected("cell", ("cell",)), more=True)
    forecast = Forecast(cells=3)
    forecast.foresee("m", chain)
    forecast.foresee("n", Chain([[Expected("a", (("pg", 1), "pg"), 1.0)]], Expected("other", ("cell",))))
    forecast.ended("a", 5.0, training=True)
    assert forecast.left(0.0) == (None, True), "no cell has been measured"
    forecast.ended("other", 7.0, training=False)
    assert forecast.left(0.0) == (10 + 7 + 7, True), "a bridge as an expert; its cell, and one that is not known of"
    forecast.given_up("m")
    assert forecast.left(0.0) == (7, False)


def test_responses_that_are_measured_in_the_end_count():
    (one,) = jobs(1)
    forecast = Forecast(drawn=100)
    forecast.foresee("m", Chain([[one]]))
    speeds = {"sampling": 10.0, "rewards": 1e9, "reference": 20.0, "update": 1.0}
    forecast.progress(one.key, {"step": 1, "steps": 2, "seconds": 8.0, "length": 2.0, "tokens_per_s_of": speeds}, now=0.0)
    assert forecast.left(0.0)[0] == pytest.approx(8 + 100 * (0.2 + 0.1))


def test_plans_are_foreseen_without_results_as_far_as_they_do_not_look():
    learner = ExactGradient(steps=10)
    for name, sizes, more in (
        ("bridge", [[10, 10], [10]], False),
        ({"name": "warm-sweep", "share": 0.5}, None, False),
        ({"name": "placed", "more": 2}, [[10, 10]], True),
        ("reference", [], False),
    ):
        waves, open_end = foreseen(METHODS.build(name), TASK, learner, {}, 0)
        assert open_end is more, name
        if sizes is not None:
            assert [[expected(*item).size for item in wave.items()] for wave in waves] == sizes, name
        else:
            assert len(waves) > 2
    effort = METHODS.build({"name": "bridge", "effort": 3.0})
    assert [expected(*item).size for wave in foreseen(effort, TASK, learner, {}, 0)[0] for item in wave.items()] == [10, 10, 30]


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_plan_that_fails_without_results_is_not_what_fails(error):
    class Looks(Method):
        def plan(self, task, learner, done, seed):
            raise error("no results")

        def policy(self, task, learner, done, seed): ...

    assert foreseen(Looks(), TASK, ExactGradient(), {}, 0) == ([], True)


def test_what_is_left_of_a_bridge_is_known_while_its_experts_train(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("paretune.runs.display.EVERY", 0.1)
    fit(TASK, "bridge", learner=PolicyGradient(**SMALL), root=tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert lines[0].startswith("[trainings 0/3, ")
    done = [line for line in lines if "] trained " in line]
    assert [line.split(",")[0] for line in done] == ["[trainings 1/3", "[trainings 2/3", "[trainings 3/3"]
    assert "left]" in done[0]
    assert ", 0.0s left]" in done[-1]


# Other libraries


def test_nothing_of_other_libraries_is_seen_in_a_notebook(tmp_path, capfd):
    """No bar and no warning while a model is loaded, adapted, trained and saved."""
    from paretune.runs.recipes.recipe import load_recipe

    recipe = load_recipe(write_recipe(tmp_path, tiny_model(), learner={"name": "pg", "samples": 8, "batch": 8, "group": 4, "rank": 2}))
    capfd.readouterr()  # of making the model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(recipe.task, "experts", learner=recipe.learner, root=tmp_path / "runs", progress=False).save(tmp_path / "family")
    assert [str(one.message) for one in caught if not issubclass(one.category, DeprecationWarning | ResourceWarning)] == []
    assert "".join(capfd.readouterr()) == ""


def test_objectives_that_say_nothing_relate_without_numpys_warnings():
    from paretune.evaluation.relations import _dials

    within_PMM = np.full((3, 3, 3), np.nan)
    within_PMM[:, 0, 1] = within_PMM[:, 1, 0] = [0.1, 0.2, 0.3]
    one = {"spread": 0.1, "constant": False, "paid": 1.0, "noise": 0.0}
    value = dataclasses.make_dataclass("Value", ["value"])
    pairs = [{"within": value(v)} for v in (0.2, np.nan, np.nan)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dials([one] * 3, pairs, within_PMM, np.zeros((3, 4)), True)["context"] == pytest.approx(np.std([0.1, 0.2, 0.3]))


def test_a_fit_speaks_from_its_command_to_its_measuring(tmp_path, monkeypatch):
    """Without a terminal, on stderr alone: at work, what trains, what is measured."""
    from typer.testing import CliRunner

    from paretune.cli import app

    monkeypatch.setitem(Heartbeat.__init__.__kwdefaults__, "first", 0.01)
    monkeypatch.setattr(progress, "OFTEN", 0.0)
    recipe = write_recipe(tmp_path, tiny_model(), learner={"name": "pg", "samples": 8, "batch": 8, "group": 4, "rank": 2}, method="uniform")
    done = CliRunner().invoke(app, ["fit", str(recipe), "--samples", "2", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    lines = done.stderr.splitlines()
    assert lines[0].endswith("] fit: at work")
    assert any("training pg at (0.5, 0.5)" in line for line in lines)
    assert any("measuring preference 2 of 5" in line for line in lines)
    assert all(line.startswith(("[", "1 training to do", "measuring", "while it trained")) for line in lines), done.stderr
    assert done.stdout.startswith("{")

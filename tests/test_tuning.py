"""`paretune tune`: it finds what is better, never looks at what is judged, and a kill changes nothing but the clock."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import sys
import time

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from paretune.cli import app
from paretune.errors import BusyError, ConfigError, ParetuneError, RewardError, StoreError, TrainingError
from paretune.evaluation import evaluate as evaluation
from paretune.runs import tune as tuning
from paretune.runs.recipes.recipe import load_recipe
from paretune.runs.store import ARTIFACTS, Store
from paretune.runs.suite import load_suite
from paretune.runs.tune import _Score, _Scores, read_plan, tune, validation_preferences
from paretune.tasks.preferences import KEEP_OUT, judged_preferences
from paretune.training.cost import Cost, read_cost, then
from recipe_files import tiny_model, write_recipe

SUITE = {
    "name": "tiny",
    "tasks": [{"name": "exact-v1", "alphabet": 3, "length": 2, "prompt_count": 2, "width": 32, "layers": 1}],
    "learner": {"name": "exact", "steps": 6, "rank": 2, "lr": 1e-5},
    "methods": [{"name": "experts", "mixing": "parameter"}],
    "seeds": [0],
    "tune": {"learner.lr": [1e-5, 3e-2, "log"]},
}


def written(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in {**SUITE, **changes}.items() if value is not None}, sort_keys=False))
    return path


def plan_of(folder, **changes):
    return read_plan(written(folder, **changes))


def refused(*parts: str):
    return pytest.raises(ConfigError, match=".*".join(f"(?s:.*){re.escape(part)}" for part in parts))


def told(found):
    """What a search found, without what a clock put there."""
    return [(trial.number, trial.values, trial.state, trial.value, trial.cells, trial.cost.tokens) for trial in found.trials]


def quality(lr: float, seed: int) -> float:
    """A stand-in for training: best at lr = 1e-3, another level for every seed."""
    return 1.0 - abs(np.log10(lr) + 3) / 3 - 0.3 * seed


@pytest.fixture
def fake(monkeypatch):
    """Scores that cost nothing; returns the list of (lr, steps, seed) that were asked for."""
    asked = []

    def of(self, task, method, learner, seed):
        asked.append((learner.lr, learner.steps, seed))
        if learner.lr > 2e-2:
            raise TrainingError("a training goes on", found="a loss of NaN", remedy="lower lr")
        return _Score(dict.fromkeys(tuning.METRICS, quality(learner.lr, seed)), (), Cost(validation_samples=1))

    monkeypatch.setattr(_Scores, "of", of)
    return asked


def test_it_finds_a_learning_rate_that_learns(tmp_path):
    found = tune(plan_of(tmp_path), trials=7, root=tmp_path / "root", prune=False)
    own, best = found.trials[0], found.best
    assert own.values == {"learner.lr": 1e-5}  # the file's own settings come first
    assert own.value == pytest.approx(0.0, abs=0.02)
    assert best.value > 0.2
    assert best.values["learner.lr"] > 1e-3
    assert best.value == max(trial.value for trial in found.trials)
    document = yaml.safe_load(found.yaml())
    assert document["learner"]["lr"] == best.values["learner.lr"]
    again = read_plan(written(tmp_path / "pasted", **document))
    assert tune(again, trials=1, root=tmp_path / "root", prune=False).best.value == best.value

    trained = Store(tmp_path / "root").published(ARTIFACTS)
    assert len(trained) == 2 * len({trial.values["learner.lr"] for trial in found.trials})
    spent = then(read_cost(tmp_path / "root" / ARTIFACTS / key) for key in trained)
    assert found.cost == spent
    assert Cost.from_json(json.loads((found.folder / "ledger.json").read_text())) == spent
    assert json.loads((found.folder / "tuning.json").read_text())["best"]["value"] == best.value


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks a process that has loaded torch")
def test_killed_with_kill_9_it_ends_with_the_same_trials_and_trains_nothing_twice(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, seeds=[0, 1], tune={"learner.lr": [1e-4, 3e-2, "log"], "learner.rank": [1, 2]})
    want = tune(plan, trials=6, root=tmp_path / "calm")
    root, kills = tmp_path / "root", 0
    monkeypatch.setattr("paretune.runs.tune.fit", lambda *args, **given: fit(*args, **given, log=tmp_path / "log"))

    def fit(*args, log, **given):
        from paretune.runs.suite import fit as real

        made = real(*args, **given)
        with log.open("a") as file:
            file.write(" ".join(made.meta["trainings"]) + "\n")
        return made

    for more in (1, 2, 2):
        child, goal = os.fork(), len(list(root.glob("artifacts/*/DONE"))) + more
        if child == 0:
            try:
                tune(plan, trials=6, root=root)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 120
        while len(list(root.glob("artifacts/*/DONE"))) < goal and time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert kills == 3
    found = tune(plan, trials=6, root=root)
    assert told(found) == told(want)
    assert found.cost.tokens == want.cost.tokens
    assert Store(root).published(ARTIFACTS) == Store(tmp_path / "calm").published(ARTIFACTS)
    monkeypatch.setattr("paretune.runs.tune.fit", lambda *_, **__: pytest.fail("a family was fitted again"))
    assert told(tune(plan, trials=6, root=root)) == told(want)


def test_the_seed_decides_and_more_trials_go_on(tmp_path, fake):
    plan = plan_of(tmp_path)
    first = tune(plan, trials=4, root=tmp_path / "a")
    whole = tune(plan, trials=12, root=tmp_path / "b")
    assert told(first) == told(whole)[:4]
    before = len(fake)
    assert told(tune(plan, trials=12, root=tmp_path / "a")) == told(whole)
    assert len(fake) - before <= 2 * 8  # of a rung and a training each
    assert told(tune(plan, trials=4, root=tmp_path / "a", seed=1))[1:] != told(first)[1:]
    assert whole.best.value > 0.9
    random = [quality(lr, 0) for lr in np.geomspace(1e-5, 2e-2, 12)]
    later = [trial.value for trial in whole.trials[6:] if trial.value is not None]
    assert statistics.fmean(later) > statistics.fmean(random)  # it looks where it was good


def test_a_trial_is_given_up_below_the_median_of_earlier_ones_on_the_same_cells(tmp_path, fake):
    found = tune(plan_of(tmp_path, seeds=[0, 1, 2]), trials=14, root=tmp_path)
    seen: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for trial in found.trials:
        means, pruned = [], False
        if trial.values["learner.lr"] > 2e-2:
            assert (trial.state, trial.value, trial.cells) == ("failed", None, 0)
            assert "a loss of NaN" in trial.message
            continue
        for step in range(3):
            means.append(statistics.fmean(quality(trial.values["learner.lr"], seed) for seed in range(step + 1)))
            pruned = len(seen[step]) >= 4 and means[-1] < statistics.median(seen[step]) and step < 2
            if pruned:
                break
        for step, mean in enumerate(means):
            seen[step].append(mean)
        assert (trial.state, trial.cells) == ("pruned" if pruned else "done", len(means))
        assert trial.value == pytest.approx(means[-1])
    states = [trial.state for trial in found.trials]
    assert "pruned" in states
    assert found.best.state == "done"
    calm = tune(plan_of(tmp_path, seeds=[0, 1, 2]), trials=14, root=tmp_path, prune=False)
    assert "pruned" not in [trial.state for trial in calm.trials]


def test_with_one_cell_a_quarter_of_the_budget_comes_first(tmp_path, fake):
    found = tune(plan_of(tmp_path, learner={"name": "exact", "steps": 40}), trials=10, root=tmp_path)
    steps = {trial.number: [n for lr, n, _ in fake if lr == trial.values["learner.lr"]] for trial in found.trials}
    for trial in found.trials:
        assert steps[trial.number] == {"done": [10, 40], "pruned": [10], "failed": [10]}[trial.state]
        assert trial.cells == (trial.state == "done")
    assert {"done", "pruned"} <= {trial.state for trial in found.trials}


def test_choices_whole_numbers_and_settings_of_the_method(tmp_path, fake):
    space = {"learner.steps": [2, 64, "log"], "method.mixing": ["parameter", "logit"], "learner.lr": [1e-4, 1e-3, "linear"]}
    found = tune(plan_of(tmp_path, tune=space), trials=8, root=tmp_path, prune=False)
    for trial in found.trials:
        assert isinstance(trial.values["learner.steps"], int)
        assert 2 <= trial.values["learner.steps"] <= 64
        assert trial.values["method.mixing"] in ("parameter", "logit")
        assert 1e-4 <= trial.values["learner.lr"] <= 1e-3
    assert len({trial.values["learner.steps"] for trial in found.trials}) > 2
    assert yaml.safe_load(found.yaml())["methods"] == [{"name": "experts", "mixing": found.best.values["method.mixing"]}]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_validation_preferences_are_spread_and_not_judged(count):
    for seed in range(5):
        w_WM = validation_preferences(count, seed=seed)
        assert np.allclose(w_WM.sum(1), 1)
        assert np.abs(w_WM[:, None] - judged_preferences(count)).max(-1).min() > KEEP_OUT
        assert np.ptp(w_WM, axis=0).min() > 0.3
    assert not np.array_equal(w_WM, validation_preferences(count, seed=0))


def test_it_measures_on_training_prompts_at_validation_preferences(tmp_path, monkeypatch):
    seen, real = [], evaluation.evaluate

    def watched(task, family, **given):
        seen.append(given)
        return real(task, family, **given)

    monkeypatch.setattr(evaluation, "evaluate", watched)
    plan = plan_of(tmp_path)
    value = tune(plan, trials=1, metric="hypervolume", root=tmp_path, prune=False).best.value
    (given,) = seen
    assert given["splits"] == ("train",)
    assert np.array_equal(given["w_WM"], validation_preferences(2, seed=0))
    family = tuning.fit(plan.cells[0][0], plan.method, learner=plan.learner, root=tmp_path, progress=False)
    split = real(plan.cells[0][0], family, w_WM=given["w_WM"], splits=("train",)).metrics["splits"]["train"]
    assert value == split["hypervolume"]["share"]
    assert tune(plan, trials=1, metric="mean", root=tmp_path, prune=False).best.value == split["attainment"]["mean"]
    assert len(seen) == 1  # the scores of one setting are kept for every metric


def test_a_recipe_is_tuned_on_its_training_prompts_and_says_what_it_cost(tmp_path, monkeypatch):
    learner = {"name": "pg", "samples": 32, "batch": 8, "group": 4, "rank": 2}
    recipe = write_recipe(
        tmp_path, tiny_model(), method={"name": "linear", "points": 2}, learner=learner, tune={"learner.lr": [0.001, 0.01]}
    )
    assert load_recipe(recipe).learner.samples == 32  # `fit` leaves tune: alone
    result = CliRunner().invoke(
        app, ["tune", str(recipe), "--trials", "1", "--samples", "4", "--json", "--write", str(tmp_path / "best.yaml"), "--metric", "mean"]
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    (trial,) = found["trials"]
    assert trial["state"] == "done"
    assert trial["cost"]["samples"] == 2 * (8 + 32)  # a quarter first, then all, for both objectives
    assert trial["cost"]["validation_samples"] == 2 * 4 * (8 + 1)
    assert found["folder"].startswith(str(tmp_path / "runs" / "tune"))
    best = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert best["learner"] == {**learner, "lr": found["best"]["learner"]["lr"]}
    assert best["method"] == {"name": "linear", "points": 2}
    load_recipe(write_recipe(tmp_path, tiny_model(), **best))


def test_the_command_prints_a_table_and_lines_to_paste(tmp_path, fake):
    path, root = written(tmp_path), tmp_path / "root"
    asked = ["tune", str(path), "--trials", "3", "--root", str(root), "--no-prune"]
    result = CliRunner().invoke(app, [*asked, "learner.rank=4", "--method", "linear"])
    assert result.exit_code == 0, result.stderr
    assert "trial 2 of 3: learner.lr=" in result.stderr
    assert "learner.lr" in result.stdout
    assert "methods: [{name: linear}]" in result.stdout
    assert re.search(r"learner: \{name: exact, steps: 6, rank: 4, lr: [\d.e-]+\}", result.stdout)
    assert "all of them cost 0 samples" in result.stdout
    result = CliRunner().invoke(app, [*asked, "seeds=[100,3]"])
    assert result.exit_code == 2
    assert "nothing is tuned on the seeds 100 to 109" in result.stderr
    assert "seeds 100" in result.stderr
    for place, found in (("gone/best.yaml", "cannot write"), (".", "is a directory")):
        before = len(fake)
        result = CliRunner().invoke(app, [*asked, "--seed", "1", "--write", str(tmp_path / place)])
        assert result.exit_code == 2
        assert "what is written at the end can be written" in result.stderr
        assert found in result.stderr
        assert len(fake) == before  # nothing was trained


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        ({"learner.rate": [1, 2]}, ("learner exact has the fields that it declares", "'learner.rate'", "choose one of")),
        ({"learner.stpes": [1, 2]}, ("'learner.stpes' (tiny.yaml, line", "did you mean 'steps'")),
        ({"method.mixr": ["logit"]}, ("method experts has the fields", "did you mean 'mixing'")),
        ({"learning.lr": [1, 2]}, ("what is tuned is learner.FIELD or method.FIELD", "did you mean 'learner.lr'")),
        ({"lr": [1e-4, 1e-2, "log"]}, ("what is tuned is learner.FIELD or method.FIELD", "'lr'")),
        ({"learner.lr": []}, ("a list of values, or a range", "learner.lr: []")),
        ({"learner.lr": 0.1}, ("a list of values, or a range", "learner.lr: 0.1")),
        ({"learner.lr": [1e-2, 1e-4, "log"]}, ("a range is [low, high, log] with low below high", "0.01, 0.0001")),
        ({"learner.lr": [1e-2, 1e-2, "linear"]}, ("a range is [low, high, linear]",)),
        ({"learner.lr": [0, 1e-2, "log"]}, ("with low below high, above 0", "[0, 0.01, 'log']")),
        ({"learner.lr": ["a", "b", "log"]}, ("a range is [low, high, log]",)),
        ({"learner.lr": ["log"]}, ("a range is [low, high, log]",)),
        ({"learner.steps": [1.5, 8, "linear"]}, ("learner.steps is a whole number",)),
        ({"learner.alpha": [1.5, 8, "linear"]}, ("learner.alpha is a whole number",)),
        ({"learner.steps": [0, 8]}, ("at least 1", "steps=0", "tiny.yaml, line")),
        ({"method.mixing": ["logits"]}, ("method experts: mixing", "'logits'")),
        ({}, ("tune: says which fields are searched", "{}")),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(tmp_path, space, parts):
    with refused(*parts):
        plan_of(tmp_path, tune=space)


def test_bad_requests(tmp_path, fake, monkeypatch):
    with refused("nothing is tuned on the seeds 100 to 109", "seeds 100, 109", "development seeds, 0 to 9"):
        plan_of(tmp_path, seeds=[109, 3, 100])
    with refused("one method is tuned at a time", "2: name=experts; name=linear", "--method NAME"):
        plan_of(tmp_path, methods=["experts", "linear"])
    assert read_plan(written(tmp_path, methods=["experts", {"name": "linear", "points": 3}]), method="linear").method["points"] == 3
    with refused("one method is tuned at a time", "mixing=logit"):
        plan_of(tmp_path, methods=[{"name": "experts", "mixing": ["logit", "parameter"]}])
    with refused("a method is known by its name", "'expertss'", "did you mean 'experts'"):
        read_plan(written(tmp_path), method="expertss")
    with refused("a suite says its seeds", "repeats = 2"):
        read_plan(written(tmp_path), repeats=2)
    plan = plan_of(tmp_path)
    with refused("a search climbs one metric", "'best'", "worst"):
        tune(plan, metric="best", root=tmp_path)
    with refused("a search has at least one trial", "trials = 0"):
        tune(plan, trials=0, root=tmp_path)
    tune(plan, trials=1, root=tmp_path)
    (folder,) = tmp_path.glob("tune/tiny-*")
    with Store(folder).lock(), pytest.raises(BusyError, match="one process writes"):
        tune(plan, trials=2, root=tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with refused("a search by Optuna needs Optuna", 'pip install "paretune[search]"') as caught:
        tune(plan, trials=1, root=tmp_path)
    assert "search" not in caught.value.remedy.partition("[search]")[2]


def test_without_a_space_the_learning_rate_is_searched_around_its_own(tmp_path):
    (dimension,) = plan_of(tmp_path, tune=None, learner={"name": "exact", "lr": 0.02}).space
    assert (dimension.path, dimension.log) == ("learner.lr", True)
    assert (dimension.low, dimension.high) == pytest.approx((0.002, 0.2))


def test_who_is_told_of_trials_sees_how_far_their_trainings_are(tmp_path, capsys):
    plan = plan_of(tmp_path)
    tune(plan, trials=1, root=tmp_path / "quiet")
    assert "trained exact" not in capsys.readouterr().err
    tune(plan, trials=1, root=tmp_path / "told", say=lambda _: None)
    shown = capsys.readouterr()
    assert "trained exact" in shown.err
    assert shown.out == ""


def test_settings_outside_of_the_space_are_no_trial(tmp_path, fake):
    found = tune(plan_of(tmp_path, tune={"learner.lr": [1e-4, 1e-3, "log"]}), trials=2, root=tmp_path)
    assert all(trial.values["learner.lr"] >= 1e-4 for trial in found.trials)


def test_where_no_trial_ends_well_there_is_no_best(tmp_path, fake):
    with pytest.raises(ParetuneError, match="a search ends with a trial that was trained and measured"):
        tune(plan_of(tmp_path, tune={"learner.lr": [0.03, 0.04]}), trials=2, root=tmp_path)


def test_a_reward_that_fails_in_one_trial_is_a_failed_trial(tmp_path, fake, monkeypatch):
    paid = _Scores.of

    def of(self, task, method, learner, seed):
        if learner.rank in broken:
            raise RewardError("an objective returns a score", found="infinity", remedy="return a number")
        return paid(self, task, method, learner, seed)

    monkeypatch.setattr(_Scores, "of", of)
    broken, lines = {2}, []
    plan = plan_of(tmp_path, tune={"learner.rank": [1, 2, 4]})
    found = tune(plan, trials=5, root=tmp_path, say=lines.append)
    assert [(trial.values["learner.rank"], trial.state) for trial in found.trials[:1]] == [(2, "failed")]  # the file's own rank
    for trial, line in zip(found.trials, lines, strict=True):
        assert (trial.state == "failed") == (trial.values["learner.rank"] == 2)
        assert line.endswith("failed: an objective returns a score") == (trial.state == "failed")
    assert found.best.values["learner.rank"] != 2
    asked = len(fake)
    assert told(tune(plan, trials=5, root=tmp_path)) == told(found)  # a failed trial stands as it is
    assert len(fake) == asked


def test_rewards_that_fail_in_a_row_end_the_search_and_are_tried_again(tmp_path, fake, monkeypatch):
    """As where a judge is down for an hour: nothing of it stands, and the trials are those of a search without it."""
    paid, calls = _Scores.of, []

    def of(self, *given):
        calls.append(given)
        if down[0] <= len(calls) <= down[1]:
            raise RewardError("a judge answers", found="connection refused", remedy="start it")
        return paid(self, *given)

    plan = plan_of(tmp_path, tune={"learner.lr": [1e-5, 1e-2, "log"]})
    whole = tune(plan, trials=8, root=tmp_path / "whole", prune=False)
    monkeypatch.setattr(_Scores, "of", of)
    down = (4, 99)
    with pytest.raises(RewardError, match="no fault of the settings") as error:
        tune(plan, trials=8, root=tmp_path, prune=False)
    assert "3 settings in a row, the last: a judge answers" in error.value.found
    assert len(calls) == 6
    down = (7, 8)  # two more, which do not end it; then the judge is there, and they stand
    found = tune(plan, trials=8, root=tmp_path, prune=False)
    assert told(found)[:3] == told(whole)[:3]
    assert [trial.state for trial in found.trials] == [*["done"] * 3, *["failed"] * 2, *["done"] * 3]
    down = (0, 0)
    again = tune(plan, trials=8, root=tmp_path / "again", prune=False)
    assert told(again) == told(whole)


def test_a_search_that_stopped_without_rewards_is_that_of_one_which_never_did(tmp_path, fake, monkeypatch):
    paid = _Scores.of
    plan = plan_of(tmp_path, tune={"learner.lr": [1e-5, 1e-2, "log"]})
    whole = tune(plan, trials=6, root=tmp_path / "whole", prune=False)
    monkeypatch.setattr(_Scores, "of", lambda *_: (_ for _ in ()).throw(RewardError("a judge answers", found="none", remedy="start it")))
    with pytest.raises(RewardError):
        tune(plan, trials=6, root=tmp_path, prune=False)
    monkeypatch.setattr(_Scores, "of", paid)
    assert told(tune(plan, trials=6, root=tmp_path, prune=False)) == told(whole)


def test_a_disk_that_fails_is_no_trial(tmp_path, monkeypatch):
    def of(*_):
        raise StoreError("the run directory has room on its disk", found="none", remedy="free some")

    monkeypatch.setattr(_Scores, "of", of)
    with pytest.raises(StoreError, match="room"):
        tune(plan_of(tmp_path), trials=2, root=tmp_path)


def test_a_whole_number_among_choices_is_the_files_own_setting_too(tmp_path, fake):
    plan = plan_of(tmp_path, methods=["bridge"], tune={"method.effort": [4, 2, 1]})  # 1.0 is the default
    assert [dimension.parameter(value) for dimension in plan.space for value in (1.0, 4, True, 3)] == ["1", "4", None, None]
    assert tune(plan, trials=1, root=tmp_path).trials[0].values == {"method.effort": 1}


def test_a_mistake_in_the_files_own_settings_is_the_users_and_in_a_combination_a_failed_trial(tmp_path):
    learner = {"name": "pg", "samples": 16, "batch": 8, "group": 4, "rank": 2}
    with refused("batch is a multiple of group"):
        plan_of(tmp_path, learner={**learner, "group": 3}, tune={"learner.rank": [1, 2]})
    given = {"name": "linear", "points": 2}
    plan = plan_of(tmp_path, learner=learner, methods=[given], tune={"learner.batch": [8, 16], "learner.group": [4, 8]}, samples=4)
    plan = type(plan)(**{**plan.__dict__, "learner": {**learner, "samples": 8}})  # 16 of 8 samples: refused where it is built
    found = tune(plan, trials=4, root=tmp_path, prune=False)
    for trial in found.trials:
        assert trial.state == ("failed" if trial.values["learner.batch"] == 16 else "done"), trial
    assert {trial.state for trial in found.trials} == {"done", "failed"}


def test_what_a_suite_keeps_of_itself_has_no_search_in_it(tmp_path):
    suite, _ = load_suite(written(tmp_path))
    assert suite.tune == SUITE["tune"]
    assert "tune" not in suite.model_dump()

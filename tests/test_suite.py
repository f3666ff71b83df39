"""Suites and `fit` with fakes, in this process: what is run, shared, charged and named; and what goes wrong without harm."""

import errno
import json
import os
import socket

import numpy as np
import pytest
import torch

from bench_fixture import Bench, fakes_loaded, results, suite_of
from paretune.errors import BusyError, ConfigError, RewardError, StoreError, TrainingError
from paretune.registry import LEARNERS, METHODS, TASKS
from paretune.runs.store import ARTIFACTS, CELLS, Store
from paretune.runs.suite import expand, fit, load_suite, members_of, method, run_suite, task


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "outside"))
    with fakes_loaded(monkeypatch) as fakes:
        yield Bench(tmp_path, fakes)


def cells_of(**suite):
    return [member.label for member in members_of(*load_suite(suite_of(**suite)))]


# What a suite stands for


def test_lists_are_a_product_in_the_order_written(bench):
    found = cells_of(tasks=[{"name": "fake-task", "mode": ["b", "c"], "level": [1, 2]}], seeds=[0, 5])
    assert found == [
        f"fake-method on fake-task({'level=' + str(level)}, mode={mode}{seed})"
        for mode in "bc"
        for level in (1, 2)
        for seed in ("", ", seed=5")
    ]


def test_methods_vary_within_a_task(bench):
    found = cells_of(tasks=["fake-task", "fake-unseeded"], methods=["fake-method", {"name": "fake-method", "points": [2, 3]}], seeds=[7])
    assert found == [  # points=2 is the default, and a cell stands once
        "fake-method on fake-task(seed=7)",
        "fake-method(points=3) on fake-task(seed=7)",
        "fake-method on fake-unseeded, seed 7",
        "fake-method(points=3) on fake-unseeded, seed 7",
    ]


def test_a_field_that_is_a_list_takes_it_as_its_value(bench):
    found = expand(TASKS, {"name": "fake-task", "shape": [3, 4], "level": [0.0, 1.0]})
    assert found == [{"name": "fake-task", "shape": [3, 4], "level": level} for level in (0.0, 1.0)]
    assert TASKS.build(found[0]).shape == (3, 4)
    assert expand(LEARNERS, {"name": "exact", "targets": ["q_proj", "v_proj"]})[0]["targets"] == ["q_proj", "v_proj"]  # str or tuple


@pytest.mark.parametrize(
    ("lines", "found", "remedy"),
    [
        ("tasks: [fake-tusk]", "'fake-tusk' (s.yaml, line 2)", "did you mean 'fake-task'?"),
        ("tasks: [{name: fake-task, levle: 1}]", "'levle' (s.yaml, line 2)", "did you mean 'level'?"),
        ("tasks:\n  - fake-task\n  - {name: fake-task, level: 101}", "level = 101 (s.yaml, line 4)", "lower it"),
        ("tasks: [{name: fake-task, level: []}]", "level: [] (s.yaml, line 2)", "give a value"),
        ("tasks: [{name: fake-task, seed: 3}]", "seed: 3 (s.yaml, line 2)", "move it to seeds:"),
        ("tasks: []", "[] (s.yaml, line 2)", "for example tasks:"),
        ("methods: [fake-methud]", "'fake-methud' (s.yaml, line 2)", "did you mean 'fake-method'?"),
        ("learner: {name: fake, steps: many}", "'many' (s.yaml, line 2)", "see `paretune show fake`"),
        ("seeds: [1.5]", "1.5 (s.yaml, line 2)", "for example seeds: [100"),
        ("splits: [train, tset]", "'tset' (s.yaml, line 2)", "train, test or both"),
        ("samples: 0", "0 (s.yaml, line 2)", "a whole number"),
        ("sead: 1", "'sead' (s.yaml, line 2)", "did you mean 'seeds'?"),
    ],
)
def test_mistakes_are_found_before_anything_runs(bench, tmp_path, lines, found, remedy):
    rest = {k: v for k, v in suite_of().items() if k not in ("name", lines.split(":")[0])}
    path = tmp_path / "s.yaml"
    path.write_text("\n".join(["name: s", lines, *(f"{k}: {json.dumps(v)}" for k, v in rest.items())]))
    with pytest.raises(ConfigError) as caught:
        run_suite(path, bench.root)
    assert caught.value.found == found
    assert caught.value.remedy.startswith(remedy)
    assert not bench.root.exists()


def test_bad_arguments(bench):
    with pytest.raises(ConfigError, match="did you mean 'local'"):
        bench.run(executor="lokal")
    with pytest.raises(ConfigError, match="workers = 0"):
        run_suite(suite_of(), bench.root, workers=0)
    with pytest.raises(ConfigError, match="name: "):
        bench.run(name="../elsewhere")


# Keys


def keys(**suite):
    return {member.key for member in members_of(*load_suite(suite_of(**suite)))}


def test_keys_follow_everything_that_counts(bench, tmp_path, monkeypatch):
    data = tmp_path / "data.txt"
    data.write_text("one")
    base = {"tasks": [{"name": "fake-task", "data": str(data), "level": 1}]}
    first = keys(**base)
    assert keys(tasks=[{"level": 1.0, "data": str(data), "name": "fake-task"}]) == first, "order and spelling do not count"
    assert keys(**base, methods=[{"name": "fake-method", "points": 2}]) == first, "nor does writing a default"
    others = [
        keys(**base, seeds=[2]),
        keys(**base, samples=65),
        keys(**base, splits=["test"]),
        keys(**base, learner={"name": "fake", "rate": 0.2}),
        keys(**base, methods=[{"name": "fake-method", "mode": "y"}]),
        keys(tasks=[{**base["tasks"][0], "level": 2}]),
    ]
    data.write_text("two")
    others.append(keys(**base))
    data.write_text("one")
    assert keys(**base) == first
    monkeypatch.setattr(bench.fakes.FakeLearner, "version", 2)
    others.append(keys(**base))
    monkeypatch.undo()
    assert len({frozenset(k) for k in [first, *others]}) == 1 + len(others)


def test_a_new_default_is_a_new_key(bench):
    """The description spells every field out, so that results do not silently pass from one default to the next."""
    described = members_of(*load_suite(suite_of()))[0].spec
    assert described["learner"] == {"name": "fake", "version": 1, "steps": 4, "pause": 0.0, "rate": 0.1}
    assert described["evaluation"] == {"version": 2, "splits": ["train", "test"], "samples": 64}


# Running


def test_a_run_trains_each_thing_once_and_charges_every_method(bench):
    summary = bench.run(methods=["fake-method", {"name": "fake-method", "stages": 2}, {"name": "fake-method", "points": 0}])
    assert (summary.count("new"), summary.trained, summary.reused, summary.failed) == (3, 4, 0, [])
    assert len(bench.log("complete")) == 4, "the second method shares the two trainings of the first"
    cells = {json.loads((bench.store.cell(row.key) / "cell.json").read_text())["method"]["stages"]: row for row in summary.cells[:2]}
    staged = json.loads((bench.store.cell(cells[2].key) / "cell.json").read_text())
    assert [len(wave) for wave in staged["waves"]] == [2, 1, 1]
    assert staged["trainings"] == [key for wave in staged["waves"] for key in wave]
    # Each training: 40 samples, 4 steps, 4 s, 101 bytes of memory, 64 stored. The search: 7 evaluations, 21 samples, 0.5 s.
    assert staged["cost"]["total"] == {
        "samples": 160,
        "tokens": 0,
        "steps": 16,
        "flops": 0.0,
        "seconds": 16.5,
        "evaluations": 7,
        "validation_samples": 21,
        "memory_bytes": 101,
        "storage_bytes": 256,
    }
    critical = {"samples": 120, "steps": 12, "seconds": 12.5, "storage_bytes": 256}
    assert staged["cost"]["critical_path"] == {**staged["cost"]["total"], **critical}
    assert staged["cost"]["search"]["evaluations"] == 7
    simple = json.loads((bench.store.cell(cells[0].key) / "cell.json").read_text())
    assert simple["cost"]["total"]["samples"] == 80
    assert simple["cost"]["critical_path"]["samples"] == 40
    nothing = json.loads((bench.store.cell(summary.cells[2].key) / "cell.json").read_text())
    assert nothing["waves"] == []
    assert nothing["cost"]["total"]["samples"] == 0


def test_running_again_trains_and_measures_nothing(bench):
    bench.run()
    before = results(bench.root)
    again = bench.run()
    assert (again.count("done"), again.count("new"), again.trained) == (1, 0, 0)
    wider = bench.run(methods=["fake-method", {"name": "fake-method", "mode": "y"}], name="wider")
    assert (wider.count("done"), wider.count("new"), wider.trained, wider.reused) == (1, 1, 0, 2)
    cells = [json.loads(path.read_text()) for path in bench.root.glob("cells/*/cell.json")]
    assert [cell["cost"]["total"]["samples"] for cell in cells] == [80, 80], "what was reused is charged all the same"
    assert {name: results(bench.root)[name] for name in before} == before
    assert len(bench.log("complete")) == 2
    assert bench.store.check() == []


def test_stages_start_from_what_they_were_planned_on(bench):
    bench.run(methods=[{"name": "fake-method", "stages": 1}])
    specs = [bench.store.artifact(key).spec for key in bench.store.published(ARTIFACTS)]
    (last,) = [spec for spec in specs if spec.init_from]
    assert sorted(last.init_from) == sorted(spec.key for spec in specs if not spec.init_from)


def test_what_a_cell_holds(bench):
    (row,) = bench.run(seeds=[3], samples=5, splits=["test"]).cells
    folder = bench.store.cell(row.key)
    assert {p.name for p in folder.iterdir()} == {"cell.json", "curve.npz", "env.json", "DONE"}
    cell = json.loads((folder / "cell.json").read_text())
    assert cell["metrics"]["samples"] == 5
    assert cell["seed"] == cell["task"]["seed"] == cell["metrics"]["seed"] == 3
    assert cell["card"] == {"category": "baseline"}
    assert set(cell["seconds"]) == {"task", "policy", "evaluation"}
    with np.load(folder / "curve.npz", allow_pickle=False) as curves:
        names = ["w_WM", "rewards_WSM", "kl_WS", "prompt_S", "beta", "exact"]
        assert set(curves) == {f"test.{name}" for name in names}
        assert curves["test.rewards_WSM"].shape == (2, 3, 2)
        assert float(curves["test.rewards_WSM"].mean()) == cell["metrics"]["mean"]
    for env in bench.root.glob("*/*/env.json"):
        found = json.loads(env.read_text())
        assert found["packages"]["numpy"] == np.__version__
        assert found["threads"] == torch.get_num_threads()
        assert socket.gethostname() not in env.read_text()
        assert str(bench.root) not in env.read_text()
        assert os.path.expanduser("~/") not in env.read_text()


def test_the_suite_is_written_down(bench):
    summary = bench.run(seeds=[1, 2])
    written = json.loads((bench.root / "suites" / "s.json").read_text())
    assert list(written["cells"]) == [row.key for row in summary.cells]
    assert written["suite"]["seeds"] == [1, 2]


def test_dry_run_says_what_would_run(bench):
    suite = suite_of(methods=["fake-method", {"name": "fake-method", "stages": 1}])
    plan = run_suite(suite, bench.root, dry_run=True)
    assert not bench.root.exists()
    assert [row.status for row in plan.trainings] == ["planned"] * 2, "distinct ones, of the first wave"
    assert [row.status for row in plan.cells] == ["planned"] * 2
    assert "4 to do" in plan.text()
    assert "fake at (0, 1) on fake-task(seed=1)" in plan.text()
    bench.run()
    plan = run_suite(suite, bench.root, dry_run=True)
    assert [row.status for row in plan.trainings] == ["done", "done", "planned"], "and of the next, where the first is there"
    assert [row.status for row in plan.cells] == ["done", "planned"]
    assert [row.key for row in run_suite(suite, bench.root, executor="in-process", progress=False).cells] == [row.key for row in plan.cells]


def test_dry_run_says_why_a_cell_would_fail(bench):
    plan = run_suite(suite_of(methods=[{"name": "fake-method", "breaks": "plan"}, "fake-method"]), bench.root, dry_run=True)
    assert [row.status for row in plan.cells] == ["failed", "planned"]
    lines = plan.text().splitlines()
    (place,) = [n for n, line in enumerate(lines) if line.startswith("failed")]
    assert lines[place].endswith(":")
    assert lines[place + 1] == "  no plan"


def test_lines_for_a_log(bench, capsys):
    run_suite(suite_of(), bench.root, executor="in-process")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("[trainings 0/2, cells 0/1, ")
    assert "] training fake at (0, 1) on fake-task(seed=1)" in lines[0]
    assert lines[1].startswith("[trainings 1/2, cells 0/1, ")
    assert "] trained fake at (0, 1) on fake-task(seed=1) in 0." in lines[1]
    assert "left] measured fake-method on fake-task(seed=1) in" in lines[3]
    bench.tell("fail-2")
    run_suite(suite_of(seeds=[2]), bench.root, executor="in-process")
    assert "cell fake-method on fake-task(seed=2) failed: its training" in capsys.readouterr().err


# Failures


def test_a_failed_training_stops_only_what_needs_it(bench):
    bench.tell("fail-1")
    summary = bench.run(seeds=[1, 2], methods=["fake-method", {"name": "fake-method", "points": 0}])
    assert [row.status for row in summary.cells] == ["failed", "new", "new", "new"]
    assert len(summary.failed) == 3  # two trainings and a cell
    for record in bench.store.failures(ARTIFACTS).values():
        assert record["error"] == "RewardError"
        assert "'good' from objective polite" in record["message"]
        assert "fakes.py" in record["traceback"]
    (record,) = bench.store.failures(CELLS).values()
    assert record["message"].startswith("its training ")
    assert bench.store.check() == []

    bench.tell()
    again = bench.run(seeds=[1, 2], methods=["fake-method", {"name": "fake-method", "points": 0}])
    assert [row.status for row in again.cells] == ["new", "done", "done", "done"]
    assert bench.store.failures(ARTIFACTS) == bench.store.failures(CELLS) == {}
    assert bench.twice() == [], "tried again from the checkpoint"


@pytest.mark.parametrize("breaks", ["plan", "policy"])
def test_a_failed_cell_stops_only_itself(bench, breaks):
    summary = bench.run(methods=[{"name": "fake-method", "breaks": breaks}, "fake-method"])
    assert [row.status for row in summary.cells] == ["failed", "new"]
    (record,) = bench.store.failures(CELLS).values()
    assert record["error"] == "ValueError"
    assert f"no {breaks}" in record["traceback"]
    assert bench.run(methods=[{"name": "fake-method", "breaks": breaks}]).count("failed") == 1


def test_a_plan_without_end_is_stopped(bench, monkeypatch):
    monkeypatch.setattr("paretune.runs.plan.MAX_WAVES", 3)
    summary = bench.run(methods=[{"name": "fake-method", "stages": 9}])
    assert summary.count("failed") == 1
    assert "pure function" in summary.cells[0].message


def test_content_that_changes_during_a_run_is_refused(bench, tmp_path, monkeypatch):
    data = tmp_path / "data.txt"
    data.write_text("one")
    members = members_of(*load_suite(suite_of(tasks=[{"name": "fake-task", "data": str(data)}])))
    monkeypatch.setattr("paretune.runs.suite.members_of", lambda *_: members)
    data.write_text("two")
    summary = bench.run()
    assert summary.count("failed") == 1
    assert "fake-task: other content" in summary.trainings[0].message


def test_full_disk_stops_the_run_and_loses_nothing(bench, monkeypatch):
    real, published = os.replace, []

    def replace(source, target):
        if os.path.basename(source).startswith(".wip-"):
            if len(published) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            published.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StoreError, match=r"room on its disk[\s\S]*free some space"):
        bench.run(seeds=[1, 2, 3])
    monkeypatch.setattr(os, "replace", real)
    assert bench.store.failures(ARTIFACTS) == bench.store.failures(CELLS) == {}, "nobody's fault"
    assert bench.store.check() == []
    bench.run(seeds=[1, 2, 3])
    assert len(bench.log("complete")) == 6
    assert bench.twice() == []


def test_full_disk_during_a_training(bench):
    bench.tell("full-1")
    with pytest.raises(StoreError, match="every checkpoint is kept"):
        bench.run()
    bench.tell()
    assert bench.run().count("new") == 1
    assert bench.twice() == []


def test_busy(bench):
    with Store(bench.root).lock(), pytest.raises(BusyError, match=f"process {os.getpid()} "):
        bench.run()
    assert bench.run().count("new") == 1


# fit, task, method


def test_fit_shares_the_store_with_suites(bench):
    family = fit(task("fake-task", seed=1), method("fake-method"), learner="fake", root=bench.root, seed=1, progress=False)
    assert len(family.digests) == 2
    assert family.meta["ledger"]["total"]["samples"] == 80
    assert family.meta["ledger"]["critical_path"]["samples"] == 40
    assert bench.run().trained == 0
    again = fit("fake-task", {"name": "fake-method"}, learner=bench.fakes.FakeLearner(rate=0.1, steps=4), root=bench.root, progress=False)
    assert again.digests != family.digests, "another seed"
    assert len(bench.log("complete")) == 4


def test_fit_converts_what_was_made_by_hand(bench):
    """1 and 1.0 give one key: a learner made by calling its class is checked like one from YAML."""
    fit("fake-task", "fake-method", learner=bench.fakes.FakeLearner(rate=1), root=bench.root, seed=1, progress=False)
    fit("fake-task", "fake-method", learner={"name": "fake", "rate": 1.0}, root=bench.root, seed=1, progress=False)
    assert len(bench.log("complete")) == 2


def test_fit_raises_what_went_wrong(bench):
    bench.tell("fail-0")
    with pytest.raises(RewardError, match="a reward is a number"):
        fit("fake-task", "fake-method", learner="fake", root=bench.root, progress=False)
    bench.tell()
    assert len(fit("fake-task", "fake-method", learner="fake", root=bench.root, progress=False).digests) == 2
    assert bench.twice() == []
    with pytest.raises(ValueError, match="no plan"):
        fit("fake-task", method("fake-method", breaks="plan"), learner="fake", root=bench.root, progress=False)


def test_fit_names_the_traceback_of_a_foreign_error(bench, monkeypatch):
    monkeypatch.setattr(bench.fakes, "log", lambda line: 1 / 0)
    with pytest.raises(TrainingError, match=r"ZeroDivisionError.*\n.*FAILED\.json") as caught:
        fit("fake-task", "fake-method", learner="fake", root=bench.root, progress=False)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    where = caught.value.remedy.removeprefix("the traceback is in ")
    with open(where) as handle:
        assert json.load(handle)["error"] == "ZeroDivisionError"


def test_ctrl_c_in_fit_keeps_the_checkpoint(bench, monkeypatch):
    real = bench.fakes.log

    def interrupted(line):
        real(line)
        if line.endswith(" 2"):
            raise KeyboardInterrupt

    monkeypatch.setattr(bench.fakes, "log", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped; finished work and checkpoints are kept in"):
        fit("fake-task", "fake-method", learner="fake", root=bench.root, progress=False)
    monkeypatch.setattr(bench.fakes, "log", real)
    fit("fake-task", "fake-method", learner="fake", root=bench.root, progress=False)
    assert bench.twice() == []


def test_unknown_names_say_the_nearest(bench):
    with pytest.raises(ConfigError, match="did you mean 'fake-method'"):
        method("fake-methot")
    with pytest.raises(ConfigError, match="did you mean 'level'"):
        task("fake-task", levl=3)
    assert METHODS["fake-method"] is bench.fakes.FakeMethod

"""Where a training's log goes beside train.jsonl: TensorBoard, trackio and W&B as installed; what breaks, and what is said twice."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from learner_cases import SMALL, TASK, W, killed, log_of, spec_of, weights
from paretune.errors import ConfigError
from paretune.registry import LEARNERS, describe, unkeyed
from paretune.runs.config import load
from paretune.runs.jobs import Tasks, run_job, train_job
from paretune.runs.store import Store
from paretune.runs.suite import fit
from paretune.training.learners.embedded import EmbeddedLearner
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.loop.loggers import LOGGERS, Logger, Reporter, figures_of, named_loggers

LEARNER = PolicyGradient(**SMALL, log_samples=2, log_samples_every=2)


@pytest.fixture
def kept(monkeypatch):
    """A logger of this process, under the names of packages that are always there: what it was told."""
    seen = SimpleNamespace(figures=[], responses=[], closed=0, fails=None, configs=[])

    class Kept(Logger):
        def __init__(self, folder, *, key, label, config):
            seen.configs.append(config)

        def figures(self, step, figures):
            if step == seen.fails:
                raise RuntimeError("no network")
            seen.figures.append((step, dict(figures)))

        def responses(self, step, rows):
            seen.responses.append((step, list(rows)))

        def close(self):
            seen.closed += 1

    monkeypatch.setitem(LOGGERS, "json", Kept)
    monkeypatch.setitem(LOGGERS, "csv", Kept)
    return seen


def trained(root, learner=LEARNER, *, task=TASK, progress=None):
    """One training as a worker does it."""
    store, tasks = Store(root), Tasks()
    tasks.put(task)
    spec = spec_of(learner, task=task)
    run_job(train_job(store, spec, learner=learner).path, tasks=tasks, progress=progress)
    return store.artifact(spec.key).path


def expected(folder):
    """(step, name) -> number, of every figure of a log but what its clock says."""
    return {(line["step"], name): value for line in log_of(folder) for name, value in figures_of(line).items()}


# Of every logger


def test_a_run_that_is_watched_is_the_same_training(tmp_path, kept):
    watched = dataclasses.replace(LEARNER, report_to="json")
    assert describe(watched) == describe(LEARNER) == describe(PolicyGradient(**SMALL))
    assert "report_to" not in describe(watched)
    places = {"processes": 1, "processes_timeout": 1800.0, "shard": False, "rollouts_url": None, "rollouts_args": ""}
    assert unkeyed(watched) == {"report_to": "json", "log_samples": 2, "log_samples_every": 2, **places}
    one, other = trained(tmp_path / "a", watched), trained(tmp_path / "b", PolicyGradient(**SMALL))
    assert one.name == other.name
    assert weights(one) == weights(other)
    assert [config["preference"] for config in kept.configs] == [list(W)]
    assert kept.closed == 1
    assert {(step, name): value for step, figures in kept.figures for name, value in figures.items()} == expected(one)
    assert {step for step, _ in kept.responses} == {0, 2, 4}
    assert set(kept.responses[0][1][0]) == {"prompt", "response"}


def test_fit_hands_it_on_to_what_trains(tmp_path, kept):
    learner = dataclasses.replace(LEARNER, report_to=("csv", "json", "csv"))
    family = fit(TASK, {"name": "linear", "points": 2}, learner=learner, root=tmp_path, progress=False)
    assert sorted(tuple(config["preference"]) for config in kept.configs) == [(0, 1), (0, 1), (1, 0), (1, 0)], "each once for each"
    assert len(family.meta["trainings"]) == 2
    assert kept.closed == 4


def test_a_logger_that_fails_is_warned_of_once_and_the_training_goes_on(tmp_path, kept):
    kept.fails, seen = 2, []
    path = trained(tmp_path, dataclasses.replace(LEARNER, report_to="json"), progress=seen.append)
    assert [line["step"] for line in log_of(path)] == [2, 4]
    said = [record.get("warnings") for record in seen if "step" in record]
    assert said == [{"report_to json": said[0]["report_to json"]}, None]
    assert "RuntimeError: no network" in said[0]["report_to json"]
    assert [step for step, _ in kept.responses] == [0, 2], "before it failed"
    assert not any("warnings" in line for line in log_of(path)), "it is no figure of the training"


def test_a_killed_training_is_not_reported_twice(tmp_path, kept):
    """Killed at the line of step 3, after the checkpoint of step 2: step 3 is made again, and was sent before."""
    learner = dataclasses.replace(LEARNER, log_every=1)
    spec, work = spec_of(learner), tmp_path / "work"
    settings = {"work": work, "folder": tmp_path / "logs", "key": spec.key, "label": "a training", "config": spec.to_json()}

    class Watched:
        def train(self, spec, task, folder, progress):
            with Reporter("json", **settings, progress=progress) as reporter:
                learner.train(spec, task, folder, progress=reporter)

    killed(Watched(), spec, TASK, work, 3)
    assert not kept.figures, "the other process has them"
    assert json.loads((tmp_path / "logs" / "report_to" / f"{spec.key}.json").read_text()) == {"json": 3}
    Watched().train(spec, TASK, work, None)
    assert [step for step, _ in kept.figures] == [4]
    late = {**settings, "folder": tmp_path / "other"}
    with Reporter("json", **late) as reporter:  # named only now: it gets what there is, before the line that comes
        reporter({**log_of(work)[-1], "step": 5})
    assert [step for step, _ in kept.figures] == [4, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("given", "rule", "remedy"),
    [
        ("tensorbord", "report_to names loggers, or none", "tensorboard"),
        (["wandb", "all"], "report_to names loggers, or none", "known"),
        (3, "report_to", ""),
    ],
)
def test_a_logger_that_is_none_is_refused(given, rule, remedy):
    with pytest.raises(ConfigError) as error:
        LEARNERS.build({"name": "pg", "report_to": given})
    assert rule in error.value.rule
    assert remedy in error.value.remedy or remedy == "known"


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_that_is_not_installed_is_refused_with_its_extra(name, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError) as error:
        fit(TASK, "linear", learner=dataclasses.replace(LEARNER, report_to=name), root=tmp_path)
    assert (error.value.found, f"paretune[{name}]" in error.value.remedy) == ("not installed", True)
    assert not (tmp_path / "artifacts").exists()
    file = tmp_path / "suite.yaml"
    file.write_text(f"learner:\n  name: pg\n  report_to: [{name}]\n")
    document = load(file)
    with pytest.raises(ConfigError, match=r"suite\.yaml"), document.at("learner"):
        LEARNERS.build(document.data["learner"])


def test_none_and_each_once():
    assert named_loggers("none") == named_loggers([]) == ()
    assert all(isinstance(LEARNERS[name], type) and LEARNERS.build(name).report_to == "none" for name in ("pg", "exact", "trl", "distill"))
    assert issubclass(PolicyGradient, EmbeddedLearner)


# The real ones


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_tensorboard_gets_every_figure(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = trained(tmp_path, dataclasses.replace(LEARNER, report_to="tensorboard"))
    (folder,) = (tmp_path / "logs" / "tensorboard").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found = {(one.step, tag): one.value for tag in events.Tags()["scalars"] for one in events.Scalars(tag)}
    same(found, expected(path))
    assert sorted(tag for tag in events.Tags()["tensors"]) == ["responses/0/text_summary", "responses/1/text_summary"]


def test_trackio_gets_every_figure(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    path = trained(tmp_path, dataclasses.replace(LEARNER, report_to=["trackio"]))
    (run,) = SQLiteStorage.get_runs("paretune")
    rows = SQLiteStorage.get_logs("paretune", run)
    found = {(row["step"], name): value for row in rows for name, value in row.items() if name not in ("step", "timestamp", "responses")}
    same(found, expected(path))
    assert sum("responses" in row for row in rows) == 3
    assert "rackio" not in "".join(capfd.readouterr()), "what it prints is not ours"


def records_of(data):
    """The records of W&B's own file: LevelDB's log, in blocks of 32 KiB, after a header of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (1 << 15) - place % (1 << 15) < 7:
            place += (1 << 15) - place % (1 << 15)
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or the end of one
            yield whole
            whole = b""


def test_wandb_gets_every_figure_offline(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    path = trained(tmp_path, dataclasses.replace(LEARNER, report_to="wandb"))
    (file,) = (tmp_path / "logs" / "wandb").glob("offline-run-*/*.wandb")
    found, tables = {}, 0
    for data in records_of(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        step = record.history.step.num
        tables += any("responses" in name for name in items)
        found |= {(step, name): value for name, value in items.items() if not name.startswith("_") and "responses" not in name}
    same(found, expected(path))
    assert tables == 3
    assert "wandb" not in "".join(capfd.readouterr())
    assert Path(file).parent.name.endswith(path.name), "the run has the training's key"


def test_a_training_that_is_called_directly_reports_too(tmp_path, kept):
    learner, heard = dataclasses.replace(LEARNER, report_to="json"), []
    learner.train(spec_of(learner), TASK, tmp_path / "mine", progress=heard.append)
    got = {(step, name): value for step, figures in kept.figures for name, value in figures.items()}
    assert got == expected(tmp_path / "mine")
    assert kept.closed == 1
    assert [line["step"] for line in heard] == [line["step"] for line in log_of(tmp_path / "mine")]
    assert (tmp_path / "logs" / "report_to" / f"{spec_of(learner).key}.json").is_file()

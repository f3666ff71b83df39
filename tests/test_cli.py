"""The command line as a person or a script meets it: flags that do not change by accident, pure JSON, one message per mistake."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from paretune import __version__
from paretune.cli import app
from paretune.cli.family import _even_weights
from paretune.registry import LEARNERS, METHODS, OBJECTIVES, TASKS
from paretune.types import Preference
from recipe_files import tiny_model, write_recipe
from report_cells import run_directory

RUNNER = CliRunner()

RAY = {"--address", "--cpus-per-job", "--gpus-per-job", "--memory-per-job", "--wait", "--pass-env"}

# Every command with its arguments and flags. Change this only together with the README and the changelog.
COMMANDS = {
    "demo": {"--root", "--seeds", "--workers", "--json"},
    "ls": {"KIND", "ROOT", "--plugin", "--json"},
    "show": {"NAME", "--plugin", "--json"},
    "fit": {"RECIPE", "OVERRIDES", "--workers", "--executor", *RAY, "--samples", "--dry-run", "--plugin", "--json"},
    "normalize": {"RECIPE", "OVERRIDES", "--column", "--samples", "--limit", "--seed", "--plugin", "--json"},
    "sample": {
        *{"FAMILY", "PROMPTS", "--preference", "--n", "--seed", "--max-new-tokens", "--temperature", "--file"},
        *{"--system", "--raw", "--trust", "--model", "--json"},
    },
    "export": {"FAMILY", "--preference", "--out", "--as", "--dtype", "--license", "--public", "--push", "--trust", "--model", "--json"},
    "explain": {
        *{"FAMILY", "PROMPT", "--preference", "--n", "--response", "--seed", "--max-new-tokens"},
        *{"--html", "--recipe", "--split", "--samples", "--system", "--raw", "--trust", "--model", "--plugin", "--json"},
    },
    "elicit": {
        *{"FAMILY", "PROMPTS", "--file", "--recipe", "--questions", "--enough", "--each", "--seed"},
        *{"--system", "--raw", "--trust", "--model", "--plugin", "--json"},
    },
    "serve": {
        *{"FAMILY", "--host", "--port", "--api-key", "--default", "--max-rows", "--max-queue", "--chunk", "--prefix-cache"},
        *{"--max-body", "--drain", "--engine", "--vllm-args", "--recipe", "--playground", "--device", "--trust", "--model", "--plugin"},
    },
    "chat": {"FAMILY", "--preference", "--seed", "--max-new-tokens", "--temperature", "--system", "--device", "--trust", "--model"},
    "bench": {"SUITE", "OVERRIDES", "--root", "--executor", "--workers", *RAY, "--dry-run", "--plugin", "--json"},
    "report": {"ROOT", "--suite", "--out", "--rows", "--json"},
    "check": {"ROOT", "--json"},
    "log": {"TARGET", "KEY", "--responses", "--json"},
    "compare": {"RECIPE", "OVERRIDES", "--methods", "--seeds", "--samples", "--root", "--workers", "--dry-run", "--plugin", "--json"},
    "init": {"MODEL", "PROMPTS", "--out", "--json"},
    "preview": {"RECIPE", "OVERRIDES", "--prompts", "--n", "--plugin", "--json"},
    "schema": {"--out", "--plugin"},
    "tune": {
        *("TARGET", "OVERRIDES", "--trials", "--metric", "--method", "--repeats", "--samples", "--seed", "--root", "--workers"),
        *("--no-prune", "--write", "--plugin", "--json"),
    },
    "golden": {"WHAT", "TARGET", "--rule", "--case", "--tolerance", "--json"},
    "relate": {
        *("TARGET", "OVERRIDES", "--probe", "--probe-steps", "--prompts", "--group", "--budget", "--results", "--out", "--seed"),
        *("--plugin", "--json"),
    },
}

SUITE = {
    "name": "tiny",
    "tasks": [{"name": "exact-v1", "alphabet": 3, "length": 2, "prompt_count": 4, "width": 32, "rho": [0.0]}],
    "learner": {"name": "exact", "steps": 2, "rank": 2},
    "methods": ["reference", {"name": "experts", "mixing": ["parameter", "logit"]}],
    "seeds": [0],
}


def run(*args: object, code: int = 0):
    result = RUNNER.invoke(app, [str(a) for a in args])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_directory(tmp_path_factory.mktemp("run"))


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SUITE))
    return path


def test_commands_and_flags_are_frozen():
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        found[name] = {p.opts[-1] if p.param_type_name == "option" else p.name.upper() for p in command.params}
    assert found == COMMANDS


def test_every_command_has_help_that_fits_a_terminal():
    for name in COMMANDS:
        text = run(name, "--help").stdout
        assert max(len(line) for line in text.splitlines()) <= 100
        assert "Usage" in text


@pytest.mark.parametrize(("kind", "registry"), [("methods", METHODS), ("tasks", TASKS), ("objectives", OBJECTIVES), ("learners", LEARNERS)])
def test_ls_lists_what_is_registered(kind, registry):
    rows = json.loads(run("ls", kind, "--json").stdout)
    assert {row["name"] for row in rows} == set(registry)
    text = run("ls", kind).stdout
    assert all(name in text for name in registry)


def test_ls_without_a_kind_lists_all_of_them():
    listed = json.loads(run("ls", "--json").stdout)
    assert set(listed) == {"methods", "tasks", "objectives", "learners", "suites"}
    assert "quick" in {row["name"] for row in listed["suites"]}


@pytest.mark.parametrize("registry", [METHODS, TASKS, OBJECTIVES, LEARNERS], ids=lambda r: r.kind)
def test_show_lists_every_field_with_its_default(registry):
    for name in registry:
        things = json.loads(run("show", name, "--json").stdout)
        thing = next(t for t in things if t["kind"] == registry.kind)
        fields = {f.name: f for f in dataclasses.fields(registry[name]) if f.init}
        assert {f["name"] for f in thing["fields"]} == set(fields)
        for shown in thing["fields"]:
            if fields[shown["name"]].default is not dataclasses.MISSING:
                assert shown["default"] == repr(fields[shown["name"]].default)
        assert thing["about"]
        assert name in run("show", name).stdout


def test_show_prints_a_suite_and_the_comment_beside_a_field():
    assert "learner:" in run("show", "quick").stdout
    fields = {f["name"]: f["about"] for f in json.loads(run("show", "pg", "--json").stdout)[0]["fields"]}
    assert fields["warmup"] == "steps of linear warm-up"


@pytest.mark.parametrize(
    ("args", "rule", "remedy"),
    [
        (["show", "expers"], "the name of something that exists", "did you mean 'experts'?"),
        (["ls", "metods"], "lists one kind of thing", "did you mean 'methods'?"),
        (["bench", "quik"], "a suite is a YAML file", "did you mean 'quick'?"),
        (["bench", "missing.yaml"], "", "check the path"),
        (["report", "nowhere"], "a report is made from a run directory", "--root"),
        (["check", "nowhere"], "only a run directory can be checked", "--root"),
        (["fit", "missing.yaml"], "", "check the path"),
        (["sample", "nowhere", "hello", "--preference", "a=1"], "a family is a directory", "paretune fit"),
        (["ls", "methods", "--plugin", "missing.py"], "a plugin is a Python file", "--plugin"),
    ],
)
def test_a_mistake_is_one_message_on_stderr_with_a_way_out_and_code_2(args, rule, remedy):
    result = run(*args, code=2)
    assert result.stdout == ""
    assert rule in result.stderr
    assert "found:" in result.stderr
    assert remedy in result.stderr.split("remedy:")[1]
    assert "Traceback" not in result.stderr


def test_unknown_options_and_commands_are_code_2():
    assert "No such option" in run("bench", "--rot", "x", code=2).stderr
    run("bensh", code=2)


def test_a_programming_error_keeps_its_traceback(monkeypatch, finished):
    monkeypatch.setattr("paretune.report.data.load", lambda *a, **k: 1 / 0)
    result = RUNNER.invoke(app, ["report", str(finished)])
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.exit_code == 1


@pytest.mark.parametrize("message", ["", "stopped by the suite"])
def test_ctrl_c_is_code_130_and_says_that_nothing_is_lost(monkeypatch, suite, message):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt(*([message] if message else []))

    monkeypatch.setattr("paretune.runs.suite.run_suite", stop)
    result = run("bench", suite, "--root", suite.parent / "runs", code=130)
    assert ("checkpoints are kept" in result.stderr) == (message == "")  # the suite says it itself


def test_report_prints_the_leaderboard_and_the_path(finished):
    out = run("report", finished).stdout
    assert "experts logit" in out
    page = Path(out.strip().splitlines()[-1].removeprefix("report: "))
    assert page.is_file()
    data = json.loads(run("report", finished, "--json").stdout)
    assert data["report"] == str(page)
    assert {row["method"] for row in data["leaderboard"]} >= {"linear", "reference"}


def test_check_is_quiet_about_what_is_well_and_names_what_is_not(tmp_path):
    root = run_directory(tmp_path, rhos=(0.0,), seeds=(100,))
    assert "9 results hashed: all as published" in run("check", root).stdout
    victim = next((root / "cells").glob("*/env.json"))
    victim.write_text(victim.read_text().replace("Linux", "linux"))
    result = run("check", root, "--json", code=1)
    assert json.loads(result.stdout)["problems"] == [f"cells/{victim.parent.name}/env.json: the content is not what was published"]
    assert "remedy" in result.stderr


def test_bench_from_suite_to_report_and_again(suite, tmp_path):
    """A whole run through the command line; the second one finds everything done and changes no result."""
    root = tmp_path / "runs"
    planned = json.loads(run("bench", suite, "--root", root, "--dry-run", "--json").stdout)
    assert {row["status"] for row in planned["trainings"]} == {"planned"}
    assert not (root / "cells").exists()

    first = run("bench", suite, "--root", root, "--executor", "in-process", "--json")
    data = json.loads(first.stdout)
    assert (data["run"]["trained"], data["run"]["reused"], len(data["run"]["cells"])) == (2, 0, 3)
    assert {row["method"] for row in data["leaderboard"]} == {"the exact optimum", "reference", "experts parameter", "experts logit"}
    assert Path(data["report"]).is_file()
    reference = next(row for row in data["leaderboard"] if row["method"] == "reference")
    assert reference["attainment_worst_test"] == pytest.approx(0, abs=1e-4)

    again = json.loads(run("bench", suite, "--root", root, "--executor", "in-process", "--json").stdout)
    assert again["run"]["trained"] == 0
    assert {row["status"] for row in again["run"]["cells"]} == {"done"}
    assert again["leaderboard"] == data["leaderboard"]
    assert "all as published" in run("check", root).stdout


def test_bench_takes_overrides_and_goes_on_after_a_failure(suite, tmp_path, monkeypatch):
    """A plugin's method that fails makes code 1, is listed, and stops nothing else."""
    list(METHODS)  # what ships with Paretune is loaded; the plugin is forgotten with this test
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from paretune.methods.base import Card, Method\nfrom paretune.registry import METHODS\n\n\n"
        "@METHODS.register('broken')\n@dataclass(frozen=True)\nclass Broken(Method):\n    card: ClassVar[Card] = Card(\n"
        "        category='baseline', summary='fails', source='none', differs='nothing', hides='nothing',\n"
        "        trainings='0', forwards_per_token='1', zero_shot=True)\n"
        "    def plan(self, task, learner, done, seed):\n        return []\n"
        "    def policy(self, task, learner, done, seed):\n        raise ValueError('no policy today')\n"
    )
    args = ["bench", suite, "learner.steps=1", "methods=[broken, reference]", "--plugin", plugin, "--executor", "in-process", "--json"]
    result = run(*args, "--root", tmp_path / "runs", code=1)
    data = json.loads(result.stdout)
    assert {row["status"] for row in data["run"]["cells"]} == {"new", "failed"}
    assert "no policy today" in result.stderr
    assert "no policy today" in Path(data["report"]).read_text()


def test_fit_then_sample(tmp_path):
    """A recipe on a tiny model: the family is written, found again by a second fit, and sampled; the same seed gives the same text."""
    recipe = write_recipe(tmp_path, tiny_model())
    short = ["learner.samples=16", "learner.batch=8", "learner.group=4", "learner.rank=2", "max_new_tokens=4"]
    fitted = json.loads(run("fit", recipe, *short, "--samples", 4, "--json").stdout)
    along = ["loud only", "mostly loud", "all alike", "mostly brief", "brief only"]
    assert [row["preference"] for row in fitted["measured"]] == ["the untrained model", *along]
    assert fitted["measured"][0]["kl"] == 0
    assert all(0 <= row["brief"] <= 1 for row in fitted["measured"])
    again = run("fit", recipe, *short, "--samples", 0, "--json")
    assert json.loads(again.stdout)["family"] == fitted["family"]
    assert "fitted before" in again.stderr

    args = ["sample", fitted["family"], "Customer: hello\nAgent:", "--preference", "loud=.7,brief=.3", "--n", 3, "--seed", 5]
    texts = json.loads(run(*args, "--json").stdout)[0]["responses"]
    assert len(texts) == 3
    assert json.loads(run(*args, "--json").stdout)[0]["responses"] == texts
    assert texts[0] in run(*args).stdout
    wrong = run("sample", fitted["family"], "hi", "--preference", "laud=.7,brief=.3", code=2)
    assert "did you mean 'loud'" in wrong.stderr


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_ctrl_c_at_a_real_terminal_command(suite, tmp_path):
    """SIGINT while a training runs in the process itself: one message, code 130, and the same command finishes the work."""
    data = yaml.safe_load(suite.read_text())
    data["learner"]["steps"], data["methods"] = 100_000, ["experts"]
    suite.write_text(yaml.safe_dump(data))
    command = [sys.executable, "-m", "paretune", "bench", str(suite), "--root", str(tmp_path / "runs"), "--executor", "in-process"]
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's children are born deaf to it
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listen
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs").glob("artifacts/.wip-*/train.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "kept" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("count", range(2, 9))
def test_the_preference_that_fit_suggests_is_one(count):
    names = [f"o{k}" for k in range(count)]
    weights = Preference.of(names, _even_weights(names)).weights
    assert min(weights) > 0.5 / count


@pytest.mark.parametrize("asked", [["-h"], ["ls", "-h"]])
def test_short_help_and_version(asked):
    assert "Usage: paretune" in " ".join(run(*asked).stdout.split())
    assert run("--version").stdout == f"paretune {__version__}\n"


def test_the_demo_takes_more_judged_seeds(monkeypatch):
    asked = []
    monkeypatch.setattr("paretune.cli.bench._bench", lambda suite, overrides, *_, **__: asked.append((suite, overrides)))
    for given in ([], ["--seeds", "3"]):
        assert RUNNER.invoke(app, ["demo", *given]).exit_code == 0
    assert asked == [("quick", []), ("quick", ["seeds=[100, 101, 102]"])]
    assert RUNNER.invoke(app, ["demo", "--seeds", "11"]).exit_code == 2

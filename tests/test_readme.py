"""The README: short, made of what the code and the committed results say, and its examples run."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from paretune.cli import app
from paretune.registry import METHODS
from recipe_files import tiny_model, write_recipe

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools" / "docs.py"))


def block(name: str) -> str:
    return re.search(rf"<!-- {name}: made by tools/docs\.py -->\n(.*?)<!-- end -->", TEXT, re.DOTALL)[1]


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_it_is_short():
    assert len(TEXT.encode()) <= 10_240
    assert len(re.findall(r"[A-Za-z][\w'-]*", TEXT)) < 1_200


def test_every_method_stands_in_one_line_of_its_group():
    lines = block("groups").splitlines()
    assert {re.match(r"- \*\*([\w-]+)\*\*", line)[1] for line in lines} == {METHODS[name].card.category for name in METHODS}
    for line in lines:
        kind = re.match(r"- \*\*([\w-]+)\*\*", line)[1]
        assert re.findall(r"`([\w-]+)`", line) == sorted(name for name in METHODS if METHODS[name].card.category == kind)


def test_missed_targets_are_marked_and_counted(tool):
    measured = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        measured |= json.loads(path.read_text(encoding="utf-8")).get("figures", {})
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in block("results").splitlines()[2:] if row.startswith("|")}
    missed = {f.what for f in tool["FIGURES"] if f.name in measured and not f.met(measured[f.name])}
    shown = {f.what for f in tool["FIGURES"] if f.name in measured and f.front}
    assert set(rows) == shown
    assert {what for what, row in rows.items() if "**MISSED**" in row} == missed & shown
    assert f"; {len(missed)} miss it." in block("results")
    reasons = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(f"- {what}: " in reasons for what in missed)
    assert 6 <= len(rows) <= 14
    for row in rows.values():
        assert re.search(r"minimum|mean|median|maximum|count", row.split(" | ")[1]), "every number says what it is taken over"


def test_the_quick_suite_is_described_as_it_is():
    suite = yaml.safe_load((ROOT / "src" / "paretune" / "suites" / "quick.yaml").read_text(encoding="utf-8"))
    names = {m if isinstance(m, str) else m["name"] for m in suite["methods"]}
    said = " ".join(re.search(r"The quick suite has (.*?) two cores\.", TEXT, re.DOTALL)[1].split())
    assert set(re.findall(r"`([\w-]+)`", said)) == names
    words = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    experts = next(m for m in suite["methods"] if not isinstance(m, str) and m["name"] == "experts")
    assert f"{words[len(names - {'reference'})]} methods" in said
    assert f"`experts` with {words[len(experts['mixing'])]} mixings" in said
    assert f"{words[len(suite['tasks'][0]['rho'])]} exact tasks with {words[len(suite['seeds'])]} task seed" in said


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in code("bash")[0].splitlines():
        assert f"\n{shlex.split(line, comments=True)[1]}:" in makefile


def test_the_shell_lines_run(tmp_path, monkeypatch):
    """As written, with a tiny model and a short training in place of the example's: a family, its responses and its checkpoint."""
    objectives = [{"name": "polite", "use": "rewards.py:shout", "low": 0, "high": 1}, {"name": "brief", "use": "length", "half": 10}]
    learner = {"name": "pg", "samples": 16, "batch": 8, "group": 4, "rank": 2}
    folder = tmp_path / "examples" / "support_desk"
    write_recipe(folder, tiny_model(), objectives=objectives, method="experts", learner=learner, max_new_tokens=4)
    monkeypatch.chdir(tmp_path)
    fit, sample, export = code("bash")[1].splitlines()
    assert CliRunner().invoke(app, [*shlex.split(fit, comments=True)[1:], "--samples", "0"]).exit_code == 0
    (family,) = (folder / "runs" / "families").iterdir()
    (tmp_path / "FAMILY").symlink_to(family)
    said = CliRunner().invoke(app, shlex.split(sample.replace("$'", "'"))[1:])
    assert said.exit_code == 0, said.output
    made = CliRunner().invoke(app, shlex.split(export, comments=True)[1:])
    assert made.exit_code == 0, made.output
    assert (tmp_path / "polite-70" / "model.safetensors").is_file()


def test_the_notebook_example_runs(tmp_path, monkeypatch, capsys):
    """As written, on its own small task: the mixtures of one pair of experts, a curve each, samples and a saved family."""
    (example,) = code("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    exec(compile(example, "README.md", "exec"), {})
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    said = [re.fullmatch(r"(\w+): worst (-?[.\d]+), mean (-?[.\d]+)", line) for line in out.splitlines() if "worst" in line]
    worst, mean = ({match[1]: float(match[place]) for match in said} for place in (2, 3))
    assert set(worst) == {"parameter", "logit"}
    assert worst["logit"] > worst["parameter"] + 0.05  # training prompts, measured: 0.2; under conflict the soup is worse
    assert all(mean[name] > worst[name] for name in worst)
    assert len(list((tmp_path / "runs" / "artifacts").glob("*/DONE"))) == 2, "the second mixing found its experts"
    assert (tmp_path / "my-family" / "family.json").is_file()

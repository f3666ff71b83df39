"""The README is true: its tables, tree and picture are what the code and the committed results say, and its examples run."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
import typer

from paretune.cli import app
from paretune.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools" / "readme.py"))


def block(name: str) -> str:
    return re.search(rf"<!-- {name}: made by tools/readme\.py -->\n(.*?)<!-- end -->", TEXT, re.DOTALL)[1]


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("name", ["taxonomy", "results", "figures"])
def test_generated_parts_are_what_the_tool_makes(tool, name):
    assert block(name) == tool["blocks"]()[name], "run `python tools/readme.py`"


def test_the_picture_is_drawn_from_the_committed_results(tool):
    drawn = tool["picture"]()
    if drawn is not None:
        assert (ROOT / "docs" / "figures" / "front.svg").read_text(encoding="utf-8") == drawn, "run `python tools/readme.py`"
        ElementTree.fromstring(drawn)
        assert "exact front" in drawn
    assert "docs/figures/front.svg" in TEXT


def test_the_taxonomy_has_every_method():
    rows = [line for line in block("taxonomy").splitlines() if line.startswith("| `")]
    assert {row.split("`")[1] for row in rows} == set(METHODS)


def test_the_notebook_example_runs(tmp_path, monkeypatch, capsys):
    """As written, on its own small task: the mixtures of one pair of experts, a curve each, samples and a saved family."""
    example = next(text for text in code(TEXT, "python") if "import paretune" in text)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    exec(compile(example, "README.md", "exec"), {})
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    worst = {line.split(" prompts")[0]: float(line.split()[-1]) for line in out.splitlines() if "worst" in line}
    assert set(worst) == {f"{mixing} on {split}" for mixing in ("parameter", "logit") for split in ("train", "test")}
    assert worst["logit on train"] > worst["parameter on train"] + 0.05  # measured: 0.2; under conflict the soup is worse
    assert len(list((tmp_path / "runs" / "artifacts").glob("*/DONE"))) == 2, "the second mixing found its experts"
    assert (tmp_path / "my-family" / "family.json").is_file()


def test_commands_in_the_documents_exist_with_their_flags():
    commands = typer.main.get_command(app).commands
    flags = {name: {opt for p in command.params for opt in p.opts} for name, command in commands.items()}
    seen = set()
    for text in [*code(TEXT, "bash"), *code(TEXT, "text"), *code(DESIGN, "bash"), *re.findall(r"`(paretune [^`]+)`", TEXT + DESIGN)]:
        for found in re.findall(r"\bparetune ([a-z]+)([^\n#]*)", text):
            name, rest = found
            assert name in commands, found
            seen.add(name)
            for flag in re.findall(r"(--[a-z-]+)", rest):
                assert flag in flags[name], (name, flag)
    assert seen == set(commands), "every command is documented"


def test_links_lead_somewhere():
    for path, text in ((ROOT / "README.md", TEXT), (ROOT / "docs" / "design.md", DESIGN)):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert "://" not in target, "no link needs a network"
            assert (path.parent / target).exists(), target


def test_the_make_targets_that_the_readme_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in code(TEXT, "bash")[0].splitlines():
        assert f"\n{shlex.split(line, comments=True)[1]}:" in makefile


# docs/design.md: the examples of how to add something are whole files that pass the conformance suites.


@pytest.mark.parametrize("kind", ["method", "task", "objective"])
def test_the_examples_of_adding_something_pass_the_conformance_suites(kind, tmp_path):
    from paretune.registry import GATE_RULES, OBJECTIVES, TASKS, load_plugin
    from paretune.testing import methods as testing

    example = next(text for text in code(DESIGN, "python") if text.startswith(f"# my_{kind}.py"))
    path = tmp_path / f"my_{kind}.py"
    path.write_text(example)
    load_plugin(path)
    name = re.search(rf"{kind.upper()}S\.register\(\"([^\"]+)\"\)", example)[1]
    try:
        getattr(testing, f"check_{kind}")(name)
    finally:
        for registry in (METHODS, TASKS, OBJECTIVES, GATE_RULES):  # other tests list what is registered
            for mine in re.findall(r"\.register\(\"([^\"]+)\"\)", example):
                registry._classes.pop(mine, None)


def test_the_readme_can_be_checked_from_the_command_line():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

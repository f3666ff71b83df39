"""All pages: generated parts are up to date, links and commands exist, and what a page lists is what the code has."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import typer

from paretune.cli import app
from paretune.policy.base import MIXINGS
from paretune.registry import METHODS
from paretune.runs.suite import EXECUTORS

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "paretune"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
ARCHITECTURE = TEXTS["docs/architecture.md"]


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools" / "docs.py"))


@pytest.fixture(scope="module")
def wanted(tool):
    return {str(path.relative_to(ROOT)): text for path, text in tool["wanted"]().items()}


@pytest.mark.parametrize("page", [*(name for name in TEXTS if "made by tools/docs.py" in TEXTS[name]), "docs/figures/front.svg"])
def test_generated_parts_are_what_the_tool_makes(page, wanted):
    assert (ROOT / page).read_text(encoding="utf-8") == wanted[page], "run `make docs`"


def test_every_part_has_a_place_and_the_tool_can_check(tool):
    named = {name for text in TEXTS.values() for _, name, _ in tool["BLOCK"].findall(text)}
    assert named == set(tool["PARTS"])
    done = subprocess.run([sys.executable, "tools/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_picture_shows_the_exact_front():
    drawn = (ROOT / "docs" / "figures" / "front.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(drawn)
    assert "exact front" in drawn
    assert "docs/figures/front.svg" in TEXTS["README.md"]


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[page]):
        if "://" in target:
            assert target.startswith("https://"), target
        else:
            assert ((ROOT / page).parent / target).exists(), target


def test_every_page_is_linked_from_the_readme():
    for page in TEXTS:
        assert page == "README.md" or f"]({page})" in TEXTS["README.md"] or page.startswith("examples/"), page


def test_commands_in_the_pages_exist_with_their_flags():
    commands = typer.main.get_command(app).commands
    flags = {name: {opt for p in command.params for opt in p.opts} for name, command in commands.items()}
    for page, text in TEXTS.items():
        blocks = re.findall(r"```(?:bash|sh|text)\n(.*?)```", text, re.DOTALL)
        for found in [*blocks, *re.findall(r"`(paretune [^`]+)`", text)]:
            for name, rest in re.findall(r"\bparetune ([a-z]+)([^\n#]*)", found):
                assert name in commands, (page, name)
                assert set(re.findall(r"(?<!\w)(--[a-z-]+)", rest)) <= flags[name], (page, name, rest)
        assert set(re.findall(r"--executor ([a-z-]+)", text)) <= set(EXECUTORS), page


def test_every_command_and_option_is_documented():
    sections = dict(re.findall(r"^## `paretune ([a-z]+).*?`\n(.*?)(?=^## |\Z)", TEXTS["docs/cli.md"], re.DOTALL | re.MULTILINE))
    commands = typer.main.get_command(app).commands
    assert set(sections) == set(commands)
    for name, command in commands.items():
        assert all(f"| `{p.opts[0]}` |" in sections[name] for p in command.params if p.param_type_name == "option"), name


def test_every_extra_is_documented():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {*re.findall(r"'\.\[(\w+)\]'", TEXTS["docs/cli.md"])} == set(extras) - {"test"}


def test_every_method_has_a_section_with_its_card():
    sections = dict(re.findall(r"^### `([\w-]+)`\n(.*?)(?=^###? |\Z)", TEXTS["docs/methods.md"], re.DOTALL | re.MULTILINE))
    assert set(sections) == set(METHODS)
    for name, text in sections.items():
        card = METHODS[name].card
        for line in (f"- **Source:** {card.source}", f"- **Differs:** {card.differs}", f"- **Hides:** {card.hides}"):
            assert line in text, name


def test_which_one_to_use_names_methods_that_exist():
    guide = TEXTS["docs/methods.md"].split("## Which one to use")[1].split("## Overview")[0]
    rows = [line for line in guide.splitlines() if line.startswith("| ") and "you want" not in line]
    for row in rows:
        names = [name for name in re.findall(r"`([\w-]+)`", row) if name != "mixing"]
        assert names
        assert set(names) <= set(METHODS), row


def test_the_table_of_mixings_has_every_mixing():
    table = TEXTS["docs/concepts.md"].split("## Mixings")[1].split("## ")[0]
    assert {*re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)} == set(MIXINGS) - {"reference", "tied"}  # in training only


def test_the_walks_name_few_files_and_all_of_them_exist():
    table = ARCHITECTURE.split("## Which files to read")[1].split("\n\n**")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and not line.startswith("| for ")]
    assert {"| a new mixing", "| a new loss", "| why KL explodes"} <= {row[0] for row in rows}
    for _, files, _ in rows:
        named = re.findall(r"`([\w/]+\.py)`", files)
        assert 1 <= len(named) <= 4, files
        assert all((SOURCE / name).is_file() for name in named), files


def test_files_that_the_architecture_names_exist():
    for name in re.findall(r"`([a-z_]+/[\w/]+\.py)`", ARCHITECTURE):
        assert (SOURCE / name).is_file(), name


def test_figures_are_measured_by_the_scripts_that_the_list_names(tool):
    results = ROOT / "benchmarks" / "results"
    for figure in tool["FIGURES"]:
        script = ROOT / "benchmarks" / figure.script
        assert script.is_file(), figure.script
        assert f'"{figure.name}"' in (results / script.with_suffix(".json").name).read_text(encoding="utf-8"), figure.name
    assert len({figure.name for figure in tool["FIGURES"]}) == len(tool["FIGURES"])


def test_a_target_is_met_or_missed_by_its_own_rule(tool):
    figure = type(tool["FIGURES"][0])
    for want, below, at, above in (("at least", 0, 1, 1), ("above", 0, 0, 1), ("at most", 1, 1, 0), ("", 1, 1, 1)):
        one = figure("name", "script.py", "what", "over", want, 0.5)
        assert [one.met(value) for value in (0.4, 0.5, 0.6)] == [bool(below), bool(at), bool(above)]
    assert figure("name", "script.py", "what", "over", "at least", -0.05).target == "at least −0.05"

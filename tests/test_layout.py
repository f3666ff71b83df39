"""The shape of the code, read from the code: which way imports point, how long things are, what is public, what every method must say."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paretune.methods import FAMILIES
from paretune.registry import LEARNERS, METHODS
from paretune.search import SEARCHERS

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "paretune"
MODULES = sorted(SOURCE.rglob("*.py"))
CODE = [p for folder in ("src", "tests", "benchmarks", "tools", "examples") for p in sorted((ROOT / folder).rglob("*.py"))]

# Imports point to the same level or down. A package's entry stands for all modules inside it.
LEVELS = {
    0: ["paretune", "types", "errors", "seeds"],
    1: ["pareto", "scalarise", "advantage", "loss", "stats", "metrics", "aggregation", "gramian"],
    2: ["registry", "utilities", "config", "store", "ledger", "hub"],
    3: ["objectives", "tasks"],
    4: ["fused", "lora", "policy", "mixing", "rollout", "trunk", "plain_lora", "soup", "routing", "export", "model_card"],
    5: [
        "batches",
        "checkpoint",
        "learner",
        "weightings",
        "jacobian",
        "policy_gradient",
        "distillation",
        "offline",
        "exact_learner",
        "returns",
        "engines",
    ],
    6: ["methods", "search"],
    7: [
        "own_utility",
        "evaluation",
        "explain",
        "jobs",
        "schedule",
        "cluster",
        "launch",
        "ray_worker",
        "ray_cluster",
        "display",
        "suite_file",
        "suite",
        "tuning",
        "tuning_plan",
        "relations",
        "probe",
        "advice",
    ],
    8: ["conformance", "testing", "report", "cli", "__main__"],
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names}


def name_of(path: Path) -> str:
    """src/paretune/tasks/exact.py -> tasks.exact; the package itself is "paretune"."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__") or "paretune"


def level_of(module: str) -> int:
    return LEVEL[module.split(".")[0]]


def imports_of(path: Path) -> set[str]:
    """The modules of this project that a file imports, inside functions too, but not under `if TYPE_CHECKING`."""
    known = {name_of(p) for p in MODULES}
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "paretune":
            inner = (node.module or "").removeprefix("paretune").lstrip(".")
            for alias in node.names:
                full = f"{inner}.{alias.name}".lstrip(".")
                found.add(full if full in known else inner or "paretune")
        elif isinstance(node, ast.Import):
            found.update(
                a.name.removeprefix("paretune").lstrip(".") or "paretune" for a in node.names if a.name.split(".")[0] == "paretune"
            )
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}: relative import"
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_every_module_has_a_level():
    assert {name_of(p).split(".")[0] for p in MODULES} <= set(LEVEL)


def test_the_design_page_draws_the_same_layers():
    drawn = re.search(r"## Layers\n\n```text\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)[1]
    for line in drawn.splitlines():
        names = [word.rstrip("/") for word in line.split()]
        level = int(names[0])
        assert set(LEVELS[level]) - {"paretune", "__main__"} == {name for name in names[1:] if name in LEVEL}, line
    assert len(drawn.splitlines()) == len(LEVELS)


def test_imports_point_down():
    upward = [
        f"{name_of(path)} (level {level_of(name_of(path))}) imports {other} (level {level_of(other)})"
        for path in MODULES
        for other in sorted(imports_of(path))
        if level_of(other) > level_of(name_of(path))
    ]
    assert not upward


def test_the_parser_of_imports_sees_what_it_should(tmp_path):
    """A checker that sees nothing would pass everything."""
    file = tmp_path / "probe.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nfrom paretune import stats, __version__\nimport paretune.seeds\n"
        "if TYPE_CHECKING:\n    from paretune.suite import fit\n"
        "def f():\n    from paretune.tasks.exact import ExactTask\n"
    )
    assert imports_of(file) == {"stats", "paretune", "seeds", "tasks.exact"}


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert path.is_relative_to(ROOT / "tests") or len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_are_and_what_is_public(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no docstring"
    names = [t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)]
    assert "__all__" in names or path.name == "__main__.py"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_all_names_exist_and_are_documented(path):
    module = importlib.import_module(f"paretune.{name_of(path)}" if name_of(path) != "paretune" else "paretune")
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing), f"{name} has no docstring"


def test_nothing_waits_to_be_written():
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")
    found = [f"{p.relative_to(ROOT)}: {word}" for p in CODE for word in words if word in p.read_text(encoding="utf-8")]
    assert not found


def test_importing_the_package_costs_nothing():
    """Neither torch nor anything heavy comes with `import paretune`, `paretune --help` or the reading of results."""
    heavy = ["torch", "transformers", "peft", "datasets", "scipy", "moocore", "plotly", "pandas"]
    for code in ("import paretune", "import paretune.cli", "import paretune.report, paretune.report.data, paretune.report.page"):
        probe = f"{code}; import sys; print(sorted(set(sys.modules) & set({heavy!r})))"
        out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        assert out.strip() == "[]", code


@pytest.mark.parametrize("name", list(METHODS))
def test_every_card_is_filled_in(name):
    card = METHODS[name].card
    assert card.family in FAMILIES
    for field in dataclasses.fields(card):
        value = getattr(card, field.name)
        assert isinstance(value, bool) or (value.strip() and "\n" not in value), field.name


SAYS = ("Source:", "Differs:", "Hides:")
MIXERS = ("ParameterMix", "FactorMix", "LogitMix", "HiddenMix", "HiddenLayerMix", "DivergenceMix", "RobustMix", "MergedMix", "PromptedMix")
SEARCHES = [search.__name__ for search in SEARCHERS.values()]


@pytest.mark.parametrize(
    "thing",
    [
        *(pytest.param(("paretune.metrics", name), id=name) for name in ("attainment", "regret", "utility_losses", "controllability")),
        *(pytest.param(("paretune.pareto", name), id=name) for name in ("hypervolume", "igd_plus", "epsilon")),
        *(pytest.param(("paretune.mixing", name), id=name) for name in MIXERS),
        *(pytest.param(("paretune.mixing.merged", name), id=name) for name in ("trim", "dare", "ties")),
        *(pytest.param(("paretune.search", name), id=name) for name in SEARCHES),
        *(pytest.param((LEARNERS[name].__module__, LEARNERS[name].__qualname__), id=name) for name in LEARNERS),
    ],
)
def test_metrics_mixers_searches_and_learners_say_source_differs_hides(thing):
    doc = inspect.getdoc(getattr(importlib.import_module(thing[0]), thing[1]))
    for word in SAYS:
        assert word in doc


def test_public_losses_say_source_differs_hides():
    module = importlib.import_module("paretune.loss")
    for name in module.__all__:
        if inspect.isfunction(getattr(module, name)):
            doc = inspect.getdoc(getattr(module, name))
            assert all(word in doc for word in SAYS), name

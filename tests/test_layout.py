"""The shape of the code, read from the code: which way imports point, how long things are, what is public, what every method must say."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import paretune.methods
from paretune.methods.base import CATEGORIES
from paretune.methods.search import SEARCHERS
from paretune.policy.base import MIXINGS
from paretune.registry import LEARNERS, METHODS

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "paretune"
MODULES = sorted(SOURCE.rglob("*.py"))
ENTRIES = ("__init__", "__main__", "launch")  # what `import` and `python -m` begin with: each hands on to a room
CODE = [p for folder in ("src", "tests", "benchmarks", "tools", "examples") for p in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path, source: Path = SOURCE) -> str:
    """src/paretune/tasks/exact/task.py -> tasks.exact.task; the package itself is "paretune"."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__") or "paretune"


def room_of(module: str) -> str:
    """A folder under src/paretune, or one of the files beside the folders."""
    return module.split(".")[0]


def imports_of(path: Path, known: set[str]) -> set[str]:
    """The modules of this project that a file imports: inside functions and under TYPE_CHECKING, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}: relative import"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "paretune":
            inner = (node.module or "").removeprefix("paretune").lstrip(".")
            for alias in node.names:
                full = f"{inner}.{alias.name}".lstrip(".")
                found.add(full if full in known else inner or "paretune")
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "paretune"]
            found.update(name.removeprefix("paretune").lstrip(".") or "paretune" for name in names)
    return found


def graph_of(source: Path) -> dict[str, set[str]]:
    """Every module and what it imports."""
    modules = {name_of(path, source): path for path in source.rglob("*.py")}
    return {name: imports_of(path, set(modules)) - {name} for name, path in modules.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """One line for each way back that a walk along the arrows meets."""
    found: list[str] = []
    state: dict[str, str] = {}

    def walk(name: str, trail: tuple[str, ...]) -> None:
        state[name] = "open"
        for other in sorted(graph.get(name, ())):
            if state.get(other) == "open":
                found.append(" -> ".join([*trail[trail.index(other) :], other]))
            elif other not in state:
                walk(other, (*trail, other))
        state[name] = "closed"

    for name in sorted(graph):
        if name not in state:
            walk(name, (name,))
    return found


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same graph with a room for each folder."""
    drawn: dict[str, set[str]] = {room_of(name): set() for name in graph}
    for name, others in graph.items():
        drawn[room_of(name)] |= {room_of(other) for other in others} - {room_of(name)}
    return drawn


def inner_rooms(graph: dict[str, set[str]], folders: set[str]) -> dict[str, set[str]]:
    """The same graph with one node for each folder inside a room, such as training.loop; files beside such folders stand alone."""

    def node(name: str) -> str:
        parts = name.split(".")
        inner = ".".join(parts[:2])
        return inner if inner in folders else name

    drawn: dict[str, set[str]] = {node(name): set() for name in graph}
    for name, others in graph.items():
        drawn[node(name)] |= {node(other) for other in others} - {node(name)}
    return drawn


def test_no_file_and_no_room_imports_itself_in_a_circle():
    graph = graph_of(SOURCE)
    folders = {name_of(path) for path in SOURCE.glob("*/*/__init__.py")}
    assert {"training.loop", "tasks.exact"} <= folders
    assert circles(graph) == []
    assert circles(rooms(graph)) == []
    assert circles(inner_rooms(graph, folders)) == []


def test_there_are_few_rooms_and_few_files_beside_them():
    folders = [p for p in SOURCE.iterdir() if p.is_dir() and any(p.glob("*.py"))]
    assert len(folders) <= 11
    assert len([p for p in SOURCE.glob("*.py") if p.stem not in ENTRIES]) <= 7
    crowded = {str(folder.relative_to(SOURCE)): len(list(folder.glob("*.py"))) for folder in SOURCE.rglob("*") if folder.is_dir()}
    assert max(crowded.values()) <= 18, crowded


def test_the_finder_of_circles_finds_them(tmp_path):
    """A checker that sees nothing would pass everything: an import in a function, one under TYPE_CHECKING, and a circle of rooms only."""
    for folder in ("low", "high"):
        (tmp_path / folder).mkdir()
    (tmp_path / "low" / "a.py").write_text("def f():\n    from paretune.low.b import g\n")
    (tmp_path / "low" / "b.py").write_text("if TYPE_CHECKING:\n    from paretune.low import a\n    import paretune.seeds\n")
    (tmp_path / "low" / "c.py").write_text("from paretune import __version__\nfrom paretune.high.d import x\n")
    (tmp_path / "high" / "d.py").write_text("")
    (tmp_path / "high" / "e.py").write_text("from paretune.low.c import y\n")
    graph = graph_of(tmp_path)
    assert graph["low.b"] == {"low.a", "seeds"}
    assert graph["low.c"] == {"paretune", "high.d"}
    assert circles(graph) == ["low.a -> low.b -> low.a"]
    assert circles(rooms(graph)) == ["high -> low -> high"]
    inner = {"room.a.x": {"room.b.y"}, "room.b.y": set(), "room.b.z": {"room.flat"}, "room.flat": {"room.a.x"}}
    assert circles(inner) == []
    assert circles(inner_rooms(inner, {"room.a", "room.b"})) == ["room.a -> room.b -> room.flat -> room.a"]


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert path.is_relative_to(ROOT / "tests") or len(text.splitlines()) <= 700
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_are_and_what_is_public(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no docstring"
    names = [t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)]
    rooms_face = path.name == "__init__.py" and len(tree.body) == 1
    assert "__all__" in names or path.name == "__main__.py" or rooms_face


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
    assert card.category in CATEGORIES
    for field in dataclasses.fields(card):
        value = getattr(card, field.name)
        assert isinstance(value, bool) or (value.strip() and "\n" not in value), field.name


def test_the_room_of_methods_says_in_which_file_each_one_is():
    lines = [line.split(maxsplit=1) for line in (paretune.methods.__doc__ or "").splitlines() if line.startswith("    ")]
    said = {name: file for file, names in lines for name in names.split(", ")}
    shipped = {name: METHODS[name].__module__.rpartition(".") for name in METHODS}
    assert said == {name: file for name, (room, _, file) in shipped.items() if room == "paretune.methods"}


SAYS = ("Source:", "Differs:", "Hides:")
SEARCHES = [search.__name__ for search in SEARCHERS.values()]


@pytest.mark.parametrize(
    "thing",
    [
        *(
            pytest.param(("paretune.evaluation.metrics", name), id=name)
            for name in ("attainment", "regret", "utility_losses", "controllability")
        ),
        *(pytest.param(("paretune.evaluation.metrics", name), id=name) for name in ("hypervolume", "igd_plus")),
        *(pytest.param((MIXINGS[name].__module__, MIXINGS[name].__qualname__), id=name) for name in MIXINGS if name != "reference"),
        *(pytest.param(("paretune.policy.mixing.parameter", name), id=name) for name in ("trim", "dare", "ties")),
        *(pytest.param(("paretune.methods.search", name), id=name) for name in SEARCHES),
        *(pytest.param((LEARNERS[name].__module__, LEARNERS[name].__qualname__), id=name) for name in LEARNERS),
    ],
)
def test_metrics_mixers_searches_and_learners_say_source_differs_hides(thing):
    doc = inspect.getdoc(getattr(importlib.import_module(thing[0]), thing[1]))
    for word in SAYS:
        assert word in doc


def test_public_losses_say_source_differs_hides():
    module = importlib.import_module("paretune.training.learners.loss")
    for name in module.__all__:
        if inspect.isfunction(getattr(module, name)):
            doc = inspect.getdoc(getattr(module, name))
            assert all(word in doc for word in SAYS), name

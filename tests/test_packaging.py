"""What is shipped: the lock files, the wheel with its data, and one version everywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import paretune

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"^([a-z0-9][a-z0-9.-]*)==([0-9][A-Za-z0-9.]*)$")
ELSEWHERE = ("nvidia", "cuda", "triton", "colorama", "intel", "tbb")  # what only other platforms' builds need


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(PIN.match(line) for line in lines), "exact versions only: no hashes, ranges or local builds"
    return dict(line.split("==") for line in lines)


def closure(requirements: list[str]) -> set[str]:
    """Everything that the requirements need on this platform, by what the installed packages say of themselves."""
    seen: set[tuple[str, str]] = set()
    queue = [(Requirement(text), "") for text in requirements]
    while queue:
        wanted, outer = queue.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": outer}):
            continue
        name = canonicalize_name(wanted.name)
        for extra in ("", *wanted.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                queue += [(Requirement(text), extra) for text in distribution(name).requires or ()]
    return {name for name, _ in seen}


def test_the_locks_pin_what_the_project_asks_for():
    runtime, extra = pins("requirements.lock"), pins("requirements-test.lock")
    assert runtime["torch"] == "2.13.0"
    assert not set(runtime) & set(extra)
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    for text in asked:
        wanted = Requirement(text)
        assert (runtime | extra)[canonicalize_name(wanted.name)] in wanted.specifier, text
    assert not {"pytest", "ruff", "mypy", "trl"} & set(runtime), "`make demo` installs no test tools"


def test_the_locks_pin_everything_that_comes_along():
    """Against a lock that lists only what pyproject.toml names."""
    needed = closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
    locked = pins("requirements.lock") | pins("requirements-test.lock")
    missing = {name for name in needed if name not in locked and not name.startswith(ELSEWHERE)}
    assert not missing, "run `make lock`"
    assert len(locked) > len(PROJECT["dependencies"]) + 20


def test_one_version_everywhere():
    version = PROJECT["version"]
    assert paretune.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def test_the_wheel_holds_all_that_runs_need(tmp_path):
    """Built from a copy of the tracked kinds of files: what is missing here would be missing after `pip install`."""
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    files = [p for p in (ROOT / "src" / "paretune").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    for path in files:
        there = source / path.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True, timeout=120)
    wheel = zipfile.ZipFile(next(tmp_path.glob("paretune-*.whl")))
    names = set(wheel.namelist())
    assert {p.relative_to(ROOT / "src").as_posix() for p in files} <= names
    for name in ("report/page.html.j2", "report/page.css", "report/page.js", "suites/quick.yaml", "py.typed"):
        assert f"paretune/{name}" in names
    points = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "paretune = paretune.cli:main" in points


def test_ci_runs_what_a_developer_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_sets_up_once_and_installs_only_from_the_locks(target, tmp_path):
    plan = subprocess.run(["make", "-n", target, f"VENV={tmp_path}/v"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m venv" in plan
    assert "-r requirements.lock" in plan
    assert "--no-deps" in plan
    assert ("-r requirements-test.lock" in plan) == (target == "test")
    assert ("paretune demo" in plan) == (target == "demo")
    if target == "test":
        assert all(word in plan for word in ("ruff check", "ruff format --check", "mypy", "pytest"))
    (tmp_path / "v" / "bin").mkdir(parents=True)
    for name in ("bin/python", ".ready", ".ready-test"):
        (tmp_path / "v" / name).touch()
    again = subprocess.run(["make", "-n", target, f"VENV={tmp_path}/v"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "install" not in again


def test_nothing_names_a_machine_or_a_registry():
    words = ("/wo" + "rk/", "/ro" + "ot/", "pypi" + ".org", "python" + "hosted")
    paths = [p for p in ROOT.rglob("*") if p.suffix in (".py", ".md", ".yaml", ".toml", ".lock", ".j2", ".js", ".css", ".json", ".cff")]
    ours = [p for p in paths if not {".venv", ".git", "paretune-runs", "build"} & set(p.relative_to(ROOT).parts) and ".cache" not in str(p)]
    hidden = [p for p in ours if not any(part.startswith(".") and part != ".ci" for part in p.relative_to(ROOT).parts)]
    found = [
        f"{p.relative_to(ROOT)}: {word}" for p in [*hidden, ROOT / "Makefile"] for word in words if word in p.read_text(encoding="utf-8")
    ]
    assert not found

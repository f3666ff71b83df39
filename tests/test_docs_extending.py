"""docs/extending.md: every example is a whole file that passes its conformance suite, as the page shows it."""

import re
import sys
from pathlib import Path

import pytest

from paretune.policy.base import MIXINGS
from paretune.registry import GATE_RULES, LEARNERS, METHODS, OBJECTIVES, PLUGIN, TASKS
from paretune.testing import ConformanceError

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"```python\n# ((?:test_)?my_\w+)\.py\n(.*?)```", PAGE, re.DOTALL))
KINDS = sorted(name for name in EXAMPLES if not name.startswith("test_"))


@pytest.fixture
def nothing_stays():
    """What an example registers is taken back, since other tests list what there is."""
    registries = (METHODS, TASKS, OBJECTIVES, GATE_RULES, LEARNERS, MIXINGS)
    before = {registry.kind: set(registry) for registry in registries}
    modules = set(sys.modules)
    yield
    for registry in registries:
        for name in set(registry) - before[registry.kind]:
            del registry._classes[name]
    for name in set(sys.modules) - modules:
        if name.startswith(PLUGIN):
            del sys.modules[name]


def test_every_kind_has_an_example_and_its_check():
    assert {"my_method", "my_task", "my_objective", "my_rule", "my_mixing", "my_loss"} == set(KINDS)
    assert {f"test_{kind}" for kind in KINDS} == set(EXAMPLES) - set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_examples_pass_their_checks(kind, tmp_path, monkeypatch, nothing_stays):
    (tmp_path / f"{kind}.py").write_text(EXAMPLES[kind])
    monkeypatch.chdir(tmp_path)
    check = EXAMPLES[f"test_{kind}"]
    assert re.search(r"^check_\w+\(", check, re.MULTILINE), "the page shows the check"
    exec(compile(check, f"test_{kind}.py", "exec"), {})


def test_a_broken_example_does_not_pass(tmp_path, monkeypatch, nothing_stays):
    """The checks of the page check something: a score outside the declared range is found."""
    broken = EXAMPLES["my_objective"].replace("max(0.0, 1.0 - self.each", "max(0.0, 2.0 - self.each")
    (tmp_path / "my_objective.py").write_text(broken)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConformanceError):
        exec(compile(EXAMPLES["test_my_objective"], "test_my_objective.py", "exec"), {})

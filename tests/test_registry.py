"""Names to classes: descriptions that build the same thing again, errors that name the nearest, plugins of other people."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from paretune import registry as registry_module
from paretune.errors import ConfigError
from paretune.registry import LEARNERS, METHODS, OBJECTIVES, TASKS, Registry, describe, load_plugin, loaded_plugins
from paretune.types import canonical_json, key_of


@pytest.fixture
def things(tmp_path):
    """A registry of its own, with one class that has every kind of field."""
    things = Registry("thing", "json")

    @dataclass(frozen=True)
    class Part:
        size: int = 1

    @things.register("box", version=3)
    @dataclass(frozen=True)
    class Box:
        width: float = 1.0
        names: tuple[str, ...] = ("a",)
        part: Part = Part()
        options: dict[str, int] = field(default_factory=dict)
        note: str | None = None

        def __post_init__(self):
            if self.width < 0:
                raise ConfigError("width is positive", found=f"width = {self.width:g}", remedy="use its absolute value")

    return things


def test_description_and_building_are_inverse(things):
    box = things.build({"name": "box", "width": 2, "names": ["b", "c"], "part": {"size": 4}, "options": {"x": 1}})
    described = describe(box)
    assert described == {
        "name": "box",
        "version": 3,
        "width": 2.0,
        "names": ["b", "c"],
        "part": {"size": 4},
        "options": {"x": 1},
        "note": None,
    }
    assert things.build(described) == box
    assert canonical_json(describe(things.build(described))) == canonical_json(described)


def test_keys_follow_fields_version_and_content_only(things):
    first = key_of(describe(things.build("box")))
    assert key_of(describe(things.build({"part": {"size": 1}, "name": "box", "width": 1}))) == first
    assert key_of(describe(things.build({"name": "box", "width": 1.5}))) != first
    cls = things["box"]
    cls.version = 4
    assert key_of(describe(things.build("box"))) != first
    cls.version = 3
    cls.content = lambda self: {"file": "abc"}
    second = key_of(describe(things.build("box")))
    cls.content = lambda self: {"file": "abd"}
    assert len({first, second, key_of(describe(things.build("box")))}) == 3
    cls.content = lambda self: {}
    assert key_of(describe(things.build("box"))) == first, "nothing outside: nothing to add"


def test_a_new_default_changes_the_key():
    keys = set()
    for default in (1, 2):
        things = Registry("thing", "json")
        cls = type("A", (), {"__annotations__": {"x": int}, "x": default})
        keys.add(key_of(describe(things.register("a")(dataclass(frozen=True)(cls))())))
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("given", "rule", "found", "remedy"),
    [
        ("bax", "a thing is known by its name", "'bax'", "did you mean 'box'?"),
        ({}, "a thing is known by its name", "{}", "choose one of box"),
        ({"name": "box", "version": 77}, "thing box is built as the version that is installed", "version 77", "leave version: out"),
        ({"name": "box", "content": {"a": "b"}}, "thing box has the fields that it declares", "'content'", "choose one"),
        ({"name": "box", "width": True}, "thing box: width is what it is declared as", "True", "see"),
        ({"name": "box", "width": float("nan")}, "thing box: width is a finite number", "nan", "see"),
        ({"name": "box", "width": 10**5000}, "thing box: width is a number of at most 64 bits", "a int", "see"),
        ({"name": "box", "widht": 1}, "thing box has the fields", "'widht'", "did you mean 'width'?"),
        ({"name": "box", "width": "wide"}, "thing box: width: ", "'wide'", "see `paretune show box`"),
        ({"name": "box", "part": {"size": "x"}}, "thing box: part.size: ", "'x'", "see"),
        ({"name": "box", "width": -1}, "width is positive", "width = -1", "use its absolute value"),
    ],
)
def test_mistakes_name_the_field_and_the_nearest(things, given, rule, found, remedy):
    with pytest.raises(ConfigError) as caught:
        things.build(given)
    assert caught.value.rule.startswith(rule)
    assert caught.value.found == found
    assert caught.value.remedy.startswith(remedy)


def test_one_name_one_class(things):
    with pytest.raises(ConfigError, match="registered twice"):
        things.register("box")(dataclass(frozen=True)(type("Other", (), {})))


@pytest.mark.parametrize("registry", [TASKS, LEARNERS, METHODS, OBJECTIVES])
def test_everything_that_ships_is_a_frozen_dataclass(registry):
    names = list(registry)
    assert names == sorted(names) != []
    for name in names:
        cls = registry[name]
        assert cls.registered_name == name
        assert cls.__dataclass_params__.frozen, f"{name}: hyperparameters do not change under a key"


PLUGIN = """
from dataclasses import dataclass
from paretune.registry import METHODS

@METHODS.register("from-a-plugin")
@dataclass(frozen=True)
class Mine:
    x: int = 1
"""


@pytest.fixture
def clean_plugins(monkeypatch):
    """What a test loads is forgotten."""
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))
    before = dict(registry_module.sys.modules)
    yield
    for name in set(registry_module.sys.modules) - set(before):
        del registry_module.sys.modules[name]


def test_plugins_register_and_are_loaded_once(tmp_path, clean_plugins):
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    load_plugin(path)
    first = METHODS["from-a-plugin"]
    load_plugin(str(path))
    assert METHODS["from-a-plugin"] is first
    assert loaded_plugins()[-1] == str(path)
    other = tmp_path / "more" / "mine.py"  # of the same file name
    other.parent.mkdir()
    other.write_text(PLUGIN.replace("from-a-plugin", "from-another"))
    load_plugin(other)
    assert METHODS.build({"name": "from-another", "x": 2}).x == 2
    assert loaded_plugins()[-2:] == [str(path), str(other)]


def test_broken_plugins_are_the_users_mistake(tmp_path, clean_plugins):
    path = tmp_path / "mine.py"
    with pytest.raises(ConfigError, match="check the path given to --plugin"):
        load_plugin(path)
    path.write_text("import nothing_of_that_name")
    for _ in range(2):  # a failed import leaves no half-loaded module behind
        with pytest.raises(
            ConfigError, match=r"the plugin mine\.py can be imported\n  found:  ModuleNotFoundError: .*\(mine\.py, line 1\)"
        ):
            load_plugin(Path(path))
    assert str(path) not in loaded_plugins()

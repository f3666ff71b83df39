"""YAML and overrides: what they mean, and that every complaint says where."""

import pytest
from pydantic import BaseModel, ConfigDict, Field

from paretune.errors import ConfigError, TaskError
from paretune.runs.config import dump, load, parse

TEXT = """\
name: quick
tasks:
  - {name: exact-v1, rho: [0.8, -.8]}
  - exact-v1
learner:
  name: pg
  lr: 1e-3
"""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern="^[a-z]+$", description="use small letters")
    tasks: list[object] = []
    learner: dict[str, object] = {}
    seeds: list[int] = Field(default=[0], description="for example seeds: [100]")


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "quick.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),  # YAML 1.1 reads a word here, and a learning rate became a string
        ("-.8", -0.8),
        ("+2.5E+3", 2500.0),
        ("0.0", 0.0),
        ("3", 3),
        ("-1_000", -1000),
        ("no", "no"),  # and here False
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("", None),
        ("010", "010"),  # and here 8
        ("0x10", "0x10"),
        ("1:30", "1:30"),  # and here 90
        ("=", "="),
        ("2026-11-23", "2026-11-23"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("exact-v1", "exact-v1"),
        ("'1'", "1"),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    found = parse(f"a: {text}", name="f").data["a"]
    assert found == value
    assert type(found) is type(value)


def test_what_is_written_is_read_again():
    value = {
        "name": "pg",
        "lr": 1e-05,
        "words": ["no", "010", "2026-11-23", "a: b", "", "1e-3"],
        "deep": {"none": None, "on": True},
        "w": [1, 2.5],
    }
    text = dump(value)
    assert "\n" not in text
    assert parse(f"a: {text}", name="f").data["a"] == value


def test_where_values_stand(file):
    document = load(file(TEXT), ["learner.lr=2e-3"])
    assert document.where("name") == "quick.yaml, line 1"
    assert document.where("tasks", 0, "rho") == "quick.yaml, line 3"
    assert document.where("tasks", 1) == "quick.yaml, line 4"
    assert document.where("learner", "name") == "quick.yaml, line 6"
    assert document.where("learner", "lr") == "override learner.lr=2e-3"
    assert document.where("learner", "missing") == "quick.yaml, line 5", "the closest thing above it"


def test_overrides(file):
    changed = ["name=other", "tasks.0.rho=[0.5, 1e-1]", "tasks.1.beta=.1", "learner.steps=20", "learner.lr=0.1", "new.deep=null"]
    assert load(file(TEXT), changed).data == {
        "name": "other",
        "tasks": [{"name": "exact-v1", "rho": [0.5, 0.1]}, {"name": "exact-v1", "beta": 0.1}],
        "learner": {"name": "pg", "lr": 0.1, "steps": 20},
        "new": {"deep": None},
    }


def test_items_of_lists_by_name(file):
    path = file("methods: [reference, {name: experts, mixing: logit}]\nprompts: a.jsonl\n")
    document = load(path, ["methods.experts.mixing=hidden", "methods.reference.scale=2", "prompts.limit=3"], short={"prompts": "path"})
    assert document.data["methods"] == [{"name": "reference", "scale": 2}, {"name": "experts", "mixing": "hidden"}]
    assert document.data["prompts"] == {"path": "a.jsonl", "limit": 3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner", "an override reads key=value"),
        ("=3", "an override reads key=value"),
        ("learner..lr=3", "an override reads key=value"),
        ("learner.lr=[1", "the value of an override is YAML"),
        ("tasks.7.rho=1", "'tasks.7.rho=1'"),
        ("tasks.exact-v1.rho=1", "one item of a list"),  # two have that name
        ("learner.lr.deep=1", "lr has nothing below it"),
    ],
)
def test_bad_overrides(file, override, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.").replace("[", r"\[")):
        load(file(TEXT), [override])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "quick.yaml, line 4: the key 'c' stands twice"),
        ("a: 1\nb: [1, 2\n", "quick.yaml, line 3"),
        ("a: &x {b: 1}\nc: *x\n", "quick.yaml, line 2: *x is an alias; write the value out"),
        ("a: 1\n? [b]\n: 2\n", "quick.yaml, line 2: a key is one word"),
        ("a: !!python/object/apply:os.system [ls]\n", "quick.yaml, line 1: could not determine a constructor"),
        ("- a\n- b\n", "quick.yaml: a list"),
        ("", "quick.yaml: nothing"),
        ("a: 1\n---\nb: 2\n", "quick.yaml, line 2"),
    ],
)
def test_broken_files_name_the_line(file, text, found):
    with pytest.raises(ConfigError) as caught:
        load(file(text))
    assert caught.value.found.startswith(found), caught.value.found


def test_missing_file_names_its_neighbor(file):
    path = file("a: 1")
    with pytest.raises(ConfigError, match=r"did you mean 'quick\.yaml'"):
        load(path.with_name("quik.yaml"))
    with pytest.raises(ConfigError, match="check the path"):
        load(path.parent / "nowhere" / "quick.yaml")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="readable text"):
        load(path)


@pytest.mark.parametrize(
    ("text", "rule", "found", "remedy"),
    [
        ("name: a\nseads: [1]\n", "a settings has the keys", "'seads' (quick.yaml, line 2)", "did you mean 'seeds'?"),
        ("tasks: []\n", "a settings says its name", "no name (quick.yaml, line 1)", "add name:"),
        ("name: a\nseeds:\n  - 1\n  - x\n", "seeds.1: ", "'x' (quick.yaml, line 4)", "for example seeds: [100]"),
        ("name: A\n", "name: ", "'A' (quick.yaml, line 1)", "use small letters"),
        ("name: a\nlearner: 3\n", "learner: ", "3 (quick.yaml, line 2)", "correct that value"),
    ],
)
def test_schema_errors_name_line_and_nearest_key(file, text, rule, found, remedy):
    with pytest.raises(ConfigError) as caught:
        load(file(text)).validate(Settings)
    assert caught.value.rule.startswith(rule)
    assert caught.value.found == found
    assert caught.value.remedy.startswith(remedy)


def test_errors_inside_get_a_place_and_keep_their_kind(file):
    document = load(file(TEXT), ["tasks.0.rho=7"])
    with pytest.raises(TaskError, match=r"rho = 7 \(override tasks\.0\.rho=7\)"), document.at("tasks", 0, "rho"):
        raise TaskError("rho lies between -1 and 1", found="rho = 7", remedy="lower it")
    with pytest.raises(ValueError, match=r"^other$"), document.at("tasks"):
        raise ValueError("other")

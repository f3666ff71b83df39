"""What a new user meets: help, lists, a first recipe, what it will cost, families by name, and refusals before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from paretune.cli import app
from paretune.cli.catalog import KINDS
from paretune.cli.recipes import recipe_schema
from paretune.registry import LEARNERS, METHODS, OBJECTIVES, describe
from paretune.runs.recipes.recipe import load_recipe, mistakes
from paretune.runs.suite import load_suite, members_of, run_suite
from recipe_files import tiny_model, write_lines, write_recipe

RUNNER = CliRunner()
ROOT = Path(__file__).resolve().parent.parent
SHORT = {"name": "pg", "samples": 16, "batch": 8, "group": 4, "rank": 2}


def run(*args, code=0, **settings):
    result = RUNNER.invoke(app, [str(a) for a in args], **settings)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def command(*args, **settings):
    """The command as a process of its own: its result, and the seconds of CPU that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "paretune", *map(str, args)], capture_output=True, text=True, check=False, **settings)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A recipe, and the family of it that mixes predictions."""
    folder = tmp_path_factory.mktemp("fitted")
    recipe = write_recipe(
        folder, tiny_model(), method={"name": "experts", "mixing": "logit"}, learner=SHORT, name="support", max_new_tokens=4
    )
    made = json.loads(run("fit", recipe, "--samples", 0, "--json").stdout)
    return recipe, Path(made["family"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode_loses_no_table_and_gets_the_same_json(encoding):
    """What it lacks is written as an escape; in JSON as one of JSON's, so that it is read as it was meant."""
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    table, _ = command("show", "pg", env=env)
    assert table.returncode == 0, table.stderr
    assert "\\u2265 1" in table.stdout
    made, _ = command("show", "pg", "--json", env=env)
    assert json.loads(made.stdout) == json.loads(run("show", "pg", "--json").stdout)
    assert made.stdout.isascii()


def test_a_family_is_listed_once_and_a_damaged_one_says_what_is_wrong_with_it(tmp_path):
    """In a folder families/ that was copied without the run directory around it."""
    (tmp_path / "families" / "mine").mkdir(parents=True)
    (tmp_path / "families" / "mine" / "family.json").write_text('{"format": 1}')
    (row,) = json.loads(run("ls", "families", tmp_path, "--json").stdout)
    assert row["name"] == "mine"
    assert row["state"] == "unreadable: this version reads families of format 2; found 1"


def test_a_name_that_two_families_have_is_no_choice(tmp_path, monkeypatch):
    """Each in a run directory of its own: the last one was taken, whichever that was."""
    for place in ("one", "two"):
        (tmp_path / place / "families" / "mine").mkdir(parents=True)
        (tmp_path / place / "families" / "mine" / "family.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "mi"):
        said = run("sample", name, "hi", "--preference", "a=1", code=2).stderr
        assert f"found:  {name}: one/families/mine, two/families/mine" in said
        assert "give its folder" in said


@pytest.fixture
def unloadable(monkeypatch):
    """No model can be loaded: what is refused is refused before."""
    monkeypatch.setattr("paretune.policy.family.load_base", lambda *a, **k: pytest.fail("a model was loaded"))


# Help


@pytest.mark.parametrize("width", ["40", "80"])
def test_every_help_has_examples_and_no_type_for_a_flag(width):
    import typer

    for name in typer.main.get_command(app).commands:
        text = run(name, "--help", env={"COLUMNS": width, "NO_COLOR": "1"}).stdout
        assert f"  paretune {name}" in text.split("Examples:")[1], name
        assert "bool" not in text
        assert "\x1b" not in text


def test_the_list_of_commands_says_each_in_a_whole_sentence():
    text = " ".join(run("--help").stdout.partition("Commands:")[2].split())
    assert "..." not in text
    assert "Sample responses from a policy family at one preference" in text


@pytest.mark.parametrize("kind", KINDS)
def test_ls_takes_at_most_two_lines_for_each_and_cuts_nothing(kind):
    rows = json.loads(run("ls", kind, "--json").stdout)
    for row in rows:
        assert len(row["name"]) + 2 + len(row["summary"]) <= 2 * (132 - 20), row
        assert not row["summary"].endswith((":", ";", " w"))
    lines = [line for line in run("ls", kind).stdout.splitlines() if line.strip()]
    assert len(lines) <= 2 * len(rows) + 1


def test_every_field_of_the_default_learner_is_explained():
    (found,) = json.loads(run("show", "pg", "--json").stdout)
    assert [field["name"] for field in found["fields"] if not field["about"]] == []


@pytest.mark.parametrize(
    "args",
    [("ls",), ("ls", "methods"), ("show", "pg"), ("sample", "--help"), ("sample", "nowhere", "hi", "--preference", "a=1"), ("ls", "runs")],
)
def test_commands_that_only_read_are_quick(args, tmp_path):
    done, seconds = command(*args, cwd=tmp_path)
    assert done.returncode in (0, 2), done.stderr
    assert seconds < 2.0


def test_the_catalog_says_what_the_classes_say(tmp_path):
    """A process that has not loaded the classes reads what ships; this one has them."""
    done, _ = command("show", "bridge", "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == json.loads(run("show", "bridge", "--json").stdout)
    listed = json.loads(command("ls", "--json", cwd=tmp_path)[0].stdout)
    for kind, known in json.loads(run("ls", "--json").stdout).items():  # other tests register classes of their own
        names = {entry["name"] for entry in listed[kind]}
        assert [entry for entry in known if entry["name"] in names] == listed[kind]


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    script = f"'{sys.executable}' -m paretune show pg | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, env=dict(os.environ))
    assert re.fullmatch(r"learner pg \(version \d+\)\n", done.stdout)
    assert done.stderr == ""


def test_an_unknown_method_mentions_plugins(tmp_path):
    recipe = write_recipe(tmp_path, tiny_model(), method="my-method")
    said = run("fit", recipe, code=2).stderr
    assert "--plugin" in said.split("remedy:")[1]
    assert "--plugin" in run("show", "my-method", code=2).stderr


@pytest.mark.parametrize(("override", "remedy"), [("learner.steps=20", "learner.samples="), ("learner.bach=8", "did you mean 'batch'?")])
def test_a_wrong_override_is_blamed_itself(tmp_path, override, remedy):
    recipe = write_recipe(tmp_path, tiny_model(), learner=SHORT)
    said = run("fit", recipe, override, code=2).stderr
    assert f"(override {override})" in said
    assert "recipe.yaml" not in said
    assert remedy in said.split("remedy:")[1]


# Families by name, and refusals before a model is loaded


def test_families_are_listed_and_found_by_their_names(fitted, monkeypatch):
    recipe, family = fitted
    assert family.name == "support"
    monkeypatch.chdir(recipe.parent)
    (row,) = json.loads(run("ls", "families", "--json").stdout)
    assert (row["name"], row["method"], row["objectives"], row["samples"]) == ("support", "experts", "loud, brief", 32)
    texts = run("sample", "supp", "hi", "--preference", "loud=1").stdout
    assert texts == run("sample", family, "hi", "--preference", "loud=1").stdout
    assert "'support'" in run("sample", "suport", "hi", "--preference", "loud=1", code=2).stderr


def test_an_executor_that_is_none_is_refused_where_nothing_is_left_to_run_too(fitted):
    for more in ((), ("--dry-run",)):
        said = run("fit", fitted[0], "--samples", 0, "--executor", "locl", *more, code=2).stderr
        assert "jobs are run by a known executor" in said
        assert "did you mean 'local'?" in said


def test_a_name_belongs_to_one_family(fitted):
    recipe, _ = fitted
    said = run("fit", recipe, "beta=0.2", "--samples", 0, code=2).stderr
    assert "a name belongs to one family" in said
    assert "fitted before" in run("fit", recipe, "--samples", 0).stderr


def test_runs_are_listed_by_what_they_are(fitted):
    recipe, _ = fitted
    (row,) = json.loads(run("ls", "runs", recipe.parent, "--json").stdout)
    assert (row["name"], row["trainings"], row["families"], row["state"]) == ("runs", 2, 1, "done")
    rows = json.loads(run("ls", "runs", recipe.parent / "runs", "--json").stdout)
    assert {(one["of"], one["state"], one["samples"]) for one in rows} == {("training", "done", 16)}
    assert any(one["what"].startswith("pg at (1, 0)") for one in rows)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
@pytest.mark.parametrize("mode", [0o000, 0o400])
def test_a_folder_that_may_not_be_read_is_passed_by(tmp_path, mode):
    for name in ("closed", "open/runs/artifacts"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "open/runs/.lock").touch()
    (tmp_path / "closed").chmod(mode)
    try:
        (row,) = json.loads(run("ls", "runs", tmp_path, "--json").stdout)
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert row["name"] == "open/runs"


def test_a_failed_and_a_stopped_training_say_so(tmp_path):
    for name in ("artifacts/.wip-aa", "artifacts/.wip-bb", "logs/jobs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".lock").touch()
    (tmp_path / "artifacts/.wip-aa/FAILED.json").write_text(json.dumps({"error": "TrainingError", "message": "no memory\nat all"}))
    (tmp_path / "logs/jobs/train-aa.json").write_text(json.dumps({"label": "pg at (1, 0)"}))
    states = {row["what"]: row["state"] for row in json.loads(run("ls", "runs", tmp_path, "--json").stdout)}
    assert states == {"pg at (1, 0)": "failed: no memory", "bb": "stopped"}


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (("export", "--preference", "loud=.7,brief=.3", "--out", "new"), "mixing 'logit': it mixes the experts' predictions"),
        (("export", "--preference", "loud=1", "--out", "full"), "full exists"),
        (("export", "--preference", "loud=1", "--out", "new", "--as", "mergd"), "'mergd'"),
        (("export", "--preference", "loud=1", "--out", "new", "--model", "./gone"), "nothing at ./gone"),
        (("sample", "--preference", "laud=1"), "'laud'"),
        (("sample", "--preference", "loud=1"), "no PROMPT and no --file"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(fitted, unloadable, tmp_path, monkeypatch, args, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert found in run(args[0], fitted[1], *args[1:], code=2).stderr


def test_a_mixture_is_refused_before_torch_is_imported(fitted, tmp_path):
    asked = ["export", str(fitted[1]), "--preference", "loud=.7,brief=.3", "--out", str(tmp_path / "new")]
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "paretune", *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "mixing 'logit': it mixes the experts' predictions" in done.stderr
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "paretune.policy.card" in imported
    assert not imported & {"torch", "transformers", "scipy"}


def test_a_family_whose_model_has_moved_says_how_to_go_on_before_anything_is_loaded(fitted, unloadable, tmp_path):
    card = json.loads((fitted[1] / "family.json").read_text())
    card["base"] |= {"model": str(tmp_path / "gone"), "beside": "../gone"}
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "family.json").write_text(json.dumps(card))
    said = run("sample", tmp_path / "family", "hi", "--preference", "loud=1", code=2).stderr
    assert "--model FOLDER" in said


def test_sample_separates_its_responses(fitted):
    _, family = fitted
    text = run("sample", family, "one", "two", "--preference", "loud=1", "--n", 2).stdout
    lines = text.splitlines()
    assert [line for line in lines if line.startswith(("===", "---"))] == [
        *("=== one", "--- 1 of 2", "--- 2 of 2"),
        *("=== two", "--- 1 of 2", "--- 2 of 2"),
    ]
    alone = run("sample", family, "one", "--preference", "loud=1").stdout
    assert "---" not in alone  # one response goes into a pipe as it is


# A first recipe


def init(folder, rows, name="prompts.jsonl"):
    write_lines(folder / name, rows)
    run("init", tiny_model(), folder / name, "--out", folder / "recipe.yaml")
    return yaml.safe_load((folder / "recipe.yaml").read_text())


@pytest.mark.parametrize(
    ("row", "prompts", "objectives"),
    [
        ({"prompt": "say {}"}, {"path": "./prompts.jsonl", "chat": True, "test": 0.2}, ["length", "fluency"]),
        ({"id": "x", "question": "why {}?", "answer": "{}"}, {"column": "question", "chat": True}, ["length", "answer"]),
        ({"messages": [{"role": "user", "content": "hello {}"}]}, {"column": "messages"}, ["length", "fluency"]),
        ({"messages": '[{{"role": "user", "content": "hello {}"}}]'}, {"column": "messages"}, ["length", "fluency"]),
        ({"chosen": "\n\nHuman: hi {}\n\nAssistant: well"}, {"column": "chosen", "transcript": "messages"}, ["length", "fluency"]),
    ],
    ids=["text", "answers", "messages", "messages-as-text", "transcript"],
)
def test_init_writes_a_recipe_that_loads(tmp_path, row, prompts, objectives):
    def filled(value, n):
        if isinstance(value, list):
            return [{**one, "content": one["content"].format(n)} for one in value]
        return value.format(n)

    given = init(tmp_path, [{key: filled(value, n) for key, value in row.items()} for n in range(10)])
    assert prompts.items() <= given["prompts"].items()
    assert ("chat" in given["prompts"]) == ("chat" in prompts)
    assert [one["use"] for one in given["objectives"]] == objectives
    assert mistakes(tmp_path / "recipe.yaml") == []


@pytest.mark.parametrize(
    ("answers", "use"), [([0, 1, 2.5], "answer"), ([True, True, True], "fluency"), ([None, 1, 2], "fluency"), (["", 1, 2], "fluency")]
)
def test_init_takes_numbers_for_answers_and_no_marks(tmp_path, answers, use):
    given = init(tmp_path, [{"prompt": f"how many {n}?", "answer": answers[n % 3]} for n in range(12)])
    assert [one["use"] for one in given["objectives"]] == ["length", use]


def test_init_keeps_what_is_there_and_removes_what_it_cannot_use(tmp_path):
    (tmp_path / "recipe.yaml").write_text("mine")
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert "exists" in run("init", tiny_model(), tmp_path / "prompts.jsonl", "--out", tmp_path / "recipe.yaml", code=2).stderr
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    write_lines(tmp_path / "numbers.jsonl", [{"n": 1}, {"n": 2}])
    said = run("init", tiny_model(), tmp_path / "numbers.jsonl", "--out", tmp_path / "new.yaml", code=2).stderr
    assert "a column holds prompts" in said
    assert not (tmp_path / "new.yaml").exists()


def test_init_sets_prompts_apart_where_there_are_many_and_takes_the_test_file(tmp_path):
    write_lines(tmp_path / "test.jsonl", [{"prompt": f"other {n}"} for n in range(9)])
    given = init(tmp_path, [{"prompt": f"say {n}"} for n in range(80)] * 2, name="train.jsonl")
    assert given["prompts"]["test"] == "./test.jsonl"
    assert given["prompts"]["validation"] == 10
    assert given["prompts"]["unique"] is True
    task = load_recipe(tmp_path / "recipe.yaml").task
    assert (len(task.prompts("train")), len(task.prompts("test")), len(task.validation())) == (70, 9, 10)
    (tmp_path / "elsewhere").mkdir()
    run("init", tiny_model(), tmp_path / "train.jsonl", "--out", tmp_path / "elsewhere" / "recipe.yaml")
    assert len(load_recipe(tmp_path / "elsewhere" / "recipe.yaml").task.prompts("test")) == 9


BAD = """
model: ./missing
promts: x
prompts: {path: prompts.jsonl, tset: 0.3}
objectives:
  - {name: loud, use: "rewards.py:shoot", low: 0, high: 1}
  - {name: brief, use: lenght, half: 10}
  - {name: half, use: length, half: -1}
  - {name: right, use: answer, column: solution}
  - {name: good, use: length}
method: {name: bridge, effrt: 1, rank: -2}
learner: {name: pg, sampels: 10, lr: abc}
beta: -1
dtype: float33
max_new_tokens: 0
seed: x
preferences: 1
"""


def test_preview_says_all_mistakes_at_once_with_their_lines(tmp_path):
    write_recipe(tmp_path, tiny_model())
    (tmp_path / "bad.yaml").write_text(BAD)
    found = [str(error) for error in mistakes(tmp_path / "bad.yaml")]
    wanted = ["'promts'", "'tset'", "'x'", "beta=-1", "max_new_tokens=0", "'float33'", "'shoot'", "'lenght'", "half=-1", "'effrt'"]
    wanted += ["found:  -2", "'sampels'", "'abc'", "found:  1 ", "nothing at", "'solution'"]
    assert [[text in one for one in found].count(True) for text in wanted] == [1] * len(wanted)
    assert len(found) == len(wanted), "and nothing that only follows from another"
    said = run("preview", tmp_path / "bad.yaml", code=2).stderr
    assert said.count("remedy:") == len(wanted)


@pytest.mark.parametrize(
    "prompts", [{"validation": -1}, {"unlabelled": 3}, {"validation": 0.2}, {"unlabelled": "other.jsonl"}, {"system": "x"}]
)
def test_one_mistake_is_told_once(tmp_path, prompts):
    """With its line and without were two."""
    write_lines(tmp_path / "other.jsonl", [{"prompt": [{"role": "user", "content": "where is it?"}]}])
    (error,) = mistakes(write_recipe(tmp_path, tiny_model(), prompts={"path": "prompts.jsonl", **prompts}))
    assert "recipe.yaml, line" in error.found


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"learner": SHORT}, []),
        ({"learner": {"name": "pg", "kl_in": "loss", "kl_estimator": "k3"}}, []),
        ({"learner": {**SHORT, "lr": "abc"}}, ["learner pg: lr"]),
        ({"learner": {**SHORT, "samples": 4}}, ["samples are at least one batch"]),
        ({"learner": "pq"}, ["a learner is known by its name"]),
    ],
)
def test_fields_that_go_together_are_no_mistakes_beside_another(tmp_path, changes, rules):
    """Each field was looked at beside the defaults of the others: 16 samples were too few for a batch that the recipe does not have."""
    found = [error.rule for error in mistakes(write_recipe(tmp_path, tiny_model(), beta=-1, **changes))]
    assert found[0].startswith("beta")
    assert [rule.startswith(wanted) for rule, wanted in zip(found[1:], rules, strict=True)] == [True] * len(rules)


MINE = """
def five(completions, **columns):
    return [5.0] * len(completions)


def breaks(completions, **columns):
    raise ValueError("oh")
"""


def test_preview_shows_what_the_model_sees_and_every_reward_on_real_responses(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    objectives = [{"name": "same", "use": "mine.py:five", "low": 0, "high": 5}, {"name": "brief", "use": "length", "half": 10}]
    guards = [{"name": "broken", "use": "mine.py:breaks", "low": 0, "high": 1}]
    prompts = {"path": "prompts.jsonl", "chat": True, "system": "Be kind."}
    recipe = write_recipe(tmp_path, tiny_model(), objectives=objectives, guards=guards, prompts=prompts)
    result = run("preview", recipe, "--prompts", 2, "--n", 3, "--json", code=2)
    found = json.loads(result.stdout)
    task = load_recipe(recipe).task
    messages = [dict(message) for message in task.prompts("train")[0].messages]
    wanted = task.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found["prompts"][0]["seen"] == wanted
    assert "Be kind." in wanted
    assert len(found["prompts"]) == 2
    assert [len(prompt["responses"]) for prompt in found["prompts"]] == [3, 3]
    rows = {row["name"]: row for row in found["scores"]}
    assert set(rows) == {"same", "brief"}
    assert any("'same' is constant" in remark for remark in found["remarks"])
    cut = [answer["cut"] for prompt in found["prompts"] for answer in prompt["responses"]]
    assert found["cut"] == pytest.approx(sum(cut) / 6)
    scored = [answer["scores"]["brief"] for prompt in found["prompts"] for answer in prompt["responses"]]
    assert rows["brief"]["mean"] == pytest.approx(sum(scored) / 6)
    assert "ValueError: oh (mine.py, line 7)" in result.stderr


def test_the_schema_takes_what_loads_and_refuses_typing_errors(tmp_path):
    validator = pytest.importorskip("jsonschema").Draft202012Validator(recipe_schema())
    validator.check_schema(validator.schema)
    examples = [*ROOT.glob("examples/*/recipe.yaml"), *ROOT.glob("examples/recipes/*.yaml"), write_recipe(tmp_path, "m")]
    assert len(examples) > 8
    for path in examples:
        assert [error.message for error in validator.iter_errors(yaml.load(path.read_text(), Numbers))] == [], path
    good = yaml.safe_load(examples[-1].read_text())
    for change in (
        {"promts": 1},
        {"beta": "x"},
        {"method": "expert-s"},
        {"method": {"name": "bridge", "effrt": 1}},
        {"learner": {"lr": "x"}},
    ):
        assert not validator.is_valid(good | change), change
    assert validator.is_valid(good | {"learner": {"lr": 0.1}, "method": {"mixing": "logit"}})
    assert not validator.is_valid({**good, "objectives": [*good["objectives"], {"use": "lenght"}]})
    assert not validator.is_valid({**good, "prompts": {"path": "x", "colum": "y"}})


class Numbers(yaml.SafeLoader):
    """YAML as recipes are read: 1e-3 is a number."""


Numbers.add_implicit_resolver("tag:yaml.org,2002:float", __import__("re").compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def test_the_schema_has_every_field_of_every_class():
    made = recipe_schema()["$defs"]
    for kind, registry in (("method", METHODS), ("learner", LEARNERS), ("objective", OBJECTIVES)):
        for name in registry:
            fields = {field.name for field in dataclasses.fields(registry[name]) if field.init}
            known = made["objective-own" if name == "function" else f"{kind}-{name}"]["properties"]
            assert fields <= set(known), name


# Suites and recipes speak one language


def suite(folder, **changes):
    given = {
        "name": "mine",
        "tasks": [{"recipe": "recipe.yaml"}],
        "methods": ["reference", "experts"],
        "seeds": [0],
        "samples": 4,
    } | changes
    path = folder / "file.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def test_a_suite_takes_the_task_and_the_learner_of_a_recipe(tmp_path):
    recipe = write_recipe(tmp_path, tiny_model(), learner=SHORT)
    whole = load_recipe(recipe)
    members = members_of(*load_suite(suite(tmp_path)))
    assert [describe(member.task) for member in members] == [describe(whole.task)] * 2
    assert describe(members[0].learner) == describe(whole.learner)
    other = members_of(*load_suite(suite(tmp_path, learner={"name": "pg", "samples": 64}, tasks=["recipe.yaml"])))
    assert other[0].learner.samples == 64
    several = members_of(*load_suite(suite(tmp_path, tasks=[{"recipe": "recipe.yaml", "beta": [0.1, 0.2], "max_new_tokens": 3}])))
    assert {(member.task.beta, member.task.max_new_tokens) for member in several} == {(0.1, 3), (0.2, 3)}
    own = {key: value for key, value in yaml.safe_load(recipe.read_text()).items() if key not in ("learner", "output")}
    inline = members_of(*load_suite(suite(tmp_path, tasks=[{"name": "recipe", **own}])))
    assert describe(inline[0].task) == describe(whole.task)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"recipe": "missing.yaml"}, "missing.yaml"),
        ({"recipe": "recipe.yaml", "bta": 1}, "'bta'"),
        ({"recipe": "recipe.yaml", "method": "bridge"}, "'method'"),
        ({"recipe": 3}, "3"),
        ({"name": "recipe", "prompts": "prompts.jsonl", "objectives": []}, "no model"),
    ],
)
def test_a_wrong_recipe_in_a_suite_says_where(tmp_path, entry, found):
    write_recipe(tmp_path, tiny_model(), learner=SHORT)
    said = run("bench", suite(tmp_path, tasks=[entry]), "--dry-run", code=2).stderr
    assert found in said
    assert "file.yaml, line" in said


def test_recipes_with_other_learners_need_one_of_the_suite(tmp_path):
    write_recipe(tmp_path / "b", tiny_model(), learner={**SHORT, "samples": 32})
    write_recipe(tmp_path, tiny_model(), learner=SHORT)
    said = run("bench", suite(tmp_path, tasks=["recipe.yaml", "b/recipe.yaml"]), "--dry-run", code=2).stderr
    assert "a suite has one learner" in said


def test_a_recipe_for_bench_and_a_suite_for_fit_are_sent_to_the_right_command(tmp_path):
    recipe = write_recipe(tmp_path, tiny_model())
    assert "paretune compare" in run("bench", recipe, code=2).stderr
    assert "paretune bench" in run("fit", suite(tmp_path), code=2).stderr


def test_the_run_directory_of_a_suite_has_its_name(tmp_path, monkeypatch):
    write_recipe(tmp_path, tiny_model(), learner=SHORT)
    monkeypatch.chdir(tmp_path)
    said = run("bench", suite(tmp_path), "name=other", "--dry-run").stdout
    assert "paretune-runs/other" in said


def test_compare_uses_the_trainings_of_fit_again(fitted, monkeypatch):
    """The recipe's own run directory: what `fit` trained is there, the untrained model's row too."""
    monkeypatch.setattr("paretune.runs.suite._executor", lambda *_: "in-process")
    recipe, _ = fitted
    args = ["--methods", "experts,{name: experts, mixing: parameter}", "--samples", 4, "--workers", 1, "--json"]
    made = json.loads(run("compare", recipe, *args).stdout)
    assert made["run"]["trained"] == 0
    assert made["run"]["reused"] == 2
    assert {row["method"] for row in made["leaderboard"]} == {"reference", "experts logit", "experts parameter"}
    assert Path(made["report"]).is_relative_to(recipe.parent / "runs" / "reports")
    assert "known by its name" in run("compare", recipe, "--methods", "expers", code=2).stderr
    assert "--methods" in run("compare", recipe, "--methods", "1,2", code=2).stderr


# What it will cost


def test_a_dry_run_counts_everything_and_leaves_nothing(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, tiny_model(), learner=SHORT, method="bridge", preferences=5)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    found = json.loads(run("fit", recipe, "--dry-run", "--json", "--samples", 10).stdout)
    assert [one["samples"] for one in found["trainings"]] == [16, 16, 16]
    assert [one["wave"] for one in found["trainings"]] == [0, 0, 1]
    assert found["whole"] is True
    assert (found["samples"], found["tokens_at_most"]) == (48, 48 * 8)
    assert found["measured_responses"] == 10 * (5 + 1)
    assert 0 < found["seconds"]["training"] < 60
    assert found["memory_bytes"] > 0
    assert "thrown away" in found["estimated_from"]
    assert not (tmp_path / "runs").exists()


def test_unlabelled_prompts_and_who_trains_on_them_go_together(tmp_path):
    (tmp_path / "more.jsonl").write_text('{"prompt": "Customer: is it here?\\nAgent:"}\n')
    recipe = write_recipe(tmp_path, tiny_model(), learner={**SHORT, "samples": 48, "scored": 16, "unlabelled": 1})
    (error,) = mistakes(recipe)
    assert error.rule == "learner.unlabelled asks for prompts without rewards"
    assert "recipe.yaml, line" in error.found
    recipe = write_recipe(tmp_path, tiny_model(), learner=SHORT, prompts={"path": "prompts.jsonl", "unlabelled": "more.jsonl"})
    assert "prompts.unlabelled is not used" in run("preview", recipe, "--prompts", 1, "--n", 2).stdout
    assert "prompts.unlabelled is not used" in run("fit", recipe, "--samples", 0).stderr


def test_a_dry_run_of_a_training_with_a_reward_model_or_a_sharded_base(tmp_path):
    """Two steps are too few to fit a reward model, and one process has no shares of a base."""
    (tmp_path / "more.jsonl").write_text('{"prompt": "Customer: is it here?\\nAgent:"}\n')
    prompts = {"path": "prompts.jsonl", "unlabelled": "more.jsonl"}
    recipe = write_recipe(tmp_path, tiny_model(), learner={**SHORT, "samples": 48, "scored": 16, "unlabelled": 1}, prompts=prompts)
    found = json.loads(run("fit", recipe, "--dry-run", "--json").stdout)
    assert [one["samples"] for one in found["trainings"]] == [48, 48]
    assert found["seconds"]["training"] > 0
    shared = ("fit", recipe, "learner.scored=0", "learner.unlabelled=0", "learner.processes=2", "learner.shard=true", "--dry-run")
    assert "2 trainings to do: 96 samples" in (told := run(*shared).stdout)
    assert "time and memory are unknown" in told
    assert json.loads(run(*shared, "--json").stdout)["estimated_from"] is None


def test_a_dry_run_knows_the_rate_of_what_was_trained_and_asks_no_judge(fitted):
    recipe, _ = fitted
    judge = "{name: helpful, use: judge, url: 'http://127.0.0.1:9/v1', model: m, rubric: r}"
    made = run("fit", recipe, "method=bridge", "name=null", "--dry-run")
    assert "1 training to do (2 are there): 16 samples, at most 64 tokens; then" in made.stdout
    assert "estimated from 2 like trainings in" in made.stdout
    found = json.loads(run("fit", recipe, f"objectives=[{{use: length}}, {judge}]", "name=null", "--dry-run", "--json").stdout)
    assert found["judged"] == ["helpful"]


def test_plans_that_look_at_results_say_that_more_may_come(tmp_path):
    recipe = write_recipe(tmp_path, tiny_model(), learner=SHORT, method="ols")
    made = run("fit", recipe, "--dry-run").stdout
    assert "and more that the plan chooses by their results" in made


def test_a_fit_begins_with_what_it_will_do(fitted):
    recipe, _ = fitted
    said = run("fit", recipe, "name=second", "beta=0.3", "--samples", 0).stderr
    assert said.splitlines()[0] == "2 trainings to do: 32 samples, at most 128 tokens"


def test_a_dry_run_of_a_suite_counts_later_waves(tmp_path):
    write_recipe(tmp_path, tiny_model(), learner=SHORT)
    planned = run_suite(suite(tmp_path, methods=["experts", "bridge"]), tmp_path / "runs", dry_run=True)
    assert planned.foreseen["samples"] == 48
    assert planned.foreseen["whole"] is True
    assert "48 samples and at most 384 tokens" in planned.text()


def test_a_dry_run_of_a_plan_that_is_refused_has_the_exit_code_of_the_run(tmp_path):
    write_recipe(tmp_path, tiny_model(), learner=SHORT, terms={"constraints": {"brief": 0.3}})
    (tmp_path / "suite.yaml").write_text("name: s\ntasks: [{recipe: recipe.yaml}]\nmethods: [bridge]\nseeds: [0]\nsamples: 4\n")
    made = run("bench", tmp_path / "suite.yaml", "--dry-run", "--root", tmp_path / "runs", code=1)
    assert "follows one preference" in made.stdout


def test_the_command_that_fit_suggests_asks_a_prompt_of_the_recipe(fitted):
    recipe, _ = fitted
    line = run("fit", recipe, "--samples", 0).stdout.splitlines()[-1]
    typed = line.split("--preference ")[1].split(" ", 1)[1]
    asked = subprocess.run(["bash", "-c", f"printf %s {typed}"], capture_output=True, text=True, check=True).stdout
    assert asked == load_recipe(recipe).task.prompts("test")[0].text


# In a notebook


def test_an_evaluation_of_samples_says_its_gain_on_test_prompts(fitted):
    import paretune as pt

    recipe, folder = fitted
    family = pt.Family.load(folder)
    report = pt.evaluate(load_recipe(recipe).task, family, samples=6)
    gains = [one["value"] for one in report.metrics["splits"]["test"]["gain"]["per_preference"]]
    assert (report.quality, report.split) == ("gain", "test")
    assert report.worst == min(gains)
    assert report.mean == pytest.approx(sum(gains) / len(gains))
    said = f"worst {_number(report.worst)}, mean {_number(report.mean)}"
    assert repr(report) == f"<Evaluation: gain on test prompts at 11 preferences: {said}>"
    page = report._repr_html_()
    assert page.count("<tr>") == 12
    assert "95 %" not in page  # two prompts are too few for an interval
    assert "loud, brief" in repr(family)
    assert "<td>experts</td>" in family._repr_html_()
    assert max(len(repr(family)), len(repr(report))) < 500


def _number(value):
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def test_a_table_for_a_notebook_shows_texts_and_runs_nothing():
    from paretune.errors import html_table

    assert "<script>" not in html_table("<script>", ["<script>"], [["<script>"]])


def test_an_evaluation_knows_what_is_unknown():
    from paretune.evaluation.evaluate import Evaluation

    split = {"attainment": {"per_preference": [None, 0.5]}, "rewards": [[0.1], [None]], "kl": {"per_preference": [0.1, None]}}
    metrics = {"exact": True, "objectives": ["a"], "preferences": [[1.0], [1.0]], "splits": {"test": split}}
    one = Evaluation({}, metrics, None)
    assert (one.split, one.worst, one.mean) == ("test", 0.5, 0.5)
    assert "\N{EN DASH}" in one._repr_html_()
    metrics["exact"], split["gain"] = False, {"per_preference": [{"value": 0.25, "low": 0.125, "high": 0.5, "n": 9}] * 2}
    assert "<td>[0.125, 0.500]</td>" in one._repr_html_()
    metrics["exact"], split["attainment"]["per_preference"] = True, [None, None]
    assert (one.worst, one.mean) == (None, None)

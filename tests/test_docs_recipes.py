"""Every example of docs/recipes.md: its files are written, read and used; its commands exist."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from judge_server import JudgeServer, verdict
from paretune.cli import app
from paretune.runs.recipes.recipe import load_recipe
from recipe_files import tiny_model, write_lines
from tiny_rewards import bert, causal, gpt2_reward

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def block(kind, mark):
    (found,) = [text for language, text in BLOCKS if language == kind and mark in text]
    return found


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The page's prompts, objectives and judge in one recipe, with a server in the judge's place."""
    gpt2_reward(tmp_path / "reward")
    bert(tmp_path / "classifier")
    bert(tmp_path / "encoder", "BertModel")
    causal(tmp_path / "small-lm")
    (tmp_path / "rewards.py").write_text(block("python", "# rewards.py"))
    row = json.loads(block("json", "capital of France"))
    write_lines(tmp_path / "prompts.jsonl", [{**row, "question": f"{row['question']} {n}"} for n in range(8)])
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    with JudgeServer(lambda *_: verdict(10)) as server:
        judge = yaml.safe_load(block("yaml", "# judge.yaml")) | {"url": server.url}
        given = {
            "model": str(tiny_model()),
            "prompts": yaml.safe_load(block("yaml", "# prompts.yaml")),
            "objectives": [*yaml.safe_load(block("yaml", "# objectives.yaml")), judge],
            "max_new_tokens": 8,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
        yield tmp_path / "recipe.yaml"


def test_what_is_watched_is_set_apart_and_guarded(recipe):
    watched = yaml.safe_load(block("yaml", "# watched.yaml"))
    given = yaml.safe_load(recipe.read_text())
    given["prompts"]["validation"], given["guards"] = watched["prompts"]["validation"], watched["guards"]
    given["objectives"] = [spec for spec in given["objectives"] if spec["name"] != "fluent"]
    recipe.write_text(yaml.safe_dump(given))
    task = load_recipe(recipe).task
    assert len(task.validation()) == 2
    assert task.guards.names == ("fluent",)


def test_the_terms_of_the_page_gate_and_are_trained(recipe, tmp_path):
    """In the page's words, on two of its objectives: a wrong answer is not brief, and weights come from `correct` to the preference."""
    given = yaml.safe_load(recipe.read_text())
    given["objectives"] = [spec for spec in given["objectives"] if spec["name"] in ("correct", "brief")]
    learner = {"name": "pg", "samples": 32, "batch": 8, "group": 4, "rank": 2, "log_every": 1}
    given |= yaml.safe_load(block("yaml", "# terms.yaml")) | {"learner": learner, "max_new_tokens": 4, "output": str(tmp_path / "runs")}
    recipe.write_text(yaml.safe_dump(given))
    task = load_recipe(recipe).task
    prompt = task.prompts("train")[0]
    scores_NM = task.score([prompt] * 2, ["The answer is Paris", "Rome"])
    assert scores_NM[:, task.objectives.names.index("correct")].tolist() == [1.0, 0.0]
    assert scores_NM[0, task.objectives.names.index("brief")] > 0
    assert scores_NM[1, task.objectives.names.index("brief")] == 0
    ran = CliRunner().invoke(app, ["fit", str(recipe), "--samples", "0"])
    assert ran.exit_code == 0, ran.output
    logs = [[json.loads(line) for line in log.read_text().splitlines()] for log in (tmp_path / "runs").glob("artifacts/*/train.jsonl")]
    assert len(logs) == 2
    for log in logs:
        assert log[0]["weights"]["correct"] > 0.9  # the prices of the constraint are small yet
        assert sum(log[-1]["weights"].values()) == pytest.approx(1)


def test_prompts_without_rewards_need_no_columns(recipe):
    asked, given = yaml.safe_load(block("yaml", "# unlabelled.yaml")), yaml.safe_load(recipe.read_text())
    write_lines(recipe.parent / "more.jsonl", [{"question": f"What is {n}?"} for n in range(3)])
    given["prompts"]["unlabelled"], given["learner"] = asked["prompts"]["unlabelled"], asked["learner"]
    recipe.write_text(yaml.safe_dump(given))
    loaded = load_recipe(recipe)
    assert len(loaded.task.unlabelled(asked["learner"]["unlabelled"])) == 3
    loaded.task.check()


def test_the_examples_make_a_recipe_that_scores(recipe, capsys):
    task = load_recipe(recipe).task
    prompt = task.prompts("train")[0]
    assert [m["role"] for m in prompt.messages] == ["system", "user"]
    assert prompt.columns["answer"] == "Paris"
    scores = dict(zip(task.objectives.names, task.score([prompt], ["The answer is Paris"])[0], strict=True))
    assert scores["correct"] == scores["short"] == scores["helpful"] == 1.0
    assert set(scores) == {"correct", "brief", "short", "close", "fluent", "good", "funny", "own", "helpful"}
    assert all(
        low <= scores[n] <= high for n, low, high in zip(task.objectives.names, task.objectives.low, task.objectives.high, strict=True)
    )
    capsys.readouterr()
    exec(compile(block("python", "read_usage"), "docs/recipes.md", "exec"), {})
    assert capsys.readouterr().out == "1 10 5 {}\n"


def test_the_suite_of_the_page_runs(recipe, tmp_path):
    suite = yaml.safe_load(block("yaml", "# suite.yaml"))
    two = [{"name": "correct", "use": "answer"}, {"name": "brief", "use": "length"}]
    suite["tasks"][0] |= {"objectives": two, "beta": 0.1, "max_new_tokens": 4}
    suite |= {"learner": {"name": "pg", "samples": 16, "batch": 8, "group": 4, "rank": 2}, "samples": 2}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    ran = CliRunner().invoke(app, ["bench", "suite.yaml", "--root", "runs", "--executor", "in-process", "--json"])
    assert ran.exit_code == 0, ran.output
    rows = json.loads(ran.stdout)["leaderboard"]
    assert {row["method"] for row in rows} == set(suite["methods"])


def test_the_command_of_the_page_prints_what_can_be_pasted(recipe):
    ran = CliRunner().invoke(app, ["normalize", str(recipe), "--samples", "2", "--limit", "3"])
    assert ran.exit_code == 0, ran.output
    assert re.search(r"^good: normalize: \{mean: .*, std: .*, from: \".*\"\}$", ran.stdout, re.MULTILINE)


def test_the_table_lists_every_recipe_with_its_objectives():
    rows = dict(re.findall(r"^\| `(\S+\.yaml)` \| (.*?) \|", PAGE, re.MULTILINE))
    found = {}
    for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml")):
        found[path.name] = ", ".join(spec["name"] for spec in yaml.safe_load(path.read_text(encoding="utf-8"))["objectives"])
    assert rows == found


def test_settings_that_the_page_names_exist():
    ran = CliRunner().invoke(app, ["show", "reward-model", "--json"])
    names = {field["name"] for field in json.loads(ran.stdout)[0]["fields"]}
    assert {"device", "dtype", "batch", "max_tokens", "negate", "output", "input", "normalize", "label"} <= names

"""The example with verifiable rewards: its questions, its rewards on answers whose scores are known, its recipe with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paretune.cli import app
from paretune.objectives import verifiable
from paretune.runs.recipes.recipe import load_recipe
from recipe_files import tiny_model

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "reasoning"
ROWS = {name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "test")}


def module(name):
    spec = importlib.util.spec_from_file_location(f"reasoning_{name}", FOLDER / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def task():
    return load_recipe(FOLDER / "recipe.yaml", [f"model={tiny_model()}"]).task


def test_the_questions_are_enough_and_none_stands_twice_in_another_order():
    assert (len(ROWS["train"]), len(ROWS["test"])) == (256, 64)
    asked = [tuple(sorted(re.findall(r"\w+", row["question"]))) for rows in ROWS.values() for row in rows]
    assert len(set(asked)) == len(asked)
    counts = {name: Counter(row["task"] for row in rows) for name, rows in ROWS.items()}
    made = module("make_prompts")
    assert counts["train"] == dict.fromkeys(made.TASKS, 32)
    assert counts["test"] == dict.fromkeys(made.TASKS, 4) | dict.fromkeys(made.ONLY_TEST, 16)
    for rows in ROWS.values():
        assert all(set(row) == {"question", "answer", "task"} for row in rows)
        assert all(row["question"] == row["question"].strip() != "" for row in rows)


def by_hand(row):
    """The answer, computed here from the numbers and words of the question."""
    question = row["question"]
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    match row["task"]:
        case "chain_sum":
            return eval(question.partition(":")[2].rstrip(" ="))
        case "products":
            return math.prod(numbers)
        case "gcd":
            return math.gcd(*numbers)
        case "lcm":
            return math.lcm(*numbers)
        case "count_primes":
            return sum(n > 1 and all(n % d for d in range(2, n)) for n in range(numbers[0], numbers[1] + 1))
        case "letter_counting":
            letter, text = re.findall(r'"([^"]*)"', question)
            return text.lower().count(letter)
        case "simple_equations":
            left, right = question.rpartition(": " if ": " in question else "satisfies: ")[2].split(" = ")
            name = re.search("[a-z]", left)[0]
            return next(n for n in range(-9, 10) if eval(left, {name: n}) == int(right))
        case "simple_geometry":
            return 180 - sum(int(angle) for angle in re.findall(r"(\d+)\.0°", question))
    return int(row["answer"])  # legs and sequences


@pytest.mark.parametrize("name", ROWS)
def test_the_answers_are_numbers_and_right(name):
    for row in ROWS[name]:
        assert int(row["answer"]) == by_hand(row), row


def test_the_readme_says_what_guessing_earns():
    answers = {
        task: Counter(row["answer"] for row in ROWS["train"] if row["task"] == task) for task in {row["task"] for row in ROWS["train"]}
    }
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    share = sum(counts.most_common(1)[0][1] for counts in answers.values()) / 256
    assert f"until it is above\n{share:.2f}.**".replace("0.", ".") in readme
    assert f"for {sum(counts['1'] for counts in answers.values())} of the 256" in readme


def test_what_is_committed_is_what_the_script_draws():
    pytest.importorskip("reasoning_gym")
    made = module("make_prompts")
    wanted, found = re.search(r"reasoning-gym==(\S+)", made.__doc__)[1], version("reasoning-gym")
    if found != wanted:
        pytest.skip(f"drawn with reasoning-gym {wanted}; found: {found}")
    assert made.draw() == ROWS


@pytest.mark.parametrize(
    ("answer", "correct", "brief", "form"),
    [
        ("The answer is 12.", 1, 1, 1),
        (" the answer is 12.\n", 1, 2 ** (-2 / 30), 1),  # its length is that of all characters
        ("The answer is 12", 1, 2 ** (-1 / 30), 0.75),
        ("The answer is +12.0.", 1, 2 ** (-3 / 30), 1),
        ("The answer is twelve.", 0, 2 ** (-4 / 30), 0.25),
        ("\\boxed{12}", 1, 2 ** (-7 / 30), 0),  # another form that announces it
        ("3 * 4 = 12. The answer is 12.", 1, 2 ** (-12 / 30), 0.75),
        ("The answer is 12 because it is.", 1, 2 ** (-14 / 30), 0.5),
        ("The answer is 13.", 0, 1, 1),
        ("The answer is -12.", 0, 2 ** (-1 / 30), 1),
        ("The answer is 1200.", 0, 2 ** (-2 / 30), 1),
        ("The answer isn't 12.", 0, 2 ** (-3 / 30), 0),
        ("12", 0, 2 ** (-15 / 30), 0),
        ("", 0, 2 ** (-17 / 30), 0),
        (" \n", 0, 2 ** (-15 / 30), 0),
        ("The answer is", 0, 2 ** (-4 / 30), 0.25),  # cut off before the number
        ("The answer is 1", 0, 2 ** (-2 / 30), 0.75),  # and in it
        ("It is 3 * 4, and so the answer", 0, 2 ** (-13 / 30), 0),
    ],
)
def test_scores_by_hand(task, answer, correct, brief, form):
    (prompt,) = [prompt for prompt in task.prompts("train") if prompt.columns["answer"] == "12"][:1]
    assert task.score([prompt], [answer])[0].tolist() == pytest.approx([correct, brief, form])


GAMES = {
    "all numbers listed": " ".join(map(str, range(101))),
    "all numbers after the words": "The answer is " + ", ".join(map(str, range(101))) + ".",
    "an answer for each number": " ".join(f"The answer is {n}." for n in range(101)),
    "the question again": "Solve the following multiplication: 3 * 4.",
    "the words again and again": "The answer is the answer is the answer is the answer is",
}


@pytest.mark.parametrize("what", GAMES)
def test_games_are_one_guess_at_most_and_neither_brief_nor_in_form(task, what):
    """Over all answers from 0 to 100, a text is right for one of them at most."""
    prompt = task.prompts("train")[0]
    correct = verifiable.Answer()
    right = sum(correct([prompt.text], [GAMES[what]], answer=[str(n)])[0] for n in range(101))
    assert right <= 1
    _, brief, form = task.score([prompt], [GAMES[what]])[0]
    assert brief < 0.6
    assert form <= 0.75


def test_a_conversation_is_scored_by_its_last_message():
    form = module("rewards").form
    assert form([[{"role": "assistant", "content": "The answer is 3."}], "The answer is 3, 4"], answer=["3", "3"]) == [1.0, 0.5]


def test_the_recipe_with_a_tiny_model(task):
    assert task.objectives.names == ("correct", "brief", "form")
    assert (task.objectives.low, task.objectives.high) == ((0.0,) * 3, (1.0,) * 3)
    assert (len(task.prompts("train")), len(task.prompts("test"))) == (256, 64)
    prompt = task.prompts("test")[0]
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    assert '"The answer is"' in prompt.messages[0]["content"]
    assert prompt.messages[1]["content"] == ROWS["test"][0]["question"]
    answers = [f"The answer is {prompt.columns['answer']}." for prompt in task.prompts("test")]
    scores_PM = task.score(task.prompts("test"), answers)
    assert scores_PM[:, [0, 2]].tolist() == [[1.0, 1.0]] * 64
    assert scores_PM[:, 1].min() > 0.9


def test_fit_trains_and_measures(tmp_path):
    run = CliRunner().invoke(
        app,
        ["fit", str(FOLDER / "recipe.yaml"), f"model={tiny_model()}", f"output={tmp_path}", "learner.samples=64", "learner.rank=2",
         "max_new_tokens=8", "preferences=[[1, 0, 0], [0, 0.5, 0.5]]", "--samples", "64", "--json"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert Path(json.loads(run.stdout)["family"]).is_dir()
    assert len(list(tmp_path.glob("artifacts/*/DONE"))) == 4  # three experts and the bridge

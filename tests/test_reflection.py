"""The text task: its language, its objectives on good, bad and dishonest answers, and learning on it."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from paretune.errors import ConfigError, TaskError
from paretune.evaluation.evaluate import compare, evaluate, spread_out
from paretune.objectives.text import words_of
from paretune.registry import LEARNERS, METHODS, TASKS
from paretune.report.data import load
from paretune.report.page import write_page
from paretune.runs.suite import fit, run_suite
from paretune.seeds import generator
from paretune.tasks.reflection.language import EVENTS, NOUNS, SPLITS, answer, dialogues, listed, prompt_of, situations, statements
from paretune.tasks.reflection.objectives import FEELINGS, STOP, SYNONYMS, Brevity, Empathy, Reflection, content_of, feelings_in, meanings
from paretune.tasks.reflection.task import MODEL, ReflectionTask
from paretune.testing import check_method, check_objective, check_task

ROOT = Path(__file__).resolve().parent.parent
SAID = "My mother laughed at my novel, and I think about it at work. I feel hurt."
TINY = ReflectionTask(train_count=4, validation_count=2, test_count=4, max_new_tokens=8)
QUICK = {"name": "pg", "samples": 8, "batch": 4, "group": 2, "rank": 2, "targets": ["q_proj", "v_proj"]}


def reflected(text, statement=SAID):
    return Reflection()(["p"], [text], statement=[statement])[0]


def felt(text, right=("hurt",)):
    return Empathy()(["p"], [text], feelings=[list(right)])[0]


def brief(text):
    return Brevity()(["p"], [text])[0]


# The language


def test_no_situation_of_one_split_occurs_in_another():
    sets = [set(situations(split)) for split in SPLITS]
    assert sum(map(len, sets)) == len(set().union(*sets)) <= sum(len(listed(NOUNS[event.noun])) for event in EVENTS.values())
    assert len(sets[0]) > 2 * len(sets[2]) > 80
    for split, allowed in zip(SPLITS, sets, strict=True):
        made = statements(split, 500, 3)
        assert {s.situation for s in made} <= allowed
        assert all(s.slots["noun"] in words_of(s.text) or s.slots["noun"] in s.text for s in made), "the noun is in the text"
    assert len({s.situation[0] for s in statements("test", 500, 3)}) == len(EVENTS), "every event is tested"


def test_words_of_the_test_split_are_known_from_training():
    """What is held out are pairs, not words: otherwise the reference could not say them."""
    known = {noun for _, noun in situations("train")}
    assert {noun for _, noun in situations("test")} <= known


def test_the_reference_saw_no_situation_of_validation_or_test():
    texts = [prompt for prompt, _ in dialogues(3000, 0)]
    held = {prompt_of(s.text) for split in ("validation", "test") for s in statements(split, 1500, 0)}
    assert not held & set(texts)


def test_prompts_are_different_seeded_and_carry_what_is_scored():
    task = TASKS.build({"name": "reflection", "seed": 5})
    texts = {split: [p.text for p in task.prompts(split)] for split in SPLITS}
    assert [len(set(t)) for t in texts.values()] == [task.train_count, task.validation_count, task.test_count]
    assert texts["train"] != [p.text for p in ReflectionTask(seed=6).prompts("train")]
    for prompt in task.prompts("test"):
        assert prompt.columns["statement"] in prompt.text
        assert set(prompt.columns["feelings"]) <= set(FEELINGS)
        said = [family for word in words_of(prompt.text) for family, words in FEELINGS.items() if word in words]
        assert not said or prompt.columns["feelings"] == said, "a feeling in words is the only right one"


# The objectives


def test_good_answers_beat_bad_ones_in_reflection():
    whole = reflected("Your novel was mocked by your mother, and it is on your mind at work.")
    assert whole == 1.0
    half = reflected("Your novel was mocked by your mother.")
    assert 0.6 < half < 0.9, "one of two clauses"
    other = reflected("It sounds like your poem was mocked by your sister, and it is on your mind at church.")
    assert other < half - 0.2, "another situation"
    parrot = reflected("Your mother laughed at your novel, and you think about it at work.")
    assert parrot < 0.3, "the client's own words with turned pronouns"
    assert reflected(SAID) < 0.3, "the statement itself"
    assert reflected("Your novel was mocked by your mother. What did your mother say?") < half - 0.3
    assert max(map(reflected, ["", "I am sorry to hear that.", "You feel hurt.", "What did your mother say?", "No."])) < 0.2


def test_a_feeling_is_neutral_to_reflection():
    assert reflected("You feel hurt because your novel was mocked by your mother.") == reflected("Your novel was mocked by your mother.")


def test_saying_it_twice_or_as_a_heap_of_words_pays_less():
    once = reflected("Your novel was mocked by your mother.")
    assert reflected("Your novel was mocked by your mother. " * 2) < once
    assert reflected("novel mother mocked work mind") < 0.6
    assert reflected("mother novel laughed work think " * 3) < 0.4


@pytest.mark.parametrize("name", EVENTS)
def test_paraphrases_of_the_grammar_are_recognized_and_those_of_other_events_are_not(name):
    """Each mirror, about the same noun and person, against the statements of its own event and of all others."""
    slots = {"noun": listed(NOUNS[EVENTS[name].noun])[0], "who": "uncle", "day": "Monday"}
    own = [say.format_map(slots) for say in EVENTS[name].say]
    others = [say.format_map(slots) for other, event in EVENTS.items() if other != name for say in event.say]
    for mirror in EVENTS[name].mirror:
        text = f"It sounds like {mirror.format_map(slots)}."
        right = [reflected(text, said) for said in own]
        assert min(right) > 0.5, (text, own)
        assert min(right) > np.mean([reflected(text, said) for said in others]) + 0.1


def test_the_lexicon_holds_no_word_that_is_not_read():
    words = {word for line in SYNONYMS for word in line.split()}
    assert not words & STOP
    assert not words & {word for family in FEELINGS.values() for word in family}
    assert meanings("quarrel") & meanings("argued")
    assert not meanings("novel") & meanings("poem")
    assert content_of("I feel so sad about the boat") == ["boat"]


def test_the_right_feeling_counts_and_wrong_ones_count_against_it():
    assert felt("No wonder you are hurt.") == 1.0
    assert felt("You sound betrayed.") == felt("You feel hurt.") == 0.8, "any word of the family"
    assert felt("You feel angry.") == 0.0
    assert felt("You feel hurt and angry.") == 0.4
    assert felt("You feel " + ", ".join(words[0] for words in FEELINGS.values()) + ".") < 0.1, "all of them"
    assert felt("I am sorry to hear that.") == 0.15 < felt("You feel hurt and angry.")
    assert felt("You feel angry.", ("hurt", "angry")) == 0.8, "where several are right, one is enough"
    assert [felt(text) for text in ("", "boat", "You are not hurt.", "I am hurt.", "My mother was hurt.")] == [0.0] * 5


def test_feelings_are_read_sentence_by_sentence():
    assert feelings_in("I am sad. You are proud.") == ["proud"]
    assert feelings_in("You are tired and never happy.") == ["tired"]


def test_brevity_falls_from_its_floor_and_nothing_is_worth_nothing():
    assert brief("") == brief(" ") == 0.0
    assert brief("one two three four") == 1.0
    assert brief("one two") == 0.5
    assert brief("word " * 12) == pytest.approx(0.5)
    assert brief("word " * 20) == pytest.approx(0.25)


def test_no_dishonest_answer_is_good_at_everything():
    """Equal weights: an honest complex reflection beats what each objective alone could be farmed with."""
    honest = "You feel hurt: your novel was mocked by your mother."
    mean = lambda text: np.mean([reflected(text), felt(text), brief(text)])  # noqa: E731
    farmed = ["You sound quite hurt.", SAID, "", "mother novel laughed work think", "I am sorry to hear that.", "You are hurt " * 5]
    assert mean(honest) > max(map(mean, farmed)) + 0.1


@pytest.mark.parametrize(
    ("objective", "columns"), [("reflection", {"statement": SAID}), ("empathy", {"feelings": ["sad"]}), ("brevity", {})]
)
def test_objectives_pass_the_conformance_suite(objective, columns):
    check_objective(objective, columns=columns)


def test_a_single_feeling_may_stand_as_a_text():
    """As in a CSV file; its letters are no feelings."""
    texts = ["You are angry.", "You are sad.", "You are angry."]
    assert Empathy()(["p"] * 3, texts, feelings=["angry", "angry", ""]) == [0.8, 0.0, None]


def test_what_is_not_known_is_not_scored():
    assert Reflection()(["p"], ["text"], statement=[None]) == [None]
    assert Reflection()(["p"], ["text"], statement=["and so on"]) == [None], "no content to reflect"
    assert Empathy()(["p", "p"], ["text", "text"], feelings=[None, []]) == [None, None]


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Reflection(copied=1), "copied=1"),
        (lambda: Empathy(named=0.1), "named=0.1"),
        (lambda: Brevity(half=0.0), "half=0"),
    ],
)
def test_settings_out_of_range_are_refused(make, found):
    with pytest.raises(ConfigError) as error:
        make()
    assert found in error.value.found


# The task


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"aims": ("reflection", "kindness")}, "kindness"),
        ({"aims": ("empathy",)}, "empathy"),
        ({"aims": ("empathy", "empathy")}, "empathy, empathy"),
        ({"beta": 0.0}, "beta = 0"),
        ({"test_count": 0}, "test_count = 0"),
    ],
)
def test_bad_tasks_are_refused(fields, found):
    with pytest.raises(TaskError) as error:
        ReflectionTask(**fields)
    assert found in error.value.found


def test_the_task_passes_the_conformance_suite_with_all_four_aims():
    check_task(dataclasses.replace(TINY, aims=("fluency", "brevity", "empathy", "reflection")))


def test_aims_in_another_order_are_the_same_numbers_in_another_order():
    other = dataclasses.replace(TINY, aims=TINY.aims[::-1])
    texts = [" You feel sad.", " So your boat was wrecked.", "", " I hear you."]
    assert np.array_equal(TINY.score(TINY.prompts("test"), texts), other.score(other.prompts("test"), texts)[:, ::-1])


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("counsellor")


def test_the_model_is_small_shipped_and_the_one_that_the_tool_makes(tool):
    size = sum(path.stat().st_size for path in MODEL.iterdir())
    assert size < 8_000_000
    model, tokenizer = TINY.load()
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    config = json.loads((MODEL / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (tool.Spec.width, tool.Spec.layers)
    text = prompt_of(SAID) + " You are hurt."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tool_makes_a_model_and_the_same_one_again(tool, tmp_path):
    small = tool.Spec(width=16, layers=1, heads=2, vocabulary=300, dialogues=40, batch=4, steps=3)
    for name in ("a", "b"):
        tool.make(small, tmp_path / name)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in MODEL.iterdir()}
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_fluency_prefers_a_sentence_to_its_words_in_another_order():
    task = dataclasses.replace(TINY, aims=("fluency", "brevity"))
    prompt = task.prompts("test")[0]
    words = ["That", "must", "be", "hard."]
    shuffled = " " + " ".join(generator(0, "shuffle").permutation(words).tolist())
    fluent_NM = task.score([prompt] * 3, [" " + " ".join(words), shuffled, ""])
    assert fluent_NM[0, 0] > 0.5 > fluent_NM[1, 0]
    assert fluent_NM[2, 0] == 0.0


def test_the_answers_of_the_corpus_differ_in_every_aim():
    """A mixture of styles: there is something to gain, and to lose, from the reference."""
    rng = generator(0, "test")
    made = statements("train", 400, 9)
    prompts = list(ReflectionTask(train_count=400, seed=9).prompts("train"))
    assert [prompt_of(s.text) for s in made] == [p.text for p in prompts]
    scores_NM = ReflectionTask().score(prompts, [answer(s, rng) for s in made])
    assert (scores_NM.std(0) > 0.15).all()
    assert np.corrcoef(scores_NM.T)[0, 2] < -0.3, "reflection and brevity conflict"


def test_learning_raises_what_it_is_trained_for(tmp_path):
    """Empathy alone, from a shared seed: the paired gain over the reference is far from 0. In 16 steps, and so without a bound on them."""
    task = dataclasses.replace(TINY, aims=("empathy", "brevity"), train_count=8, max_new_tokens=12)
    learner = {"name": "pg", "samples": 512, "batch": 32, "group": 8, "rank": 4, "alpha": 32, "step_kl": None}
    family = fit(task, {"name": "expert", "objective": 0}, learner=learner, root=tmp_path, progress=False)
    found = evaluate(task, family, w_WM=np.array([[1.0, 0.0]]), splits=("train",), samples=64)
    assert found.metrics["splits"]["train"]["gain"]["per_preference"][0]["low"] > 0.02


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """A model of the same kind that takes no time: what is tested is that methods, prompts and objectives fit together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        tool = importlib.import_module("counsellor")
        folder = tmp_path_factory.mktemp("smaller")
        tool.make(tool.Spec(width=32, layers=2, heads=2, vocabulary=300, dialogues=50, batch=4, steps=2), folder)
        yield folder


LONG = {  # searches, cut short
    "contextual": {"rounds": 8, "batch": 4, "landmarks": 4},
    "static-gates": {"budget": 12, "samples": 4},
    "emorl-shared": {"samples": 4, "levels": 1},
    "emorl": {"samples": 4, "levels": 1},
    "placed": {"points": 5, "samples": 4},
    "calibrated": {"samples": 4, "budget": 12},
}


@pytest.mark.parametrize("name", sorted(name for name in METHODS if METHODS[name].__module__.startswith("paretune.")))
def test_every_method_runs_on_it(name, smaller, monkeypatch):
    """One step each, with two aims: sweeps over three are long."""
    monkeypatch.setattr("paretune.tasks.reflection.task.MODEL", smaller)
    task = dataclasses.replace(TINY, aims=("reflection", "brevity"), max_new_tokens=6)
    check_method({"name": name, **LONG.get(name, {})}, task=task, learner=LEARNERS.build({**QUICK, "samples": 4}))


def test_a_bridge_between_three_experts_runs_on_it(smaller, monkeypatch):
    monkeypatch.setattr("paretune.tasks.reflection.task.MODEL", smaller)
    check_method("bridge", task=TINY, learner=LEARNERS.build(QUICK))


# Its report


def test_responses_stand_side_by_side_in_the_report(tmp_path):
    task = {"name": "reflection", "train_count": 4, "test_count": 12, "max_new_tokens": 8}
    learner = {**QUICK, "samples": 16, "lr": 0.1, "step_kl": None}  # far enough that responses change
    suite = {"name": "s", "tasks": [task], "methods": ["uniform"], "seeds": [0], "learner": learner, "samples": 24}
    run_suite(suite, tmp_path / "root", workers=1, executor="in-process", progress=False)
    results = load(tmp_path / "root")
    page = write_page(results, tmp_path / "report").read_text()
    kept = results.cells[0].measured("test")["generations"]
    assert len(kept["prompts"]) == 10
    assert len(kept["texts"]) == len(kept["preferences"]) == 5
    assert all(column == kept["texts"][0] for column in kept["texts"]), "one policy for every preference, same noise"
    assert kept["texts"][0] != kept["reference"]
    shown = page[page.index('<section id="generations">') :]
    assert all(text.strip() in shown for text in (*kept["texts"][0], *kept["reference"]) if text.strip() and "'" not in text)
    errors = np.array(results.cells[0].measured("test")["returns_error"])
    assert errors.shape == (66, 3)
    assert (errors > 0).all()
    rows = (tmp_path / "report" / "tables" / "generations.csv").read_text()
    assert kept["texts"][0][0].strip() in rows
    figures = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])["views"]
    drawn = [series for name, views in figures.items() if name.startswith("front") for series in views["test"]["series"]]
    assert any({"x", "y"} <= set(series.get("error") or {}) for series in drawn), "intervals stand in the fronts"


def test_shown_preferences_are_far_apart():
    w_WM = np.array([[0.5, 0.5], [0.9, 0.1], [0.88, 0.12], [0.1, 0.9], [0.51, 0.49]])
    assert spread_out(w_WM, 3) == [1, 0, 3]
    assert spread_out(w_WM[:1], 5) == [0]
    assert spread_out(np.repeat(w_WM[:1], 4, axis=0), 3) == [0], "equal ones are one"


def test_equal_gates_are_sampled_once_and_compare_pairs(tmp_path):
    family = fit(TINY, "uniform", learner=QUICK, root=tmp_path, progress=False)
    w_WM = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    both, alone = (evaluate(TINY, family, w_WM=w, splits=("test",), samples=12) for w in (w_WM, w_WM[1:]))
    curve = both.curves["test"]
    assert np.array_equal(curve.rewards_WSM[0], curve.rewards_WSM[1])
    assert np.array_equal(curve.rewards_WSM[1], alone.curves["test"].rewards_WSM[0])
    assert compare(both, both, split="test")["mean"]["value"] == 0

"""Objectives: TRL's convention in both directions, what is no score, the built-in ones, and functions known by their content."""

import decimal
import itertools
import json
import re
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from paretune.errors import ConfigError, RewardError
from paretune.objectives import base
from paretune.objectives.base import Objective, check_callable, refuse_unscored, score_all
from paretune.objectives.functions import content_hashes, load_function
from paretune.registry import OBJECTIVES, describe
from paretune.types import Prompt

PLAIN = [Prompt(text="2+2=", columns={"answer": "4", "level": 1}), Prompt(text="3+3=", columns={"answer": "6", "level": 2})]
CHAT = [Prompt(messages=({"role": "system", "content": "Count."}, {"role": "user", "content": p.text}), columns=p.columns) for p in PLAIN]


def scores(function, prompts=PLAIN, completions=("4", "five"), **given):
    return score_all([("mine", function)], prompts, list(completions), **given)[:, 0].tolist()


# ---- TRL's convention


def test_realistic_trl_functions_work_unchanged():
    def accuracy_reward(completions, answer, **kwargs):
        contents = [completion[0]["content"] for completion in completions]
        return [1.0 if a in c else 0.0 for c, a in zip(contents, answer, strict=True)]

    def format_reward(completions, **kwargs):
        return [1.0 if re.match(r"^<think>.*?</think>", c[0]["content"], re.DOTALL) else 0.0 for c in completions]

    def system_reward(prompts, completions, **kwargs):
        assert all(p[0]["role"] == "system" and c[0]["role"] == "assistant" for p, c in zip(prompts, completions, strict=True))
        return [float(p[-1]["content"] == "2+2=") for p in prompts]

    rewards = score_all(
        [("accuracy", accuracy_reward), ("format", format_reward), ("system", system_reward)], CHAT, ["it is 4", "<think>hm</think>5"]
    )
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_plain_prompts_are_strings_and_columns_are_lists():
    seen = {}

    def reward(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [0.0, 1.0]

    scores(reward, completion_ids=[[1], [2, 3]])
    assert seen == {
        "prompts": ["2+2=", "3+3="],
        "completions": ["4", "five"],
        "completion_ids": [[1], [2, 3]],
        "answer": ["4", "6"],
        "level": [1, 2],
    }


def test_trl_ships_functions_that_work_here():
    rewards = pytest.importorskip("trl.rewards")
    wrapped = rewards.get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    assert scores(wrapped, completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]]) == [0.0, -0.75]
    assert scores(rewards.think_format_reward, CHAT, ["<think>hm</think>4", "4"]) == [1.0, 0.0]


def test_a_function_gets_what_its_signature_accepts():
    assert scores(lambda completions: [len(c) for c in completions]) == [1, 4]
    assert scores(lambda prompts, completions: [len(p) for p in prompts]) == [4, 4]
    assert scores(lambda *, level: level) == [1, 2]
    assert scores(lambda answer, missing=7: [missing] * len(answer)) == [7, 7]

    def positional(prompts, completions, /, level):
        return [len(p) + len(c) + n for p, c, n in zip(prompts, completions, level, strict=True)]

    assert scores(positional) == [6, 10]

    def logging(completions, log_metric, log_extra=None, **kwargs):  # TRL's hooks, one without a default
        log_metric("mean", 1.0)
        log_extra("column", completions)
        return [1, 2]

    assert scores(logging) == [1, 2]

    class Stateful:
        def __call__(self, completions, **kwargs):
            return (len(c) for c in completions)  # a generator

    assert scores(Stateful()) == [1, 4]


def test_one_objective_cannot_disturb_the_next():
    def first(completions, answer, **kwargs):
        completions.sort(reverse=True)
        answer.clear()
        return [1, 2]

    def second(completions, answer):
        return [len(c) + len(a) for c, a in zip(completions, answer, strict=True)]

    assert score_all([("a", first), ("b", second)], PLAIN, ["4", "five"]).tolist() == [[1, 2], [2, 5]]


def test_what_an_objective_changes_inside_its_inputs_is_its_own():
    """Lists in columns, messages of prompts and completions: neither the rows nor the next objective see a change."""
    rows = [Prompt(messages=p.messages, columns={"keywords": ["a", "b"], "nested": {"k": [1]}}) for p in CHAT]

    def greedy(prompts, completions, keywords, nested):
        for i in range(len(completions)):
            keywords[i].pop()
            nested[i]["k"].append(2)
            completions[i][0]["content"] = ""
            prompts[i][0]["content"] = ""
        return [0.0] * len(completions)

    def looks(prompts, completions, keywords, nested):
        seen = [(p[0]["content"], c[0]["content"], k, n) for p, c, k, n in zip(prompts, completions, keywords, nested, strict=True)]
        return [float(one == ("Count.", said, ["a", "b"], {"k": [1]})) for one, said in zip(seen, ("4", "five"), strict=True)]

    assert score_all([("one", greedy), ("two", looks)], rows, ["4", "five"])[:, 1].tolist() == [1.0, 1.0]
    assert score_all([("two", looks)], rows, ["4", "five"]).tolist() == [[1.0], [1.0]]


def test_a_column_that_only_some_prompts_have_is_none_elsewhere():
    prompts = [Prompt(text="a", columns={"x": 1}), Prompt(text="b", columns={"y": 2})]
    assert scores(lambda x, y: [float(x == [1, None]), float(y == [None, 2])], prompts) == [1, 1]


def test_columns_cannot_replace_the_arguments():
    prompts = [Prompt(text="a", columns={"completions": "stolen", "prompt": "stolen", "completion_ids": "stolen"})] * 2
    assert scores(lambda prompts, completions, **rest: [len(rest)] * 2, prompts) == [0, 0]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5],
        (1, 0.5),
        np.array([1, 0.5]),
        np.array([1, 0.5], dtype=np.float32),
        torch.tensor([1, 0.5]),
        [np.float32(1), np.float64(0.5)],
        [torch.tensor(1.0), torch.tensor(0.5)],
        [True, decimal.Decimal("0.5")],
    ],
)
def test_every_kind_of_number_is_a_score(returned):
    assert scores(lambda **_: returned) == [1.0, 0.5]


@pytest.mark.parametrize(
    "returned",
    [
        bytearray(b"12"),
        memoryview(b"12"),
        frozenset({1, 2}),
        {"a": 1, "b": 2},
        "12",
        ["1", "2"],
        [b"1", b"2"],
        [(1,), (2,)],
        np.array(["1", "2"]),
        np.ones((2, 1)),
        np.array([1 + 0j, 2]),
        np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]"),
        np.zeros(2, dtype=[("a", float)]),
        torch.ones(2, 1),
        torch.tensor([1 + 0j, 2 + 1j]),
        torch.ones(2, device="meta"),
        [decimal.Decimal("sNaN"), 1.0],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number_is_an_error(returned):
    with pytest.raises(RewardError, match="returns one number or None per completion"):
        scores(lambda **_: returned)


def test_a_generator_that_raises_is_an_error_of_its_objective():
    with pytest.raises(RewardError, match=r"objective 'mine' scores every completion without an exception(?s:.*)ZeroDivisionError"):
        scores(lambda completions: (1 / 0 for _ in completions))


def test_more_kinds_of_numbers():
    assert scores(lambda **_: torch.tensor([1.0, 0.5], requires_grad=True)) == [1.0, 0.5]
    assert scores(lambda **_: torch.tensor([1.0, 0.5], dtype=torch.bfloat16)) == [1.0, 0.5]
    assert np.isnan(scores(lambda **_: np.ma.masked_array([1.0, 2.0], mask=[False, True]))).tolist() == [False, True]


# ---- the declared range


class Ranged:
    """A reward function with a range, as objectives have one."""

    low, high = 0.0, 1.0

    def __init__(self, values):
        self.values = values

    def __call__(self, completions, **_):
        return self.values


def test_scores_outside_of_the_range_are_warned_of_once_per_objective(monkeypatch, recwarn):
    monkeypatch.setattr(base, "_WARNED", set())
    for values in ([1.0, 0.5], [1.5, -3.0], [7.0, 9.0]):
        found = score_all([("a", Ranged(values)), ("b", Ranged([0.5, 1.1]))], PLAIN, ["x", "y"])
        assert found[:, 0].tolist() == values, "they count as they are"
    told = [str(one.message) for one in recwarn]
    assert len(told) == 2, "one for each objective, not for each batch or row"
    assert "objective 'b': 1 of 2 scores" in told[0]
    assert "objective 'a': 2 of 2 scores" in told[1]
    assert "from -3 to 1.5" in told[1]


def test_rounding_and_unscored_are_inside_of_the_range(monkeypatch, recwarn):
    monkeypatch.setattr(base, "_WARNED", set())
    scores(Ranged([1 + 1e-9, -1e-9]))
    scores(Ranged([None, float("nan")]))
    scores(lambda **_: [5.0, -5.0])  # without a declared range
    assert not recwarn.list


def test_none_and_nan_are_nan():
    found = np.array(scores(lambda **_: [None, float("nan")]))
    assert np.isnan(found).all()


def test_no_completions_no_calls():
    assert score_all([("a", lambda **_: 1 / 0), ("b", lambda **_: 1 / 0)], [], []).shape == (0, 2)


# ---- what is no score


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ([1.0], "1 scores for 2 completions"),
        ([1.0, 2.0, 3.0], "3 scores for 2 completions"),
        (0.5, "0.5 (float) instead of a list"),
        (None, "None (NoneType) instead of a list"),
        (np.float64(0.5), "instead of a list"),
        (torch.tensor(0.5), "instead of a list"),
        ("ab", "'ab' (str) instead of a list"),
        ({"a": 1, "b": 2}, "(dict) instead of a list"),
        ([1.0, "0.5"], "'0.5' (str) for completion 1"),
        ([[1.0], [2.0]], "[1.0] (list) for completion 0"),
        (np.ones((2, 1)), "for completion 0"),
        ([1j, 1.0], "1j (complex) for completion 0"),
        (np.array([1j, 1.0]), "complex128) for completion 0"),
        ({0.5, 1.0}, "(set) instead of a list"),
        (itertools.repeat(1.0), "more than 2 scores for 2 completions"),
    ],
)
def test_what_is_no_score_is_refused(returned, found):
    with pytest.raises(RewardError) as error:
        scores(lambda **_: returned)
    assert error.value.rule == "objective 'mine' returns one number or None per completion"
    assert found in error.value.found
    assert "def score(prompts, completions, **columns)" in error.value.remedy
    assert error.value.exit_code == 1


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), np.inf, 10**400])
def test_infinities_are_refused(value):
    with pytest.raises(RewardError, match="objective 'mine' returns finite scores") as error:
        scores(lambda **_: [0.0, value])
    assert "completion 1" in error.value.found


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_an_exception_inside_names_the_objective_and_keeps_its_cause(kind):
    def broken(completions, **_):
        raise kind("no such key")

    with pytest.raises(RewardError, match="objective 'mine' scores every completion") as error:
        scores(broken)
    assert error.value.found == f"{kind.__name__}: no such key (test_objectives.py, line {broken.__code__.co_firstlineno + 1})"
    assert isinstance(error.value.__cause__, kind)


def test_keyboard_interrupt_is_not_an_error_of_the_objective():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores(interrupted)


def test_a_missing_column_is_named():
    with pytest.raises(RewardError) as error:
        scores(lambda completions, solution: [1, 1])
    assert error.value.found == "it needs 'solution'; it was offered prompts, completions, answer, level"


def test_check_callable_finds_it_before_anything_runs():
    check_callable("mine", lambda completions, answer, log_metric, **kwargs: None, ["answer"])
    with pytest.raises(ConfigError) as error:
        check_callable("mine", lambda completions, solution: None, ["answer", "level"])
    assert error.value.found == "it needs 'solution'; the columns are answer, level"

    with pytest.raises(ConfigError, match="it needs 'reference'"):
        check_callable("mine", OBJECTIVES.build({"name": "lexical", "column": "reference"}), ["answer"])


def test_refuse_unscored_counts_per_objective():
    refuse_unscored(("a", "b"), [1, 0], 10)  # exactly 10 %
    with pytest.raises(RewardError) as error:
        refuse_unscored(("a", "b"), [0, 2], 19)
    assert error.value.rule == "objective 'b' scores at least 90% of the completions"
    assert "2 of 19" in error.value.found
    assert "max_unscored" in error.value.remedy
    refuse_unscored(("a", "b"), [0, 2], 19, limit=0.2)


# ---- built in


def build(name, **fields):
    return OBJECTIVES.build({"name": name, **fields})


def test_length_halves_with_the_distance():
    shorter = build("length", unit="characters", half=4)
    assert scores(shorter, completions=["", "four"]) == [1.0, 0.5]
    near = build("length", unit="words", target=3, half=1, low=-1, high=3)
    assert scores(near, completions=["one two three", "one two"]) == [3.0, 1.0]
    assert scores(near, completions=["one two three", "one two three four"]) == [3.0, 1.0]
    tokens = build("length", unit="tokens", half=2)
    assert scores(tokens, completion_ids=[[], [1, 2]]) == [1.0, 0.5]
    assert scores(shorter, CHAT, ["", "four"]) == [1.0, 0.5]  # conversational
    with pytest.raises(RewardError, match="it needs 'completion_ids'"):
        scores(tokens)


def test_format_by_pattern_and_by_json():
    tagged = build("format", pattern=r"<a>.*</a>")
    assert scores(tagged, completions=[" <a>x\ny</a>\n", "<a>x</a> and more"]) == [1, 0]
    valid = build("format", json=True)
    assert scores(valid, completions=["[1, 2]", "{1: 2}"]) == [1, 0]
    assert scores(valid, completions=["NaN", "[" * 100_000]) == [0, 0]
    keyed = build("format", json=True, keys=["a", "b"])
    assert scores(keyed, completions=['{"a": 1}', '{"a": 1, "b": 2}']) == [0.75, 1]
    assert scores(keyed, completions=["[]", "{}"]) == [0, 0.5]


def test_lexical_contains_whole_words_in_order():
    keywords = build("lexical", keywords=["thank you", "Straße"])
    assert scores(keywords, completions=["Well, THANK you!", "you thank the strasse"]) == [0.5, 0.5]
    assert scores(keywords, completions=["thank yourself", "thank-you STRASSE"]) == [0, 1]
    avoid = build("lexical", keywords=["bad"], avoid=True, low=-1, high=0)
    assert scores(avoid, completions=["bad", "badly"]) == [-1, 0]
    column = build("lexical", column="answer")
    assert scores(column, completions=["it is 4", "it is 66"]) == [1, 0]


def test_lexical_with_a_column_that_is_a_list_or_empty():
    prompts = [Prompt(text="a", columns={"words": ["red", "blue"]}), Prompt(text="b", columns={"words": None})]
    found = scores(build("lexical", column="words"), prompts, ["red", "red"])
    assert found[0] == 0.5
    assert np.isnan(found[1])


def test_lexical_overlap_is_the_f1_of_words_with_counts():
    overlap = build("lexical", measure="overlap", column="answer")
    prompts = [Prompt(text="q", columns={"answer": "the cat sat"})] * 2
    # 2 common words of 3 wanted and 4 used: precision 1/2, recall 2/3, F1 4/7; a repeated word counts once
    assert scores(overlap, prompts, ["the cat cat cat", "the cat sat"]) == [pytest.approx(4 / 7), 1.0]
    assert scores(overlap, prompts, ["", "dog"]) == [0, 0]


def test_lexical_distinct_is_the_share_of_different_runs():
    distinct = build("lexical", measure="distinct", n=2)
    assert scores(distinct, completions=["a b a b a", "a b c"]) == [0.5, 1.0]
    assert scores(distinct, completions=["word", ""]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"name": "length", "half": 0}, "half is positive"),
        ({"name": "length", "low": 1.0}, "low is below high"),
        ({"name": "length", "high": float("inf")}, "high is a finite number"),
        ({"name": "format"}, "either a pattern or json"),
        ({"name": "format", "pattern": "a", "keys": ["b"]}, "either a pattern or json"),
        ({"name": "format", "pattern": "("}, "a Python regular expression"),
        ({"name": "lexical"}, "exactly one of them"),
        ({"name": "lexical", "keywords": ["a"], "column": "b"}, "exactly one of them"),
        ({"name": "lexical", "keywords": ["..."]}, "every keyword has a word"),
        ({"name": "lexical", "measure": "distinct", "n": 0}, "runs of n >= 1"),
        ({"name": "length", "unit": "bytes"}, "unit"),
    ],
)
def test_built_in_objectives_refuse_bad_fields(fields, rule):
    with pytest.raises(ConfigError) as error:
        OBJECTIVES.build(fields)
    assert rule in error.value.rule
    assert error.value.exit_code == 2


def test_describe_and_build_are_inverse():
    for given in ({"name": "lexical", "keywords": ["a", "b"], "low": -1.0}, {"name": "format", "json": True}, {"name": "length"}):
        built = OBJECTIVES.build(given)
        assert OBJECTIVES.build(json.loads(json.dumps(describe(built)))) == built


def test_a_third_partys_objective_is_registered_and_used():
    @OBJECTIVES.register("test-vowels")
    @dataclass(frozen=True)
    class Vowels(Objective):
        low: float = 0.0
        high: float = 1.0

        def __call__(self, prompts, completions, **columns):
            return [self.squashed(sum(c in "aeiou" for c in text) / max(len(text), 1)) for text in completions]

    assert scores(build("test-vowels", high=2.0), completions=["aa", "ab"]) == [2.0, 1.0]


# ---- functions of one's own

REWARD = "def shout(completions, **kwargs):\n    return [float(c.isupper()) for c in completions]\n"


def test_load_function_scores_and_is_known_by_its_content(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(REWARD)
    objective = load_function(f"{file}:shout", low=0, high=1)
    assert objective.__name__ == "shout"
    assert scores(objective, completions=["AH", "ah"]) == [1, 0]
    before = describe(objective)
    assert before["content"] == content_hashes(file)
    assert OBJECTIVES.build(before) == objective
    file.write_text(REWARD.replace("isupper", "islower"))
    again = load_function(f"{file}:shout", low=0, high=1)
    assert scores(again, completions=["AH", "ah"]) == [0, 1]  # the new text runs, not a cached module
    assert describe(again) != before


def test_modules_beside_the_file_are_imported_and_hashed(tmp_path):
    helper, deeper, file = tmp_path / "helper_of_test.py", tmp_path / "deeper_of_test.py", tmp_path / "rewards.py"
    deeper.write_text("FACTOR = 2.0\n")
    helper.write_text("import deeper_of_test\n\ndef scale(x):\n    return deeper_of_test.FACTOR * x\n")
    file.write_text("def length(completions):\n    from helper_of_test import scale\n    return [scale(len(c)) for c in completions]\n")
    path = list(sys.path)
    objective = load_function(f"{file}:length", low=0, high=9)
    assert sys.path == path
    assert scores(objective) == [2, 8]
    assert set(objective.content()) == {"rewards.py", "helper_of_test.py", "deeper_of_test.py"}
    before = objective.content()
    deeper.write_text("FACTOR = 3.0\n")
    again = load_function(f"{file}:length", low=0, high=9)
    assert again.content() != before
    assert scores(again) == [3, 12]


def test_a_folder_beside_the_file_is_imported_and_hashed_without_an_init(tmp_path):
    """It is a package to Python: a change of its file is another objective. One that something installed hides is not read."""

    def write(folder, factor):
        (folder / "parts_of_test").mkdir(parents=True, exist_ok=True)
        (folder / "parts_of_test" / "scale.py").write_text(f"FACTOR = {factor}\n")
        (folder / "yaml").mkdir(exist_ok=True)
        (folder / "yaml" / "notes.py").write_text("")
        head = "import yaml\nfrom parts_of_test.scale import FACTOR\n\n"
        text = head + "def f(completions):\n    return [FACTOR * len(c) for c in completions]\n"
        (folder / "rewards.py").write_text(text)
        return load_function(f"{folder / 'rewards.py'}:f", low=0, high=9)

    first = write(tmp_path / "one", 2.0)
    assert set(first.content()) == {"rewards.py", "parts_of_test/scale.py"}
    assert scores(first) == [2, 8]
    before = first.content()
    again = write(tmp_path / "one", 3.0)
    assert again.content() != before
    assert scores(again) == [3, 12]
    with pytest.raises(ConfigError, match="give parts_of_test a name that nothing else has") as caught:
        write(tmp_path / "other", 4.0)
    assert str(tmp_path / "one" / "parts_of_test" / "scale.py") in caught.value.found


def test_a_module_whose_name_is_taken_is_refused(tmp_path):
    (tmp_path / "yaml.py").write_text("x = 1\n")
    (tmp_path / "rewards.py").write_text("import yaml\n\ndef f(completions):\n    return [0.0] * len(completions)\n")
    with pytest.raises(ConfigError, match=r"give yaml\.py a name that nothing else has"):
        load_function(f"{tmp_path / 'rewards.py'}:f")


def test_our_objectives_are_reward_functions_for_trl():
    """Every call that TRL 1.16 makes: keywords only, with its own extras, in both forms of completions; and it reads a name."""
    for objective in (build("length"), build("format", json=True), build("lexical", column="answer"), build("lexical", measure="distinct")):
        extras = {"completion_ids": [[1], [2]], "trainer_state": object(), "log_extra": print, "log_metric": print, "answer": ["4", "6"]}
        plain = objective(prompts=["a", "b"], completions=["4", "x"], **extras)
        chat = [[{"role": "assistant", "content": text}] for text in ("4", "x")]
        assert objective(prompts=[[{"role": "user", "content": "a"}]] * 2, completions=chat, **extras) == plain
        assert torch.tensor(plain).shape == (2,)
        assert objective.__name__ in ("length", "format", "lexical")


def test_no_objectives_give_no_columns():
    """A recipe with validation prompts and without guards."""
    prompts = [Prompt(text="a"), Prompt(text="b")]
    assert score_all([], prompts, ["x", "y"]).shape == (2, 0)

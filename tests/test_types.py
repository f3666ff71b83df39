"""The words: one spelling per JSON value, keys that follow content, and preferences that are checked, never repaired."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune import errors
from paretune.errors import BusyError, ConfigError, ParetuneError, nearest
from paretune.training.spec import TrainSpec
from paretune.types import Curve, Objectives, Preference, Prompt, canonical_json, key_of, spelled

SPEC = TrainSpec(task={"name": "t", "rho": -0.8}, learner={"name": "l", "lr": 0.02}, preference=(0.25, 0.75), seed=7, init_from=("a", "b"))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value):
    """The same with every mapping in the opposite order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(JSON)
def test_canonical_json_has_one_spelling(value):
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
    assert canonical_json(shuffled(value)) == text
    assert key_of(shuffled(value)) == key_of(value)


def test_canonical_json_is_pinned():
    """Keys name directories that outlive this version."""
    assert canonical_json({"b": 1e-3, "a": (1, None, True), "ä": "é"}) == '{"a":[1,null,true],"b":0.001,"ä":"é"}'
    assert key_of({"b": 1, "a": [0.1]}) == "d7582fcee4f8f93004bd"
    assert SPEC.key == "c19acbf7a0280653034d"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_has_no_spelling_has_no_key(bad):
    with pytest.raises(ValueError):
        key_of({"lr": bad})


def test_specs_are_their_content():
    again = TrainSpec.from_json(json.loads(json.dumps(SPEC.to_json())))
    assert again == SPEC
    assert hash(again) == hash(SPEC)
    assert again.preference == (0.25, 0.75)
    assert again.init_from == ("a", "b")
    changes = [
        {"task": {"name": "t", "rho": -0.7}},
        {"learner": {"name": "l", "lr": 0.02, "version": 2}},
        {"preference": (0.75, 0.25)},
        {"preference": None},
        {"seed": 8},
        {"scalarizer": {"name": "tchebycheff"}},
        {"scalarize_at": "advantage"},
        {"aggregation": {"name": "gdpo"}},
        {"init_from": ("b", "a")},
        {"init_from": ("b",), "frozen_adapters": ("a",)},
        {"weighting": {"name": "balanced"}},
        {"fresh": (1,)},
        {"active_objectives": (0, 1)},
        {"rule": {"name": "identity"}},
    ]
    others = [TrainSpec(**{**SPEC.__dict__, **change}) for change in changes]
    assert len({spec.key for spec in [SPEC, *others]}) == 1 + len(changes)
    assert TrainSpec.from_json(others[3].to_json()).preference is None


NAMES = ("polite", "brief")


@pytest.mark.parametrize("given", ["polite=.7,brief=.3", {"brief": 0.3, "polite": 0.7}, [0.7, 0.3], " polite=0.7 , brief=0.3"])
def test_preferences_can_be_written_in_several_ways(given):
    assert Preference.of(NAMES, given).w_M.tolist() == [0.7, 0.3]


def test_an_objective_left_out_gets_nothing():
    assert Preference.of(NAMES, "brief=1").weights == (0.0, 1.0)


@pytest.mark.parametrize(
    ("given", "found", "remedy"),
    [
        ("polite=.7,brief=.2", "(sum 0.9)", "polite=0.7778,brief=0.2222"),
        ("polite=-.5,brief=1.5", "polite=-0.5", "at least 0"),
        ("polite=nan,brief=1", "polite=nan", "finite"),
        ({"pollite": 1.0}, "pollite", "did you mean 'polite'?"),
        ("polite", "'polite'", "--preference"),
        ("polite=x", "'polite=x'", "--preference"),
        ("polite=1,polite=0", "'polite=1,polite=0'", "one weight"),
        ([1.0], "1 weights for 2 objectives", "every objective"),
        ({}, "(sum 0)", "finite weights"),
    ],
)
def test_bad_preferences_are_refused_with_a_way_out(given, found, remedy):
    with pytest.raises(ConfigError) as caught:
        Preference.of(NAMES, given)
    assert found in caught.value.found
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("count", [2, 3, 6, 7, 9, 11])
def test_a_preference_that_is_written_out_is_read_again(count):
    """Thirds, too, of which six digits do not sum to 1; a remedy is one that can be followed."""
    names = [f"o{n}" for n in range(count)]
    for weights in ([1 / count] * count, [n / sum(range(count)) for n in range(count)]):
        assert Preference.of(names, spelled(names, weights)).weights == pytest.approx(weights, abs=1e-6)
    for written in ([1] * count, ["x"] * count):
        with pytest.raises(ConfigError) as caught:
            Preference.of(names, written)
        assert Preference.of(names, caught.value.remedy.split()[-1]).weights == pytest.approx([1 / count] * count, abs=1e-3)


def test_a_preference_is_written_in_few_digits():
    assert spelled(NAMES, [0.7, 0.3]) == "polite=0.7,brief=0.3"
    assert spelled(NAMES, [1, 0]) == "polite=1,brief=0"
    assert spelled("abc", [1 / 3] * 3) == "a=0.3333333,b=0.3333333,c=0.3333333"


def test_objectives_are_distinct_and_complete():
    assert Objectives(NAMES, (0.0, 0.0), (1.0, 1.0)).count == 2
    with pytest.raises(ConfigError, match="distinct"):
        Objectives(("a", "a"), (0.0, 0.0), (1.0, 1.0))
    with pytest.raises(ConfigError, match="at least one"):
        Objectives((), (), ())
    with pytest.raises(ConfigError, match="2 names, 1 lows, 2 highs"):
        Objectives(NAMES, (0.0,), (1.0, 1.0))


def test_prompts_are_named_by_their_text_alone():
    chat = Prompt(messages=({"role": "user", "content": "hi"},), columns={"answer": 3})
    assert chat.raw == [{"role": "user", "content": "hi"}]
    assert Prompt(text="hi").raw == "hi"
    assert chat.digest == Prompt(messages=({"content": "hi", "role": "user"},)).digest
    assert len({chat.digest, Prompt(text="hi").digest, Prompt(text="hi ").digest}) == 3


def test_returns_subtract_kl_from_every_objective():
    curve = Curve(
        w_WM=np.array([[1.0, 0.0]]),
        rewards_WSM=np.array([[[0.5, np.nan], [1.0, 0.25]]]),
        kl_WS=np.array([[2.0, 0.0]]),
        prompt_S=np.arange(2),
        beta=0.1,
        split="test",
        exact=False,
    )
    assert curve.returns_WSM[0, 0, 0] == pytest.approx(0.3)
    assert curve.returns_WSM[0, 1].tolist() == [1.0, 0.25]
    assert np.isnan(curve.returns_WSM[0, 0, 1]), "unknown stays unknown"
    assert curve.unscored == 1


def test_errors_survive_pickling_and_know_their_exit_code():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ParetuneError)]
    assert len(kinds) == 7
    for kind in kinds:
        error = pickle.loads(pickle.dumps(kind("a rule", found="this", remedy="that")))
        assert type(error) is kind
        assert str(error) == "a rule\n  found:  this\n  remedy: that"
        assert error.exit_code == (2 if issubclass(kind, ConfigError) else 1)
    assert issubclass(BusyError, errors.StoreError)


def test_nearest_names():
    assert nearest("expert", ["reference", "experts"]) == "did you mean 'experts'? otherwise choose one of experts, reference"
    assert nearest("zzz", ["a", "b"]) == "choose one of a, b"
    many = nearest("field_77", [f"field_{i}" for i in range(200)])
    assert many.startswith("did you mean 'field_77'? otherwise choose one of")
    assert many.count(",") == 60
    assert many.endswith("(200 in all)")
    assert nearest("zzz", []) == "nothing is registered here"

"""Advice is read from rows and nothing else: the nearest setting, what is best there, how far it is, and a caution where it is far."""

from pathlib import Path

import pytest

from paretune.errors import ConfigError
from paretune.evaluation.advice import advise, load_rows, shipped

ROOT = Path(__file__).resolve().parent.parent


def row(method, family, worst, samples, **more):
    return {
        "rho": -0.8,
        "method": method,
        "category": family,
        "learner": "pg",
        "attainment_worst_train": worst,
        "attainment_mean_train": worst,
        "attainment_worst_test": None if worst is None else worst - 0.3,
        "n_seeds": 10,
        "samples": samples,
    } | more


ROWS = [
    row("reference", "baseline", 0.0, 0),
    row("linear", "single-policy", 0.40, 400_000),
    row("sweep", "multi-policy", 0.92, 400_000),
    row("conditioned", "multi-policy", 0.90, 120_000),
    row("experts parameter", "meta-policy", -0.42, 80_000),
    row("experts logit", "meta-policy", 0.55, 80_000),
    row("experts logit", "meta-policy", 0.99, 80_000, rho=0.8),
    row("experts logit", "meta-policy", 0.97, 0, learner="exact"),
]
HERE = {"objective_count": 2, "rho": -0.7}


def texts(*args, **kwargs):
    return [one.text for one in advise(*args, **kwargs)]


def test_advice_names_the_best_the_cheaper_the_families_and_the_harmful():
    said = advise(HERE, ROWS)
    assert [one.rows for one in said] == [(0, 1, 2, 3, 4, 5), (2,), (3, 2), (2,), (2, 5, 1), (4,)]
    assert "rho = -0.8, learner pg, 6 methods." in said[0].text
    assert "Best: `sweep` (multi-policy), which reaches 0.92" in said[1].text
    assert "Nearly as good and cheaper: `conditioned` (multi-policy), 0.90 with 120,000 samples." in said[2].text
    assert "`sweep` (multi-policy) reached 0.62" in said[3].text
    assert "multi-policy 0.92 (`sweep`), meta-policy 0.55 (`experts logit`), single-policy 0.40 (`linear`)" in said[4].text
    assert "`experts parameter` (-0.42)" in said[5].text
    assert str(said[1]).endswith("[results/relations.json: row 2, attainment_worst_train]")


def test_every_number_is_of_the_rows_that_the_sentence_names():
    """Shown numbers are shares with two digits; each is a figure of a named row."""
    import re

    for one in advise(HERE, ROWS)[1:]:
        numbers = [float(n) for n in re.findall(r"-?\d\.\d\d(?!\d)", one.text)]
        assert numbers
        known = [round(ROWS[n][key], 2) for n in one.rows for key in ("attainment_worst_train", "attainment_worst_test")]
        assert set(numbers) <= set(known), one.text


def test_a_budget_leaves_out_what_costs_more():
    assert "Best within 100,000 samples: `experts logit`" in texts(HERE, ROWS, budget=100_000)[1]
    assert (
        texts(HERE, ROWS, budget=10)[1]
        == "No method was measured there within 10 samples; the cheapest is `experts parameter` (meta-policy) with 80,000 samples."
    )


def test_the_nearest_setting_is_read():
    assert "0.99" in texts({"rho": 0.7}, ROWS)[1]
    assert "learner exact, 1 methods" in texts({"rho": -0.8}, ROWS, learner="exact")[0]


@pytest.mark.parametrize(
    ("dials", "names"),
    [
        ({"rho": 0.2}, "correlation 0.2 against"),
        ({"rho": -0.8, "objective_count": 3}, "number of objectives 3 against 2"),
        ({"rho": -0.8, "scale": 10.0}, "ratio of spreads 10 against 1"),
        ({"rho": -0.8, "sparse": 0.02}, "rate of the rarest reward 0.02 against 0"),
        ({"rho": -0.8, "context": 0.8}, "change of correlation with the prompt 0.8 against 0"),
        ({"rho": -0.8, "noise": 2.0}, "noise over spread 2 against 0"),
        ({"rho": float("nan")}, "correlation unknown against"),
    ],
)
def test_where_nothing_is_near_the_nearest_answers_with_a_caution(dials, names):
    said = advise(dials, ROWS)
    assert said[1].text.startswith("That is far: ")
    assert names in said[1].text
    assert "as a guess" in said[1].text
    assert len(said) > 2
    assert all(one.rows for one in said)


def test_the_distance_is_said_dial_by_dial_and_a_near_setting_has_no_caution():
    said = texts(HERE, ROWS)
    assert said[0].endswith("Yours: correlation -0.7 against -0.8.")
    assert "same" in texts({"rho": -0.8}, ROWS)[0]
    assert not any("far" in text for text in said)


def test_of_equally_near_settings_the_learner_and_then_the_number_of_methods_decide():
    many = [row(name, "meta-policy", 0.5, 1, task="exact-v2", learner="exact") for name in "abc"]
    few = [row("d", "meta-policy", 0.5, 1)]
    assert "exact-v1" in texts({"rho": -0.8}, [*many, *few])[0]
    assert "exact-v2" in texts({"rho": -0.8}, [*many, *few], learner="exact")[0]
    assert "exact-v2" in texts({"rho": -0.8}, [*few, *({**one, "learner": "pg"} for one in many)])[0]


def test_between_sparse_settings_the_rate_decides():
    """A rare event's correlation and spread follow from its rate: they are measured, and no dials."""
    rows = [row("a", "meta-policy", 0.5, 1, sparse=0.02), row("b", "meta-policy", 0.6, 1, sparse=0.2)]
    assert "`a`" in texts({"rho": -0.1, "sparse": 0.015, "scale": 3.0}, rows)[1]
    assert "`b`" in texts({"rho": -0.1, "sparse": 0.15, "scale": 3.0}, rows)[1]


def test_few_seeds_are_said():
    assert "only 1 seed, so small differences mean nothing" in texts({}, [row("a", "meta-policy", 0.5, 1, rho=0.0, n_seeds=1)])[0]


def test_without_rows_there_is_no_advice():
    assert texts(HERE, []) == ["No results are committed yet, so there is no advice."]
    assert texts(HERE, [row("a", "meta-policy", None, 1)]) == texts(HERE, [])
    assert "Only baselines were measured there." in texts({"rho": -0.8}, ROWS[:1])
    assert "rho = 0.8" in texts({"rho": -0.8}, [ROWS[0], ROWS[6]])[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no json", "JSONDecodeError"),
        ('{"figures": {}}', "KeyError('rows')"),
        ('{"rows": 3}', "rows is no list"),
        ('{"rows": [{"method": "a", "category": "b", "learner": "pg", "samples": 1}]}', "row 0: no attainment_worst_train, no n_seeds"),
    ],
)
def test_a_file_that_is_no_results_is_refused(tmp_path, text, shown):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_rows(path)
    assert shown in str(error.value)


def test_the_package_ships_the_committed_results():
    assert load_rows(shipped())


def test_every_shipped_recipe_and_suite_gets_advice_with_evidence():
    """Whatever a relationship is like, unknown dials included, the shipped rows answer, and every sentence names some of them."""
    rows = load_rows(shipped())
    unknown = float("nan")
    for count in (2, 3, 5, 8):
        for rho in (-1.0, -0.3, 0.4, 1.0, unknown):
            for more in ({}, {"scale": 1e4}, {"scale": unknown}, {"sparse": 0.001}, {"noise": 9.0, "context": 0.9}):
                said = advise({"objective_count": count, "rho": rho, **more}, rows)
                assert len(said) > 2
                assert all(one.rows and one.figure for one in said)

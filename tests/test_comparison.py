"""The comparison over seeds: every number again from the raw cells, no interval without ten seeds, nothing where nothing compares."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, trim_mean

from paretune.evaluation.advice import advise, load_rows
from paretune.report import data as report_data
from paretune.report.comparison import (
    ALL,
    baselines,
    board_tables,
    comparison_table,
    difference_heats,
    groups,
    note,
    pair_table,
    profile_table,
    relationship_tables,
    rows,
    scores,
    shared,
    write_rows,
)
from paretune.report.data import Cell, Results, Setting, assemble
from paretune.report.drawing import to_svg
from paretune.report.figures import DRAWN, profile_figures
from paretune.report.findings import findings
from paretune.report.page import write_page
from paretune.report.terminal import print_leaderboard
from paretune.runs.store import CELL_SPEC
from paretune.seeds import generator
from paretune.types import Estimate, key_of
from report_cells import JUDGED_WM, METHODS, check_view, measured, optimum, publish, record

SEEDS = tuple(range(100, 112))
RHOS = (0.8, -0.8)
LABELS = ("reference", "uniform", "linear", "experts parameter", "experts logit")


def share_of(label, rho, seed):
    """Attainment of a method at one task seed, the same at every preference: its level here, and a seeded deviation."""
    level = {"reference": 0.0, "uniform": 0.5, "linear": 0.8, "experts parameter": 0.6 + 0.3 * rho, "experts logit": 0.8}[label]
    return level + 0.1 * generator(seed, "share", list(METHODS).index(label), int(10 * rho)).normal() * (label != "reference")


def cell(label, rho, seed, *, share=None):
    data = record(label, rho=rho, task_seed=seed)
    share = share_of(label, rho, seed) if share is None else share
    for split, scale in (("train", 1.0), ("test", 0.8)):
        points_WM = scale * share * optimum(JUDGED_WM)
        data["metrics"]["splits"][split] = measured(points_WM, JUDGED_WM, mixes=METHODS[label]["category"] == "meta-policy")
    return data


def gathered(records):
    """Results without a run directory: publishing hundreds of cells takes the disk minutes, and is tested elsewhere."""
    found = {key_of({name: data[name] for name in CELL_SPEC}): data for data in records}
    return assemble(found, {key: {"commit": "0123456789abcdef"} for key in found}, name="compared")


def suite(*, rhos=RHOS, seeds=SEEDS, labels=LABELS, change=lambda data: data):
    places = product(rhos, seeds, labels)
    return gathered([data for rho, seed, label in places if (data := change(cell(label, rho, seed))) is not None])


@pytest.fixture(scope="module")
def results():
    return suite()


def row_of(table, **wanted):
    (row,) = [row for row in table.rows if all(row[key] == value for key, value in wanted.items())]
    return row


def raw(label, *, rhos=RHOS, seeds=SEEDS, scale=1.0):
    """(U, D) attainments of a method."""
    return scale * np.array([[share_of(label, rho, seed) for rho in rhos] for seed in seeds])


# Numbers


def test_all_settings_come_first_then_each(results):
    assert [group.label for group in groups(results)] == [ALL, "rho = 0.8", "rho = \u22120.8"]


@pytest.mark.parametrize(("split", "scale"), [("train", 1.0), ("test", 0.8)])
@pytest.mark.parametrize("label", ["linear", "experts logit", "experts parameter"])
def test_scores_are_those_of_the_cells(results, label, split, scale):
    for place, rhos in ((ALL, RHOS), ("rho = 0.8", RHOS[:1])):
        row, values_UD = row_of(comparison_table(results), setting=place, method=label, prompts=split), raw(label, rhos=rhos, scale=scale)
        assert row["seeds"] == 12
        assert row["worst_iqm"] == pytest.approx(trim_mean(values_UD.ravel(), 0.25))
        assert row["worst_mean"] == pytest.approx(values_UD.mean())
        assert row["worst_min"] == pytest.approx(values_UD.min())
        assert row["mean_iqm"] == pytest.approx(row["worst_iqm"]), "these families attain the same at every preference"
        ci = bootstrap(
            tuple(values_UD.T),
            lambda *columns, axis=-1: trim_mean(np.concatenate(columns, axis=-1), 0.25, axis=-1),
            paired=True,
            vectorized=True,
            method="percentile",
            rng=generator(0, "oracle"),
        ).confidence_interval
        assert (row["worst_iqm_low"], row["worst_iqm_high"]) == (pytest.approx(ci.low, abs=0.01), pytest.approx(ci.high, abs=0.01))
        assert row["worst_iqm_low"] < row["worst_iqm"] < row["worst_iqm_high"]


def test_worst_and_mean_are_over_preferences():
    """A family that dips in the middle at one seed only: the worst of that seed counts, not the mean."""
    results = gathered([record(label, rho=-0.8, task_seed=s) for label in ("linear", "experts parameter") for s in (100, 101, 102)])
    cells = [c for c in results.cells if c.label == "experts"]
    row = row_of(comparison_table(results), method="experts", prompts="train")
    assert row["worst_mean"] == pytest.approx(np.mean([c.measured("train")["attainment"]["worst"] for c in cells]))
    assert row["mean_mean"] == pytest.approx(np.mean([c.measured("train")["attainment"]["mean"] for c in cells]))
    assert row["worst_mean"] < row["mean_mean"] - 0.2


def test_costs_are_of_one_family(results):
    row = row_of(comparison_table(results), setting=ALL, method="linear", prompts="train")
    assert (row["trainings"], row["samples_total"], row["samples_path"]) == (5, 200_000, 40_000)
    assert (row["seconds_total"], row["seconds_path"]) == (300.0, 60.0)


def test_differences_are_paired_on_the_same_seeds(results):
    for place, rhos in ((ALL, RHOS), ("rho = \u22120.8", RHOS[1:])):
        row = row_of(pair_table(results), setting=place, prompts="train", method="experts logit", against="linear")
        gaps_UD = raw("experts logit", rhos=rhos) - raw("linear", rhos=rhos)
        assert row["difference_worst"] == pytest.approx(gaps_UD.mean())
        assert row["improvement_worst"] == pytest.approx((gaps_UD > 0).mean())
        drawn = generator(0, "oracle of pairs").integers(12, size=(20_000, 12))
        low, high = np.quantile(gaps_UD.mean(1)[drawn].mean(1), [0.025, 0.975])
        assert (row["difference_worst_low"], row["difference_worst_high"]) == (
            pytest.approx(low, abs=0.006),
            pytest.approx(high, abs=0.006),
        )
        if len(rhos) == 1:
            exact = binomtest(int((gaps_UD > 0).sum()), 12).proportion_ci(0.95, "exact")
            assert (row["improvement_worst_low"], row["improvement_worst_high"]) == pytest.approx((exact.low, exact.high))


def test_a_pair_turned_round_says_the_same(results):
    table = pair_table(results)
    assert len(table.rows) == 3 * (5 * 4 + 2 * (3 + 4))  # all pairs on training prompts, those with the two baselines on test prompts
    for row in table.rows:
        back = row_of(table, setting=row["setting"], prompts=row["prompts"], method=row["against"], against=row["method"])
        for which in ("worst", "mean"):
            assert row[f"difference_{which}"] == pytest.approx(-back[f"difference_{which}"])
            assert row[f"difference_{which}_low"] == pytest.approx(-back[f"difference_{which}_high"])
            assert row[f"improvement_{which}"] == pytest.approx(1 - back[f"improvement_{which}"])
            assert row[f"improvement_{which}_low"] == pytest.approx(1 - back[f"improvement_{which}_high"])


def test_only_seeds_that_both_have_everywhere_are_compared():
    def change(data):
        missing = data["method"]["name"] == "linear" and data["task"]["rho"] == 0.8 and data["task"]["seed"] == 100
        return None if missing else data

    results = suite(change=change)
    table = pair_table(results)
    kept = SEEDS[1:]
    there = {"prompts": "train", "method": "experts logit", "against": "linear"}
    for place, seeds, rhos in ((ALL, kept, RHOS), ("rho = 0.8", kept, RHOS[:1]), ("rho = \u22120.8", SEEDS, RHOS[1:])):
        row = row_of(table, setting=place, **there)
        assert row["seeds"] == len(seeds)
        gaps = raw("experts logit", seeds=seeds, rhos=rhos) - raw("linear", seeds=seeds, rhos=rhos)
        assert row["difference_mean"] == pytest.approx(gaps.mean())
    assert row_of(comparison_table(results), setting=ALL, method="linear", prompts="train")["seeds"] == 11
    assert row_of(comparison_table(results), setting=ALL, method="experts logit", prompts="train")["seeds"] == 12
    group = groups(results)[0]
    assert shared(group, scores(group, "linear", "train", "worst")) == [str(seed) for seed in kept]


def test_a_method_without_one_of_the_settings_is_in_no_row_over_all():
    results = suite(change=lambda d: None if d["method"]["name"] == "uniform" and d["task"]["rho"] == 0.8 else d)
    places = {row["setting"] for row in comparison_table(results).rows if row["method"] == "uniform"}
    assert places == {"rho = \u22120.8"}
    assert baselines(groups(results)[0]) == ["linear"]


def test_a_setting_that_has_just_begun_does_not_empty_the_others():
    """At rho = 0 all but the reference have one seed of twelve, and one method is missing."""

    def change(data):
        rho, seed, name = data["task"]["rho"], data["task"]["seed"], data["method"]["name"]
        return None if rho == 0.0 and name != "reference" and (seed > 100 or name == "uniform") else data

    results = suite(rhos=(0.8, 0.0, -0.8), change=change)
    assert [group.label for group in groups(results)] == ["2 of 3 settings", "rho = 0.8", "rho = \u22120.8"]
    row = row_of(comparison_table(results), setting="2 of 3 settings", method="linear", prompts="train")
    assert (row["seeds"], row["worst_mean"]) == (12, pytest.approx(raw("linear").mean()))
    assert [column.key for column in relationship_tables(results)["worst"].columns][2:] == [
        "rho = 0.8",
        "rho = \u22120.8",
        "2 of 3 settings",
    ]
    assert "on the same 12 seeds (2 of 3 settings, training prompts)" in " ".join(findings(results))


def test_a_method_measured_in_few_settings_is_listed_after_the_others():
    results = suite(change=lambda d: None if d["method"]["name"] == "linear" and d["task"]["rho"] < 0 else d)
    last = relationship_tables(results)["worst"].rows[-1]
    assert (last["method"], last["rho = 0.8"].value > 0.7, last.get(ALL)) == ("linear", True, None)


def test_an_attainment_that_is_unknown_leaves_its_seed_out():
    def change(data):
        if data["method"]["name"] == "linear" and data["task"]["seed"] == 105:
            for split in data["metrics"]["splits"].values():
                split["attainment"] = {"mean": None, "worst": None, "per_preference": [None] * 11, "undefined": 11}
        return data

    results = suite(change=change, rhos=(0.8,))
    row = row_of(comparison_table(results), method="linear", prompts="train")
    assert row["seeds"] == 11
    assert row["worst_mean"] == pytest.approx(raw("linear", rhos=(0.8,), seeds=[s for s in SEEDS if s != 105]).mean())


def test_the_order_in_which_cells_are_found_changes_nothing(results):
    turned = Results(results.cells[::-1], name=results.name)
    key = lambda row: (row["setting"], row["method"], row["prompts"])  # noqa: E731
    assert sorted(comparison_table(turned).rows, key=key) == sorted(comparison_table(results).rows, key=key)


# Too little to say


@pytest.mark.parametrize("count", [2, 9])
def test_below_ten_seeds_there_is_no_interval_and_the_page_says_why(tmp_path, count):
    results = suite(seeds=SEEDS[:count])
    for table in (comparison_table(results), pair_table(results), profile_table(results)):
        assert table.rows
        for row in table.rows:
            assert all(value is None for key, value in row.items() if key.endswith(("_low", "_high")))
    assert f"Over {count} seeds. No intervals: they need at least 10 seeds." in note(results)
    page = write_page(results, tmp_path).read_text()
    assert "No intervals: they need at least 10 seeds." in page
    assert "the interval holds 0" not in page
    assert "with 95 % bands" not in page
    assert all(flag is None for heat in difference_heats(results) for line in heat.sure for flag in line)
    assert not any("surely" in sentence or "same seeds" in sentence for sentence in findings(results))


def test_one_seed_compares_nothing(tmp_path):
    results = suite(seeds=SEEDS[:1])
    assert note(results) == ""
    assert groups(results) == []
    page = write_page(results, tmp_path).read_text()
    assert 'id="comparison"' not in page
    assert 'id="profiles"' not in page
    assert not list(tmp_path.glob("tables/pairs.csv"))


def test_one_method_compares_with_nothing():
    assert groups(suite(labels=("linear",))) == []


def test_one_setting_is_not_compared_with_itself(tmp_path):
    results = suite(rhos=(0.8,))
    assert [group.label for group in groups(results)] == ["exact-v1"]
    assert relationship_tables(results) == {}
    assert "By relationship" not in write_page(results, tmp_path).read_text()


def test_gains_are_compared_within_a_setting_over_seeds_of_trainings(tmp_path):
    records = []
    for seed in range(10):
        for label, gain in (("linear", 0.2), ("uniform", 0.1)):
            data = record(label, rho=0.0, task_seed=100)
            data |= {"seed": seed, "task": {"name": "recipe", "version": 1, "model": "tiny"}, "fronts": None, "verified": None}
            data["metrics"]["exact"] = False
            for split in data["metrics"]["splits"].values():
                split |= dict.fromkeys(("attainment", "regret", "igd_plus", "utility_loss", "controllability", "loss"))
                split["hypervolume"] |= {"share": None, "share_of_optimum": None}
                values = [gain + seed / 100 + place / 1000 for place in range(11)]
                known = [{"value": v, "low": None, "high": None, "n": 64} for v in values]
                split["gain"] = {"mean": {"value": np.mean(values), "low": None, "high": None, "n": 64}, "per_preference": known}
            records.append(data)
    results = gathered(records)
    row = row_of(comparison_table(results), method="linear", prompts="test")
    assert (row["seeds"], row["worst_min"]) == (10, pytest.approx(0.2))
    assert row["mean_mean"] == pytest.approx(0.2 + 0.045 + 0.005)
    pair = row_of(pair_table(results), method="linear", against="uniform", prompts="test")
    assert (pair["difference_worst"], pair["improvement_worst"]) == (pytest.approx(0.1), 1.0)
    page = write_page(results, tmp_path).read_text()
    assert "worst gain" in page
    assert "By relationship" not in page
    (figure,) = profile_figures(results)
    assert figure.views["test"]["x"]["title"] == "worst gain, test prompts"
    assert {key for key in rows(results)[0] if key.startswith("gain_worst_test")} == {
        f"gain_worst_test{end}" for end in ("", "_low", "_high", "_min")
    }


# What a reader sees


def test_heat_maps_go_from_the_best_to_the_worst_and_mark_what_is_unsure(results):
    heats = {heat.group.label: heat for heat in difference_heats(results)}
    heat = heats["rho = \u22120.8"]
    assert heat.labels[-1] == "experts parameter"
    assert set(heat.labels) == {"linear", "uniform", "experts parameter", "experts logit"}, "the reference is a scale, not a rival"
    at = {label: k for k, label in enumerate(heat.labels)}
    gap = raw("linear", rhos=(-0.8,)).mean() - raw("experts parameter", rhos=(-0.8,)).mean()
    assert heat.values[at["linear"]][at["experts parameter"]] == pytest.approx(gap)
    assert heat.values[at["linear"]][at["linear"]] is None
    assert heat.sure[at["linear"]][at["experts parameter"]] is True
    assert heat.sure[at["linear"]][at["experts logit"]] is False
    row = row_of(pair_table(results), setting="rho = \u22120.8", prompts="train", method="linear", against="experts logit")
    assert row["difference_worst_low"] < 0 < row["difference_worst_high"]


def test_relationships_are_the_iqm_per_setting(results):
    table = relationship_tables(results)["worst"]
    assert [column.key for column in table.columns] == ["method", "category", "rho = 0.8", "rho = \u22120.8", ALL]
    line = row_of(table, method="experts parameter")
    assert line["rho = \u22120.8"].value == pytest.approx(trim_mean(raw("experts parameter", rhos=(-0.8,)).ravel(), 0.25))
    overall = [row[ALL].value for row in table.rows]
    assert overall == sorted(overall, reverse=True)


def test_the_board_has_differences_from_the_sweep_and_from_uniform_weights(results):
    group, table = board_tables(results)[0]
    assert baselines(group) == ["linear", "uniform"]
    line = row_of(table, method="experts logit")
    assert isinstance(line["ahead linear"], Estimate)
    assert line["ahead uniform"].value == pytest.approx((raw("experts logit") - raw("uniform")).mean())
    assert row_of(table, method="linear").get("ahead linear") is None
    shown = {column.key: column.show(line.get(column.key)) for column in table.shown}
    assert re.fullmatch(r"[+\u2212]?0\.\d\d \[[+\u2212]?0\.\d\d, [+\u2212]?0\.\d\d\]", shown["ahead linear"])
    assert "own_name" not in shown
    assert "seeds" not in shown, "all have the same"


def test_own_utility_stands_beside_the_linear_one(tmp_path):
    def change(data):
        if data["method"]["name"] == "linear":
            for split in data["metrics"]["splits"].values():
                own = {"mean": 0.97, "worst": 0.9 + data["task"]["seed"] / 10_000, "per_preference": [0.97] * 11, "undefined": 0}
                missed = {"mean": 0.01, "worst": data["task"]["seed"] / 1000, "per_preference": [0.01] * 11, "undefined": 0}
                split["own_utility"] = {"name": "max-min", "attainment": own, "violation": missed}
        return data

    results = suite(change=change)
    row = row_of(comparison_table(results), setting=ALL, method="linear", prompts="train")
    assert row["own_name"] == "max-min"
    assert row["own_worst_iqm"] == pytest.approx(0.9 + 0.01055)
    assert row["own_worst_iqm_low"] < row["own_worst_iqm"] < row["own_worst_iqm_high"]
    assert (row["violation_worst"], row["violation_mean"]) == (pytest.approx(0.111), pytest.approx(0.01))
    assert "own_name" not in row_of(comparison_table(results), setting=ALL, method="uniform", prompts="train")
    page = write_page(results, tmp_path).read_text()
    assert "by its own utility" in page
    assert "max-min" in page
    line = next(row for row in rows(results) if row["method"] == "linear")
    assert (line["own_utility"], line["own_mean_train"], line["violation_worst_test"]) == (
        "max-min",
        pytest.approx(0.97),
        pytest.approx(0.111),
    )


def test_profiles_count_runs_and_their_pictures_are_valid(results):
    rows = [row for row in profile_table(results).rows if (row["setting"], row["method"]) == (ALL, "experts logit")]
    values_UD = raw("experts logit")
    for row in rows:
        assert row["share"] == pytest.approx((values_UD > row["tau"]).mean())
        assert row["share_low"] <= row["share"] <= row["share_high"]
    assert rows[-1]["tau"] == 1.0
    figures = profile_figures(results)
    assert [figure.title for figure in figures] == [ALL, "rho = 0.8", "rho = \u22120.8"]
    for figure in figures:
        (view,) = figure.views.values()
        check_view(view)
        assert len([one for one in view["series"] if one["band"]]) == len(view["series"]) == 4
        assert to_svg([(figure.title, view)], results.looks, alt=figure.alt).count("<polygon") == 4


def test_many_methods_are_drawn_by_the_best():
    records = []
    for seed, k in product((100, 101), range(DRAWN + 3)):
        records.append(cell("linear", 0.0, seed, share=0.3 + k / 20))
        records[-1]["method"]["points"] = k
    (figure,) = profile_figures(gathered(records))
    names = {trace["name"] for trace in figure.views["train"]["series"]}
    assert {f"linear points {k}" for k in range(3, DRAWN + 3)} <= names
    assert len(names) <= DRAWN + 1  # one of them is the baseline


def test_the_page_shows_the_comparison_and_its_numbers(results, tmp_path):
    page = write_page(results, tmp_path).read_text()
    row = row_of(comparison_table(results), setting=ALL, method="linear", prompts="train")
    low, high = (f"{row[f'worst_iqm_{end}']:.2f}" for end in ("low", "high"))
    assert f"{row['worst_iqm']:.2f} <small>[{low}, {high}]</small>" in page
    for words in (
        "Over 12 seeds",
        "By relationship",
        "Who beats whom",
        "Performance profiles",
        "the interval holds 0",
        'class="unsure"',
    ):
        assert words in page
    assert {path.stem for path in (tmp_path / "tables").glob("*.csv")} >= {"comparison", "pairs", "profiles"}
    assert (tmp_path / "figures" / "profile-all.svg").is_file()


@pytest.mark.parametrize("width", [60, 80, 132])
def test_the_terminal_shows_the_same_numbers_and_fits(results, capsys, width):
    from rich.console import Console

    print_leaderboard(results, Console(width=width, highlight=False))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    row = row_of(comparison_table(results), setting=ALL, method="linear", prompts="train")
    assert f"{row['worst_iqm']:.2f} [{row['worst_iqm_low']:.2f}, {row['worst_iqm_high']:.2f}]" in out
    assert "all settings, over seeds" in out
    assert ("against linear" in out) == (width > 60)


# Sentences


def test_findings_say_who_beats_the_sweep(results):
    said = " ".join(findings(results))
    assert "No method has a surely higher worst attainment than linear on the same 12 seeds (all settings, training prompts)" in said
    assert "matters most at rho = \u22120.8" in said

    def change(data):
        data["card"]["category"] = "single-policy" if data["method"]["name"] == "linear" else data["card"]["category"]
        if data["method"].get("mixing") == "logit":  # a single policy for less than the sweep, and clearly ahead
            data["card"]["category"] = "single-policy"
            points_WM = 0.99 * optimum(JUDGED_WM)
            data["metrics"]["splits"]["train"] = measured(points_WM, JUDGED_WM, mixes=False)
        return data

    said = " ".join(findings(suite(change=change)))
    assert re.search(r"1 of 2 methods has a higher worst attainment than linear .*most of all experts logit: \+0\.[12]\d \[\+0\.1", said)
    assert "Of the 1 single-policy method that needs no more samples than linear, 1 is surely better: experts logit." in said


def test_no_sentence_about_a_sweep_that_was_not_run():
    results = suite(labels=("uniform", "experts logit"))
    assert not any("surely" in sentence or "seeds" in sentence for sentence in findings(results))


# Labels


def test_what_is_usual_goes_without_saying():
    """Seven settings around one: a dial is named where it is turned, and no two labels are the same."""
    turned = [{}, {"rho": 0.8}, {"rho": -0.8}, {"scale": 10.0}, {"noise": 0.5}, {"objective_count": 3}, {"scale": 10.0, "rho": -0.8}]
    records = [record("linear", rho=0.0, task_seed=100) for _ in turned]
    for data, dials in zip(records, turned, strict=True):
        data["task"] |= {"scale": 1.0, "noise": 0.0, **dials}
    labels = {setting.label for setting in gathered(records).settings}
    assert labels == {
        *("rho = 0", "rho = 0.8", "rho = \u22120.8", "rho = 0, scale = 10", "rho = 0, noise = 0.5"),
        *("rho = 0, objective_count = 3", "rho = \u22120.8, scale = 10"),
    }


# Rows for other programs


def test_rows_are_flat_strict_json_and_hold_the_same_numbers(results, tmp_path):
    path = write_rows(results, tmp_path / "new" / "rows.json")
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (data["format"], data["level"], data["task_seeds"]) == (2, 0.95, [str(seed) for seed in SEEDS])
    assert len(data["rows"]) == 2 * 5
    row = next(row for row in data["rows"] if row["method"] == "experts logit" and row["rho"] == -0.8)
    assert (row["name"], row["fields"], row["learner"], row["n_seeds"]) == ("experts", {"mixing": "logit"}, "pg", 12)
    for split, scale in (("train", 1.0), ("test", 0.8)):
        values = raw("experts logit", rhos=(-0.8,), scale=scale).ravel()
        assert row[f"attainment_worst_{split}"] == pytest.approx(trim_mean(values, 0.25), abs=1e-5)
        assert row[f"attainment_worst_{split}_min"] == pytest.approx(values.min(), abs=1e-5)
        assert row[f"attainment_mean_{split}_low"] < row[f"attainment_mean_{split}"] < row[f"attainment_mean_{split}_high"]
    assert (row["samples"], row["samples_path"], row["seconds"]) == (80_000, 40_000, 120)
    assert next(row for row in data["rows"] if row["method"] == "reference")["learner"] is None
    nested = {key for key, value in row.items() if isinstance(value, dict | list)}
    assert nested == {"fields"}


def test_advice_reads_the_rows(results, tmp_path):
    """What `report --rows` writes is what `relate` finds the nearest setting in."""
    found = load_rows(write_rows(results, tmp_path / "rows.json"))
    said = advise({"rho": -0.75}, found)
    assert "rho = -0.8" in said[0].text
    assert {found[n]["rho"] for sentence in said for n in sentence.rows} == {-0.8}
    best = max((row for row in found if row["rho"] == -0.8), key=lambda row: row["attainment_worst_train"])
    assert f"`{best['method']}`" in said[1].text
    assert f"with {best['samples']:,} samples" in said[1].text
    assert ".0 samples" not in said[1].text


def test_rows_of_one_seed_have_values_and_no_intervals():
    (row,) = rows(suite(seeds=SEEDS[:1], rhos=(0.8,), labels=("linear",)))
    assert row["attainment_worst_train"] == pytest.approx(share_of("linear", 0.8, 100))
    assert (row["n_seeds"], row["attainment_worst_train_low"]) == (1, None)


def test_rows_of_what_is_unknown_keep_their_keys():
    def change(data):
        for split in data["metrics"]["splits"].values():
            split["attainment"] = {"mean": None, "worst": None, "per_preference": [None] * 11, "undefined": 11}
        return data

    (row,) = rows(suite(seeds=SEEDS[:1], rhos=(0.8,), labels=("linear",), change=change))
    assert row["attainment_worst_train"] is row["attainment_mean_test"] is row["samples"] is None


def test_the_command_writes_rows(tmp_path):
    from typer.testing import CliRunner

    from paretune.cli import app

    root = tmp_path / "run"
    for seed, label in product(SEEDS[:2], ("linear", "uniform")):
        publish(root, cell(label, 0.8, seed))
    done = CliRunner().invoke(app, ["report", str(root), "--out", str(tmp_path / "out"), "--rows", str(tmp_path / "rows.json"), "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 2
    assert len(json.loads(done.stdout)["comparison"]) == 2 * 2
    refused = CliRunner().invoke(app, ["report", str(root), "--out", str(tmp_path / "other"), "--rows", str(tmp_path)])
    assert (refused.exit_code, refused.stderr.splitlines()[0]) == (2, "error: --rows is a file")
    assert not (tmp_path / "other").exists(), "nothing is written before it is refused"


@pytest.mark.parametrize("more", ["settings", "seeds"])
def test_the_work_of_a_report_grows_with_the_cells_and_not_with_their_square(tmp_path, monkeypatch, more):
    counts = Counter()

    def counted(owner, name):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: counts.update([name]) or plain(*given))

    counted(report_data, "canonical_json")
    counted(Setting, "qualities")
    counted(Setting, "mean_points")
    counted(Cell, "measured")
    found = []
    for times in (1, 2):
        rhos = tuple(0.9 - 0.1 * k for k in range(3 * times if more == "settings" else 3))
        write_page(suite(rhos=rhos, seeds=tuple(range(2 * times if more == "seeds" else 2))), tmp_path / str(times))
        found.append(dict(counts))
        counts.clear()
    once, twice = found
    assert once.keys() == {"canonical_json", "qualities", "mean_points", "measured"}
    assert all(twice[name] <= 2.1 * once[name] for name in once), found

"""The report against closed forms: the numbers that a reader sees are those of the cells, in one order, everywhere the same."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise, product

import numpy as np
import pytest

from paretune.cli.places import runs_table
from paretune.errors import ConfigError, RewardError, StoreError
from paretune.files import write_json
from paretune.registry import METHODS as METHODS_SHIPPED
from paretune.report.comparison import comparison_table
from paretune.report.data import assemble, load
from paretune.report.drawing import Series, place, to_svg
from paretune.report.figures import attainment_figures, cost_figures, front_figures, leaders, loss_bars
from paretune.report.findings import findings
from paretune.report.looks import BASELINES, COLORS, FIXED, SHIPPED, looks
from paretune.report.page import tint, write_page
from paretune.report.tables import (
    CEILING,
    LEADERBOARD,
    Column,
    Table,
    attainment_table,
    front_table,
    glance_table,
    headline,
    known_table,
    leaderboard,
    loss_table,
    minus,
    relation_table,
    short_count,
)
from paretune.report.terminal import console, print_leaderboard, print_table
from paretune.runs.jobs import failure
from paretune.runs.store import ARTIFACTS, CELLS, Store
from paretune.types import key_of
from report_cells import JUDGED_WM, METHODS, REFERENCE_M, check_view, measured, optimum, publish, record, run_directory


def write_report(root, *, out=None):
    return write_page(load(root), out or root / "report")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return run_directory(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def results(root):
    return load(root)


def board(results, setting):
    return {row["method"]: row for row in leaderboard(results).rows if row["setting"] == setting}


def test_settings_go_from_agreement_to_conflict_and_name_only_what_varies(results):
    assert [s.label for s in results.settings] == ["rho = 0.8", "rho = 0", "rho = \u22120.8"]
    assert results.settings[0].task_seeds == [100, 101]


BOUND = {"constraints": [0.5, None]}


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        # Two of three have terms, so that these are the usual ones; the third has the correlation of another one.
        ([{"terms": BOUND}, {"rho": -0.8, "terms": BOUND}, {}], ["rho = 0.8, no terms", "rho = 0.8, terms"]),
        ([{"model": f"/models/{name}/checkpoints/epoch-10/merged-for-the-last-time"} for name in "ab"], ["merged-for-the-last-time ("] * 2),
        ([{"content": {"prompts.jsonl": name}} for name in "ab"], ["exact-v1 ("] * 2),  # edited between two runs
    ],
)
def test_no_two_settings_are_called_the_same(changes, labels):
    cells = {}
    for number, change in enumerate(changes):
        data = record("linear", rho=0.8, task_seed=100)
        data["task"] |= change
        data["metrics"]["splits"]["train"]["attainment"]["worst"] = 0.1 * number
        cells[str(number)] = data
    found = assemble(cells, {key: {} for key in cells})
    names = [setting.label for setting in found.settings]
    assert len(set(names)) == len(changes)
    assert all(part in name for part, name in zip(labels, names, strict=False)), names
    rows = [row for row in leaderboard(found).rows if row["method"] == "linear"]
    assert sorted(row["attainment_worst_train"] for row in rows) == pytest.approx([0.1 * number for number in range(len(changes))])
    assert [len(found) for found in leaderboard(found).placed.values()] == [2] * len(changes)  # with the exact optimum


@pytest.mark.parametrize("values", [("a/b", "a_b"), ("m" * 39 + "1", "m" * 39 + "2")])
def test_settings_whose_labels_differ_in_marks_have_files_of_their_own_and_long_ones_have_files(values, tmp_path):
    """Else a picture of the page shows the numbers of the other setting, and one of the two files is written over."""
    for share, value in zip((0.2, 0.6), values, strict=True):
        data = record("linear", rho=0.0, task_seed=100)
        data["task"] |= {f"field_{k}": value for k in range(1 if len(value) < 9 else 8)}
        data["metrics"]["splits"] = {"train": measured(share * optimum(JUDGED_WM), JUDGED_WM, mixes=False)}
        publish(tmp_path, data)
    page = write_report(tmp_path)
    text = page.read_text()
    views = json.loads(text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])["views"]
    drawn = {name: view["train"]["series"][0]["y"][0] for name, view in views.items() if name.startswith("attainment-")}
    assert sorted(drawn.values()) == pytest.approx([0.2, 0.6])
    assert all(f'class="plot" id="{name}"' in text and (page.parent / "figures" / f"{name}.svg").is_file() for name in drawn)
    boards = re.findall(r'data-board="([^"]+)" data-split', text)
    assert len(boards) == len(set(boards)) == 2


def test_no_two_methods_or_learners_are_called_the_same():
    changes = [("method", {}), ("method", {"version": 2}), ("learner", {"lr": 0.01}), ("learner", {"lr": 0.001})]
    cells = {}
    for number, (what, change) in enumerate(changes):
        data = record("linear", rho=0.8, task_seed=100)
        data[what] |= change
        cells[str(number)] = data
    found = assemble(cells, {key: {} for key in cells})
    assert len(set(found.families)) == 4
    learners = [label for label in found.families if "lr" in label]
    assert [label.rpartition("(")[2] for label in sorted(learners)] == ["pg lr 0.001)", "pg lr 0.01)", "pg lr None)", "pg lr None)"]


def test_methods_are_named_by_the_fields_in_which_they_differ(results):
    assert {"experts logit", "experts parameter", "expert objective 0", "linear", "reference"} <= set(results.families)


def test_the_worst_attainment_is_a_minimum_over_preferences_and_seeds(results, root):
    cells = [json.loads(p.read_text()) for p in root.glob("cells/*/cell.json")]
    mine = [c for c in cells if c["method"].get("mixing") == "parameter" and c["task"]["rho"] == -0.8]
    assert len(mine) == 2
    row = board(results, "rho = \u22120.8")["experts parameter"]
    for split in ("train", "test"):
        values = [v for c in mine for v in c["metrics"]["splits"][split]["attainment"]["per_preference"]]
        assert row[f"attainment_worst_{split}"] == min(values) < 0
        assert row[f"attainment_mean_{split}"] == pytest.approx(np.mean(values))
    assert row["regret_worst"] == max(c["metrics"]["splits"]["train"]["regret"]["worst"] for c in mine)


# The column of the leaderboard, what it is reduced by over seeds, and where it stands in a cell.
ON_HEADLINE = {
    "hypervolume_share": (np.mean, lambda s: s["hypervolume"]["share"]),
    "igd_plus": (np.mean, lambda s: s["igd_plus"]["value"]),
    "regret_worst": (max, lambda s: s["regret"]["worst"]),
    "utility_loss_max": (max, lambda s: s["utility_loss"]["maximum"]),
    "kl_mean": (np.mean, lambda s: s["kl"]["mean"]),
    "controllability": (np.mean, lambda s: s["controllability"]),
}


@pytest.mark.parametrize("key", ON_HEADLINE)
def test_numbers_of_exact_tasks_that_name_no_split_are_on_training_prompts(results, key):
    reduce, read = ON_HEADLINE[key]
    cells = results.settings[-1].of("linear")
    row = board(results, results.settings[-1].label)["linear"]
    there = {split: reduce([read(cell.measured(split)) for cell in cells]) for split in ("train", "test")}
    assert row["prompts"] == "train"
    assert row[key] == pytest.approx(there["train"], abs=1e-12)
    assert abs(there["train"] - there["test"]) > 1e-4, "the splits cannot be told apart here"


def test_the_headline_of_exact_tasks_is_the_training_split_everywhere(tmp_path, capsys):
    """Two methods whose order turns round from training to test prompts: a swapped headline changes every ranking, figure and sentence."""
    from rich.console import Console

    for label, train, test in (("linear", 0.9, 0.3), ("emorl-shared", 0.6, 0.5)):
        data = record(label, rho=0.0, task_seed=100)
        for split, share in (("train", train), ("test", test)):
            points_WM = share * optimum(JUDGED_WM)
            data["metrics"]["splits"][split] = measured(points_WM, JUDGED_WM, mixes=label != "linear", kl=share)
        publish(tmp_path, data)
    results = load(tmp_path)
    setting = results.settings[0]
    assert (setting.headline, setting.splits) == ("train", ("train", "test"))
    rows = leaderboard(results).rows
    assert [row["method"] for row in rows] == [CEILING, "linear", "emorl-shared"]
    assert [headline(row) for row in rows] == pytest.approx([1.0, 0.9, 0.6])
    glance = glance_table(results)
    assert [(r["method"], r["worst"], r["worst_test"]) for r in glance.rows] == [
        ("linear", pytest.approx(0.9), pytest.approx(0.3)),
        ("emorl-shared", pytest.approx(0.6), pytest.approx(0.5)),
    ]
    assert glance.columns[-1].title == "worst of all, test prompts"
    for make in (front_figures, attainment_figures):
        assert list(make(results)[0].views) == ["train", "test"]
    cost = cost_figures(results)[0]
    assert list(cost.views) == ["train"]
    heights = {one["name"]: one["y"] for one in cost.views["train"]["series"]}
    assert heights == {"linear": pytest.approx([0.9] * 2), "emorl-shared": pytest.approx([0.6] * 2)}
    assert [row["loss"] for row in loss_table(results).rows] == pytest.approx([0.4])
    assert [bar["loss"] for _, bars in loss_bars(results) for bar in bars] == pytest.approx([0.4])
    assert "training prompts" in cost.views["train"]["y"]["title"]
    said = findings(results)
    assert said[0] == "linear holds up best: its worst attainment on training prompts is 0.90."
    assert said[-1].startswith("New prompts cost most for linear")
    print_leaderboard(results, Console(width=132, highlight=False))
    out = capsys.readouterr().out
    assert "(training prompts, 1 seed)" in out
    assert out.index("linear") < out.index("emorl-shared")
    page = write_report(tmp_path, out=tmp_path / "out").read_text()
    for words in (
        "Sorted by the worst attainment on training prompts:",
        "holds up best: its worst attainment on training prompts is 0.90.</h1>",
        "every number that names no other prompts are on training prompts",
        "<dt>IGD+</dt>",
        "<dt>worst attainment</dt><dd>the lowest attainment",
        "loss of attainment, training prompts",
    ):
        assert words in page, words
    shown = re.findall(r'data-view="(\w+)" data-section="(\w+)" aria-pressed="(\w+)"', page)
    assert shown == [(v, s, p) for s in ("attainment", "leaderboard", "fronts") for v, p in (("train", "true"), ("test", "false"))]
    parts = re.findall(r'<div data-board="exact-v1" data-split="(\w+)"( data-off)?>(.*?)</div>\s*</div>', page, re.S)
    assert [(split, bool(off)) for split, off, _ in parts] == [("train", False), ("test", True)]
    worst = [re.findall(r'<td class="share" data-value="([-.\d]+)"', body) for _, _, body in parts]
    assert [float(found[2]) for found in worst] == pytest.approx([0.9, 0.5]), "each tab is ranked on its own prompts"
    for path in (tmp_path / "out" / "figures").glob("*.svg"):
        assert "training prompts" in path.read_text()


def test_a_split_that_was_not_measured_is_no_headline(tmp_path):
    data = record("linear", rho=0.0, task_seed=100)
    del data["metrics"]["splits"]["train"]
    publish(tmp_path, data)
    results = load(tmp_path)
    assert results.settings[0].headline == "test"
    assert headline(leaderboard(results).rows[1]) == pytest.approx(min(results.settings[0].qualities("linear", "test")))
    assert "on test prompts is" in findings(results)[0]
    assert [c.key for c in glance_table(results).columns] == ["method", "category", "exact-v1", "worst"]
    assert "training prompts" not in write_report(tmp_path).read_text().split("What the columns mean")[0].split("<body>")[1]


def test_the_leaderboard_is_sorted_by_worst_attainment_below_the_exact_optimum(results):
    for setting in results.settings:
        rows = [row for row in leaderboard(results).rows if row["setting"] == setting.label]
        assert rows[0]["method"] == CEILING
        assert rows[0]["attainment_worst_train"] == rows[0]["attainment_worst_test"] == 1.0
        worst = [row["attainment_worst_train"] for row in rows[1:]]
        assert worst == sorted(worst, reverse=True)
        assert {row["method"] for row in rows[1:]} == set(results.families)


def test_costs_are_those_of_the_ledger_in_total_and_on_the_critical_path(results):
    row = board(results, "rho = 0")["linear"]
    assert (row["samples_total"], row["samples_path"], row["trainings"]) == (200_000, 40_000, 5)
    assert board(results, "rho = 0")["emorl-shared"]["evaluations"] == 495
    assert board(results, "rho = 0")["emorl-shared"]["zero_shot"] is False


def test_a_method_that_plans_anew_for_every_seed_has_the_mean_of_its_trainings_in_both_tables():
    cells = {}
    for (label, count), seed in product((("linear", 5), ("uniform", 1)), (100, 101)):
        data = record(label, rho=0.0, task_seed=seed)
        data["trainings"] = [key_of([label, n]) for n in range(count + 3 * (seed == 101 and label == "linear"))]
        cells[f"{label} {seed}"] = data
    found = assemble(cells, {key: {} for key in cells})
    assert {row["method"]: row["trainings"] for row in leaderboard(found).rows[1:]} == {"linear": 6.5, "uniform": 1}
    assert {row["method"]: row["trainings"] for row in comparison_table(found).rows} == {"linear": 6.5, "uniform": 1}


def test_glance_takes_the_worst_over_settings(results):
    rows = {row["method"]: row for row in glance_table(results).rows}
    row = rows["experts parameter"]
    assert row["worst"] == min(row[s.label] for s in results.settings) == row["rho = \u22120.8"]
    there = [board(results, s.label)["experts parameter"] for s in results.settings]
    assert row["worst"] == min(r["attainment_worst_train"] for r in there)
    assert row["worst_test"] == min(r["attainment_worst_test"] for r in there) != row["worst"]
    assert list(rows)[-1] == "experts parameter"


@pytest.mark.parametrize("lacks", [(-0.8, 100), (0.8, 101)])
def test_a_method_that_lacks_a_setting_or_a_seed_does_not_hold_up_best(lacks):
    """Its worst is over less: here it lacks the one place at which it would be worst."""
    cells = {}
    for label, rho, seed in product(("linear", "experts logit"), (0.8, -0.8), (100, 101)):
        data, share = record(label, rho=rho, task_seed=seed), 0.7 if label == "linear" else 0.9
        for split in ("train", "test"):
            data["metrics"]["splits"][split] = measured(share * optimum(JUDGED_WM), JUDGED_WM, mixes=False)
        if label == "linear" or rho != lacks[0] or (lacks[0] > 0 and seed != lacks[1]):
            cells[f"{label} {rho} {seed}"] = data
    found = assemble(cells, {key: {} for key in cells})
    said = "linear holds up best: its worst attainment on training prompts is 0.70, at rho = 0.8; methods that lack a setting or a seed "
    assert findings(found)[0] == f"{said}are not compared."
    if lacks[0] < 0:
        assert [row["method"] for row in glance_table(found).rows] == ["linear", "experts"]


def test_the_mean_front_is_an_upper_bound_of_every_mean_curve(results):
    """The mean over seeds of fronts bounds the mean over seeds of curves at every preference; a front of one seed alone would not."""
    for setting, split in product(results.settings, ("train", "test")):
        front = setting.front(split)
        for label in setting.labels:
            points_WM = setting.mean_points(label, split)
            best_W = (JUDGED_WM @ front["points"].T).max(1)
            assert ((points_WM * JUDGED_WM).sum(1) <= best_W + 1e-12).all(), label


def test_only_seeds_that_every_method_has_are_drawn_together(tmp_path):
    publish(tmp_path, record("linear", rho=0.0, task_seed=100))
    publish(tmp_path, record("linear", rho=0.0, task_seed=101))
    publish(tmp_path, record("uniform", rho=0.0, task_seed=101))
    setting = load(tmp_path).settings[0]
    assert setting.shared_seeds == [101]
    alone = record("linear", rho=0.0, task_seed=101)["metrics"]["splits"]["test"]["returns"]
    assert np.allclose(setting.mean_points("linear", "test"), alone)
    assert board(load(tmp_path), setting.label)["linear"]["cells"] == 2

    cells = {}
    for label, seed in (("linear", 100), ("linear", 101), ("uniform", 101)):  # seeds of trainings
        cells[f"{label} {seed}"] = data = record(label, rho=0.0, task_seed=seed) | {"seed": seed}
        del data["task"]["seed"]
    (setting,) = assemble(cells, {key: {} for key in cells}).settings
    assert np.allclose(setting.mean_points("linear", "test"), alone)


def test_every_csv_holds_the_table_in_full(results, root, tmp_path):
    write_report(root, out=tmp_path)
    written = {path.stem: list(csv.DictReader(path.open())) for path in (tmp_path / "tables").glob("*.csv")}
    compared = {"comparison", "pairs", "profiles"}
    assert set(written) == {"leaderboard", "glance", "fronts", "attainment", "cost", "loss", "relations"} | compared
    for row, there in zip(leaderboard(results).rows, written["leaderboard"], strict=True):
        for column in LEADERBOARD:
            value = row.get(column.key)
            assert there[column.key] == ("" if value is None else str(value))
    assert len(written["attainment"]) == 3 * 2 * 9 * 2 * 11
    assert {row["series"] for row in written["fronts"]} == {CEILING, *results.families}


def test_attainment_rows_are_raw(results):
    row = attainment_table(results).rows[0]
    assert row["w_1"] + row["w_2"] == pytest.approx(1)
    assert {"return_1", "return_2", "kl", "attainment", "regret", "gain"} <= set(row)


def test_loss_parts_sum_to_the_loss(results):
    for row in loss_table(results).rows:
        attained = board(results, row["setting"])[row["method"]]["attainment_mean_train"]
        assert row["loss"] == pytest.approx(row["learning"] + row["composition"] + row["remainder"])
        assert row["loss"] == pytest.approx(1 - attained)
    assert {row["method"] for row in loss_table(results).rows} == {m for m, spec in METHODS.items() if spec["category"] == "meta-policy"}


def test_relations_are_what_the_tasks_verified(results):
    rows = relation_table(results).rows
    assert {row["correlation"] for row in rows} == {0.8, 0.0, -0.8}
    assert len(rows) == 3 * 2 * 2


FIGURES = (front_figures, attainment_figures, cost_figures)


@pytest.mark.parametrize("make", FIGURES)
def test_figures_are_whole_and_their_files_label_every_method(results, make):
    figures = make(results)
    assert len(figures) == 3
    for figure in figures:
        for view in figure.views.values():
            check_view(view)
            names = {one["name"] for one in view["series"]} - {CEILING}
            assert names <= set(results.families)
            picture = ElementTree.fromstring(to_svg([(figure.title, view)], results.looks, alt=figure.alt))
            written = " ".join(node.text or "" for node in picture.iter("{http://www.w3.org/2000/svg}tspan"))
            missing = [name for name in names if name not in written]
            assert len(missing) <= 2, missing  # no free place: the key still names it


def test_bars_of_a_loss_lie_side_by_side_and_sum_to_it(results):
    found = loss_bars(results)
    assert [setting.label for setting, _ in found] == [setting.label for setting in results.settings]
    for _, bars in found:
        assert [bar["loss"] for bar in bars] == sorted(bar["loss"] for bar in bars)
        for bar in bars:
            assert sum(value for _, value, _, _ in bar["parts"]) == pytest.approx(bar["loss"])
            right = [(left, left + width) for _, value, left, width in bar["parts"] if value > 0]
            assert right[0][0] == pytest.approx(bar["zero"])
            assert all(b[0] == pytest.approx(a[1]) for a, b in pairwise(right))
            assert all(-1e-9 <= left <= left + width <= 100 + 1e-9 for _, _, left, width in bar["parts"])


def test_three_methods_and_the_one_to_beat_are_named_in_pictures(results):
    assert leaders(results) == ("emorl-shared", "experts hidden", "experts logit", "linear")


def test_a_method_that_ignores_the_preference_is_one_marker_in_the_front(results):
    view = front_figures(results)[0].views["test"]
    points = {one["name"]: len(one["x"]) for one in view["series"]}
    assert points["uniform"] == points["reference"] == 1
    assert points["linear"] == 11
    reference = next(one for one in view["series"] if one["name"] == "reference")
    assert np.allclose([reference["x"][0], reference["y"][0]], REFERENCE_M)


def test_labels_cover_neither_each_other_nor_leave_the_plot():
    rng = np.random.default_rng(0)
    series = [Series(f"method {k}", points, points) for k in range(9) for points in [rng.uniform(20, 300, (11, 2))]]
    labels = place(series, width=330, height=330)
    assert len(labels) >= 8
    boxes = [
        (label.x - 3.3 * (len(label.name) + 2), label.x + 3.3 * (len(label.name) + 2), label.y - 7.5, label.y + 7.5) for label in labels
    ]
    for i, (left, right, top, bottom) in enumerate(boxes):
        assert left >= 0
        assert right <= 330
        assert top >= 0
        assert bottom <= 330
        for other in boxes[:i]:
            assert left >= other[1] or other[0] >= right or top >= other[3] or other[2] >= bottom


def test_the_page_needs_no_network_and_no_mouse(root, tmp_path):
    text = write_report(root, out=tmp_path).read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert "import(" not in text
    assert "fetch(" not in text
    for setting in ("rho = 0.8", "rho = \u22120.8"):
        assert setting in text
    for words in ("exact optimum", "What the numbers say", "experts parameter", "commit", "0123456789abcdef", "torch 2.13.0"):
        assert words in text
    assert re.search(r"<td[^>]*>\u22120\.2\d</td>", text)  # the soup's worst attainment stands in a table, not only in a figure
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert set(json.loads(data[1])["views"]) == set(re.findall(r'class="plot" id="([^"]+)"', text))


@pytest.mark.parametrize("step", [1e-12, 1e-8, 1e-4, 1.0, 1e9, 1e20])
def test_returns_of_any_size_can_be_drawn(tmp_path, step):
    data = record("linear", rho=0.8, task_seed=100)
    for split in data["metrics"]["splits"].values():
        split["returns"] = [[0.1 + step * n, -step * n] for n in range(11)]
    del data["fronts"]
    results = assemble({"a": data}, {"a": {}})
    (figure,) = front_figures(results)
    check_view(figure.views["train"])
    picture = to_svg([("", figure.views["train"])], results.looks, alt="")
    ticks = [float(text.replace("\u2212", "-")) for text in re.findall(r">(\u2212?[\d.]+(?:e[+\u2212]?\d+)?)</text>", picture)]
    assert len(ticks) >= 4
    write_page(results, tmp_path / "page")


def test_points_below_the_range_are_arrows_and_say_where_they_lie(tmp_path):
    """Worst attainments of -2.3 and -1.2 are both drawn at the edge: neither the label nor the hover text may take them for equal."""
    for label, share in (("expert 0", -2.3), ("expert 1", -1.2), ("linear", 0.9)):
        data = record(label, rho=0.0, task_seed=100)
        data["metrics"]["splits"]["train"] = measured(share * optimum(JUDGED_WM), JUDGED_WM, mixes=False)
        publish(tmp_path, data)
    results = load(tmp_path)
    for figure in (attainment_figures(results)[0], cost_figures(results)[0]):
        view = figure.views["train"]
        check_view(view)
        below = {one["name"]: one for one in view["series"] if "below" in one}
        assert set(below) == {"expert objective 0", "expert objective 1"}
        picture = to_svg([(figure.title, view)], results.looks, alt=figure.alt)
        for name, value in (("expert objective 0", -2.3), ("expert objective 1", -1.2)):
            assert below[name]["below"] == pytest.approx([value] * len(below[name]["x"]))
            assert f">{name} \u2212{-value:.2f}<" in picture
        assert picture.count('d="M0 1.3 1.1-.5') == sum(len(one["x"]) for one in below.values()), "each is drawn as an arrow"
    assert attainment_figures(results)[0].views["train"]["y"]["range"][1] == 1.13


def test_names_from_outside_cannot_break_the_page(tmp_path):
    data = record("linear", rho=0.0, task_seed=100)
    data["method"]["name"] = "</script><b>evil"
    publish(tmp_path, data)
    text = write_report(tmp_path).read_text()
    assert "</script><b>evil" not in text
    assert "&lt;/script&gt;&lt;b&gt;evil" in text


HOSTILE = ["<!--<script>", "</script><script>alert(1)</script>", "]]>&amp;<b>", "a'b\"c<", "${7*7}{{7*7}}", "=cmd|' /C calc'!A0", "@SUM(1)"]


@pytest.mark.parametrize("name", HOSTILE)
def test_json_in_the_page_holds_no_character_that_html_knows(tmp_path, name):
    """`<!--<script>` opens a state of the HTML parser in which the script's end is not seen, so that every figure stays empty."""
    for label in ("linear", "experts logit"):
        data = record(label, rho=0.0, task_seed=100)
        data["metrics"]["objectives"] = [name, "other"]
        if label == "linear":
            data["method"]["name"] = name
        publish(tmp_path, data)
    page = write_report(tmp_path)
    text = page.read_text()
    block = text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert not set(block) & set("<>&\u2028\u2029")
    views = json.loads(block)["views"]
    assert {name} <= {one["name"] for figure in views.values() for view in figure.values() for one in view["series"]}
    assert set(views) == set(re.findall(r'class="plot" id="([^"]+)"', text))
    pictures = list((page.parent / "figures").glob("*.svg"))
    assert pictures
    for picture in pictures:
        ElementTree.fromstring(picture.read_text())
    for file in (page.parent / "tables").glob("*.csv"):
        cells = [cell for line in csv.reader(file.open(encoding="utf-8", newline="")) for cell in line]
        assert not [cell for cell in cells if cell.startswith(("=", "@"))]


def test_a_spreadsheet_computes_no_text_and_loses_no_number(tmp_path):
    texts = ["=1+1", "+1+1", "-1+1", "@x", "\t=1", "\r=1", "\n=1", "\uff1d1", "fine", "a=b", "-0.3", "+2", "\u22122.30", ""]
    numbers = [-0.3, -1, 0.0, -1e-9, None, True, 5, "-inf", 1e300, 3, 2, 1, 0, 0.1]
    rows = [{"=text": text, "number": number} for text, number in zip(texts, numbers, strict=True)]
    table = Table("t", (Column("=text", "t", "text"), Column("number", "n")), rows)
    with table.write_csv(tmp_path).open(encoding="utf-8", newline="") as file:
        head, *found = csv.reader(file)
    assert head == ["'=text", "number"]
    for (text, number), row in zip(found, rows, strict=True):
        given = row["=text"]
        assert text == (given if given in ("fine", "a=b", "-0.3", "+2", "\u22122.30", "") else f"'{given}")
        assert number == ("" if row["number"] is None else str(row["number"]))


@pytest.mark.parametrize(
    "bad", ["\x1b[31mred", "a\nb", "a\u202egpj", "a\u2066b", "a\u200bb", "\ufeffa", "\u3164", "a\x00", " ", "a\x85b", "a\u2028b"]
)
@pytest.mark.parametrize("what", ["method", "task", "objective", "suite"])
def test_names_that_cannot_be_seen_are_refused(tmp_path, bad, what):
    data = record("linear", rho=0.0, task_seed=100)
    if what == "objective":
        data["metrics"]["objectives"] = ["fine", bad]
    elif what != "suite":
        data[what]["name"] = bad
    records = {"0" * 20: data}
    with pytest.raises(ConfigError, match=f"the name of an? {what} is made of characters that can be seen") as error:
        assemble(records, {"0" * 20: {}}, name=bad if what == "suite" else "quick")
    assert error.value.found == ascii(bad)


def test_labels_made_of_fields_stay_on_one_line():
    """A field may be a text of several lines, such as a template; a label shows its escapes."""
    records = {}
    for n, text in enumerate(("a\nb\x1b[2J", "c\u202e")):
        data = record("linear", rho=0.0, task_seed=100)
        data["method"]["template"] = data["task"]["note"] = text
        records[str(n)] = data
    results = assemble(records, {key: {} for key in records})
    assert [cell.label for cell in results.cells] == [r"linear a\nb\x1b[2J", r"linear c\u202e"]
    assert all(setting.label.isprintable() for setting in results.settings)


def test_the_same_results_give_the_same_page(root, tmp_path):
    assert write_report(root, out=tmp_path / "a").read_bytes() == write_report(root, out=tmp_path / "b").read_bytes()


def test_a_report_goes_into_the_empty_root_of_a_disk(root, tmp_path, monkeypatch):
    """A volume of a container: it cannot be renamed, nor be the new name of anything."""
    volume, replace = tmp_path / "volume", os.replace
    volume.mkdir()

    def busy(source, target):
        if target == volume:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        replace(source, target)

    monkeypatch.setattr(os.path, "ismount", lambda path: path == volume)
    monkeypatch.setattr(os, "replace", busy)
    assert write_report(root, out=volume).is_file()
    assert sorted(path.name for path in volume.iterdir()) == ["figures", "index.html", "tables"]
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_the_terminal_shows_the_same_numbers_and_fits(results, capsys):
    from rich.console import Console

    for width in (80, 132):
        print_leaderboard(results, Console(width=width, highlight=False))
        out = capsys.readouterr().out
        assert max(len(line) for line in out.splitlines()) <= width
        assert "\u22120.24" in out
        assert "the exact optimum" in out


def test_a_long_name_takes_more_lines_in_a_terminal_and_hides_no_number(capsys):
    from rich.console import Console

    cells = {}
    for letter, share in (("a", 0.83), ("b", 0.74)):
        cells[letter] = data = record("linear", rho=0.0, task_seed=100)
        data["method"] |= {f"field_{k}": " ".join([letter * 9] * 4) for k in range(3)}
        data["metrics"]["splits"] = {"train": measured(share * optimum(JUDGED_WM), JUDGED_WM, mixes=False)}
    print_leaderboard(assemble(cells, {key: {} for key in cells}), Console(width=80, highlight=False))
    table = capsys.readouterr().out.partition("•")[0]
    assert max(len(line) for line in table.splitlines()) <= 80
    assert table.count("0.83  0.83") == table.count("0.74  0.74") == table.count("1.00  1.00") == 1
    assert table.count("a" * 9) == table.count("b" * 9) == 12


def test_a_pair_of_long_names_hides_no_number(capsys):
    """As `paretune relate` prints it."""
    from rich.console import Console

    numbers = [Column(f"n{k}", f"correlation\nper {k}", "share") for k in range(5)]
    table = Table("pairs", (Column("name", "pair", "text"), *numbers), [{"name": "x" * 60, **{f"n{k}": -0.125 - k for k in range(5)}}])
    print_table(table, Console(width=80, highlight=False))
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert out.count("x") == 60
    assert all(minus(f"{-0.125 - k:.2f}") in out for k in range(5))


def test_findings_say_whether_the_expected_order_appears(results, tmp_path):
    assert any("expected order appears at rho = \u22120.8" in s for s in findings(results))
    for label in ("experts parameter", "experts logit"):
        data = record("experts logit", rho=-0.8, task_seed=100)
        data["method"] = record(label, rho=-0.8, task_seed=100)["method"]
        publish(tmp_path, data)
    text = " ".join(findings(load(tmp_path)))
    assert "does not appear" in text
    assert "by composition" in text


def test_where_nothing_could_be_gained_no_order_is_expected():
    cells = {}
    for label, rho in product(("experts logit", "experts parameter"), (0.8, -0.8)):
        data = record(label, rho=rho, task_seed=100)
        for split in data["metrics"]["splits"].values() if rho < 0 else ():
            split["attainment"] = {"mean": None, "worst": None, "per_preference": [None] * 11, "undefined": 11}
        cells[label + str(rho)] = data
    said = findings(assemble(cells, {key: {} for key in cells}))
    assert [sentence for sentence in said if "expected order" in sentence and "at rho = 0.8" in sentence]
    assert not [sentence for sentence in said if "expected order" in sentence and "\u22120.8" in sentence]


def test_a_method_in_three_objectives_is_drawn_in_pairs(tmp_path):
    data = record("linear", rho=0.0, task_seed=100)
    names = ["a", "b", "c"]
    data["metrics"]["objectives"] = names
    w_WM = np.random.default_rng(0).dirichlet(np.ones(3), 20)
    data["metrics"]["preferences"] = w_WM.tolist()
    for split in data["metrics"]["splits"].values():
        split["returns"] = split["rewards"] = (w_WM / np.linalg.norm(w_WM, axis=1, keepdims=True)).tolist()
        for name in ("utility", "gain"):
            split[name]["per_preference"] = [{"value": 0.5, "low": None, "high": None, "n": 0}] * 20
        for name in ("kl", "attainment", "regret"):
            split[name]["per_preference"] = [0.5] * 20
    data["fronts"] = data["verified"] = None
    data["known"] = {split: {"representable": [0.9] * 20} for split in ("train", "test")}
    publish(tmp_path, data)
    results = load(tmp_path)
    assert [f.title for f in front_figures(results)] == [f"exact-v1: {pair}" for pair in ("a and b", "a and c", "b and c")]
    for figure in [*front_figures(results), *attainment_figures(results)]:
        check_view(figure.views["test"])
    note = re.search(r'<p class="note">([^<]*) <a class="csv" href="tables/attainment.csv">', write_report(tmp_path).read_text())[1]
    view = attainment_figures(results)[0].views["test"]
    assert view["x"]["title"] == "balance of the preference (0: one objective, 1: all alike)"
    assert len(view["series"]) == 1
    assert note.startswith("From one objective alone (left end) to all alike (right end). A family")
    assert "Thin lines" not in note, "they are drawn for two objectives"


def test_lines_of_what_is_known_stand_in_the_table_the_figure_the_findings_and_the_loss(tmp_path):
    """Means over task seeds; representation is taken out of learning, or of the remainder where learning is unknown; the sum stays."""
    lines = lambda low, seed: {"representable": [low + 0.01 * seed] * 11, "blind": [low / 2] * 11, "posterior": [low / 4] * 11}  # noqa: E731
    for label in ("experts logit", "experts parameter"):
        for seed in (0, 1):
            data = record(label, rho=0.0, task_seed=seed)
            if label == "experts parameter":
                loss = data["metrics"]["splits"]["train"]["loss"]
                loss |= {"learning": None, "composition": None, "remainder": [0.3] * 11}
            publish(tmp_path, data | {"known": {"train": lines(0.9, seed), "test": lines(0.8, seed)}})
    results = load(tmp_path)
    rows = known_table(results).rows
    assert len(rows) == 2 * 3 * 11
    found = {(row["split"], row["line"]): row["attainment"] for row in rows}
    assert found["train", "representable"] == pytest.approx(0.905)
    assert (found["test", "blind"], found["test", "posterior"]) == pytest.approx((0.4, 0.2))

    by_method = {row["method"]: row for row in loss_table(results).rows}
    split, soup = by_method["experts logit"], by_method["experts parameter"]
    assert (split["representation"], split["learning"]) == pytest.approx((0.095, 0.05 - 0.095))
    assert (soup["representation"], soup["remainder"], soup["loss"]) == pytest.approx((0.095, 0.205, 0.3))
    assert soup["learning"] is None

    view = attainment_figures(results)[0].views["test"]
    check_view(view)
    drawn = {series["name"]: series["y"] for series in view["series"]}
    assert drawn["blind to the prompt"] == pytest.approx([0.4] * 11)
    page = write_report(tmp_path).read_text()
    assert "With the frozen head no policy attains more than 0.805 at the worst preference on test prompts." in page, "on others it does"
    assert "what is best without the prompt attains 0.40 at the worst preference; what the training prompts&#39; rewards tell" in page
    assert "no policy attains more than" not in write_page(load(run_directory(tmp_path / "without")), tmp_path / "page").read_text()


def test_a_sampled_task_is_ranked_by_gain_and_shows_no_attainment(tmp_path):
    for label, gain in (("linear", 0.2), ("uniform", 0.1)):
        data = record(label, rho=0.0, task_seed=100)
        data["metrics"]["exact"] = False
        data["task"] = {"name": "recipe", "version": 1, "model": "tiny"}
        for split in data["metrics"]["splits"].values():
            split |= dict.fromkeys(("attainment", "regret", "igd_plus", "utility_loss", "controllability", "loss"))
            split["hypervolume"] |= {"share": None, "share_of_optimum": None}
            split["gain"] = {"mean": {"value": gain, "low": gain - 0.05, "high": gain + 0.05, "n": 64}}
            split["gain"]["per_preference"] = [{"value": gain, "low": 0.0, "high": 0.3, "n": 64}] * 11
        data["fronts"] = data["verified"] = None
        publish(tmp_path, data)
    rows = leaderboard(load(tmp_path)).rows
    assert [row["method"] for row in rows] == ["linear", "uniform"]
    assert (rows[0]["gain_mean"], rows[0]["gain_low"]) == (0.2, pytest.approx(0.15))
    assert load(tmp_path).settings[0].splits == ("test", "train"), "without an optimum the headline is the test split"
    page = write_report(tmp_path).read_text()
    assert "Sorted by the worst gain on test prompts:" in page
    assert "+0.20 <small>[+0.15, +0.25]</small>" in page
    sorted_by = re.findall(r'data-value="([^"]*)"[^>]*>\+0\.[12]0 <small>', page)
    assert sorted_by == ["0.2", "0.1"] * 2, "as texts, \u22120.10 would come after \u22120.05"
    assert "Too few responses to tell whether a method gains at every preference: linear, the best, is at +0.20 [0.00, +0.30]" in page
    for make in (attainment_figures, cost_figures):
        view = make(load(tmp_path))[0].views["test"]
        check_view(view)
        assert all(0.1 <= y <= 0.2 for one in view["series"] for y in one["y"])
        assert "exact" not in json.dumps(view)
    assert "true front of these tasks is not known" in page
    assert "Gain against preference" in page
    assert 'id="glance"' not in page
    assert 'id="loss"' not in page


def test_seeds_are_counted_where_the_task_has_none_and_not_twice_where_one_was_measured_twice(tmp_path, capsys):
    cells = {}
    for number, (seed, samples) in enumerate([(0, 64), (1, 64), (2, 64), (2, 256)]):
        data = record("linear", rho=0.8, task_seed=100) | {"seed": seed}
        del data["task"]["seed"]
        data["evaluation"]["samples"] = samples
        cells[str(number)] = data
    found = assemble(cells, {key: {} for key in cells})
    assert board(found, "exact-v1")["linear"]["cells"] == 3
    print_leaderboard(found, console())
    assert "exact-v1  (training prompts, 3 seeds)" in capsys.readouterr().out
    page = write_page(found, tmp_path / "report").read_text()
    assert "on 1 task setting and 3 seeds, judged" in page
    assert "Points are means over 3 seeds." in page


def test_failures_are_listed_and_nothing_else_is_counted(root, tmp_path):
    data = record("linear", rho=0.0, task_seed=100)
    publish(tmp_path, data)
    Store(tmp_path).fail(ARTIFACTS, "0" * 20, {"label": "pg at (1, 0)", "error": "RewardError", "message": "no <score>", "traceback": ""})
    (tmp_path / CELLS / ("f" * 20)).mkdir(parents=True)  # never published
    results = load(tmp_path)
    assert len(results.cells) == 1
    page = write_report(tmp_path).read_text()
    assert "no &lt;score&gt;" in page
    assert "pg at (1, 0)" in page


def test_a_failure_without_a_message_is_listed(tmp_path, capsys):
    store = Store(tmp_path)
    store.fail(CELLS, "f" * 20, failure(AssertionError(), label="mine on exact-v1"))
    print_leaderboard(load(tmp_path), console())
    assert "failed mine on exact-v1: no message" in capsys.readouterr().out
    assert [row["state"] for row in runs_table(tmp_path).rows] == []  # no run directory without its lock
    with store.lock():
        pass
    assert [row["state"] for row in runs_table(tmp_path).rows] == ["failed: no message"]


def test_a_failure_that_quotes_half_a_character_is_kept_and_shown(tmp_path):
    for key, error in (("a", ValueError("from \ud83d")), ("b", RewardError("a score", found="of \ud83d\n", remedy="\u202e"))):
        Store(tmp_path).fail(CELLS, key * 20, failure(error, label="mine"))
    kept = Store(tmp_path).failures(CELLS)
    assert kept["a" * 20]["message"] == "from \\ud83d"
    assert kept["b" * 20]["found"] == "of \\ud83d\n"
    page = write_report(tmp_path).read_text()
    assert "\\ud83d" in page
    assert "\u202e" not in page


def test_only_failures_still_make_a_page(tmp_path):
    Store(tmp_path).fail(CELLS, "0" * 20, {"label": "linear", "error": "OSError", "message": "gone"})
    assert "No cell of this run finished" in write_report(tmp_path).read_text()


def test_one_suite_of_several_can_be_chosen(tmp_path):
    run_directory(tmp_path, suite="first", rhos=(0.0,), seeds=(100,))
    key = publish(tmp_path, record("linear", rho=0.5, task_seed=100))
    (tmp_path / "suites" / "second.json").write_text(json.dumps({"cells": {key: "linear"}}))
    assert len(load(tmp_path).cells) == 10
    assert [c.key for c in load(tmp_path, suite="second").cells] == [key]
    with pytest.raises(ConfigError, match="did you mean 'second'"):
        load(tmp_path, suite="secnd")


def test_one_suite_lists_no_training_that_failed_in_another(tmp_path):
    root = run_directory(tmp_path, rhos=(0.8,), seeds=(100,))
    store, cell = Store(root), key_of("a cell of it")
    known = json.loads((root / "suites" / "quick.json").read_text())["cells"]
    write_json(root / "suites" / "quick.json", {"format": 1, "cells": known | {cell: "mine"}})
    store.fail(ARTIFACTS, "a" * 20, failure(ValueError("mine"), label="mine"))
    store.fail(ARTIFACTS, "b" * 20, failure(ValueError("another's"), label="another's"))
    store.fail(CELLS, cell, failure(ValueError("its training failed"), label="mine") | {"training": "a" * 20})
    listed = [failure["where"] for failure in load(root, suite="quick").failures]
    assert listed == ["artifacts/.wip-" + "a" * 20, f"cells/.wip-{cell}"]
    assert len(load(root).failures) == 3


def test_a_root_without_results_says_what_to_run(tmp_path):
    with pytest.raises(ConfigError, match="at least one finished cell"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="run directory"):
        load(tmp_path / "nothing")


def test_a_damaged_cell_is_named(tmp_path):
    key = publish(tmp_path, record("linear", rho=0.0, task_seed=100))
    (tmp_path / "cells" / key / "cell.json").write_text("{")
    with pytest.raises(StoreError, match=f"{key}.*\n.*paretune check"):
        load(tmp_path)


def methods_of(*names):
    return {name: {"name": name} for name in names}


def test_looks_are_distinct_without_color():
    plugins, baselines = [f"m{k}" for k in range(14)], [f"b{k}" for k in range(4)]
    found = looks(methods_of(*plugins, *baselines), baselines)
    assert len({(look.marker, look.dash) for look in found.values()}) == 18
    assert len({(look.hex, look.mark) for look in found.values()}) == 18, "a table shows no dashes"
    grays = {light for light, _ in COLORS[12:]}
    assert {found[name].hex for name in baselines} <= grays
    assert not {found[name].hex for name in plugins} & grays


def test_a_method_has_one_color_and_one_marker_in_every_report():
    """Not by its place: alone, among all others, and among plug-ins; and no two shipped methods are alike."""
    names = [name for name in METHODS_SHIPPED if METHODS_SHIPPED[name].card.category != "baseline"]
    assert {name.partition(" ")[0] for name in SHIPPED} == set(names), "a new method is added to the end of SHIPPED"
    assert len(set(FIXED.values())) == len(FIXED) - 1, "`expert` is `expert 0`"
    whole = looks(methods_of(*sorted(names), "mine", "zzz"))
    for name in [*names, "mine"]:
        alone, few = looks(methods_of(name))[name], looks(methods_of("zzz", "bridge", name))[name]
        assert (alone.color, alone.marker) == (few.color, few.marker) == (whole[name].color, whole[name].marker), name
    known = {name: (look.color, look.marker) for name, look in whole.items()}
    assert known["bridge"] == (0, "circle")
    assert known["conditioned"] == (1, "square")
    assert known["linear"] == (4, "triangle-down")
    assert known["emorl"] == (6, "hexagon")
    assert known["tchebycheff"] == FIXED["tchebycheff"] == (9, "plus"), "names are added at the end, or old ones change"
    assert BASELINES["reference"] == (12, "cross")
    assert len({FIXED[name][0] for name in SHIPPED[:12]}) == 12, "those that are compared most differ in color"


def test_variants_of_a_method_share_its_color_and_differ_in_marker():
    variants = {f"linear points {n}": {"name": "linear", "points": n} for n in range(5)}
    found = looks(variants | methods_of("bridge"))
    assert {found[label].hex for label in variants} == {found["linear points 0"].hex} == {looks(methods_of("linear"))["linear"].hex}
    assert len({found[label].marker for label in variants}) == 5
    alone = looks({"experts": {"name": "experts", "mixing": "parameter"}})["experts"]
    both = looks({f"experts {m}": {"name": "experts", "mixing": m} for m in ("logit", "parameter")})
    assert (alone.color, alone.marker) == (both["experts parameter"].color, both["experts parameter"].marker)


def test_colors_can_be_seen_on_both_grounds():
    """A contrast of at least 3 to white and to the dark page, as WCAG asks of graphics."""

    def light(color):
        parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for on_white, on_dark in COLORS:
        assert 1.05 / (light(on_white) + 0.05) >= 3
        assert (light(on_dark) + 0.05) / (light("#14171b") + 0.05) >= 3


def test_intervals_lie_inside_the_axes_and_gains_have_bands(tmp_path):
    """Wide intervals at the ends: ranges made of the points alone cut them off."""
    for label, gain in (("linear", 0.2), ("experts logit", 0.1)):
        data = record(label, rho=0.0, task_seed=100)
        data["metrics"]["exact"] = False
        for split in data["metrics"]["splits"].values():
            split |= dict.fromkeys(("attainment", "regret", "igd_plus", "utility_loss", "controllability", "loss"))
            ends = [{"value": gain, "low": gain - 0.9, "high": gain + 0.9, "n": 64} for _ in JUDGED_WM]
            split |= {"gain": {"mean": ends[0], "per_preference": ends}, "returns_error": [[0.7, 0.5]] * len(JUDGED_WM)}
        data["fronts"] = data["verified"] = None
        publish(tmp_path, data)
    results = load(tmp_path)
    (front,), (gain,) = front_figures(results), attainment_figures(results)
    for figure in (front, gain):
        check_view(figure.views["test"])
    (one,) = [one for one in gain.views["test"]["series"] if one["name"] == "linear"]
    assert one["band"] == [pytest.approx([-0.7] * 11), pytest.approx([1.1] * 11)]
    assert front.views["test"]["series"][0]["error"] == {"x": [0.7] * 11, "y": [0.5] * 11}
    assert to_svg([("", gain.views["test"])], results.looks, alt="").count("<polygon") == 2


@pytest.mark.parametrize(("task_seeds", "half"), [((None,), 0.1), ((100, 101), 0.1 / np.sqrt(2))])
def test_an_interval_over_prompts_is_no_narrower_for_more_trainings_on_the_same_prompts(task_seeds, half):
    """Two seeds of trainings say the same here: their mean is as uncertain as each of them. Other tasks have other prompts."""
    cells = {}
    for seed, task_seed in product((0, 1), task_seeds):
        data = record("linear", rho=0.0, task_seed=100) | {"seed": seed}
        data["task"] = {"name": "recipe", "version": 1} | ({} if task_seed is None else {"seed": task_seed})
        data["metrics"]["exact"] = False
        for split in data["metrics"]["splits"].values():
            ends = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 64}
            split |= {"gain": {"mean": ends, "per_preference": [ends] * 11}, "returns_error": [[0.1, 0.1]] * 11}
        cells[f"{seed} {task_seed}"] = data
    (setting,) = assemble(cells, {key: {} for key in cells}).settings
    assert setting.band("linear", "test") == pytest.approx(np.array([[0.2 - half] * 11, [0.2 + half] * 11]))
    assert setting.mean_errors("linear", "test") == pytest.approx(np.full((11, 2), half))


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        ("share", -0.236, "\u22120.24"),
        ("share", -597.2, "< \u221210"),
        ("share", None, "–"),
        ("share", float("nan"), "–"),
        ("number", 0.05234, "0.052"),
        ("count", 40_000, "40k"),
        ("count", 1_234_567, "1.23M"),
        ("yes", False, "no"),
        ("text", "a", "a"),
    ],
)
def test_values_as_a_reader_sees_them(kind, value, shown):
    assert Column("x", "x", kind).show(value) == shown


def test_counts_and_tints_keep_their_order():
    assert [short_count(v) for v in (0, 5, 999, 1000, 2.5e9)] == ["0", "5", "999", "1k", "2.5G"]
    assert [short_count(v) for v in (999.6, 999_960, 999_400, -999_960)] == ["1k", "1M", "999k", "-1M"]
    assert tint(None) == "transparent"
    assert tint(0.5).startswith("rgba(0, 114, 178")
    assert tint(-0.5).startswith("rgba(213, 94, 0")


def test_the_front_table_has_the_exact_front_and_every_curve(results):
    rows = [row for row in front_table(results).rows if row["setting"] == "rho = 0" and row["split"] == "test"]
    exact = np.array([[row["return_1"], row["return_2"]] for row in rows if row["series"] == CEILING])
    assert np.allclose(np.linalg.norm(exact - REFERENCE_M, axis=1), 1)
    assert sum(row["series"] == "linear" for row in rows) == 11


def test_findings_repeat_what_was_said_while_methods_trained_and_which_guards_fell(tmp_path):
    """Where nothing is exact, too; a kind once for a method, and a guard only where its interval lies below 0."""
    for seed in (100, 101, 102):
        data = record("experts logit", rho=-0.8, task_seed=seed)
        data["metrics"]["exact"] = seed == 100
        data["warnings"] = {"cut": "answers were cut off"} if seed > 100 else {}
        falls = [{"value": v, "low": v - 0.1, "high": v + 0.1} for v in np.linspace(-0.3, 0.3, len(JUDGED_WM))]
        means = np.linspace(0.4, 1.0, len(JUDGED_WM)).tolist()
        guard = {"per_preference": means, "reference": 0.7, "change": {"mean": falls[5], "per_preference": falls}}
        noise = guard | {"change": {"mean": falls[5], "per_preference": [{"value": -0.3, "low": -0.7, "high": 0.1}] * len(JUDGED_WM)}}
        data["metrics"]["splits"]["test"]["guards"] = {"sense": guard, "noisy": noise}
        publish(tmp_path, data)
    said = [sentence for sentence in findings(load(tmp_path)) if "cut off" in sentence or "guard" in sentence]
    w = ", ".join(f"objective_{m + 1} {w:.2g}" for m, w in enumerate(JUDGED_WM[0]))
    assert said == [
        f"experts lowers the guard sense from 0.70 to 0.40 at {w} (test prompts).",
        "While experts trained (2 of 3 cells): answers were cut off.",
    ]

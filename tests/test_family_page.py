"""The page after a fit: what it says of intervals, the row of the untrained model, curves of trainings, and families of all ages."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from paretune.cli import app
from paretune.errors import StoreError
from paretune.files import sealed
from paretune.report.family import UNTRAINED, Fitted, findings_of, front_picture, load_fitted, measured_table, write_fitted
from paretune.runs.recipes.measured import MEASURED, measured_at, read_measured, said_of
from paretune.runs.store import ARTIFACTS, Store
from paretune.types import key_of
from report_cells import check_view

W_WM = [[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]]
NAMES = ["polite", "brief"]


def estimate(value, half):
    return {"value": value, "low": None if half is None else value - half, "high": None if half is None else value + half, "n": 32}


def measured(gains, half=0.05, w_WM=W_WM, guards=None):
    """What `measure` writes, with these gains and the same half width of every interval."""
    count, W = len(w_WM[0]), len(w_WM)
    each = [estimate(gain, half) for gain in gains]
    texts = [[f"<b>answer</b> at {n}", "another"] for n in range(W)]
    return {
        "rewards": (0.5 + np.array(w_WM) / 10).tolist(),
        "returns": (0.45 + np.array(w_WM) / 10).tolist(),
        "rewards_error": [[0.01] * count] * W,
        "returns_error": [[0.02] * count] * W,
        "reference": {"rewards": [0.5] * count, "rewards_error": [0.03] * count, "utility": [estimate(0.5, 0.03)] * W},
        "kl": {"mean": 0.5, "worst": 0.6, "per_preference": [0.5] * W, "undefined": 0},
        "utility": {"mean": estimate(0.5, half), "per_preference": [estimate(0.5 + gain, half) for gain in gains]},
        "gain": {"mean": estimate(float(np.mean(gains)), half), "per_preference": each},
        "generations": {"preferences": [*range(W)], "prompts": ["Hi", "Bye"], "reference": ["a start", "an end"], "texts": texts},
        **({"guards": guards} if guards else {}),
    }


def family_in(root, found, *, names=NAMES, name="experts-1", trainings=(), method=None, warnings=None):
    folder = root / "families" / name
    folder.mkdir(parents=True)
    card = {
        "format": 2,
        "mixing": "logit",
        "rule": {"name": "identity", "version": 1},
        "adapters": {},
        "experts": None,
        "objectives": {"names": list(names), "low": [0.0] * len(names), "high": [1.0] * len(names)},
        "base": {"model": "/model"},
        "utility": None,
        "max_new_tokens": 8,
        "meta": {"method": method or {"name": "experts", "version": 1, "mixing": "logit"}, "seed": 0, "trainings": list(trainings)},
    }
    card["meta"]["warnings"] = warnings or {}
    (folder / "family.json").write_text(json.dumps(card))
    if found is not None:
        whole = {"split": "test", "samples": 32, "prompts": 12, "beta": 0.1, "preferences": W_WM, "measured": found}
        (folder / MEASURED).write_text(json.dumps(sealed(whole)))
    return folder


def training_in(root, preference, lines):
    store = Store(root)
    spec = {"learner": {"name": "pg", "version": 1}, "preference": preference, "task": {"name": "recipe", "beta": 0.1}, "seed": 0}
    key = key_of(spec)
    work = store.begin(key, ARTIFACTS)
    (work / "spec.json").write_text(json.dumps(spec))
    (work / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store.publish(work)
    return key


def page_of(folder):
    """The page's text, and the descriptions of its figures."""
    text = write_fitted(folder).read_text()
    data = json.loads(text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0] or '{"views": {}}')
    for figure in data["views"].values():
        check_view(figure["test"])
    return text, data


@pytest.mark.parametrize(
    ("gains", "half", "first", "more"),
    [
        ([0.2] * 5, 0.05, "This family gains +0.20 [+0.15, +0.25] in utility over the untrained model", ["above 0 at every preference"]),
        ([0.01] * 5, 0.05, "Too few responses to tell whether this family gains", ["--samples 128` measures again"]),
        (
            [-0.2] * 5,
            0.05,
            "This family loses \u22120.20 [\u22120.25, \u22120.15]",
            ["surely so, at polite only, mostly polite, all alike"],
        ),
        ([0.3, 0.3, 0.0, -0.1, 0.1], 0.06, "This family gains +0.12", ["surely so, at mostly brief.", "At all alike the interval holds 0"]),
        ([0.3] * 5, None, "Too few responses to tell what this family gains over the untrained model: +0.30 in utility", []),
    ],
)
def test_the_first_sentence_is_what_the_intervals_can_tell(tmp_path, gains, half, first, more):
    folder = family_in(tmp_path, measured(gains, half))
    said = findings_of(load_fitted(folder))
    assert said[0].startswith(first)
    assert "12 test prompts" in said[0]
    for words in more:
        assert any(words in sentence for sentence in said[1:]), said
    text, _ = page_of(folder)
    assert re.search(r"<h1>.*?</svg>([^<]*)</h1>", text)[1] == said[0]
    unsure = 0 if half is None else sum(abs(gain) <= half for gain in gains)
    assert text.count("<small>too few responses to tell</small>") == (5 if half is None else unsure)


@pytest.mark.parametrize(
    ("prompts", "said"), [(12, "on 12 test"), (32, "on 32 test"), (500, "on the first 32 of 500 test"), (None, "on its test")]
)
def test_prompts_that_were_not_measured_are_not_counted(tmp_path, prompts, said):
    """32 responses per preference are to the first 32 prompts."""
    fitted = load_fitted(family_in(tmp_path, measured([0.2] * 5)))
    fitted.found["prompts"] = prompts
    assert f"on average over preferences, {said}" in findings_of(fitted)[0]


def test_the_untrained_model_has_a_row_and_five_preferences_stand_side_by_side(tmp_path):
    folder = family_in(tmp_path, measured([0.2] * 5))
    rows = measured_table(load_fitted(folder)).rows
    assert [row["preference"] for row in rows] == [UNTRAINED, "polite only", "mostly polite", "all alike", "mostly brief", "brief only"]
    assert (rows[0]["polite"], rows[0]["kl"], rows[0].get("gain")) == (0.5, 0.0, None)
    assert (rows[1]["gain"], rows[1]["gain_low"], rows[1]["gain_high"]) == (0.2, pytest.approx(0.15), pytest.approx(0.25))
    text, data = page_of(folder)
    assert text.count("&lt;b&gt;answer&lt;/b&gt; at") == 5
    table = re.search(r'<table class="board all gains">.*?</table>', text, re.DOTALL)[0]
    scores = re.findall(r"<td>([\d.]+) <small>± ([\d.]+)</small>", table)
    assert scores[:4] == [("0.500", "0.030"), ("0.500", "0.030"), ("0.600", "0.010"), ("0.500", "0.010")]
    assert "a start" in text
    assert "<b>answer" not in text
    assert set(data["views"]) == {"gain", "front-01"}
    (one,) = data["views"]["gain"]["test"]["series"]
    assert (one["x"], one["band"]) == ([0.0, 0.25, 0.5, 0.75, 1.0], [pytest.approx([0.15] * 5), pytest.approx([0.25] * 5)])
    family, start = data["views"]["front-01"]["test"]["series"]
    assert (start["name"], start["x"], start["error"]) == (UNTRAINED, [0.5], {"x": [0.03], "y": [0.03]})
    assert data["looks"]["experts"] == {"color": 2, "marker": "diamond", "dash": ""}, "the look of experts logit in every report"
    assert family["x"] == pytest.approx([0.45, 0.475, 0.5, 0.525, 0.55])


@pytest.mark.parametrize("name", ["kl", "gain", "preference", "gain_low"])
def test_an_objective_named_as_a_column_keeps_its_scores(tmp_path, name):
    whole, named = (
        measured_table(load_fitted(family_in(tmp_path / one, measured([0.2] * 5), names=(one, "brief")))) for one in ("polite", name)
    )
    titles = [column.title for column in named.shown]
    assert titles == [name if title == "polite" else title for title in (column.title for column in whole.shown)]
    for row, other in zip(named.rows, whole.rows, strict=True):
        values, others = ([each.get(column.key) for column in table.shown] for each, table in ((row, named), (other, whole)))
        assert isinstance(values[0], str)
        assert values[1:] == others[1:]


def test_what_the_log_has_more_is_drawn_where_it_has_it(tmp_path):
    more = {"entropy_estimate": 9.0, "kl_max": 0.4, "clipped": 0.25, "advantage_spread": 1.5, "logp_gap": 0.01}
    lines = [
        {"step": step, "rewards": {"polite": 0.1, "brief": 0.5}, "kl": 0.1} | {n: v * step for n, v in more.items()} for step in (1, 2)
    ]
    key = training_in(tmp_path, [1.0, 0.0], lines)
    _, data = page_of(family_in(tmp_path, measured([0.1] * 5), trainings=[key]))
    views = {view["test"]["y"]["title"]: view["test"]["series"] for name, view in data["views"].items() if name.startswith("training")}
    drawn = list(views)[4:]
    assert [title.split(",")[0] for title in drawn] == [
        *("entropy", "largest KL of a response", "share that the loss clips", "spread of advantages", "gap of sampling and scoring"),
    ]
    assert [views[title][0]["y"] for title in drawn] == [pytest.approx([value, 2 * value]) for value in more.values()]


def test_curves_of_trainings_are_read_from_the_run_directory(tmp_path):
    lines = [{"step": step, "rewards": {"polite": step / 10, "brief": 0.5}, "kl": 0.1 * step} for step in (1, 2, 3)]
    looked = [{**line, "looks": [{"step": line["step"], "utility": line["step"] / 4, "kl": 0.0, "rewards": {}}]} for line in lines]
    keys = [training_in(tmp_path, preference, lines) for preference in ([1.0, 0.0], [0.0, 1.0], None)]
    text, data = page_of(family_in(tmp_path, measured([0.1] * 5), trainings=[*keys, "gone"], warnings={"cut": "answers `x` were <cut>"}))
    views = {view["test"]["y"]["title"]: view["test"]["series"] for name, view in data["views"].items() if name.startswith("training")}
    assert list(views) == ["utility while training", "reward polite", "reward brief", "KL, nats"]
    assert [one["name"] for one in views["reward polite"]] == ["polite only", "brief only", "any preference"]
    assert [one["name"] for one in views["utility while training"]] == ["polite only", "brief only"], "a preference that varies has none"
    assert views["utility while training"][0]["y"] == pytest.approx([0.1 - 0.01, 0.2 - 0.02, 0.3 - 0.03])
    assert "While it trained: answers <code>x</code> were &lt;cut&gt;" in text
    key = training_in(tmp_path / "b", [1.0, 0.0], looked)
    _, data = page_of(family_in(tmp_path / "b", None, trainings=[key]))
    (one,) = data["views"]["training-0"]["test"]["series"]
    assert (data["views"]["training-0"]["test"]["y"]["title"], one["y"]) == ("utility at validation prompts", [0.25, 0.5, 0.75])


def test_guards_that_fell_are_said_and_shown(tmp_path):
    change = {"per_preference": [{"value": v, "low": v - 0.1, "high": v + 0.1} for v in (-0.3, 0.0, 0.0, 0.0, 0.3)]}
    guard = {"per_preference": [0.4, 0.7, 0.7, 0.7, 1.0], "reference": 0.7, "change": change}
    folder = family_in(tmp_path, measured([0.2] * 5, guards={"sense": guard}))
    assert findings_of(load_fitted(folder))[-1] == "The guard sense falls from 0.70 to 0.40 at polite only."
    assert "sense (guard)" in page_of(folder)[0]
    assert [row["sense"] for row in measured_table(load_fitted(folder)).rows] == [0.7, 0.4, 0.7, 0.7, 0.7, 1.0]


@pytest.mark.parametrize("lost", ["reference", "rewards_error", "everything", "intervals"])
def test_families_of_earlier_versions_and_without_measurements_have_a_page(tmp_path, lost):
    found = measured([0.1] * 5)
    if lost != "everything":
        del found["rewards_error"]
    if lost == "reference":
        del found["reference"], found["generations"]
    if lost == "rewards_error":
        found["reference"] = {"rewards": [0.5, 0.5]}
    if lost == "intervals":
        found |= {"returns_error": [[None, None]] * 5}
    text, _ = page_of(family_in(tmp_path, None if lost == "everything" else found))
    assert ("was not measured" in text) == (lost == "everything")


def test_measurements_that_were_changed_are_refused(tmp_path):
    folder = family_in(tmp_path, measured([0.2] * 5))
    (folder / MEASURED).write_text((folder / MEASURED).read_text().replace('"samples": 32', '"samples": 9000'))
    with pytest.raises(StoreError, match="measurements are read as they were written"):
        read_measured(folder)


def test_report_reads_what_fit_made(tmp_path):
    """A run directory with families alone, one family, several into another folder, and one that also holds a suite's cells."""
    from report_cells import publish, record

    family_in(tmp_path, measured([0.2] * 5))
    family_in(tmp_path, measured([0.1] * 5), name="bridge-2", method={"name": "bridge", "version": 1})
    run = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert run.exit_code == 0, run.output
    pages = sorted(tmp_path.glob("families/*/index.html"))
    assert [page.parent.name for page in pages] == ["bridge-2", "experts-1"]
    assert all(f"family: {page}" in run.stdout for page in pages)
    assert "the untrained model" in run.stdout
    out = json.loads(CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "out"), "--json"]).stdout)
    assert [row["report"] for row in out["families"]] == [str(tmp_path / "out" / name / "index.html") for name in ("bridge-2", "experts-1")]
    assert [row["gain"] for row in out["families"][1]["measured"]] == [None, *[0.2] * 5]
    one = CliRunner().invoke(app, ["report", str(pages[0].parent), "--out", str(tmp_path / "one")])
    assert one.exit_code == 0
    assert (tmp_path / "one" / "index.html").is_file()
    publish(tmp_path, record("linear", rho=0.0, task_seed=100))
    both = CliRunner().invoke(app, ["report", str(tmp_path), "--json"])
    assert json.loads(both.stdout)["leaderboard"], "the suite's report is printed as before"
    assert str(pages[0]) in both.stderr


def test_a_damaged_family_is_left_out_and_alone_it_is_an_error(tmp_path):
    folder = family_in(tmp_path, measured([0.2] * 5))
    (folder / MEASURED).write_text("{")
    alone = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (alone.exit_code, "measurements are read as they were written" in alone.stderr) == (StoreError.exit_code, True)
    family_in(tmp_path, measured([0.1] * 5), name="whole")
    both = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert both.exit_code == 0
    assert "left out: measurements are read as they were written" in both.stderr
    assert "whole/index.html" in both.stdout


def test_where_a_result_is_measured():
    class Of:
        def __init__(self, count, preferences=None):
            self.preferences = preferences
            self.task = type("T", (), {"objectives": type("O", (), {"count": count})})

    names = ["a", "b", "c", "d"]
    said = {count: [said_of(w, names[:count]) for w in measured_at(Of(count))] for count in (2, 3, 4)}
    assert said[2] == ["a only", "mostly a", "all alike", "mostly b", "b only"]
    assert said[3] == ["a only", "b only", "c only", "all alike", "mostly a", "mostly b", "mostly c"]
    assert said[4] == ["a only", "b only", "c only", "d only", "all alike"]
    assert sorted(measured_at(Of(2, 3)).tolist()) == [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    assert measured_at(Of(2, ((0.2, 0.8),))).tolist() == [[0.2, 0.8]]
    assert said_of((0.2, 0.8), NAMES) == "polite 0.2, brief 0.8"


@pytest.mark.parametrize(
    ("w_WM", "drawn"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], True),
        ([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]], False),  # along one edge: nothing lies between them
        ([[1, 0, 0]], False),
        ([[1, 0], [0, 1]], True),
        ([[0.2, 0.2, 0.2, 0.4]], False),
    ],
)
def test_where_a_preference_stands_is_drawn_where_the_measured_ones_span_the_simplex(tmp_path, w_WM, drawn):
    count, m = len(w_WM), len(w_WM[0])
    names = [f"objective_{k}" for k in range(m)]
    returns = {"returns": w_WM, "returns_error": [[0.01] * m] * count, "reference": {"rewards": [0.1] * m}}
    card = {"objectives": {"names": names}, "meta": {"method": {"name": "bridge"}}}
    fitted = Fitted(tmp_path, card, {"preferences": w_WM, "measured": returns})
    assert (front_picture(fitted, np.full(m, 1 / m)) is not None) == drawn


@pytest.mark.parametrize(("weight", "drawn"), [(0.1, False), (0.25, True), (0.6, True), (0.75, True), (1.0, False)])
def test_beyond_the_measured_preferences_nobody_stands_on_the_front(tmp_path, weight, drawn):
    """There the nearest measured point is another preference's."""
    w_WM = [[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]
    returns = {"returns": w_WM, "returns_error": [[0.01] * 2] * 3, "reference": {"rewards": [0.1] * 2}}
    fitted = Fitted(tmp_path, {"objectives": {"names": NAMES}, "meta": {}}, {"preferences": w_WM, "measured": returns})
    assert (">you</tspan>" in front_picture(fitted, np.array([weight, 1 - weight]))) == drawn

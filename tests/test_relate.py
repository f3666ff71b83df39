"""`paretune relate` as a person or a script meets it, and the pictures it writes."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from paretune.cli import app
from paretune.report.relate import heat_map, heat_svg
from recipe_files import tiny_model, write_recipe

RUNNER = CliRunner()
TINY = ["alphabet=4", "length=2", "prompt_count=4", "width=32", "layers=1"]
ROWS = {
    "rows": [
        {
            "rho": -0.8,
            "method": "sweep",
            "category": "multi-policy",
            "learner": "pg",
            "attainment_worst_train": 0.9,
            "n_seeds": 10,
            "samples": 9,
        }
    ]
}


def run(*args, code=0):
    result = RUNNER.invoke(app, ["relate", *map(str, args)])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def test_tables_say_what_relates_and_end_with_advice(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(ROWS))
    shown = run("exact-v1", "rho=-0.8", "seed=3", *TINY, "--probe", "--results", path).stdout
    assert shown.count("\n  responses that stand out: share whose score is not the most common one") == 1
    assert shown.count("\n  second's gain per gain of first: ") == 1  # once for two tables
    for part in ("objective_1 & objective_2", "spread", "Spearman", "prompts in", "cosine", "at initialization, of LoRA's B alone"):
        assert part in shown, part
    assert shown.rstrip().splitlines()[-1].startswith("• Best: `sweep` (multi-policy), which reaches 0.90")
    assert f"[{path}: row 0, attainment_worst_train]" in shown


def test_dials_may_stand_in_the_name_and_json_is_pure(tmp_path):
    one = run("exact-v1 rho=-0.5 seed=3", *TINY, "--json", "--out", tmp_path / "out")
    found = json.loads(one.stdout)
    assert found["task"]["rho"] == -0.5
    assert found["matrices"]["within"][0][1] == pytest.approx(-0.5, abs=0.05)
    assert found["advice"]
    assert found["probe"] is None
    assert json.loads(run("exact-v1", "rho=-0.5", "seed=3", *TINY, "--json").stdout) == found
    written = json.loads((tmp_path / "out" / "relations.json").read_text())
    assert written.pop("figures").keys() == {"correlation", "spearman", "by_prompt"}
    assert written == found
    assert sorted(p.name for p in (tmp_path / "out" / "tables").iterdir()) == ["objectives.csv", "pairs.csv"]
    for path in (tmp_path / "out" / "figures").iterdir():
        ElementTree.parse(path)


def test_a_recipe_is_sampled_with_intervals(tmp_path):
    recipe = write_recipe(tmp_path, tiny_model())
    found = json.loads(run(recipe, "max_new_tokens=6", "--prompts", 3, "--group", 12, "--probe-steps", 1, "--json").stdout)
    assert found["samples"] == 36
    assert not found["exact"]
    assert found["probe"]["steps"] == 1
    pair = found["pairs"][0]["within"]
    assert pair["low"] is None or pair["low"] <= pair["value"] <= pair["high"]
    assert len(found["prompts"]) == 3
    shown = run(recipe, "--prompts", 2, "--group", 4).stdout
    assert "loud & brief" in shown
    assert "unknown" in shown


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["exact-v1", "rho=-3"], "rho lies between -1 and 0.99"),
        (["exact-v1", "objective_count=1"], "objective_count lies between 2 and 8"),
        (["exact-v1", "rho"], "an override reads key=value"),
        (["exact-v1", "roh=1"], "did you mean 'rho'?"),
        (["exakt-v1"], "did you mean 'exact-v1'?"),
        (["recipe"], "a recipe is given by its file"),
        (["none.yaml"], "a configuration file exists"),
        (["exact-v1", *TINY, "--results", "none.json"], "advice is read from a file of results"),
        ([""], "a task is known by its name"),
    ],
)
def test_mistakes_are_code_2_and_one_message(args, shown):
    assert shown in run(*args, code=2).stderr


def test_a_heat_map_shows_every_value_and_what_is_unknown():
    view = heat_map(np.array([[1.0, -0.25], [np.nan, 0.0]]), rows=["a", "b & c"], columns=["x", "<y>"])
    assert view["data"][0]["z"] == [[1.0, -0.25], [None, 0.0]]
    assert view["data"][0]["text"] == [["1.00", "−0.25"], ["–", "0.00"]]
    picture = heat_svg(view, title="A & B")
    root = ElementTree.fromstring(picture)
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["A & B", "x", "<y>", "a", "1.00", "−0.25", "b & c", "–", "0.00"]
    fills = [node.get("fill") for node in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert fills == ["#0072b2", "#f4d7bf", "#d5d9de", "#ffffff"]

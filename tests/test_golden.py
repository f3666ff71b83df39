"""Golden data: made from formulas, met by the library, and able to tell the known defects of other implementations."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from paretune.cli import app
from paretune.errors import ConfigError
from paretune.methods.sweep import Normalized
from paretune.testing import check_golden, golden
from paretune.testing.golden import functions_of, own
from paretune.training.advantages import AGGREGATIONS, EXPERIMENTAL

ROOT = Path(__file__).resolve().parent.parent
RULES = golden()["rules"]


def run(*args, code=0):
    result = CliRunner().invoke(app, ["golden", *map(str, args)])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def test_the_file_is_what_its_formulas_make():
    pytest.importorskip("mpmath")
    made = subprocess.run([sys.executable, ROOT / "tools" / "golden.py", "--check"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "paretune" not in [
        word for line in (ROOT / "tools/golden.py").read_text().splitlines() if "import " in line for word in line.split()
    ]


@pytest.mark.parametrize("rule", RULES)
def test_the_library_agrees(rule):
    assert check_golden(own(rule), rule) == []


def test_every_aggregation_has_golden_data_and_the_same_are_experimental():
    assert set(AGGREGATIONS) <= set(RULES)
    assert {name for name, rule in RULES.items() if rule.get("experimental")} == set(EXPERIMENTAL)
    for one in golden()["cases"]:
        assert {e["provenance"] for e in one["expected"].values()} <= {"published number", "the source's formula", "ours"}
        assert all(one["expected"][name]["provenance"] == "ours" for name in EXPERIMENTAL)


def test_the_published_pair():
    pair = next(case for case in golden()["cases"] if case["name"] == "published-pair")
    np.testing.assert_allclose(pair["expected"]["gdpo"]["advantages"], [-0.548, 0.548, -1.095, 1.095], atol=5e-4)
    np.testing.assert_allclose(pair["expected"]["grpo"]["advantages"], [-0.707, 0.707, -0.707, 0.707], atol=5e-4)


def z(values, eps, axis=1):
    return (values - values.mean(axis, keepdims=True)) / (values.std(axis, ddof=1, keepdims=True) + eps)


def careless(rewards, group, weights, *, eps=1e-4, drop=False, zero=False):
    """GDPO as it is often written."""
    if zero:
        rewards = np.nan_to_num(rewards)
    each = rewards.reshape(-1, group, rewards.shape[1])
    a = (z(each, eps) * weights).sum(-1)
    a = (a - a.mean()) / (a.std(ddof=1) + eps)
    return np.where((each * weights).sum(-1).std(1, keepdims=True) > 0, a, 0.0) if drop else a


@pytest.mark.parametrize(
    ("wrong", "caught"),
    [
        (lambda r, g, w: careless(r, g, w), "defect-nan-poisons-the-group"),
        (lambda r, g, w: careless(r, g, w, zero=True), "defect-unscored-counts-as-zero"),
        (lambda r, g, w: careless(r, g, w, drop=True), "defect-dropped-on-the-sum"),
        (lambda r, g, w: careless(r, g, w, eps=1e-8), "defect-spread-of-rounding"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_each_defect_is_told_by_its_case(wrong, caught):
    found = {d.case: d for d in check_golden(wrong, "gdpo")}
    assert caught in found
    assert "by-hand" not in found or "rounding" in caught  # a small eps is a difference everywhere, of 1e-4


def test_a_spread_without_the_odd_one_is_thousands():
    def left_out(rewards, group, weights):
        sums = (rewards * weights).sum(1).astype(np.float32)
        others = np.array([np.delete(sums, i).std(ddof=1) for i in range(len(sums))])
        return (sums - sums.mean()) / (others + 1e-9)

    (found,) = check_golden(left_out, "grpo", cases=["defect-4000-fold"])
    assert found.largest > 1000


def test_a_function_that_raises_or_answers_in_another_shape_is_a_difference():
    assert len(check_golden(lambda r, g, w: 1 / 0, "gdpo")) == len(golden()["cases"])
    assert "ZeroDivisionError" in check_golden(lambda r, g, w: 1 / 0, "gdpo")[0].error
    assert len(check_golden(lambda r, g, w: r[:-1, 0], "gdpo")) == len(golden()["cases"])


def test_the_example_of_the_page_and_the_command(tmp_path):
    page = (ROOT / "docs" / "golden.md").read_text()
    mine = tmp_path / "mine.py"
    mine.write_text(page.split("```python\n")[1].split("```")[0])
    found = json.loads(run("check", mine, "--json", code=1).stdout)
    unscored = {c["name"] for c in golden()["cases"] if any(None in row for row in c["rewards"])}
    assert {d["case"] for d in found["different"]} == unscored
    assert len(unscored) == 3
    run("check", f"{mine}:dr_grpo", "--rule", "dr_grpo", "--case", "by-hand")
    assert "dr_grpo defect-nan-poisons-the-group: differs by up to inf" in run("check", mine, code=1).stdout
    assert f"{len(golden()['cases'])} small batches" in page.replace("\n", " ")
    assert f"{len(RULES)} rules" in page


def test_the_lists():
    text = run().stdout
    assert all(rule in text for rule in RULES)
    assert "(experimental)" in text
    assert "0.547" in run("gdpo", "--case", "published-pair").stdout
    assert json.loads(run("--json").stdout) == golden()
    assert json.loads(run("gdpo", "--json").stdout)["cases"][0]["expected"]["printed"] == [-0.548, 0.548, -1.095, 1.095]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["gdpoo"], "gdpo"),
        (["gdpo", "--case", "pair"], "published-pair"),
        (["check"], "no target"),
        (["check", "no_such_module_at_all"], "no_such_module_at_all"),
        (["check", "json"], "--rule"),
        (["check", "json:dumps"], "--rule"),
        (["check", "json:dumps", "--rule", "nothing"], "nothing"),
        (["gdpo", "file.py"], "check"),
        (["check", "paretune.training.advantages", "--tolerance", "inf"], "tolerance"),
    ],
)
def test_mistakes_have_one_message(args, said):
    error = run(*args, code=2).stderr
    assert said in error
    assert error.count("error:") == 1


def test_functions_are_found_by_their_names():
    assert set(functions_of("paretune.training.advantages")) == set(AGGREGATIONS) - {"gd2po_snr"}
    with pytest.raises(ConfigError, match="the rules it lists"):
        check_golden(own("gdpo"), "gdp")


@pytest.mark.parametrize("tolerance", [math.inf, math.nan, -1e-9, None])
def test_a_tolerance_is_a_number_that_can_be_exceeded(tolerance):
    with pytest.raises(ConfigError, match="tolerance"):
        check_golden(lambda *_: [], "gdpo", tolerance=tolerance)


def test_no_shipped_comparison_contains_an_experimental_rule_and_its_card_says_why():
    files = [*(ROOT / "src/paretune/suites").glob("*.yaml"), *(ROOT / "benchmarks").glob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")]
    assert files
    for file in files:
        assert not re.search(rf"aggregation:\W*({'|'.join(EXPERIMENTAL)})\b", file.read_text()), file
    assert not [name for name in EXPERIMENTAL if name.upper() in Normalized.card.summary]
    assert all(name in Normalized.card.differs for name in EXPERIMENTAL)

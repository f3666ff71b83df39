"""The fruit tree against what its benchmark says of itself, and the measures against what morl-baselines says of the same points."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog

from paretune.errors import ConfigError, TaskError
from paretune.evaluation import metrics
from paretune.files import write_json
from paretune.objectives.utilities import Landmarks, Tchebycheff, linear
from paretune.registry import TASKS, describe
from paretune.runs.jobs import Tasks
from paretune.seeds import generator

RECORDED = json.loads((Path(__file__).parents[1] / "benchmarks" / "recorded.json").read_text(encoding="utf-8"))


def tree(**dials):
    return TASKS.build({"name": "fruit-tree", "prompt_count": 2, "width": 32, "layers": 1, **dials})


@pytest.mark.parametrize(("depth", "mean"), [(5, 4.963), (6, 5.047), (7, 5.123)])
def test_leaves_are_the_benchmarks(depth, mean):
    leaves_LM = tree(length=depth).leaves_LM
    assert leaves_LM.shape == (2**depth, 6)
    assert metrics.nondominated(leaves_LM).all()
    for leaf_M, others in ((leaf_M, np.delete(leaves_LM, i, axis=0)) for i, leaf_M in enumerate(leaves_LM)):
        # On the convex hull: some weights prefer the leaf to all others, by a margin that is maximized.
        gaps = np.hstack([others - leaf_M, np.ones((len(others), 1))])
        found = linprog(
            [0] * 6 + [-1], A_ub=gaps, b_ub=np.zeros(len(gaps)), A_eq=[[1] * 6 + [0]], b_eq=[1], bounds=[(0, 1)] * 6 + [(None, None)]
        )
        assert -found.fun > 0
    w_WM = generator(0, "fruit tree").dirichlet(np.ones(6), size=200_000)
    assert (w_WM @ leaves_LM.T).max(1).mean() == pytest.approx(mean, abs=0.006), "4 standard errors"


def test_a_path_earns_its_leaf():
    task = tree(length=5)
    prompts = task.prompts("train")[:1] * 4
    leaf, never = task.leaves_LM, np.zeros(6)
    got = task.score(prompts, ["aaaaa", "bbbbb", "abaab", "abaa"])
    assert got.tolist() == [leaf[0].tolist(), leaf[31].tolist(), leaf[0b01001].tolist(), never.tolist()], (
        "left is first; unfinished is nothing"
    )


def test_its_cells_can_be_written(tmp_path):
    """The leaves are no squashed normals: a posterior of them was NaN, which no cell.json may hold."""
    task = tree(length=5)
    assert set(task.known_W(np.full((1, 6), 1 / 6), "test")) == {"representable", "blind"}
    write_json(tmp_path / "cell.json", Tasks().truth(describe(task), ("train", "test")))


def test_the_reference_goes_either_way_and_the_optimum_is_the_best_leaf():
    task = tree(length=6, beta=0.01)
    for split in ("train", "test"):
        p_PR = np.exp(task.reference_logp_PR(split))
        assert p_PR[:, -64:].sum(1) == pytest.approx(1, abs=0.1)
        assert p_PR[:, -64:].max() < 3 / 64, "no leaf is favored"
        assert np.ptp(p_PR, axis=0).max() == pytest.approx(0, abs=1e-7), "one start"
    for w_M in (np.eye(6)[2], np.full(6, 1 / 6), np.array(RECORDED["equally_spaced_weights_6_50"][30])):
        best = (task.leaves_LM @ w_M).max()
        returned = w_M @ task.returned_M(task.optimum_logp_PR(w_M, "train"), "train")
        assert best * 0.99 < returned < best + 1e-9


@pytest.mark.parametrize(
    ("dials", "said"),
    [({"length": 4}, "length = 4"), ({"beta": 0}, "beta = 0"), ({"prompt_count": 0}, "prompt_count = 0"), ({"width": 12}, "width = 12")],
)
def test_a_tree_that_there_is_not(dials, said):
    with pytest.raises(TaskError, match=said):
        tree(**dials)


def test_dials_of_other_tasks_are_not_its():
    with pytest.raises(ConfigError, match="rho"):
        tree(rho=-0.8)


# Measures, by others' code


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"{len(case['reference'])} objectives")
def test_measures_are_those_of_morl_baselines(case):
    points_KM, front_KM, w_WM = (np.array(case[name]) for name in ("points", "front", "weights"))
    assert metrics.hypervolume(points_KM, np.array(case["reference"])) == pytest.approx(case["hypervolume"], rel=1e-9)
    best_W = (w_WM @ front_KM.T).max(1)
    expected, maximum = metrics.utility_losses(points_KM, w_WM, best_W)
    assert best_W.mean() - expected == pytest.approx(case["expected_utility"], rel=1e-12), "theirs is a value, ours a loss"
    assert maximum == pytest.approx(case["maximum_utility_loss"], rel=1e-12)
    assert metrics.igd_plus(points_KM, front_KM) == pytest.approx(case["igd_plus_of_pymoo"], rel=1e-9)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"{len(case['reference'])} objectives")
def test_igd_of_morl_baselines_counts_what_exceeds_too(case):
    """Theirs is plain IGD: a point beyond the front's is as far away as one short of it, so it is never below ours."""
    points_KM, front_KM = np.array(case["points"]), np.array(case["front"])
    apart_KK = np.linalg.norm(front_KM[:, None] - points_KM[None], axis=2)
    assert apart_KK.min(1).mean() == pytest.approx(case["igd"], rel=1e-9)
    assert case["igd"] >= metrics.igd_plus(points_KM, front_KM)
    better_KM = front_KM + 1.0
    assert metrics.igd_plus(better_KM, front_KM) == 0
    assert np.linalg.norm(front_KM[:, None] - better_KM[None], axis=2).min(1).mean() > 0.3


def test_points_below_the_reference_point_add_no_volume():
    """In pymoo, too, whose reference point is a maximum of negated objectives."""
    assert metrics.hypervolume(np.array([[1.0, 1.0], [5.0, -1.0]]), np.zeros(2)) == 1.0


# Deep sea treasure: a concave front


def test_a_concave_front_is_reached_by_tchebycheff_and_not_by_weighted_sums():
    """Each point is a deterministic policy of deep sea treasure; of these, the best under either utility is looked for."""
    front_KM = np.array(RECORDED["deep_sea_treasure_concave_front"])
    assert metrics.nondominated(front_KM).all()
    low_M, high_M = front_KM.min(0), front_KM.max(0)
    first = (np.arange(2000) + 0.5) / 2000
    w_WM = np.stack([first, 1 - first], axis=1)
    unit_KM = (front_KM - low_M) / (high_M - low_M)
    by_sum = {int(linear(unit_KM, np.tile(w_M, (len(unit_KM), 1))).argmax()) for w_M in w_WM}
    assert by_sum == {0, len(front_KM) - 1}, "only the ends"
    marks = Landmarks(low_M=low_M, high_M=high_M, ideal_M=high_M, reference_M=low_M)
    sharp = Tchebycheff(mu=1e-6)
    by_worst = {int(sharp.value(front_KM, w_M, marks).argmax()) for w_M in w_WM}
    assert by_worst == set(range(len(front_KM))), "every point"
    blunt = Tchebycheff(mu=100.0)
    assert {int(blunt.value(front_KM, w_M, marks).argmax()) for w_M in w_WM} == by_sum, "softened enough it is a weighted sum"

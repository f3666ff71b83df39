"""Records what morl-baselines and MO-Gymnasium say, so that tests and benchmarks compare with it without installing them.

    python tools/recorded.py [--values src/paretune/tasks/exact/fruits.json] [--recorded benchmarks/recorded.json]

Needs `mo-gymnasium`, `morl-baselines` and `pymoo`. Two files are written: the leaves of the fruit trees with their license, and
with the versions that said so the 50 evaluation weights for six objectives, the front of the concave deep sea treasure, and what their
functions say of generated fronts.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np

FRONTS = ((0, 2, 5, 4), (1, 2, 30, 12), (2, 3, 20, 15), (3, 4, 12, 10), (4, 6, 8, 9))  # seed, M, points of the front, of the estimate


def cases() -> list[dict[str, Any]]:
    """What morl-baselines says of points on and below a part of a sphere, some dominated, some twice."""
    from morl_baselines.common.performance_indicators import expected_utility, hypervolume, igd, maximum_utility_loss
    from morl_baselines.common.weights import random_weights
    from pymoo.indicators.igd_plus import IGDPlus

    found = []
    for seed, m, many, few in FRONTS:
        rng = np.random.default_rng(seed)
        front_KM = np.abs(rng.normal(size=(many, m)))
        front_KM = (3 * front_KM / np.linalg.norm(front_KM, axis=1, keepdims=True) - 1).round(6)
        points_KM = (front_KM[rng.integers(many, size=few)] - np.abs(rng.normal(0, 0.3, (few, m)))).round(6)
        points_KM = np.concatenate([points_KM, points_KM[:1]])
        low_M, w_WM = np.full(m, -1.5), random_weights(m, 7, rng=rng).round(6)
        found.append(
            {
                "front": front_KM.tolist(),
                "points": points_KM.tolist(),
                "reference": low_M.tolist(),
                "weights": w_WM.tolist(),
                "hypervolume": float(hypervolume(low_M, list(points_KM))),
                "igd": float(igd(list(front_KM), list(points_KM))),
                "igd_plus_of_pymoo": float(IGDPlus(-front_KM)(-points_KM)),
                "expected_utility": float(expected_utility(list(points_KM), list(w_WM))),
                "maximum_utility_loss": float(maximum_utility_loss(list(points_KM), list(front_KM), w_WM)),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=Path, default=Path("src/paretune/tasks/exact/fruits.json"))
    parser.add_argument("--recorded", type=Path, default=Path("benchmarks/recorded.json"))
    given = parser.parse_args()
    from mo_gymnasium.envs.deep_sea_treasure.deep_sea_treasure import CONCAVE_FRONT
    from mo_gymnasium.envs.fruit_tree.fruit_tree import FRUITS
    from morl_baselines.common.weights import equally_spaced_weights

    license_file = next(file for file in distribution("mo-gymnasium").files or [] if file.name == "LICENSE")
    leaves = {depth: FRUITS[depth] for depth in ("5", "6", "7")}
    source = f"MO-Gymnasium {version('mo-gymnasium')}, envs/fruit_tree/fruit_tree.py: FRUITS"
    told = {"source": source, "license": Path(str(license_file.locate())).read_text(encoding="utf-8").splitlines()}
    rows = ",\n".join(f'"{depth}": [\n' + ",\n".join(json.dumps(row) for row in table) + "\n]" for depth, table in leaves.items())
    given.values.write_text(json.dumps(told, indent=1)[:-2] + ",\n" + rows + "\n}\n", encoding="utf-8")
    recorded = {
        "made_by": "tools/recorded.py",
        "versions": {name: version(name) for name in ("mo-gymnasium", "morl-baselines", "pymoo", "numpy")},
        "equally_spaced_weights_6_50": [w_M.tolist() for w_M in equally_spaced_weights(6, 50)],
        "deep_sea_treasure_concave_front": [point_M.tolist() for point_M in CONCAVE_FRONT],
        "cases": cases(),
    }
    given.recorded.write_text(json.dumps(recorded) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

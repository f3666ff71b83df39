"""What the tests of recipes share: a tiny model with random weights, made by the example's own script, and a recipe around it."""

import functools
import importlib.util
import json
import tempfile
from pathlib import Path

import yaml

EXAMPLE = Path(__file__).parent.parent / "examples" / "support_desk"

REWARDS = """
def shout(completions, **kwargs):
    return [sum(c.isupper() for c in text) / max(len(text), 1) for text in completions]


def answers(completions, answer):
    return [float(a in c) for c, a in zip(completions, answer)]
"""


def example_module(name):
    """A Python file of the example, as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _tiny_folder():
    folder = tempfile.TemporaryDirectory(prefix="paretune-tiny-")
    example_module("make_model").make_model(folder.name, steps=0)
    return folder  # removed when the tests end


def tiny_model():
    """A model directory with random weights, made once per process; never modify it."""
    return Path(_tiny_folder().name)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder, model, **changes):
    """A recipe with two objectives and ten prompts in `folder`; a change of None leaves the key out. Returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "prompts.jsonl").exists():
        write_lines(folder / "prompts.jsonl", [{"prompt": f"Customer: where is parcel {i}?\nAgent:", "answer": str(i)} for i in range(10)])
    if not (folder / "rewards.py").exists():
        (folder / "rewards.py").write_text(REWARDS)
    given = {
        "model": str(model),
        "prompts": "prompts.jsonl",
        "objectives": [
            {"name": "loud", "use": "rewards.py:shout", "low": 0, "high": 1},
            {"name": "brief", "use": "length", "half": 10},
        ],
        "max_new_tokens": 8,
        "output": "runs",
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
    return path

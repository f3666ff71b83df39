"""The commands of docs/tuning-and-export.md run, one after the other, on a tiny recipe and a tiny suite."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from paretune.cli import app
from paretune.policy.base import MIXINGS
from paretune.registry import METHODS
from paretune.runs.recipes.recipe import load_recipe
from paretune.serve.model_card import VLLM_RANKS
from recipe_files import tiny_model, write_recipe

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "tuning-and-export.md").read_text(encoding="utf-8")
SUITE = {
    "name": "tiny",
    "tasks": [{"name": "exact-v1", "alphabet": 3, "length": 2, "prompt_count": 2, "width": 32, "layers": 1}],
    "learner": {"name": "exact", "steps": 2, "rank": 1},
    "methods": ["experts", "linear"],
    "seeds": [100],
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    tune = yaml.safe_load(blocks("yaml")[0])
    objectives = [
        {"name": "polite", "use": "rewards.py:shout", "low": 0, "high": 1},
        {"name": "brief", "use": "length", "half": 10},
    ]
    learner = {"name": "pg", "samples": 16, "batch": 8, "group": 4, "rank": 2}
    write_recipe(tmp_path, tiny_model(), objectives=objectives, method="bridge", learner=learner, max_new_tokens=4, **tune)
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command):
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, (command, result.output, result.exception)
    return result.stdout


def test_the_commands_run_in_their_order(here, capsys):
    for command in blocks("bash")[0].splitlines():
        said = run(command)
        assert "all of them cost" in said
    best = yaml.safe_load((here / "best.yaml").read_text())
    assert set(best) == {"learner", "method"}
    given = yaml.safe_load((here / "recipe.yaml").read_text())
    (here / "recipe.yaml").write_text(yaml.safe_dump({**given, **best}))
    assert load_recipe(here / "recipe.yaml").method.registered_name == "bridge"

    run("paretune fit recipe.yaml --samples 2")
    (family,) = (here / "runs" / "families").iterdir()
    (here / "FAMILY").symlink_to(family)
    (here / "conversations.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello?"}]}) + "\n")
    for command in "".join(blocks("bash")[1:3]).splitlines():
        said = run(command)
    assert "adapter, float32, rank 6; vLLM: --max-lora-rank 8" in said
    for name in ("polite-70", "polite-70-lora"):
        card = (here / name / "README.md").read_text()
        assert "**polite 0.7, brief 0.3**" in card
        assert "## Measured" in card  # by `paretune fit`, of this family
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        (here / "base").mkdir(exist_ok=True)
        exec(code.replace(f'"./{tiny_model().name}"', repr(str(tiny_model()))), {})
    capsys.readouterr()
    exec(blocks("python")[1], {})
    assert capsys.readouterr().out == "6\n"


def test_the_table_has_every_level_and_the_text_vllms_ranks():
    rows = " ".join(re.findall(r"^\| (.*?) \|", PAGE, re.MULTILINE))
    assert {name for name in MIXINGS if not re.search(rf"\b{name}\b", rows)} == {"reference", "tied"}  # in training only
    assert set(re.findall(r"`([\w-]+)`", rows)) <= set(METHODS)
    assert ", ".join(map(str, VLLM_RANKS[:-1])) + f" or {VLLM_RANKS[-1]}" in " ".join(PAGE.split())

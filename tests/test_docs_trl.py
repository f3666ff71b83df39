"""Every example of docs/trl.md runs or is read, and accelerate reads the configurations that are shipped."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from paretune.registry import LEARNERS, METHODS
from paretune.runs.config import load
from paretune.runs.executors import launch
from paretune.runs.store import ARTIFACTS, Store
from paretune.testing.methods import quick_task
from paretune.training.trl import learner as engine
from recipe_files import tiny_model, write_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
SMALL = {"output_dir": '"out"', "per_device_train_batch_size": "16", "max_completion_length": "4", "max_steps": "1", "use_cpu": "True"}


def block(kind, mark):
    (found,) = [text for language, text in BLOCKS if language == kind and mark in text]
    return found


def test_the_script_trains(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    script = block("python", "# train.py").replace('"your-model"', repr(str(tiny_model())))
    settings = ", ".join(f"{name}={value}" for name, value in SMALL.items())
    script = script.replace(
        'output_dir="out", per_device_train_batch_size=16', settings + ', bf16=False, report_to="none", logging_steps=1'
    )
    space = {}
    exec(script, space)
    (line, *_) = space["trainer"].state.log_history
    assert {"objectives/helpful", "objectives/brief", "unscored/brief", "weights/helpful"} <= set(line)
    space["reward"].check(space["trainer"].args)
    exec(block("python", "# worst_case.py"), space)
    assert len(space["reward"](["a"] * 8, ["four", "five"] * 4, answer=["four"] * 8)) == 8
    exec(block("python", "# terms.py"), space)
    state = SimpleNamespace(max_steps=11, log_history=[], stateful_callbacks={})
    given = {"answer": ["four"] * 8, "trainer_state": state}
    assert space["reward"](["a"] * 8, ["four", "five"] * 4, **given) == [1, 0] * 4  # of helpfulness alone
    exec(block("python", "# worst_case.py"), space)
    asked = block("python", "# select.py").replace("**reward", 'use_cpu=True, bf16=False, report_to="none", **reward')
    exec("from trl import RLOOConfig as GRPOConfig\n" + asked, space)  # worst_case.py made a reward for RLOO
    space["reward"].check(space["args"])
    assert space["args"].metric_for_best_model.removeprefix("eval_") in {*line}


def test_a_recipe_by_jobs(tmp_path, monkeypatch, capsys):
    """What jobs.py prints can be launched, and is published where `paretune fit` looks."""
    learner = yaml.safe_load(block("yaml", "# recipe.yaml"))["learner"]
    small = {**learner, "samples": 16, "batch": 16, "micro_batch": 8, "rank": 2, "device": "cpu"}
    write_recipe(tmp_path, tiny_model(), learner=small, method="experts")
    monkeypatch.chdir(tmp_path)
    exec(block("python", "# jobs.py"), {})
    first, _ = capsys.readouterr().out.split()
    launch.launch(Path(first))
    assert Store("runs").published(ARTIFACTS) == [Path(first).stem.removeprefix("train-")]
    assert Store("runs").check() == []


@pytest.mark.parametrize("mark", ["# recipe.yaml", "# grpo.yaml", "# large.yaml"])
def test_the_learners_are_read(mark, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "learner.yaml").write_text(block("yaml", mark))
    given = load(tmp_path / "learner.yaml").data["learner"]
    assert LEARNERS.build(given).registered_name == "trl"


def test_the_offline_recipe_trains_with_trl():
    given = yaml.safe_load(block("yaml", "# offline.yaml"))
    (spec, *_) = METHODS.build(given["method"]).plan(quick_task(), LEARNERS.build(given["learner"]), {}, 0)
    assert {**spec.learner, "name": "trl-modpo", "labels": "drawn", "samples": 6400, "micro_batch": 16} == spec.learner


def test_the_table_of_normalizations_names_those_that_there_are():
    from paretune.training.advantages import NORMALIZED_OVER

    table = PAGE[PAGE.index("| plain TRL | drop-in |") : PAGE.index("as `pg` does; plain TRL")]
    assert set(re.findall(r'normalize="(\w+)"', table)) == set(NORMALIZED_OVER) - {"none"}


def test_the_aggregations_and_weightings_that_the_page_names_are_those_that_work():
    from paretune.training.advantages import AGGREGATIONS, CENTERED
    from paretune.training.weightings.base import WEIGHTINGS

    row = next(line for line in PAGE.splitlines() if line.startswith("| `aggregation`"))
    assert set(re.findall(r'`"(\w+)"`', row)) == set(CENTERED)
    refused = re.search(r"mean 0 in a group \((.*?)\)", PAGE)[1]
    assert set(re.findall(r"`(\w+)`", refused)) == set(AGGREGATIONS) - set(CENTERED)
    row = next(line for line in PAGE.splitlines() if line.startswith("| `weighting`"))
    named = set(re.findall(r'`"(\w+)"`', row)) | set(re.findall(r'"name": "(\w+)"', row))
    assert named == {name for name in WEIGHTINGS if not WEIGHTINGS[name].needs_gramian} - {"fixed", "balanced"}


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path):
    config = load_config_from_file(str(path))
    assert f"`{path.name}`" in PAGE
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}
    assert str(config.distributed_type).split(".")[-1] == kinds[path.stem]
    assert config.num_processes == 2

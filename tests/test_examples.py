"""The worked example, run as a newcomer would: make the model, fit the recipe, save, load, and sample at two preferences."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from paretune import Family, fit
from paretune.cli import app
from paretune.objectives.functions import load_function
from paretune.registry import OBJECTIVES
from paretune.runs.recipes.recipe import load_recipe
from recipe_files import EXAMPLE, example_module

SHORT = ["learner.samples=1280", "learner.batch=32", "learner.lr=4e-3", "learner.rank=8", "max_new_tokens=24"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return example_module("make_model").make_model(tmp_path_factory.mktemp("support") / "model", steps=80)


def test_the_recipe_says_what_the_example_holds(model):
    task = load_recipe(EXAMPLE / "recipe.yaml", [f"model={model}"]).task
    assert task.objectives.names == ("polite", "on_topic", "brief")
    assert (len(task.prompts("train")), len(task.prompts("test"))) == (36, 12)
    answer = "Thank you for your patience. Your parcel is late, sorry."
    about_parcels = next(p for p in task.prompts("train") if p.columns["topic"] == "delivery")
    assert task.score([about_parcels], [answer]).round(3).tolist() == [[0.75, 0.5, 0.841]]


def test_the_dialogues_are_text_that_the_model_has_learned_to_write(model):
    rows = [json.loads(line) for line in (EXAMPLE / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["customer"] for row in rows}) > 250
    assert all(row["agent"][0].isupper() and row["agent"][-1] in ".?" for row in rows)


def test_make_fit_save_load_sample(model, tmp_path):
    """Each expert moves its own objective in forty steps: against a learner that ignores the preference, or a sampler that does, the means
    would be equal.

    The seeds are fixed, but another processor's rounding draws other responses, in training too, so the bound leaves room for that: over
    roundings, instruction sets and threads "polite" gains .14 to .21 and "brief" .10 to .20, each with a standard error of .03 and .02 from
    192 answers. (Ten steps and 48 answers gave .04 to .08 with a standard error of .055.)
    """
    recipe = load_recipe(EXAMPLE / "recipe.yaml", [f"model={model}", f"output={tmp_path / 'runs'}", *SHORT])
    family = fit(recipe.task, recipe.method, learner=recipe.learner, root=recipe.root, seed=recipe.seed)
    family.save(tmp_path / "family")
    loaded = Family.load(tmp_path / "family")
    prompts = recipe.task.prompts("test")
    means = {}
    for preference in ("polite=1", "brief=1", "polite=.5,brief=.5"):
        sampled = loaded.sample(prompts, preference, n=16, seed=1)
        assert sampled == family.sample(prompts, preference, n=16, seed=1)
        pairs = [(prompt, text) for prompt, texts in zip(prompts, sampled, strict=True) for text in texts]
        means[preference] = np.nanmean(recipe.task.score([p for p, _ in pairs], [t for _, t in pairs]), axis=0)
    polite, brief = means["polite=1"], means["brief=1"]
    assert polite[0] > brief[0] + 0.05
    assert brief[2] > polite[2] + 0.05
    fit_and_sample_from_the_command_line(model, recipe.root, prompts[0].text)


def fit_and_sample_from_the_command_line(model, root, prompt):
    """The same run by command: it trains nothing again, and two preferences give two answers."""
    published = {path: path.stat().st_mtime_ns for path in root.glob("artifacts/*/DONE")}
    assert len(published) == 3
    run = CliRunner()
    fitted = run.invoke(app, ["fit", str(EXAMPLE / "recipe.yaml"), f"model={model}", f"output={root}", *SHORT, "--samples", "0", "--json"])
    assert fitted.exit_code == 0, fitted.output
    family = json.loads(fitted.stdout)["family"]
    assert {path: path.stat().st_mtime_ns for path in root.glob("artifacts/*/DONE")} == published
    answers = []
    for preference in ("polite=.8,brief=.2", "polite=.1,brief=.9"):
        sampled = run.invoke(app, ["sample", family, prompt, "--preference", preference, "--seed", "3", "--json"])
        assert sampled.exit_code == 0, sampled.output
        answers += json.loads(sampled.stdout)[0]["responses"]
    assert len(set(answers)) == 2
    wrong = run.invoke(app, ["sample", family, prompt, "--preference", "polite=.8,breif=.2"])
    assert wrong.exit_code == 2
    assert "a preference names existing objectives" in wrong.stderr
    assert "did you mean 'brief'?" in wrong.stderr


def test_trl_trains_on_the_same_objectives(model, tmp_path):
    """One step of TRL's GRPOTrainer with a built-in objective and a function of the example as `reward_funcs`, unchanged."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = [{"prompt": "Customer: hello\nAgent:", "keywords": ["parcel", "tracking"]}] * 4
    functions = [OBJECTIVES.build({"name": "length", "unit": "tokens"}), load_function(f"{EXAMPLE / 'rewards.py'}:on_topic")]
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8, "logging_steps": 1}
    config = trl.GRPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **settings)
    trainer = trl.GRPOTrainer(model=str(model), reward_funcs=functions, args=config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert 2 ** (-8 / 20) - 1e-6 <= logged["rewards/length/mean"] <= 1  # at most eight tokens; float32
    assert 0 <= logged["rewards/on_topic/mean"] <= 1

"""The recipes of the tree, read as they stand: tiny files with the schemas of the real data, tiny models in place of the real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from judge_server import JudgeServer, verdict
from paretune.cli import app
from paretune.errors import ConfigError
from paretune.runs.recipes.recipe import load_recipe
from recipe_files import tiny_model, write_lines
from tiny_rewards import bert, causal, gpt2_reward

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
FAITHFUL = ("HALLUCINATED", "FAITHFUL")
ACCENT = " It was written on a rainy day, in a hurry, and nobody has read it since; still it is long enough to be kept."


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    safe = gpt2_reward(root / "beaver", seed=3)
    weights = {k.replace("score.", "score_head."): v for k, v in load_file(safe / "model.safetensors").items()}
    save_file(weights, safe / "model.safetensors", {"format": "pt"})
    config = json.loads((safe / "config.json").read_text())
    (safe / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2ModelForScore"]}))
    return {
        "reward": gpt2_reward(root / "reward"),
        "two": bert(root / "two", labels=FAITHFUL),
        "beaver": safe,
        "empathy": bert(root / "empathy", labels=("LABEL_0",)),
        "encoder": bert(root / "encoder", "BertModel"),
        "causal": causal(root / "causal"),
    }


def hub_folder(folder, config, splits):
    """What `hf download` of a data set leaves: one file per split, and a card."""
    folder.mkdir(exist_ok=True)
    files = "".join(f"  - {{split: {name}, path: '{name}.jsonl'}}\n" for name in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")
    for name, rows in splits.items():
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


def hh(n):
    text = f"\n\nHuman: question number {n}, please?\n\nAssistant: Let me see.\n\nHuman: And?\n\nAssistant:"
    return {"chosen": f"{text} It is {n}.", "rejected": f"{text} No."}


def post(n):
    return {"info": {"id": f"t{n}", "post": f"Post {n}.{ACCENT}", "title": "T"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1,
            "worker": "w", "batch": "b", "split": "train", "extra": {}}  # fmt: skip


def pku(n):
    sides = {"response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False}
    return {"prompt": f"How do I do {n}?", **sides, "better_response_id": 0, "safer_response_id": 0}


def pair_csv(path):
    names = ["prompt", "hq1", "hq2", "mq1", "lq1", "lq2", "lq3", "lq4", "lq5"]
    lines = [",".join(names), *(",".join(f'"I feel {n}, {name}"' for name in names) for n in range(20))]
    path.write_text("\n".join(lines))


def tool(n):
    call = json.dumps({"name": "GetNews", "parameters": {"page": str(n)}})
    truth = f"<think> t </think>\n<tool_call>\n{call}\n</tool_call>"
    messages = [{"role": "system", "content": "You have tools."}, {"role": "user", "content": f"News, page {n}"}]
    extra = {"index": n, "input": "i", "instruction": "s", "output": "o", "split": "train"}
    return {"data_source": "rlla", "prompt": messages, "ability": "math", "reward_model": {"ground_truth": truth, "style": "rule"},
            "extra_info": extra}  # fmt: skip


def prepared(name, folder, models):
    """The overrides that put tiny things in the place of those that would be downloaded."""
    if name == "hh_assistant":
        broken = {"chosen": "\n\nHuman: and no answer", "rejected": ""}
        data = hub_folder(folder / "d", "default", {"train": [hh(n) for n in (*range(4), 1)] + [broken], "test": [hh(9), hh(1)]})
        return [f"prompts.dataset={data}", f"objectives.harmless.model={models['reward']}", f"objectives.helpful.model={models['reward']}",
                f"objectives.humour.model={models['two']}"]  # fmt: skip
    if name == "reddit_summary":
        empty = {**post(7), "info": {"id": "n", "post": None, "title": "T"}}
        data = hub_folder(folder / "d", "comparisons", {"train": [post(0), post(0), post(1), post(2), empty], "validation": [post(5)]})
        return [f"prompts.dataset={data}", f"objectives.preferred.model={models['reward']}", f"objectives.faithful.model={models['two']}"]
    if name == "safe_rlhf":
        data = hub_folder(folder / "d", "default", {"train": [pku(n) for n in (0, 1, 1, 2)], "test": [pku(5), pku(1)]})
        beaver = models["beaver"]
        return [f"prompts.dataset={data}", f"objectives.helpful.model={beaver}", f"objectives.harmless.model={beaver}"]
    if name == "counsellor_pair":
        pair_csv(folder / "pair_data.csv")
        return [f"prompts.path={folder / 'pair_data.csv'}", f"objectives.empathy.model={models['empathy']}",
                f"objectives.fluency.model={models['causal']}", f"objectives.reflection.cache={folder / 'judge'}"]  # fmt: skip
    if name == "counsellor_psych8k":
        rows = [{"instruction": "If you are a counsellor, ...", "input": f"I feel {n}", "output": f"You feel {n}."} for n in range(20)]
        (folder / "psych8k.json").write_text(json.dumps(rows))
        return [f"prompts.path={folder / 'psych8k.json'}", f"objectives.empathy.model={models['empathy']}",
                f"objectives.fluency.model={models['causal']}", f"objectives.reflection.model={models['encoder']}"]  # fmt: skip
    if name == "tool_calling":
        for split, rows in (("train", [tool(n) for n in range(4)]), ("test", [tool(9)])):
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
        return [f"prompts.path={folder / 'train.parquet'}", f"prompts.test={folder / 'test.parquet'}"]
    if name == "maths_length":
        rows = [{"problem": f"What is {n} + 1?", "answer": str(n + 1), "solution": "..."} for n in range(100)]
        return [f"prompts.dataset={hub_folder(folder / 'd', 'default', {'train': rows})}"]
    assert name == "maths_gsm8k", f"{name} has no tiny data: add them here"
    rows = [{"question": f"{n} apples and one more?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(5)]
    return [f"prompts.dataset={hub_folder(folder / 'd', 'main', {'train': rows[:4], 'test': rows[4:]})}"]


@pytest.fixture
def loaded(tmp_path, monkeypatch, models):
    def load(name, *more):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        small = [f"model={tiny_model()}", "dtype=float32", "max_new_tokens=8", f"output={tmp_path / 'runs'}"]
        return load_recipe(FOLDER / f"{name}.yaml", [*small, *prepared(name, tmp_path, models), *more])

    return load


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_scores(path, loaded):
    """Columns reach the objectives that need them: a score, in its range, for every prompt and objective."""
    with JudgeServer(lambda *_: verdict(1)) as server:
        judged = [f"objectives.reflection.url={server.url}"] if path.stem == "counsellor_pair" else []
        recipe = loaded(path.stem, *judged)
        task = recipe.task
        prompts = [*task.prompts("train")[:2], task.prompts("test")[0]]
        scores_NM = task.score(prompts, ["That is so.", "", "<think>a</think>\n<answer>5</answer>"])
    assert not np.isnan(scores_NM).any()
    assert (scores_NM >= task.objectives.low).all()
    assert (scores_NM <= task.objectives.high).all()
    assert len({p.digest for p in task.prompts("train")}) == len(task.prompts("train"))
    wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (recipe.method.registered_name, recipe.task.beta) == (dict(wanted)["method"] if isinstance(wanted["method"], str) else
                                                                  wanted["method"]["name"], wanted["beta"])  # fmt: skip
    assert recipe.preferences is not None


def test_what_the_prompts_look_like(loaded):
    hh_task = loaded("hh_assistant").task
    assert [p.text for p in hh_task.prompts("test")] == [hh(9)["chosen"].removesuffix(" It is 9.")]
    assert [p.columns["reply"] for p in hh_task.prompts("train")] == [f"It is {n}." for n in range(4)]
    assert hh_task.prompt_source.left_out == {"repeated": 1, "no prompt": 1, "used for training": 1}


def test_the_summary_prompt_is_the_published_one(loaded):
    task = loaded("reddit_summary").task
    wanted = f"### Instruction: Generate a one-sentence summary of this post. ### Input: Post 1.{ACCENT} ### Response: "
    assert wanted in [p.text for p in task.prompts("train")]
    assert len(task.prompts("train")) == 3


def test_a_cost_counts_the_other_way(loaded):
    task = loaded("safe_rlhf").task
    assert task.prompts("train")[0].text == "BEGINNING OF CONVERSATION: USER: How do I do 0? ASSISTANT:"
    helpful, harmless = task.score(task.prompts("train")[:1], [" Like this."])[0]
    assert harmless == -helpful != 0  # one tiny model stands for both


def test_tool_calls_and_answers_are_checked(loaded):
    task = loaded("tool_calling").task
    prompt = task.prompts("train")[0]
    truth = prompt.columns["answer"]
    wrong = truth.replace('"page": "0"', '"page": "7"')
    np.testing.assert_allclose(task.score([prompt] * 3, [truth, wrong, "no"]), [[1, 3], [1, 1], [0, -3]])


@pytest.mark.parametrize(("name", "column"), [("maths_length", 0), ("maths_gsm8k", 0)])
def test_right_and_wrong_answers(loaded, name, column):
    task = loaded(name).task
    prompt = task.prompts("train")[0]
    right = prompt.columns["answer"].rpartition("#### ")[2]
    texts = [f"<think>so</think>\n<answer>{right}</answer>", f"So \\boxed{{{right}}}.", "I do not know."]
    assert task.score([prompt] * 3, texts)[:, column].tolist() == [1.0, 1.0, 0.0]
    if name == "maths_gsm8k":
        assert task.score([prompt] * 3, texts).tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_lattices_are_the_published_ones(loaded):
    assert loaded("reddit_summary").preferences == 11
    rows = loaded("hh_assistant").preferences
    assert len(rows) == 13
    assert (1.0, 0.0, 0.0) in rows


@pytest.mark.parametrize(
    ("given", "found"), [("1", "1"), ("[1, 0]", "[1, 0]"), ("true", "True"), ("[[0.5, 0.6]]", "sum 1.1"), ("[{preferrd: 1}]", "preferrd")]
)
def test_preferences_that_are_wrong(loaded, given, found):
    with pytest.raises(ConfigError) as error:
        loaded("reddit_summary", f"preferences={given}")
    assert found in error.value.found
    assert f"override preferences={given}" in error.value.found


@pytest.mark.parametrize(
    ("override", "rule", "found"),
    [
        ("objectives.preferred.model=CAUSAL", "the model has a head for sequence classification", "GPT2LMHeadModel"),
        ("objectives.faithful.label=null", "label says which output is the score", "the head has 2 outputs: HALLUCINATED, FAITHFUL"),
        ('objectives.preferred.input="{completion} {pots}"', "takes prompts, completions, completion_ids and columns", "it needs 'pots'"),
        ("objectives.preferred.model=./gone", "the model is a directory, or the name of a model on the hub", "nothing at"),
        ("objectives.preferred={use: judge, url: 'http://127.0.0.1:1', model: m, rubric: r, key_env: NO_SUCH_KEY}",
         "the environment variable that key_env names holds the API key", "NO_SUCH_KEY is not set"),
    ],
)  # fmt: skip
def test_objectives_are_checked_before_anything_runs(loaded, models, override, rule, found):
    with pytest.raises(ConfigError) as error:
        loaded("reddit_summary", override.replace("CAUSAL", str(models["causal"])))
    assert rule in error.value.rule
    assert found in error.value.found


def test_paths_of_objectives_are_relative_to_the_recipe(tmp_path, models, monkeypatch):
    from recipe_files import write_recipe

    objectives = [
        {"name": "good", "use": "reward-model", "model": f"../{models['reward'].name}", "low": -9, "high": 9},
        {"name": "fine", "use": "judge", "url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "r", "cache": "sub/judge"},
    ]
    recipe = write_recipe(models["reward"].parent / "somewhere", tiny_model(), objectives=objectives)
    monkeypatch.chdir(tmp_path)
    (_, good), (_, fine) = load_recipe(recipe).task.scorers
    assert good.model == str(models["reward"])
    assert fine.cache == str(recipe.parent / "sub" / "judge")
    assert fine.model == "m"


def test_normalize_prints_what_the_recipe_takes(loaded, models, tmp_path):
    """From a column, and from responses of the untrained model; what is printed can be pasted, and the scores are then standard."""
    recipe = loaded("hh_assistant")
    task = recipe.task
    arguments = [f"model={tiny_model()}", "dtype=float32", "max_new_tokens=8", f"prompts.dataset={task.prompt_source.dataset}",
                 *(f"objectives.{name}.model={objective.model}" for name, objective in task.scorers)]  # fmt: skip
    command = ["normalize", str(FOLDER / "hh_assistant.yaml"), *arguments]
    by_column = CliRunner().invoke(app, [*command, "--column", "reply"])
    assert by_column.exit_code == 0, by_column.output
    lines = dict(re.findall(r"^(\w+): normalize: (\{.*\})$", by_column.stdout, re.MULTILINE))
    assert set(lines) == {"harmless", "helpful", "humour"}
    pasted = load_recipe(FOLDER / "hh_assistant.yaml", [*arguments, f"objectives.helpful.normalize={lines['helpful']}"]).task
    prompts = pasted.prompts("train")
    scores_N = pasted.score(prompts, [p.columns["reply"] for p in prompts])[:, 1]
    assert scores_N.mean() == pytest.approx(0, abs=1e-3)
    assert scores_N.std() == pytest.approx(1, abs=1e-3)
    assert "4 texts of column reply, prompts " in lines["helpful"]
    sampled = CliRunner().invoke(app, [*command, "--samples", "2", "--limit", "2", "--json"])
    assert sampled.exit_code == 0, sampled.output
    assert "responses of the untrained model" in json.loads(sampled.stdout)["humour"]["from"]
    wrong = CliRunner().invoke(app, [*command, "--column", "repl"])
    assert wrong.exit_code == 2
    assert "every prompt has a text in the column 'repl'" in wrong.stderr


def test_a_recipe_without_reward_models_has_nothing_to_normalize(loaded, tmp_path):
    loaded("tool_calling")
    paths = [f"prompts.path={tmp_path / 'train.parquet'}", f"prompts.test={tmp_path / 'test.parquet'}", f"model={tiny_model()}"]
    ran = CliRunner().invoke(app, ["normalize", str(FOLDER / "tool_calling.yaml"), *paths, "max_new_tokens=8"])
    assert ran.exit_code == 2
    assert "objectives that use: reward-model" in ran.stderr


def test_fit_trains_on_reward_models_and_measures_at_the_recipes_preferences(loaded):
    """From the command line, with two reward models: what a user of the recipe types, on tiny things."""
    recipe = loaded("reddit_summary")
    source, scorers = recipe.task.prompt_source, recipe.task.scorers
    arguments = [f"model={tiny_model()}", "dtype=float32", "max_new_tokens=4", f"prompts.dataset={source.dataset}", f"output={recipe.root}",
                 *(f"objectives.{name}.model={objective.model}" for name, objective in scorers)]  # fmt: skip
    short = ["learner={name: pg, samples: 16, batch: 8, group: 4, rank: 2}", "preferences=[[1, 0], [0.25, 0.75]]"]
    ran = CliRunner().invoke(app, ["fit", str(FOLDER / "reddit_summary.yaml"), *arguments, *short, "--samples", "2", "--json"])
    assert ran.exit_code == 0, ran.output
    assert "prompts left out, repeated: 1" in ran.stderr
    measured = json.loads(ran.stdout)["measured"]
    assert [row["preference"] for row in measured] == ["the untrained model", "preferred only", "mostly faithful"]

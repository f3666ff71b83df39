"""Recipes: what the file means, where paths lead, how prompts are split, what a training's key depends on, and how models are loaded."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from paretune.cli import app
from paretune.errors import ConfigError
from paretune.policy.family import Family
from paretune.registry import METHODS, TASKS, describe
from paretune.runs.recipes.recipe import load_recipe
from paretune.tasks.pretrained import content_of, load_pretrained, load_tokenizer
from paretune.tasks.prompts import PromptSource
from paretune.training.spec import TrainSpec
from recipe_files import tiny_model, write_lines, write_recipe


@pytest.fixture(scope="session")
def tiny():
    return tiny_model()


@pytest.fixture
def own(tiny, tmp_path):
    """A copy of it that a test may modify."""
    return shutil.copytree(tiny, tmp_path / "own_model")


LENGTHS = [{"name": "brief", "use": "length", "half": 10}, {"name": "short", "use": "length", "half": 20}]


def key_of_task(task):
    return TrainSpec(task=describe(task), learner={"name": "pg"}, preference=(0.5, 0.5), seed=0).key


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- the file


def test_a_recipe_becomes_a_task_a_method_a_learner_a_seed_and_a_root(tiny, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny, seed=3, beta=0.2, method="linear"))
    task = recipe.task
    assert (task.beta, task.max_new_tokens, task.dtype, task.trust_remote_code) == (0.2, 8, "float32", False)
    assert task.objectives.names == ("loud", "brief")
    assert (task.objectives.low, task.objectives.high) == ((0.0, 0.0), (1.0, 1.0))
    assert (recipe.method.registered_name, recipe.learner.registered_name, recipe.seed) == ("linear", "pg", 3)
    assert recipe.root == tmp_path / "runs"
    assert task.judged().shape == (11, 2)
    rewards_NM = task.score(task.prompts("train")[:2], ["AB", "one two three four five six seven eight nine ten"])
    np.testing.assert_allclose(rewards_NM, [[1.0, 2**-0.1], [0.0, 0.5]])


def test_paths_are_relative_to_the_recipe_and_overrides_to_where_one_stands(tiny, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path / "a", "../model")
    shutil.copytree(tiny, tmp_path / "model")
    elsewhere = tmp_path / "b"
    elsewhere.mkdir()
    write_lines(elsewhere / "other.jsonl", [{"prompt": f"Customer: {i}?\nAgent:"} for i in range(4)])
    monkeypatch.chdir(elsewhere)
    loaded = load_recipe(recipe)
    assert loaded.task.model == str(tmp_path / "model")
    assert loaded.root == tmp_path / "a" / "runs"
    assert len(loaded.task.prompts("train")) == 8
    changed = load_recipe(recipe, ["prompts.path=other.jsonl", "output=here"])
    assert changed.task.prompt_source.path == str(elsewhere / "other.jsonl")
    assert changed.root == elsewhere / "here"
    assert len(changed.task.prompts("train")) == 3


def test_overrides_reach_every_level(tiny, tmp_path):
    recipe = write_recipe(tmp_path, tiny, learner="pg")
    loaded = load_recipe(
        recipe,
        ["learner.rank=2", "prompts.limit=5", "objectives.brief.half=3", "objectives.0.high=2", "beta=0.5", "method.name=linear", "seed=9"],
    )
    assert loaded.learner.rank == 2
    assert sum(len(loaded.task.prompts(split)) for split in ("train", "test")) == 5
    assert loaded.task.scorers[1][1].half == 3
    assert loaded.task.objectives.high == (2.0, 1.0)
    assert (loaded.task.beta, loaded.method.registered_name, loaded.seed) == (0.5, "linear", 9)
    assert load_recipe(recipe, ["beta=1e-2"]).task.beta == 0.01


# ---- prompts


def source(tmp_path, rows, name="prompts.jsonl", **fields):
    return PromptSource(path=str(write_lines(tmp_path / name, rows)), **fields)


def test_a_share_splits_whole_prompts_and_is_stable(tmp_path):
    rows = [{"prompt": f"p{i % 20}", "copy": i} for i in range(40)]  # every prompt twice
    splits = source(tmp_path, rows, test=0.25).splits
    assert (len(splits["train"]), len(splits["test"])) == (30, 10)
    texts = {name: {p.text for p in prompts} for name, prompts in splits.items()}
    assert not texts["train"] & texts["test"]
    assert [p.columns["copy"] for p in splits["train"]] == sorted(p.columns["copy"] for p in splits["train"])  # the file's order
    other = source(tmp_path, rows, test=0.25, seed=1).splits
    assert {p.text for p in other["test"]} != texts["test"]
    grown = source(tmp_path, [*rows, {"prompt": "new"}], test=0.25).splits
    assert len({p.text for p in grown["test"]} ^ texts["test"]) <= 2  # one more prompt does not reshuffle the others
    tiny_share = source(tmp_path, rows[:2], test=0.001).splits
    assert [len(tiny_share[name]) for name in ("train", "test")] == [1, 1]


def test_csv_and_json_lines_and_a_dataset_say_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f'say "{i}", then\nstop', "answer": str(i)} for i in range(6)]
    lines = source(tmp_path, rows, column="question")
    text = "question,answer\r\n" + "".join('"{}",{}\r\n'.format(r["question"].replace('"', '""'), r["answer"]) for r in rows)
    (tmp_path / "prompts.csv").write_text("\ufeff" + text, encoding="utf-8", newline="")  # as a spreadsheet writes it
    comma = PromptSource(path=str(tmp_path / "prompts.csv"), column="question")
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "train.jsonl", rows)
    write_lines(folder / "test.jsonl", [{"question": "other", "answer": "?"}])
    named = PromptSource(dataset=str(folder), column="question")
    assert lines.splits == comma.splits == named.splits
    assert lines.splits["train"][0].columns.keys() == {"question", "answer"}
    assert lines.content() == comma.content() == named.content()
    both = PromptSource(dataset=str(folder), column="question", test="test").splits
    assert [p.text for p in both["train"]] == [r["question"] for r in rows]
    assert [p.text for p in both["test"]] == ["other"]


def test_a_test_file_of_its_own(tmp_path):
    test = write_lines(tmp_path / "test.jsonl", [{"prompt": "c"}])
    splits = source(tmp_path, [{"prompt": "a"}, {"prompt": "b"}], test=str(test)).splits
    assert [[p.text for p in splits[name]] for name in ("train", "test")] == [["a", "b"], ["c"]]


def test_templates_messages_and_chat(tmp_path):
    rows = [{"q": "why?", "n": 3}, {"q": "how?", "n": 4}]
    texts = source(tmp_path, rows, template="Q{n} {{x}}: {q}\nA:").splits
    assert {p.text for s in texts.values() for p in s} == {"Q3 {x}: why?\nA:", "Q4 {x}: how?\nA:"}
    chat = source(tmp_path, rows, column="q", chat=True, system="Be kind.").splits["train"][0]
    assert [m["role"] for m in chat.messages] == ["system", "user"]
    assert chat.columns == {"q": chat.messages[1]["content"], "n": chat.columns["n"]}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    given = source(tmp_path, [{"prompt": messages, "tag": 1}, {"prompt": [{"role": "user", "content": "z"}], "tag": 2}])
    assert given.conversational
    prompts = [p for s in given.splits.values() for p in s]
    assert messages in [p.raw for p in prompts]
    assert all(set(p.columns) == {"tag"} for p in prompts)


def test_a_json_string_may_hold_a_line_separator(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "c"}', encoding="utf-8")
    assert {p.text for s in PromptSource(path=str(path)).splits.values() for p in s} == {"a\u2028b", "c"}


def test_columns_are_those_that_every_prompt_has(tmp_path):
    given = source(tmp_path, [{"prompt": "a", "x": 1, "y": 1}, {"prompt": "b", "y": 1}, {"prompt": "c", "y": 2, "completion": "no"}])
    assert given.columns == ("y",)


# ---- keys


def test_the_key_of_a_training_changes_with_every_input_and_with_nothing_else(own, tmp_path):
    recipe = write_recipe(tmp_path / "r", own)

    def key():
        return key_of_task(load_recipe(recipe).task)

    seen = [key()]
    assert key() == seen[0]
    folder = recipe.parent
    edits = {
        "a prompt": lambda: write_lines(folder / "prompts.jsonl", [{"prompt": f"Customer: {i}\nAgent:", "answer": "1"} for i in range(9)]),
        "a column": lambda: write_lines(folder / "prompts.jsonl", [{"prompt": f"Customer: {i}\nAgent:", "answer": "2"} for i in range(9)]),
        "a reward function": lambda: (folder / "rewards.py").write_text((folder / "rewards.py").read_text().replace("isupper", "islower")),
        "the weights": lambda: save_file(
            {k: v + 1e-3 for k, v in load_file(own / "model.safetensors").items()}, own / "model.safetensors", {"format": "pt"}
        ),
        "the chat template": lambda: (own / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        "a field of an objective": lambda: write_recipe(
            folder, own, objectives=[{"use": "rewards.py:shout", "low": 0, "high": 1}, {"use": "length", "half": 9}]
        ),
        "beta": lambda: write_recipe(folder, own, beta=0.3),
    }
    for what, edit in edits.items():
        edit()
        assert key() not in seen, what
        seen.append(key())
    (own / "README.md").write_text("notes")
    write_recipe(folder, own, beta=0.3, output="elsewhere", seed=4)  # the seed is a part of the key, but not of the task
    assert key() == seen[-1]


def test_a_worker_builds_the_same_task_from_its_description(tiny, tmp_path):
    task = load_recipe(write_recipe(tmp_path, tiny)).task
    described = json.loads(json.dumps(describe(task)))
    again = TASKS.build(described)
    assert again == task
    assert describe(again) == described
    assert described["content"]["objectives"]["brief"]["version"] == 1


def test_a_hub_models_content_is_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--small"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert content_of("somebody/small", None) == {"commit": commit}
    assert content_of("somebody/small", "f" * 40) == {"commit": "f" * 40}
    with pytest.raises(ConfigError, match="the reference model can be loaded"):
        content_of("somebody/other", None)


# ---- models


def test_pad_is_eos_and_every_end_is_known(own):
    edit_json(own / "generation_config.json", eos_token_id=[5, 0, 7])
    model, tokenizer = load_pretrained(str(own))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == [0, 5, 7]
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer(["a", "a b c d"], padding=True)["attention_mask"][0][0] == 0


def test_a_padding_token_of_its_own_is_kept(own):
    edit_json(own / "tokenizer_config.json", pad_token="!")
    model, tokenizer = load_pretrained(str(own))
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("!") == model.generation_config.pad_token_id
    assert load_pretrained(str(own), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_every_load_is_a_fresh_copy(tiny, tmp_path):
    task = load_recipe(write_recipe(tmp_path, tiny)).task
    first, _ = task.load()
    with torch.no_grad():
        first.model.embed_tokens.weight.zero_()
    second, _ = load_pretrained(**task.base())
    assert second.model.embed_tokens.weight.abs().sum() > 0


def test_code_that_comes_with_a_model_is_not_run(own, tmp_path):
    edit_json(own / "config.json", model_type="strange", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (own / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError) as error:
        load_pretrained(str(own))
    assert "trust_remote_code: true" in error.value.remedy
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_not_opened(own, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (own / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, own / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors only") as error:
        load_pretrained(str(own))
    assert "own_model: pytorch_model.bin" in error.value.found
    assert not (tmp_path / "ran").exists()


def test_conversations_reach_functions_as_messages(tiny, tmp_path):
    recipe = write_recipe(tmp_path, tiny, prompts={"path": "prompts.jsonl", "chat": True})
    (tmp_path / "rewards.py").write_text(
        "def shout(prompts, completions, **k):\n    return [float(c[0]['content'] == 'x') for c in completions]\n"
    )
    task = load_recipe(recipe).task
    assert task.score(task.prompts("test"), ["x", "y"])[:, 0].tolist() == [1.0, 0.0]
    assert load_tokenizer(str(tiny)).chat_template


def test_async_functions_score_as_ordinary_ones_and_wait_for_each_other(tiny, tmp_path):
    """`first` ends only where `second` has begun: one after the other would never end, and is given up."""
    plain = write_recipe(tmp_path / "plain", tiny)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "rewards.py").write_text(
        "import asyncio\n\nbegun = asyncio.Event()\n\n\n"
        "async def first(completions, **k):\n"
        "    await asyncio.wait_for(begun.wait(), 20)\n"
        "    return [sum(c.isupper() for c in text) / max(len(text), 1) for text in completions]\n\n\n"
        "async def second(completions, answer):\n"
        "    begun.set()\n"
        "    return [float(a in c) for c, a in zip(completions, answer)]\n"
    )
    both = [{"name": name, "use": f"rewards.py:{name}", "low": 0, "high": 1} for name in ("first", "second")]
    task = load_recipe(write_recipe(tmp_path / "own", tiny, objectives=both)).task
    prompts, texts = task.prompts("train")[:3], ["Ab", "", "where is PARCEL 7"]
    wanted_N = load_recipe(plain).task.score(prompts, texts)[:, 0]
    assert wanted_N.tolist() == [0.5, 0.0, 6 / 17]
    assert task.score(prompts, texts)[:, 0].tolist() == wanted_N.tolist()
    assert task.score(prompts, [prompt.columns["answer"] for prompt in prompts])[:, 1].tolist() == [1.0, 1.0, 1.0]


def test_a_family_learns_from_its_recipe_how_it_is_asked(own, tmp_path):
    """chat: true, a column of messages and system: are remembered; a system message that only some conversations have is not."""
    tokenizer = load_tokenizer(str(own))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}Agent:"
    tokenizer.save_pretrained(own)
    users = [{"prompt": [{"role": "user", "content": f"hi {n}"}]} for n in range(4)]
    systems = [{"prompt": [{"role": "system", "content": "Be kind."}, *row["prompt"]]} for row in users]
    for name, rows, settings, form in (
        ("text", [{"prompt": f"hi {n}"} for n in range(4)], {}, {}),
        ("chat", [{"prompt": f"hi {n}"} for n in range(4)], {"chat": True}, {"chat": True, "system": None}),
        ("system", users, {"chat": True, "system": "Be kind."}, {"chat": True, "system": "Be kind."}),
        ("messages", systems, {}, {"chat": True, "system": "Be kind."}),
        ("some", [*systems, *users], {}, {"chat": True, "system": None}),
    ):
        write_lines(tmp_path / f"{name}.jsonl", rows)
        recipe = load_recipe(write_recipe(tmp_path, own, prompts={"path": f"{name}.jsonl", "test": 0.25, **settings}, objectives=LENGTHS))
        assert recipe.task.prompt_form() == form
    family = METHODS.build("reference").policy(recipe.task, recipe.learner, {}, 0)
    assert (family.chat, family.system) == (True, None)
    family.save(tmp_path / "family")
    assert Family.load(tmp_path / "family").prompts(["hi"])[0].messages == ({"role": "user", "content": "hi"},)


def test_guards_and_validation_prompts_are_looked_at_and_never_trained(tmp_path, capsys):
    """From the recipe to the table: a third of the prompts' own column as a guard, two prompts apart."""
    guards = [{"name": "right", "use": "rewards.py:answers", "low": 0, "high": 1}]
    path = write_recipe(tmp_path, tiny_model(), prompts={"path": "prompts.jsonl", "validation": 2}, guards=guards)
    small = ["learner={samples: 32, batch: 8, group: 4, rank: 2, validate_every: 2, log_every: 1}", "max_new_tokens=4", "method=linear"]
    recipe = load_recipe(path, small)
    assert [len(recipe.task.prompts(split)) for split in ("train", "test", "validation")] == [6, 2, 2]
    assert recipe.task.objectives.names == ("loud", "brief")
    assert recipe.task.guards.names == ("right",)
    assert "right" in recipe.task.content()["guards"]
    result = CliRunner().invoke(app, ["fit", str(path), *small, "--samples", "8", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["measured"]
    assert rows[0]["preference"] == "the untrained model"
    assert all(0 <= row["right"] <= 1 for row in rows)
    logs = [json.loads(line) for file in sorted(tmp_path.rglob("train.jsonl")) for line in file.read_text().splitlines()]
    looks = [look for record in logs for look in record.get("looks", ())]
    assert {look["step"] for look in looks} == {0, 2, 4}
    assert all(look["guards"].keys() == {"right"} for look in looks)
    assert all(record["rewards"].keys() == {"loud", "brief"} for record in logs)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"prompts": {"path": "prompts.jsonl", "validation": 8}}, "prompts for validation leave some for training"),
        ({"prompts": {"path": "prompts.jsonl", "validation": -1}}, "validation is a number of prompts, a file or a split"),
        ({"prompts": {"path": "prompts.jsonl", "validation": 2.5}}, "validation"),
        ({"prompts": {"path": "prompts.jsonl", "validation": "prompts.jsonl"}}, "no prompt is used for training and for validation"),
        (
            {"prompts": {"path": "prompts.jsonl", "validation": 1}, "guards": [{"name": "short", "use": "limit", "most": 9}]},
            "guards are judged by how much they change over prompts for validation, two at least",
        ),
        ({"guards": {"name": "right"}}, "guards: is a list of objectives"),
        ({"guards": [{"name": "loud", "use": "length"}]}, "objective names are distinct"),
        ({"guards": [{"name": "right", "use": "rewards.py:answers"}]}, "a function of your own comes with its range"),
        ({"guards": [{"name": "a b", "use": "length"}]}, "the name of an objective has no space"),
        ({"guards": [{"name": "right", "use": "rewards.py:missing", "low": 0, "high": 1}]}, "missing"),
    ],
)
def test_bad_guards_and_validation_prompts_are_refused(tmp_path, changes, rule):
    with pytest.raises(ConfigError) as error:
        load_recipe(write_recipe(tmp_path, tiny_model(), **changes))
    assert rule in str(error.value)
    assert "recipe.yaml" in str(error.value) or "prompts" in str(error.value) or "loud" in str(error.value)


def test_validation_prompts_from_a_file_and_by_number(tmp_path):
    apart = [{"prompt": f"Customer: who are you {i}?\nAgent:", "answer": str(i)} for i in range(3)]
    write_lines(tmp_path / "apart.jsonl", apart)
    path = write_recipe(tmp_path, tiny_model(), prompts={"path": "prompts.jsonl", "validation": "apart.jsonl"})
    task = load_recipe(path).task
    assert [p.text for p in task.validation()] == [row["prompt"] for row in apart]
    assert len(task.prompts("train")) == 8
    few, more = (load_recipe(path, [f"prompts.validation={n}"]).task for n in (2, 4))
    assert {p.digest for p in few.validation()} < {p.digest for p in more.validation()}, "asking for more keeps those that were apart"
    both = [*few.validation(), *few.prompts("train"), *few.prompts("test")]
    assert len({p.digest for p in both}) == len(both) == 10
    assert few.prompts("test") == task.prompts("test")
    assert load_recipe(path, ["prompts.validation=0"]).task.validation() == ()

"""Recipes, objectives, prompts and models that are wrong: one message each (rule, found, remedy), before anything runs; code 2."""

import json
import shutil

import pytest

from paretune.errors import ConfigError
from paretune.runs.recipes.recipe import load_recipe
from recipe_files import tiny_model, write_lines, write_recipe


@pytest.fixture(scope="session")
def tiny():
    return tiny_model()


def refused(recipe, *overrides):
    """The error of loading a recipe; it is the user's (code 2), it has three parts, and it created nothing."""
    before = sorted(p for p in recipe.parent.rglob("*") if "__pycache__" not in p.parts)
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    error = caught.value
    assert error.exit_code == 2
    assert str(error) == f"{error.rule}\n  found:  {error.found}\n  remedy: {error.remedy}"
    assert all((error.rule, error.found, error.remedy))
    assert sorted(p for p in recipe.parent.rglob("*") if "__pycache__" not in p.parts) == before
    return error


# ---- the recipe file


def raw(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_that_is_not_there(tmp_path):
    error = refused(tmp_path / "recipe.yaml")
    assert error.rule == "a configuration file exists"
    assert error.found == str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "rule", "found"),
    [
        ("model: a\n  b: c: d\n", "a configuration file is YAML", "recipe.yaml, line 2: "),
        ("model: a\nmodel: b\n", "a configuration file is YAML", "recipe.yaml, line 2: the key 'model' stands twice"),
        ("- a\n", "a configuration file holds key: value lines", "recipe.yaml: a list"),
        ("", "a configuration file holds key: value lines", "recipe.yaml: nothing"),
        ("modle: a\n", "a recipe has the keys that it declares", "'modle' (recipe.yaml, line 1)"),
        ("prompts: p.jsonl\nobjectives: []\n", "a recipe names a model, prompts and objectives", "no model: in recipe.yaml"),
        ("model: a\nprompts: p.jsonl\n", "a recipe names a model, prompts and objectives", "no objectives: in recipe.yaml"),
        ("!!python/object/apply:os.getcwd []\n", "a configuration file is YAML", "recipe.yaml, line 1: could not determine a constructor"),
        ("model: a\nprompts: [p]\nobjectives: []\n", "prompts: is a file, or its settings", "['p'] (recipe.yaml, line 2)"),
        ("model: a\nprompts: {pth: p}\nobjectives: []\n", "prompts has the keys that it declares", "'pth' (recipe.yaml, line 2)"),
        ("model: a\nprompts: p\nobjectives: {a: length}\n", "objectives: is a list of objectives", "a dict (recipe.yaml, line 3)"),
    ],
)
def test_recipe_files_that_are_wrong(tmp_path, text, rule, found):
    error = refused(raw(tmp_path, text))
    assert rule in error.rule
    assert found in error.found


def test_a_misspelt_key_is_told_its_nearest_name(tmp_path):
    assert refused(raw(tmp_path, "modle: a\n")).remedy.startswith("did you mean 'model'?")
    assert refused(raw(tmp_path, "model: a\nprompts: {pth: p}\nobjectives: []\n")).remedy.startswith("did you mean 'path'?")


@pytest.mark.parametrize(
    ("changes", "rule", "found", "remedy"),
    [
        ({"method": "liner"}, "a method is known by its name", "'liner'", "did you mean 'linear'?"),
        (
            {"method": {"name": "experts", "mixr": "logit"}},
            "method experts has the fields that it declares",
            "'mixr'",
            "did you mean 'mixing'?",
        ),
        ({"method": {"name": "experts", "mixing": "logits"}}, "mixing", "'logits'", "paretune show experts"),
        ({"learner": "ppg"}, "a learner is known by its name", "'ppg'", "did you mean 'pg'?"),
        ({"learner": {"rnk": 4}}, "learner pg has the fields that it declares", "'rnk'", "did you mean 'rank'?"),
        ({"beta": 0}, "beta, the price of one nat of KL, is positive", "beta=0", "0.05 to 0.3"),
        ({"beta": "much"}, "beta:", "'much'", "paretune show recipe"),
        ({"max_new_tokens": 0}, "an answer has room for a token", "max_new_tokens=0", "64"),
        ({"max_new_tokens": 300}, "prompt and answer fit into the model's context", "> 256", "lower max_new_tokens"),
        ({"dtype": "float8"}, "dtype:", "'float8'", "paretune show recipe"),
        ({"seed": "one"}, "the seed is a whole number", "'one'", "seed: 0"),
        ({"prompts": {"path": "prompts.jsonl", "limit": "x"}}, "prompts.limit:", "'x'", "paretune show recipe"),
        ({"prompts": {"path": "prompts.jsonl", "limit": 0}}, "limit is at least 1", "limit=0", "leave limit out"),
        ({"prompts": {"path": "prompts.jsonl", "test": 1.5}}, "the share of test prompts lies between 0 and 1", "test=1.5", "test: 0.2"),
        ({"prompts": {"path": "a", "dataset": "b"}}, "prompts come from a path or from a dataset", "path=", "give one of them"),
        ({"prompts": {"path": "prompts.jsonl", "system": "x"}}, "a system message goes with chat: true", "chat: false", "chat: true"),
        ({"prompts": {"dataset": "./nowhere"}}, "the prompts' dataset can be loaded", "nowhere", "load_dataset"),
        (
            {"prompts": {"dataset": "no/where"}},
            "the prompts' dataset can be loaded",
            "'no/where'",
            "hf download no/where --repo-type dataset",
        ),
        ({"preferences": 1}, "preferences: is a number of points per edge, or a list of weights", "1", "preferences: 11"),
    ],
)
def test_fields_that_are_wrong(tiny, tmp_path, changes, rule, found, remedy):
    if "learner" in changes and isinstance(changes["learner"], dict):
        changes = {"learner": {"name": "pg", **changes["learner"]}}
    error = refused(write_recipe(tmp_path, tiny, **changes))
    assert rule in error.rule
    assert found in error.found
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("beta", "an override reads key=value"),
        ("=3", "an override reads key=value"),
        ("bta=3", "a recipe has the keys that it declares"),
        ("beta.x=3", "an override names a value in the file"),
        ("objectives.lod.low=3", "an override names one item of a list, by name or by number"),
        ("objectives.7.low=3", "an override names one item of a list, by name or by number"),
        ("method={a", "the value of an override is YAML"),
    ],
)
def test_overrides_that_are_wrong(tiny, tmp_path, override, rule):
    error = refused(write_recipe(tmp_path, tiny, beta=0.2), override)
    assert rule in error.rule
    assert override in error.found


# ---- objectives


@pytest.mark.parametrize(
    ("objectives", "rule", "found", "remedy"),
    [
        ([{"use": "lenght"}, {"use": "length"}], "an objective is known by its name", "'lenght'", "did you mean 'length'?"),
        (
            [{"use": "length", "haf": 2}, {"use": "length"}],
            "objective length has the fields that it declares",
            "'haf'",
            "did you mean 'half'?",
        ),
        ([{"use": "length"}], "a trade-off needs at least two objectives", "length", "add one"),
        ([{"use": "length"}, {"use": "length"}], "objective names are distinct", "length, length", "rename"),
        ([{"name": "a"}, {"use": "length"}], "an objective says what it uses", "'a' with name", "use: rewards.py:function"),
        ([{"name": "a b", "use": "length"}], "the name of an objective has no space, comma or =", "'a b'", "brief"),
        (
            [{"use": "rewards.py:shout"}, {"use": "length"}],
            "'shout': a function of your own comes with its range",
            "no low and no high",
            "low:",
        ),
        (["length"], "objectives: is a list of objectives", "a list", "- {name: brief"),
    ],
)
def test_objectives_that_are_wrong(tiny, tmp_path, objectives, rule, found, remedy):
    error = refused(write_recipe(tmp_path, tiny, objectives=objectives))
    assert rule in error.rule
    assert found in error.found
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("use", "text", "rule", "found", "remedy"),
    [
        ("gone.py:f", None, "the reward function 'f' is in a Python file that exists", "gone.py", "relative to the recipe"),
        ("rewards.py:shuot", None, "the reward function is defined in rewards.py", "no 'shuot' there", "did you mean 'shout'?"),
        ("rewards.py:", None, "a reward function is written file.py:function", "rewards.py:", "rewards.py:politeness"),
        ("rewards.txt:f", None, "a reward function is written file.py:function", "rewards.txt:f", "rewards.py:politeness"),
        ("rewards.py:f", "def f(:\n", "rewards.py can be imported", "SyntaxError", "python rewards.py"),
        ("rewards.py:f", "import no_such_package_here\n", "rewards.py can be imported", "ModuleNotFoundError", "python rewards.py"),
        (
            "rewards.py:f",
            "x = 1\ny = x / 0\n",
            "rewards.py can be imported",
            "ZeroDivisionError: division by zero (rewards.py, line 2)",
            "python",
        ),
        ("rewards.py:f", "raise SystemExit(0)\n", "rewards.py can be imported", "SystemExit", "python rewards.py"),
        ("rewards.py:f", "f = 3\n", "rewards.py:f is a function", "a int", "name a function"),
        ("rewards.py:f", "class f: pass\n", "rewards.py:f is a function", "the class f", "an instance of the class"),
        (
            "rewards.py:f",
            "def f(completions, solution): ...\n",
            "takes prompts, completions",
            "'solution'; the columns are answer",
            "column",
        ),
    ],
)
def test_reward_files_that_are_wrong(tiny, tmp_path, use, text, rule, found, remedy):
    recipe = write_recipe(tmp_path, tiny, objectives=[{"use": use, "low": 0, "high": 1}, {"use": "length"}])
    if text is not None:
        (tmp_path / "rewards.py").write_text(text)
    error = refused(recipe)
    assert rule in error.rule
    assert found in error.found
    assert remedy in error.remedy


# ---- prompts


@pytest.mark.parametrize(
    ("name", "data", "rule", "found"),
    [
        ("p.jsonl", b"", "there is at least one prompt", "none in p.jsonl"),
        ("p.jsonl", b"\n \n", "there is at least one prompt", "none in p.jsonl"),
        ("p.csv", b"prompt,answer\n", "there is at least one prompt", "none in p.csv"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n\n{"prompt": "b"\n',
            "every line of a JSON-lines file is one JSON object",
            "p.jsonl, line 3: Expecting",
        ),
        ("p.jsonl", b'{"prompt": "a"}\n["b"]\n', "every line of a JSON-lines file is one JSON object", "p.jsonl, line 2: a list"),
        ("p.jsonl", b'{"prompt": "a", "x": NaN}\n', "every line of a JSON-lines file is one JSON object", "line 1: NaN is not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "prompt files are UTF-8", "p.jsonl, line 2: byte 0xff"),
        (
            "p.jsonl",
            b'{"question": "a", "answer": "b"}\n',
            "every prompt has the column 'prompt'",
            "the columns 'question', 'answer' in p.jsonl, line 1",
        ),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "every prompt has the column 'prompt'", "the columns 'text' in p.jsonl, line 2"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "  "}\n', "a prompt has some text", "p.jsonl, line 2"),
        ("p.jsonl", b'{"prompt": 3}\n', "a prompt is a text, or messages", "3 in p.jsonl, line 1"),
        ("p.jsonl", b'{"prompt": []}\n', "a prompt is a text, or messages", "[] in p.jsonl, line 1"),
        (
            "p.jsonl",
            b'{"prompt": [{"role": "assistant", "content": "x"}]}\n',
            "of which the last is not the assistant's",
            "p.jsonl, line 1",
        ),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "x"}]}\n',
            "the prompts are all texts or all lists of messages",
            "both in p.jsonl",
        ),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "a"}\n', "at least two different prompts", "1"),
        ("p.csv", b'prompt\n"a\n', "prompts in CSV can be parsed", "p.csv, line 2"),
        (
            "p.csv",
            b"prompt,answer\na,b\nc\n",
            "every line of a CSV file has as many fields as its header",
            "p.csv, line 3: 1 fields for 2 columns",
        ),
        ("p.csv", b"prompt,prompt\na,b\n", "the columns of a CSV file have distinct names", "p.csv, line 1"),
        ("p.xlsx", b"PK", "prompts are JSON lines (.jsonl), JSON (.json), CSV (.csv) or Parquet (.parquet)", "p.xlsx"),
        ("p.parquet", b"PAR1", "a Parquet file can be read", "p.parquet: "),
    ],
)
def test_prompt_files_that_are_wrong(tiny, tmp_path, name, data, rule, found):
    (tmp_path / name).write_bytes(data)
    error = refused(write_recipe(tmp_path, tiny, prompts=name))
    assert rule in error.rule
    assert found in error.found


@pytest.mark.parametrize("key", ["test", "validation", "unlabelled"])
def test_texts_in_one_file_and_messages_in_another(tiny, tmp_path, key):
    write_lines(tmp_path / "other.jsonl", [{"prompt": [{"role": "user", "content": "where is it?"}], "answer": "1"}])
    error = refused(write_recipe(tmp_path, tiny, prompts={"path": "prompts.jsonl", key: "other.jsonl"}))
    assert error.rule == "the prompts are all texts or all lists of messages"
    assert f"train, test{'' if key == 'test' else f', {key}'}" in error.found


def test_a_missing_column_is_told_its_nearest_name(tiny, tmp_path):
    write_lines(tmp_path / "p.jsonl", [{"prompts": "a"}])
    assert "did you mean 'prompts'?" in refused(write_recipe(tmp_path, tiny, prompts="p.jsonl")).remedy


def test_prompt_files_that_are_not_there(tiny, tmp_path):
    error = refused(write_recipe(tmp_path, tiny, prompts="gone.jsonl"))
    assert error.rule == "the prompt file can be read"
    assert error.found.startswith(f"{tmp_path / 'gone.jsonl'}: No such file or directory (recipe.yaml, line")
    error = refused(write_recipe(tmp_path, tiny, prompts={"path": "prompts.jsonl", "test": "gone.jsonl"}))
    assert "gone.jsonl" in error.found


def test_a_prompt_for_training_and_testing(tiny, tmp_path):
    write_lines(tmp_path / "test.jsonl", [{"prompt": "Customer: where is parcel 3?\nAgent:"}])
    error = refused(write_recipe(tmp_path, tiny, prompts={"path": "prompts.jsonl", "test": "test.jsonl"}))
    assert error.rule == "no prompt is used for training and for testing"
    assert "1 prompts are in both" in error.found


@pytest.mark.parametrize(
    ("template", "rule", "found"),
    [
        ("Q: {question}", "every prompt has the column 'question', which the template names", "the columns 'prompt', 'answer'"),
        ("Q: {prompt.__class__}", "every prompt has the column 'prompt.__class__'", "the columns 'prompt', 'answer'"),
        ("Q: {prompt", "a template is text with {column} in it", "expected '}'"),
        ("Q: prompt", "a template names at least one column", "'Q: prompt'"),
    ],
)
def test_templates_that_are_wrong(tiny, tmp_path, template, rule, found):
    error = refused(write_recipe(tmp_path, tiny, prompts={"path": "prompts.jsonl", "template": template}))
    assert rule in error.rule
    assert found in error.found


# ---- models


def remove(*patterns):
    def edit(folder):
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return edit


def to_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def to_adapter(folder):
    remove("*")(folder)
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("edit", "rule", "found", "remedy"),
    [
        (shutil.rmtree, "the model is a directory, or the name of a model on the hub", "nothing at", "relative to the recipe"),
        (remove("*"), "a model directory has a config.json", "own: no files", "save_pretrained"),
        (to_adapter, "a model directory has a config.json", "an adapter without its base model", "merge the adapter"),
        (
            remove("tokenizer*"),
            "a model directory has its tokenizer beside the weights",
            "own: chat_template.jinja, config.json",
            "AutoTokenizer",
        ),
        (
            to_pickle,
            "weights are read from safetensors only, because a pickle can run code",
            "own: pytorch_model.bin",
            "safe_serialization=True",
        ),
        (remove("*.safetensors"), "weights are read from safetensors only", "own: chat_template.jinja, config.json", "save_pretrained"),
    ],
)
def test_model_directories_that_are_wrong(tiny, tmp_path, edit, rule, found, remedy):
    own = shutil.copytree(tiny, tmp_path / "own")
    edit(own)
    error = refused(write_recipe(tmp_path, "./own"))
    assert rule in error.rule
    assert found in error.found
    assert remedy in error.remedy


def test_a_hub_name_that_cannot_be_had(tmp_path):
    error = refused(write_recipe(tmp_path, "nobody/no-such-model"))
    assert error.rule == "the reference model can be loaded"
    assert error.found.startswith("nobody/no-such-model: ")
    assert "without a network" in error.remedy


def test_messages_without_a_chat_template(tiny, tmp_path):
    own = shutil.copytree(tiny, tmp_path / "own")
    (own / "chat_template.jinja").unlink()
    error = refused(write_recipe(tmp_path, "own", prompts={"path": "prompts.jsonl", "chat": True}))
    assert error.rule == "prompts made of messages need a tokenizer with a chat template"
    assert "template:" in error.remedy


def test_a_model_that_cannot_end_and_a_tokenizer_of_another_model(tiny, tmp_path):
    own = shutil.copytree(tiny, tmp_path / "own")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((own / name).read_text())
        content = {key: value for key, value in content.items() if key not in ("eos_token_id", "eos_token")}
        (own / name).write_text(json.dumps(content))
    task = load_recipe(write_recipe(tmp_path, own)).task
    with pytest.raises(ConfigError, match="a model can end its answer"):
        task.load()
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 5000, "content": "<far>"})
    (own / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="a model and its tokenizer belong together") as error:
        load_recipe(write_recipe(tmp_path, own)).task.load()
    assert "token ids up to" in error.value.found

"""Files that somebody gave you run no code. Each hostile artifact leaves a mark when executed; no command that reads may leave one."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import time

import pytest
import torch
import yaml
from typer.testing import CliRunner

from judge_server import JudgeServer, verdict
from paretune.cli import app
from paretune.cli.common import say, show_table
from paretune.errors import ConfigError, redacted
from paretune.policy.base import build_mixing
from paretune.policy.family import Family, load_base
from paretune.policy.lora.bank import LoraBank
from paretune.policy.rules import Identity
from paretune.registry import METHODS, TASKS, describe
from paretune.report.tables import Column, Table
from paretune.runs.display import Lines
from paretune.runs.jobs import failure
from paretune.runs.recipes.recipe import load_recipe
from paretune.tasks.pretrained import load_pretrained, load_tokenizer
from paretune.tasks.prompts import chat_text
from paretune.types import Objectives
from recipe_files import tiny_model, write_recipe
from report_cells import run_directory

W = "loud=.5,brief=.5"
WITHOUT = "a family runs no code and calls no service, unless you say so"


def without_hash(family):
    """The family's description, as somebody changes it who knows that a hash would show it."""
    return {name: value for name, value in json.loads((family / "family.json").read_text()).items() if name not in ("files", "sha256")}


class Canary:
    """Code in three forms that makes the file `mark`, and whether it was executed."""

    def __init__(self, folder):
        self.mark = folder / "executed"
        self.line = f"open({str(self.mark)!r}, 'a').write('x')"

    def __reduce__(self):
        return exec, (self.line,)

    @property
    def sang(self):
        return self.mark.exists()


@pytest.fixture
def canary(tmp_path):
    return Canary(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A family on a tiny model; never modify it."""
    model, tokenizer = load_pretrained(str(tiny_model()))
    bank = LoraBank(model)
    for k in range(2):
        bank.add(f"e{k}", seed=k, rank=2, targets=["q_proj"])
    objectives = Objectives(names=("loud", "brief"), low=(0.0, 0.0), high=(1.0, 1.0))
    base = {"model": str(tiny_model()), "revision": None, "dtype": "float32"}
    folder = tmp_path_factory.mktemp("plain") / "family"
    Family(build_mixing("parameter", bank, tokenizer), Identity(), objectives, base, max_new_tokens=2).save(folder)
    return folder


@pytest.fixture
def family(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "family")


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def all_that_read(family, *more, out=None):
    """Results of the three commands that load a family."""
    out = family.parent / "out" if out is None else out
    return [
        run("sample", family, "Customer: hello", "--preference", W, *more),
        run("export", family, "--preference", W, "--out", out, *more),
        run("explain", family, "Customer: hello", "--preference", W, "--samples", 1, *more),
    ]


def rebased(family, base):
    card = without_hash(family)
    (family / "family.json").write_text(json.dumps({**card, "base": base}))
    return family


def recipe_task(tmp_path, **changes):
    """The description of a recipe task, as somebody may write it into family.json."""
    return {"task": describe(load_recipe(write_recipe(tmp_path / "theirs", tiny_model())).task) | changes}


def hostile_model(folder, canary):
    """A copy of the tiny model with code of every kind that transformers knows, and weights as a pickle beside the safetensors."""
    shutil.copytree(tiny_model(), folder)
    code = f"{canary.line}\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    code += "class Config(LlamaConfig):\n    pass\nclass Model(LlamaForCausalLM):\n    config_class = Config\n"
    code += "class Tokenizer(PreTrainedTokenizerFast):\n    pass\ndef generate(model, **given):\n    pass\n"
    (folder / "theirs.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name, entries in (
        ("config.json", {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "theirs.Tokenizer"]}),
    ):
        given = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**given, "auto_map": entries}))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(canary))
    torch.save({"x": canary}, folder / "training_args.bin")
    return folder


# ---- a family


@pytest.mark.parametrize("named", ["function", "function below use", "model", "reward model", "judge"])
def test_code_that_a_family_names_is_refused(family, tmp_path, canary, named):
    rewards = tmp_path / "theirs" / "rewards.py"
    task = recipe_task(tmp_path)
    rewards.write_text(canary.line + "\ndef shout(completions, **_):\n    return [1.0 for _ in completions]\n")
    specs = task["task"]["objective_specs"]
    if named == "function below use":
        specs[0] = {"name": "loud", "use": "function", "low": 0, "high": 1} | {"use": f"{rewards}:shout"}
    elif named != "function":
        specs[0] = {"name": "loud", "use": "length"}
    if named == "model":
        task["task"] |= {"trust_remote_code": True, "model": str(hostile_model(tmp_path / "model", canary))}
    with JudgeServer(lambda *_: verdict(5)) as server:
        if named == "reward model":
            model = str(hostile_model(tmp_path / "model", canary))
            specs[0] = {"name": "loud", "use": "reward-model", "model": model, "low": 0, "high": 1, "trust_remote_code": True}
        if named == "judge":
            specs[0] = {"name": "loud", "use": "judge", "url": server.url, "model": "m", "rubric": "r", "key_env": "HOME"}
        for done in all_that_read(rebased(family, task)):
            assert done.exit_code == 2, done.output
            assert WITHOUT in done.output
            assert "--trust" in done.output
        assert server.bodies == []
    assert not canary.sang
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=WITHOUT):
        load_base(task)


def test_the_canary_sings_where_the_caller_trusts(family, tmp_path, canary):
    """What is refused above would have run."""
    task = recipe_task(tmp_path)
    text = canary.line + "\ndef shout(completions, **_):\n    return [1.0 for _ in completions]\n"
    (tmp_path / "theirs" / "rewards.py").write_text(text)
    done = run("explain", rebased(family, task), "hello", "--preference", W, "--samples", 2, "--trust")
    assert done.exit_code == 0, done.output
    assert canary.sang


@pytest.mark.parametrize("names_code", [False, True])
def test_explain_takes_the_objectives_of_the_callers_recipe(family, tmp_path, canary, names_code):
    if names_code:
        family = rebased(family, recipe_task(tmp_path))
        (tmp_path / "theirs" / "rewards.py").write_text(canary.line)
    recipe = write_recipe(tmp_path / "mine", tiny_model())
    done = run("explain", family, "hello", "--preference", W, "--samples", 2, "--recipe", recipe, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sensitivity"]["objectives"] == ["loud", "brief"]
    assert not canary.sang


def test_a_model_with_code_of_its_own_is_loaded_without_it(family, tmp_path, canary):
    model = hostile_model(tmp_path / "model", canary)
    before = all_that_read(family, out=tmp_path / "one")
    after = all_that_read(rebased(family, {"model": str(model), "trust_remote_code": True}), out=tmp_path / "two")
    assert [done.exit_code for done in after] == [0, 0, 0], [done.output for done in after]
    assert after[0].stdout == before[0].stdout
    assert not canary.sang
    assert run("sample", family, "hello", "--preference", W, "--trust").exit_code == 0
    assert canary.sang


def test_a_model_that_is_nothing_without_its_code_says_how(family, tmp_path, canary):
    model = hostile_model(tmp_path / "model", canary)
    given = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**given, "model_type": "theirs"}))
    done = run("sample", rebased(family, {"model": str(model)}), "hello", "--preference", W)
    assert done.exit_code == 2
    assert "--trust" in done.output
    assert not canary.sang


@pytest.mark.parametrize("kind", ["pickle", "kernel"])
def test_weights_and_kernels_that_are_code(family, tmp_path, canary, kind):
    model = hostile_model(tmp_path / "model", canary)
    if kind == "pickle":
        for file in model.glob("*.safetensors"):
            file.unlink()
    else:
        given = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**given, "attn_implementation": "kernels-community/flash-attn"}))
    for done in all_that_read(rebased(family, {"model": str(model)})):
        assert done.exit_code == 2
        assert {"pickle": "weights are read from safetensors only", "kernel": "runs no code of its own"}[kind] in done.output
    assert not canary.sang


@pytest.mark.parametrize("kind", ["library", "megatron", "elsewhere", "pickle"])
def test_an_adapter_that_names_code(family, tmp_path, canary, monkeypatch, kind):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "megatron.py").write_text(canary.line)
    (tmp_path / "path" / "theirs.py").write_text(canary.line)
    monkeypatch.syspath_prepend(tmp_path / "path")
    adapter = family / "adapters" / "e0"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings |= {
        "library": {"auto_mapping": {"base_model_class": "Model", "parent_library": "theirs"}},
        "megatron": {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "megatron"},
        "elsewhere": {"base_model_name_or_path": str(hostile_model(tmp_path / "model", canary))},
        "pickle": {},
    }[kind]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    if kind == "pickle":
        (adapter / "adapter_model.safetensors").unlink()
        (adapter / "adapter_model.bin").write_bytes(pickle.dumps(canary))
    (family / "family.json").write_text(json.dumps(without_hash(family)))
    codes = [done.exit_code for done in all_that_read(family)]
    assert codes == [2 if kind in ("megatron", "pickle") else 0] * 3
    assert not canary.sang
    assert not {"theirs", "megatron"} & set(sys.modules)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('LINE') }}",
        "{{ messages.__init__.__globals__ }}",
        "{% for c in ().__class__.__mro__ %}{{ c }}{% endfor %}{{ raise_exception('x') }}",
        "{{ lipsum.__globals__['os'].popen('LINE').read() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_chat_template_is_sandboxed(tmp_path, canary, template):
    tokenizer = load_tokenizer(str(tiny_model()))
    tokenizer.chat_template = template.replace("LINE", f"touch {canary.mark}")
    with pytest.raises(ConfigError, match="a conversation fits the model's chat template"):
        chat_text(tokenizer, [{"role": "user", "content": "hello"}])
    assert not canary.sang


# ---- recipes, suites and run directories

TAGS = [
    "!!python/object/apply:os.system ['touch {mark}']",
    "!!python/object/new:os.system ['touch {mark}']",
    "!!python/name:os.system",
    "!!python/module:theirs",
    "!theirs {{a: 1}}",
]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_has_no_tags_that_build_objects(tmp_path, canary, tag):
    value = tag.format(mark=canary.mark)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {value}\nprompts: p.jsonl\nobjectives: []\n")
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"name: x\ntasks: [exact-v1]\nmethods: [reference]\nseeds: [0]\nabout: {value}\n")
    for arguments in (("fit", path), ("relate", path), ("bench", suite), ("tune", suite), ("relate", "exact-v1", f"rho={value}")):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert "YAML" in done.output
    assert not canary.sang


TINY = {
    "name": "tiny",
    "tasks": [{"name": "exact-v1", "alphabet": 3, "length": 2, "prompt_count": 4, "width": 32, "rho": [0.0]}],
    "methods": ["reference"],
    "seeds": [100],
    "splits": ["train"],
}


def test_a_run_directory_that_names_code_is_only_read(tmp_path, canary):
    """report, check and bench, where job files name plugins, the tasks of failures functions, and where every binary file is a pickle."""
    root = run_directory(tmp_path / "run", rhos=(0.0,), seeds=(100,))
    plugin = tmp_path / "theirs.py"
    plugin.write_text(canary.line)
    job = {"kind": "train", "label": "x", "plugins": [str(plugin)], "spec": {}}
    (root / "logs" / "jobs").mkdir(parents=True)
    for name in ("train-0", "cell-0"):
        (root / "logs" / "jobs" / f"{name}.json").write_text(json.dumps(job))
    wip = root / "artifacts" / ".wip-0123456789abcdef0123"
    (wip / "checkpoint").mkdir(parents=True)
    task = recipe_task(tmp_path)["task"] | {"trust_remote_code": True}
    (wip / "spec.json").write_text(json.dumps({"task": task, "learner": {"name": "pg"}}))
    (wip / "FAILED.json").write_text(json.dumps({"label": "x", "error": "ConfigError", "message": "m", "plugins": [str(plugin)]}))
    for name in ("state.pt", "optimizer.bin", "checkpoint.pkl"):
        (wip / "checkpoint" / name).write_bytes(pickle.dumps(canary))
    for cell in (root / "cells").iterdir():
        (cell / "curve.npz").write_bytes(pickle.dumps(canary))
    (root / "paretune_plugin.py").write_text(canary.line)
    suite = tmp_path / "tiny.yaml"
    suite.write_text(yaml.safe_dump(TINY))
    assert run("report", root).exit_code == 0
    assert run("check", root, "--json").exit_code in (0, 1)
    assert run("bench", suite, "--root", root, "--dry-run").exit_code == 0
    done = run("bench", suite, "--root", root, "--executor", "in-process")
    assert done.exit_code == 0, done.output
    assert not canary.sang


SECRET = "hunter2hunter2hunter2"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": f"https://me:{SECRET}@hub.example.org/model"}, "key"),
        ({"prompts": {"dataset": f"https://data.example.org/x?token={SECRET}"}}, "key"),
        ({"prompts": {"dataset": f"https://me:{SECRET}@data.example.org/x"}}, "key"),
        ({"prompts": f"https://me:{SECRET}@data.example.org/x.jsonl"}, "key"),
        ({"learner": {"name": "pg", "api_key": SECRET}}, "api_key"),
        ({"api_key": SECRET}, "api_key"),
        ({"objectives": [{"name": "a", "use": "judge", "url": f"http://h/v1?key={SECRET}", "model": "m", "rubric": "r"}]}, "key"),
        ({"objectives": [{"name": "a", "use": "judge", "url": "http://h/v1", "model": "m", "rubric": "r", "api_key": SECRET}]}, "key"),
        ({"objectives": [{"name": "a", "use": "length", "password": SECRET}]}, "password"),
        ({"objectives": [{"name": "a", "use": "reward-model", "model": f"https://{SECRET}@h/m", "low": 0, "high": 1}]}, "key"),
    ],
)
def test_a_recipe_with_a_key_stops_and_nothing_shows_or_keeps_it(tmp_path, changes, says):
    if "objectives" in changes:
        changes = {"objectives": [*changes["objectives"], {"name": "brief", "use": "length"}]}
    recipe = write_recipe(tmp_path / "mine", tiny_model())
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **changes}))
    done = run("fit", recipe)
    assert done.exit_code == 2, done.output
    assert says in done.output
    assert SECRET not in done.output
    assert not (tmp_path / "mine" / "runs").exists()


def test_an_override_with_a_key_is_not_shown(tmp_path):
    recipe = write_recipe(tmp_path / "mine", tiny_model())
    for override in (f"objectives.brief.api_key={SECRET}", f"learner.token=sk-{SECRET}", f"model=https://me:{SECRET}@hub/x"):
        done = run("fit", recipe, override)
        assert done.exit_code == 2, done.output
        assert SECRET not in done.output


def test_what_a_run_leaves_holds_nothing_of_the_environment_or_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"sk-{SECRET}")
    suite = tmp_path / "tiny.yaml"
    suite.write_text(yaml.safe_dump(TINY))
    monkeypatch.setattr(sys, "argv", ["paretune", f"--{SECRET}"])
    assert run("bench", suite, "--root", tmp_path / "run", "--executor", "in-process").exit_code == 0
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"env.json", "cell.json", "index.html"} <= {path.name for path in written}
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_failure_is_written_down_without_keys():
    error = RuntimeError(f"cannot reach https://me:{SECRET}@host/v1?api_key={SECRET} with Authorization: Bearer {SECRET}, sk-{SECRET}")
    record = failure(error, label="x")
    assert SECRET not in json.dumps(record)
    assert "cannot reach https://***@host/v1?api_key=***" in record["message"]


@pytest.mark.parametrize("text", ["a-", "sk-", "-eyJ", "?a-", "api_key"])
def test_masking_takes_time_in_proportion_to_the_text(text):
    """0.1 s here; a pattern that looks ahead without a bound takes minutes."""
    start = time.process_time()
    redacted(text * 20_000)
    assert time.process_time() - start < 3


# ---- what is printed

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egpj\u2066\r\x08 [/INST] [bold]x[/bold] :smile: a\tb\nc \u00e9\u200d"
SEEN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egpj\u2066\r\x08 [/INST] [bold]x[/bold] :smile: a" + "\tb\nc \u00e9\u200d"


def test_what_a_model_says_moves_no_terminal(family, monkeypatch):
    """Escape sequences, bidi marks and carriage returns are shown, not obeyed; --json still has the very text."""
    monkeypatch.setattr(Family, "sample", lambda self, prompts, *_, **__: [[ESCAPES] for _ in prompts])
    assert run("sample", family, "hello", "--preference", W).stdout == SEEN + "\n"
    told = run("sample", family, "hello", "--preference", W, "--json").stdout
    assert json.loads(told) == [{"prompt": "hello", "responses": [ESCAPES]}]
    assert not set(told) & set("\x1b\x07\x9b\u202e\u2066\r\x08")
    half = "\ud800"
    monkeypatch.setattr(Family, "sample", lambda self, prompts, *_, **__: [[half] for _ in prompts])
    assert run("sample", family, "hello", "--preference", W).stdout == r"\ud800" + "\n"


def test_tables_and_errors_move_no_terminal(capsys):
    line = ESCAPES.replace("\n", " ").replace("\t", " ")
    show_table(Table("t", (Column("name", line, "text"),), [{"name": line}]), title=line)
    say(line)
    Lines(cells=1).note(line)
    said = capsys.readouterr()
    for text, count in ((said.out, 3), (said.err, 2)):
        assert text.count(r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egpj\u2066\r\x08 [/INST] [bold]x[/bold] :smile: a b c") == count
        assert not set(text) & set("\x1b\x07\x9b\u202e\u2066\r\x08")


def test_a_response_with_brackets_can_be_explained(family):
    """Rich takes [/...] for markup: the table of tokens ended in a traceback."""
    done = run("explain", family, "hello", "--preference", W, "--samples", 0, "--response", "[/INST] [bold]")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("bad", ["a\x1b[2J", "a\u202eb", "a\u200bb", "a\x00", "a\u2066"])
def test_names_are_checked_where_they_are_given(family, tmp_path, bad):
    rule = "made of characters that can be seen"
    specs = [{"name": bad, "use": "length"}, {"name": "other", "use": "length"}]
    done = run("fit", write_recipe(tmp_path / "mine", tiny_model(), objectives=specs))
    assert done.exit_code == 2, done.output
    assert rule in done.output or ("\x00" in bad and "without NUL" in done.output)
    assert "recipe.yaml, line" in done.output
    card = without_hash(family)
    for change in (
        {"objectives": {**card["objectives"], "names": [bad, "brief"]}},
        {"adapters": {bad: card["adapters"]["e0"], "e1": "adapters/e1"}},
    ):
        (family / "family.json").write_text(json.dumps({**card, **change}))
        done = run("sample", family, "hello", "--preference", W)
        assert done.exit_code == 2, done.output
        assert rule in done.output
    with pytest.raises(ConfigError, match=rule):
        METHODS.register(bad)(type("Mine", (), {}))
    assert bad not in METHODS


def test_catalogs_import_nothing_from_here(tmp_path, canary, monkeypatch):
    for name in ("paretune_plugin.py", "rewards.py", "conftest.py"):
        (tmp_path / name).write_text(canary.line)
    monkeypatch.chdir(tmp_path)
    assert run("ls").exit_code == 0
    assert run("show", "judge").exit_code == 0
    assert not canary.sang


def test_a_task_says_what_it_trusts(tmp_path):
    """Every task and objective answers; those that ship with Paretune, and need no file of a recipe, trust nothing."""
    assert TASKS.build("exact-v1").trusts() == ()
    assert TASKS.build("reflection").trusts() == ()
    task = load_recipe(write_recipe(tmp_path, tiny_model())).task
    assert task.trusts() == (f"the function {tmp_path}/rewards.py:shout",)

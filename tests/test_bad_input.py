"""Bad input while things run, in preferences, and through the command line: one message, the right exit code, and nothing lost."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import bad_inputs
from paretune.cli import app
from paretune.errors import ConfigError, RewardError, nearest
from paretune.objectives.functions import load_function
from paretune.registry import describe
from paretune.runs.recipes.recipe import load_recipe
from paretune.training.spec import TrainSpec
from paretune.types import Objectives, Preference
from recipe_files import tiny_model, write_recipe


@pytest.fixture(scope="session")
def tiny():
    return tiny_model()


# ---- rewards while a training runs: code 1, and the checkpoint stays

RUN = ["learner.samples=48", "learner.batch=8", "learner.group=4", "learner.rank=2", "learner.checkpoint_every=1", "max_new_tokens=4"]


def train(tiny, folder, text, work):
    """Train the expert of the first objective, whose function is `text`."""
    recipe = write_recipe(folder, tiny)
    (folder / "rewards.py").write_text(text)
    loaded = load_recipe(recipe, RUN)
    spec = TrainSpec(task=describe(loaded.task), learner=describe(loaded.learner), preference=(1.0, 0.0), seed=0)
    work.mkdir(exist_ok=True)
    return loaded.learner.train(spec, loaded.task, work, parents={})


@pytest.mark.parametrize(
    ("returned", "rule", "found"),
    [
        ("[None] * len(completions)", "objective 'loud' scores at least 90% of the completions", "came back as None or NaN (100%)"),
        ("[float('nan') if i % 4 == 0 else 1.0 for i in range(len(completions))]", "scores at least 90%", "came back as None or NaN (25%)"),
        ("[float('inf')] * len(completions)", "objective 'loud' returns finite scores", "inf for completion 0"),
        ("[1.0]", "objective 'loud' returns one number or None per completion", "1 scores for 8 completions"),
        ("['good'] * len(completions)", "objective 'loud' returns one number or None per completion", "'good' (str) for completion 0"),
        ("[1 / 0]", "objective 'loud' scores every completion without an exception", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_training_stops_at_rewards_that_are_wrong(tiny, tmp_path, returned, rule, found):
    with pytest.raises(RewardError) as caught:
        train(tiny, tmp_path, f"def shout(completions, **kwargs):\n    return {returned}\n", tmp_path / "work")
    assert rule in caught.value.rule
    assert found in caught.value.found
    assert caught.value.exit_code == 1


def test_a_few_unscored_completions_are_counted_and_left_out(tiny, tmp_path):
    text = """
CALLS = []

def shout(completions, **kwargs):
    CALLS.append(1)
    return [None if i == 0 and len(CALLS) < 4 else 1.0 for i in range(len(completions))]
"""
    train(tiny, tmp_path, text, tmp_path / "work")
    records = [json.loads(line) for line in (tmp_path / "work" / "train.jsonl").read_text().splitlines()]
    assert sum(record["unscored"]["loud"] for record in records) == 3  # of 48
    assert {record["rewards"]["loud"] for record in records} == {1.0}  # the mean of those that were scored


def test_a_reward_that_fails_for_a_while_loses_nothing(tiny, tmp_path):
    """A service that is down: the training stops with code 1, and the next run goes on from the checkpoint to the same weights."""
    text = """
from pathlib import Path
DOWN, CALLS = Path(__file__).with_name("down"), []

def shout(completions, **kwargs):
    CALLS.append(len(completions))
    if len(CALLS) > 3 and DOWN.exists():
        raise ConnectionError("the judge does not answer")
    return [float(len(text)) for text in completions]
"""
    (tmp_path / "down").touch()
    with pytest.raises(RewardError, match="the judge does not answer"):
        train(tiny, tmp_path, text, tmp_path / "work")
    (tmp_path / "down").unlink()
    cost = train(tiny, tmp_path, text, tmp_path / "work")
    assert cost.samples == 48
    calls = sys.modules[load_function(f"{tmp_path / 'rewards.py'}:shout").function.__module__].CALLS
    assert len(calls) == 3 + 1 + 3  # three steps, the one that failed, and the other three: nothing was done twice
    train(tiny, tmp_path, text, tmp_path / "straight")
    assert (tmp_path / "work" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "straight" / "adapter_model.safetensors"
    ).read_bytes()


# ---- preferences


@pytest.mark.parametrize(
    ("given", "rule", "found", "remedy"),
    [
        ("a=1.2,b=-.2", "non-negative and sum to 1", "a=1.2, b=-0.2 (sum 1)", "finite weights of at least 0"),
        ("a=.7,b=.7", "non-negative and sum to 1", "a=0.7, b=0.7 (sum 1.4)", "divide by the sum: a=0.5,b=0.5"),
        ("a=0,b=0", "non-negative and sum to 1", "(sum 0)", "finite weights"),
        ("a=nan,b=1", "non-negative and sum to 1", "a=nan", "finite weights"),
        ("a=.7,c=.3", "a preference names existing objectives", "c", "choose one of a, b"),
        ("a=.7;b=.3", "a preference reads name=weight,name=weight", "'a=.7;b=.3'", "for example"),
        ("a", "a preference reads name=weight,name=weight", "'a'", "for example"),
        ("", "a preference reads name=weight,name=weight", "''", "for example"),
        ("a=.5,a=.5", "a preference names each objective once", "a=.5,a=.5", "give 'a' one weight"),
        ([0.5, 0.3, 0.2], "one weight per objective", "3 weights for 2 objectives (a, b)", "every objective"),
    ],
)
def test_preferences_that_are_wrong(given, rule, found, remedy):
    with pytest.raises(ConfigError) as caught:
        Preference.of(("a", "b"), given)
    assert rule in caught.value.rule
    assert found in caught.value.found
    assert remedy in caught.value.remedy
    assert caught.value.exit_code == 2


def test_a_misspelt_objective_is_told_its_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'brief'"):
        Preference.of(("polite", "brief"), "polite=.5,breif=.5")
    assert nearest("zzz", ["polite", "brief"]) == "choose one of brief, polite"
    with pytest.raises(ConfigError, match="objective names are distinct"):
        Objectives(names=(), low=(), high=())


# ---- the same through the command line: one message on stderr, nothing on stdout, the exit code


def command(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stderr


def test_mistakes_in_a_recipe_end_with_code_2_and_make_nothing(tiny, tmp_path):
    recipe = write_recipe(tmp_path, tiny)
    for override, rule, found, remedy in (
        ("method=liner", "error: a method is known by its name", "'liner' (override method=liner)", "did you mean 'linear'?"),
        ("model=./gone", "error: the model is a directory", "nothing at", "relative to the recipe"),
        ("objectives.brief.use=lenght", "error: an objective is known by its name", "'lenght'", "did you mean 'length'?"),
    ):
        code, message = command("fit", recipe, override)
        assert code == 2
        assert rule in message
        assert f"  found:  {found}" in message
        assert "  remedy: " in message
        assert remedy in message
    assert not (tmp_path / "runs").exists()
    assert command("fit", tmp_path / "gone.yaml")[0] == 2
    assert command("sample", tmp_path, "hello", "--preference", "a=1")[0] == 2


def test_rewards_that_fail_end_with_code_1_and_lose_nothing(tiny, tmp_path):
    """The judge goes down in the second training: the first is kept, the second goes on from its checkpoint when asked again."""
    recipe = write_recipe(tmp_path, tiny, objectives=[{"use": "length"}, {"name": "loud", "use": "rewards.py:shout", "low": 0, "high": 1}])
    (tmp_path / "rewards.py").write_text("""
from pathlib import Path
CALLS = []

def shout(completions, **kwargs):
    CALLS.append(1)
    down = len(CALLS) > 8 and Path(__file__).with_name("down").exists()
    return [float("inf") if down else 1.0] * len(completions)
""")
    (tmp_path / "down").touch()
    code, message = command("fit", recipe, *RUN, "--samples", "0")
    assert code == 1
    assert "objective 'loud' returns finite scores" in message
    (tmp_path / "down").unlink()
    result = CliRunner().invoke(app, ["fit", str(recipe), *RUN, "--samples", "0", "--json"])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "runs" / "artifacts").glob("*/DONE"))) == 2
    calls = sys.modules[load_function(f"{tmp_path / 'rewards.py'}:shout").function.__module__].CALLS
    assert len(calls) == 2 * 6 + 1  # six steps each, and the one that failed


# ---- suites of recipe tasks, code that prints or exits, and what is said of failures


def recipe_suite(tiny, folder, **task):
    """A suite of one recipe task, whose objectives stand in rewards.py."""
    write_recipe(folder, tiny)
    objectives = [{"name": "loud", "use": f"{folder}/rewards.py:shout", "low": 0, "high": 1}, {"use": "length"}]
    given = {"name": "recipe", "model": str(tiny), "prompt_source": {"path": str(folder / "prompts.jsonl")}, "max_new_tokens": 4}
    entry = {**given, "objective_specs": objectives, **task}
    learner = {"name": "pg", "samples": 16, "batch": 8, "group": 4, "rank": 2}
    suite = {"name": "s", "tasks": [entry], "learner": learner, "methods": ["uniform"], "seeds": [0], "samples": 2}
    (folder / "s.yaml").write_text(json.dumps(suite))
    return ["bench", folder / "s.yaml", "--root", folder / "root", "--executor", "in-process"]


def test_suites_check_recipe_tasks_before_training(tiny, tmp_path):
    answers = [{"name": "a", "use": f"{tmp_path}/rewards.py:needs", "low": 0, "high": 1}, {"use": "length"}]
    argv = recipe_suite(tiny, tmp_path, objective_specs=answers)
    (tmp_path / "rewards.py").write_text("def needs(completions, solution): return [0.0 for _ in completions]\n")
    code, message = command(*argv)
    assert code == 2
    assert "it needs 'solution'; the columns are answer (s.yaml, line 1)" in message
    code, message = command(*recipe_suite(tiny, tmp_path / "long", max_new_tokens=10_000))
    assert code == 2
    assert "prompt and answer fit into the model's context" in message
    assert not list(tmp_path.rglob("root"))


@pytest.mark.parametrize("statement", ["raise KeyError('x')", "import sys; sys.exit(0)"])
def test_bench_says_all_of_a_failure_and_the_line_of_the_users_own_file(tiny, tmp_path, statement):
    argv = recipe_suite(tiny, tmp_path)
    (tmp_path / "rewards.py").write_text(f"# a line\ndef shout(completions, **kwargs):\n    {statement}\n")
    result = CliRunner().invoke(app, [str(a) for a in argv])
    assert result.exit_code == 1
    said = "KeyError: 'x'" if "Key" in statement else "SystemExit: 0"
    failure = "objective 'loud' scores every completion without an exception"
    assert f"  {failure}\n    found:  {said} (rewards.py, line 3)\n    remedy: return None" in result.stderr


def test_what_a_reward_prints_does_not_spoil_json(tiny, tmp_path):
    recipe = write_recipe(tmp_path, tiny)
    (tmp_path / "rewards.py").write_text("""
import subprocess, sys
print("IMPORTED")

def shout(completions, **kwargs):
    print("SCORED")
    subprocess.run([sys.executable, "-c", "print('STARTED')"])
    return [0.0] * len(completions)
""")
    argv = [sys.executable, "-m", "paretune", "fit", str(recipe), "method=reference", "preferences=[[1,0]]", "--samples", "2", "--json"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout)["objectives"] == ["loud", "brief"]
    assert all(word in ended.stderr for word in ("IMPORTED", "SCORED", "STARTED"))


PLANNER = """
import sys
from dataclasses import dataclass
from paretune.methods.base import Card, Method
from paretune.registry import METHODS

@METHODS.register("leaves")
@dataclass(frozen=True)
class Leaves(Method):
    card = Card("baseline", "s", "s", "d", "h", "0", "1", False)
    def plan(self, task, learner, done, seed):
        sys.exit(0)
    def policy(self, task, learner, done, seed):
        sys.exit(0)
"""


def test_code_that_exits_is_an_error_with_its_place(tmp_path):
    (tmp_path / "plan.py").write_text(PLANNER)
    (tmp_path / "now.py").write_text("import sys\n\nsys.exit(0)\n")
    suite = {"name": "s", "tasks": [{"name": "exact-v1", "alphabet": 4, "width": 32}], "methods": ["leaves"], "seeds": [0]}
    (tmp_path / "s.yaml").write_text(json.dumps(suite))
    program = "import sys; from paretune.cli import main; main()"
    for plugin, code, said in (("now.py", 2, "SystemExit: 0 (now.py, line 3)"), ("plan.py", 1, "SystemExit: 0 (plan.py, line 12)")):
        argv = ["bench", "s.yaml", "--plugin", plugin, "--root", "root", "--executor", "in-process"]
        ended = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=tmp_path)
        assert ended.returncode == code, ended.stderr
        assert said in ended.stderr


@pytest.mark.parametrize(
    ("override", "blamed"),
    [
        ("learner.lr=abc", "'abc' (override learner.lr=abc)"),
        ("learner.group=0", "with learner.group=0 on the command line"),
        ("learner.batch=7", "with learner.batch=7 on the command line"),
        ("method.mixing=x", "'x' (override method.mixing=x)"),
        ("prompts.seed=true", "True (override prompts.seed=true)"),
    ],
)
def test_the_command_line_is_blamed_for_its_overrides(tiny, tmp_path, override, blamed):
    recipe = write_recipe(tmp_path, tiny, method={"name": "experts"}, learner={"name": "pg"}, prompts={"path": "prompts.jsonl"})
    code, message = command("fit", recipe, override)
    assert code == 2
    assert blamed in message


def test_refusals_that_need_no_model_load_no_torch(tmp_path):
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "family.json").write_text('{"format": 2}')
    (tmp_path / "broken.yaml").write_text("a: [")
    probe = "import sys; from typer.testing import CliRunner; from paretune.cli import app\n"
    probe += "for argv in ARGV: assert CliRunner().invoke(app, argv).exit_code == 2, argv; assert 'torch' not in sys.modules, argv"
    family = [
        [name, folder, *more]
        for folder in ("gone", "family")
        for name, *more in (
            ("sample", "hi", "--preference", "a=1"),
            ("explain", "hi", "--preference", "a=1"),
            ("export", "--preference", "a=1", "--out", "x"),
        )
    ]
    files = [[name, file] for file in ("gone.yaml", "broken.yaml") for name in ("fit", "bench", "tune", "relate", "normalize")]
    argvs = [*family, *files, ["check", "gone"], ["report", "gone"]]
    subprocess.run([sys.executable, "-c", probe.replace("ARGV", repr(argvs))], check=True, cwd=tmp_path)


# ---- the generated ones: tests/bad_inputs.py runs them all


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    return bad_inputs.ground(tmp_path_factory.mktemp("ground"))


def test_a_share_of_the_generated_inputs(ground):
    chosen = bad_inputs.share(100)
    went = [(case.kind, case.name, bad_inputs.verdict(case, ground)) for case in chosen]
    wrong = [(kind, name, how) for kind, name, (how, _) in went if how != bad_inputs.GOOD]
    assert not wrong, wrong
    assert len(bad_inputs.cases()) >= 700
    assert len({case.kind for case in chosen}) == len({case.kind for case in bad_inputs.cases()})


def test_the_judge_of_generated_inputs_sees_what_goes_wrong(ground):
    """A judge that says ok to everything would pass everything."""

    def end(act):
        return bad_inputs.verdict(bad_inputs.Case("x", "x", lambda *_: act()), ground)[0]

    def refuse(**parts):
        raise ConfigError("a rule", **parts)

    assert end(lambda: refuse(found="this", remedy="that")) == "ok"
    assert end(lambda: refuse(found="this", remedy="")) == "unclear"
    assert end(lambda: 1 / 0) == "traceback"
    assert end(lambda: 3) == "accepted"
    assert end(lambda: bad_inputs._alarm()) == "hang"

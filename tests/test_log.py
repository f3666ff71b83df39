"""What the log of a training says, and `paretune log`: right figures, any width, and what it is given."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from learner_cases import SMALL, TASK, log_of, moved, spec_of, weights
from paretune.cli import app
from paretune.cli.log import _number, sparkline
from paretune.files import write_json
from paretune.policy.scoring import token_logp
from paretune.runs.jobs import Tasks, run_job, train_job
from paretune.runs.store import Store
from paretune.training.learners.base import draw_step
from paretune.training.learners.exact import ExactGradient
from paretune.training.learners.loss import clipped_share, policy_loss
from paretune.training.learners.modpo import Modpo
from paretune.training.learners.policy_gradient import PolicyGradient

RUNNER = CliRunner()


# The figures


def test_a_line_says_of_a_step_what_can_be_recomputed(tmp_path):
    """One step, one line: every figure from the same draw, by its definition."""
    learner = PolicyGradient(**{**SMALL, "samples": 16, "log_every": 1}, log_samples=3)
    spec = spec_of(learner)
    learner.train(spec, TASK, tmp_path)
    (line,) = log_of(tmp_path)
    policy = learner.start(spec, TASK, {})
    batch = learner.collect(policy, TASK, spec, 0)
    made, kl_N = batch.responses, batch.kl_N
    logp_N = (made.logp_NT * made.mask_NT).sum(1).double().numpy()
    assert line["kl"] == pytest.approx(kl_N.mean())
    assert line["kl_max"] == pytest.approx(kl_N.max())
    assert line["entropy_estimate"] == pytest.approx(-logp_N.mean())
    assert line["advantage_spread"] == pytest.approx(batch.advantage_N.std())
    scored_NT = token_logp(
        policy, made.prompt_ids_PT, made.prompt_mask_PT, made.tokens_NT, gates_NK=made.gates_NK, group=4, mask_NT=made.mask_NT
    ).detach()
    gap = float((scored_NT - made.logp_NT).abs()[made.mask_NT.bool()].double().mean())
    assert line["logp_gap"] == pytest.approx(gap, abs=1e-6)
    assert gap < 1e-5
    assert "clipped" not in line, "one update: no ratio leaves 1"
    assert set(line["tokens_per_s_of"]) == {"sampling", "rewards", "reference", "update"}
    assert all(value > 0 for value in line["tokens_per_s_of"].values())
    assert [one["step"] for one in line["responses"]] == [0, 1]
    assert len(line["responses"][0]["answers"]) == 2, "of three, as many as there are prompts"
    answers = line["responses"][0]["answers"]
    assert {answer["prompt"] for answer in answers} == {prompt.raw for prompt in TASK.prompts("train")}
    assert all(set(answer) == {"prompt", "response", "preference"} for answer in answers), "not scored: a judge costs money"


def test_a_gap_between_sampling_and_scoring_is_seen():
    learner = PolicyGradient(**SMALL)
    policy = moved(learner)
    batch = learner.collect(policy, TASK, spec_of(learner), 0)
    shifted = dataclasses.replace(batch.responses, logp_NT=batch.responses.logp_NT - 0.25)
    batch = dataclasses.replace(batch, responses=shifted)
    assert learner._scoring(batch).get("logp_gap") is None, "nothing was scored yet"
    learner.loss(policy, batch, slice(0, 8), beta=0.1)
    assert learner._scoring(batch)["logp_gap"] == pytest.approx(0.25, abs=1e-5), "of the rows that were"


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_the_clipped_share_counts_what_has_no_gradient(ratio):
    old_NT, mask_NT = torch.zeros(4, 1), torch.ones(4, 1)
    logp_NT = torch.log(torch.tensor([[1.5], [1.5], [0.5], [1.1]]))
    advantage_N = torch.tensor([1.0, -1.0, -1.0, 1.0])  # clipped where a gain would be paid twice: above for 1, below for -1
    settings = {"old_logp_NT": old_NT, "clip_eps": 0.2, "ratio": ratio, "length": "sum"}
    assert clipped_share(logp_NT, mask_NT, advantage_N, **settings) == 0.5
    leaf = logp_NT.clone().requires_grad_()
    policy_loss(leaf, mask_NT, advantage_N, rows=4, **settings).backward()
    assert (leaf.grad == 0).flatten().tolist() == [True, False, True, False]


def test_several_updates_log_what_they_clip(tmp_path):
    learner = PolicyGradient(**{**SMALL, "lr": 0.3, "samples": 32}, epochs=3, step_kl=None)
    learner.train(spec_of(learner), TASK, tmp_path)
    assert 0 < log_of(tmp_path)[-1]["clipped"] <= 1


def test_what_is_not_meant_is_left_out(tmp_path):
    learner = Modpo(**SMALL)
    learner.train(spec_of(learner), TASK, tmp_path)
    assert {"entropy_estimate", "logp_gap", "advantage_spread", "clipped"}.isdisjoint(log_of(tmp_path)[-1]), "responses of the reference"


def test_an_exact_line_is_exact(tmp_path):
    learner = ExactGradient(steps=3, rank=2, log_every=1)
    learner.train(spec_of(learner), TASK, tmp_path)
    first = log_of(tmp_path)[0]  # of the policy before the first step, which is the reference
    logp_PR, rewards_PRM = TASK.reference_logp_PR("train"), TASK.rewards_PRM("train")
    p_PR = np.exp(logp_PR)
    mean_PM = np.einsum("pr,prm->pm", p_PR, rewards_PRM)
    spread_M = np.sqrt(np.einsum("pr,prm->pm", p_PR, (rewards_PRM - mean_PM[:, None]) ** 2).mean(0))
    assert first["entropy"] == pytest.approx(-(p_PR * logp_PR).sum(1).mean(), rel=1e-5)
    assert list(first["spread"].values()) == pytest.approx(spread_M.tolist(), rel=1e-4)
    assert first["kl_max"] == pytest.approx(0, abs=1e-6)
    assert first["gradient_norm"] > 0


def test_responses_are_always_to_the_same_prompts_and_cost_the_training_nothing(tmp_path):
    shown = PolicyGradient(**{**SMALL, "samples": 320, "log_every": 5, "checkpoint_every": 5}, log_samples=2, log_samples_every=5)
    silent = dataclasses.replace(shown, log_samples=None)  # none of a task whose responses are enumerated
    one = shown.train(spec_of(shown), TASK, tmp_path / "shown")
    other = silent.train(spec_of(silent), TASK, tmp_path / "silent")
    assert weights(tmp_path / "shown") == weights(tmp_path / "silent")
    assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)
    told = [one for line in log_of(tmp_path / "shown") for one in line.get("responses", ())]
    assert [one["step"] for one in told] == [0, 5, 10, 15, 20]
    assert len({json.dumps([answer["prompt"] for answer in one["answers"]]) for one in told}) == 1
    assert not any("responses" in line for line in log_of(tmp_path / "silent"))
    assert len(draw_step(shown, shown.start(spec_of(shown), TASK, {}), TASK, spec_of(shown), 0).seconds) == 2


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with two trainings, one begun, and a family of the two."""
    root = tmp_path_factory.mktemp("run")
    store, tasks = Store(root), Tasks()
    tasks.put(TASK)
    learner = PolicyGradient(**{**SMALL, "log_every": 1}, log_samples=1, log_samples_every=2)
    keys = []
    for preference in ((1.0, 0.0), (0.0, 1.0)):
        spec = spec_of(learner, preference)
        run_job(train_job(store, spec, learner=learner).path, tasks=tasks)
        keys.append(spec.key)
    begun = root / "artifacts" / f".wip-{'f' * 20}"
    begun.mkdir()
    line = {"step": 1, "rewards": {"a": 0.5, "b": None}, "kl": 0.1, "tokens_per_s": 9.0, "seconds": 3.0}
    (begun / "train.jsonl").write_text(json.dumps(line) + '\n{"step": 2, "rew')
    family = root / "families" / "linear"
    family.mkdir(parents=True)
    card = {"format": 2, "mixing": "parameter", "rule": {"name": "identity"}, "base": {"model": "m"}, "adapters": {}}
    card |= {"objectives": {"names": ["a"], "low": [0], "high": [1]}, "meta": {"trainings": keys[:1]}}
    write_json(family / "family.json", card)
    return root, keys, family


def said(*arguments, **env):
    done = RUNNER.invoke(app, ["log", *map(str, arguments)], env={"COLUMNS": "100", **env}, catch_exceptions=False)
    return done.exit_code, done.stdout, done.stderr


def test_one_training_is_a_table_with_plots(run):
    root, (key, _), family = run
    code, text, _ = said(root, key[:6])
    assert code == 0
    assert f"{key}, done, step 4" in text
    row = next(line for line in text.splitlines() if line.startswith("kl "))
    records = log_of(root / "artifacts" / key)
    assert row.split()[1:-1] == [
        _number(value) for value in (lambda kl: (kl[0], min(kl), max(kl), kl[-1]))([line["kl"] for line in records])
    ]
    assert set(row.split()[-1]) <= set("▁▂▃▄▅▆▇█")
    assert said(family) == said(root / "artifacts" / key) == said(root, key)
    assert "> " not in text
    assert said(root, key, "--responses")[1].count("  step ") == 2
    assert said(root, "f" * 20)[1].count("rewards/a") == 1, "one that runs, with half a line at the end"


def test_several_are_listed_and_json_has_it_all(run):
    root, keys, _ = run
    code, text, _ = said(root)
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()[:-2] if line[0] != " "] == [key[:8] for key in (*keys, "f" * 20)]
    assert "unfinished, step 1" in text
    rows = json.loads(said(root, "--json")[1])
    assert {row["key"]: row["state"] for row in rows} == {keys[0]: "done", keys[1]: "done", "f" * 20: "unfinished"}
    one = json.loads(said(root, keys[0], "--json")[1])
    assert one["records"] == log_of(root / "artifacts" / keys[0])


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_any_width_without_color(run, columns):
    root, (key, _), _ = run
    for arguments in ((root,), (root, key)):
        code, text, _ = said(*arguments, COLUMNS=str(columns), NO_COLOR="1")
        assert code == 0
        assert "\x1b" not in text
        wide = [line for line in text.splitlines() if len(line) > columns and str(root) not in line and "exact-v1" not in line]
        assert not wide, "but names and paths"


def test_a_key_alone_is_looked_for(run, monkeypatch):
    root, (key, _), _ = run
    monkeypatch.chdir(root)
    assert said(key[:8])[1].startswith("pg at (1, 0)")


def test_what_has_no_log_is_refused(run, tmp_path):
    root, _, family = run
    for arguments, words in (
        ((tmp_path,), "no training at"),
        (("0123456789",), "no training at"),
        ((root, "0"), "is that of"),
        ((root, "zz"), "is that of 0"),
        ((root, "--responses"), "--responses prints those of one training"),
    ):
        code, text, error = said(*arguments)
        assert (code, text) == (2, "")
        assert words in error
    card = json.loads((family / "family.json").read_text())
    moved_ = tmp_path / "families" / "linear"
    moved_.mkdir(parents=True)
    write_json(moved_ / "family.json", card)
    code, _, error = said(moved_)
    assert code == 2
    assert "paretune log RUN" in error


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([1, None, 1], 9, "▄ ▄"),
        ([None, math.nan], 9, ""),
        ([], 9, ""),
        ([-math.inf, 0.0, 1.0], 9, " ▁█"),
    ],
)
def test_a_course_in_few_characters(values, width, text):
    assert sparkline(values, width) == text


@pytest.mark.parametrize("value", [0, 1, -12.0, 0.5, -123.456, 1e-9, -1.5e-7, 123456.7, 1e12, -1e-300])
def test_a_number_has_its_room(value):
    assert len(_number(value)) <= 8
    assert float(_number(value).replace(",", "")) == pytest.approx(value, rel=0.06)

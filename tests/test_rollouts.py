"""Rollouts by a server: which rows have which gates, what is refused, what a server that dies costs, and what its rounding does."""

import copy
import dataclasses
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from learner_cases import SMALL, TASK, W, flat, killed, log_of, moved, spec_of, weights
from paretune.errors import ParetuneError, TrainingError
from paretune.policy.rollout import generate
from paretune.policy.scoring import token_logp
from paretune.registry import LEARNERS, describe, unkeyed
from paretune.tasks.exact.task import ExactTask
from paretune.training import processes, rollouts
from paretune.training.cost import TIMED
from paretune.training.learners.base import draw_step
from paretune.training.learners.distill import Distillation
from paretune.training.learners.exact import enumerated_returns
from paretune.training.learners.modpo import Modpo
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.rollouts import importance_weights, unpack, write_policy
from vllm_server import VllmServer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rollouts, "PAUSE", 0.01)
    rollouts.server_at.cache_clear()


def by(server, kind=PolicyGradient, **settings):
    return kind(**{**SMALL, "log_every": 1, **settings}, rollouts="vllm", rollouts_url=server.url)


def message(call, *parts):
    with pytest.raises(ParetuneError) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    return caught.value


# Who says what


def test_every_row_has_its_own_prompt_gates_and_seed():
    """A preference, so gates, for each prompt, and prompts that come again: rows that were swapped would be scored otherwise."""
    with VllmServer(TASK.load) as server:
        learner = by(server)
        policy, spec = moved(learner, preference=None), spec_of(learner, None)
        made = learner.drawn(policy, TASK, spec, 3)
        plain = draw_step(learner, policy, TASK, spec, 3)
    assert [one.digest for one in made.prompts] == [one.digest for one in plain.prompts]
    assert torch.equal(made.gates_NK, plain.gates_NK)
    assert torch.equal(made.prompt_ids_PT, plain.prompt_ids_PT)
    assert len({tuple(body["vllm_xargs"]["gates"]) for body in server.rows()}) == 4  # else any mapping of gates would pass
    assert len({body["seed"] for body in server.rows()}) == len(server.rows()) == 16
    scored_NT = token_logp(policy, made.prompt_ids_PT, made.prompt_mask_PT, made.tokens_NT, gates_NK=made.gates_NK, group=4)
    torch.testing.assert_close((made.logp_NT * made.mask_NT).float(), scored_NT.detach() * made.mask_NT, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.sampled_logp_NT, made.logp_NT, atol=1e-5, rtol=0)


def test_a_policy_is_pushed_when_it_has_changed_and_the_earlier_one_goes():
    with VllmServer(TASK.load) as server:
        learner = by(server)
        policy, spec = moved(learner), spec_of(learner)
        learner.drawn(policy, TASK, spec, 0)
        learner.drawn(policy, TASK, spec, 1)
        (first,) = server.policies
        with torch.no_grad():
            policy.parameters()[0].add_(0.01)
        learner.drawn(policy, TASK, spec, 2)
        (second,) = server.policies
    assert first != second
    assert [body["lora_name"] for body in server.bodies("/v1/load_lora_adapter")] == [first, second]
    assert {body["model"] for body in server.rows()[:32]} == {first}
    assert {body["model"] for body in server.rows()[32:]} == {second}


def test_a_training_by_a_server_is_the_training_of_those_responses(tmp_path):
    """The server's rows, drawn here instead, give the same weights: it changes who draws, and nothing else."""
    with VllmServer(TASK.load) as server:
        learner = by(server)
        spec = spec_of(learner)
        learner.train(spec, TASK, tmp_path / "there")

        def here(policy, prompts, **settings):
            rows = []
            twin = rollouts.VllmServer("", "x")
            twin._answers = lambda policy, read, bodies: [rollouts._read("n", body, *local(policy, body)) for body in bodies]
            rows += twin.generate(policy, prompts, **settings)
            return iter(rows)

        def local(policy, body):
            server.policies["n"] = policy
            status, told = server.draw({**body, "model": "n"})
            return status, rollouts.json.dumps(told)

        class Here(PolicyGradient):
            def draws(self, spec):
                return here

        other = Here(**{f.name: getattr(learner, f.name) for f in dataclasses.fields(learner)})
        other.train(spec, TASK, tmp_path / "here")
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    records = log_of(tmp_path / "there")
    assert all(record["logp_gap"] < 1e-5 and abs(record["weight"] - 1) < 1e-4 and record["truncated"] == 0 for record in records)
    assert all(record["weight_max"] < 1.001 for record in records)


def test_a_key_has_rollouts_where_they_are_given_and_never_the_address():
    plain = PolicyGradient()
    given = dataclasses.replace(plain, rollouts="vllm", rollouts_url="http://a:1")
    assert not {"rollouts", "rollouts_cap", "rollouts_url"} & set(describe(plain))
    assert describe(given) == {**describe(plain), "rollouts": "vllm"}
    assert describe(dataclasses.replace(given, rollouts_cap=5.0))["rollouts_cap"] == 5.0
    assert LEARNERS.build(describe(given)).rollouts == "vllm"
    assert unkeyed(given)["rollouts_url"] == "http://a:1"


# What is refused


def test_another_vllm_another_base_and_too_short_a_server_are_refused():
    def other():
        model, tokenizer = TASK.load()
        model = copy.deepcopy(model)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.3)
        return model, tokenizer

    for load, settings, parts in (
        (TASK.load, {"version": "0.31.0"}, ["vLLM 0.32.0", "vLLM 0.31.0"]),
        (TASK.load, {"version": "1.0"}, ["vLLM 1.0"]),
        (other, {}, ["base model of the training", "nats per token", "same revision"]),
        (TASK.load, {"max_model_len": 3}, ["longest sequence", "--max-model-len 3"]),
        (TASK.load, {"max_rank": 1}, ["takes the policy's adapters", "LoRA rank 2 is greater", "--max-lora-rank"]),
        (TASK.load, {"trouble": lambda path, *_: (404, "Not Found") if "load_lora" in path else None}, ["RUNTIME_LORA", "HTTP 404"]),
        (TASK.load, {"trouble": lambda *_: (401, "who?")}, ["VLLM_API_KEY"]),
        (TASK.load, {"trouble": lambda path, *_: (200, "hello") if path == "/version" else None}, ["vLLM none"]),
    ):
        with VllmServer(load, **settings) as server:
            learner = by(server)
            message(lambda learner=learner: learner.drawn(moved(learner), TASK, spec_of(learner), 0), *parts)


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (lambda told: {**told, "model": "another"}, "policy that was asked for"),
        (lambda told: {**told, "choices": []}, "tokens of one response"),
        (lambda told: _choice(told, token_ids=[0, 1, 2, 0, 1, 2]), "6 tokens"),
        (lambda told: _choice(told, logprobs={"token_logprobs": [-0.1]}), "1 log-probabilities"),
        (
            lambda told: _choice(told, logprobs={"token_logprobs": [float("nan")] * len(told["choices"][0]["token_ids"])}),
            "log-probabilities",
        ),
        (lambda told: _choice(told, token_ids=None), "tokens of one response"),
        (lambda told: "<html>", "tokens of one response"),
    ],
)
def test_an_answer_that_is_none_is_refused(answer, part):
    with VllmServer(TASK.load) as server:
        draw = server.draw
        server.draw = lambda body: (200, answer(draw(body)[1]))
        learner = by(server)
        error = message(lambda: learner.drawn(moved(learner), TASK, spec_of(learner), 0), part, "last checkpoint is kept")
        assert isinstance(error, TrainingError)


def _choice(told, **changes):
    return {**told, "choices": [{**told["choices"][0], **changes}]}


def test_a_server_that_draws_from_something_else_is_refused():
    """Old weights under a new name, raw log-probabilities at a temperature, gates that are ignored: all differ by more than rounding."""
    with VllmServer(TASK.load) as server:
        draw = server.draw
        server.draw = lambda body: draw({**body, "vllm_xargs": {"gates": [0.0] * len(body["vllm_xargs"]["gates"])}})
        learner = by(server)
        message(lambda: learner.drawn(moved(learner, size=2.0), TASK, spec_of(learner), 0), "policy that was pushed", "nats per token")


def test_what_vllm_cannot_draw_is_refused_before_anything_is_trained():
    with VllmServer(TASK.load) as server:
        learner = by(server)
        message(lambda: learner.accept(spec_of(learner, None, rule={"name": "router", "experts": 2})), "plain LoRAs", "'routed'")
    message(lambda: Modpo(rollouts="vllm"), "losses that weigh responses")
    own = PolicyGradient(**SMALL, rollouts="vllm")
    token = processes._here.set(processes.Ranks(0, 2))  # by torchrun or Ray, whatever learner.processes says
    try:
        message(lambda: own.accept(spec_of(own)), "share one vLLM server", "no rollouts_url")
    finally:
        processes._here.reset(token)
    message(lambda: LEARNERS.build({"name": "pg", "rollouts": "sglang"}), "rollouts")
    for url in ("not an address", "ftp://a/", "http://"):
        learner = PolicyGradient(**SMALL, rollouts="vllm", rollouts_url=url)
        message(lambda learner=learner: learner.drawn(moved(learner), TASK, spec_of(learner), 0), "have an address")


# A server that dies


def test_a_push_that_breaks_off_leaves_the_earlier_policy_and_is_sent_again(tmp_path):
    """The text of a policy, cut anywhere, is refused whole; the server keeps what it has until the new one is there."""
    policy = moved(PolicyGradient(**SMALL))
    write_policy(policy, tmp_path / "one")
    text = rollouts._packed(tmp_path / "one")
    for length in (0, 7, len(text) // 2, len(text) - 4):
        message(lambda length=length: unpack(text[:length], tmp_path / f"cut-{length}"), "arrives whole", "again")
    unpack(text, tmp_path / "two")
    assert weights(tmp_path / "two" / "adapter-0") == weights(tmp_path / "one" / "adapter-0")

    held = []

    def trouble(path, body, count):
        if path == "/v1/load_lora_adapter" and count in (2, 3):
            held.append(list(server.policies))
            raise ConnectionResetError

    with VllmServer(TASK.load, trouble=trouble) as server:
        learner = by(server)
        spec = spec_of(learner)
        learner.drawn(policy, TASK, spec, 0)
        first = list(server.policies)
        with torch.no_grad():
            policy.parameters()[0].add_(0.01)
        learner.drawn(policy, TASK, spec, 1)
        assert held == [first, first]
        assert len(server.policies) == 1
        assert list(server.policies) != first


def test_a_server_that_dies_and_comes_back_changes_nothing(tmp_path):
    """Now and then a connection breaks off and all policies are gone, as after kill -9: in a push, in the middle of a batch, between."""
    rng = np.random.default_rng(0)

    def trouble(path, body, count):
        if rng.random() < 0.04:
            server.policies.clear()
            if rng.random() < 0.5:
                return 503, "starting"
            raise ConnectionResetError

    with VllmServer(TASK.load) as server:
        learner = by(server)
        learner.train(spec_of(learner), TASK, tmp_path / "whole")
        server.trouble = trouble
        asked = len(server.asked)
        learner.train(spec_of(learner), TASK, tmp_path / "disturbed")
        assert len(server.asked) > asked * 2 + 5
    assert weights(tmp_path / "disturbed") == weights(tmp_path / "whole")
    assert _timeless(tmp_path / "disturbed") == _timeless(tmp_path / "whole")


def _timeless(folder):
    return [{k: v for k, v in record.items() if k not in TIMED} for record in log_of(folder)]


def test_a_server_that_stays_away_ends_the_training_which_goes_on_later(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "WAIT", 0.2)
    with VllmServer(TASK.load) as server:
        learner = by(server)
        spec = spec_of(learner)
        learner.train(spec, TASK, tmp_path / "whole")
        gone = threading.Event()

        def away(path, body, count):
            if gone.is_set():
                raise ConnectionResetError

        server.trouble = away

        def leave(record):
            if record["step"] == 3:
                gone.set()

        error = message(
            lambda: learner.train(spec, TASK, tmp_path / "broken", progress=leave),
            "vLLM server that draws",
            server.url,
            "checkpoint is kept",
        )
        assert isinstance(error, TrainingError)
        assert (tmp_path / "broken" / "checkpoint" / "00000002").is_dir()
        gone.clear()
        learner.train(spec, TASK, tmp_path / "broken")
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert _timeless(tmp_path / "broken") == _timeless(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_trainer_that_is_killed_goes_on_and_leaves_nothing_at_the_server(tmp_path):
    with VllmServer(TASK.load) as server:
        learner = by(server)
        spec = spec_of(learner)
        learner.train(spec, TASK, tmp_path / "whole")
        killed(learner, spec, TASK, tmp_path / "killed", 3)
        learner.train(spec, TASK, tmp_path / "killed")
        assert len(server.policies) == 1
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script")
def test_a_server_that_the_training_starts_is_started_again_after_kill_9(tmp_path, monkeypatch):
    """The stand-in as a process in vLLM's place; one that ends at once is told with what it said."""
    load = ExactTask.load

    def named(self):
        model, tokenizer = load(self)
        model.name_or_path = "exact"
        return model, tokenizer

    monkeypatch.setattr(ExactTask, "load", named)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {Path(__file__).with_name("vllm_server.py")} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(rollouts.PYTHON, str(python))
    learner = PolicyGradient(**{**SMALL, "log_every": 1}, rollouts="vllm", rollouts_args=f"--count-in {tmp_path / 'starts'}")
    spec = spec_of(learner)
    server = rollouts.server_at(None, spec.key[:16], learner.rollouts_args)

    def kill(record):
        if record["step"] == 2:
            os.kill(server.process.pid, signal.SIGKILL)

    learner.train(spec, TASK, tmp_path / "killed", progress=kill)
    assert (tmp_path / "starts").read_text().splitlines() == ["started"] * 2
    assert server.process is None, "the next training of this process needs its GPU"
    with VllmServer(TASK.load) as other:
        by(other).train(spec, TASK, tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")

    python.write_text("#!/bin/sh\necho no module named vllm >&2\nexit 1\n")
    policy = moved(learner)
    message(lambda: learner.drawn(policy, TASK, spec_of(learner, (0.5, 0.5)), 0), "starts beside", "no module named vllm", rollouts.PYTHON)
    policy.model.name_or_path = ""
    message(lambda: learner.drawn(policy, TASK, spec_of(learner, (0.4, 0.6)), 0), "folder or the hub", "rollouts_url")


# Truncated importance weights


def test_truncated_weights_are_the_ratio_of_whole_responses_up_to_the_cap():
    p, q = (torch.tensor(rows).double().log() for rows in ([[0.5, 0.2, 0.9], [0.6, 0.5, 0.1]], [[0.25, 0.4, 0.3], [0.1, 0.2, 0.7]]))
    mask = torch.tensor([[True, True, False], [True, True, False]])
    torch.testing.assert_close(importance_weights(p, q, mask, cap=50.0), torch.tensor([1.0, 15.0]).double())
    torch.testing.assert_close(importance_weights(p, q, mask, cap=2.0), torch.tensor([1.0, 2.0]).double())
    assert importance_weights(p, p, mask, cap=2.0).tolist() == [1.0, 1.0]


FALSE_ALARM = 1e-4
LARGE = {"rank": 2, "alpha": 4, "samples": 256, "batch": 256, "group": 4}


@pytest.mark.parametrize("kind", ["plain", "jacobian", "kl in loss"])
def test_weighed_responses_of_another_policy_have_the_gradient_of_this_one(kind, monkeypatch):
    """Drawn at temperature 3 and weighed, the estimator's mean along the enumerated gradient is its length; without weights it is not."""
    monkeypatch.setattr(rollouts, "GAP", 9.0)
    heat = 3.0

    class Hot(PolicyGradient):
        def draws(self, spec):
            return lambda policy, prompts, **settings: generate(policy, prompts, **{**settings, "temperature": heat})

    settings = {"kl in loss": {"kl_in": "loss", "kl_estimator": "k2"}}.get(kind, {})
    learner = Hot(**LARGE, **settings, rollouts="vllm", rollouts_url="http://x", rollouts_cap=1e6)
    weighting = {"weighting": {"name": "gradient", "aggregator": "mgda"}} if kind == "jacobian" else {}
    policy, spec = moved(learner), spec_of(learner, **weighting)
    reward_PM, kl_P, _ = enumerated_returns(policy, TASK, torch.ones(TASK.prompt_count, 1))
    (-(reward_PM @ torch.tensor(W, dtype=torch.float64) - TASK.beta * kl_P).mean()).backward()
    true = flat(policy)

    def z(weighed):
        drawn = []
        for step in range(60):
            policy.model.zero_grad()
            batch = learner.collect(policy, TASK, spec, step)
            if not weighed:
                batch = dataclasses.replace(batch, advantage_N=batch.advantage_N / batch.responses.weight_N.numpy())
            learner.gradient(policy, batch, beta=TASK.beta)
            drawn.append(flat(policy))
        seen = np.array(drawn) @ (true / np.linalg.norm(true))
        return (seen.mean() - np.linalg.norm(true)) / (seen.std(ddof=1) / np.sqrt(len(drawn)))

    if kind == "plain":
        assert abs(z(True)) < norm.isf(FALSE_ALARM / 2)
        assert abs(z(False)) > norm.isf(FALSE_ALARM / 2)
    elif kind == "jacobian":  # which is made of the weighed credits, and no others
        asked = []
        jacobian = Hot.jacobian
        monkeypatch.setattr(
            Hot, "jacobian", lambda self, policy, made, credit_NM: asked.append(credit_NM) or jacobian(self, policy, made, credit_NM)
        )
        made = learner.collect(policy, TASK, spec, 0).responses
        monkeypatch.setattr(rollouts, "importance_weights", lambda *_, **__: torch.ones(256, dtype=torch.float64))
        learner.collect(policy, TASK, spec, 0)
        assert made.weight_N.std() > 0.1
        np.testing.assert_allclose(asked[0], asked[1] * made.weight_N.numpy()[:, None], atol=1e-12)
    else:
        batch = learner.collect(policy, TASK, spec, 0)
        rows = slice(0, 256)
        made = batch.responses
        logp_NT = learner.logp(policy, made, rows, gates_NK=made.gates_NK)
        gap_NT = (logp_NT - batch.reference_logp_NT) * made.mask_NT
        gain = (torch.from_numpy(batch.advantage_N) * (logp_NT * 0 + 1)[:, 0]).sum() / 256
        wanted = TASK.beta * (gap_NT.square() / 2).sum(1).double() @ made.weight_N / 256 - gain
        torch.testing.assert_close(learner.loss(policy, batch, rows, beta=TASK.beta).double(), wanted, atol=1e-5, rtol=1e-4)


def test_a_distillation_weighs_its_responses(monkeypatch):
    """The loss is linear in the weights, row by row."""
    learner = Distillation(**{**SMALL, "batch": 8})
    policy = moved(learner, preference=None)
    spec = spec_of(learner, None)
    batch = learner.collect(policy, TASK, spec, 0)
    rows = slice(0, 8)
    alone = []
    for n in range(8):
        one_N = torch.zeros(8, dtype=torch.float64)
        one_N[n] = 1.0
        weighed = dataclasses.replace(batch, responses=dataclasses.replace(batch.responses, weight_N=one_N))
        alone.append(float(learner.loss(policy, weighed, rows, beta=0.1).detach()))
    assert sum(alone) == pytest.approx(float(learner.loss(policy, batch, rows, beta=0.1).detach()), rel=1e-5)
    assert min(alone) > 0

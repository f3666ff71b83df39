"""The learner `trl`: it learns what the embedded learner learns, alone and in two processes, and goes on after a kill."""

from __future__ import annotations

import importlib
import json
import os
import signal

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from paretune.errors import ConfigError, RewardError, TrainingError
from paretune.policy.base import build_mixing
from paretune.policy.lora.bank import LoraBank
from paretune.registry import LEARNERS, METHODS, describe
from paretune.runs.executors import launch
from paretune.runs.jobs import train_job
from paretune.runs.store import Store
from paretune.tasks.exact.task import ExactTask
from paretune.training.advantages import advantages
from paretune.training.batch import prompt_order
from paretune.training.cost import TIMED, read_cost
from paretune.training.learners.exact import ExactGradient, enumerated
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.spec import TrainSpec
from paretune.training.trl import learner as engine
from paretune.training.trl.learner import Trl
from processes import alone, together

TASK = ExactTask(alphabet=4, length=2, prompt_count=2, width=32, layers=1)
SMALL = {"rank": 4, "alpha": 8, "samples": 1920, "batch": 64, "group": 8, "lr": 1e-2, "log_every": 5, "checkpoint_every": 10}
TINY = {**SMALL, "samples": 96, "batch": 16, "group": 4, "log_every": 1, "checkpoint_every": 2}
GRPO = {"trainer": "grpo", "kl_in": "loss", "kl_estimator": "k3", "ratio": "token"}
W = (0.3, 0.7)


def spec_of(learner, preference=W, task=TASK, **settings):
    return TrainSpec(task=describe(task), learner=describe(learner), preference=preference, seed=11, **settings)


def attainment(folder, preference=W):
    """Share of what can be gained at the preference, exactly."""
    model, tokenizer = TASK.load()
    policy = build_mixing("parameter", LoraBank.load(model, {"trained": folder}), tokenizer)
    with torch.no_grad():
        logp_PR = enumerated(policy, TASK, torch.ones(TASK.prompt_count, 1)).logp_PR.numpy()
    w_M = np.array(preference)
    start, best = (w_M @ TASK.J_M(p, "train") for p in (TASK.reference_logp_PR("train"), TASK.optimum_logp_PR(w_M, "train")))
    return float((w_M @ TASK.J_M(logp_PR, "train") - start) / (best - start))


def lines(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    learner, folder = PolicyGradient(**SMALL), tmp_path_factory.mktemp("pg")
    learner.train(spec_of(learner), TASK, folder)
    return folder


@pytest.mark.parametrize("fields", [{}, GRPO], ids=["rloo", "grpo"])
def test_it_learns_what_the_embedded_learner_learns(embedded, fields, tmp_path):
    """Same samples, other draws: within 0.05 of attainment. Both seeds are fixed, so this has no chance in it."""
    learner = Trl(**SMALL, **fields)
    cost = learner.train(spec_of(learner), TASK, tmp_path)
    assert attainment(tmp_path) > 0.6
    assert abs(attainment(tmp_path) - attainment(embedded)) < 0.05
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in embedded.iterdir())
    ours, theirs = lines(embedded), lines(tmp_path)
    own = {"kl_max", "advantage_spread", "entropy_estimate", "logp_gap", "tokens_per_s_of"}  # TRL does not say these, and says others
    assert [sorted(line.keys() - own) for line in ours] == [sorted(line.keys() - {"clipped", "entropy_per_token"}) for line in theirs]
    assert all(own <= set(line) for line in ours)
    assert all({"clipped", "entropy_per_token"} <= set(line) for line in theirs)
    for line, other in zip(ours, theirs, strict=True):
        assert (line["step"], line["samples"], line["lr"]) == (other["step"], other["samples"], pytest.approx(other["lr"]))
    assert theirs[-1]["kl"] == pytest.approx(ours[-1]["kl"], abs=0.06)  # nats per response in both
    assert read_cost(tmp_path) == cost
    known = read_cost(embedded)
    assert (cost.samples, cost.steps, cost.memory_bytes, cost.storage_bytes) == (
        known.samples,
        known.steps,
        known.memory_bytes,
        known.storage_bytes,
    )
    assert cost.tokens == pytest.approx(known.tokens, rel=0.1)
    assert learner.train(spec_of(learner), TASK, tmp_path) == cost  # finished: nothing is trained again
    PeftModel.from_pretrained(TASK.load()[0], tmp_path)


def test_it_starts_where_the_embedded_learner_starts(tmp_path, monkeypatch):
    """A step of no size: the adapter on disk is the embedded learner's fresh one, and the prompts came in its order."""
    learner = Trl(**{**TINY, "samples": 32, "lr": 1e-30, "dtype": "float32"})
    asked = []
    monkeypatch.setattr(ExactTask, "observe", lambda task, prompts, texts, *, streams: asked.extend(prompts) or task.score(prompts, texts))
    learner.train(spec_of(learner), TASK, tmp_path)
    bank = learner.start(spec_of(learner), TASK, {}).bank
    bank.save("policy", tmp_path / "fresh")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "fresh", tmp_path))
    assert list(ours) == list(theirs)
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-20) for name in ours)
    assert (tmp_path / "fresh" / "adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()
    known = TASK.prompts("train")
    assert asked == [known[place] for place in prompt_order(11, 0, 8, len(known)) for _ in range(4)]


@pytest.fixture
def drawn(monkeypatch):
    """The places of the prompts and of the responses (axis R) that were drawn, as they are scored."""
    rows, known = [], TASK.prompts("train")

    def observe(task, prompts, texts, *, streams):
        rows.extend((known.index(prompt), task.responses.index(text)) for prompt, text in zip(prompts, texts, strict=True))
        return task.score(prompts, texts)

    monkeypatch.setattr(ExactTask, "observe", observe)
    return rows


def test_its_gradient_is_that_of_the_enumerated_log_probabilities(drawn, tmp_path):
    """One step from the reference, where KL is 0: the gradient of mean(A log pi), with exact log pi of the responses that TRL drew.

    The empty response, one of the length limit without an EOS, and a PAD that is EOS: a token too many or too few would be seen here.
    """
    learner = Trl(**{**TINY, "samples": 16})
    learner.train(spec_of(learner), TASK, tmp_path)
    p, r = np.array(drawn).T
    lengths = {len(TASK.responses[place]) for place in r}
    assert lengths == {0, 1, 2}
    policy = learner.start(spec_of(learner), TASK, {})
    logp_PR = enumerated(policy, TASK, torch.ones(TASK.prompt_count, 1)).logp_PR
    advantage_N = advantages(TASK.rewards_PRM("train")[p, r], np.tile(W, (16, 1)), group=4)
    (torch.from_numpy(advantage_N) * logp_PR[p, r]).mean().backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]).norm().item()
    assert lines(tmp_path)[0]["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_grpo_with_sums_takes_the_same_first_step(drawn, tmp_path):
    """Its loss is divided by the length limit, here 2: so is the norm at which it is clipped, and nothing else differs while KL is 0."""
    norms, clips, samples = [], [], []
    for fields in ({}, GRPO):
        learner, folder = Trl(**{**TINY, "samples": 16}, **fields), tmp_path / str(len(norms))
        learner.train(spec_of(learner), TASK, folder)
        norms.append(lines(folder)[0]["gradient_norm"])
        clips.append(learner._arguments(spec_of(learner), TASK, folder, 1).max_grad_norm)
        samples.append(list(drawn))
        drawn.clear()
    assert samples[0] == samples[1]
    assert norms[0] == pytest.approx(2 * norms[1], rel=1e-5)
    assert clips == [1.0, 0.5]


@pytest.mark.parametrize(
    ("fields", "spec", "in_trainer"),
    [
        ({"normalize": "batch"}, {}, True),
        ({"normalize": "batch"}, {"scalarize_at": "advantage"}, False),
        ({"normalize": "group"}, {}, False),
        ({}, {}, False),
    ],
)
def test_it_is_normalized_once(fields, spec, in_trainer, tmp_path):
    """By TRL, with the KL inside as in `pg`, where TRL can; by the drop-in elsewhere."""
    learner = Trl(**TINY, **fields)
    asked = spec_of(learner, **spec)
    assert learner._arguments(asked, TASK, tmp_path, 1).normalize_advantages == in_trainer
    assert learner._source(asked, TASK).combine.normalize == ("none" if in_trainer else learner.normalize)


def _killed(learner, folder, at):
    def progress(record):
        if record["step"] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    learner.train(spec_of(learner), TASK, folder, progress=progress)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "fields", [{}, {"micro_batch": 8, "epochs": 2, "checkpointing": True, "clip_norm": None}], ids=["plain", "in-parts-twice"]
)
def test_a_killed_training_goes_on_and_ends_the_same(fields, tmp_path):
    learner, whole, torn = Trl(**TINY, **fields), tmp_path / "whole", tmp_path / "torn"
    learner.train(spec_of(learner), TASK, whole)
    assert alone(_killed, learner, torn, 5) == -signal.SIGKILL
    (torn / "checkpoint" / "checkpoint-99").mkdir()  # one that was cut short: it is not resumed from
    assert not (torn / "ledger.json").exists()
    learner.train(spec_of(learner), TASK, torn)
    assert (torn / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    first, second = ([{k: v for k, v in line.items() if k not in TIMED} for line in lines(folder)] for folder in (whole, torn))
    assert first == second
    assert [line["step"] for line in first] == [1, 2, 3, 4, 5, 6]
    assert not (torn / "checkpoint").exists()


@pytest.mark.usefixtures("one_thread")
def test_a_line_of_the_log_averages_the_steps_before_the_checkpoint_too_and_damage_is_seen(tmp_path):
    """A checkpoint at 4, lines at 3 and 6: step 4 is in the line of 6, after a kill too; a damaged checkpoint is not resumed from."""
    learner = Trl(**{**TINY, "log_every": 3})
    learner.train(spec_of(learner), TASK, tmp_path / "whole")
    for name in ("torn", "damaged"):
        assert alone(_killed, learner, tmp_path / name, 6) == -signal.SIGKILL
    damaged = tmp_path / "damaged" / "checkpoint" / "checkpoint-4" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    learner.train(spec_of(learner), TASK, tmp_path / "torn")
    with pytest.warns(UserWarning, match="damaged checkpoint is not resumed from"):
        learner.train(spec_of(learner), TASK, tmp_path / "damaged")
    every = [
        [{k: v for k, v in line.items() if k not in TIMED} for line in lines(tmp_path / name)] for name in ("whole", "torn", "damaged")
    ]
    assert every[0] == every[1] == every[2]
    assert [line["step"] for line in every[0]] == [3, 6]


def test_a_training_killed_before_its_adapter_was_written_only_writes_it(tmp_path, monkeypatch):
    learner = Trl(**TINY)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_adapter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.train(spec_of(learner), TASK, tmp_path)
    before = lines(tmp_path)
    cost = learner.train(spec_of(learner), TASK, tmp_path)
    assert (cost.samples, cost.steps) == (96, 6)
    assert lines(tmp_path) == before


def test_another_trainings_checkpoint_is_refused(tmp_path):
    learner = Trl(**TINY)
    assert alone(_killed, learner, tmp_path, 5) == -signal.SIGKILL
    with pytest.raises(TrainingError, match="its own checkpoint"):
        learner.train(spec_of(learner, (0.5, 0.5)), TASK, tmp_path)


def _launched(path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process which was forked
    launch.launch(path)


def test_two_processes_learn_what_one_learns(embedded, tmp_path):
    """Gloo, each with half of every batch, groups of 8 within batches of 64: within 0.05 of attainment, the first process publishes."""
    learner = Trl(**{**SMALL, "device": "cpu"})
    job = train_job(Store(tmp_path), spec_of(learner))
    assert together(_launched, job.path) == [None, None]
    published = Store(tmp_path).artifact(job.key)
    assert published is not None
    assert Store(tmp_path).check() == []
    assert abs(attainment(published.path) - attainment(embedded)) < 0.05
    assert read_cost(published.path).samples == 1920
    assert [line["lr"] for line in lines(published.path)] == pytest.approx([line["lr"] for line in lines(embedded)])
    assert together(_launched, job.path) == [None, None]  # done already


def test_launch_speaks_of_what_is_wrong(tmp_path, capsys):
    assert launch.main([]) == 2
    assert launch.main([str(tmp_path / "a" / "b" / "none.json")]) == 2
    assert "paretune.runs.jobs.train_job" in capsys.readouterr().err


def _launched_alone(path):
    os.environ.pop("WORLD_SIZE", None)
    _launched(path)


def test_one_process_is_enough(tmp_path):
    job = train_job(Store(tmp_path), spec_of(Trl(**{**TINY, "samples": 16, "device": "cpu"})))
    assert alone(_launched_alone, job.path) == 0
    assert Store(tmp_path).published("artifacts") == [job.key]


def test_more_processes_need_a_learner_that_samples(tmp_path):
    job = train_job(Store(tmp_path), spec_of(ExactGradient(steps=1)))
    for text in together(_launched, job.path):
        assert "several processes share one training with a learner that samples" in text


@pytest.mark.parametrize(
    ("fields", "essential"),
    [
        ({"trainer": "dpo"}, "method modpo trains with trl-modpo"),
        ({"batch": 30}, "batch is a multiple of group"),
        ({"kl_in": "loss", "kl_estimator": "k3"}, "kl_in='reward'"),
        ({"trainer": "grpo"}, "kl_in='loss', kl_estimator='k3'"),
        ({"length": "token_mean"}, "length='sum'"),
        ({"micro_tokens": 400}, "use micro_batch"),
        ({"stop_cv": 0.1}, "a fixed number of steps"),
        ({"device": "cuda:3"}, "CUDA_VISIBLE_DEVICES"),
        ({"settings": {"use_vllm": True, "vllm_mode": "colocate"}}, "pip install 'trl[vllm]'"),
        ({"quantize": "4bit"}, "pip install 'trl[quantization]'"),
    ],
)
def test_what_it_cannot_be(fields, essential, monkeypatch):
    found = engine.importlib.util.find_spec
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None if name in ("vllm", "bitsandbytes") else found(name))
    with pytest.raises(ConfigError) as error:
        LEARNERS.build({"name": "trl", **TINY, **fields})
    assert essential in str(error.value)


@pytest.mark.parametrize(
    ("spec", "fields", "essential"),
    [
        ({"preference": None}, {}, "the embedded learner"),
        ({"frozen_adapters": ("a",)}, {}, "one fresh adapter at one preference"),
        ({"fresh": (4, 4)}, {}, "one fresh adapter at one preference"),
        ({"weighting": {"name": "gradient"}}, {}, "the embedded learner"),
        ({"aggregation": {"name": "pama"}}, {}, "the embedded learner"),
        ({}, {"micro_batch": 5}, "a multiple of processes x micro_batch"),
        ({}, {"settings": {"beta": 0.3}}, "learner trl sets beta itself"),
        ({}, {"settings": {"top_kk": 3}}, "did you mean 'top_k'"),
        ({}, {"settings": {"loss_type": "grpo"}}, "an argument of GRPOConfig and DPOConfig"),
        ({}, {"settings": {"zzz": 1}}, "TRL's documentation lists the arguments of RLOOConfig"),
        ({}, {"settings": {"steps_per_generation": 3}}, "learner trl sets steps_per_generation itself"),
        ({}, {"settings": {"report_to": "nobody"}}, "leave it out of settings (report_to)"),
        ({}, {"settings": {"eval_strategy": "steps"}}, "leave it out of settings (eval_strategy)"),
        ({}, {"settings": {"fsdp": "full_shard"}}, 'use optimizer="adam"'),
    ],
)
def test_trainings_that_it_refuses(spec, fields, essential, tmp_path):
    learner = Trl(**TINY, **fields)
    with pytest.raises(ConfigError) as error:
        learner.train(spec_of(learner, **spec), TASK, tmp_path)
    assert essential in str(error.value)


def test_without_the_package(tmp_path, monkeypatch):
    found = engine.importlib.util.find_spec
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None if name == "trl" else found(name))
    learner = Trl(**TINY)
    with pytest.raises(ConfigError, match=r"pip install 'paretune\[trl\]'"):
        learner.train(spec_of(learner), TASK, tmp_path)


def test_quantizing_needs_a_base_on_disk(tmp_path, monkeypatch):
    for name in ("trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer"):  # what is imported under the fake would believe it
        importlib.import_module(name)
    found = engine.importlib.util.find_spec
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name, *rest: name if name == "bitsandbytes" else found(name, *rest))
    learner = Trl(**TINY, quantize="4bit")
    with pytest.raises(ConfigError, match="a model with safetensors weights, on disk or on the hub"):
        learner.train(spec_of(learner), TASK, tmp_path)


@pytest.mark.parametrize(
    ("raised", "kind", "essential"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), TrainingError, "lower micro_batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), TrainingError, "not enough memory"),
        (RuntimeError("something else"), RuntimeError, "something else"),
        (RewardError("an objective", found="x", remedy="y"), RewardError, "an objective"),
    ],
)
def test_what_goes_wrong_while_it_runs(raised, kind, essential, tmp_path, monkeypatch):
    def observe(*_, **__):
        raise raised

    monkeypatch.setattr(ExactTask, "observe", observe)
    learner = Trl(**TINY)
    with pytest.raises(kind, match=essential):
        learner.train(spec_of(learner), TASK, tmp_path)


def test_a_step_that_is_no_number(tmp_path, monkeypatch):
    learner = Trl(**{**TINY, "lr": 1e30, "optimizer": "adam", "clip_norm": None})
    with pytest.raises(TrainingError, match="lower lr"):
        learner.train(spec_of(learner), TASK, tmp_path)


def test_too_much_unscored_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(ExactTask, "observe", lambda task, prompts, texts, *, streams: np.full((len(texts), 2), np.nan))
    learner = Trl(**TINY)
    with pytest.raises(RewardError, match="scores at least 90%"):
        learner.train(spec_of(learner), TASK, tmp_path)


@pytest.mark.parametrize("method", ["bridge", "router", "conditioned", "extended"])
def test_methods_of_sampled_preferences_are_refused_before_anything_is_trained(method):
    three = ExactTask(alphabet=4, length=2, prompt_count=2, width=32, layers=1, objective_count=3, rho=0.0)
    with pytest.raises(ConfigError, match="one fresh adapter at one preference"):
        METHODS.build(method).plan(three, Trl(**TINY), {}, 0)

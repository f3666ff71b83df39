"""A worker keeps the reference model between jobs: trainings have the bytes of a fresh process, and nothing of an earlier one stays."""

import gc
import sys
import time
import weakref
from dataclasses import replace

import pytest
import torch

from paretune.policy.lora.bank import LoraBank
from paretune.registry import LEARNERS, TASKS, describe, load_plugin
from paretune.runs.executors.local import Workers
from paretune.runs.jobs import train_job
from paretune.runs.store import Store
from paretune.tasks import base
from paretune.tasks.base import keep_reference, reference
from paretune.tasks.exact.task import ExactTask
from paretune.training.learners.exact import ExactGradient
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.spec import TrainSpec

TASK = ExactTask(rho=-0.8, seed=3, alphabet=3, length=3, prompt_count=2, width=32)
EXACT = ExactGradient(rank=4, steps=6)
SAMPLED = PolicyGradient(rank=4, samples=64, batch=16, group=4)
JOBS = ((EXACT, (0.6, 0.4)), (SAMPLED, (0.6, 0.4)), (EXACT, (0.1, 0.9)))


def spec_of(learner, preference, task=TASK):
    return TrainSpec(task=describe(task), learner=describe(learner), preference=preference, seed=1)


def train(learner, preference, work):
    work.mkdir()
    cost = learner.train(spec_of(learner, preference), TASK, work)
    return (work / "adapter_model.safetensors").read_bytes(), cost


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(base, "_kept", None)
    keep_reference()
    keep_reference()
    return lambda: list(base._kept.values())


@pytest.fixture
def loads(monkeypatch):
    found, plain = [], ExactTask.load
    monkeypatch.setattr(ExactTask, "load", lambda self: found.append(self) or plain(self))
    return found


def test_a_warm_worker_trains_the_bytes_of_a_fresh_one_and_loads_once(tmp_path, monkeypatch, loads):
    monkeypatch.setattr(base, "_kept", None)
    TASK.reference_logp_PR("train")  # which the task remembers
    loads.clear()
    fresh = [train(*job, tmp_path / f"fresh-{n}")[0] for n, job in enumerate(JOBS)]
    assert len(loads) == 3
    keep_reference()
    warm = [train(*job, tmp_path / f"warm-{n}")[0] for n, job in enumerate((*JOBS, *JOBS))]
    assert len(loads) == 4
    assert warm == fresh + fresh
    assert len(set(fresh)) == 3


def test_nothing_of_a_training_stays(tmp_path, monkeypatch, kept):
    banks, plain = [], LoraBank.__init__
    monkeypatch.setattr(LoraBank, "__init__", lambda self, model: banks.append(weakref.ref(self)) or plain(self, model))

    def alive():
        gc.collect()
        return sum(isinstance(thing, torch.nn.Parameter) for thing in gc.get_objects())

    counts = []
    for number, job in enumerate(JOBS):
        train(*job, tmp_path / str(number))
        counts.append(alive())
    assert len(banks) == 3
    assert all(bank() is None for bank in banks)
    assert len(set(counts)) == 1
    ((model, _, _),) = kept()
    assert not hasattr(model, "peft_config")
    assert [name for name, _ in model.named_parameters() if "lora" in name] == []


def test_copies_share_weights_and_nothing_else(kept, loads):
    (one, words), (other, _) = reference(TASK), reference(TASK)
    assert len(loads) == 1
    words.padding_side = "right"
    one.config.vocab_size = one.generation_config.eos_token_id = 77
    one.to(torch.bfloat16)
    third, tokenizer = reference(TASK)
    for name, weight in third.named_parameters():
        assert weight.dtype == torch.float32
        assert weight is not other.get_parameter(name)
        assert weight.data_ptr() == other.get_parameter(name).data_ptr()
    assert tokenizer.padding_side != "right"
    assert 77 not in (third.config.vocab_size, third.generation_config.eos_token_id)
    plain = TASK.load()[0].state_dict()
    assert all(torch.equal(weight, plain[name]) for name, weight in third.state_dict().items())


@pytest.mark.parametrize("write", [lambda p: p.data.add_(1e-3), lambda p: p.detach().mul_(2)])
def test_a_model_into_whose_weights_somebody_wrote_is_loaded_again(kept, loads, write):
    write(next(reference(TASK)[0].parameters()))
    plain = TASK.load()[0].state_dict()
    again = reference(TASK)[0].state_dict()
    assert all(torch.equal(weight, plain[name]) for name, weight in again.items())
    assert len(loads) == 3


def test_one_model_is_kept_by_what_it_is_and_how_it_is_held(kept, loads):
    held = {"dtype": "bfloat16", "place": lambda model: model.to(torch.bfloat16)}
    assert reference(TASK, **held)[0].dtype == torch.bfloat16
    for task, how in ((TASK, held), (TASK, {}), (replace(TASK, seed=4), {}), (TASK, {})):
        reference(task, **how)
        assert len(kept()) == 1
    assert len(loads) == 4


def test_a_model_whose_weights_are_no_plain_tensors_is_not_kept(kept, loads):
    def quantized(model):
        model.is_quantized = True
        return model

    for _ in range(2):
        assert reference(TASK, place=quantized)[0].is_quantized
        assert kept() == []
    assert len(loads) == 2


def test_a_process_that_is_no_worker_keeps_nothing(monkeypatch, loads):
    monkeypatch.setattr(base, "_kept", None)
    gone = weakref.ref(reference(TASK)[0])
    gc.collect()
    assert gone() is None
    reference(TASK)
    assert len(loads) == 2
    assert base._kept is None


def test_no_training_is_charged_for_loading_neither_its_own_nor_that_of_another(tmp_path, monkeypatch, kept):
    """The clock leaps 1,000 s while the first of them loads the model: both say how long they trained."""
    TASK.reference_logp_PR("train")
    plain, clock, leaps = ExactTask.load, time.monotonic, []
    monkeypatch.setattr(ExactTask, "load", lambda self: leaps.append(1000) or plain(self))
    monkeypatch.setattr(time, "monotonic", lambda: clock() + sum(leaps))
    seconds = [train(EXACT, (0.6, 0.4), tmp_path / str(n))[1].seconds for n in range(2)]
    assert leaps == [1000]
    assert max(seconds) < 500


PLUGIN = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from paretune.registry import TASKS
from paretune.tasks.exact.task import ExactTask

HERE = Path(__file__).parent

@TASKS.register("counted-exact")
@dataclass(frozen=True, kw_only=True)
class Counted(ExactTask):
    def load(self):
        with open(HERE / "loads", "a") as file:
            print(os.getpid(), file=file)
        return super().load()

"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sends signals")
def test_a_worker_process_loads_once_and_one_that_died_is_followed_by_one_that_loads_again(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_kept", None)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    load_plugin(tmp_path / "plugin.py")
    task = TASKS.build({**{k: v for k, v in describe(TASK).items() if k != "version"}, "name": "counted-exact"})
    store = Store(tmp_path / "root")
    specs = [spec_of(EXACT, (w, 1 - w), task) for w in (0.2, 0.5, 0.8)]

    def run(*some):
        for spec in some:
            pool.submit(train_job(store, spec))
        assert all(outcome.error is None for outcome in pool.outcomes())

    with store.lock(), Workers(store, 1) as pool:
        run(*specs[:2])
        assert len((tmp_path / "loads").read_text().split()) == 1
        pool._workers[0].process.kill()
        run(specs[2])
    pids = (tmp_path / "loads").read_text().split()
    assert len(pids) == len(set(pids)) == 2
    for number, spec in enumerate(specs):
        (tmp_path / str(number)).mkdir()
        LEARNERS.build(spec.learner).train(spec, task, tmp_path / str(number))
        found = store.artifact(spec.key).path / "adapter_model.safetensors"
        assert found.read_bytes() == (tmp_path / str(number) / "adapter_model.safetensors").read_bytes()

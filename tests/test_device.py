"""Tensors are on the policy's device: what a GPU runs, on a fake one that refuses to mix its tensors with the CPU's (see `fake_device`)."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from fake_device import There, fake_device
from learner_cases import SMALL, TASK, W, spec_of
from paretune.evaluation.evaluate import evaluate
from paretune.policy import base as policies
from paretune.policy.base import build_mixing
from paretune.policy.family import Family
from paretune.policy.lora import bank as bank_module
from paretune.policy.lora import linear
from paretune.policy.lora.bank import LoraBank
from paretune.policy.rollout import decode
from paretune.policy.rules import Identity
from paretune.policy.scoring import token_logp
from paretune.policy.self_test import check_model
from paretune.registry import METHODS
from paretune.tasks.base import first_device
from paretune.testing.methods import quick_learner, train_plan
from paretune.training.learners.exact import ExactGradient
from paretune.training.learners.modpo import Modpo
from paretune.training.learners.policy_gradient import PolicyGradient

SAMPLED = {**SMALL, "samples": 32, "device": "cuda"}
EXACT = {"rank": 2, "alpha": 4, "steps": 2, "device": "cuda"}
NASH = {"weighting": {"name": "gradient", "aggregator": "nash_mtl"}}
IDS = torch.arange(1, 13).view(2, 6)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
UNIFORMS = np.random.Generator(np.random.Philox(key=3)).random((4, 4))
MIXINGS = ["parameter", "logit", "hidden", "robust", "factor"]
MIXINGS += [{"name": "merged", "how": "dare-ties"}, {"name": "divergence", "divergence": "js"}, {"name": "routed", "experts": 3}]


@pytest.fixture
def device(monkeypatch):
    """A layer counts as quantized where its weight is no plain tensor, and the fake device's are none."""
    for module in (linear, bank_module):
        monkeypatch.setattr(module, "is_quantized", lambda layer: False)
    with fake_device() as made:
        yield made


def test_the_fake_device_refuses_what_a_gpu_refuses(device):
    here, there = torch.ones(2, 3), torch.ones(2, 3, device="cuda")
    assert there.device == here.to(device).device == device
    other = torch.zeros_like(there) > 0
    for mix in (lambda: here + there, lambda: there @ here.t(), lambda: torch.cat([there, here]), lambda: here[other]):
        with pytest.raises(RuntimeError, match="on one device"):
            mix()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert isinstance(there * torch.tensor(2.0), There)  # one number of the CPU
    assert isinstance(there[torch.arange(2)], There)  # indices of the CPU
    assert np.array_equal((there + 1).cpu().numpy(), 2 * np.ones((2, 3)))
    weight = torch.nn.Linear(3, 2).to("cuda").weight
    (torch.nn.functional.linear(there, weight).sum() ** 2).backward()
    assert isinstance(weight.grad, There)


@pytest.mark.parametrize(
    ("learner", "preference", "more"),
    [
        (PolicyGradient(**SAMPLED), W, {}),
        (PolicyGradient(**SAMPLED, optimizer="adam", checkpointing=True, micro_batch=8), None, {}),
        (PolicyGradient(**SAMPLED, epochs=2, kl_in="loss", kl_estimator="k3", normalize="group", ratio="token"), W, {}),
        (PolicyGradient(**SAMPLED, stop_cv=0.1, validate_every=1, validation_samples=4, temperature=0.7), W, {}),
        (PolicyGradient(**SAMPLED), W, NASH),
        (Modpo(**SAMPLED), W, {}),
        (ExactGradient(**EXACT), W, NASH),
    ],
    ids=["default", "checkpointing", "epochs", "validation", "gradients", "modpo", "exact"],
)
def test_trainings(device, learner, preference, more, tmp_path):
    spec = spec_of(learner, preference, **more)
    learner.train(spec, TASK, tmp_path)
    assert list(tmp_path.rglob("adapter_model.safetensors"))


def test_a_training_goes_on_from_its_checkpoint(device, tmp_path):
    """What is read back lies where the parameters do; Adam's count of steps stays on the CPU, as torch wants it."""
    learner = PolicyGradient(**{**SAMPLED, "checkpoint_every": 1, "log_every": 1}, optimizer="adam")

    def stop(record):
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.train(spec_of(learner), TASK, tmp_path, progress=stop)
    learner.train(spec_of(learner), TASK, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_adam_updates_all_tensors_together_on_a_gpu(device):
    """`fused=False` would be one small kernel after another, for each tensor; None is torch's own choice: all tensors at once."""
    learner, weights = PolicyGradient(optimizer="adam"), [torch.zeros(2, 2, device="cuda", requires_grad=True)]
    assert learner.new_optimizer(weights).defaults["fused"] is None
    assert learner.new_optimizer([torch.zeros(2, 2, requires_grad=True)]).defaults["fused"] is True


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_mixings_answer_as_on_a_cpu(device, mixing, tmp_path):
    make = tiny_models.llama
    paths = tiny_models.write_adapters(make, tmp_path, [{}, {}, {}])
    gates_NK = torch.tensor([[0.2, 0.5, 0.3]]).repeat(4, 1)
    found = []
    for place in ("cpu", "cuda"):
        policy = build_mixing(mixing, LoraBank.load(make().to(place), paths), tiny_models.TOKENIZER)
        assert policy.device.type == place
        check_model(policy)
        ids, mask = IDS.to(place), MASK.to(place)
        with torch.no_grad():
            made = decode(policy, ids, mask, gates_NK=gates_NK.to(place), max_new_tokens=4, uniforms_NT=UNIFORMS, group=2)
            logp_NT = token_logp(policy, ids, mask, made.tokens_NT, gates_NK=gates_NK.to(place), group=2, mask_NT=made.mask_NT)
        assert {x.device.type for x in (made.tokens_NT, made.mask_NT, made.logp_NT, made.stopped_N, logp_NT)} == {place}
        found.append([x.cpu().numpy() for x in (made.tokens_NT, made.logp_NT, logp_NT)])
    for one, two in zip(*found, strict=True):
        assert np.allclose(one, two, atol=1e-5)


def test_a_family_samples_and_is_loaded_on_a_device(device, tmp_path):
    learner = PolicyGradient(**SAMPLED)
    paths = {}
    for k, w_M in enumerate(((1.0, 0.0), (0.0, 1.0))):
        learner.train(spec_of(learner, w_M), TASK, tmp_path / str(k))
        paths[f"expert-{k}"] = tmp_path / str(k)
    policy = build_mixing("parameter", LoraBank.load(TASK.load()[0], paths), TASK.load()[1])
    family = Family(policy, Identity(), TASK.objectives, TASK.base(), paths, {}, max_new_tokens=2)
    family.save(tmp_path / "family")
    moved = Family.load(tmp_path / "family", device="cuda")
    assert (family.policy.device.type, moved.policy.device.type) == ("cpu", "cuda")
    ask = [partial(one.sample, TASK.prompts("test"), [0.4, 0.6], n=2) for one in (family, moved)]
    assert ask[0]() == ask[1]()


def test_a_family_is_searched_and_measured_where_it_was_trained(device, monkeypatch, tmp_path):
    """Not on the CPU beside an idle GPU; and with the numbers of the CPU."""
    method, learner, found = METHODS.build("calibrated"), dataclasses.replace(quick_learner(steps=2), device="cpu"), []
    done = train_plan(method, TASK, learner, tmp_path, seed=0)
    for place in ("cpu", "cuda"):
        monkeypatch.setattr(policies, "first_device", lambda place=place: place)
        family = method.policy(TASK, learner, done, 0)
        assert family.policy.device.type == place
        made = [evaluate(TASK, family, splits=("test",), samples=8, exact=exact).curves["test"] for exact in (True, False)]
        found.append([numbers for curve in made for numbers in (curve.rewards_WSM, curve.kl_WS)])
    for one, two in zip(*found, strict=True):
        assert np.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize(("there", "name"), [(True, "cuda"), (False, "cpu")])
def test_models_go_to_the_first_gpu_where_there_is_one(monkeypatch, there, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert first_device() == name


def test_the_gpu_script(device, monkeypatch):
    """Training and decoding with `--device cuda`; what torch.cuda would say of memory is made up."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import gpu

    waits = []
    said = {"synchronize": lambda: waits.append(1), "empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None}
    said |= {"memory_allocated": lambda: 2**20, "max_memory_allocated": lambda: 3 * 2**20, "mem_get_info": lambda: (2**36, 2**37)}
    for name, answer in said.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    sizes, place = dataclasses.replace(gpu.SMALL, batches=(2,)), gpu.Place("cuda")
    step = gpu.ours(sizes, place, gpu.TINY)
    assert step["mebibytes"] == 2.0
    assert all(value > 0 for value in step.values())
    figures = {}
    gpu.decoding(sizes, place, lambda: 100.0, figures, {})
    gpu.large(sizes, place, lambda: 100.0, figures, {})
    assert figures["gpu_logit_vs_generate_b2"] > 0
    assert figures["gpu_7b_step_mib"] == 2.0
    assert len(waits) > 50
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**37))
    with pytest.raises(gpu.Skip, match="needs 40 GiB of free memory on the device; found: 1"):
        gpu.large(sizes, place, lambda: 100.0, figures, {})
    sys.modules.pop("gpu")

"""A base whose weights are split over two processes computes what one that is whole computes: tokens, log-probabilities, gradients."""

import contextlib
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import distributed
from transformers import PreTrainedTokenizerFast

import tiny_models
from paretune.errors import ConfigError
from paretune.policy.lora.bank import LoraBank, decoder_layers
from paretune.policy.lora.decoder import recomputed
from paretune.policy.lora.shard import is_sharded, shard
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.rollout import decode
from paretune.policy.scoring import token_logp
from paretune.policy.self_test import paths
from paretune.registry import describe
from paretune.runs.executors.launch import launch
from paretune.runs.jobs import train_job
from paretune.runs.store import Store
from paretune.seeds import generator
from paretune.tasks.exact.task import ExactTask
from paretune.tasks.pretrained import load_pretrained, loaded_in_shares
from paretune.training.learners import embedded
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.processes import joined, launched
from paretune.training.spec import TrainSpec
from processes import together

GROUP, NEW, SHORT = 2, 12, 3
KINDS = {"llama": tiny_models.llama, "tied": partial(tiny_models.llama, tie_word_embeddings=True), "gpt2": tiny_models.gpt2}  # Conv1D
TASK = ExactTask(alphabet=4, length=3, prompt_count=4, width=32, layers=2)
SMALL = {"samples": 24, "batch": 12, "group": 2, "rank": 4, "processes": 2, "device": "cpu"}
WAYS = ("padded rows", "one sequence", "head in pieces", "recomputed")


def made(model):
    bank, rng = LoraBank.attach(model, names=("a", "b"), seed=0, rank=4), generator(0, "adapters")
    with torch.no_grad():
        for weight in bank.parameters():
            weight.copy_(torch.from_numpy(rng.normal(0, 0.2, tuple(weight.shape))))
    return ParameterMix(bank, tiny_models.TOKENIZER)


def batch(rank):
    """The prompts, gates and uniforms of one process. All responses of the second end after SHORT tokens: EOS has the last number."""
    rng = generator(1, "batch", rank)
    ids_PT = torch.from_numpy(rng.integers(0, 16, (2, 5)))
    mask_PT = torch.ones_like(ids_PT)
    mask_PT[1, :2] = 0
    gates_NK = torch.from_numpy(rng.dirichlet([1, 1], 2)).float().repeat_interleave(GROUP, 0)
    uniforms_NT = rng.uniform(0, 0.8, (2 * GROUP, NEW))
    if rank == 1:
        uniforms_NT[:, SHORT - 1] = 1 - 1e-9
    return ids_PT, mask_PT, gates_NK, uniforms_NT


def computed(policy, rank):
    """What decoding, and each way of scoring, gives: arrays by name."""
    ids_PT, mask_PT, gates_NK, uniforms_NT = batch(rank)
    drawn = decode(policy, ids_PT, mask_PT, gates_NK=gates_NK, max_new_tokens=NEW, uniforms_NT=uniforms_NT, group=GROUP)
    found = {"tokens": drawn.tokens_NT, "drawn": drawn.logp_NT, "mask": drawn.mask_NT}
    for way in WAYS:
        rows, settings = (ids_PT, mask_PT), {"packed": way == "one sequence", "mask_NT": drawn.mask_NT, "group": GROUP}
        if way == "head in pieces":
            settings["at_once"] = 20
        if way == "recomputed":
            rows, settings["group"] = tuple(x.repeat_interleave(GROUP, 0) for x in rows), 1
        policy.bank.base.zero_grad()
        with recomputed(policy.bank) if way == "recomputed" else contextlib.nullcontext():
            logp_NT = token_logp(policy, *rows, drawn.tokens_NT, gates_NK=gates_NK, **settings)
        ((logp_NT * drawn.mask_NT).sum(1) * torch.arange(1, 5)).sum().backward()
        found[way] = logp_NT.detach() * drawn.mask_NT
        found |= {f"{way}: gradient {i}": weight.grad for i, weight in enumerate(policy.bank.parameters())}
    return {name: value.numpy() for name, value in found.items()}


def sharded(kinds, folder):
    distributed.init_process_group("gloo")
    answers = {}
    for kind in kinds:
        model = KINDS[kind]()
        if kind != "gpt2":
            with loaded_in_shares(shard):
                model = load_pretrained(str(folder / kind))[0]
            assert is_sharded(model), "it was read whole"
        shard(model)
        policy = made(model)
        split = [p for layer in decoder_layers(model)[1] for name, p in layer.named_parameters() if "lora_" not in name]
        held = sum(weight.to_local().numel() for weight in split) / sum(weight.numel() for weight in split)
        off = dict(paths(policy))
        answers[kind] = computed(policy, distributed.get_rank()), held, max(off.values())
    return answers


def test_two_processes_with_halves_compute_what_one_with_the_whole_does(tmp_path):
    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*"abcdefghijklmnop", "<eos>"])}, unk_token="<eos>"))
    for kind in ("llama", "tied"):  # of these each process reads its shares, of several files; gpt2 is split in memory
        KINDS[kind]().save_pretrained(tmp_path / kind, max_shard_size="20KB")
        PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", pad_token="<eos>").save_pretrained(tmp_path / kind)
    answers = together(sharded, tuple(KINDS), tmp_path)
    for rank, answer in enumerate(answers):
        assert isinstance(answer, dict), answer
        for kind, make in KINDS.items():
            (found, share, off), want = answer[kind], computed(made(make()), rank)
            assert share < 0.53  # rows that do not divide are padded
            assert off < 1e-4
            assert found["tokens"].shape == (4, NEW)  # as long as the longest of all processes, so that all score equally often
            assert want["tokens"].shape[1] == (NEW if rank == 0 else SHORT)
            for name, value in want.items():
                wide = value if name.endswith(tuple("0123456789")) else found[name][:, : value.shape[1]]
                wide = found[name] if wide is value else wide
                np.testing.assert_allclose(wide, value, rtol=0, atol=1e-5, err_msg=f"{kind}, process {rank}: {name}")
            assert np.abs(want[f"{WAYS[0]}: gradient 0"]).max() > 0.01


def test_what_cannot_be_sharded_is_refused():
    model = tiny_models.llama()
    model.config.num_hidden_layers = 3  # no list of three layers
    with pytest.raises(ConfigError, match="sharded by its decoder's layers"):
        shard(model)
    model = tiny_models.llama()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="weights in floating point"):
        shard(model)


def trained(folder, runs):
    """The adapters that two processes train, by the names of runs: settings of the learner, and of the training."""
    store, rank, size = launched()
    with joined(rank, size, store, timeout=60, device="cpu"):
        for name, (settings, about) in runs.items():
            learner = PolicyGradient(**{**SMALL, **settings})
            spec = TrainSpec(task=describe(TASK), learner=describe(learner), seed=3, **about)
            work = folder / name / str(rank)
            work.mkdir(parents=True)
            learner.train(spec, TASK, work)


def test_a_training_on_a_sharded_base_is_that_on_a_whole_one(tmp_path):
    """Three passes over two processes: one of them computes the last for nothing, because the other cannot gather alone."""
    several, gramian = {"preference": None}, {"preference": (0.5, 0.5), "weighting": {"name": "influence"}}
    ways = {
        "bridge-like": ({"micro_batch": 4}, several),
        "recomputed": ({"checkpointing": True, "micro_batch": 6}, several),
        "gradients of each": ({"micro_batch": 4}, gramian),
    }
    runs = {f"{name} {shard}": ({**fields, "shard": shard}, about) for name, (fields, about) in ways.items() for shard in (False, True)}
    assert together(trained, tmp_path, runs) == [None, None]
    for name in ways:
        files = [sorted((tmp_path / f"{name} {shard}" / "0").rglob("*.safetensors")) for shard in (False, True)]
        for whole, shares in zip(*files, strict=True):
            one, other = load_file(whole), load_file(shares)
            for key, value in one.items():
                torch.testing.assert_close(other[key], value, rtol=0, atol=1e-5)
            assert any(float(value.abs().max()) > 1e-3 for key, value in one.items() if "lora_B" in key)


def dies_while_it_loads(folder):
    if os.environ["RANK"] == "1":
        embedded.check_cast = lambda model, dtype: os.kill(os.getpid(), signal.SIGKILL)
    trained(folder, {"one": ({"shard": True}, {"preference": (0.5, 0.5)})})


def test_a_process_that_is_killed_while_it_loads_its_share_is_said_to_be(tmp_path):
    """Memory is short there if anywhere; as `Lost`, the training starts once more."""
    said = together(dies_while_it_loads, tmp_path)[0]
    assert "processes.Lost: a training goes on while all of its processes do" in said
    assert "a process has ended, seen by process 0 of 2" in said


def test_a_base_is_sharded_over_several_processes():
    with pytest.raises(ConfigError, match="shard needs processes, two at least"):
        PolicyGradient(shard=True)
    with pytest.raises(ConfigError, match=r"learner\.shard=true in one process"):
        PolicyGradient(shard=True, processes=2).reference(TASK, "cpu")


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_accelerates_own_sharding_is_refused_where_it_would_load_random_weights(engine, tmp_path, monkeypatch):
    spec = TrainSpec(task=describe(TASK), learner=describe(PolicyGradient(**SMALL)), preference=(1.0, 0.0), seed=0)
    job = train_job(Store(tmp_path), spec)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"learner pg under accelerate's settings for {engine}"):
        launch(job.path)

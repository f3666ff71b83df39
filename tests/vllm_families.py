"""A small Llama with random weights and families of random adapters on it, saved as vLLM is given them."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import torch

from paretune.policy.base import build_mixing
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.rules import BridgeRule
from paretune.seeds import forked_torch
from paretune.types import Objectives
from tiny_models import write_adapters
from tiny_rewards import gpt_tokenizer, save

NAMES = ("polite", "brief")
SETTINGS = [{}, {"r": 3, "lora_alpha": 5}, {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}]
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@functools.cache
def base():
    """Its vocabulary is the tokenizer's; an attention head has 32 numbers, as vLLM's kernels want it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(gpt_tokenizer()), max_position_embeddings=256, eos_token_id=0, bos_token_id=0, **sizes)
    with forked_torch(0):
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0, 0.1)
    return model


def fresh():
    return copy.deepcopy(base())


def saved(folder: Path, mixing="parameter", rule=None, settings=SETTINGS, name="family") -> tuple[Path, dict[str, Path]]:
    """A family's folder (with its base beside it), and the folders of its adapters."""
    if not (folder / "base").exists():
        save(folder / "base", base(), gpt_tokenizer(CHAT))
    paths = write_adapters(fresh, folder / f"{name}-adapters", settings, scale=0.1)
    tokenizer = gpt_tokenizer(CHAT)
    policy = build_mixing(mixing, LoraBank.load(fresh(), paths), tokenizer)
    objectives = Objectives(NAMES, (0.0,) * 2, (1.0,) * 2)
    Family(policy, rule or BridgeRule(), objectives, {"model": str(folder / "base")}, paths, max_new_tokens=8).save(folder / name)
    return folder / name, paths


def greedy(model, ids: list[int], count: int) -> list[int]:
    """What a model says greedily, token by token without a cache."""
    said: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            said.append(int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
    return said

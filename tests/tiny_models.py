"""Tiny random causal LMs, adapters written by PEFT itself, and dense oracles that share no code with `paretune.policy.lora.bank`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from paretune.seeds import forked_torch

VOCAB = 17
TOKENIZER = SimpleNamespace(eos_token_id=16, pad_token_id=16)


def llama(dtype=torch.float32, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "bos_token_id": None}
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, eos_token_id=16, pad_token_id=16, **{**settings, **changes})
    with forked_torch(0):
        return LlamaForCausalLM(config).eval().to(dtype)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    with forked_torch(0):  # a head that is tied, linear layers that are Conv1D with bias
        config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=16, bos_token_id=16)
        return GPT2LMHeadModel(config).eval()


def gemma2(cap: float | None):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with forked_torch(0):
        return Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, final_logit_softcapping=cap, eos_token_id=16, **sizes, **heads)).eval()


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with forked_torch(0):  # its feed-forward layers take (rows * tokens, I)
        return OPTForCausalLM(OPTConfig(vocab_size=VOCAB, max_position_embeddings=64, eos_token_id=16, pad_token_id=16, **sizes)).eval()


def write_adapters(make, folder: Path, settings: list[dict], seed: int = 0, scale: float = 0.3) -> dict[str, Path]:
    """Random adapters e0, e1, ... in directories that PEFT's own `save_pretrained` wrote."""
    from peft import LoraConfig, get_peft_model

    paths = {}
    for k, setting in enumerate(settings):
        base = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        with forked_torch(seed * 100 + k):
            model = get_peft_model(make(), LoraConfig(**{**base, **setting}))
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, 0, scale)
        paths[f"e{k}"] = folder / f"e{k}"
        model.save_pretrained(paths[f"e{k}"])
    return paths


def peft_logits(make, path: Path, ids_NT: Tensor) -> Tensor:
    """What PEFT says that the adapter in `path` computes."""
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(make(), str(path)).eval()(input_ids=ids_NT).logits


def dense_soup(make, paths: dict[str, Path], weights: Tensor):
    """A fresh model with W + sum_k w_k (alpha_k / r_k) B_k A_k (or / sqrt r_k) written into its weights, read from the files alone."""
    import json

    from safetensors.torch import load_file

    model = make()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for path, weight in zip(paths.values(), weights, strict=True):
            config = json.loads((path / "adapter_config.json").read_text())
            tensors = load_file(path / "adapter_model.safetensors")
            for name, a_rI in tensors.items():
                if name.endswith("lora_A.weight"):
                    root = len(a_rI) ** 0.5 if config["use_rslora"] else len(a_rI)
                    delta_OI = tensors[name.replace("lora_A", "lora_B")] @ a_rI * (config["lora_alpha"] / root) * weight
                    module = modules[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]
                    module.weight += delta_OI if isinstance(module, torch.nn.Linear) else delta_OI.t()
    return model


def some_ids(rows: int = 4, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB - 1, (rows, length), generator=torch.Generator().manual_seed(seed))


def some_gates(*shape: int, seed: int = 0) -> Tensor:
    """On the simplex along the last axis."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference of the log-probabilities."""
    return float((a.detach().float().log_softmax(-1) - b.detach().float().log_softmax(-1)).abs().max())

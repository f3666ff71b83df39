"""The page docs/models.md: which architectures of transformers pass the self-test, tried with tiny random models of each.

    python tools/models.py            write the page anew (a few minutes)
    python tools/models.py llama opt  print the lines of some of them

Every causal LM class that transformers maps is made from its configuration with tiny sizes, given two random adapters, and run through
`paretune.policy.self_test`. "right" passed; "refused" is what a user would read; "not made" could not be built small or needs a package.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from paretune.errors import ParetuneError
from paretune.policy.base import build_mixing
from paretune.policy.lora.bank import LoraBank
from paretune.policy.self_test import BOUNDS, check_model, paths
from paretune.seeds import forked_torch
from paretune.tasks.pretrained import check_config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "embedding_size": 32, "ffn_dim": 48,
    "intermediate_size": 48, "n_inner": 48, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "rotary_dim": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "sliding_window": 4, "window_size": 4,
    "num_global_key_value_heads": 2, "global_head_dim": 8, "lru_width": 32, "attention_window_size": 4, "attn_layer_period": 2,
    "attn_layer_offset": 1, "mamba_dt_rank": 8, "adapter_rank": 4, "image_size": 16, "patch_size": 8, "depth": 2, "num_heads": 4,
    "out_hidden_size": 32, "pooling_kernel_size": 1, "mm_tokens_per_image": 4, "chunk_size": 4, "mamba_chunk_size": 4,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {  # what a model type needs beside them
    "bamba": {"attn_layer_indices": [1]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "per_layer_config": {}},
}
LARGEST = 5_000_000  # parameters
TOKENIZER = SimpleNamespace(eos_token_id=2, pad_token_id=0)


def tiny(name: str) -> Any:
    """A random model of the architecture with small sizes."""
    config = shrunk(CONFIG_MAPPING[name]())
    check_config(name, config)
    with torch.device("meta"):
        size = sum(p.numel() for p in _made(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters with the sizes of this script")
    with forked_torch(0):
        return _made(config).eval().float()


def shrunk(config: Any) -> Any:
    """The configuration with the sizes of this script, its parts for pictures and sound too; of layers of several kinds, one of each."""
    known = config.to_dict()
    given = {key: value for key, value in SIZES.items() if key in known and not isinstance(known[key], (dict, str, bool))}
    for key in ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "block_types"):
        if known.get(key):
            kinds = list(dict.fromkeys(known[key]))[:2]
            given[key] = kinds * (2 // len(kinds))
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    if "kv_lora_rank" in known:  # latent attention has keys of its own for every head
        given["num_key_value_heads"] = SIZES["num_attention_heads"]
    given |= {name: shrunk(part) for name, part in parts.items() if isinstance(part, transformers.PreTrainedConfig)}
    given |= OWN.get(config.model_type, {})
    try:
        return type(config)(**given)  # what follows from other sizes is computed
    except Exception:
        for key, value in given.items():
            with contextlib.suppress(AttributeError, RuntimeError, ValueError):  # some are computed
                setattr(config, key, value)
        return config


def _made(config: Any) -> Any:
    try:
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def line_of(name: str) -> tuple[str, str]:
    """("right" | "refused" | "not made", details)."""
    try:
        model = tiny(name)
    except ParetuneError as error:
        return "refused", error.found.partition(": ")[2]
    except Exception as error:
        return "not made", f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
    try:
        bank = LoraBank(model)
        for k in range(2):
            bank.add(f"a{k}", seed=k, rank=2, alpha=4, targets="all-linear")
        policy = build_mixing("parameter", bank, TOKENIZER)
        check_model(policy)
    except ParetuneError as error:
        return "refused", error.found
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
    return "right", f"{max(off for _, off in paths(policy)):.1g} nats"


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types; all without")
    chosen = parser.parse_args().names
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names = chosen or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = {}
    for name in names:
        found[name] = line_of(name)
        print(f"{name:24} {found[name][0]:9} {found[name][1]}", flush=True)
    if chosen:
        return 0
    counts = {kind: sum(one[0] == kind for one in found.values()) for kind in ("right", "refused", "crashed", "not made")}
    lines = [
        "# Models that were tried",
        "",
        f"Made by `python tools/models.py` with transformers {transformers.__version__}: a tiny random model of every causal LM class,",
        f'with two adapters on "all-linear", through the self-test (bound: {BOUNDS[torch.float32]:g} nats per token in float32,',
        "less where a model's log-probabilities differ less than a nat). What is right computes what its plain forward does.",
        "",
        f"- right: {counts['right']}",
        f"- refused before anything is trained: {counts['refused']}",
        f"- stopped by an error of another library: {counts['crashed']}",
        f"- could not be made small here: {counts['not made']}",
        "",
        "| model type | result | largest difference, or why |",
        "|---|---|---|",
        *(f"| `{name}` | {kind} | {detail.replace('|', '/')} |" for name, (kind, detail) in found.items()),
    ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A tiny Llama with random weights as a GGUF file, written by the package gguf in the layout of llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from paretune.seeds import forked_torch
from recipe_files import example_module
from tiny_rewards import save

HEADS = {"attn_q": 4, "attn_k": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def tiny(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer, saved in `folder` as safetensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = example_module("make_model")
    tokenizer = made.make_tokenizer(made.dialogues(), vocabulary=400)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True, **SIZES, **ends
    )
    with forked_torch(0):
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0, 0.2)
    save(folder, model, tokenizer)
    return model, tokenizer


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    *,
    kind: str = "F32",
    architecture: str = "llama",
    tokens: bool = True,
    template: bool = True,
    more: dict[str, Any] | None = None,
) -> Path:
    """`kind` is the type of matrices (F32, F16, Q8_0, Q4_0, ...); `more` are tensors besides."""
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, model.config)
    if tokens:
        _add_tokenizer(writer, tokenizer, template=template)
    quantized = gguf.GGMLQuantizationType[kind]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        there, array = str(names.get_name(name, try_suffixes=(".weight",))), tensor.numpy()
        heads = HEADS.get(there.split(".")[-2])
        if heads is not None:  # llama.cpp rotates neighbors, transformers halves
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if array.ndim == 2 and kind != "F32":
            writer.add_tensor(there, gguf.quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(there, array)
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, *, template: bool) -> None:
    known = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(known)
    writer.add_token_types([control if token == tokenizer.eos_token else normal for token in known])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if template:
        writer.add_chat_template(tokenizer.chat_template)

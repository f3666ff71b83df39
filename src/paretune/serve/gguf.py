"""A family's adapters as GGUF files for llama.cpp, which takes a scale for each adapter per request: scales are the family's gates.

    export_gguf("runs/families/bridge-1a2b3c4d", "bridge-gguf", "polite=.7,brief=.3")

writes one file per adapter (adapter.type "lora") and scales.json: the command's `--lora-scaled`, and the `lora` field of a request, at that
preference. Only bases of the Llama architecture are written: of others llama.cpp's names and its order of rows are not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paretune.errors import ConfigError
from paretune.files import check_new, disk_errors, new_folder
from paretune.hub import located
from paretune.policy.card import found_base
from paretune.policy.lora.files import read_factors
from paretune.serve.vllm.families import GatedFamily

__all__ = ["export_gguf"]


def export_gguf(path: str | Path, out: str | Path, preference: str, *, model: str | None = None) -> dict[str, Any]:
    """Write the family in `path` into the new folder `out`; returns what scales.json says."""
    out = Path(out)
    check_new(out, "an export is written into a new folder")
    try:
        import gguf
    except ImportError as error:
        remedy = "pip install 'paretune[gguf]'"
        raise ConfigError("GGUF files are written by the package gguf", found="it is not installed", remedy=remedy) from error
    family = GatedFamily.read(path)
    gates_K = family.gates(preference, {})
    config = _config(found_base(family.base, family.path, model))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    files = {name: f"{k}-{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)}.gguf" for k, name in enumerate(family.adapters)}
    scales = [{"id": k, "scale": float(gate)} for k, gate in enumerate(gates_K)]
    line = "--lora-scaled " + ",".join(f"{file}:{gate:.6g}" for file, gate in zip(files.values(), gates_K, strict=True))
    told = {"preference": preference, "adapters": files, "gates": gates_K.tolist(), "command": line, "request": {"lora": scales}}
    with disk_errors(out, "an export"), new_folder(out) as aside:
        for name, folder in family.adapters.items():
            _write(gguf, aside / files[name], name, read_factors(folder), names, config)
        (aside / "scales.json").write_text(json.dumps(told, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return told


def _config(base: Mapping[str, Any]) -> Any:
    """The base model's configuration, if it is a Llama."""
    rule = "GGUF adapters are written for bases of the Llama architecture"
    remedy = "export the preference merged, and convert it with llama.cpp's own tools"
    if "model" not in base:
        raise ConfigError(rule, found="a task's own model", remedy=remedy)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(**located(str(base["model"])), revision=base.get("revision"))
    if config.model_type != "llama":
        raise ConfigError(rule, found=f"model_type {config.model_type!r}", remedy=remedy)
    return config


def _write(gguf: Any, path: Path, name: str, factors: Mapping[str, tuple[Any, Any, float]], names: Any, config: Any) -> None:
    """One adapter. llama.cpp multiplies B A by alpha / rank of the layer, so a scale that differs between layers goes into B."""
    a_rI, _, scale = next(iter(factors.values()))
    alpha = scale * len(a_rI)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for layer, (a_rI, b_Or, scale) in factors.items():
        there = names.get_name(layer)
        if there is None:
            remedy = "export the preference merged"
            raise ConfigError("llama.cpp knows the adapted layers of a Llama", found=f"{layer} in {name}", remedy=remedy)
        b = (b_Or.float() * (scale * len(a_rI) / alpha)).numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(there.rpartition(".")[2])
        if heads is not None:  # llama.cpp rotates neighbors, transformers halves
            b = b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
        writer.add_tensor(f"{there}.weight.lora_a", a_rI.float().numpy())
        writer.add_tensor(f"{there}.weight.lora_b", np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""One preference of a family as files that transformers, PEFT and vLLM load: a merged checkpoint, or one plain LoRA adapter.

    export(family, "helpful-70", {"helpful": 0.7, "brief": 0.3})                   a whole model, merged in float32
    export(family, "helpful-70-lora", "helpful=.7,brief=.3", kind="adapter")       the exact change, its rank grown

What is written computes what the family computes at that preference. Where no single set of weights does, nothing is written and an
error says why: a mixture of predictions or hidden states is one set of weights only where one expert has it alone. The folder has a
README.md (a model card) and paretune.json, the same for machines. It appears whole or not at all.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError, nearest
from paretune.files import check_new, disk_errors, new_folder
from paretune.hub import is_local
from paretune.policy.base import Policy, Weights
from paretune.policy.card import no_single
from paretune.policy.family import Family
from paretune.policy.lora.linear import base_weight
from paretune.serve.model_card import Exported, model_card, neutral_sampling, record
from paretune.types import Preference

__all__ = ["KINDS", "check_request", "export", "single_weights"]

KINDS = ("merged", "adapter")
DTYPES = ("float32", "bfloat16", "float16")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,63}")
SHARD = "2GB"  # of a merged checkpoint: what is in memory beside the model


def export(
    family: Family,
    out: str | Path,
    preference: Preference | Mapping[str, float] | Sequence[float] | str,
    *,
    kind: str = "merged",
    dtype: str | None = None,
    shard: str = SHARD,
    results: str | Path | None = None,
    license: str | None = None,
) -> Exported:
    """Write the family's policy at `preference` into the new folder `out`, as "merged" or "adapter".

    `dtype` (float32, bfloat16, float16) is what weights are stored in, by default what they are; merging is in float32 in any case,
    and a quantized base is dequantized: a merged export is as large as its model was before.
    `license` stands on the card, as the hub writes it ("apache-2.0"); whether it may be given, the base model's says.
    `results` is the family's folder or a run directory: measurements of this family found there go onto the card. The family stays
    as it is, and beside it no more than one shard of a checkpoint is in memory (see `_write_model` for the exception).
    """
    out = check_request(out, kind, dtype, license)
    if isinstance(preference, Preference):
        preference = dict(zip(preference.names, preference.weights, strict=True))
    asked = Preference.of(family.objectives.names, preference)
    weights = single_weights(family, asked.w_M)
    if kind == "adapter" and weights.how in ("base", "merge"):
        found = (
            "the reference alone"
            if weights.how == "base"
            else f"mixing {family.policy.mixing!r}, whose changes are dense: they have no low rank"
        )
        raise ConfigError("an adapter is a change of low rank", found=found, remedy="export it merged")
    try:
        out.resolve().with_name(f".wip-{out.resolve().name}").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
        raise ConfigError("an export is written where a folder can be made", found=found, remedy="choose another --out") from error
    with disk_errors(out, "an export"), new_folder(out) as aside:
        rank = _write(family.policy, weights, aside, kind, getattr(torch, dtype) if dtype else None, shard, family.base)
        stored = dtype or str(family.policy.model.dtype if kind == "merged" else torch.float32).removeprefix("torch.")
        made = Exported(out, kind, dict(zip(asked.names, asked.weights, strict=True)), rank, stored, weights.prefix, license)
        gates = weights.gates_K.tolist() if weights.how != "base" else []
        facts = record(family, made, how=weights.how, gates=gates, results=results)
        (aside / "paretune.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(model_card(family, made, facts), encoding="utf-8")
    return made


def check_request(out: str | Path, kind: str, dtype: str | None, license: str | None = None, *, kinds: Sequence[str] = KINDS) -> Path:
    """The new folder. ConfigError for what is wrong with a request whatever the family is; `kinds` are those that the caller has."""
    out = Path(out)
    for what, given, known in (("kind of export", kind, kinds), ("dtype", dtype or DTYPES[0], DTYPES)):
        if given not in known:
            raise ConfigError(f"a {what} is one of {', '.join(known)}", found=repr(given), remedy=nearest(given, known))
    if license is not None and not LICENSE.fullmatch(license):
        remedy = 'for example apache-2.0, mit, llama3.1, or other; the hub lists them under "Licenses"'
        raise ConfigError("a license is the identifier that the hub knows it by", found=repr(license), remedy=remedy)
    check_new(out, "an export is written into a new folder")
    return out


def single_weights(family: Family, w_M: np.ndarray) -> Weights:
    """The set of weights that computes what the family does at a preference. Raises ConfigError where there is none."""
    policy, rule = family.policy, family.rule
    if rule.per_prompt:
        raise no_single(f"rule {rule.registered_name!r} sets the gates anew for every prompt", vertex=False)
    gates_K = torch.from_numpy(family.gates(np.asarray(w_M)[None])[0]).float().to(policy.device)
    found = policy.single_weights(gates_K) if policy.bank.layers else Weights("base", gates_K)
    if isinstance(found, str):
        raise no_single(f"mixing {policy.mixing!r}: {found}", vertex=policy.vertices_are_experts)
    return found


def _write(
    policy: Policy, weights: Weights, folder: Path, kind: str, dtype: torch.dtype | None, shard: str, base: Mapping[str, Any]
) -> int | None:
    """The weights and what is loaded with them; returns the rank of an adapter."""
    if kind == "adapter":
        name = base.get("model")
        hub = name if name is not None and not is_local(name) else None
        return policy.bank.export(weights.gates_K, folder, how=weights.how, dtype=dtype, base=hub)
    with torch.inference_mode(False), torch.no_grad():
        _write_model(policy, _merged(policy, weights), folder, dtype or policy.model.dtype, shard)
    policy.tokenizer.save_pretrained(folder)
    neutral_sampling(policy).save_pretrained(folder)  # in place of the base model's, which engines would apply to the policy
    return None


def _merged(policy: Policy, weights: Weights) -> dict[str, Callable[[], Tensor]]:
    """Name of a parameter of the base model -> what makes its merged value, in float32 or wider."""
    if weights.how == "base":
        return {}
    return {f"{layer.name}.weight": functools.partial(policy.merged_weight, layer, weights) for layer in policy.bank.layers}


class _Merging(dict[str, Tensor]):
    """The base model's parameters by name. Who takes one out gets it merged and in the wanted dtype, made at that moment."""

    def __init__(self, tensors: Mapping[str, Tensor], merged: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype):
        super().__init__(tensors)
        self._merged, self._dtype = merged, dtype
        self.waiting, self.bytes = set(merged), 0

    def value(self, name: str, tensor: Tensor) -> Tensor:
        made = self._merged[name]() if name in self.waiting else tensor
        self.waiting.discard(name)
        made = made.to(self._dtype) if made.is_floating_point() else made
        self.bytes += made.nbytes
        return made

    def pop(self, name: str) -> Tensor:  # type: ignore[override]
        return self.value(name, super().pop(name))


def _write_model(policy: Policy, merged: Mapping[str, Callable[[], Tensor]], folder: Path, dtype: torch.dtype, shard: str) -> None:
    """The model by its own `save_pretrained`, which takes its parameters out of a dict shard by shard.

    It does not where a checkpoint's names differ from the model's: it rebuilds the dict then, so everything is merged before. A
    quantized model would write its own weights: one of its class without any stands for it, and all of them are dequantized before.
    """
    model, tensors = _unquantized(policy.model) if policy.bank.quantized else policy.model, _plain_state(policy)
    state = _Merging(tensors, merged, dtype)
    places: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        places.setdefault(tensor.data_ptr(), []).append(name)
    untied = [name for names in places.values() if len(names) > 1 for name in names if name in merged]
    for name in untied:  # a head that is tied to the embeddings, and has an adapter of its own
        state[name] = state.value(name, state[name])
    as_named = getattr(model, "_weight_conversions", None) == []
    if not as_named:
        state = _Merging({name: state.value(name, tensor) for name, tensor in state.items()}, {}, dtype)
    settings = {"max_shard_size": shard, "save_original_format": not as_named}
    model.save_pretrained(folder, state_dict=state, **settings)
    if state.waiting:
        raise AssertionError(f"{len(state.waiting)} parameters were written without their change, such as {min(state.waiting)}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config") or {}):
        part |= {"dtype": str(dtype).removeprefix("torch."), **({"tie_word_embeddings": False} if untied else {})}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text(encoding="utf-8"))
        listed["metadata"]["total_size"] = state.bytes
        index.write_text(json.dumps(listed, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plain_state(policy: Policy) -> dict[str, Tensor]:
    """The base model's parameters and buffers under the names that they have without adapters."""
    plain, layers = {}, {layer.name for layer in policy.bank.layers}
    for name, tensor in policy.model.state_dict().items():
        owner, wrapped, leaf = name.partition(".base_layer.")
        if wrapped and owner in layers:
            plain[f"{owner}.{leaf}"] = tensor
        elif name.partition(".lora_")[0] not in layers:
            plain[name] = tensor
    for owner, layer in policy.bank.quantized.items():
        stored = [name for name in plain if name.startswith(f"{owner}.") and name != f"{owner}.bias"]
        plain = {name: tensor for name, tensor in plain.items() if name not in stored} | {f"{owner}.weight": base_weight(layer)}
    return plain


def _unquantized(model: Any) -> Any:
    """A model of the same class without weights, whose configuration knows of no quantization."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.generation_config = model.generation_config
    return plain

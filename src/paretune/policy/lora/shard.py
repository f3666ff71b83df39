"""A sharded base: FSDP2 around the frozen weights of a causal LM, so that each process holds its share of them.

`shard` splits the weights of the decoder's layers over the processes by `fully_shard`. A layer is gathered for its forward and for its
backward, and freed after each. Embeddings, final norm and head stay whole: they would be gathered together, and stay so through a whole
backward, which needs more memory at its highest than it spares. Adapters are attached afterwards, so that they are whole and the same in
every process: what is reduced are their gradients alone, and their optimizer sees whole factors (Muon orthogonalizes them).

A gathering needs all processes. So they must run the model equally often, whatever their rows are: `decode` goes on until no process has
a row left, and what depends on rows is asked of all (`anyone`, `everyone`).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, distributed

from paretune.errors import ConfigError
from paretune.policy.lora.bank import decoder_layers
from paretune.policy.lora.linear import is_quantized

__all__ = ["anyone", "everyone", "is_sharded", "shard", "states"]


def shard(model: Any, device: str | torch.device = "cpu") -> Any:
    """The model with its layers' weights split over the processes of the default group; it has no adapters yet. Raises ConfigError.

    A model without memory ("meta") is split, and its shares are filled in by who reads them; then it is given again.
    """
    # Nothing here writes into what a model returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if not is_sharded(model):
        _split(model, device)
    if not next(model.parameters()).is_meta:
        with torch.no_grad():  # the buffers that weights are gathered into, made for good: not in inference mode, autograd reads them
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    return model


def _split(model: Any, device: str | torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    layers = _layers_to_shard(model)
    mesh = init_device_mesh(torch.device(device).type, (distributed.get_world_size(),))
    model.requires_grad_(False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        if mesh.device_type == "cpu":  # where nothing is gathered meanwhile: no other layer ahead of its backward
            layer.set_modules_to_backward_prefetch([layer])
    ends = {weight for weight in model.parameters() if type(weight) is torch.nn.Parameter and not hasattr(weight, "to_local")}
    for weight in ends if not next(iter(ends)).is_meta else ():
        weight.data = weight.data.to(mesh.device_type)
    fully_shard(model, mesh=mesh, ignored_params=ends)
    model.paretune_states = lambda **inputs: model.base_model(**inputs).last_hidden_state
    register_fsdp_forward_method(model, "paretune_states")
    model.paretune_mesh = mesh


def _layers_to_shard(model: Any) -> Any:
    layers = decoder_layers(model)[1]
    quantized = next((type(module).__name__ for module in model.modules() if is_quantized(module)), None)
    if quantized is not None or getattr(model, "is_quantized", False):
        raise ConfigError(
            "a base that is sharded has weights in floating point",
            found=f"a quantized base ({quantized or type(model).__name__})",
            remedy="leave quantize out, or set learner.shard=false: a quantized base is a quarter of its size in every process",
        )
    if not layers:
        raise ConfigError(
            "a base is sharded by its decoder's layers",
            found=f"no list of layers that is the decoder's in {type(model).__name__}",
            remedy="set learner.shard=false, or choose another architecture (docs/models.md lists what was tried)",
        )
    return layers


def is_sharded(model: Any) -> bool:
    """Whether the model's weights are split over processes."""
    return getattr(model, "paretune_mesh", None) is not None


def states(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(N, T, H) what the head of a causal LM is given."""
    return model.paretune_states(**inputs) if is_sharded(model) else model.base_model(**inputs).last_hidden_state


def anyone(model: Any, flag: bool) -> bool:
    """Whether it holds in any of the processes that share the model's weights; here alone where it is not sharded."""
    if not is_sharded(model):
        return flag
    told = torch.tensor(int(flag), device=model.device)
    distributed.all_reduce(told, distributed.ReduceOp.MAX, group=model.paretune_mesh.get_group())
    return bool(told)


def everyone(model: Any, flag: bool) -> bool:
    """Whether it holds in all of them."""
    return not anyone(model, not flag)

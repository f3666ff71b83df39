"""The arithmetic of gated LoRA: what replaces the forward of PEFT's LoRA layers while a `LoraBank` is attached.

PEFT holds and stores the parameters; the computing is ours. Every LoRA layer computes

    y = W x + sum_k g_k s_k B_k A_k x

with all A_k as one matrix, the gates on the K * rank numbers in between, and all B_k as one matrix. Where every adapter of a layer is
frozen these are kept; otherwise they are made anew in each call, because optimisers may write into parameters without a trace (Adam with
`fused=True` leaves a tensor's version as it was). The bank looks at all parameters whenever a context is entered, so that writing into
frozen ones is seen from the next context on (through `copy_` under `no_grad`; through `p.data` nothing can be seen).
Axes: I inputs, O outputs, r one adapter's rank, R the ranks of all adapters of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from paretune.errors import ConfigError

__all__ = ["Blocks", "Factor", "FusedLayer", "Gated", "Mode", "Reference", "Switch"]


class Switch:
    """What all layers of one bank look at: the mode of the innermost context, None outside of any."""

    mode: Mode | None = None


class Reference:
    """No adapter."""

    def apply(self, layer: FusedLayer, x: Tensor, y: Tensor) -> Tensor:
        return y


class Gated:
    """Gates for the rows of a batch: (K,) for all of them, (N, K) per row, or (N, T, K) per token. Axis R: the ranks of all adapters."""

    def __init__(self, gates: Tensor):
        self.gates = gates
        self._by_rank: dict[Any, Tensor] = {}

    def apply(self, layer: FusedLayer, x: Tensor, y: Tensor) -> Tensor:
        if self.gates.dim() > 1 and (x.dim() != 3 or self.gates.shape[:-1] != x.shape[: self.gates.dim() - 1]):
            raise _wrong_rows(self.gates, x)
        a_RI, b_RO = layer.concatenated()
        h = functional.linear(x.to(a_RI.dtype), a_RI) * self._ranks(layer, a_RI.dtype)
        return _add_product(y, h, b_RO)

    def _ranks(self, layer: FusedLayer, dtype: torch.dtype) -> Tensor:
        """The gates times the adapters' scalings, repeated for each rank; shared by all layers with the same ranks and scalings."""
        key = (layer.pattern, dtype)
        if key in self._by_rank:
            return self._by_rank[key]
        owner, scale = layer.pattern_tensors(self.gates.device)
        with torch.inference_mode(False):  # usable in a graph later
            made = (self.gates[..., owner] * scale).to(dtype)
            made = made[:, None] if made.dim() == 2 else made
        if not self.gates.requires_grad:  # else each use needs a graph of its own
            self._by_rank[key] = made
        return made


class Blocks:
    """The batch is `count` equal blocks of rows; block k is under adapter k alone."""

    def __init__(self, count: int):
        self.count = count

    def apply(self, layer: FusedLayer, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[0] % self.count:
            raise ConfigError(
                "stacked mixing needs one equal block of rows per adapter",
                found=f"{x.shape[0]} rows for {self.count} adapters",
                remedy="repeat the batch once per adapter, adapter by adapter",
            )
        a_KrI, b_KrO = layer.stacked()
        h = torch.bmm(x.reshape(self.count, -1, x.shape[-1]).to(a_KrI.dtype), a_KrI.transpose(1, 2))
        y_KBO = y.reshape(self.count, -1, y.shape[-1])
        if y.dtype != h.dtype:
            return (y_KBO + torch.bmm(h, b_KrO)).to(y.dtype).view_as(y)
        return (torch.baddbmm(y_KBO, h, b_KrO) if torch.is_grad_enabled() else y_KBO.baddbmm_(h, b_KrO)).view_as(y)


class Factor:
    """One gate vector for the whole batch; A and B are averaged separately: (sum g_k B_k)(sum g_k A_k), not the soup of the products."""

    def __init__(self, gates_K: Tensor):
        self.gates = gates_K

    def apply(self, layer: FusedLayer, x: Tensor, y: Tensor) -> Tensor:
        a_rI, b_rO = layer.factor(self)
        return _add_product(y, functional.linear(x.to(a_rI.dtype), a_rI), b_rO)


Mode = Reference | Gated | Blocks | Factor


def _add_product(y: Tensor, h: Tensor, b_RO: Tensor) -> Tensor:
    """y + h @ b, in y's dtype, in place where no graph is recorded (y is the base layer's own fresh output)."""
    if y.dtype != h.dtype:
        return (y + h @ b_RO).to(y.dtype)
    y_BO, h_BR = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])
    return (torch.addmm(y_BO, h_BR, b_RO) if torch.is_grad_enabled() else y_BO.addmm_(h_BR, b_RO)).view(y.shape)


class FusedLayer:
    """One LoRA layer of PEFT under the gates of `switch`. `names` are the adapters along axis K; a layer may lack some of them."""

    def __init__(self, switch: Switch, names: Sequence[str], name: str, module: Any):
        self.switch, self.count, self.name, self.module, self.base = switch, len(names), name, module, module.base_layer
        self.members = [k for k, adapter in enumerate(names) if adapter in module.lora_A]
        adapters = [names[k] for k in self.members]
        self.a = [module.lora_A[adapter].weight for adapter in adapters]
        self.b = [module.lora_B[adapter].weight for adapter in adapters]
        self.scalings = [float(module.scaling[adapter]) for adapter in adapters]
        self.drops = any(module.lora_dropout[adapter].p > 0 for adapter in adapters if hasattr(module.lora_dropout[adapter], "p"))
        self.ranks = [a.shape[0] for a in self.a]
        self.pattern = f"{self.members} {self.ranks} {self.scalings}"  # text: its hash is computed once
        self._pattern: tuple[Tensor, Tensor] | None = None
        self.forget()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mode = self.switch.mode
        if mode is None or self.module.merged_adapters or "adapter_names" in kwargs or (self.drops and self.module.training):
            self._refuse(kwargs)
        y = self.base(x, *args, **kwargs)
        if not self.members or self.module._disable_adapters:
            return y
        assert mode is not None
        return mode.apply(self, x, y)

    def concatenated(self) -> tuple[Tensor, Tensor]:
        """(R, I) and (R, O): all adapters side by side."""
        return self._keep("cat", None, lambda: (_cat(self.a, 0), _cat(self.b, 1).t()))

    def stacked(self) -> tuple[Tensor, Tensor]:
        """(K, r, I) and (K, r, O), scaled; padded with zeros to the largest rank, all zeros where an adapter has nothing here."""

        def build() -> tuple[Tensor, Tensor]:
            rank = max(self.ranks)
            a = [self.a[0].new_zeros(rank, self.a[0].shape[1])] * self.count
            b = [self.b[0].new_zeros(rank, self.b[0].shape[0])] * self.count
            for k, a_rI, b_Or, scale in zip(self.members, self.a, self.b, self.scalings, strict=True):
                a[k] = functional.pad(a_rI, (0, 0, 0, rank - len(a_rI)))
                b[k] = functional.pad(b_Or.t() * scale, (0, 0, 0, rank - len(a_rI)))
            return torch.stack(a), torch.stack(b)

        return self._keep("stack", None, build)

    def factor(self, mode: Factor) -> tuple[Tensor, Tensor]:
        """(r, I) and (r, O) of the factor-wise average, scaled."""
        if self.members != list(range(self.count)) or len(set(self.ranks)) > 1 or len(set(self.scalings)) > 1:
            raise ConfigError(
                "factor averaging needs adapters of one shape",
                found=f"{self.name}: adapters {self.members}, ranks {self.ranks}, scalings {self.scalings}",
                remedy="use the parameter level (the exact soup), which takes any ranks",
            )

        def build() -> tuple[Tensor, Tensor]:
            gates_K = mode.gates.to(self.a[0].dtype)
            a_rI = torch.einsum("k,kri->ri", gates_K, torch.stack(self.a))
            return a_rI, torch.einsum("k,kor->ro", gates_K, torch.stack(self.b)) * self.scalings[0]

        return build() if mode.gates.requires_grad else self._keep("factor", mode, build)

    def pattern_tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each of the R ranks: which adapter owns it, and that adapter's scaling."""
        if self._pattern is None or self._pattern[0].device != device:
            owner = [k for k, rank in zip(self.members, self.ranks, strict=True) for _ in range(rank)]
            scale = [s for s, rank in zip(self.scalings, self.ranks, strict=True) for _ in range(rank)]
            with torch.inference_mode(False):  # usable in a graph later
                self._pattern = torch.tensor(owner, device=device, dtype=torch.long), torch.tensor(scale, device=device)
        return self._pattern

    def forget(self) -> None:
        """Parameters have changed, or what is trained."""
        self._frozen = not any(p.requires_grad for p in (*self.a, *self.b))
        self._kept: dict[str, tuple[object, tuple[Tensor, Tensor]]] = {}

    def _keep(self, kind: str, owner: object, build: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if not self._frozen:
            return build()
        known = self._kept.get(kind)
        if known is None or known[0] is not owner:
            with torch.inference_mode(False), torch.no_grad():  # usable in a graph later (gates that are trained)
                first, second = build()
                known = self._kept[kind] = (owner, (first.contiguous(), second.contiguous()))
        return known[1]

    def _refuse(self, kwargs: Mapping[str, Any]) -> None:
        if self.module.merged_adapters:
            raise ConfigError(
                "gates apply to unmerged adapters",
                found=f"{self.name} has merged {', '.join(self.module.merged_adapters)}",
                remedy="call unmerge_adapter() on the model, or load the base model afresh",
            )
        if "adapter_names" in kwargs:
            raise ConfigError(
                "in a LoraBank the gates choose the adapters", found="adapter_names=...", remedy="use bank.gates with one-hot rows"
            )
        if self.switch.mode is None:
            raise ConfigError(
                "a model with a LoraBank runs under gates",
                found="a forward (or a recomputation by gradient checkpointing) outside of any context",
                remedy="wrap it, and its backward if layers are recomputed, in `with bank.gates(...)`; None is the reference",
            )
        raise ConfigError(
            "adapters under gates have no dropout while training",
            found=f"{self.name} has lora_dropout > 0 in train mode",
            remedy="set lora_dropout=0, or call model.eval(): masks per adapter would break the mixture",
        )


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _wrong_rows(gates: Tensor, x: Tensor) -> ConfigError:
    names = "rows" if gates.dim() == 2 else "(rows, tokens)"
    given = gates.shape[0] if gates.dim() == 2 else tuple(gates.shape[:2])
    return ConfigError(
        "gates and batch have the same rows (and tokens)",
        found=f"gates for {given} {names}, layer input of shape {tuple(x.shape)}",
        remedy="expand the gates exactly as the batch was (beams, num_return_sequences) and do not pack requests into one row; "
        "gates of shape (K,) fit any batch",
    )

"""The arithmetic of gated LoRA: what replaces the forward of PEFT's LoRA layers while a `LoraBank` is attached.

PEFT holds and stores the parameters; the computing is ours. Every LoRA layer computes

    y = W x + sum_k g_k s_k B_k A_k x

with all A_k as one matrix, the gates on the K * rank numbers in between, and all B_k as one matrix. Sibling layers that are given the same
input (query, key and value; gate and up) share one product with their A where nothing is trained: decoding one token is many small
operations, and their number is what it costs.

Where every adapter of a layer is frozen these matrices are kept; otherwise they are made anew in each call, because optimizers may write
into parameters without a trace (Adam with `fused=True` leaves a tensor's version as it was). The bank looks at all parameters whenever a
context is entered, so that writing into frozen ones is seen from the next context on (through `copy_` under `no_grad`; through `p.data`
nothing can be seen).
Axes: I inputs, O outputs, r one adapter's rank, R the ranks of all adapters of a layer.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, functional

from paretune.errors import ConfigError
from paretune.policy.lora.linear import frozen_linear

__all__ = ["Blocks", "Dense", "Factor", "FusedLayer", "Gated", "Mode", "Reference", "Routed", "Switch", "join_siblings"]


# Layers of one module that transformers calls with one and the same tensor, and that are worth one product for all.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Switch:
    """What all layers of one bank look at: the mode of the innermost context, None outside of any.

    `ready` is what the first of some siblings computed for the others, from their common input `x`.
    """

    def __init__(self) -> None:
        self.mode: Mode | None = None
        self.x: Tensor | None = None
        self.ready: dict[FusedLayer, Tensor] = {}

    def turn(self, mode: Mode | None) -> Mode | None:
        """Set the mode; returns the one before."""
        before, self.mode, self.x = self.mode, mode, None
        self.ready.clear()
        return before


class Reference:
    """No adapter."""

    def apply(self, layer: FusedLayer, x: Tensor, y: Tensor) -> Tensor:
        return y


class Gated:
    """Gates for the rows of a batch: (K,) for all of them, (N, K) per row, or (N, T, K) per token. Axis R: the ranks of all adapters."""

    def __init__(self, gates: Tensor):
        self.gates = gates
        self.tokens: int | None = None  # T of the forward, where who runs it says so
        self._by_rank: dict[Any, Tensor] = {}
        self._scaled: dict[FusedLayer, tuple[Tensor, Tensor]] = {}

    def apply(self, layer: FusedLayer, x: Tensor, y: Tensor) -> Tensor:
        kept = None if torch.is_grad_enabled() else layer.frozen()
        if kept is None:
            return _add_product(y, self.hidden((layer,), x, layer.a_IR()), layer.b_RO())
        return _add_product(y, layer.shared(self, x, kept[0]), kept[1])

    def hidden(self, layers: tuple[FusedLayer, ...], x: Tensor, a_IR: Tensor) -> Tensor:
        """A x under the gates, (rows * tokens, R); R goes over the adapters of all `layers`, whose input x is."""
        if x.dim() == 2 and self.gates.dim() > 1 and (tokens := self._tokens()) and len(x) == len(self.gates) * tokens:
            x = x.unflatten(0, (-1, tokens))  # some architectures give their linear layers (rows * tokens, I)
        elif x.dim() == 4 and x.shape[1] == 1:  # latent attention gives one (rows, 1, tokens so far, I): its cache holds what it reads
            x = x[:, 0]
        if self.gates.dim() > 1 and (x.dim() != 3 or self.gates.shape[:-1] != x.shape[: self.gates.dim() - 1]):
            raise _wrong_rows(self.gates, x)
        x_BI = x.reshape(-1, x.shape[-1])
        if x_BI.dtype != a_IR.dtype:
            x_BI = x_BI.to(a_IR.dtype)
        if (
            self.gates.dim() < 3
            and self.gates.numel() == self.gates.shape[-1]
            and not (self.gates.requires_grad or torch.is_grad_enabled())
        ):
            return x_BI @ self._scaled_a(layers, a_IR)
        ranks, h = self._ranks(layers, a_IR.dtype), x_BI @ a_IR
        if ranks.dim() == 2 and len(ranks) < len(h):  # rows of several tokens
            return (h.view(*x.shape[:2], -1) * ranks[:, None]).view(h.shape)
        return h * (ranks.view(h.shape) if ranks.dim() == 3 else ranks)

    def _tokens(self) -> int | None:
        """T of the forward, where the gates or who runs it say so."""
        return self.gates.shape[1] if self.gates.dim() == 3 else self.tokens

    def _scaled_a(self, layers: tuple[FusedLayer, ...], a_IR: Tensor) -> Tensor:
        """One gate vector for all rows: A times its gates, kept while A is the same, so that a token costs no product of h and gates."""
        known = self._scaled.get(layers[0])
        if known is None or known[0] is not a_IR:
            with torch.inference_mode(False), torch.no_grad():
                known = self._scaled[layers[0]] = a_IR, a_IR * self._ranks(layers, a_IR.dtype)
        return known[1]

    def _ranks(self, layers: tuple[FusedLayer, ...], dtype: torch.dtype) -> Tensor:
        """The gates times the adapters' scalings, repeated for each rank; shared by all layers with the same ranks and scalings.

        The only place that turns gates into factors of h: gates that differ between layers or ranks enter here.
        """
        own = (layers, dtype)
        known = self._by_rank.get(own)
        if known is not None:
            return known
        key = (*[layer.pattern for layer in layers], dtype)
        if key in self._by_rank:
            self._by_rank[own] = self._by_rank[key]
            return self._by_rank[key]
        with torch.inference_mode(False):  # usable in a graph later
            if len(layers) > 1:  # mostly alike: one of them is computed
                ranks = torch.cat([self._ranks((layer,), dtype) for layer in layers], -1)
            else:
                owner, scale = layers[0].pattern_tensors(self.gates.device)
                ranks = (self.gates[..., owner] * scale).to(dtype)
        if not self.gates.requires_grad:  # else each use needs a graph of its own
            self._by_rank[key] = self._by_rank[own] = ranks
        return ranks


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
        return _add_product(y, functional.linear(x.reshape(-1, x.shape[-1]).to(a_rI.dtype), a_rI), b_rO)


class Dense:
    """A change of each layer's weight by one matrix (O, I), for all rows: beside the base's own weight, which may be quantized."""

    def __init__(self, deltas: Mapping[str, Tensor]):
        self.deltas = deltas

    def apply(self, layer: FusedLayer, x: Tensor, y: Tensor) -> Tensor:
        delta_OI = self.deltas[layer.name]
        return _add_product(y, x.reshape(-1, x.shape[-1]).to(delta_OI.dtype), delta_OI.t())


class Routed:
    """Gates that the forward itself makes: those set at decoder layer `starts[i]` hold from there on, up to the next start.

    Below the first start no adapter acts. What a start was given in the last forward stays until the next: layers may be recomputed.
    """

    def __init__(self, starts: Sequence[int]):
        self.starts = sorted(starts)
        self.made: dict[int, Gated] = {}

    def set(self, start: int, gates_NTK: Tensor) -> None:
        self.made[start] = Gated(gates_NTK)

    def apply(self, layer: FusedLayer, x: Tensor, y: Tensor) -> Tensor:
        assert layer.depth is not None, "the bank refuses layers outside of the stack"
        i = bisect.bisect_right(self.starts, layer.depth)
        return self.made[self.starts[i - 1]].apply(layer, x, y) if i else y


Mode = Reference | Gated | Routed | Blocks | Factor | Dense


def _add_product(y: Tensor, h: Tensor, b_RO: Tensor) -> Tensor:
    """y + h @ b, in y's dtype, in place where no graph is recorded (y is the base layer's own fresh output); h is (rows * tokens, R)."""
    if y.dtype != h.dtype:
        return (y + (h @ b_RO).view(y.shape)).to(y.dtype)
    if torch.is_grad_enabled():
        return torch.addmm(y.view(-1, y.shape[-1]), h, b_RO).view(y.shape)
    y.view(-1, y.shape[-1]).addmm_(h, b_RO)
    return y


class FusedLayer:
    """One LoRA layer of PEFT under the gates of `switch`. `names` are the adapters along axis K; a layer may lack some of them.

    `depth` is that of the decoder layer around it, the number of decoder layers for the head, None where that is not known.
    """

    def __init__(self, switch: Switch, names: Sequence[str], name: str, module: Any, depth: int | None = None):
        self.switch, self.count, self.name, self.module, self.base = switch, len(names), name, module, module.base_layer
        self.transposed = bool(getattr(module, "fan_in_fan_out", False))  # the base's weight is (I, O)
        self.members = [k for k, adapter in enumerate(names) if adapter in module.lora_A]
        adapters = [names[k] for k in self.members]
        self.a = [module.lora_A[adapter].weight for adapter in adapters]
        self.b = [module.lora_B[adapter].weight for adapter in adapters]
        self.scalings = [float(module.scaling[adapter]) for adapter in adapters]
        self.drops = any(module.lora_dropout[adapter].p > 0 for adapter in adapters if hasattr(module.lora_dropout[adapter], "p"))
        self.ranks = [a.shape[0] for a in self.a]
        self.pattern = f"{self.members} {self.ranks} {self.scalings}"  # text: its hash is computed once
        self.depth = depth
        self.siblings: tuple[FusedLayer, ...] = (self,)
        self.widths = [sum(self.ranks)]  # of the siblings' parts of h
        self._pattern: tuple[Tensor, Tensor] | None = None
        self._both: tuple[Tensor, Tensor] | None = None
        self.forget()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mode = self.switch.mode
        if mode is None or self.module.merged_adapters or "adapter_names" in kwargs or (self.drops and self.module.training):
            self._refuse(kwargs)
        base = self.base
        if type(base) is Linear and not (args or kwargs or base._forward_hooks or base._forward_pre_hooks):
            weights: Any = base._parameters  # what its forward does, without the cost of one more call of a module
            y = frozen_linear(x, weights["weight"], weights["bias"])
        else:
            y = base(x, *args, **kwargs)
        if not self.members or self.module._disable_adapters:
            return y
        assert mode is not None
        return mode.apply(self, x, y)

    def frozen(self) -> tuple[Tensor, Tensor] | None:
        """The siblings' A and this layer's B, where nothing of them is trained."""
        if self._both is None and all(layer._frozen for layer in self.siblings):
            self._both = self._keep("siblings", None, self._a_of_siblings)[0], self.b_RO()
        return self._both

    def shared(self, mode: Gated, x: Tensor, a_IR: Tensor) -> Tensor:
        """`mode.hidden` of this layer: what the first of its siblings computed for all when it was given the same x."""
        switch = self.switch
        if switch.x is x:
            h = switch.ready.pop(self, None)  # each takes its own once
            if h is not None:
                return h
        h = mode.hidden(self.siblings, x, a_IR)
        if len(self.siblings) == 1:
            return h
        switch.x = x
        switch.ready = dict(zip(self.siblings, h.split_with_sizes(self.widths, 1), strict=True))
        return switch.ready.pop(self)

    def a_IR(self) -> Tensor:
        """All adapters side by side, kept in the layout that is fast for few rows."""
        return self._keep("a", None, lambda: (_cat(self.a, 0).t(),))[0]

    def b_RO(self) -> Tensor:
        return self._keep("b", None, self._b_of_all)[0]

    def _b_of_all(self) -> tuple[Tensor, ...]:
        return (_cat(self.b, 1).t(),)

    def _a_of_siblings(self) -> tuple[Tensor, ...]:
        return (_cat([a for layer in self.siblings for a in layer.a], 0).t(),)

    def stacked(self) -> tuple[Tensor, ...]:
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

    def factor(self, mode: Factor) -> tuple[Tensor, ...]:
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
        self._kept: dict[str, tuple[object, tuple[Tensor, ...]]] = {}
        self._both = None

    def settle(self) -> None:
        """Let frozen factors lie in the matrices that forwards use instead of beside them: adapters are in memory once."""
        if self.siblings[0] is not self or not all(layer._frozen and layer.members for layer in self.siblings):
            return
        with torch.inference_mode(False), torch.no_grad():
            all_IR, end = self._a_of_siblings()[0].contiguous(), 0
            for layer in self.siblings:
                first, b_RO = end, layer._b_of_all()[0].contiguous()
                for a_rI, b_Or, rank in zip(layer.a, layer.b, layer.ranks, strict=True):
                    a_rI.data = all_IR[:, end : end + rank].t()
                    b_Or.data = b_RO[end - first : end - first + rank].t()
                    end += rank
                layer._both = (all_IR, b_RO)
                layer._kept = {"siblings": (None, (all_IR,)), "a": (None, (all_IR[:, first:end],)), "b": (None, (b_RO,))}

    def _keep(self, kind: str, owner: object, build: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        known = self._kept.get(kind)
        if known is None or known[0] is not owner:
            if not self._frozen:
                return build()
            with torch.inference_mode(False), torch.no_grad():  # usable in a graph later (gates that are trained)
                known = self._kept[kind] = (owner, tuple(made.contiguous() for made in build()))
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


def join_siblings(layers: Sequence[FusedLayer]) -> None:
    """Let layers know their siblings: those of SIBLINGS in one module, with something to compute."""
    found: dict[tuple[str, tuple[str, ...]], list[FusedLayer]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        for kinds in SIBLINGS:
            if leaf in kinds and layer.members:
                found.setdefault((parent, kinds), []).append(layer)
    for group in found.values():
        if len({(a.shape[1], a.dtype, a.device) for layer in group for a in layer.a}) == 1:
            for layer in group:
                layer.siblings, layer.widths = tuple(group), [sum(each.ranks) for each in group]


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

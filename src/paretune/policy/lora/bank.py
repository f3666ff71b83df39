"""A bank of K LoRA adapters on one base model: gates per row, per token or per block of rows, and exact soups.

`with bank.gates(g)` is the exact ("delta") soup sum_k g_k s_k B_k A_k for every row of the batch, unmerged, at the cost of one model.
`with bank.blocks()` is the other layout: K equal blocks of rows, block k under adapter k alone, which logit and hidden-state mixing need.
`soup_state` gives the merged weights of one gate vector. Adapters stay in plain PEFT format on disk.

Refused, because they would compute something else without a word: merged layers, DoRA and other variants, adapter dropout in training
mode, a batch that was expanded after the gates were set (beams, `num_return_sequences`), and a forward outside of any context.
Layers that are recomputed during `backward` need the same context around it: see `decoder.recomputed`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from paretune.errors import ConfigError, nearest
from paretune.hub import quietly, text_config
from paretune.policy.lora.files import check_config, check_trainable, read_adapter, write_adapter
from paretune.policy.lora.layers import Blocks, Factor, FusedLayer, Gated, Mode, Reference, Switch, join_siblings
from paretune.policy.lora.linear import base_weight, frozen_linear, is_quantized, rounds_inputs
from paretune.seeds import forked_torch, seed_for
from paretune.tasks.pretrained import keep_layout

__all__ = ["LoraBank", "decoder_layers", "default_targets", "lora_config", "soup_factors", "soup_state", "soup_weight"]

SCALE = 2  # alpha / rank, where no alpha is given
EXPERT_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "wi", "wo"})
Gates = Tensor | np.ndarray | Sequence[Any]


class LoraBank:
    """The adapters `names` (axis K) of the causal LM `base`. Make one with `attach` (fresh adapters) or `load` (from disk)."""

    def __init__(self, base: Any):
        if hasattr(base, "peft_config"):
            raise ConfigError(
                "a bank wraps a model without adapters",
                found=f"{type(base).__name__} with {', '.join(base.peft_config)}",
                remedy="give the base model alone, without an adapter in it",
            )
        self.base, self.model = base, base
        self.names: tuple[str, ...] = ()
        self._trainable: set[str] = set()
        self._switch = Switch()
        self._layers: list[FusedLayer] = []
        self._others: list[Any] = []  # linear layers without adapters
        self.quantized: dict[str, Any] = {}  # the base's quantized linear layers by their names without adapters
        self.prefix, self.stack = decoder_layers(base)  # the decoder's layers, where it is clear which they are
        self._last: Gated | Factor | None = None
        self._tensors: list[Tensor] = []
        self._stamp: list[list[Any]] = []
        self._held = False
        self._refresh()

    @classmethod
    def attach(
        cls,
        model: Any,
        *,
        names: Sequence[str],
        seed: int,
        rank: int = 16,
        alpha: int | None = None,
        targets: str | Sequence[str] = "all-linear",
        trainable: Sequence[str] | None = None,
    ) -> LoraBank:
        """Fresh adapters (B = 0) on the HF causal LM `model`; each is initialized from its own stream of `seed`, named by its name.

        Their scale is alpha / rank; see `lora_config` for an `alpha` that is left out.
        `targets` is "all-linear" (see `default_targets`) or names of modules. `names` may be empty: the reference alone.
        """
        check_trainable(names, trainable)
        bank = cls(model)
        for name in names:
            bank.add(name, seed=seed, rank=rank, alpha=alpha, targets=targets, trainable=trainable is None or name in trainable)
        return bank

    @classmethod
    def load(cls, model: Any, paths: Mapping[str, str | Path], *, trainable: Sequence[str] = ()) -> LoraBank:
        """Adapters from plain PEFT directories (safetensors only), in the order of `paths`."""
        check_trainable(paths, trainable)
        bank = cls(model)
        for name, path in paths.items():
            bank.add_from(name, path, trainable=name in trainable)
        return bank

    @property
    def count(self) -> int:
        """K."""
        return len(self.names)

    @property
    def layers(self) -> Sequence[FusedLayer]:
        """The LoRA layers, in the order of the model."""
        return self._layers

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of the adapters that are trained, in the order of axis K."""
        return tuple(name for name in self.names if name in self._trainable)

    def add(
        self,
        name: str,
        *,
        seed: int,
        rank: int = 16,
        alpha: int | None = None,
        targets: str | Sequence[str] = "all-linear",
        trainable: bool = True,
    ) -> None:
        """One more fresh adapter, at the end of axis K."""
        config = lora_config(self.base, rank=rank, alpha=alpha, targets=targets)
        self._install(name, config, seed_for(seed, "lora", name), trainable)

    def add_from(self, name: str, path: str | Path, *, trainable: bool = False) -> None:
        """One more adapter from a plain PEFT directory, at the end of axis K."""
        from peft import set_peft_model_state_dict

        path = Path(path)
        config, weights = read_adapter(path)
        for key in [key for key in weights if ".base_layer." in key]:  # PEFT saves adapted heads whole
            if not torch.equal(weights.pop(key).cpu(), self._base_weight(key).detach().cpu()):
                raise ConfigError("an adapter leaves the base as it is", found=f"{path}: another {key}", remedy="load it onto its own base")
        # What is not trained may stay in the file until it is needed.
        weights = {key: tensor.to(self.base.device, torch.float32, copy=trainable) for key, tensor in weights.items()}
        self._install(name, config, 0, trainable, empty=True)
        label = _label(self.names.index(name))
        try:
            result: Any = set_peft_model_state_dict(self.model, weights, adapter_name=label, low_cpu_mem_usage=True)
            wrong = [key for key in result.missing_keys if f".{label}." in key] + list(result.unexpected_keys)
            problem = f"{len(wrong)} missing or unexpected tensors, such as {wrong[0]}" if wrong else ""
        except RuntimeError as error:  # shapes
            problem = str(error).split("\n")[1].strip() if "\n" in str(error) else str(error)
        if problem:
            raise ConfigError(
                "an adapter's weights fit the base model",
                found=f"{path}: {problem}",
                remedy="load it onto the model that it was trained on",
            )
        for key, tensor in weights.items():  # PEFT has cast them to the base's dtype
            if key.endswith((".lora_A.weight", ".lora_B.weight")):
                self.model.get_parameter(key.replace(".weight", f".{label}.weight")).data = tensor
        self._refresh()

    def _base_weight(self, key: str) -> Tensor:
        """The base model's tensor that PEFT calls `key`, whether there are adapters by now or not."""
        module = self.base.get_submodule(key.removeprefix("base_model.model.").rpartition(".base_layer.")[0])
        return getattr(module, "base_layer", module).get_parameter(key.rpartition(".")[2])

    def _install(self, name: str, config: Any, seed: int, trainable: bool, *, empty: bool = False) -> None:
        """With `empty` its tensors have no memory yet: those that were read take their place."""
        from peft import get_peft_model

        check_config(name, config, self.names)
        label = _label(self.count)
        try:
            with forked_torch(seed), quietly("adding adapters"):
                if self.model is self.base:
                    self.model = get_peft_model(self.base, config, adapter_name=label, low_cpu_mem_usage=empty)
                else:
                    self.model.add_adapter(label, config, low_cpu_mem_usage=empty)
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(
                "PEFT can put the adapter on the model's layers",
                found=f"{type(self.base).__name__}: {error}",
                remedy="name other targets, or choose another architecture (docs/models.md lists what was tried)",
            ) from error
        self.names = (*self.names, name)
        if trainable:
            self._trainable.add(name)
        if not empty:
            self._refresh()

    def _refresh(self) -> None:
        """Take over the forward of every LoRA layer; set what is trainable (PEFT changes it when adapters come)."""
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self.detach()
        labels = [_label(k) for k in range(self.count)]
        trained = {label for label, name in zip(labels, self.names, strict=True) if name in self._trainable}
        self.base.requires_grad_(False)
        self.base.eval()  # dropout would differ between sampling and scoring; PEFT's new layers come in training mode
        for name, module in self.base.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) or (isinstance(module, LoraLayer) and not _is_linear(module)):
                raise ConfigError(
                    "gates work on LoRA adapters of linear layers",
                    found=f"{name}: {type(module).__name__}",
                    remedy="target linear layers only, without modules_to_save or embeddings",
                )
            if isinstance(module, LoraLayer):
                assert not module.lora_variant, f"{name} has a variant that its adapter's settings do not show"
                for label in trained & set(module.lora_A):
                    module.lora_A[label].requires_grad_(True)
                    module.lora_B[label].requires_grad_(True)
                layer = FusedLayer(self._switch, labels, name, module, self._depth(name, module))
                module.__dict__["forward"] = layer.forward
                self._layers.append(layer)
        adapted = {id(layer.base) for layer in self._layers}
        for name, module in self.base.named_modules():
            plain = type(module) is torch.nn.Linear and ".lora_" not in name and id(module) not in adapted
            if plain and "forward" not in module.__dict__:
                module.__dict__["forward"] = functools.partial(_run_frozen, module)
                self._others.append(module)
        self.quantized = {
            name.removesuffix(".base_layer"): module
            for name, module in self.base.named_modules()
            if not isinstance(module, LoraLayer) and is_quantized(module)
        }
        keep_layout(self.base)
        join_siblings(self._layers)
        self._tensors = [p for k in range(self.count) for p in self.parameters_of(k)]

    @property
    def rounding(self) -> torch.dtype:
        """The dtype whose rounding the base's numbers have: its own, or bfloat16 where quantized layers round their inputs."""
        some = next(iter(self.quantized.values()), None)
        return torch.bfloat16 if some is not None and rounds_inputs(some, self.base.dtype) else self.base.dtype

    def _depth(self, name: str, module: Any) -> int | None:
        """The decoder layer that a module is in; the count of layers for the head; None where that is not known."""
        if module is self.base.get_output_embeddings():
            return len(self.stack)
        inside = self.prefix and name.startswith(f"{self.prefix}.")
        return int(name[len(self.prefix) + 1 :].split(".")[0]) if inside else None

    def detach(self) -> None:
        """Give every layer PEFT's own forward back; the bank can no longer be used."""
        for layer in self._layers:
            layer.module.__dict__.pop("forward", None)
        for module in self._others:
            module.__dict__.pop("forward", None)
        self._others = []
        self._layers, self._last, self._tensors, self._stamp = [], None, [], []

    def parameters(self) -> list[Tensor]:
        """The trainable tensors, adapter by adapter in the order of the layers."""
        return [p for p in self._tensors if p.requires_grad]

    def parameters_of(self, k: int) -> list[Tensor]:
        """All tensors of adapter k, trainable or not."""
        found: list[Tensor] = []
        for layer in self._layers:
            if k in layer.members:
                i = layer.members.index(k)
                found += [layer.a[i], layer.b[i]]
        return found

    @contextlib.contextmanager
    def gates(self, gates: Gates | None) -> Iterator[None]:
        """Gates of shape (K,) for the whole batch, (N, K) per row or (N, T, K) per token; None is the reference, without adapters."""
        with self.mode(Reference() if gates is None else self._made(Gated, gates, dims=(1, 2, 3))):
            yield

    @contextlib.contextmanager
    def blocks(self) -> Iterator[None]:
        """The batch is K equal blocks of rows (K * N rows, adapter by adapter); block k is under adapter k alone."""
        with self.mode(Blocks(self.count)):
            yield

    @contextlib.contextmanager
    def factor(self, gates_K: Gates) -> Iterator[None]:
        """A and B averaged separately, as in the rewarded-soups code; one gate vector for the whole batch."""
        with self.mode(self._made(Factor, gates_K, dims=(1,))):
            yield

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Within, nobody writes into adapters (a decoding loop): they are looked at once, not at every context."""
        self._forget_changed()
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def _forget_changed(self) -> None:
        """Forget what was made of parameters that have been written into, moved, frozen or thawed since."""
        if self._held:
            return
        if self._stamp != (stamp := self._stamped()):
            known, self._stamp = self._stamp, stamp
            for layer in self._layers:
                layer.forget()
            if not known or not self._trainable:  # while something is trained this comes again and again
                for layer in self._layers:
                    layer.settle()
                self._stamp = self._stamped()

    def _stamped(self) -> list[list[Any]]:
        tensors = self._tensors  # three flat lists: this is done for every forward
        return [[p._version for p in tensors], [p.data_ptr() for p in tensors], [p.requires_grad for p in tensors]]

    @contextlib.contextmanager
    def mode(self, mode: Mode) -> Iterator[None]:
        """What the layers compute within; `gates`, `blocks`, `factor` and `decoder.routed` make the mode."""
        self._forget_changed()
        before = self._switch.turn(mode)
        try:
            yield
        finally:
            self._switch.turn(before)

    def expect(self, tokens: int) -> None:
        """Say that each row of the next forward has so many tokens, for layers whose inputs come as (rows * tokens, I)."""
        if isinstance(self._switch.mode, Gated):
            self._switch.mode.tokens = tokens

    @property
    def present_mode(self) -> Mode | None:
        """What the layers compute now; None outside of any context."""
        return self._switch.mode

    def _made(self, kind: type[Gated] | type[Factor], gates: Gates, *, dims: tuple[int, ...]) -> Gated | Factor:
        """The mode of `gates`; the same gates again (a decoding loop) give the same mode, with what it has already expanded."""
        given = torch.as_tensor(gates if isinstance(gates, Tensor) else np.asarray(gates))
        given = given.to(device=self.base.device, dtype=torch.float64 if given.dtype == torch.float64 else torch.float32)
        last = self._last
        if type(last) is kind and not given.requires_grad and last.gates.shape == given.shape and torch.equal(last.gates, given):
            return last
        if given.dim() not in dims or given.shape[-1] != self.count:
            shapes = {1: "(K,)", 2: "(N, K)", 3: "(N, T, K)"}
            raise ConfigError(
                "gates have one column per adapter: " + " or ".join(shapes[d] for d in dims),
                found=f"shape {tuple(given.shape)} for {self.count} adapters ({', '.join(self.names) or 'none'})",
                remedy="give every adapter a gate; unwanted ones get 0",
            )
        if not bool(torch.isfinite(given).all()):
            raise ConfigError("gates are finite numbers", found="NaN or infinity", remedy="check the rule or the router that made them")
        if given.requires_grad:
            return kind(given)
        with torch.inference_mode(False):  # usable in a graph later
            self._last = kind(given.clone())  # the caller may write into its own
        return self._last

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ConfigError("an adapter is known by its name", found=repr(name), remedy=nearest(name, self.names))
        return self.names.index(name)

    def save(self, name: str, path: str | Path) -> None:
        """Write adapter `name` into the directory `path` in plain PEFT format: the same bytes for the same weights."""
        from peft import get_peft_model_state_dict

        label = _label(self._index(name))
        tensors = get_peft_model_state_dict(self.model, adapter_name=label, save_embedding_layers=False)
        write_adapter(Path(path), self.model.peft_config[label], tensors)

    def export(
        self, weights_K: Gates, path: str | Path, *, how: str = "delta", dtype: torch.dtype | None = None, base: str | None = None
    ) -> int:
        """Write the soup at `weights_K` (`how`: see `soup_state`) as one plain LoRA; returns its rank.

        The exact soup's rank is the sum of the ranks of all adapters with a weight other than 0. Factors are stored as `dtype` (default:
        as they are). `base` is the base model's name on the hub.
        """
        from peft import LoraConfig

        if not self._layers:
            raise ConfigError("an export has an adapter at least", found="the reference alone", remedy="use the base model itself")
        weights = self._made(Gated, weights_K, dims=(1,)).gates
        factors = {layer.name: soup_factors(layer, weights, how=how) for layer in self._layers}
        rank = max(1, *(len(a_rI) for a_rI, _ in factors.values()))
        written = {name: pair for name, pair in factors.items() if len(pair[0])} or factors  # what no weight reaches is left out
        tensors: dict[str, Tensor] = {}
        for name, (a_rI, b_rO) in written.items():
            fill = (0, 0, 0, rank - len(a_rI))  # one rank for all layers: engines other than PEFT know no other
            tensors[f"base_model.model.{name}.lora_A.weight"] = functional.pad(a_rI, fill).to(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = functional.pad(b_rO, fill).t().to(dtype)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=self._targets(written),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(config.fan_in_fan_out for config in self.model.peft_config.values()),
            base_model_name_or_path=base,
        )
        write_adapter(Path(path), config, tensors)
        return rank

    def _targets(self, names: Iterable[str]) -> list[str]:
        """The last parts of the names, as people write them, where they mean these modules and no others; else the names."""
        names = set(names)
        leaves = {name.rpartition(".")[2] for name in names}
        meant = {name for name, _ in self.base.named_modules() if name.rpartition(".")[2] in leaves}
        return sorted(leaves if meant == names else names)


def lora_config(model: Any, *, rank: int, alpha: int | None, targets: str | Sequence[str]) -> Any:
    """PEFT's configuration of a fresh adapter of `model`: without dropout and bias. `targets` "all-linear" is that of `default_targets`.

    An `alpha` that is left out is SCALE times the rank, so that adapters of every rank have the same scale.
    """
    from peft import LoraConfig

    alpha = SCALE * rank if alpha is None else alpha
    chosen = default_targets(model) if targets == "all-linear" else targets if isinstance(targets, str) else list(targets)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")


def default_targets(model: Any) -> str | list[str]:
    """What "all-linear" means: every linear layer but the head; of a mixture of experts, those of attention.

    An expert sees some of the tokens, in an order of its own, so that gates per row would reach the wrong ones. PEFT takes the names of
    feed-forward layers (EXPERT_NAMES) in such a model for the experts' fused parameters, those of shared experts too, so none is named.
    """
    from transformers.pytorch_utils import Conv1D

    named = {name.removesuffix(".base_layer"): module for name, module in model.named_modules() if ".lora_" not in name}
    if not any(name.rpartition(".")[2] == "experts" for name in named):
        return "all-linear"
    head = model.get_output_embeddings()
    plain = {name: module for name, module in named.items() if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head}
    return [name for name in plain if not {"experts", "router"} & set(name.split(".")) and name.rpartition(".")[2] not in EXPERT_NAMES]


def _is_linear(module: Any) -> bool:
    """Whether a LoRA layer of PEFT's adds its product to that of a linear layer, plain or quantized (each kind has a class of its own)."""
    from peft.tuners.lora.layer import Linear, ParamWrapper

    if type(module) is Linear:
        return True
    own, base = type(module).__module__.startswith("peft.tuners.lora."), module.base_layer
    return own and not isinstance(module, ParamWrapper) and is_quantized(base)


def _run_frozen(module: Any, x: Tensor) -> Tensor:
    return frozen_linear(x, module.weight, module.bias)


def _label(k: int) -> str:
    """PEFT's name of adapter k: ours may be anything, PEFT's must not have dots or look like its own prefixes."""
    return f"k{k:03d}"


def soup_factors(layer: FusedLayer, weights_K: Tensor, *, how: str = "delta") -> tuple[Tensor, Tensor]:
    """(r, I) and (r, O), whose product is the soup of one layer at weights (K,); a weight of 0 adds no ranks. `how`: see `soup_state`."""
    with torch.no_grad():
        if how == "factor":
            a_rI, b_rO = layer.factor(Factor(weights_K))
            return a_rI, b_rO
        owner_R, scale_R = layer.pattern_tensors(weights_K.device)
        kept_R = (weights_K != 0)[owner_R]
        scale_R = (weights_K[owner_R] * scale_R)[kept_R].to(layer.b[0].dtype)
        return layer.a_IR().t()[kept_R], layer.b_RO()[kept_R] * scale_R[:, None]


def soup_weight(layer: FusedLayer, weights_K: Tensor, *, how: str = "delta") -> Tensor:
    """The merged weight of one layer, in float32 or wider; that of a quantized one is dequantized."""
    weight = base_weight(layer.base)
    wide = torch.promote_types(weight.dtype, torch.float32)
    a_rI, b_rO = soup_factors(layer, weights_K, how=how)
    delta_OI = b_rO.to(wide).t() @ a_rI.to(wide)
    return weight.to(wide) + (delta_OI.t() if layer.transposed else delta_OI)


def soup_state(bank: LoraBank, weights_K: Gates, *, how: str = "delta") -> dict[str, Tensor]:
    """Merged weights under the base model's own parameter names, for `load_state_dict(..., strict=False)` on a fresh copy of it.

    Those of a quantized base are dequantized, for a copy that is not quantized.

    "delta" is the exact soup W + sum_k w_k s_k B_k A_k. "factor" is W + s (sum_k w_k B_k)(sum_k w_k A_k).
    Source: rewarded soups (2306.04488); its code averages the factors.
    Differs: "delta" averages what the adapters add, as the paper's formula does for full weights.
    Hides: "factor" has cross terms w_j w_k B_j A_k between experts that never met; at w = e_k the two agree.
    """
    weights = bank._made(Gated, weights_K, dims=(1,)).gates.detach()
    if how not in ("delta", "factor"):
        raise ConfigError('a soup is "delta" or "factor"', found=repr(how), remedy='use "delta", the exact one')
    return {f"{layer.name}.weight": soup_weight(layer, weights, how=how).to(_dtype_of(bank, layer)) for layer in bank.layers}


def _dtype_of(bank: LoraBank, layer: FusedLayer) -> torch.dtype:
    return bank.base.dtype if layer.name in bank.quantized else layer.base.weight.dtype


def decoder_layers(model: Any) -> tuple[str, Sequence[Any]]:
    """The name of the list of a causal LM's decoder layers, and the layers; ("", ()) where it is not clear which list that is."""
    count = getattr(text_config(model.config), "num_hidden_layers", None)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return (outer[0], tuple(lists[outer[0]])) if len(outer) == 1 else ("", ())

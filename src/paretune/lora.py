"""K LoRA adapters of one base model, applied with a gate per row, per token, or per block of rows, and their exact soups.

`with bank.gates(g)` is the exact ("delta") soup sum_k g_k s_k B_k A_k for every row of the batch at once, unmerged, at the cost of one
model. `with bank.blocks()` is the other layout: K equal blocks of rows, block k under adapter k alone, which logit and hidden-state
mixing need. Adapters stay in plain PEFT format on disk.

What would silently compute something else is refused with an error: merged layers, DoRA and other variants, adapter dropout in
training mode, a batch that was expanded behind the gates' back (beams, `num_return_sequences`), and a forward outside of any context.
Layers that are recomputed during `backward` need the same context around it: `trunk.recomputed` sees to that.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError, nearest
from paretune.fused import Blocks, Factor, FusedLayer, Gated, Mode, Reference, Switch, join_siblings
from paretune.plain_lora import check_config, check_trainable
from paretune.seeds import forked_torch, seed_for
from paretune.trunk import decoder_layers

__all__ = ["LoraBank", "soup_state", "write_adapter"]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
Gates = Tensor | np.ndarray | Sequence[Any]


class LoraBank:
    """The adapters `names` (axis K) of the causal LM `base`. Make one with `attach` (fresh adapters) or `load` (from disk)."""

    def __init__(self, base: Any):
        if hasattr(base, "peft_config"):
            raise ConfigError(
                "a bank wraps a model without adapters",
                found=f"{type(base).__name__} with {', '.join(base.peft_config)}",
                remedy="load the base model afresh and its adapters with LoraBank.load",
            )
        self.base, self.model = base, base
        self.names: tuple[str, ...] = ()
        self._trainable: set[str] = set()
        self._switch = Switch()
        self._layers: list[FusedLayer] = []
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
        alpha: int = 32,
        targets: str | Sequence[str] = "all-linear",
        trainable: Sequence[str] | None = None,
    ) -> LoraBank:
        """Fresh adapters (B = 0) on the HF causal LM `model`; each is initialised from its own stream of `seed`, named by its name.

        `targets` is "all-linear" (every linear layer but the head) or names of modules. `names` may be empty: the reference alone.
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
        alpha: int = 32,
        targets: str | Sequence[str] = "all-linear",
        trainable: bool = True,
    ) -> None:
        """One more fresh adapter, at the end of axis K."""
        from peft import LoraConfig

        chosen = targets if isinstance(targets, str) else list(targets)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
        self._install(name, config, seed_for(seed, "lora", name), trainable)

    def add_from(self, name: str, path: str | Path, *, trainable: bool = False) -> None:
        """One more adapter from a plain PEFT directory, at the end of axis K."""
        from peft import LoraConfig, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (path / file).is_file():
                raise ConfigError(
                    f"an adapter directory holds {CONFIG_FILE} and {WEIGHTS_FILE}",
                    found=f"no {file} in {path}",
                    remedy="save it with PEFT's save_pretrained (safetensors; pickled weights are never loaded)",
                )
        try:
            config, weights = LoraConfig.from_pretrained(str(path)), load_file(path / WEIGHTS_FILE)
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ConfigError("an adapter's files can be read", found=f"{path}: {error}", remedy="copy or train it again") from error
        self._install(name, config, 0, trainable)
        label = _label(self.names.index(name))
        try:
            result: Any = set_peft_model_state_dict(self.model, weights, adapter_name=label)
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

    def _install(self, name: str, config: Any, seed: int, trainable: bool) -> None:
        from peft import get_peft_model

        check_config(name, config, self.names)
        label = _label(self.count)
        with forked_torch(seed):
            if self.model is self.base:
                self.model = get_peft_model(self.base, config, adapter_name=label)
            else:
                self.model.add_adapter(label, config)
        self.names = (*self.names, name)
        if trainable:
            self._trainable.add(name)
        self._refresh()

    def _refresh(self) -> None:
        """Take over the forward of every LoRA layer; set what is trainable (PEFT changes it when adapters come)."""
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.layer import Linear
        from peft.utils.other import AuxiliaryTrainingWrapper

        self.detach()
        labels = [_label(k) for k in range(self.count)]
        trained = {label for label, name in zip(labels, self.names, strict=True) if name in self._trainable}
        self.base.requires_grad_(False)
        self.base.eval()  # dropout would differ between sampling and scoring; PEFT's new layers come in training mode
        for name, module in self.base.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) or (isinstance(module, LoraLayer) and type(module) is not Linear):
                raise ConfigError(
                    "gates work on LoRA adapters of linear layers",
                    found=f"{name}: {type(module).__name__}",
                    remedy="target linear layers only, without modules_to_save, embeddings or quantised layers",
                )
            if isinstance(module, LoraLayer):
                assert not module.lora_variant, f"{name} has a variant that its adapter's settings do not show"
                for label in trained & set(module.lora_A):
                    module.lora_A[label].requires_grad_(True)
                    module.lora_B[label].requires_grad_(True)
                layer = FusedLayer(self._switch, labels, name, module, self._depth(name, module))
                module.__dict__["forward"] = layer.forward
                self._layers.append(layer)
        join_siblings(self._layers)
        self._tensors = [p for k in range(self.count) for p in self.parameters_of(k)]

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
        self._look()
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def _look(self) -> None:
        """Forget what was made of parameters that have been written into, moved, frozen or thawed since."""
        if self._held:
            return
        tensors = self._tensors  # three flat lists: this is done for every forward
        stamp: list[list[Any]] = [[p._version for p in tensors], [p.data_ptr() for p in tensors], [p.requires_grad for p in tensors]]
        if stamp != self._stamp:
            self._stamp = stamp
            for layer in self._layers:
                layer.forget()

    @contextlib.contextmanager
    def mode(self, mode: Mode) -> Iterator[None]:
        """What the layers compute within; `gates`, `blocks`, `factor` and `routing.routed` make the mode."""
        self._look()
        before = self._switch.turn(mode)
        try:
            yield
        finally:
            self._switch.turn(before)

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

    def export(self, weights_K: Gates, path: str | Path) -> None:
        """Write the exact soup at `weights_K` as one plain LoRA whose rank is the sum of the ranks (a weight of 0 adds none)."""
        from peft import LoraConfig

        if not self._layers:
            raise ConfigError("an export has an adapter at least", found="the reference alone", remedy="use the base model itself")
        weights = self._made(Gated, weights_K, dims=(1,)).gates.tolist()
        kept = [k for k, w in enumerate(weights) if w != 0] or [0]
        rank = max(sum(a.shape[0] for k, a in zip(layer.members, layer.a, strict=True) if k in kept) for layer in self._layers)
        tensors: dict[str, Tensor] = {}
        for layer in self._layers:
            a_RI = layer.a[0].new_zeros(rank, layer.a[0].shape[1])
            b_OR = layer.b[0].new_zeros(layer.b[0].shape[0], rank)
            start = 0
            for k, a, b, scale in zip(layer.members, layer.a, layer.b, layer.scalings, strict=True):
                if k in kept:
                    a_RI[start : start + len(a)] = a.detach()
                    b_OR[:, start : start + len(a)] = b.detach() * (weights[k] * scale)
                    start += len(a)
            tensors[f"base_model.model.{layer.name}.lora_A.weight"] = a_RI
            tensors[f"base_model.model.{layer.name}.lora_B.weight"] = b_OR
        targets = sorted(layer.name for layer in self._layers)
        fan = any(config.fan_in_fan_out for config in self.model.peft_config.values())
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", fan_in_fan_out=fan
        )
        write_adapter(Path(path), config, tensors)


def soup_state(bank: LoraBank, weights_K: Gates, *, how: str = "delta") -> dict[str, Tensor]:
    """Merged weights under the base model's own parameter names, for `load_state_dict(..., strict=False)` on a fresh copy of it.

    "delta" is the exact soup W + sum_k w_k s_k B_k A_k. "factor" is W + s (sum_k w_k B_k)(sum_k w_k A_k).
    Source: rewarded soups (2306.04488); its code averages the factors.
    Differs: "delta" averages what the adapters add, as the paper's formula does for full weights.
    Hides: "factor" has cross terms w_j w_k B_j A_k between experts that never met; at w = e_k the two agree.
    """
    weights = bank._made(Gated, weights_K, dims=(1,)).gates.detach()
    if how not in ("delta", "factor"):
        raise ConfigError('a soup is "delta" or "factor"', found=repr(how), remedy='use "delta", the exact one')
    merged = {}
    with torch.no_grad():
        for layer in bank._layers:
            if how == "factor":
                a_rI, b_rO = layer.factor(Factor(weights))
            else:
                a_IR, b_rO = layer.a_IR(), layer.b_RO()
                owner, scale = layer.pattern_tensors(weights.device)
                a_rI = (a_IR * (weights[owner] * scale)).t()
            weight = layer.base.weight
            wide = torch.promote_types(weight.dtype, torch.float32)
            delta_OI = b_rO.to(wide).t() @ a_rI.to(wide)
            delta = delta_OI.t() if layer.module.fan_in_fan_out else delta_OI
            merged[f"{layer.name}.weight"] = (weight.to(wide) + delta).to(weight.dtype)
    return merged


def _label(k: int) -> str:
    """PEFT's name of adapter k: ours may be anything, PEFT's must not have dots or look like its own prefixes."""
    return f"k{k:03d}"


def write_adapter(path: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of one adapter, under PEFT's names, and its configuration: the same bytes for the same weights."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    settings["inference_mode"] = True
    if Path(str(settings.get("base_model_name_or_path") or ".")).exists():  # a folder of this machine says nothing elsewhere
        settings["base_model_name_or_path"] = None
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path / WEIGHTS_FILE, metadata={"format": "pt"})
    (path / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

"""What an adapter must be for gates to scale it, and its files: plain LoRA adds B A x to a linear layer and does nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.errors import ConfigError, nearest
from paretune.types import check_name

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "check_config", "check_trainable", "read_adapter", "read_factors", "write_adapter"]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# Settings of PEFT that make an adapter more than B A x: variants, other trained tensors, initializations that change the base weights.
NOT_PLAIN = (
    *(
        "use_dora",
        "use_bdlora",
        "use_qalora",
        "arrow_config",
        "alora_invocation_tokens",
        "velora_config",
        "monteclora_config",
        "kasa_config",
    ),
    *(
        "megatron_config",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
        "init_lora_weights",
    ),
)


def check_trainable(names: Iterable[str], trainable: Iterable[str] | None) -> None:
    """What is trained must exist."""
    for name in trainable or ():
        if name not in names:
            raise ConfigError("what is trained is one of the adapters", found=repr(name), remedy=nearest(name, names))


def check_config(name: str, config: Any, names: Sequence[str]) -> None:
    """Refuse, before anything is built, what gates cannot do."""
    if name in names or not name:
        raise ConfigError("adapter names are distinct and not empty", found=repr(name), remedy="choose another name")
    check_name("an adapter", name)
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        raise ConfigError("gates work on LoRA adapters", found=f"{name}: {config.peft_type}", remedy="train the adapter as plain LoRA")
    for setting in NOT_PLAIN:
        value = getattr(config, setting, None)
        if value and not (setting == "init_lora_weights" and value in (True, "gaussian", "orthogonal", "eva")):
            raise ConfigError(
                "gates work on plain LoRA adapters",
                found=f"{name}: {setting}={value!r}",
                remedy="train the adapter without it: it would change the base, or not scale with a gate",
            )
    if config.bias != "none":
        raise ConfigError("gates work on plain LoRA adapters", found=f"{name}: bias={config.bias!r}", remedy='train with bias="none"')


def read_adapter(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Settings and tensors of a plain PEFT directory; the tensors may lie in the file until they are written into."""
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / file).is_file():
            raise ConfigError(
                f"an adapter directory holds {CONFIG_FILE} and {WEIGHTS_FILE}",
                found=f"no {file} in {path}",
                remedy="save it with PEFT's save_pretrained (safetensors; pickled weights are never loaded)",
            )
    try:
        return LoraConfig.from_pretrained(str(path)), load_file(path / WEIGHTS_FILE)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ConfigError("an adapter's files can be read", found=f"{path}: {error}", remedy="copy or train it again") from error


def read_factors(path: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Layer -> A (r, I), B (O, r) and their scale, of a plain PEFT directory: what it adds to the layer's weight is scale * B A."""
    from peft.utils.other import get_pattern_key

    config, tensors = read_adapter(path)
    check_config(path.name, config, ())
    found = {}
    for key, a_rI in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alphas = config.alpha_pattern or {}
        alpha: Any = alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha)
        scale = float(alpha) / (len(a_rI) ** 0.5 if config.use_rslora else len(a_rI))
        found[layer] = a_rI, tensors[key.replace(".lora_A.", ".lora_B.")], scale
    return found


def write_adapter(path: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """A plain PEFT directory: the same bytes for the same weights."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    settings["inference_mode"] = True
    if Path(str(settings.get("base_model_name_or_path") or ".")).exists():  # a folder of this machine says nothing elsewhere
        settings["base_model_name_or_path"] = None
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path / WEIGHTS_FILE, metadata={"format": "pt"})
    (path / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

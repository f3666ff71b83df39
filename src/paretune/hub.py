"""Models and data sets by name: a folder, or something on the hub; what it holds, and how to bring it here without a network."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from paretune.errors import ConfigError

__all__ = ["check_pretrained", "content_of", "how_to_get", "is_local", "local_or_hub", "refuse_kernels", "unloadable"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
KEPT = (".safetensors", ".json", ".model", ".jinja", ".txt", ".py")  # what a model directory means; not its notes and pictures
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")


def is_local(name: str) -> bool:
    """Whether `name` is a path: it looks like one, or it is there. Everything else is a name on the hub."""
    return name.startswith((".", "/", "~")) or Path(name).is_absolute() or Path(name).exists() or not HUB_ID.fullmatch(name)


def local_or_hub(name: str) -> str:
    """What `from_pretrained` is given."""
    return str(Path(name).expanduser()) if is_local(name) else name


def check_pretrained(model: str) -> None:
    """ConfigError if `model` is a directory that cannot be a reference model. Names on the hub are checked when they are loaded."""
    if not is_local(model):
        return
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            "the model is a directory, or the name of a model on the hub",
            found=f"{'a file' if folder.exists() else 'nothing'} at {folder}",
            remedy="paths in a recipe are relative to the recipe's own folder; a hub name reads owner/model",
        )
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    if "config.json" not in names:
        adapter = "adapter_config.json" in names
        raise ConfigError(
            "a model directory has a config.json",
            found="an adapter without its base model" if adapter else f"{folder.name}: {_listed(names)}",
            remedy="merge the adapter into its base and save that" if adapter else "save the model there with save_pretrained",
        )
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(PICKLES)]
        raise ConfigError(
            "weights are read from safetensors only, because a pickle can run code",
            found=f"{folder.name}: {_listed(pickles or names)}",
            remedy="load it where you trust it, and write it again: model.save_pretrained(folder, safe_serialization=True)",
        )
    if not any(name in TOKENIZER_FILES for name in names):
        raise ConfigError(
            "a model directory has its tokenizer beside the weights",
            found=f"{folder.name}: {_listed(names)}",
            remedy="save it there: AutoTokenizer.from_pretrained(the base model).save_pretrained(folder)",
        )


def refuse_kernels(what: str, model: str, config: Any) -> None:
    """ConfigError where a configuration names an attention kernel of the hub, which transformers would download and run."""
    named = str(getattr(config, "_attn_implementation", None) or "")
    if "/" in named:
        raise ConfigError(
            f"{what} runs no code of its own unless you trust it",
            found=f"attn_implementation {named!r} in the configuration of {model}: a kernel on the hub",
            remedy="take attn_implementation out of its config.json, or read the kernel and set trust_remote_code: true",
        )


def content_of(model: str, revision: str | None, *, what: str = "the reference model") -> dict[str, str]:
    """File -> hash of a local model; {"commit": hash} of one on the hub, so that a moved branch is another model."""
    if is_local(model):
        files = sorted(p for p in Path(model).expanduser().iterdir() if p.is_file() and p.suffix in KEPT)
        return {p.name: _hash(p) for p in files}
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return {"commit": revision}
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        found = cached_file(model, "config.json", revision=revision)
    except Exception as error:
        raise unloadable(what, model, revision, error) from error
    return {"commit": str(extract_commit_hash(found, None))}


def how_to_get(name: str, *, key: str, revision: str | None = None, data: bool = False) -> str:
    """What to download on a machine that has a network, and where to put it."""
    extra = (" --repo-type dataset" if data else "") + (f" --revision {revision}" if revision else "")
    folder = name.rpartition("/")[2]
    return (
        f"check the name; without a network, run `hf download {name}{extra} --local-dir {folder}` on a machine that has one, "
        f"copy the folder here, and write {key}: with its path"
    )


def unloadable(what: str, model: str, revision: str | None, error: Exception, *, loader: str = "AutoModelForCausalLM") -> ConfigError:
    """The error for a model that transformers could not load; `what` it is begins the rule, and `loader` is the class that tried."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    remedy = how_to_get(model, key="model", revision=revision)
    if "trust_remote_code" in str(error):
        remedy = "read that code first; then set trust_remote_code: true in the recipe, or for a family give --trust"
    elif is_local(model):
        remedy = f"load it by hand with {loader}.from_pretrained and use_safetensors=True to see the whole message"
    elif "safetensors" in str(error):
        remedy = "its weights are pickles, which can run code: load it where you trust it, save_pretrained it to a folder, and name that"
    return ConfigError(
        f"{what} can be loaded",
        found=f"{model}{'' if revision is None else '@' + revision}: {type(error).__name__}: {' '.join(lines[:2])}",
        remedy=remedy,
    )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:20]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "no files"

"""A reference model of one's own: found, checked before it is loaded, loaded from safetensors, and known by its content.

`load_pretrained` makes every model look alike to the rest of the project: evaluation mode, left padding, a padding token (EOS
where the tokenizer has none), and all its EOS ids in `model.generation_config.eos_token_id`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_pretrained", "content_of", "context_length", "is_local", "load_pretrained", "load_tokenizer"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
KEPT = (".safetensors", ".json", ".model", ".jinja", ".txt", ".py")  # what a model directory means; not its notes and pictures
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")


def is_local(model: str) -> bool:
    """Whether `model` is a path: it looks like one, or it is there. Everything else is the name of a model on the hub."""
    return model.startswith((".", "/", "~")) or Path(model).is_absolute() or Path(model).exists() or not HUB_ID.fullmatch(model)


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


def content_of(model: str, revision: str | None) -> dict[str, str]:
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
        raise _unloadable(model, revision, error) from error
    return {"commit": str(extract_commit_hash(found, None))}


def context_length(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """How many tokens a prompt and its answer may have together; None where the configuration does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(_place(model), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _unloadable(model, revision, error) from error
    return getattr(config, "max_position_embeddings", None)


def load_tokenizer(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left; `load_pretrained` gives it a padding token."""
    from transformers import AutoTokenizer

    check_pretrained(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(_place(model), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _unloadable(model, revision, error) from error
    tokenizer.padding_side = "left"
    return tokenizer


def load_pretrained(
    model: str, *, revision: str | None = None, dtype: str = "float32", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh copy of a causal LM in evaluation mode, and its tokenizer. Safetensors only; no code from the model unless trusted."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            _place(model), revision=revision, trust_remote_code=trust_remote_code, use_safetensors=True, dtype=dtype
        )
    except Exception as error:
        raise _unloadable(model, revision, error) from error
    rows = int(loaded.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise ConfigError(
            "a model and its tokenizer belong together",
            found=f"token ids up to {max(tokenizer.get_vocab().values())} for {rows} embeddings",
            remedy="save the tokenizer that the model was trained with beside it",
        )
    _set_special_tokens(model, loaded, tokenizer)
    return loaded.eval(), tokenizer


def _set_special_tokens(model: str, loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every EOS id in the generation config, tokenizer's own first; a padding token."""
    given: Any = loaded.generation_config.eos_token_id if loaded.generation_config is not None else None
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    ends = [int(e) for e in dict.fromkeys([tokenizer.eos_token_id, *listed]) if e is not None]
    if not ends:
        raise ConfigError(
            "a model can end its answer",
            found=f"no EOS token in the tokenizer or the generation config of {model}",
            remedy="set eos_token in the tokenizer, or eos_token_id in generation_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    loaded.generation_config.eos_token_id = ends
    loaded.generation_config.pad_token_id = tokenizer.pad_token_id


def _place(model: str) -> str:
    return str(Path(model).expanduser()) if is_local(model) else model


def _unloadable(model: str, revision: str | None, error: Exception) -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    remedy = "check the name; without a network the model must be in the cache, or a local directory with safetensors weights"
    if "trust_remote_code" in str(error):
        remedy = "read that code first; then set trust_remote_code: true in the recipe"
    elif is_local(model):
        remedy = "load it by hand with AutoModelForCausalLM.from_pretrained and use_safetensors=True to see the whole message"
    return ConfigError(
        "the reference model can be loaded",
        found=f"{model}{'' if revision is None else '@' + revision}: {type(error).__name__}: {' '.join(lines[:2])}",
        remedy=remedy,
    )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:20]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "no files"

"""Models and data sets by name: a folder, a GGUF file, or something on the hub; what it holds, and how to bring it here without a network.

A GGUF file (the format of llama.cpp) holds a model, often quantized, and its tokenizer. Its weights become plain numbers when it is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import shlex
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paretune.errors import ConfigError, first_line
from paretune.progress import during

__all__ = [
    "check_pretrained",
    "check_push",
    "content_of",
    "how_to_get",
    "is_gguf",
    "is_local",
    "load_tokenizer",
    "local_or_hub",
    "located",
    "positions_of",
    "push",
    "quietly",
    "refuse_kernels",
    "text_config",
    "unloadable",
]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
KEPT = (".safetensors", ".json", ".model", ".jinja", ".txt", ".py")  # what a model directory means; not its notes and pictures
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")


def is_local(name: str) -> bool:
    """Whether `name` is a path: it looks like one, or it is there. Everything else is a name on the hub."""
    looks = name.startswith((".", "/", "~")) or Path(name).is_absolute() or is_gguf(name)
    return looks or Path(name).exists() or not HUB_ID.fullmatch(name)


def is_gguf(name: str) -> bool:
    """Whether `name` is one file with a model and its tokenizer."""
    return name.lower().endswith(".gguf") and not Path(name).expanduser().is_dir()


def local_or_hub(name: str) -> str:
    """What `from_pretrained` is given."""
    return str(Path(name).expanduser()) if is_local(name) else name


def located(name: str, *, weights: bool = False) -> dict[str, Any]:
    """The arguments with which `from_pretrained` finds a model; with `weights`, those of a GGUF file are loaded as plain numbers."""
    if not is_gguf(name):
        return {"pretrained_model_name_or_path": local_or_hub(name)}
    path = Path(name).expanduser().resolve()
    found: dict[str, Any] = {"pretrained_model_name_or_path": _alone(path).name, "gguf_file": path.name}
    if weights:
        from transformers import GgufConfig

        found["quantization_config"] = GgufConfig(dequantize=True)  # layers stay torch's, so that adapters fit and `save_pretrained` works
    return found


def weight_files(name: str, revision: str | None) -> list[str]:
    """The safetensors files of a model, on this machine; [] where there are none of the usual names."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    def found(file: str) -> str | None:
        return cached_file(local_or_hub(name), file, revision=revision, _raise_exceptions_for_missing_entries=False)

    if (one := found(SAFE_WEIGHTS_NAME)) is not None:
        return [one]
    index = found(SAFE_WEIGHTS_INDEX_NAME)
    return [] if index is None else list(get_checkpoint_shard_files(local_or_hub(name), index, revision=revision)[0])


@functools.cache
def _alone(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder with a link to this file only: transformers would mix in the tokenizer or the adapter of a model that lies beside it."""
    folder = tempfile.TemporaryDirectory(prefix="paretune-gguf-")
    (Path(folder.name) / path.name).symlink_to(path)
    return folder  # removed when the process ends


@contextlib.contextmanager
def quietly(what: str) -> Iterator[None]:
    """Load or save something large: whoever listens hears `what`, and the bars and FutureWarnings of transformers are left out."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with during(what), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model; may raise anything that transformers does."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(**located(name), revision=revision, trust_remote_code=trust_remote_code)
    if not is_gguf(name) or len(tokenizer) <= (count := _gguf_tokens(name)):
        return tokenizer
    from tokenizers import Tokenizer  # transformers adds GPT-2's <|endoftext|> to a vocabulary without it: an id that has no embedding

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < count]
    kept = {"chat_template": tokenizer.chat_template, **tokenizer.special_tokens_map}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **kept)


def check_pretrained(model: str) -> None:
    """ConfigError if `model` is a directory that cannot be a reference model. Names on the hub are checked when they are loaded."""
    if not is_local(model):
        return
    folder = Path(model).expanduser()
    if is_gguf(model) and folder.is_file():
        _gguf_tokens(model)
        return
    if not folder.is_dir():
        raise ConfigError(
            "the model is a directory, or the name of a model on the hub, or a GGUF file",
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
        path = Path(model).expanduser()
        files = [path] if is_gguf(model) else sorted(p for p in path.iterdir() if p.is_file() and p.suffix in KEPT)
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
    extra = (" --repo-type dataset" if data else "") + (f" --revision {shlex.quote(revision)}" if revision else "")
    folder = name.rpartition("/")[2]
    return (
        f"check the name; without a network, run `hf download {shlex.quote(name)}{extra} --local-dir {shlex.quote(folder)}` "
        "on a machine that has one, "
        f"copy the folder here, and write {key}: with its path"
    )


def unloadable(what: str, model: str, revision: str | None, error: Exception, *, loader: str = "AutoModelForCausalLM") -> ConfigError:
    """The error for a model that transformers could not load; `what` it is begins the rule, and `loader` is the class that tried."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    remedy = how_to_get(model, key="model", revision=revision)
    if "trust_remote_code" in str(error):
        remedy = "read that code first; then set trust_remote_code: true in the recipe, or for a family give --trust"
    elif is_gguf(model):
        remedy = "transformers reads the commoner architectures of GGUF; name a folder with the model's safetensors weights instead"
    elif is_local(model):
        remedy = f"load it by hand with {loader}.from_pretrained and use_safetensors=True to see the whole message"
    elif "safetensors" in str(error):
        remedy = "its weights are pickles, which can run code: load it where you trust it, save_pretrained it to a folder, and name that"
    return ConfigError(
        f"{what} can be loaded",
        found=f"{model}{'' if revision is None else '@' + revision}: {type(error).__name__}: {' '.join(lines[:2])}",
        remedy=remedy,
    )


def _gguf_tokens(model: str) -> int:
    """How many tokens the tokenizer of a GGUF file has; ConfigError where no model can be read from the file."""
    path = Path(model).expanduser()
    state = path.stat()
    return _read_gguf(path, (state.st_size, state.st_mtime_ns))


@functools.lru_cache
def _read_gguf(path: Path, stamp: tuple[int, int]) -> int:
    try:
        import gguf
    except ImportError:
        remedy = "pip install 'paretune[gguf]', or name a folder with safetensors weights"
        raise ConfigError("a GGUF file is read with the package gguf", found=f"{path.name}, and no such package", remedy=remedy) from None
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # whatever a cut or foreign file leads to
        raise ConfigError(
            "a GGUF file can be read to its end",
            found=f"{path.name}, {stamp[0]} bytes: {type(error).__name__}: {' '.join(str(error).split())[:120]}",
            remedy="download it again (an LFS pointer of 130 bytes is not the file); a quantization newer than gguf needs a newer gguf",
        ) from error
    tokens = reader.get_field("tokenizer.ggml.tokens")
    if tokens is None or not len(tokens.data):
        raise ConfigError(
            "a GGUF model has its tokenizer in the same file",
            found=f"no tokenizer.ggml.tokens in {path.name}",
            remedy="convert it again with its tokenizer, or name a folder with safetensors weights and a tokenizer",
        )
    unread = {tensor.tensor_type.name for tensor in reader.tensors if not _dequantizes(tensor.tensor_type)}
    if unread:
        raise ConfigError(
            "every tensor of a GGUF file can be dequantized",
            found=f"{', '.join(sorted(unread))} in {path.name}, which the package gguf does not dequantize",
            remedy="take a file in F16, Q8_0, Q4_K_M or Q4_0, or a folder with safetensors weights",
        )
    scaled = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    scaled += [f"{name} {field.contents()}" for name, field in reader.fields.items() if name.endswith("rope.scaling.factor")]
    if scaled:
        raise ConfigError(
            "a GGUF model has plain rotary positions: transformers does not read their scaling from the file",
            found=f"{', '.join(scaled)} in {path.name}",
            remedy="name a folder with the model's safetensors weights",
        )
    return len(tokens.data)


def _dequantizes(kind: Any) -> bool:
    """Whether the package gguf turns one block of this type into numbers."""
    import gguf
    import numpy as np

    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except Exception:
        return False
    return True


def text_config(config: Any) -> Any:
    """The part of a model's configuration that describes its decoder of text; the whole of it, unless the model reads pictures too."""
    find = getattr(config, "get_text_config", None)
    return config if find is None else find(decoder=True)


def positions_of(config: Any) -> tuple[int | None, str]:
    """How many tokens a sequence may have, and in words where that stands; None where the configuration does not say.

    Under the rope type longrope the frequencies of all rows change where the longest row of a forward passes a threshold. What a row says
    would then depend on the rows beside it, and keys in a cache would belong to other frequencies. So the threshold is the limit.
    (The type dynamic does the same beyond max_position_embeddings, which is the limit in any case.)
    """
    text = text_config(config)
    given = getattr(text, "rope_parameters", None) or {}
    known = {"max_position_embeddings": getattr(text, "max_position_embeddings", None)}
    for rope in (given, *(part for part in given.values() if isinstance(part, dict))):
        if rope.get("rope_type", rope.get("type")) == "longrope":
            threshold = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
            known["original_max_position_embeddings, beyond which longrope changes the frequencies of a whole batch"] = threshold
    why, limit = min(((why, n) for why, n in known.items() if n is not None and n > 0), key=lambda one: one[1], default=("", None))
    return limit, why


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:20]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "no files"


# What goes to the hub


def check_push(name: str) -> None:
    """ConfigError where nothing could be pushed to OWNER/NAME: no such name, no network wanted, or nobody logged in. Asks no server."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        wrong = "" if "/" in name else "no owner"
    except HFValidationError as error:
        wrong = first_line(error)
    if wrong:
        raise ConfigError("a model on the hub is OWNER/NAME", found=f"{name!r}: {wrong}", remedy="for example --push my-name/polite-70")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("--push needs the hub", found="HF_HUB_OFFLINE is set", remedy="unset it, or leave --push out")
    if not get_token():
        raise ConfigError("--push needs a token that may write", found="none", remedy="log in with `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, *, private: bool = True) -> str:
    """Upload a folder as the model OWNER/NAME, made if it is not there; returns its address. One that is there stays as public as it is."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of Paretune")
    except Exception as error:  # of the network, the server, or the rights of a token
        found = f"{name}: {type(error).__name__}: {first_line(error)}"
        remedy = f"the export itself is whole, in {folder}; check the token's rights, then `hf upload {name} {folder}`"
        raise ConfigError("the hub takes the upload", found=found, remedy=remedy) from error
    return str(address)

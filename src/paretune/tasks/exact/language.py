"""The reference policy of exact tasks: a tiny, real `LlamaForCausalLM`, pre-trained in seconds on a seeded random language.

The language is a second-order Markov chain over the alphabet with a chance to stop; where it has `features`, every symbol of a response
depends on the whole prompt, too. The model is fitted to its known next-symbol distribution on strings drawn from it. Training runs on one
thread from seeded draws, and its result is cached on disk (`PARETUNE_CACHE`, default `~/.cache/paretune`), published by one rename
with the hashes of its files. What is damaged there is made again, with a warning.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import softmax

from paretune.errors import TaskError
from paretune.files import changed, note, read_manifest, remove, seal
from paretune.hub import quietly
from paretune.seeds import forked_torch, generator, seed_for
from paretune.types import key_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ReferenceSpec", "alphabet_of", "check_width", "load_reference", "one_thread", "sample_language"]

SYMBOLS = "abcdefghijklmnopqrstuvwxyz"
EOS_TEXT = "<eos>"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
SEAL = "DONE"  # the hashes of the files, written last
RECIPE = 1  # raise when pre-training changes: it is part of the cache's key


@dataclass(frozen=True)
class ReferenceSpec:
    """Everything the reference depends on."""

    alphabet: int
    seed: int
    width: int = 128
    layers: int = 2
    heads: int = 4
    context: int = 3  # symbols of a prompt
    length: int = 4  # longest response
    stop: float = 0.12  # mean chance of EOS after each symbol
    spread: float = 0.8  # standard deviation of the language's logits
    steps: int = 200
    head: float = 1.0  # the output head begins this many times larger
    features: int = 0  # of the whole prompt, on which the language of responses depends
    memory: float = 0.0  # standard deviation of what they add to a logit


def check_width(width: int) -> None:
    """TaskError where the reference's heads do not share the width, or have an odd size, which rotary embeddings cannot turn."""
    unit = 2 * ReferenceSpec.heads
    if width < unit or width % unit:
        raise TaskError(
            f"width is a multiple of {unit}: {ReferenceSpec.heads} attention heads share it, each an even number",
            found=f"width = {width}",
            remedy=f"for example {max(1, round(width / unit)) * unit}",
        )


def alphabet_of(count: int) -> str:
    """The symbols of an alphabet of that size."""
    return SYMBOLS[:count]


def language_logits(spec: ReferenceSpec) -> np.ndarray:
    """(A, A, V) logits of the next symbol after two symbols (older, newer); EOS last."""
    rng = generator(spec.seed, "language")
    a = spec.alphabet
    logits = rng.normal(0, spec.spread, (1, a, a + 1)) + rng.normal(0, spec.spread / 2, (a, 1, a + 1))
    logits[:, :, a] = np.log(spec.stop / (1 - spec.stop) * np.exp(logits[:, :, :a]).sum(-1)) + rng.normal(0, 0.3, (a, a))
    return logits


def prompt_features(spec: ReferenceSpec, prompts_NT: np.ndarray) -> np.ndarray:
    """(N, F) what language and rewards read of a prompt: a normal vector per place and symbol, summed over places; variance 1."""
    vectors_TAF = generator(spec.seed, "prompt features").normal(0, spec.context**-0.5, (spec.context, spec.alphabet, spec.features))
    return vectors_TAF[np.arange(spec.context), prompts_NT].sum(1)


def next_logits(spec: ReferenceSpec, strings_NT: np.ndarray) -> np.ndarray:
    """(N, T - 1, V) logits of the language for the symbol after the second one of each string, after the third, and so on."""
    logits_NTV = language_logits(spec)[strings_NT[:, :-1], strings_NT[:, 1:]]
    if spec.features and strings_NT.shape[1] >= spec.context:
        weights_FV = generator(spec.seed, "memory").normal(0, spec.memory / spec.features**0.5, (spec.features, spec.alphabet + 1))
        logits_NTV[:, spec.context - 2 :] += (prompt_features(spec, strings_NT[:, : spec.context]) @ weights_FV)[:, None]
    return logits_NTV


def sample_language(spec: ReferenceSpec, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """(count, length) symbols: two uniform ones, then the language without its EOS."""
    strings = rng.integers(spec.alphabet, size=(count, length))
    for place in range(2, length):
        cumulative = softmax(next_logits(spec, strings[:, :place])[:, -1, : spec.alphabet], axis=-1).cumsum(-1)
        strings[:, place] = (rng.random((count, 1)) > cumulative[:, :-1]).sum(-1)
    return strings


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever number of threads the caller has: a task's rewards are the same bits under any."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_reference(spec: ReferenceSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh copy of the reference and its tokenizer, pre-trained now if the cache does not hold it."""
    home = Path(os.environ.get("PARETUNE_CACHE", "~/.cache/paretune")).expanduser()
    later = {"head": 1.0, "features": 0, "memory": 0.0}  # fields that came later count where they are not at their defaults
    told = {name: value for name, value in dataclasses.asdict(spec).items() if later.get(name) != value}
    folder = home / f"reference-{key_of({'recipe': RECIPE, **told})}"
    if not _is_whole(folder):
        if folder.exists():
            note(f"the reference model in {folder} is damaged, and is made again")
        home.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".wip-", dir=home))
        with quietly("making the reference model"):
            _pretrain(spec).save_pretrained(aside)
            _tokenizer(spec).save_pretrained(aside)
        seal(aside, SEAL)
        try:
            if not _is_whole(folder):
                remove(folder)
            aside.replace(folder)
        except OSError:  # another process published it first: theirs is the same
            shutil.rmtree(aside)
    return copy.deepcopy(_loaded(folder))


def _is_whole(folder: Path) -> bool:
    """Whether every file is as it was published. Without config.json, transformers would make a model of seven billion weights.

    Folders from before there were hashes have none to compare; there, a file that is missing or empty is seen.
    """
    try:
        hashes = read_manifest(folder / SEAL)
    except OSError:
        return all((folder / name).is_file() and (folder / name).stat().st_size for name in FILES)
    return hashes is not None and not changed(folder, hashes, remembered=True)


@lru_cache(maxsize=4)
def _loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read once: a suite asks for the same small reference hundreds of times."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    with quietly("loading the model"):
        model = LlamaForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _tokenizer(spec: ReferenceSpec) -> PreTrainedTokenizerBase:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet_of(spec.alphabet), EOS_TEXT])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TEXT, pad_token=EOS_TEXT, padding_side="left")


def _pretrain(spec: ReferenceSpec) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    eos = spec.alphabet
    config = LlamaConfig(
        vocab_size=spec.alphabet + 1,
        hidden_size=spec.width,
        intermediate_size=2 * spec.width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        max_position_embeddings=max(64, 2 * (spec.context + spec.length)),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    with one_thread():
        with forked_torch(seed_for(spec.seed, "reference")):
            model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight *= spec.head
        rng = generator(spec.seed, "pre-training")
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=spec.steps)
        for _ in range(spec.steps):
            strings = sample_language(spec, rng, 64, spec.context + spec.length)
            target = torch.from_numpy(softmax(next_logits(spec, strings), axis=-1)).float()
            logp = model(input_ids=torch.from_numpy(strings)).logits[:, 1:].log_softmax(-1)
            loss = -(target * logp).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()

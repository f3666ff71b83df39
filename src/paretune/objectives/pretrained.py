"""What objectives that are models share: fields, checks before anything runs, loading once per process, and padded batches.

Models come through the public classes of transformers, from safetensors, and no code from a hub is run unless the recipe asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from paretune.errors import ConfigError, RewardError
from paretune.hub import check_pretrained, content_of, place, unloadable
from paretune.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Loaded", "ModelObjective", "batches", "run"]

Encoded = tuple[list[int], list[int]]  # token ids, and which of two texts each belongs to
UNLIMITED = 10**9  # tokenizers without a limit say 1e30


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on its device, its tokenizer, and the longest text that it reads."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: Any
    longest: int | None


@dataclass(frozen=True, kw_only=True)
class ModelObjective(Objective):
    """What the objectives that are models share. Scores beyond [low, high] are set to its ends."""

    model: str  # a directory with safetensors weights, or a name on the hub
    low: float
    high: float
    revision: str | None = None  # a branch, tag or commit of the hub
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    device: str = "auto"  # auto: a GPU where there is one; or cpu, cuda, cuda:1, mps
    batch: int = 16  # texts per forward
    max_tokens: int | None = None  # longer texts lose their beginning; the model's own limit by default
    trust_remote_code: bool = False  # only for a model whose code you have read

    rounding: ClassVar[float] = 1e-4
    places: ClassVar[Mapping[str, str]] = {"model": "model"}
    loader: ClassVar[str]  # the class of transformers that reads it

    def __post_init__(self):
        self.check_range()
        if self.batch < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise self.refuse("batch and max_tokens are at least 1", found=f"batch={self.batch}, max_tokens={self.max_tokens}", remedy="16")

    def refuse(self, rule: str, *, found: str, remedy: str) -> ConfigError:
        return ConfigError(f"objective {self.registered_name}: {rule}", found=found, remedy=remedy)

    @property
    def what(self) -> str:
        """What it is called in messages."""
        return f"the model of objective {self.registered_name}"

    def check(self) -> None:
        """The folder, the configuration and the head, before anything is loaded."""
        check_pretrained(self.model)
        self.check_config(self.config)

    def check_config(self, config: PreTrainedConfig) -> None:
        """ConfigError where a model with this configuration cannot be this objective."""

    @cached_property
    def config(self) -> PreTrainedConfig:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(
                place(self.model), revision=self.revision, trust_remote_code=self.trust_remote_code, **self.config_options()
            )
        except Exception as error:  # a dozen kinds, from the network, the hub and the files
            raise unloadable(self.what, self.model, self.revision, error, loader=self.loader) from error

    def content(self) -> dict[str, str]:
        """Hashes of the local weights, or the hub's commit: part of the key of every training that uses it."""
        return self._content

    @cached_property
    def _content(self) -> dict[str, str]:
        check_pretrained(self.model)
        return content_of(self.model, self.revision, what=self.what)

    @cached_property
    def loaded(self) -> Loaded:
        """Loaded at first use, and shared by all objectives of this process that name the same model in the same way."""
        self.check()
        return _load(self)

    def config_options(self) -> dict[str, Any]:
        """What the configuration has to say differently."""
        return {}

    def load_options(self) -> dict[str, Any]:
        """More arguments of `from_pretrained`."""
        return {}

    def check_missing(self, missing: Sequence[str]) -> None:
        """Called with the names of the weights that the files did not hold."""
        if missing:
            raise self.refuse(
                f"every weight of {self.model} comes from its files",
                found=f"without: {', '.join(sorted(missing)[:4])}{' ...' if len(missing) > 4 else ''}",
                remedy=f"name a model that was saved with {self.loader}",
            )

    def scored(self, fractions: Sequence[float | None]) -> list[float | None]:
        """Within [low, high]; what is not a finite number could not be scored."""
        return [None if f is None or not math.isfinite(f) else min(max(float(f), self.low), self.high) for f in fractions]

    def encoded(self, texts: Sequence[Sequence[str]], *, special: bool = True) -> list[Encoded]:
        """Token ids of single texts or pairs, cut at the front where they are too long."""
        if not texts:
            return []
        tokenizer, longest = self.loaded.tokenizer, self.loaded.longest
        cut: dict[str, Any] = {} if longest is None else {"truncation": True, "max_length": longest}
        columns = list(zip(*texts, strict=True))
        given = [list(column) for column in columns]
        found = tokenizer(*given, add_special_tokens=special, return_token_type_ids=True, **cut)
        return list(zip(found["input_ids"], found["token_type_ids"], strict=True))


_LOADED: dict[tuple[Any, ...], Loaded] = {}  # of this process


def _load(objective: ModelObjective) -> Loaded:
    """The model that these fields and these files name, loaded once."""
    o = objective
    options = str(sorted(o.load_options().items()))
    key = (o.loader, o.model, o.revision, o.dtype, o.device, o.max_tokens, o.trust_remote_code, options, str(sorted(o.content().items())))
    if key not in _LOADED:
        _LOADED[key] = _load_now(objective)
    return _LOADED[key]


def _load_now(objective: ModelObjective) -> Loaded:
    import transformers

    device = _device(objective)
    options: dict[str, Any] = {"revision": objective.revision, "trust_remote_code": objective.trust_remote_code}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place(objective.model), **options)
        model, info = getattr(transformers, objective.loader).from_pretrained(
            place(objective.model),
            use_safetensors=True,
            dtype=objective.dtype,
            output_loading_info=True,
            **options,
            **objective.load_options(),
        )
    except Exception as error:
        raise unloadable(objective.what, objective.model, objective.revision, error, loader=objective.loader) from error
    objective.check_missing(sorted(info["missing_keys"]))
    tokenizer.truncation_side = "left"
    limits = [objective.max_tokens, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    known = [limit for limit in limits if limit is not None and limit < UNLIMITED]
    model.requires_grad_(False)
    return Loaded(model.eval().to(device), tokenizer, device, min(known) if known else None)


def _device(objective: ModelObjective) -> Any:
    import torch

    if objective.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(objective.device)
        torch.empty(1, device=device)
    except Exception as error:
        raise objective.refuse(
            "the device is there",
            found=f"device={objective.device!r}: {' '.join(str(error).split())[:120]}",
            remedy="device: auto, cpu, or one that torch can use here",
        ) from None
    return device


def batches(loaded: Loaded, rows: Sequence[Encoded], size: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(places, arguments of the model): rows of similar length together, padded on the right; what is empty is left out.

    The padding id occurs in no text of its batch, so that "the last token that is not padding", where decoder heads read their score, is
    the last one of the text even where EOS serves as padding. The order of the rows changes nothing.
    """
    import torch

    order = sorted((n for n in range(len(rows)) if rows[n][0]), key=lambda n: (len(rows[n][0]), rows[n]))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    for chunk in chunks:
        used = set().union(*(rows[n][0] for n in chunk))
        pad = _padding(loaded, used)
        for places in [chunk] if pad is not None else [[n] for n in chunk]:
            longest = max(len(rows[n][0]) for n in places)
            filler = pad or 0
            ids = [rows[n][0] + [filler] * (longest - len(rows[n][0])) for n in places]
            seen = [[1] * len(rows[n][0]) + [0] * (longest - len(rows[n][0])) for n in places]
            given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen)}
            if "token_type_ids" in loaded.tokenizer.model_input_names:
                given["token_type_ids"] = torch.tensor([rows[n][1] + [0] * (longest - len(rows[n][1])) for n in places])
            loaded.model.config.get_text_config().pad_token_id = pad
            yield places, {name: tensor.to(loaded.device) for name, tensor in given.items()}


def _padding(loaded: Loaded, used: set[int]) -> int | None:
    """The tokenizer's own padding id where no text holds it, else any other; None where every id is taken."""
    own = loaded.tokenizer.pad_token_id
    if own is not None and own not in used:
        return int(own)
    rows = int(loaded.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    return next((n for n in range(rows) if n not in used), None)


def run(objective: ModelObjective, rows: Sequence[Encoded]) -> Iterator[tuple[list[int], dict[str, Tensor], Any]]:
    """(places, arguments, output) of every batch; RewardError, with what to change, where one does not fit into memory."""
    import torch

    loaded = objective.loaded
    for places, given in batches(loaded, rows, objective.batch):
        try:
            with torch.no_grad():
                output = loaded.model(**given)
        except torch.OutOfMemoryError as error:
            raise RewardError(
                f"a batch of objective {objective.registered_name} fits into the memory of {loaded.device}",
                found=f"batch={objective.batch}, texts of up to {given['input_ids'].shape[1]} tokens, dtype={objective.dtype}",
                remedy="lower batch or max_tokens, set dtype: bfloat16, or choose another device",
            ) from error
        yield places, given, output

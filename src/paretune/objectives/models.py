"""Models as objectives: a reward model or classifier, similarity of embeddings, and perplexity under another language model.

`ModelObjective` has what they share: fields, checks before anything runs, loading once per process at first use, padded batches. Models
come through the public classes of transformers, from safetensors, and are known by their content. What is measured is stretched or
cut to [low, high]. Code from a hub runs only where the recipe asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from paretune.errors import ConfigError, RewardError
from paretune.hub import check_pretrained, content_of, load_tokenizer, located, positions_of, quietly, refuse_kernels, unloadable
from paretune.objectives.base import Objective

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
import re

import numpy as np

from paretune.errors import nearest
from paretune.objectives.base import text_of
from paretune.objectives.functions import names_in
from paretune.registry import OBJECTIVES
from paretune.types import Prompt, is_number, key_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

__all__ = ["Fluency", "Loaded", "ModelObjective", "RewardModel", "Similarity", "batches", "measure", "run"]

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

    model: str  # a directory with safetensors weights, a GGUF file, or a name on the hub
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
    of_reference: ClassVar[bool] = False  # in a recipe that does not say otherwise, `model` is the recipe's own
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
        if not self.trust_remote_code:
            refuse_kernels(self.what, self.model, self.config)
        self.check_config(self.config)

    def trusts(self) -> tuple[str, ...]:
        return (f"the code of the model {self.model}",) if self.trust_remote_code else ()

    def check_config(self, config: PreTrainedConfig) -> None:
        """ConfigError where a model with this configuration cannot be this objective."""

    @cached_property
    def config(self) -> PreTrainedConfig:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(
                **located(self.model), revision=self.revision, trust_remote_code=self.trust_remote_code, **self.config_options()
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
        tokenizer = load_tokenizer(objective.model, **options)
        with quietly(f"loading {objective.model}"):
            model, info = getattr(transformers, objective.loader).from_pretrained(
                **located(objective.model, weights=True),
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
    limits = [objective.max_tokens, tokenizer.model_max_length, positions_of(model.config)[0]]
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


GIVEN = ("prompt", "completion", "transcript")  # what a template may name beside columns and special tokens


SPECIAL = ("bos", "eos", "sep")


PAIR = ("{prompt}", "{completion}")


TURNS = {"user": "Human", "assistant": "Assistant"}


@OBJECTIVES.register("reward-model")
@dataclass(frozen=True, kw_only=True)
class RewardModel(ModelObjective):
    """The score of a sequence-classification model: a reward model with one output, or one class of a classifier.

    `input` is what it reads: "chat" (its tokenizer's chat template around the conversation and the completion), one template, or a
    list of two for a text pair. A template may name {completion}, {prompt}, {transcript} (the conversation as "Human:" and
    "Assistant:" turns), the columns of the prompts, and {bos}, {eos} and {sep} of the tokenizer. "auto" is chat where the tokenizer has
    a template, and the pair of prompt and completion where it has none.

    Source: AutoModelForSequenceClassification of transformers, as reward models are published.
    Differs: too long texts lose their beginning and not their end, which is what is judged. Scores are cut at low and high.
    Hides: a score means only what the model was trained to tell apart; far from its training texts it can be farmed. Batches of other
    texts change a score by rounding (about 1e-6 in float32).
    """

    loader: ClassVar[str] = "AutoModelForSequenceClassification"

    label: str | int | None = None  # the class that is wanted, where the head has several
    output: Literal["logit", "probability", "margin"] = "logit"  # margin: the log-odds of the label against all others
    input: str | tuple[str, ...] = "auto"  # auto, chat, a template, or two templates
    normalize: dict[str, Any] | None = None  # {mean, std, from}: (score - mean) / std; `paretune normalize` measures it
    negate: bool = False  # for costs, where less is better: the sign changes after the normalization
    head: str | None = None  # the name in the files of a head with one output, where it is not the one of transformers

    def __post_init__(self):
        super().__post_init__()
        _check_normalize(self)
        if self.templates is None:
            return
        if len(self.templates) not in (1, 2):
            raise self.refuse("input is one template or two", found=repr(list(self.templates)), remedy=f"for example input: {list(PAIR)}")
        if "completion" not in [name for template in self.templates for name in names_in(template)]:
            raise self.refuse("input names the {completion}", found=repr(list(self.templates)), remedy='for example input: "{completion}"')

    @property
    def templates(self) -> tuple[str, ...] | None:
        """None for chat and auto."""
        if isinstance(self.input, str):
            return None if self.input in ("auto", "chat") else (self.input,)
        return self.input

    def needs(self) -> tuple[str, ...]:
        names = [name for template in self.templates or () for name in names_in(template)]
        return tuple(dict.fromkeys(name for name in names if name not in (*GIVEN, *SPECIAL)))

    def check_config(self, config: PreTrainedConfig) -> None:
        built = getattr(config, "architectures", None) or []
        if built and not any("SequenceClassification" in name for name in built) and self.head is None and not self.trust_remote_code:
            raise self._wrong_head(", ".join(built))
        self.place_of_label(config)

    def place_of_label(self, config: PreTrainedConfig) -> int:
        """Which output is read."""
        names: Any = config.id2label or {}
        labels = [str(names.get(n, n)) for n in range(config.num_labels or 0)]
        listed = f"the head has {len(labels)} outputs: {', '.join(labels[:12])}"
        if len(labels) == 1:
            if self.label is not None or self.output == "margin":
                named = f"label={self.label!r}" if self.label is not None else "output='margin'"
                raise self.refuse(
                    "a head with one output has no labels to choose from",
                    found=f"{named}; {self.model} has one output",
                    remedy="leave label and margin out: the one output is the score",
                )
            return 0
        if self.label is None:
            raise self.refuse(
                "label says which output is the score", found=f"no label; {listed}", remedy=f"for example label: {labels[-1]}"
            )
        if isinstance(self.label, int) and 0 <= self.label < len(labels):
            return self.label
        if self.label not in labels:
            raise self.refuse(
                "label is one of the head's", found=f"label={self.label!r}; {listed}", remedy=nearest(str(self.label), labels)
            )
        return labels.index(str(self.label))

    def load_options(self) -> dict[str, Any]:
        return {} if self.head is None else {"key_mapping": {rf"^{re.escape(self.head)}\.": "score."}, **self.config_options()}

    def config_options(self) -> dict[str, Any]:
        return {} if self.head is None else {"num_labels": 1}

    def check_missing(self, missing: Sequence[str]) -> None:
        if missing:
            raise self._wrong_head(f"without {', '.join(missing[:4])}")

    def _wrong_head(self, found: str) -> ConfigError:
        return self.refuse(
            "the model has a head for sequence classification",
            found=f"{self.model}: {found}",
            remedy="name a reward model or classifier that AutoModelForSequenceClassification wrote (head: says how its head is called in "
            "the files); a model that writes its verdict is a judge (use: judge)",
        )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        raw = self.raw(prompts, completions, **columns)
        if self.normalize is not None:
            mean, std = self.normalize["mean"], self.normalize["std"]
            raw = [None if value is None else (value - mean) / std for value in raw]
        return self.scored([-value if self.negate and value is not None else value for value in raw])

    def raw(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """What the head says, before normalization and before it is cut at low and high."""
        needed = {name: columns[name] for name in self.needs()}
        scores: list[float | None] = [None] * len(completions)
        known = [n for n in range(len(completions)) if all(values[n] is not None for values in needed.values())]
        rows = self._rows(prompts, completions, needed, known)
        wanted = self.place_of_label(self.loaded.model.config)
        several = getattr(self.loaded.model.config, "problem_type", None) == "multi_label_classification"
        for places, _, output in run(self, rows):
            for place, score in zip(places, _read(output.logits.float(), wanted, self.output, several).tolist(), strict=True):
                scores[known[place]] = score
        return scores

    def _rows(self, prompts: Sequence[Any], completions: Sequence[Any], needed: Mapping[str, Any], known: Sequence[int]) -> list[Encoded]:
        tokenizer = self.loaded.tokenizer
        if self.input == "chat" and not tokenizer.chat_template:
            raise self.refuse(
                "input: chat needs a tokenizer with a chat template",
                found=f"none in the tokenizer of {self.model}",
                remedy=f"write what it reads, for example input: {list(PAIR)}",
            )
        if self.templates is None and tokenizer.chat_template:
            chats = [[*_conversation(prompts[n]), {"role": "assistant", "content": text_of(completions[n])}] for n in known]
            return self.encoded([[str(tokenizer.apply_chat_template(chat, tokenize=False))] for chat in chats], special=False)
        special = {name: getattr(tokenizer, f"{name}_token") or "" for name in SPECIAL}
        texts = []
        for n in known:
            given = {"prompt": text_of(prompts[n]), "completion": text_of(completions[n]), "transcript": _transcript(prompts[n])}
            row = {**{name: values[n] for name, values in needed.items()}, **special, **given}
            texts.append([template.format_map(row) for template in self.templates or PAIR])
        return self.encoded(texts)


@OBJECTIVES.register("similarity")
@dataclass(frozen=True, kw_only=True)
class Similarity(ModelObjective):
    """How close the completion is in meaning to a reference: the cosine of mean-pooled embeddings of an encoder, in [-1, 1].

    The reference is a `column` of the prompts (a text, or a list of which the closest counts) or one `text` for all.

    Source: mean pooling and cosine as in Sentence-BERT (1908.10084).
    Differs: nothing but the pooling is taken over; a model that needs another one, or dense layers on top, is not measured as intended.
    Hides: a negation or a wrong name hardly moves an embedding; copying the reference is the best answer; most pairs of texts score
    well above 0. A reference that is empty leaves the completion unscored.
    """

    loader: ClassVar[str] = "AutoModel"

    low: float = -1.0
    high: float = 1.0
    column: str | None = None
    text: str | None = None
    prefix: str = ""  # some encoders want "query: " before every text

    def __post_init__(self):
        super().__post_init__()
        if (self.column is None) == (self.text is None):
            raise self.refuse(
                "the reference is a column of the prompts or a text: exactly one of them",
                found=f"column={self.column!r}, text={self.text!r}",
                remedy="for example column: answer",
            )

    def needs(self) -> tuple[str, ...]:
        return () if self.column is None else (self.column,)

    def check_config(self, config: PreTrainedConfig) -> None:
        if config.is_encoder_decoder:
            raise self.refuse(
                "embeddings come from an encoder", found=f"{self.model} is an encoder with a decoder", remedy="name a sentence encoder"
            )

    def check_missing(self, missing: Sequence[str]) -> None:
        super().check_missing([name for name in missing if "pooler" not in name])  # mean pooling does not use it

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        given = [self.text] * len(completions) if self.column is None else columns[self.column]
        wanted = [[str(text) for text in _listed(value) if text is not None and str(text).strip()] for value in given]
        texts = [text_of(completion) for completion in completions]
        known = list(dict.fromkeys([*texts, *(text for row in wanted for text in row)]))
        vectors = dict(zip(known, self._embed(known), strict=True))
        return self.scored(
            [max((_cosine(vectors[text], vectors[w]) for w in row), default=None) for text, row in zip(texts, wanted, strict=True)]
        )

    def _embed(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Zeros where there is no token to pool."""
        found = [np.zeros(1)] * len(texts)
        for places, given, output in run(self, self.encoded([[self.prefix + text] for text in texts])):
            mask_NT1 = given["attention_mask"].unsqueeze(-1)
            pooled = (output.last_hidden_state.float() * mask_NT1).sum(1) / mask_NT1.sum(1)
            for place, vector in zip(places, pooled.double().cpu().numpy(), strict=True):
                found[place] = vector
        return found


@OBJECTIVES.register("fluency")
@dataclass(frozen=True, kw_only=True)
class Fluency(ModelObjective):
    """How likely a language model finds the completion after its prompt: (cap - perplexity) / cap, stretched to [low, high].

    Source: the fluency score of EMORL (2505.02579): (50 - perplexity) / 50 under GPT-2.
    Differs: the perplexity is over the completion's tokens only, not over the prompt's; at perplexities above `cap` the fraction is 0.
    Hides: dull and repeated text is likely text. An empty completion has no tokens and gets the lowest score.
    """

    loader: ClassVar[str] = "AutoModelForCausalLM"
    of_reference: ClassVar[bool] = True

    low: float = 0.0
    high: float = 1.0
    cap: float = 50.0

    def __post_init__(self):
        super().__post_init__()
        if not self.cap > 1:
            raise self.refuse("cap, the perplexity that earns nothing, is above 1", found=f"cap={self.cap:g}", remedy="cap: 50")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        tokenizer, longest = self.loaded.tokenizer, self.loaded.longest
        rows: list[Encoded] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            before = tokenizer(text_of(prompt))["input_ids"] or [tokenizer.eos_token_id or 0]  # something to predict the first token from
            after = tokenizer(text_of(completion), add_special_tokens=False)["input_ids"][: None if longest is None else longest - 1]
            kept = before if longest is None else before[-max(longest - len(after), 1) :]
            rows.append((kept + after if after else [], [0] * len(kept) + [1] * len(after)))
        fractions: list[float | None] = [0.0] * len(rows)
        for places, given, output in run(self, rows):
            for place, row_TV, ids_T in zip(places, output.logits.float(), given["input_ids"], strict=True):
                start, end = rows[place][1].index(1), len(rows[place][0])
                logp = row_TV[start - 1 : end - 1].log_softmax(-1).gather(-1, ids_T[start:end, None]).mean()
                known = not math.isnan(float(logp))  # as where half precision overflows: no score is no low score
                fractions[place] = max(0.0, (self.cap - math.exp(min(-float(logp), 700.0))) / self.cap) if known else None
        return [None if f is None else self.squashed(f) for f in fractions]


def measure(objective: RewardModel, prompts: Sequence[Prompt], completions: Sequence[str], *, source: str) -> dict[str, Any]:
    """{mean, std, from} of the raw scores of `completions`, ready for `normalize:`; `source` says where the texts came from."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    scores = np.array(objective.raw([prompt.raw for prompt in prompts], completions, **columns), dtype=np.float64)
    kept = scores[np.isfinite(scores)]
    if len(kept) < 2 or not kept.std() > 0:
        raise ConfigError(
            "a mean and a standard deviation need two different scores",
            found=f"{len(kept)} scores of {len(scores)} completions, all alike" if len(kept) else f"no score of {len(scores)} completions",
            remedy="measure on more texts",
        )
    model = key_of(objective.content())[:8]
    provenance = f"{source}: {len(kept)} scores, {len(scores) - len(kept)} unscored; model content {model}"
    return {"mean": float(f"{kept.mean():.6g}"), "std": float(f"{kept.std():.6g}"), "from": provenance}


def _check_normalize(objective: RewardModel) -> None:
    given = objective.normalize
    if given is None:
        return
    rule = "normalize gives mean, std and from"
    example = '`paretune normalize` measures it; or {mean: 0.3, std: 1.2, from: "where the numbers come from"}'
    if set(given) != {"mean", "std", "from"}:
        raise objective.refuse(rule, found=f"the keys {', '.join(map(str, given)) or 'none'}", remedy=example)
    numbers = all(is_number(given[k]) and math.isfinite(given[k]) for k in ("mean", "std"))
    if not numbers or given["std"] <= 0 or not isinstance(given["from"], str) or not given["from"].strip():
        raise objective.refuse(f"{rule}: two finite numbers, std above 0, and words", found=repr(given), remedy=example)


def _read(logits_NC: Tensor, wanted: int, output: str, several: bool) -> Tensor:
    """(N,) what is asked of the head's outputs; `several` where its classes do not exclude each other."""
    chosen_N = logits_NC[:, wanted]
    alone = several or logits_NC.shape[1] == 1
    if output == "probability":
        return chosen_N.sigmoid() if alone else logits_NC.softmax(-1)[:, wanted]
    if output == "margin" and not alone:
        others = [c for c in range(logits_NC.shape[1]) if c != wanted]
        return chosen_N - logits_NC[:, others].logsumexp(-1)
    return chosen_N


def _conversation(prompt: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]


def _transcript(prompt: Any) -> str:
    """The conversation as the HH data write it, up to the place where the assistant goes on."""
    if isinstance(prompt, str) and prompt.lstrip().startswith("Human:"):
        return prompt
    turns = [f"{TURNS.get(message['role'], message['role'].capitalize())}: {message['content']}" for message in _conversation(prompt)]
    return "".join(f"\n\n{turn}" for turn in turns) + "\n\nAssistant:"


def _listed(value: Any) -> Sequence[Any]:
    return [value] if isinstance(value, str) or not isinstance(value, Sequence) else value


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """NaN where one of them is zero."""
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if a.shape == b.shape and size > 0 else math.nan

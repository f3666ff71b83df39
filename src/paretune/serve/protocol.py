"""Requests and answers of the OpenAI API for families: what a body asks for becomes rows, and what rows tell becomes JSON.

A preference comes in one of these ways, and never in two at once:

    "preference": {"polite": .7, "brief": .3}         in the body
    "model": "family@polite=.7,brief=.3"              in the model's name, for clients that can set nothing else
    "lora": [{"id": 0, "scale": .7}, ...]             gates by an adapter's number, as llama.cpp has it
    "merged_adapters": {"ids": [...], "weights": [...]}   gates by an adapter's name, as LoRAX has it

Without any it is the family's default. An adapter that is not named has gate 0.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field, StrictBool

from paretune.errors import ConfigError, nearest, shown
from paretune.evaluation.elicit import EACH, PROMPTS, TIE, pool_preferences
from paretune.hub import positions_of
from paretune.policy.family import Family
from paretune.policy.rollout import occurrences, token_ids
from paretune.policy.sampling import Sampling
from paretune.registry import checked
from paretune.serve.engine import Engine
from paretune.serve.rows import Row, Spoken
from paretune.tasks.base import Task
from paretune.types import Count, Natural, Preference, Prompt

__all__ = [
    *("Asked", "Gate", "Inquiry", "NotServed", "Served", "answer_of", "as_preference", "ask"),
    *("chunk", "completion", "dumps", "inquire", "model_card", "one_spelling", "usage"),
]

Gate = Annotated[float, Field(ge=-100, le=100)]  # that is given directly
MOST_CHOICES, MOST_STOPS, MOST_TOP = 128, 16, 20
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty")
COMMON = {"model", "n", "stream", "stream_options", "stop", "seed", "max_tokens", "logprobs", *SAMPLING}
COMMON |= {"preference", "lora", "merged_adapters"}
KNOWN = {"chat": COMMON | {"messages", "max_completion_tokens", "top_logprobs"}, "text": COMMON | {"prompt"}}
KNOWN["questions"] = {"model", "prompts", "questions", "enough", "each", "seed", "max_tokens"}
KNOWN["answer"] = {"question", "answer"}
IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "store", "service_tier"}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # of parameters that are not supported: what they may say, because it asks for nothing
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "min_p": (0,),
    "ignore_eos": (False,),
    "modalities": (["text"],),
}

SPACE = "\u2581"  # as SentencePiece writes it
SEEN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # bytes that byte-level tokenizers write as the letters they are
BYTES = {chr(byte): byte for byte in SEEN}
BYTES |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in SEEN)}  # the others, in order


class NotServed(ConfigError):
    """A model that this server does not have."""

    status, code = 404, "model_not_found"


@dataclass(eq=False)
class Served:
    """A family under the name by which requests know it."""

    name: str
    family: Family
    default: Preference
    created: int = field(default_factory=lambda: int(time.time()))
    lock: threading.Lock = field(default_factory=threading.Lock)  # a tokenizer is used by one thread at a time
    scoring: threading.Lock = field(default_factory=threading.Lock)  # and so is what scores
    task: Task | None = None  # what scores responses, where that is known: questions to a preference need it

    @property
    def gate_names(self) -> tuple[str, ...]:
        """What the gates belong to: the adapters, or the objectives where a preference is text."""
        return self.family.gate_names

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its response may have together."""
        limit, _ = positions_of(self.family.policy.model.config)
        return None if limit is None else limit - self.family.policy.extra_positions

    def text_of(self, token: int) -> tuple[str, bytes]:
        """One token as text, and the bytes that it stands for: a character may be spread over several tokens, whose texts are U+FFFD."""
        tokenizer = self.family.policy.tokenizer
        with self.lock:
            text, piece = tokenizer.decode([token]), str(tokenizer.convert_ids_to_tokens(token))
        if piece.startswith(SPACE) and not text.startswith(" "):
            text = f" {text}"  # SentencePiece drops it where a text begins, and a token alone is a text
        if "\ufffd" not in text:
            return text, text.encode("utf-8", "replace")
        if found := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return text, bytes.fromhex(found[1])
        return text, bytes(BYTES[letter] for letter in piece) if all(letter in BYTES for letter in piece) else text.encode()


@dataclass(eq=False)
class Asked:
    """One request: its rows, choice by choice, and how they are told."""

    kind: str  # "chat" or "text"
    model: str  # as the request names it
    served: Served
    rows: list[Row]
    prompt_tokens: int
    stream: bool
    usage: bool  # whether a stream ends with the usage
    echoed: dict[str, Any]
    told: Counter[int] = field(default_factory=Counter)  # characters of the tokens that were told with log-probabilities, by choice
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """What is wrong within is wrong with this parameter."""
    try:
        yield
    except ConfigError as error:
        error.place = error.place or (name,)
        raise


def ask(kind: str, body: Any, models: Mapping[str, Served], engine: Engine) -> Asked:
    """What a body asks for; ConfigError, whose `place` is the parameter, for what is not there, not possible or not supported."""
    body = _object(kind, body)
    served, in_name = _model(body.get("model"), models)
    family = served.family
    preference, gates_K = _preference(served, in_name, body)
    with about("messages" if kind == "chat" else "prompt"):
        prompts = _prompts(kind, body, family)
        with served.lock:
            tokens = [token_ids(family.policy.tokenizer, prompt) for prompt in prompts]
    n = _number(body, "n", Count, 1)
    if n * len(prompts) > min(MOST_CHOICES, engine.queue):
        with about("n"):
            most = min(MOST_CHOICES, engine.queue)
            found = f"n = {n} for {len(prompts)} prompts" if len(prompts) > 1 else f"n = {n}"
            raise ConfigError(f"a request asks for at most {most} responses", found=found, remedy="send several requests")
    if gates_K is not None:
        gates_PK = np.broadcast_to(gates_K, (len(prompts), len(gates_K)))
    else:
        assert preference is not None
        gates = family.gates(preference.w_M[None], prompts)[0]
        gates_PK = np.broadcast_to(gates, (len(prompts), gates.shape[-1]))
    seed = _number(body, "seed", int, None)
    seed = secrets.randbelow(2**31) if seed is None else seed
    stream = _number(body, "stream", StrictBool, False)
    settings: dict[str, Any] = {"seed": seed, "stream": stream, "sampling": _sampling(body), "stop": _stop(body)}
    settings["logprobs"] = _logprobs(kind, body)
    limits = [_limit(kind, body, served, len(each)) for each in tokens]
    numbers = occurrences([prompt for prompt in prompts for _ in range(n)])  # a prompt that comes again gets other responses
    rows = [
        Row(served.name, prompts[i // n], tokens[i // n], gates_PK[i // n], limit=limits[i // n], number=number, **settings)
        for i, number in enumerate(numbers)
    ]
    with about("max_tokens"):
        for row in rows[::n]:
            engine.check(row)
    options = _number(body, "stream_options", dict[str, Any], {})
    weights = None if preference is None else dict(zip(preference.names, preference.weights, strict=True))
    echoed = {"preference": weights, "gates": _named(served, gates_PK[0]), "seed": seed}
    with about("stream_options"):
        told = options.get("include_usage")
        tell_usage = told is not None and checked("stream_options.include_usage", StrictBool, told)
    return Asked(kind, body["model"], served, rows, sum(map(len, tokens)), stream, tell_usage, echoed)


@dataclass(eq=False)
class Inquiry:
    """A request to be asked for a preference: the rows of its pool, preference by preference, each over all prompts."""

    served: Served
    prompts: list[Prompt]
    rows: list[Row]
    seed: int
    questions: int
    enough: float


def inquire(body: Any, models: Mapping[str, Served], engine: Engine) -> Inquiry:
    """What a body that wants questions asks for; ConfigError as `ask` has it."""
    body = _object("questions", body)
    served, in_name = _model(body.get("model"), models)
    family = served.family
    if served.task is None:
        rule, found = "questions are made of responses that are scored", f"{served.name}, a family without its task"
        raise ConfigError(rule, found=found, remedy="serve it with --recipe, its recipe; --trust, where the family names code")
    if in_name is not None:
        with about("model"):
            raise ConfigError("questions find the preference", found=shown(body["model"]), remedy=f"model = {served.name!r}")
    each = _number(body, "each", Annotated[int, Field(ge=2, le=200)], EACH)
    with about("prompts"):
        prompts = _asked_about(served, body.get("prompts"), max(1, min(PROMPTS, engine.queue // each)))
        with served.lock:
            tokens = [token_ids(family.policy.tokenizer, prompt) for prompt in prompts]
    seed = _number(body, "seed", int, 0)
    limits = [_limit("text", body, served, len(ids)) for ids in tokens]
    w_WM = pool_preferences(family.objectives.count, each, seed)
    if len(w_WM) * len(prompts) > engine.queue:
        with about("each"):
            found, remedy = f"{len(w_WM)} to each of {len(prompts)} prompts", "give fewer prompts, or a smaller each"
            raise ConfigError(f"questions are made of at most {engine.queue} responses", found=found, remedy=remedy)
    gates_WPK = np.stack([np.broadcast_to(family.gates(w_M[None], prompts)[0], (len(prompts), family.policy.K)) for w_M in w_WM])
    rows = [
        Row(served.name, prompt, ids, gates_K, limit=limit, seed=seed + turn)  # what `draw_pool` draws
        for turn, gates_PK in enumerate(gates_WPK)
        for prompt, ids, gates_K, limit in zip(prompts, tokens, gates_PK, limits, strict=True)
    ]
    with about("max_tokens"):
        for row in rows[: len(prompts)]:
            engine.check(row)
    most = _number(body, "questions", Annotated[int, Field(ge=1, le=200)], 10)
    return Inquiry(served, prompts, rows, seed, most, _number(body, "enough", Annotated[float, Field(ge=0, le=1)], 0.01))


def _asked_about(served: Served, given: Any, count: int) -> list[Prompt]:
    """Each prompt once: texts and conversations, or `count` of the task's test prompts where none are given."""
    if given is None:
        assert served.task is not None
        return list(served.task.prompts("test"))[:count]
    if not isinstance(given, list) or not given or not all(part and isinstance(part, str | list) for part in given):
        remedy = 'for example ["Where is my parcel?"]'
        raise ConfigError("prompts are a list of texts, or of lists of messages", found=shown(given), remedy=remedy)
    made: list[Prompt] = []
    for part in given:
        made += _prompts("chat", {"messages": part}, served.family) if isinstance(part, list) else _texts([part], served.family)
    return list({prompt.digest: prompt for prompt in made}.values())


def _texts(given: list[str], family: Family, *, raw: bool = False) -> list[Prompt]:
    for text in given:
        _check_text(text)
    return family.prompts(given, raw=raw)


def answer_of(body: Any) -> tuple[int, int]:
    """The number of a question, and the place of the better response, or TIE."""
    body = _object("answer", body)
    places = {"1": 0, "2": 1, "=": TIE}
    with about("question"):
        number = checked("question", Count, body.get("question"))
    with about("answer"):
        said = str(body.get("answer")) if not isinstance(body.get("answer"), bool) else "true"
        if said not in places:
            rule = "an answer is 1, 2 or ="
            raise ConfigError(rule, found=shown(body.get("answer")), remedy='"=" says that both are equally good')
    return number, places[said]


def _object(kind: str, body: Any) -> dict[str, Any]:
    """A body without what is null; ConfigError for parameters that are not known."""
    if not isinstance(body, dict):
        raise ConfigError("a request is a JSON object", found=shown(body), remedy='send {"model": ..., ...}')
    body = {name: value for name, value in body.items() if value is not None}
    _refuse_unknown(kind, body)
    return body


def _refuse_unknown(kind: str, body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in KNOWN[kind] or name in IGNORED or value in NEUTRAL.get(name, ()):
            continue
        with about(shown(name)[1:-1]):
            if name in NEUTRAL:
                rule, remedy = "a request uses parameters that are supported", f"leave {name} out"
                raise ConfigError(rule, found=f"{name} = {shown(value)}, which is not", remedy=remedy)
            remedy = nearest(shown(name)[1:-1], KNOWN[kind])
            raise ConfigError("a request uses parameters that are supported", found=f"the parameter {shown(name)}", remedy=remedy)


def _model(name: Any, models: Mapping[str, Served]) -> tuple[Served, str | None]:
    """The family that a model's name names, and what the name says of the preference."""
    with about("model"):
        if name is None:
            raise ConfigError("a request names a model", found="none", remedy=f"model = {next(iter(models))!r}, for example")
        if isinstance(name, str):
            for served in models.values():
                if name == served.name or name.startswith(f"{served.name}@"):
                    return served, name[len(served.name) + 1 :] or None if "@" in name else None
        raise NotServed("a request names a model that is served", found=shown(name), remedy=nearest(shown(name)[1:-1], models))


def _preference(served: Served, in_name: str | None, body: Mapping[str, Any]) -> tuple[Preference | None, np.ndarray | None]:
    """The preference, or the gates where these are given."""
    spelled = one_spelling(in_name, body, ("preference", "lora", "merged_adapters"))
    if spelled is None:
        return served.default, None
    kind, given = spelled
    with about(kind):
        if kind in ("model", "preference"):
            return as_preference(served.family.objectives.names, given), None
        return None, _gates(served, kind, given)


def one_spelling(in_name: str | None, body: Mapping[str, Any], known: Sequence[str]) -> tuple[str, Any] | None:
    """How a request says its preference, and what it says; "model" is the model's name. None where it says nothing."""
    spellings = [*(["model"] if in_name is not None else []), *(name for name in known if name in body)]
    if len(spellings) > 1:
        with about(spellings[-1]):
            found = " and ".join("the model's name" if name == "model" else name for name in spellings)
            raise ConfigError("a request gives its preference once", found=found, remedy="leave all but one out")
    return next(((name, in_name if name == "model" else body[name]) for name in spellings), None)


def as_preference(objectives: Sequence[str], given: Any) -> Preference:
    """The preference that a body or a model's name gives."""
    if not isinstance(given, str | list | dict):
        remedy = 'for example {"preference": {"polite": 0.7, "brief": 0.3}}'
        raise ConfigError("a preference is an object, a list or a text", found=shown(given), remedy=remedy)
    return Preference.of(objectives, given)


def _gates(served: Served, kind: str, given: Any) -> np.ndarray:
    """Gates that are given directly, by an adapter's number or name."""
    names = served.family.policy.bank.names
    if served.gate_names != names or served.family.policy.mixing == "reference":
        found = f"{kind}, for mixing {served.family.policy.mixing!r}"
        raise ConfigError("gates are given where every adapter has one", found=found, remedy="give a preference")
    if kind == "lora":
        known = "lora is a list of an id and a scale for each adapter"
        pairs = given if isinstance(given, list) else None
        if pairs is None or not all(isinstance(pair, dict) and set(pair) == {"id", "scale"} for pair in pairs):
            raise ConfigError(known, found=shown(given), remedy='for example [{"id": 0, "scale": 0.7}]')
        ids = [checked("id", Natural, pair["id"]) for pair in pairs]
        scales = [pair["scale"] for pair in pairs]
    else:
        known = "merged_adapters has ids and weights of one length"
        if not isinstance(given, dict) or not isinstance(given.get("ids"), list) or not isinstance(given.get("weights"), list):
            raise ConfigError(known, found=shown(given), remedy='for example {"ids": ["a"], "weights": [0.7]}')
        if len(given["ids"]) != len(given["weights"]) or given.get("merge_strategy", "linear") != "linear":
            raise ConfigError(f"{known}, merged linearly", found=shown(given), remedy="give each id a weight, and no other strategy")
        for name in given["ids"]:
            if name not in names:
                raise ConfigError("an adapter is known by its name", found=shown(name), remedy=nearest(shown(name)[1:-1], names))
        ids, scales = [names.index(name) for name in given["ids"]], given["weights"]
    if any(number >= len(names) for number in ids) or len(set(ids)) < len(ids):
        found, remedy = shown(ids), f"adapters are numbered from 0 to {len(names) - 1}: {', '.join(names)}"
        raise ConfigError("every adapter is named once", found=found, remedy=remedy)
    gates_K = np.zeros(len(names))
    for number, scale in zip(ids, scales, strict=True):
        gates_K[number] = checked("a gate", Gate, scale)
    return gates_K


def _prompts(kind: str, body: Mapping[str, Any], family: Family) -> list[Prompt]:
    if kind == "chat":
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            remedy = 'for example [{"role": "user", "content": "Hello"}]'
            raise ConfigError("messages is a list with a message at least", found=shown(messages), remedy=remedy)
        return family.prompts([[_message(message) for message in messages]])
    given = body.get("prompt")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        found = "token ids" if isinstance(texts, list) and texts else shown(given)
        raise ConfigError("a prompt is a text, or a list of texts", found=found, remedy="give the text itself")
    return _texts(texts, family, raw=True)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Role and content; content in parts is put together."""
    if message.get("tool_calls") or message.get("function_call"):
        raise ConfigError("a message is a text", found="tool calls", remedy="leave tools out")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            raise ConfigError("a message is a text", found=shown(content), remedy='{"type": "text", "text": "..."} is the only part')
        content = "".join(part["text"] for part in content)
    for text in (message.get("role"), content):
        if isinstance(text, str):
            _check_text(text)
    return {"role": message.get("role"), "content": content}


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"half of a surrogate pair, {text[error.start]!r}"
        raise ConfigError("text can be written as UTF-8", found=found, remedy="send the character itself") from None


def _number(body: Mapping[str, Any], name: str, kind: Any, default: Any) -> Any:
    with about(name):
        return checked(name, kind, body[name]) if name in body else default


def _sampling(body: Mapping[str, Any]) -> Sampling:
    given = {name: body[name] for name in SAMPLING if name in body}
    for name, value in given.items():
        with about(name):
            Sampling.of(**{name: value})
    return Sampling.of(**{name: int(value) if name == "top_k" else float(value) for name, value in given.items()})


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    with about("stop"):
        given = body.get("stop", [])
        stops = [given] if isinstance(given, str) else given
        good = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
        if not good or len(stops) > MOST_STOPS or any(len(stop) > 1000 for stop in stops):
            found, remedy = shown(given), 'for example ["\\n\\n"]'
            raise ConfigError(f"stop is a text or at most {MOST_STOPS} of them, none empty", found=found, remedy=remedy)
        return tuple(stops)


def _logprobs(kind: str, body: Mapping[str, Any]) -> int | None:
    """How many alternatives are told beside every token; None where no log-probabilities are asked for."""
    if kind == "text":
        most = _number(body, "logprobs", Natural, None) if body.get("logprobs") is not False else None
        name = "logprobs"
    else:
        wanted = _number(body, "logprobs", StrictBool, False)
        most, name = _number(body, "top_logprobs", Natural, 0), "top_logprobs"
        if most and not wanted:
            with about(name):
                remedy = "set logprobs to true"
                raise ConfigError("top_logprobs goes with logprobs", found=f"top_logprobs = {most} alone", remedy=remedy)
        most = most if wanted else None
    if most is not None and most > MOST_TOP:
        with about(name):
            raise ConfigError(f"at most {MOST_TOP} tokens are told in each place", found=f"{name} = {most}", remedy="ask for fewer")
    return most


def _limit(kind: str, body: Mapping[str, Any], served: Served, read: int) -> int:
    """The longest response: what is asked for, the family's own, or what the model has room for."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in body]
    if len(names) > 1 and body[names[0]] != body[names[1]]:
        with about(names[0]):
            raise ConfigError("a request has one longest length", found=" and ".join(names), remedy="leave max_tokens out")
    asked = _number(body, names[0], Count, None) if names else None
    room = None if served.context is None else max(1, served.context - read)
    if asked is None and served.family.max_new_tokens is None and room is not None:
        return room
    return served.family.longest(asked) if asked or room is None else min(room, served.family.longest(None))


def _named(served: Served, gates_K: np.ndarray) -> dict[str, float]:
    return dict(zip(served.gate_names, map(float, gates_K), strict=True))


def model_card(served: Served) -> dict[str, Any]:
    """What /v1/models says of a family."""
    family = served.family
    objectives = [
        {"name": name, "low": low, "high": high}
        for name, low, high in zip(family.objectives.names, family.objectives.low, family.objectives.high, strict=True)
    ]
    about_it = {
        "objectives": objectives,
        "default_preference": dict(zip(served.default.names, served.default.weights, strict=True)),
        "adapters": list(family.policy.bank.names),
        "mixing": family.policy.mixing,
        "rule": family.rule.registered_name,
        "max_new_tokens": family.max_new_tokens,
        "context": served.context,
        "chat": family.chat,
    }
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "paretune", "paretune": about_it}


def usage(asked: Asked) -> dict[str, int]:
    """Tokens of the prompts and of what was drawn so far."""
    drawn = sum(len(row.said) for row in asked.rows)
    return {"prompt_tokens": asked.prompt_tokens, "completion_tokens": drawn, "total_tokens": asked.prompt_tokens + drawn}


def completion(asked: Asked, texts: Sequence[str], spoken: Sequence[Sequence[Spoken]], finishes: Sequence[str]) -> dict[str, Any]:
    """The whole answer at once."""
    choices = []
    for index, (text, tokens, finish) in enumerate(zip(texts, spoken, finishes, strict=True)):
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if asked.kind == "chat" else {"text": text}
        choices.append({"index": index, **said, "logprobs": _told(asked, index, tokens), "finish_reason": finish})
    return {**_head(asked, whole=True), "choices": choices, "usage": usage(asked), "paretune": asked.echoed}


def chunk(
    asked: Asked, index: int | None, text: str = "", spoken: Sequence[Spoken] = (), finish: str | None = None, *, opens: bool = False
) -> dict[str, Any]:
    """One piece of a stream; with no `index` the usage, which stands at its end. One that `opens` a choice has the preference, too."""
    if index is None:
        return {**_head(asked, whole=False), "choices": [], "usage": usage(asked)}
    if asked.kind == "chat":
        said: dict[str, Any] = {"delta": {"role": "assistant", "content": ""} if opens else {"content": text} if text else {}}
    else:
        said = {"text": text}
    choice = {"index": index, **said, "logprobs": _told(asked, index, spoken) if spoken else None, "finish_reason": finish}
    echoed = {"paretune": asked.echoed} if opens else {}
    return {**_head(asked, whole=False), "choices": [choice], **({"usage": None} if asked.usage else {}), **echoed}


def _head(asked: Asked, *, whole: bool) -> dict[str, Any]:
    if asked.kind == "chat":
        kind, prefix = "chat.completion" if whole else "chat.completion.chunk", "chatcmpl"
    else:
        kind, prefix = "text_completion", "cmpl"
    return {"id": f"{prefix}-{asked.id}", "object": kind, "created": asked.created, "model": asked.model, "system_fingerprint": None}


LEAST = -9999.0  # of a log-probability: JSON has no infinity


def _told(asked: Asked, index: int, spoken: Sequence[Spoken]) -> dict[str, Any] | None:
    """Log-probabilities in the API's two shapes."""
    if asked.rows[index].logprobs is None:
        return None
    text_of = asked.served.text_of
    if asked.kind == "text":
        texts = [text_of(each.token)[0] for each in spoken]
        *offsets, asked.told[index] = (np.cumsum([0, *map(len, texts)]) + asked.told[index]).tolist()
        # The least likely ones first: of several with one text (halves of characters) the most likely is kept.
        tops = [{text_of(token)[0]: max(logp, LEAST) for token, logp in reversed(each.top)} for each in spoken]
        top = [dict(reversed(each.items())) for each in tops] if asked.rows[index].logprobs else None
        logps = [max(each.logp, LEAST) for each in spoken]
        return {"tokens": texts, "token_logprobs": logps, "top_logprobs": top, "text_offset": offsets}

    def one(token: int, logp: float) -> dict[str, Any]:
        text, said = text_of(token)
        return {"token": text, "logprob": max(logp, LEAST), "bytes": list(said)}

    content = [{**one(each.token, each.logp), "top_logprobs": [one(*other) for other in each.top]} for each in spoken]
    return {"content": content, "refusal": None}


BREAKS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # where str.splitlines, by which clients read a stream, ends a line


def dumps(value: Any) -> str:
    """Strict JSON on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(BREAKS)

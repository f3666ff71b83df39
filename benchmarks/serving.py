"""Serving a family: tokens per second of the engine with a preference in every row, and whether rows say what `Family.sample` says.

    python benchmarks/serving.py [--out FILE] [--requests 640] [--timed 192] [--rounds 3] [--threads 2] [--only NAME...]

The random Llama of `decode.py` (24.6 M parameters) with three experts and a bridge between them, 64 clients with a preference each. Prompts
of 4 to 96 tokens and responses of 8 to 96, drawn at random; a client sends its next request when its last one has ended.

    served_equal_offline    share of all requests whose text is that of `Family.sample`, alone, with the same seed. Float32 logits differ
                            by about 1e-6 between batch sizes; `parted_at_ties` says how near a boundary of the cumulative distribution
                            the first number was that drew another token
    served_vs_plain         tokens/s against the same engine with the plain model
    served_vs_static        tokens/s against batches of 64 as `Family.sample` makes them: each goes to the longest of its responses
    served_vs_transformers  tokens/s against transformers' own continuous batching of the plain model
    ttft_long_prompt        p95 of the time to the first token of 16 steady clients while prompts of 2,000 tokens arrive, against without
    memory_1000_preferences memory after 1,000 requests with a preference each, against after 1,000 with one

Timed sides run in turns; each figure is the median of its pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import resource
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from common import emit, paired_medians
from decode import EXPERTS, SHAPE, adapters, fresh
from paretune.policy.base import Policy
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import ParameterMix, ReferencePolicy
from paretune.policy.rollout import decode, encode, row_uniforms, token_ids
from paretune.policy.rules import BridgeRule, Constant
from paretune.seeds import generator
from paretune.serve.engine import Engine
from paretune.serve.rows import Piece, Row
from paretune.types import Objectives, Prompt

CLIENTS, LONG = 64, 2000
NAMES = tuple(f"o{m}" for m in range(EXPERTS))
OBJECTIVES = Objectives(NAMES, (0.0,) * EXPERTS, (1.0,) * EXPERTS)


@cache
def tokenizer() -> Any:
    """A word for every id, so that texts are equal where tokens are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, **{f"w{n}": n for n in range(1, SHAPE["vocab_size"])}}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def gated() -> Family:
    return Family(ParameterMix(adapters(EXPERTS + 1), tokenizer()), BridgeRule(), OBJECTIVES, {"model": "random"}, max_new_tokens=96)


def plain() -> Family:
    policy = ReferencePolicy(LoraBank.attach(fresh(), names=[], seed=0), tokenizer())
    return Family(policy, Constant(gates_K=()), OBJECTIVES, {"model": "random"}, max_new_tokens=96)


def requests(family: Family, count: int, *, seed: int = 0) -> list[Row]:
    """The same prompts, preferences and lengths for every family."""
    rng = generator(seed, "serving")
    w_CM = rng.dirichlet(np.ones(EXPERTS), CLIENTS)
    rows = []
    for n in range(count):
        words = rng.integers(1, SHAPE["vocab_size"], int(rng.integers(4, 97)))
        rows.append(request(family, words, w_CM[n % CLIENTS], limit=int(rng.integers(8, 97)), seed=n))
    return rows


def request(family: Family, words: Any, w_M: np.ndarray, *, limit: int, seed: int) -> Row:
    prompt = Prompt(text=" ".join(f"w{word}" for word in words), columns={"w": w_M.tolist()})
    gates_K = family.gates(w_M[None], [prompt]).reshape(-1)
    return Row("family", prompt, token_ids(family.policy.tokenizer, prompt), gates_K, limit=limit, seed=seed)


def served(family: Family, rows: list[Row], *, clients: int = CLIENTS, engine: Engine | None = None) -> dict[Row, str]:
    """What the engine says to each; `clients` send their next request when the last one has ended."""
    own = engine or Engine({"family": family}, rows=clients, queue=len(rows))
    waiting, said, over = list(reversed(rows)), {}, threading.Event()

    def told(row: Row, piece: Piece) -> None:
        assert piece.error is None, piece.error
        said[row] = piece.text
        if waiting:
            send()
        elif len(said) == len(rows):
            over.set()

    def send() -> None:
        row = waiting.pop()
        row.sink, row.arrived = partial(told, row), time.monotonic()
        own.submit([row])

    if engine is None:
        own.start()
    for _ in range(min(clients, len(rows))):
        send()
    over.wait()
    if engine is None:
        own.stop()
    return said


def equal_offline(family: Family, rows: list[Row]) -> tuple[float, list[float]]:
    """The share of requests that get the text of `Family.sample`, asked one at a time; of the others, how near a tie they parted."""
    said, parted = served(family, rows), []
    for row in rows:
        (want,) = family.sample([row.prompt], row.prompt.columns["w"], seed=row.seed, max_new_tokens=row.limit)
        if want[0] != said[row]:
            parted.append(_from_tie(family, row, want[0], said[row]))
    return 1 - len(parted) / len(rows), parted


def _from_tie(family: Family, row: Row, want: str, said: str) -> float:
    """How far the first uniform number that drew another token is from the boundary between both, in probability."""
    ours, theirs = (family.policy.tokenizer(text)["input_ids"] for text in (said, want))
    at = next(n for n, (a, b) in enumerate(zip([*ours, -1], [*theirs, -1], strict=False)) if a != b)
    with torch.inference_mode():
        ids = torch.tensor([[*row.tokens, *theirs[:at]]])
        p_V = family.policy.forward(ids, gates_NK=torch.from_numpy(row.gates_K)[None].float(), last_only=True)[0, -1].double().softmax(0)
    first, last = sorted((ours[at], theirs[at]) if at < min(len(ours), len(theirs)) else (0, 1))
    between = p_V.cumsum(0)[first:last]  # the boundaries that lie between the tokens: one, where they are neighbors
    return float((between - float(row.uniforms_1T()[0, at])).abs().max())


def static(policy: Policy, rows: list[Row]) -> int:
    """Batches as `Family.sample` makes them, with a preference in every row; each goes on until its longest response has ended."""
    tokens = 0
    for start in range(0, len(rows), CLIENTS):
        some = rows[start : start + CLIENTS]
        ids_NT, mask_NT = encode(policy.tokenizer, [row.prompt for row in some])
        longest = max(row.limit for row in some)
        uniforms_NT = np.concatenate([row_uniforms(row.seed, 0, [row.prompt.digest], [0], longest) for row in some])
        gates_NK = torch.from_numpy(np.stack([row.gates_K for row in some])).float()
        made = decode(policy, ids_NT, mask_NT, gates_NK=gates_NK, max_new_tokens=longest, uniforms_NT=uniforms_NT)
        tokens += sum(min(row.limit, int(length)) for row, length in zip(some, made.mask_NT.sum(1), strict=True))
    return tokens


def transformers_manager(model: Any) -> Any:
    """A context: transformers' own continuous batching of the plain model, sampled; it has no preferences."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    sampled = GenerationConfig(do_sample=True, max_new_tokens=96, eos_token_id=-1, pad_token_id=0, top_k=0)
    paged = ContinuousBatchingConfig(max_batch_tokens=CLIENTS * 4)
    return model.continuous_batching_context_manager(generation_config=sampled, continuous_batching_config=paged, block=True)


def transformers_batching(manager: Any, rows: list[Row]) -> None:
    """The same prompts and lengths by a manager that runs: making its cache takes 20 s and is not what is timed."""
    for row in rows:
        manager.add_request(list(row.tokens), max_new_tokens=row.limit)
    done = 0
    while done < len(rows):
        result = manager.get_result(timeout=60)
        assert result is not None, "no answer in a minute"
        done += bool(result.is_finished())


def first_tokens(family: Family, *, long: bool, seconds: float) -> float:
    """p95 of the time to the first token of 16 clients that ask again and again, while long prompts are read or not."""
    engine = Engine({"family": family}, rows=CLIENTS)
    rng, clients = generator(0, "first"), 16
    w_CM, end, times, over = rng.dirichlet(np.ones(EXPERTS), clients + 1), time.monotonic() + seconds, [], threading.Semaphore(0)

    def send(client: int, length: int, limit: int) -> None:
        row = request(family, rng.integers(1, SHAPE["vocab_size"], length), w_CM[client], limit=limit, seed=int(rng.integers(2**31)))
        row.sink = partial(told, client, row)
        engine.submit([row])

    def told(client: int, row: Row, piece: Piece) -> None:
        assert piece.error is None, piece.error
        if client < clients:
            times.append((row.first or 0.0) - row.arrived)
        if time.monotonic() >= end:
            over.release()
        elif client < clients:
            send(client, int(rng.integers(8, 48)), int(rng.integers(8, 48)))
        else:
            send(client, LONG, 4)

    engine.start()
    for client in range(clients):
        send(client, 16, 8 + 2 * client)
    if long:
        send(clients, LONG, 4)
    for _ in range(clients + long):
        over.acquire()
    engine.stop()
    return float(np.percentile(times, 95))


def memory(family: Family, *, preferences: int) -> float:
    """Bytes of this process at their peak, after 1,000 short requests."""
    rng = generator(0, "memory")
    w_WM = rng.dirichlet(np.ones(EXPERTS), preferences)
    rows = [request(family, rng.integers(1, 99, 40), w_WM[n % preferences], limit=4, seed=n) for n in range(1000)]
    served(family, rows)
    gc.collect()
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--requests", type=int, default=640)
    parser.add_argument("--timed", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    family, figures, speeds = gated(), {}, {}
    tokens = sum(row.limit for row in requests(family, options.timed))

    def against(name: str, make: Callable[[], Callable[[], Any]]) -> None:
        if options.only and name not in options.only:
            return
        ours, other = (lambda: served(family, requests(family, options.timed))), make()
        mine, theirs, figures[name] = paired_medians(ours, other, options.rounds)
        speeds[name] = [round(tokens / mine, 1), round(tokens / theirs, 1)]
        print(f"{name}: {figures[name]:.3f} ({speeds[name][0]} against {speeds[name][1]} tokens/s)", file=sys.stderr)

    def transformers_side(stack: contextlib.ExitStack, rows: list[Row]) -> Callable[[], Any]:
        manager = stack.enter_context(transformers_manager(fresh()))
        transformers_batching(manager, rows[:4])  # its cache is made by the first request
        return partial(transformers_batching, manager, rows)

    def plainly() -> Callable[[], Any]:
        other = plain()
        return lambda: served(other, requests(other, options.timed))

    against("served_vs_static", lambda: lambda: static(family.policy, requests(family, options.timed)))
    against("served_vs_plain", plainly)
    with contextlib.ExitStack() as stack:
        against("served_vs_transformers", lambda: transformers_side(stack, requests(family, options.timed)))
    if not options.only or "ttft_long_prompt" in options.only:
        with_long, without = (first_tokens(family, long=long, seconds=options.seconds) for long in (True, False))
        figures["ttft_long_prompt"], speeds["first_token_p95"] = with_long / without, [round(with_long, 3), round(without, 3)]
        print(f"ttft_long_prompt: {with_long:.3f} s against {without:.3f} s", file=sys.stderr)
    if not options.only or "memory_1000_preferences" in options.only:
        one, many = (memory(family, preferences=count) for count in (1, 1000))
        figures["memory_1000_preferences"] = many / one
    if not options.only or "served_equal_offline" in options.only:
        figures["served_equal_offline"], parted = equal_offline(family, requests(family, options.requests))
        speeds["parted_at_ties"] = parted
    emit(figures, options.out, tokens_per_second=speeds, requests={"equal": options.requests, "timed": options.timed}, clients=CLIENTS)


if __name__ == "__main__":
    main()

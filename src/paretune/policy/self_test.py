"""A self-test of a model: every way in which Paretune runs it must give the numbers of its plain forward.

Architectures differ in what padding, caches and 4-D masks do to them. A wrong one trains without an error, on wrong numbers. So the
first time that a model is trained, or loaded with a family, two prompts of different length are scored in each way, and compared with the
model's own forward on each sequence alone: padded, from a cache with the prompt read once for several responses, packed into one sequence,
decoded token by token, with the head applied in pieces, and with gates that are 0. It costs a few forwards of a dozen tokens.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from paretune.errors import ConfigError, ParetuneError
from paretune.hub import positions_of, text_config
from paretune.policy import rollout, scoring
from paretune.policy.base import Policy
from paretune.policy.lora.shard import everyone
from paretune.seeds import generator

__all__ = ["BOUNDS", "SKIP", "check_model", "paths"]

SKIP = "PARETUNE_SELF_TEST"  # the environment variable that skips it, set to "off": for all commands, their workers and `Family.load`

# Nats per token: rounding, times the spread of the log-probabilities where it is below 1.
BOUNDS = {torch.float64: 1e-6, torch.float32: 5e-4, torch.bfloat16: 0.5, torch.float16: 0.1}
LONGEST, NEW, GROUP = 7, 5, 2  # tokens of the longer prompt and of the responses, where they fit, and responses to a prompt

_passed: set[str] = set()


def check_model(policy: Policy) -> None:
    """ConfigError, naming the architecture and the path, where one differs from the plain forward. A model that passed is not run again.

    With PARETUNE_SELF_TEST=off in the environment nothing is run, and a warning says so.
    """
    name = _name_of(policy)
    if os.environ.get(SKIP) == "off":
        warnings.warn(f"{SKIP}=off: {type(policy.model).__name__} was not tested, and its numbers may be wrong", stacklevel=2)
        return
    if everyone(policy.model, name in _passed):  # of processes that share a base, some are new
        return
    bound = BOUNDS.get(policy.bank.rounding, BOUNDS[torch.bfloat16])
    try:
        wrong = ""
        bound *= _spread(policy)
        for path, off in paths(policy):
            if not off <= bound:
                wrong = f"{path}: {off:.3g} nats per token from its plain forward, more than {bound:g}"
                break
    except ParetuneError:
        raise
    except Exception as error:  # of the model's own code
        wrong = f"stops: {type(error).__name__}: {error}"
    if wrong:
        raise ConfigError(
            "a model says the same however it is run: padded, from a cache, in groups, with its head apart",
            found=f"{type(policy.model).__name__} ({policy.model.config.model_type}) {wrong}",
            remedy="choose another architecture (docs/models.md lists what was tried); as it is, its numbers would be wrong. "
            f"{SKIP}=off in the environment skips this test",
        )
    _passed.add(name)


def paths(policy: Policy) -> Iterator[tuple[str, float]]:
    """Each path, and the largest difference of a log-probability from the plain forward, in nats."""
    model, rng = policy.model, generator(0, "self-test")
    room = (positions_of(model.config)[0] or 64) - policy.extra_positions
    new = max(1, min(NEW, room // 3))
    longest = max(2, min(LONGEST, room - new))
    vocabulary = min(int(model.get_input_embeddings().num_embeddings), text_config(model.config).vocab_size)
    usable = [i for i in range(min(vocabulary, 5000)) if i not in policy.eos_ids and i != policy.pad_id]
    prompts = [[usable[int(i)] for i in rng.integers(0, len(usable), n)] for n in (longest // 2, longest)]
    width, device = longest, policy.device
    padding = [policy.pad_id, usable[-1]] * width  # what padding says must not matter: the embedding of a pad token is often 0
    ids_PT = torch.tensor([padding[: width - len(p)] + p for p in prompts], device=device)
    mask_PT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    tokens_NT = torch.tensor(
        [[usable[int(i)] for i in rng.integers(0, len(usable), new)] for _ in range(len(prompts) * GROUP)], device=device
    )
    with torch.no_grad(), policy.bank.unchanged():
        truth_NT = torch.cat([_plain(policy, prompts[n // GROUP], tokens_T) for n, tokens_T in enumerate(tokens_NT)])
        rows = ids_PT.repeat_interleave(GROUP, 0), mask_PT.repeat_interleave(GROUP, 0), tokens_NT
        early_NT = torch.cat([_plain(policy, prompts[n // GROUP], tokens_T[:2]) for n, tokens_T in enumerate(tokens_NT)])
        yield "with less text behind a token", _gap(early_NT, truth_NT[:, :2])
        yield "padded on the left", _gap(scoring.token_logp(policy, *rows, gates_NK=None), truth_NT)
        grouped = scoring.token_logp(policy, ids_PT, mask_PT, tokens_NT, gates_NK=None, group=GROUP)
        yield "with a prompt read once for several responses", _gap(grouped, truth_NT)
        if scoring.packs(policy, None):
            packed_NT = scoring.token_logp(policy, ids_PT, mask_PT, tokens_NT, gates_NK=None, group=GROUP, packed=True)
            yield "with several responses in one sequence", _gap(packed_NT, truth_NT)
        if policy.splits_head:
            yield "with its head in pieces", _gap(scoring.token_logp(policy, *rows, gates_NK=None, at_once=1), truth_NT)
        uniforms_NT = rng.random((len(tokens_NT), new))
        made = rollout.decode(policy, ids_PT, mask_PT, gates_NK=None, max_new_tokens=new, uniforms_NT=uniforms_NT, group=GROUP)
        drawn = [
            _plain(policy, prompts[n // GROUP], tokens_T[mask_T])[0] - logp_T[mask_T]
            for n, (tokens_T, mask_T, logp_T) in enumerate(zip(made.tokens_NT, made.mask_NT, made.logp_NT, strict=True))
        ]
        yield "decoded from its cache", max(float(gap_T.abs().max()) for gap_T in drawn)
        if policy.zero_is_reference and policy.one_forward and policy.K and not policy.extra_positions:
            gates_NK = torch.zeros(len(tokens_NT), policy.K, device=device)
            yield "under gates of 0", _gap(scoring.token_logp(policy, *rows, gates_NK=gates_NK), truth_NT)


def _spread(policy: Policy) -> float:
    """The standard deviation of the model's log-probabilities over the vocabulary, at most 1: small random weights say all words alike."""
    with torch.no_grad(), policy.bank.unchanged(), policy.bank.gates(None):
        ids_1T = torch.arange(4, device=policy.device)[None] % text_config(policy.model.config).vocab_size
        logits_TV = policy.model(input_ids=ids_1T, use_cache=False).logits[0].float()
    return min(1.0, max(0.01, float(logits_TV.std(1).mean())))


def _plain(policy: Policy, prompt: list[int], tokens_T: Tensor) -> Tensor:
    """(1, T) float64 log-probabilities by the model's own forward on one sequence: no padding, no cache, no mask."""
    ids_1T = torch.cat([torch.tensor(prompt, device=tokens_T.device), tokens_T])[None]
    with policy.bank.gates(None):
        logits_TV = policy.model(input_ids=ids_1T, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return logits_TV.log_softmax(-1).gather(-1, tokens_T[:, None])[:, 0][None]


def _gap(logp_NT: Tensor, truth_NT: Tensor) -> float:
    off = (logp_NT.double() - truth_NT).abs().max()
    return float(off) if bool(off.isfinite()) else float("inf")


def _name_of(policy: Policy) -> str:
    """What decides how a model is run: its class, its configuration, its dtype, and where its adapters are."""
    settings = policy.model.config.to_json_string(use_diff=False)
    layers = ",".join(layer.name for layer in policy.bank.layers)
    text = f"{type(policy.model).__name__} {policy.mixing} {policy.model.dtype} {policy.device} {settings} {layers}"
    return hashlib.sha256(text.encode()).hexdigest()

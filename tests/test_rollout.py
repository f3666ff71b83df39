"""Sampling and scoring: distributions against enumeration, rows against batches, ends, padding, prompts."""

import contextlib
import types

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from paretune.errors import ConfigError
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.mixing.predictions import LogitMix
from paretune.policy.rollout import decode, encode, row_uniforms, texts, token_ids
from paretune.policy.scoring import token_logp
from paretune.seeds import forked_torch, generator
from paretune.tasks.exact.task import ExactTask
from paretune.types import Prompt

TASK = ExactTask(alphabet=3, length=3, prompt_count=2, width=16, layers=1)


@pytest.fixture(scope="module")
def policy():
    """Two adapters with random B, so that gates matter."""
    model, tokenizer = TASK.load()
    bank = LoraBank.attach(model, names=["a", "b"], rank=2, alpha=4, seed=5)
    with torch.no_grad(), forked_torch(6):
        for parameter in bank.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return ParameterMix(bank, tokenizer)


def gates(n, *values):
    return torch.tensor(values).repeat(n, 1)


def drawn(policy, prompts, *, seed=0, g=(0.4, 0.6), length=3, **settings):
    ids, mask = encode(policy.tokenizer, prompts)
    u = row_uniforms(seed, 0, [p.digest for p in prompts], range(len(prompts)), length)
    return decode(policy, ids, mask, gates_NK=gates(len(prompts), *g), max_new_tokens=length, uniforms_NT=u, **settings)


@pytest.mark.parametrize("level", [ParameterMix, LogitMix])
def test_samples_have_the_enumerated_probabilities(policy, level):
    """Chi-square over all 40 responses, false alarm 1e-4; fails for a token-wise wrong cache, mask, gate or end."""
    mix, n = level(policy.bank, policy.tokenizer), 4000
    prompt = TASK.prompts("train")[0]
    made = texts(mix.tokenizer, drawn(mix, [prompt] * n))
    with torch.no_grad():
        logp_PR = TASK.logp_PR(lambda i, m, p: mix.forward(i, attention_mask=m, position_ids=p, gates_NK=gates(len(i), 0.4, 0.6)), "train")
    expected = n * logp_PR[0].exp().numpy()
    counts = np.array([made.count(r) for r in TASK.responses])
    assert counts.sum() == n
    rare = expected < 5
    pairs = [*zip(counts[~rare], expected[~rare], strict=True), (counts[rare].sum(), expected[rare].sum())]
    statistic = sum((c - e) ** 2 / e for c, e in pairs if e > 0)
    assert statistic < chi2.isf(1e-4, len(pairs) - 1)
    assert np.abs(expected / n - np.exp(TASK.reference_logp_PR("train")[0])).sum() > 0.1, "the policy is not the reference"


def test_a_response_does_not_depend_on_its_batch(policy):
    prompts = [Prompt(text=t) for t in ("abc", "a", "bb", "cabca")]
    together = drawn(policy, prompts)
    for i, prompt in enumerate(prompts):
        ids, mask = encode(policy.tokenizer, [prompt])
        u = row_uniforms(0, 0, [prompt.digest], [i], 3)
        alone = decode(policy, ids, mask, gates_NK=gates(1, 0.4, 0.6), max_new_tokens=3, uniforms_NT=u)
        kept = together.mask_NT[i]
        assert alone.tokens_NT[0, : kept.sum()].tolist() == together.tokens_NT[i, kept].tolist()
        torch.testing.assert_close(alone.logp_NT[0, : kept.sum()], together.logp_NT[i, kept], atol=1e-5, rtol=0)


def test_streams_are_named_by_prompt_and_occurrence():
    u = row_uniforms(0, 3, ["x", "y", "x"], [0, 0, 1], 5)
    assert u.shape == (3, 5)
    np.testing.assert_array_equal(row_uniforms(0, 3, ["x"], [1], 5)[0], u[2])
    np.testing.assert_array_equal(row_uniforms(0, 3, ["y"], [0], 2)[0], u[1, :2])
    assert len(np.unique(u)) == 15
    assert not np.isin(row_uniforms(0, 4, ["x"], [0], 5), u).any()


def test_log_probabilities_of_samples_are_those_of_the_scorer(policy):
    prompts = [Prompt(text=t) for t in ("abc", "a", "bb", "cabca")] * 8
    made = drawn(policy, prompts)
    ids, mask = encode(policy.tokenizer, prompts)
    for width in (made.tokens_NT.shape[1], 7):  # more padding on the right changes nothing
        padded = torch.nn.functional.pad(made.tokens_NT, (0, width - made.tokens_NT.shape[1]), value=1)
        scored = token_logp(policy, ids, mask, padded, gates_NK=gates(32, 0.4, 0.6))[:, : made.tokens_NT.shape[1]]
        torch.testing.assert_close((scored * made.mask_NT).double(), made.logp_NT, atol=2e-5, rtol=0)
    full = policy.forward(
        torch.cat([ids, made.tokens_NT], 1),
        attention_mask=torch.cat([mask, torch.ones_like(made.tokens_NT)], 1),
        gates_NK=gates(32, 0.4, 0.6),
    ).log_softmax(-1)[:, ids.shape[1] - 1 : -1]
    plain = full.gather(2, made.tokens_NT[..., None])[..., 0]
    torch.testing.assert_close((plain * made.mask_NT).double(), made.logp_NT, atol=2e-5, rtol=0)
    reference = token_logp(policy, ids, mask, made.tokens_NT, gates_NK=None)
    assert not reference.requires_grad
    assert ((reference - scored) * made.mask_NT).abs().max() > 0.01


@pytest.mark.parametrize("level", [ParameterMix, LogitMix])
@pytest.mark.parametrize("lengths", [("abc", "bca"), ("abc", "a")], ids=["even", "left-padded"])
def test_reading_each_prompt_once_changes_nothing(policy, level, lengths):
    """Samples, log-probabilities and gradients with `group` are those of repeated prompts, a gate vector per prompt."""
    mix, group = level(policy.bank, policy.tokenizer), 3
    prompts = [Prompt(text=t) for t in lengths]
    ids, mask = encode(mix.tokenizer, prompts)
    each = torch.tensor([[0.4, 0.6], [0.9, 0.3]]).repeat_interleave(group, 0)
    u = generator(1, "group").random((6, 3))
    every = {"gates_NK": each, "max_new_tokens": 3, "uniforms_NT": u}
    once = decode(mix, ids, mask, group=group, **every)
    repeated = ids.repeat_interleave(group, 0), mask.repeat_interleave(group, 0)
    plain = decode(mix, *repeated, **every)
    assert once.tokens_NT.tolist() == plain.tokens_NT.tolist()
    results = []
    for settings in ((ids, mask, group), (*repeated, 1)):
        mix.model.zero_grad()
        logp = token_logp(mix, *settings[:2], plain.tokens_NT, gates_NK=each, group=settings[2])
        (logp * plain.mask_NT * torch.arange(6)[:, None]).sum().backward()
        results.append((logp.detach() * plain.mask_NT, torch.cat([p.grad.flatten() for p in mix.bank.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[0][0].double(), plain.logp_NT, atol=2e-5, rtol=0)


def test_rows_of_one_prompt_have_one_gate_vector(policy):
    ids, mask = encode(policy.tokenizer, [Prompt(text="abc")])
    with pytest.raises(AssertionError, match="one gate vector per prompt"):
        decode(policy, ids, mask, group=2, gates_NK=torch.eye(2), max_new_tokens=2, uniforms_NT=np.zeros((2, 2)))


def scripted(logits_TV, eos):
    """A policy whose logits at step t are row t, for the ends and the inversion."""
    step = iter(range(100))

    def forward(ids, **_):
        return logits_TV[next(step)].expand(len(ids), 1, -1).clone()

    model = types.SimpleNamespace(config=types.SimpleNamespace(max_position_embeddings=50))
    bank = types.SimpleNamespace(unchanged=contextlib.nullcontext)
    return types.SimpleNamespace(
        forward=forward,
        new_cache=lambda n: None,
        device=torch.device("cpu"),
        eos_ids=eos,
        pad_id=eos[0],
        model=model,
        bank=bank,
        extra_positions=0,
        has_plain_cache=False,
    )


def run(logits, uniforms, eos=(0,), **settings):
    n, t = np.shape(uniforms)
    ids = torch.ones(n, 2, dtype=torch.long)
    policy = scripted(torch.as_tensor(logits, dtype=torch.float32), eos)
    return decode(policy, ids, torch.ones_like(ids), gates_NK=None, max_new_tokens=t, uniforms_NT=np.array(uniforms), **settings)


def test_the_first_of_several_eos_ids_ends_a_response_and_counts():
    logits = np.log([[0.25, 0.25, 0.25, 0.25]] * 3)
    made = run(logits, [[0.9, 0.6, 0.1], [0.3, 0.9, 0.9], [0.6, 0.6, 0.6], [0.6, 0.1, 0.6]], eos=(0, 3))
    assert made.mask_NT.tolist() == [[True, False, False], [True, True, False], [True, True, True], [True, True, False]]
    assert made.tokens_NT.tolist() == [[3, 0, 0], [1, 3, 0], [2, 2, 2], [2, 0, 0]]
    assert made.stopped_N.tolist() == [True, True, False, True]
    torch.testing.assert_close(made.logp_NT, made.mask_NT.double() * np.log(0.25))


def test_it_ends_when_all_have_ended():
    made = run(np.log([[0.5, 0.5]] * 9), np.full((2, 9), 0.1))
    assert made.tokens_NT.shape == (2, 1)
    assert made.stopped_N.all()
    assert run(np.log([[0.5, 0.5]] * 9), np.full((2, 9), 0.1), suppress_eos=True).tokens_NT.tolist() == [[1] * 9] * 2


def test_inversion_takes_the_right_token_at_every_uniform_and_never_an_impossible_one():
    p = np.array([0.0, 0.2, 0.0, 0.3, 0.5, 0.0])
    with np.errstate(divide="ignore"):
        logits = np.log(p)[None]
    edges = [0.0, 0.1999999, 0.2000001, 0.4999999, 0.5000001, 1 - 2**-53]
    assert run(logits, np.array(edges)[:, None], eos=(2,)).tokens_NT[:, 0].tolist() == [1, 1, 3, 3, 4, 4]


def test_temperature():
    logits = np.log([[0.2, 0.5, 0.3]])
    assert run(logits, [[0.99], [0.0]], temperature=0).tokens_NT[:, 0].tolist() == [1, 1]
    made = run(logits, [[0.2]], temperature=0.5)
    assert made.tokens_NT.item() == 1
    assert float(made.logp_NT) == pytest.approx(np.log(0.25 / (0.04 + 0.25 + 0.09)))
    with pytest.raises(ConfigError, match="temperature"):
        run(logits, [[0.1]], temperature=-1)


def test_the_models_positions_are_a_limit(policy):
    with pytest.raises(ConfigError) as error:
        drawn(policy, [Prompt(text="a" * 64)])
    assert "67 tokens for a model of 64" in error.value.found


def test_encode_pads_on_the_left_whatever_the_tokenizer_does(policy):
    policy.tokenizer.padding_side = "right"
    ids, mask = encode(policy.tokenizer, [Prompt(text="abc"), Prompt(text="b")])
    policy.tokenizer.padding_side = "left"
    assert ids[:, -1].tolist() == [2, 1]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


class Words:
    """A tokenizer of characters with the habits given: BOS in front, EOS behind, a chat template."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    def __init__(self, *, bos=False, eos=False, chat=None):
        self.bos, self.eos, self.chat_template = bos, eos, chat

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(c) for c in text]
        if add_special_tokens:
            ids = [1] * self.bos + ids + [2] * self.eos
        return {"input_ids": ids}

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<a>"


def test_prompts_become_tokens():
    text, chat = Prompt(text="hi"), Prompt(messages=({"role": "user", "content": "hi"},))
    h, i = ord("h"), ord("i")
    assert token_ids(Words(), text) == [h, i]
    assert token_ids(Words(bos=True), text) == [1, h, i]
    assert token_ids(Words(bos=True, eos=True), text) == [1, h, i], "a closed prompt could not be answered"
    ended = Prompt(text="hi\x02")
    for settings, want in (({"bos": True}, [1, h, i, 2]), ({"eos": True}, [h, i, 2]), ({"bos": True, "eos": True}, [1, h, i, 2])):
        assert token_ids(Words(**settings), ended) == want, "the EOS that the text itself ends with stays"
    assert token_ids(Words(), Prompt(text="")) == [1], "an empty prompt starts with BOS"
    assert token_ids(Words(bos=True, chat="..."), chat) == [ord(c) for c in "<u>hi<a>"], "a template brings its own special tokens"
    with pytest.raises(ConfigError, match="chat template"):
        token_ids(Words(), chat)
    without = Words()
    without.bos_token_id = without.eos_token_id = None
    with pytest.raises(ConfigError, match=r"(?s)a token at least.*none in ''.*set tokenizer\.bos_token"):
        token_ids(without, Prompt(text=""))


def test_uniforms_that_are_reused_give_the_same_text(policy):
    prompts = list(TASK.prompts("test")) * 3
    assert texts(policy.tokenizer, drawn(policy, prompts, seed=1)) == texts(policy.tokenizer, drawn(policy, prompts, seed=1))
    assert texts(policy.tokenizer, drawn(policy, prompts, seed=1)) != texts(policy.tokenizer, drawn(policy, prompts, seed=2))
    assert generator(0, "x").random() == generator(0, "x").random()

"""Rows that join and leave a batch while it is decoded: each says what it says alone, at every mixing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paretune.errors import ConfigError
from paretune.policy.base import build_mixing
from paretune.policy.lora.bank import LoraBank
from paretune.policy.rollout import Decoding, Reading, decode
from paretune.policy.sampling import Sampling, shaped, stop_at
from paretune.seeds import generator
from tiny_models import TOKENIZER, VOCAB, gemma2, llama, write_adapters

LENGTH = 9
ROWS = [  # prompt, gates, temperature; the third and the fourth are read together
    ([1, 2, 3], (1.0, 0.0), 1.0),
    ([4, 5, 6, 7, 8, 9], (0.0, 1.0), 0.7),
    ([2], (0.5, 0.5), 1.0),
    ([3, 3, 1, 2], (0.2, 0.9), 1.0),
    ([1, 2, 3], (0.3, 0.7), 0.0),
]
MIXINGS = [
    "parameter",
    "logit",
    "hidden",
    {"name": "hidden-layer", "layer": 2},
    {"name": "divergence", "divergence": "js"},
    {"name": "robust", "radius": 0.3},
    "reference",
]


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory):
    """In float64, so that the rounding of another batch size never decides a draw. Adapters begin above the first of three layers."""
    folder = tmp_path_factory.mktemp("adapters")

    def make():
        return llama(torch.float64, num_hidden_layers=3)

    paths = write_adapters(
        make, folder, [{"layers_to_transform": [1, 2], "target_modules": ["q_proj", "v_proj", "up_proj"]}] * 2, scale=0.6
    )
    return lambda mixing: build_mixing(mixing, LoraBank.load(make(), paths), TOKENIZER)


def padded(prompts):
    width = max(map(len, prompts))
    ids_PT = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return ids_PT, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def noise(row):
    return generator(0, "test", row).random((1, LENGTH))


def alone(policy, row, reference):
    prompt, gates, temperature = ROWS[row]
    gates_1K = None if reference else torch.tensor([gates])
    made = decode(
        policy,
        *padded([prompt]),
        gates_NK=gates_1K,
        max_new_tokens=LENGTH,
        uniforms_NT=noise(row),
        temperature=temperature,
        suppress_eos=True,
    )
    return made.tokens_NT[0].tolist(), made.logp_NT[0]


@pytest.mark.parametrize("reference", [False, True], ids=["gated", "reference"])
@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_a_row_says_what_it_says_alone(policy_of, mixing, reference):
    """Rows 0 and 1 begin, 2 and 3 join after two steps, 0 leaves after four, 4 joins, and each goes on to its own end."""
    policy, said, logp = policy_of(mixing), {row: [] for row in range(len(ROWS))}, {row: [] for row in range(len(ROWS))}
    present = []

    def join(*rows):
        for temperature in sorted({ROWS[row][2] for row in rows}):
            same = [row for row in rows if ROWS[row][2] == temperature]
            gates_NK = None if reference else torch.tensor([ROWS[row][1] for row in same])
            decoding.join(
                *padded([ROWS[row][0] for row in same]),
                gates_NK=gates_NK,
                uniforms_NT=np.concatenate([noise(row) for row in same]),
                temperature=temperature,
            )
            present.extend(same)

    def leave(*rows):
        decoding.leave(torch.tensor([row in rows for row in present]))
        present[:] = [row for row in present if row not in rows]

    with Decoding(policy, suppress_eos=True) as decoding:
        join(0, 1)
        for step in range(4 * LENGTH):
            if step == 2:
                join(2, 3)
            if step == 4:
                leave(0)
                join(4)
            done = [row for row in present if len(said[row]) == LENGTH]
            if done:
                leave(*done)
            if not present:
                break
            assert decoding.rows == len(present)
            tokens_N1, logp_N1 = decoding.step()
            for place, row in enumerate(present):
                said[row].append(int(tokens_N1[place]))
                logp[row].append(float(logp_N1[place]))
    assert decoding.rows == 0
    assert [len(said[row]) for row in range(len(ROWS))] == [4, LENGTH, LENGTH, LENGTH, LENGTH]
    for row in range(len(ROWS)):
        tokens, own_T = alone(policy, row, reference)
        assert said[row] == tokens[: len(said[row])], row
        np.testing.assert_allclose(logp[row], own_T[: len(logp[row])], atol=1e-6)
    if not reference and mixing != "reference":
        assert len({tuple(alone(policy, row, reference)[0][:4]) for row in range(4)}) > 1, "or the test sees nothing"


def test_a_preference_before_the_prompt_joins_rows_of_any_length(tmp_path):
    make = lambda: llama(torch.float64)  # noqa: E731
    paths = write_adapters(make, tmp_path, [{}])

    class Letters:
        eos_token_id = pad_token_id = VOCAB - 1

        def convert_tokens_to_ids(self, symbol):
            return int(symbol) if symbol.isdigit() else None

    policy = build_mixing({"name": "prompted", "objectives": 2, "digits": 2}, LoraBank.load(make(), paths), Letters())
    gates_1K = torch.tensor([[0.25, 0.75]])
    with Decoding(policy, suppress_eos=True) as decoding:
        for row, prompt in ((0, [1, 2]), (1, [3, 4])):
            decoding.join(*padded([prompt]), gates_NK=gates_1K, uniforms_NT=noise(row))
        said = [decoding.step()[0] for _ in range(3)]
        decoding.join(*padded([[1, 2, 3, 5, 2, 1, 1]]), gates_NK=torch.tensor([[0.9, 0.1]]), uniforms_NT=noise(2))
        later = [decoding.step()[0] for _ in range(3)]
        decoding.leave(torch.tensor([True, False, False]))
        later += [decoding.step()[0][-2:] for _ in range(3)]
    for row, prompt, gates, tokens in ((1, [3, 4], gates_1K, said + later), (2, [1, 2, 3, 5, 2, 1, 1], torch.tensor([[0.9, 0.1]]), later)):
        own = decode(policy, *padded([prompt]), gates_NK=gates, max_new_tokens=LENGTH, uniforms_NT=noise(row), suppress_eos=True)
        place = [1] * 6 + [0] * 3 if row == 1 else [2] * 3 + [1] * 3
        assert [int(token[at]) for token, at in zip(tokens, place, strict=True)] == own.tokens_NT[0, : len(tokens)].tolist()
    with Decoding(policy, suppress_eos=True) as decoding:  # a batch without padding, and one with: its mask does not count the preference
        decoding.join(*padded([[1, 2]]), gates_NK=gates_1K, uniforms_NT=noise(0))
        decoding.join(*padded([[3], [3, 4]]), gates_NK=gates_1K.repeat(2, 1), uniforms_NT=np.concatenate([noise(2), noise(1)]))
        mixed = [decoding.step()[0] for _ in range(3)]
    assert [int(tokens[0]) for tokens in mixed] == [int(tokens[0]) for tokens in said]
    assert [int(tokens[2]) for tokens in mixed] == [int(tokens[1]) for tokens in said]
    for row, prompt in ((0, [1, 2]), (1, [3, 4])):
        own = decode(policy, *padded([prompt]), gates_NK=gates_1K, max_new_tokens=3, uniforms_NT=noise(row)[:, :3], suppress_eos=True)
        assert [int(tokens[row]) for tokens in said] == own.tokens_NT[0].tolist()


def test_what_cannot_be_decoded_together_is_refused(policy_of, tmp_path):
    policy = policy_of("parameter")
    with Decoding(policy) as decoding:
        decoding.join(*padded([[1, 2]]), gates_NK=torch.tensor([[0.5, 0.5]]), uniforms_NT=noise(0))
        with pytest.raises(ConfigError, match="all have gates, or are all the reference"):
            decoding.join(*padded([[1, 2]]), gates_NK=None, uniforms_NT=noise(1))
        with pytest.raises(ConfigError, match="temperature is a finite number"):
            decoding.join(*padded([[1, 2]]), gates_NK=torch.tensor([[0.5, 0.5]]), uniforms_NT=noise(1), temperature=-1.0)
        assert decoding.rows == 1
        assert decoding.step()[0].shape == (1, 1)
    make = lambda: gemma2(None)  # noqa: E731 (its layers look through a sliding window: a cache of another kind)
    windowed = build_mixing("parameter", LoraBank.load(make(), write_adapters(make, tmp_path, [{}])), TOKENIZER)
    with Decoding(windowed) as decoding:
        decoding.join(*padded([[1, 2]]), gates_NK=torch.ones(1, 1), uniforms_NT=noise(0))
        with pytest.raises(ConfigError, match="plain attention"):
            decoding.join(*padded([[1, 2]]), gates_NK=torch.ones(1, 1), uniforms_NT=noise(1))


@pytest.mark.parametrize("mixing", MIXINGS[:4], ids=str)
def test_a_prompt_read_in_pieces_and_from_what_is_known_says_the_same(policy_of, mixing):
    """Two prompts in pieces of two tokens; then both, and a third, from what was kept of the first; rows of one prompt read it once."""
    policy, long = policy_of(mixing), [4, 5, 6, 7, 8, 9]
    gates_PK = torch.tensor([[0.2, 0.9], [1.0, 0.0]])
    with Decoding(policy, suppress_eos=True) as decoding:
        reading = Reading(policy, [long, [2, 3]], gates_PK)
        pieces = 0
        while not reading.done:
            reading.advance(2)
            pieces += 1
        assert pieces == 3
        kept = reading.kept(0)
        decoding.take(reading, [0, 1, 0], uniforms_NT=np.concatenate([noise(row) for row in range(3)]), samplings=[Sampling()] * 3)
        again = Reading(policy, [long, [*long[:4], 1]], gates_PK[[0, 0]], [(kept, 5), (kept, 4)])
        assert again.left == 1
        again.advance()
        decoding.take(again, [0, 1], uniforms_NT=np.concatenate([noise(row) for row in (3, 4)]), samplings=[Sampling()] * 2)
        said = torch.cat([decoding.step()[0] for _ in range(LENGTH)], 1).tolist()
    rows = [(long, 0), ([2, 3], 1), (long, 0), (long, 0), ([*long[:4], 1], 0)]
    for row, (prompt, at) in enumerate(rows):
        own = decode(policy, *padded([prompt]), gates_NK=gates_PK[[at]], max_new_tokens=LENGTH, uniforms_NT=noise(row), suppress_eos=True)
        assert said[row] == own.tokens_NT[0].tolist(), row


def test_top_k_and_top_p_keep_the_fewest_tokens():
    logits_NV = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 6, dtype=torch.float64))
    settings = [{}, {"top_k": 2}, {"top_p": 0.65}, {"top_p": 0.7}, {"top_k": 3, "top_p": 0.95}, {"top_p": 0.4, "temperature": 2.0}]
    kept = shaped(logits_NV.clone(), [Sampling(**each) for each in settings], [None] * 6).isfinite().sum(1).tolist()
    assert kept == [4, 2, 2, 2, 3, 2], "the last one at temperature 2, where the first has .33 of the mass"


def test_penalties_are_those_of_transformers(policy_of):
    """Repetition over prompt and response; presence and frequency over the response alone; each row its own, in one batch."""
    from transformers import RepetitionPenaltyLogitsProcessor

    policy, gates_NK = policy_of("parameter"), torch.tensor([[0.5, 0.5]] * 3)
    samplings = [Sampling(repetition_penalty=1.7), Sampling(presence_penalty=2.0, frequency_penalty=1.5), Sampling()]
    prompt, process = [1, 2, 3, 3], RepetitionPenaltyLogitsProcessor(1.7)
    with Decoding(policy, suppress_eos=True) as decoding:
        decoding.join(*padded([prompt] * 3), gates_NK=gates_NK, uniforms_NT=np.repeat(noise(0), 3, 0), samplings=samplings)
        said = torch.zeros(3, 0, dtype=torch.long)
        for _ in range(LENGTH):
            logits_NV = decoding.logits().clone()
            tokens_N1, logp_N1 = decoding.step()
            first_V = process(torch.cat([torch.tensor([prompt]), said[:1]], 1), logits_NV[:1].clone())
            counts_V = torch.bincount(said[1], minlength=VOCAB)
            second_V = logits_NV[1:2] - 2.0 * (counts_V > 0) - 1.5 * counts_V
            for row, logits in enumerate((first_V, second_V, logits_NV[2:])):
                assert float(logits.log_softmax(1)[0, tokens_N1[row, 0]]) == pytest.approx(float(logp_N1[row, 0]))
            said = torch.cat([said, tokens_N1], 1)


def test_a_text_stops_at_the_stop_that_is_complete_first():
    assert stop_at("abcd", ["abcd", "c"]) == 2
    assert stop_at("abcd", ["bc", "abc"]) == 0
    assert stop_at("abcd", ["x"]) is None


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": float("nan")}, {"temperature": 1e-300}, {"top_p": 0}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": True}),
        *({"repetition_penalty": 0}, {"presence_penalty": 3}, {"frequency_penalty": "1"}),
    ],
    ids=str,
)
def test_what_no_sampling_is_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)

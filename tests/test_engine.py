"""The serving engine: what a row says equals `Family.sample`, whatever shares its batch."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from paretune.errors import ParetuneError
from paretune.policy.base import Policy, build_mixing
from paretune.policy.contextual import Contextual, Features, GateBasis
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.rollout import Decoding, decode
from paretune.policy.rules import Identity
from paretune.seeds import generator
from paretune.serve.engine import Engine, QueueFull
from paretune.serve.rows import Prefixes, Row, Text
from paretune.types import Objectives, Prompt
from serving import Heard, family_of, prompted, requests
from tiny_models import VOCAB, gemma2, write_adapters

MIXINGS = [
    "parameter",
    "logit",
    "hidden",
    "factor",
    "reference",
    {"name": "merged", "how": "ties"},
    {"name": "routed", "experts": 2},
    {"name": "hidden-layer", "layer": 1},
    {"name": "divergence", "divergence": "js"},
    {"name": "robust", "radius": 0.3},
]


def contextual():
    """A rule whose gates depend on the prompt."""
    features = Features("words", 3)
    terms = GateBasis(2, landmarks=4, width=0.5, top=1.5).terms
    theta_DQM = generator(0, "theta").normal(size=(4, terms, 2)).tolist()
    theta = tuple(tuple(tuple(row) for row in part) for part in theta_DQM)
    return Contextual(features=features, mean_F=(0.0,) * 3, adapters=2, landmarks=4, width=0.5, top=1.5, theta_DQM=theta)


FAMILIES = {str(mixing): lambda mixing=mixing: family_of(mixing) for mixing in MIXINGS}
FAMILIES |= {"prompted": prompted, "contextual": lambda: family_of("parameter", contextual())}


def served(family, heard, *, arrivals=None, **settings):
    """Have the requests answered; they arrive a few at a time."""
    engine = Engine({"family": family}, **settings)
    engine.start()
    rng = generator(0, "arrivals")
    at = 0
    while at < len(heard):
        some = int(rng.integers(1, 6)) if arrivals is None else arrivals
        engine.submit([each.row for each in heard[at : at + some]])
        at += some
        time.sleep(float(rng.random()) * 0.02)
    engine.stop()
    assert all(each.over.is_set() for each in heard)
    return engine


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_row_says_is_what_sample_says_offline(name):
    """Random arrivals, lengths, preferences, seeds, stops and penalties; long prompts in pieces, prompts that begin like others."""
    family = FAMILIES[name]()
    heard = requests(family, 24)
    engine = served(family, heard, rows=7, chunk=16)
    assert engine.running == engine.waiting == 0
    for each in heard:
        assert each.finish in ("stop", "length"), each.pieces[-1].error
        assert each.text == each.offline(family), each.row
    if name != "reference":
        assert len({each.text for each in heard}) > 8, "or the test sees nothing"
    if name != "contextual":
        assert engine.lanes["family"].prefixes.hits > 0, "some prompts begin like others"


def test_prompts_are_kept_by_gates_or_by_tokens_alone():
    """At the parameter mixing a prompt's keys belong to its gates; at the logit mixing they serve every preference."""
    for mixing, hits in (("parameter", [0, 39, 0]), ("logit", [0, 39, 39])):
        family, found = family_of(mixing), []
        engine = Engine({"family": family})
        engine.start()
        for w in ([0.5, 0.5], [0.5, 0.5], [0.2, 0.8]):
            before = engine.lanes["family"].prefixes.hits
            heard = Heard(family, "abcd" * 10, w, limit=4)
            engine.submit([heard.row])
            assert heard.over.wait(20)
            found.append(engine.lanes["family"].prefixes.hits - before)
            engine.call(lambda heard=heard, family=family: heard.text == heard.offline(family) or pytest.fail(heard.text)).result()
        engine.stop()
        assert found == hits, mixing


@pytest.mark.parametrize(
    ("going", "reads", "pieces"),
    [(True, 400.0, [20]), (True, 10.0, [16]), (True, 1e6, [64]), (False, 400.0, [64])],
    ids=["half a token's time", "the smallest", "the largest", "alone"],
)
def test_a_piece_of_a_long_prompt_takes_half_as_long_as_a_token_of_the_others(going, reads, pieces, monkeypatch):
    """A token of the batch takes .1 s here, and prompts are read at so many tokens per second."""
    family, asked = family_of("parameter"), []
    engine = Engine({"family": family}, chunk=64)
    lane, other, long = (
        engine.lanes["family"],
        Heard(family, "ab", [0.5, 0.5], limit=8).row,
        Heard(family, "abcd" * 25, [0.5, 0.5], limit=4).row,
    )
    lane._begin([long], None)
    lane.rows, lane.seconds, lane.reads = ([other] if going else []), 0.1, reads
    monkeypatch.setattr(type(lane.reading[0][0]), "advance", lambda self, most=None: asked.append(most))
    lane._read_on()
    assert asked == pieces


def test_kept_prompts_are_bounded_in_memory():
    known = Prefixes(limit=3000)
    states = lambda: [(np.zeros(125), np.zeros(0))]  # noqa: E731 (1,000 bytes)
    prompts = [[n] * 40 for n in range(5)]
    for prompt in prompts:
        known.add(b"", prompt, states)
    assert known.size == 3000
    assert [known.find(b"", [*prompt, 7]) is not None for prompt in prompts] == [False, False, True, True, True]
    assert known.find(b"", [*prompts[2], 7])[1] == 40
    assert known.find(b"", prompts[2])[1] == 39, "the last token is read anew"
    assert known.find(b"other gates", prompts[2]) is None
    known.add(b"", [9] * 40, states)
    assert known.find(b"", prompts[2]) is not None, "it was used"
    assert known.find(b"", prompts[3]) is None
    known.add(b"", [1] * 31, states)
    known.add(b"", [8] * 40, lambda: [(np.zeros(1000), np.zeros(0))])
    assert known.size == 3000


def test_log_probabilities_are_those_of_the_policy_whatever_it_is_drawn_at():
    family = family_of()
    hot, plain = (
        Heard(family, "abc", [0.3, 0.7], limit=6, seed=3, logprobs=3, sampling=sampling)
        for sampling in ({"temperature": 1.5, "top_k": 1}, {})
    )
    greedy = Heard(family, "abc", [0.3, 0.7], limit=6, seed=3, logprobs=0, sampling={"temperature": 0})
    served(family, [hot, plain, greedy], arrivals=3)
    spoken = [token for piece in hot.pieces for token in piece.spoken]
    assert len(spoken) == len(hot.row.said)
    for token in spoken:
        assert token.token == token.top[0][0]
        assert token.logp == token.top[0][1]
        assert len(token.top) == 3
    assert [token.logp for token in spoken] == pytest.approx([t.logp for piece in greedy.pieces for t in piece.spoken], abs=1e-5)


def test_cancelled_rows_make_room_and_a_full_queue_refuses():
    family = family_of(max_new_tokens=12)
    engine = Engine({"family": family}, rows=2, queue=3)
    rows = [Heard(family, "ab", [0.5, 0.5], limit=15, seed=n, stream=True) for n in range(6)]
    engine.start()
    paused = engine.call(lambda: time.sleep(0.5))
    with pytest.raises(QueueFull, match="bounded queue") as full:
        engine.submit([each.row for each in rows[:4]])
    assert full.value.retry_after >= 1
    engine.submit([each.row for each in rows[:3]])
    with pytest.raises(QueueFull):
        engine.submit([rows[3].row])
    engine.cancel([rows[0].row, rows[2].row])
    paused.result()
    assert all(each.over.wait(20) for each in rows[:3])
    assert [each.finish == "cancelled" for each in rows[:3]] == [True, False, True]
    assert rows[1].text == engine.call(lambda: rows[1].offline(family)).result()
    assert engine.running == engine.waiting == 0
    engine.stop()
    with pytest.raises(ParetuneError, match="engine that runs"):
        engine.submit([rows[4].row])


def test_a_stop_without_draining_ends_what_runs():
    family = family_of()
    engine = Engine({"family": family})
    rows = [Heard(family, "ab", [0.5, 0.5], limit=15, seed=n) for n in range(3)]
    engine.start()
    paused = engine.call(lambda: time.sleep(0.2))
    engine.submit([each.row for each in rows])
    engine.stop(drain=False)
    assert paused.done()
    assert [each.finish for each in rows] == ["cancelled"] * 3


def test_a_call_that_nobody_waits_for_any_more_is_left_out_and_the_engine_goes_on():
    family = family_of()
    engine, row, begin, done = Engine({"family": family}), Heard(family, "ab", [0.5, 0.5], limit=5), threading.Event(), []
    engine.start()
    engine.call(lambda: begin.wait(20))
    assert engine.call(lambda: done.append("never")).cancel()
    begin.set()
    engine.submit([row.row])
    assert row.over.wait(20)
    assert row.finish in ("stop", "length")
    engine.stop()
    assert not done
    with pytest.raises(ParetuneError, match="engine that runs"):  # it would never be called
        engine.call(lambda: None)


def test_a_row_that_the_mixing_refuses_spoils_no_other():
    family = family_of({"name": "divergence", "divergence": "forward-kl"})
    good = [Heard(family, text, [0.5, 0.5], limit=5) for text in ("ab", "cd")]
    bad = Heard(family, "abc", [0.5, 0.5], limit=5)
    bad.row.gates_K[:] = -1, 2
    bad.row.__post_init__()
    served(family, [good[0], bad, good[1]], arrivals=3)
    assert bad.finish == "error"
    assert "none negative" in str(bad.pieces[-1].error)
    assert [each.text for each in good] == [each.offline(family) for each in good]


def test_no_row_is_seated_twice_where_memory_ends_while_rows_join(monkeypatch):
    """One of them has taken the place of a row that has ended when the room for the others is missing; each is then tried alone."""
    family, take, refused = family_of(), Decoding.take, []

    def no_room(self, *args, **settings):
        if self.rows and not refused:
            refused.append(self.rows)
            raise torch.OutOfMemoryError("no room")
        return take(self, *args, **settings)

    monkeypatch.setattr(Decoding, "take", no_room)
    engine = Engine({"family": family})
    engine.lanes["family"].eos = frozenset()  # responses end at their limit: which places are free is known
    engine.start()
    going = [Heard(family, "ab", [0.5, 0.5], limit=300 if n else 1, seed=n) for n in range(12)]
    engine.submit([each.row for each in going])
    assert going[0].over.wait(20)
    joining = [Heard(family, text, [0.3, 0.7], limit=6, seed=n) for n, text in enumerate(("cd", "cda", "cdb"))]
    engine.submit([each.row for each in joining])
    assert all(each.over.wait(20) for each in joining)
    alone = [Heard(family, each.prompt.text, [0.3, 0.7], limit=6, seed=each.row.seed) for each in joining]
    engine.submit([each.row for each in alone])
    engine.cancel([each.row for each in going])
    engine.stop()
    assert refused == [12]
    assert [each.row.said for each in joining] == [each.row.said for each in alone]


def test_a_cache_of_another_kind_is_decoded_batch_by_batch(tmp_path):
    """Layers that look through a sliding window: rows do not join, and say what they say alone all the same."""
    make = lambda: gemma2(None)  # noqa: E731
    tokenizer = SimpleNamespace(eos_token_id=VOCAB - 1, pad_token_id=VOCAB - 1, batch_decode=Letters().batch_decode)
    policy = build_mixing("parameter", LoraBank.load(make(), write_adapters(make, tmp_path, [{}, {}])), tokenizer)
    assert not policy.has_plain_cache
    family = Family(policy, Identity(), Objectives(("a", "b"), (0.0, 0.0), (1.0, 1.0)), {"model": "none"})
    rng, rows = generator(0, "windows"), []
    for n in range(9):
        tokens, over = rng.integers(0, VOCAB - 1, int(rng.integers(1, 30))).tolist(), threading.Event()
        limit = int(rng.integers(1, 12))
        rows.append(Row("family", Prompt(text=f"{n}"), tokens, rng.random(2), limit, seed=n, sink=lambda piece, over=over: over.set()))
    engine = Engine({"family": family}, rows=4, chunk=8)
    engine.start()
    for row in rows:
        engine.submit([row])
    engine.stop()
    assert engine.lanes["family"].prefixes.size == 0
    for row in rows:
        ids_1T, gates_1K = torch.tensor([list(row.tokens)]), torch.tensor(row.gates_K[None]).float()
        noise = {"max_new_tokens": row.limit, "uniforms_NT": row.uniforms_1T()}
        made = decode(policy, ids_1T, torch.ones_like(ids_1T), gates_NK=gates_1K, **noise)
        assert row.said == made.tokens_NT[0].tolist()


def test_a_stop_that_is_a_special_token_ends_a_response_though_no_text_shows_it():
    """Offline and served, streamed or not. A special token that is no stop is left out of the text, as ever."""
    family = family_of()
    asked = {"n": 6, "seed": 3, "max_new_tokens": 12}
    plain = family.sample(["ab"], [0.5, 0.5], **asked)[0]
    assert sum("b" in text[1:] for text in plain) > 2
    family.policy.tokenizer.add_special_tokens({"additional_special_tokens": ["b"]})
    cut = [text[: text.find("b")] if "b" in text else text for text in plain]
    assert family.sample(["ab"], [0.5, 0.5], **asked)[0] == [text.replace("b", "") for text in plain] != cut
    assert family.sample(["ab"], [0.5, 0.5], **asked, stop=["b", "xy"])[0] == cut
    settings = {"limit": 12, "seed": 3, "stop": ("b",)}
    heard = [Heard(family, "ab", [0.5, 0.5], number=n, stream=n % 2 == 0, **settings) for n in range(6)]
    served(family, heard, rows=4)
    assert [each.text for each in heard] == cut
    assert all(each.finish == "stop" for each, text in zip(heard, plain, strict=True) if "b" in text)


class Letters:
    """Token n is letter n; tokens of 100 and more are halves of a character."""

    all_special_tokens = all_special_ids = ()

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join("\ufffd" if n == 100 else "é" if n == 101 else chr(97 + n) for n in row).replace("\ufffdé", "é") for row in rows]


@pytest.mark.parametrize(
    ("tokens", "stop", "told"),
    [
        ([0, 1, 2], (), ["a", "b", "c", ""]),
        ([0, 1, 2, 3], ("bcx",), ["a", "", "", "bcd", ""]),  # may begin a stop string: held back, then told
        ([0, 1, 2, 3], ("bc",), ["a", "", ""]),
        ([0, 1, 2], ("cd",), ["a", "b", "", "c"]),
        ([0, 100, 101, 1], (), ["a", "", "é", "b", ""]),
        ([0, 1, 100], (), ["a", "b", "", "\ufffd"]),
        ([0, 0, 0, 1], ("aab",), ["", "", "a", ""]),
    ],
    ids=str,
)
def test_text_is_told_as_soon_as_it_is_sure(tokens, stop, told):
    text, found = Text(Letters(), stop), []
    for token in tokens:
        found.append(text.add(token))
        if text.stopped:
            break
    else:
        found.append(text.end(tokens))
    assert found == told
    assert text.whole == "".join(told)


def test_a_long_prompt_that_finds_no_memory_is_one_error_and_the_engine_goes_on(monkeypatch):
    family = family_of()
    long, short = (Heard(family, text, [0.5, 0.5], limit=4) for text in ("ab" * 30, "ab"))

    def no_room(*_):
        raise torch.OutOfMemoryError("no room")

    engine = Engine({"family": family}, chunk=8)
    engine.start()
    with monkeypatch.context() as patch:
        patch.setattr("paretune.serve.engine.Reading", no_room)
        engine.submit([long.row])
        assert long.over.wait(20)
    engine.submit([short.row])
    assert short.over.wait(20)
    assert "no room" in str(long.pieces[-1].error)
    assert short.text == short.offline(family)
    assert engine.alive
    engine.stop()


def test_rows_whose_forward_fails_while_others_join_end_in_an_error_and_draw_no_token_from_old_logits(monkeypatch):
    """The forward that the tokens of the batch need is run when rows join, where it fails at its last step, after all keys were cached."""
    family, forward, failed = family_of(), Policy.forward, []
    joins = threading.Event()

    def fails(self, input_ids_NT, **settings):
        logits = forward(self, input_ids_NT, **settings)
        if joins.is_set() and not failed and len(input_ids_NT) == 2 and input_ids_NT.shape[1] == 1:
            failed.append(True)
            raise torch.OutOfMemoryError("no room")
        return logits

    engine = Engine({"family": family})
    engine.lanes["family"].eos = frozenset()
    going = [Heard(family, "ab", [0.5, 0.5], limit=300, seed=n) for n in range(2)]
    joining = [Heard(family, text, [0.3, 0.7], limit=6, seed=n) for n, text in enumerate(("cd", "cda"))]
    monkeypatch.setattr(Policy, "forward", fails)
    admit = engine.lanes["family"]._admit
    monkeypatch.setattr(engine.lanes["family"], "_admit", lambda: (joins.set() if engine.lanes["family"].rows else None, admit()))
    engine.start()
    engine.submit([each.row for each in going])
    while engine.drawn < 8:
        time.sleep(0.001)
    engine.submit([each.row for each in joining])
    assert all(each.over.wait(20) for each in (*going, *joining))
    alone = [Heard(family, each.prompt.text, [0.3, 0.7], limit=6, seed=each.row.seed) for each in joining]
    engine.submit([each.row for each in alone])
    engine.stop()
    assert failed
    assert [each.finish for each in going] == ["error"] * 2
    assert [each.row.said for each in joining] == [each.row.said for each in alone]


def test_an_engine_whose_thread_ends_leaves_nobody_waiting(monkeypatch):
    family = family_of()
    engine, row = Engine({"family": family}), Heard(family, "ab", [0.5, 0.5], limit=4)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    found = []

    def broken():
        found.append(engine.call(lambda: "never"))
        raise RuntimeError("a fault of the engine's own")

    monkeypatch.setattr(engine.lanes["family"], "turn", broken)
    engine.start()
    engine.submit([row.row])
    assert row.over.wait(20)
    assert row.finish == "error"
    with pytest.raises(ParetuneError, match="the model answers"):
        found[0].result(timeout=20)

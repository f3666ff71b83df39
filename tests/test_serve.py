"""The HTTP server: the API's shapes, the spellings of a preference, and what is refused. In process; `test_serve_process` runs it."""

from __future__ import annotations

import asyncio
import json
import re
from types import SimpleNamespace

import httpx2 as httpx
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from paretune.serve.app import Limits, default_preference, make_app
from paretune.serve.engine import Engine
from paretune.serve.protocol import Served, dumps
from serving import NAMES, family_of, prompted, spoken_family

A, B = NAMES
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
KEY = "key-of-this-test"


@pytest.fixture(scope="module")
def families():
    """Two: one that is talked to in messages, and one whose preference is text."""
    talks, digits = family_of(chat=True), prompted()
    talks.policy.tokenizer.chat_template = TEMPLATE
    return {"fam": talks, "digits": digits}


class Api:
    """The application in a loop of its own, without a socket."""

    def __init__(self, families, *, key=None, limits=None, **settings):
        self._made = lambda: Engine(families, **settings), key, limits
        self.models = {name: Served(name, family, default_preference(family, None)) for name, family in families.items()}
        self.headers = {"authorization": f"Bearer {key}"} if key else {}

    def run(self, talk):
        """`talk(client)` between start and end."""

        engine, key, limits = self._made
        app = make_app(self.models, engine(), key=key, limits=limits)

        async def inside():
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=self.headers, timeout=60) as client:
                    return await talk(client)

        return asyncio.run(inside())

    def post(self, path, *bodies, **settings):
        """The responses to bodies that are sent at once."""

        async def talk(client):
            return await asyncio.gather(*(client.post(path, json=body, **settings) for body in bodies))

        return self.run(talk)


TEXT = {"model": "fam", "prompt": "abc", "max_tokens": 8, "seed": 5}
CHAT = {"model": "fam", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 8, "seed": 5}


def texts(response):
    assert response.status_code == 200, response.text
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in response.json()["choices"]]


def test_answers_are_those_of_sample_in_both_apis(families):
    family = families["fam"]
    w = {A: 0.7, B: 0.3}
    text, chat, several = Api(families).post(
        "/v1/completions", {**TEXT, "preference": w, "n": 2}, {**TEXT, "preference": w, "stop": ["b"]}, {**TEXT, "prompt": ["a", "bc"]}
    )
    settings = {"seed": 5, "max_new_tokens": 8, "raw": True}
    assert texts(text) == family.sample(["abc"], w, n=2, **settings)[0]
    assert texts(chat) == [family.sample(["abc"], w, **settings)[0][0].split("b")[0]]
    assert texts(several) == [row[0] for row in family.sample(["a", "bc"], {A: 0.5, B: 0.5}, **settings)]
    body = text.json()
    assert body["object"] == "text_completion"
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["total_tokens"] == 3 + body["usage"]["completion_tokens"]
    assert body["paretune"] == {"preference": w, "gates": {"adapter-0": 0.7, "adapter-1": 0.3}, "seed": 5}
    (said,) = Api(families).post("/v1/chat/completions", {**CHAT, "preference": w, "temperature": 0.5, "top_p": 0.9})
    want = family.sample([CHAT["messages"]], w, seed=5, max_new_tokens=8, temperature=0.5, top_p=0.9)
    assert texts(said) == want[0]
    assert said.json()["object"] == "chat.completion"


def test_a_prompt_that_stands_twice_in_a_list_gets_other_responses_as_from_sample(families):
    asked = ["abc", "b", "abc"]
    (made,) = Api(families).post("/v1/completions", {**TEXT, "prompt": asked, "n": 2})
    want = families["fam"].sample(asked, {A: 0.5, B: 0.5}, n=2, seed=5, max_new_tokens=8, raw=True)
    assert texts(made) == [text for row in want for text in row]
    assert want[0] != want[2]


def test_one_meaning_in_four_spellings(families):
    w = {A: 0.7, B: 0.3}
    spelled = [
        {"preference": w},
        {"preference": [0.7, 0.3]},
        {"preference": f"{A}=.7,{B}=.3"},
        {"model": f"fam@{A}=.7,{B}=.3"},
        {"lora": [{"id": 0, "scale": 0.7}, {"id": 1, "scale": 0.3}]},
        {"merged_adapters": {"ids": ["adapter-1", "adapter-0"], "weights": [0.3, 0.7]}},
    ]
    made = Api(families).post("/v1/completions", *({**TEXT, **each} for each in spelled))
    assert len({tuple(texts(response)) for response in made}) == 1
    assert [response.json()["paretune"]["preference"] for response in made] == [w] * 4 + [None] * 2
    assert all(response.json()["paretune"]["gates"] == {"adapter-0": 0.7, "adapter-1": 0.3} for response in made)
    other, alone = Api(families).post("/v1/completions", {**TEXT, "preference": {B: 1}}, {**TEXT, "lora": [{"id": 1, "scale": 1.0}]})
    assert texts(other) == texts(alone) != texts(made[0])
    assert alone.json()["paretune"]["gates"] == {"adapter-0": 0.0, "adapter-1": 1.0}


def streamed(families, path, body):
    async def talk(client):
        async with client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            return [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: ")]

    *found, end = Api(families).run(talk)
    assert end == "[DONE]"
    return [json.loads(line) for line in found]


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_stream_says_what_the_whole_answer_says(families, kind):
    path, body = ("/v1/chat/completions", CHAT) if kind == "chat" else ("/v1/completions", TEXT)
    more = {"logprobs": True, "top_logprobs": 2} if kind == "chat" else {"logprobs": 2}
    body = {**body, "n": 2, "stop": ["cc"], "preference": {A: 1.0}, **more}
    whole = Api(families).post(path, body)[0].json()
    events = streamed(families, path, {**body, "stream_options": {"include_usage": True}})
    assert events[-1]["usage"] == whole["usage"]
    assert events[-1]["choices"] == []
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert events[0]["paretune"] == whole["paretune"]
    assert all(event["usage"] is None for event in events[:-1])
    for want in whole["choices"]:
        parts = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == want["index"]]
        said = "".join(part["delta"].get("content", "") if kind == "chat" else part["text"] for part in parts)
        assert said == (want["message"]["content"] if kind == "chat" else want["text"])
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [want["finish_reason"]]
        logps = [part["logprobs"] for part in parts if part["logprobs"]]
        if kind == "chat":
            assert [token for logp in logps for token in logp["content"]] == want["logprobs"]["content"]
            assert all(len(token["top_logprobs"]) == 2 for token in want["logprobs"]["content"])
        else:
            assert [token for logp in logps for token in logp["tokens"]] == want["logprobs"]["tokens"]
            assert [offset for logp in logps for offset in logp["text_offset"]] == want["logprobs"]["text_offset"]
            assert len(want["logprobs"]["text_offset"]) == len(want["logprobs"]["tokens"])


def test_an_event_is_one_line_for_every_reader_of_lines():
    said = {"text": "one\u2028two\u2029three\x85four\nfive \u00e9"}
    assert dumps(said).splitlines() == [dumps(said)]
    assert json.loads(dumps(said)) == said
    assert "\u00e9" in dumps(said)


def test_bytes_of_tokens_add_up_to_the_text_where_a_character_is_spread_over_several():
    family = spoken_family()
    body = {**CHAT, "model": "spoken", "max_tokens": 60, "logprobs": True, "top_logprobs": 20}
    (choice,) = Api({"spoken": family}).post("/v1/chat/completions", body)[0].json()["choices"]
    told = choice["logprobs"]["content"]
    assert any("\ufffd" in token["token"] for token in told)
    said = [token for token in told if token["token"] != family.policy.tokenizer.eos_token]
    assert bytes(byte for token in said for byte in token["bytes"]).decode("utf-8", "replace") == choice["message"]["content"]
    text = {**TEXT, "model": "spoken", "max_tokens": 60, "logprobs": 20}
    (choice,) = Api({"spoken": family}).post("/v1/completions", text)[0].json()["choices"]
    told = choice["logprobs"]
    pairs = zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
    assert all(top[token] >= logp for token, logp, top in pairs if token in top)  # the most likely one of several with one text


@pytest.mark.parametrize("piece", ["\u2581word", "<0xC3>"])
def test_tokens_of_sentencepiece_keep_their_space_and_their_byte(piece):
    vocabulary = {"<unk>": 0, "\u2581word": 1, "<0xC3>": 2}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]  # Llama 2's
    made.decoder = decoders.Sequence(steps)
    family = SimpleNamespace(policy=SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=made)))
    text, said = Served("any", family, None).text_of(vocabulary[piece])
    assert (text, said) == ((" word", b" word") if piece[1:] == "word" else ("\ufffd", b"\xc3"))


def test_without_a_seed_answers_differ_and_tell_their_seed(families):
    unseeded = {name: value for name, value in TEXT.items() if name != "seed"}
    one, two = Api(families).post("/v1/completions", *[{**unseeded, "n": 8}] * 2)
    assert texts(one) != texts(two)
    (again,) = Api(families).post("/v1/completions", {**TEXT, "n": 8, "seed": one.json()["paretune"]["seed"]})
    assert texts(again) == texts(one)


def test_models_health_and_metrics(families):
    async def talk(client):
        await client.post("/v1/completions", json={**TEXT, "preference": {A: 0.25, B: 0.75}})
        await client.post("/v1/completions", json={**TEXT, "n": -1})
        return [await client.get(path) for path in ("/v1/models", "/v1/models/digits", "/health", "/metrics", "/v1/models/no")]

    models, one, health, metrics, none = Api(families, key=KEY).run(talk)
    card = models.json()["data"][0]
    assert (card["id"], card["object"]) == ("fam", "model")
    assert [each["name"] for each in card["paretune"]["objectives"]] == [A, B]
    assert card["paretune"]["default_preference"] == {A: 0.5, B: 0.5}
    assert one.json() == models.json()["data"][1]
    assert health.json() == {"status": "ok", "models": ["fam", "digits"]}
    assert none.status_code == 404
    numbers = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert numbers['paretune_requests_total{path="/v1/completions",status="200"}'] == "1.0"
    assert numbers['paretune_requests_total{path="/v1/completions",status="400"}'] == "1.0"
    assert numbers["paretune_queue_rows"] == numbers["paretune_batch_rows"] == "0.0"
    assert float(numbers["paretune_response_tokens"]) >= 1
    assert numbers['paretune_time_to_first_token_seconds_count{family="fam"}'] == "1.0"
    at = [numbers[f'paretune_preference_weight_bucket{{family="fam",le="{le}",objective="{A}"}}'] for le in ("0.2", "0.3")]
    assert at == ["0.0", "1.0"]


def test_a_key_is_asked_for_everywhere_but_at_health(families):
    api = Api(families, key=KEY)

    async def talk(client):
        found = []
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer é".encode()}):
            client.headers.pop("authorization", None)
            for path in ("/v1/models", "/metrics", "/health", "/v1/models/fam"):
                found.append((await client.get(path, headers=given)).status_code)
            found.append((await client.post("/v1/completions", json=TEXT, headers=given)).status_code)
        return found

    assert api.run(talk) == [401, 401, 200, 401, 401] * 4
    assert api.post("/v1/completions", TEXT)[0].status_code == 200


BAD = [
    ({"preference": {"polit": 1.0}}, 400, "preference", "existing objectives"),
    ({"preference": {A: 0.7, B: 0.7}}, 400, "preference", "sum to 1"),
    ({"preference": {A: 1.5, B: -0.5}}, 400, "preference", "non-negative"),
    ({"preference": [float("nan"), 1.0]}, 400, "preference", "non-negative"),
    ({"preference": {A: "1"}}, 400, "preference", "numbers"),
    ({"preference": 3}, 400, "preference", "an object"),
    ({"preference": [1]}, 400, "preference", "weight"),
    ({"model": "fam@"}, 200, None, None),
    ({"model": "fam@x=1"}, 400, "model", "existing objectives"),
    ({"model": f"fam@{A}"}, 400, "model", "name=weight"),
    ({"model": f"fam@{A}=1", "preference": {A: 1}}, 400, "preference", "preference once"),
    ({"lora": [], "merged_adapters": {}}, 400, "merged_adapters", "preference once"),
    ({"lora": [{"id": 2, "scale": 1}]}, 400, "lora", "named once"),
    ({"lora": [{"id": 0, "scale": 1}, {"id": 0, "scale": 1}]}, 400, "lora", "named once"),
    ({"lora": [{"id": 0, "scale": 1e9}]}, 400, "lora", "a gate"),
    ({"lora": [{"id": 0, "scale": float("inf")}]}, 400, "lora", "a gate"),
    ({"lora": [{"id": -1, "scale": 1}]}, 400, "lora", "id"),
    ({"lora": {"id": 0}}, 400, "lora", "id and a scale"),
    ({"merged_adapters": {"ids": ["adapter-9"], "weights": [1]}}, 400, "merged_adapters", "known by its name"),
    ({"merged_adapters": {"ids": ["adapter-0"], "weights": []}}, 400, "merged_adapters", "one length"),
    ({"merged_adapters": {"ids": ["adapter-0"], "weights": [1], "merge_strategy": "ties"}}, 400, "merged_adapters", "linearly"),
    ({"merged_adapters": {"ids": [["x"]], "weights": [1]}}, 400, "merged_adapters", "known by its name"),
    ({"model": "digits", "lora": [{"id": 0, "scale": 1}]}, 400, "lora", "every adapter has one"),
    ({"model": "other"}, 404, "model", "is served"),
    ({"model": "famous"}, 404, "model", "is served"),
    ({"model": 3}, 404, "model", "is served"),
    ({"model": None}, 400, "model", "names a model"),
    ({"n": 10_000}, 400, "n", "at most 128"),
    ({"n": 0}, 400, "n", "n "),
    ({"n": "two"}, 400, "n", "n "),
    ({"n": True}, 400, "n", "n "),
    ({"max_tokens": 10**6}, 400, "max_tokens", "fit the positions"),
    ({"max_tokens": 0}, 400, "max_tokens", "max_tokens"),
    ({"prompt": "ab" * 4000}, 400, "max_tokens", "fit the positions"),
    ({"prompt": [1, 2, 3]}, 400, "prompt", "a prompt is a text"),
    ({"prompt": []}, 400, "prompt", "a prompt is a text"),
    ({"prompt": None}, 400, "prompt", "a prompt is a text"),
    ({"prompt": {"a": 1}}, 400, "prompt", "a prompt is a text"),
    ({"temperature": -1}, 400, "temperature", "temperature is"),
    ({"temperature": "hot"}, 400, "temperature", "temperature is"),
    ({"top_p": 0}, 400, "top_p", "top_p is"),
    ({"top_p": float("nan")}, 400, "top_p", "top_p is"),
    ({"top_k": 2.5}, 400, "top_k", "top_k is"),
    ({"top_k": float("inf")}, 400, "top_k", "top_k is"),
    ({"top_k": 10**400}, 400, "top_k", "top_k is"),
    ({"temperature": 10**400}, 400, "temperature", "temperature is"),
    ({"repetition_penalty": 10**400}, 400, "repetition_penalty", "repetition_penalty is"),
    ({"presence_penalty": 9}, 400, "presence_penalty", "presence_penalty is"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "repetition_penalty is"),
    ({"stop": [""]}, 400, "stop", "none empty"),
    ({"stop": ["a"] * 17}, 400, "stop", "none empty"),
    ({"stop": 3}, 400, "stop", "none empty"),
    ({"seed": "x"}, 400, "seed", "seed"),
    ({"seed": 10**400}, 400, "seed", "64 bits"),
    ({"logprobs": 50}, 400, "logprobs", "at most 20"),
    ({"stream": "yes"}, 400, "stream", "stream"),
    ({"stream_options": 3}, 400, "stream_options", "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "no"}}, 400, "stream_options", "include_usage"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "supported"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "supported"),
    ({"echo": True}, 400, "echo", "supported"),
    ({"best_of": 3}, 400, "best_of", "supported"),
    ({"temprature": 1}, 400, "temprature", "supported"),
    ({"messages": []}, 400, "messages", "supported"),
    ({"tools": [], "echo": False, "logit_bias": None, "user": "me", "response_format": {"type": "text"}}, 200, None, None),
]


def test_bad_requests_get_the_right_status_and_the_server_goes_on(families):
    made = Api(families).run(lambda client: _sent(client, [{**TEXT, **change} for change, *_ in BAD]))
    for (change, status, param, rule), response in zip(BAD, made, strict=True):
        assert response.status_code == status, (change, response.text)
        if status == 200:
            continue
        error = response.json()["error"]
        assert error["param"] == param, (change, error)
        assert rule in error["rule"], (change, error)
        assert error["rule"] in error["message"]
        assert error["found"]
        assert error["remedy"]
        assert error["type"] == "invalid_request_error"
        assert error["code"] == {404: "model_not_found"}.get(status, "context_length_exceeded" if "positions" in rule else None)


async def _sent(client, bodies, path="/v1/completions"):
    """Written by Python's own json, which lets NaN through as a client might."""
    headers = {"content-type": "application/json"}
    return [await client.post(path, content=json.dumps(body), headers=headers) for body in bodies]


BAD_CHATS = [
    ([], "with a message at least"),
    ("hello", "with a message at least"),
    ([{"role": "user"}], "role and content|messages"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "a message is a text"),
    ([{"role": "user", "content": "\ud800"}], "UTF-8"),
    ([{"role": "assistant", "content": "a"}], ""),
    ([{"role": "assistant", "content": "a", "tool_calls": [{}]}, {"role": "user", "content": "b"}], "a message is a text"),
]


def test_bad_conversations_are_refused_by_name(families):
    bodies = [{**CHAT, "messages": messages} for messages, _ in BAD_CHATS]
    made = Api(families).run(lambda client: _sent(client, bodies, "/v1/chat/completions"))
    for (messages, rule), response in zip(BAD_CHATS, made, strict=True):
        assert response.status_code == 400, (messages, response.text)
        assert re.search(rule, response.json()["error"]["rule"]), response.text
        assert response.json()["error"]["param"] == "messages"
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    (whole,), (inparts,) = (
        Api(families).post("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": each}]}) for each in ("abc", parts)
    )
    assert texts(whole) == texts(inparts)
    (plain,) = Api({"fam": families["digits"]}).post("/v1/chat/completions", CHAT)
    assert plain.status_code == 400
    assert "chat template" in plain.json()["error"]["message"]


def test_bad_bodies_get_the_right_status(families):
    api = Api(families, limits=Limits(body=2**20))
    headers = {"content-type": "application/json"}

    async def slow():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    async def large():
        for _ in range(20):
            yield b" " * 2**17

    async def talk(client):
        sent = [
            {"content": b"\xff\xfe{}", "headers": headers},
            {"content": b"{", "headers": headers},
            {"content": b"[" * 100_000, "headers": headers},
            {"content": b"3", "headers": headers},
            {"content": b"", "headers": headers},
            {"content": b"{}", "headers": {"content-type": "text/plain"}},
            {"content": json.dumps({**TEXT, "prompt": "a" * 10 * 2**20}).encode(), "headers": headers},
            {"content": large(), "headers": headers},
        ]
        found = [(await client.post("/v1/completions", **each)).status_code for each in sent]
        found += [(await client.get(path)).status_code for path in ("/v1/completions", "/no", "/v1")]
        found.append((await client.post("/v1/completions", json=TEXT)).status_code)
        return found

    assert api.run(talk) == [400, 400, 400, 400, 400, 415, 413, 413, 405, 404, 404, 200]
    late = Api(families, limits=Limits(receive=0.2))
    assert late.run(lambda client: client.post("/v1/completions", content=slow(), headers=headers)).status_code == 408


def test_a_full_queue_says_when_to_come_back(families):
    api = Api(families, rows=1, queue=2)
    made = api.post("/v1/completions", *[{**TEXT, "n": 2}] * 12)
    statuses = [response.status_code for response in made]
    assert set(statuses) == {200, 429}
    full = next(response for response in made if response.status_code == 429)
    assert int(full.headers["retry-after"]) >= 1
    assert full.json()["error"]["type"] == "rate_limit_error"
    (again,) = api.post("/v1/completions", {**TEXT, "n": 3})
    assert again.status_code == 400, "it could never be answered"


def test_an_error_of_the_model_is_an_error_of_the_server_and_the_next_request_is_answered(families, monkeypatch):
    api, policy = Api(families), families["fam"].policy

    async def talk(client):
        with monkeypatch.context() as patch:
            patch.setattr(policy, "combine", lambda *_: 1 / 0)
            broken = [await client.post("/v1/completions", json={**TEXT, "stream": stream}) for stream in (False, True)]
        return [*broken, await client.post("/v1/completions", json=TEXT)]

    *broken, good = api.run(talk)
    for response in broken:
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
    assert good.status_code == 200

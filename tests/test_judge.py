"""The judge, against a server of this test's own on 127.0.0.1: what it sends, what it makes of every kind of answer, and what it keeps."""

import datetime
import gzip
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zlib

import pytest

from judge_server import JudgeServer, says, verdict
from paretune.errors import ConfigError, RewardError
from paretune.objectives import judge as module
from paretune.objectives.judge import Judge, read_usage
from paretune.registry import OBJECTIVES, describe
from paretune.testing import check_objective

RUBRIC = "How helpful is the answer?"
LENGTHS = {"a": 1.0, "bb": 5.5, "ccc": 10.0}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def judge(server, **fields):
    given = {"name": "judge", "url": server if isinstance(server, str) else server.url, "model": "m", "rubric": RUBRIC, "backoff": 0.001}
    return OBJECTIVES.build({**given, **fields})


def ask(objective, texts, **columns):
    """Scores, and what was said about failures."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scores = objective(["why?"] * len(texts), texts, **columns)
    return scores, [str(w.message) for w in said if w.category is UserWarning]


def test_scores_are_stretched_from_the_scale_to_the_range():
    with JudgeServer(lambda text, _: verdict(LENGTHS[text])) as server:
        scores, said = ask(judge(server), ["a", "bb", "ccc"])
        assert scores == [0.0, 0.5, 1.0]
        assert said == []
        assert ask(judge(server, low=-1, high=3, scale=[0, 10]), ["bb"])[0] == [pytest.approx(-1 + 4 * 0.55)]


def test_what_is_sent():
    with JudgeServer(lambda *_: verdict(5)) as server:
        objective = judge(server, columns=["answer", "facts"], scale=[1, 5], extra={"top_p": 1, "seed": None})
        ask(objective, ["because"], answer=["for this reason"], facts=[["x", 1]])
        body = server.bodies[0]
        assert server.paths == ["/v1/chat/completions"]
        assert (body["model"], body["temperature"], body["max_tokens"], body["top_p"]) == ("m", 0, 512, 1)
        assert "seed" not in body
        system, user = body["messages"]
        assert system["content"].startswith(RUBRIC)
        assert "a number from 1 to 5" in system["content"]
        assert user["content"] == (
            "<prompt>\nwhy?\n</prompt>\n\n<answer>\nfor this reason\n</answer>\n\n<facts>\n[\"x\",1]\n</facts>"
            "\n\n<response>\nbecause\n</response>"
        )  # fmt: skip
        schema = body["response_format"]["json_schema"]["schema"]
        assert schema["properties"]["score"] == {"type": "number", "minimum": 1, "maximum": 5}
        assert "Authorization" not in server.headers[0]
        objective([[{"role": "user", "content": "why?"}]], [[{"role": "assistant", "content": "so"}]], answer=["x"], facts=["y"])
        assert "<prompt>\nuser: why?\n</prompt>" in server.bodies[1]["messages"][1]["content"]
        ask(judge(server, answer="json_object"), ["z"])
        ask(judge(server, answer="text"), ["z"])
        assert [body.get("response_format") for body in server.bodies[2:]] == [{"type": "json_object"}, None]


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (says("I would say 7."), "not JSON"),
        (says('{"score": 7'), "not JSON"),
        (says(None), "not JSON"),
        ((200, "<html>busy</html>"), "not JSON"),
        ((200, {"error": "no"}), "not JSON"),
        ((200, {"choices": []}), "not JSON"),
        ((200, ["x"]), "not JSON"),
        (says("[7]"), "no score"),
        (says('{"points": 7}'), "no score"),
        (says('{"score": "7"}'), "no score"),
        (says('{"score": true}'), "no score"),
        (says('{"score": null}'), "no score"),
        (says('{"score": 0.5}'), "score out of range"),
        (says('{"score": 11}'), "score out of range"),
        (says('{"score": NaN}'), "score out of range"),
    ],
)
def test_nonsense_is_asked_for_once_more_and_then_unscored(answer, cause):
    """Never a plausible number: the 7 in the first answer is not taken out of its sentence."""
    with JudgeServer(lambda text, _: verdict(4) if text == "good" else answer) as server:
        objective = judge(server)
        scores, said = ask(objective, ["good", "bad"])
        assert scores == [pytest.approx(1 / 3), None]
        assert server.texts.count("bad") == 2
        assert objective.usage.failures == {cause: 1}
        assert said == [f"judge m: 1 of 2 answers have no score ({cause}: 1)"]


def test_nonsense_once_and_then_a_score():
    with JudgeServer(lambda _, attempt: says("hm") if attempt == 0 else verdict(10)) as server:
        objective = judge(server)
        assert ask(objective, ["x"]) == ([1.0], [])
        assert (objective.usage.requests, objective.usage.failures) == (2, {})


def test_a_fence_around_the_json_is_taken_off():
    with JudgeServer(lambda *_: says('```json\n{"reason": "", "score": 10}\n```')) as server:
        assert ask(judge(server), ["x"])[0] == [1.0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_tried_again(status):
    with JudgeServer(lambda _, attempt: (status, "busy") if attempt < 3 else verdict(10)) as server:
        objective = judge(server, retries=3)
        assert ask(objective, ["x"]) == ([1.0], [])
        assert objective.usage.requests == len(server.bodies) == 4
        objective = judge(server, retries=0)
        server.bodies.clear()
        scores, said = ask(objective, ["x"])
        assert scores == [None]
        assert f"HTTP {status}: 1" in said[0]


def waited(waits, wait):
    """In place of Event.wait: the judge's waits are noted and over at once; those of the server and of starting threads stay."""

    def instead(event, timeout=None):
        if sys._getframe(1).f_code is not Judge._ask.__code__:
            return wait(event, timeout)
        waits.append(timeout)
        return event.is_set()

    return instead


def test_waits_double_with_jitter_and_honor_the_server(monkeypatch):
    waits = []
    monkeypatch.setattr(module.threading.Event, "wait", waited(waits, module.threading.Event.wait))
    with JudgeServer(lambda *_: (429, "busy")) as server:
        for _ in range(2):
            ask(judge(server, retries=4, backoff=2.0, seed=7), ["x"])
        first, again = waits[:4], waits[4:]
        assert first == again  # the jitter comes from the seed
        assert all(0.5 * 2 * 2**k <= wait <= 1.5 * 2 * 2**k for k, wait in enumerate(first))
        assert len({wait / 2**k for k, wait in enumerate(first)}) == 4
        waits.clear()
        ask(judge(server, retries=1, backoff=2.0, seed=8), ["x"])
        assert waits != first[:1]
    with JudgeServer(lambda *_: (429, "busy", {"Retry-After": "30"})) as server:
        waits.clear()
        ask(judge(server, retries=1, backoff=0.1), ["x"])
        assert waits == [30.0]


def test_a_server_that_does_not_answer_in_time():
    with JudgeServer(lambda *_: verdict(10), delay=0.6) as server:
        objective = judge(server, timeout=0.1, retries=1)
        scores, said = ask(objective, ["x"])
        assert scores == [None]
        assert said == ["judge m: 1 of 1 answers have no score (no answer within 0.1 s: 1)"]
        assert objective.usage.requests == 2


def test_a_server_that_is_not_there():
    with JudgeServer(lambda *_: verdict(10)) as server:
        url = server.url
    scores, said = ask(judge(url, retries=1), ["x"])
    assert scores == [None]
    assert "ConnectError: 1" in said[0]


@pytest.mark.parametrize(("status", "remedy"), [(401, "check the key in JUDGE_KEY"), (403, "JUDGE_KEY"), (404, "check url and model")])
def test_a_request_that_is_refused_stops_at_once(monkeypatch, status, remedy):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-123")
    with JudgeServer(lambda *_: (status, "wrong key sk-secret-123")) as server:
        with pytest.raises(RewardError, match="the judge accepts the request") as error:
            ask(judge(server, key_env="JUDGE_KEY", concurrency=1), [str(n) for n in range(50)])
        assert error.value.found == f"HTTP {status}: wrong key ***"
        assert remedy in error.value.remedy
        assert len(server.bodies) == 1


def test_nobody_waits_for_the_next_attempt_once_a_request_was_refused():
    """Nor after Ctrl-C, which ends in the same way: the other threads waited for a busy server, up to a minute and five times."""
    busy = threading.Event()

    def answer(text, _):
        if text == "busy":
            busy.set()
            return 429, "busy", {"Retry-After": "60"}
        busy.wait(10)
        time.sleep(0.2)
        return 401, "no"

    start = time.monotonic()
    with JudgeServer(answer) as server, pytest.raises(RewardError, match="the judge accepts the request"):
        ask(judge(server, concurrency=2, retries=1), ["busy", "refused"])
    assert time.monotonic() - start < 30


def test_a_text_that_the_server_refuses_is_one_failure():
    with JudgeServer(lambda text, _: (400, "too long") if text == "long" else verdict(10)) as server:
        scores, said = ask(judge(server), ["long", "x"])
        assert scores == [None, 1.0]
        assert "HTTP 400: 1" in said[0]
        assert server.texts.count("long") == 1


def test_a_column_that_json_cannot_spell_is_shown_as_a_text():
    with JudgeServer(lambda *_: verdict(10)) as server:
        columns = {"day": [datetime.date(2026, 1, 2)], "size": [math.nan], "facts": [{"b": 1, "a": [2]}]}
        assert ask(judge(server, columns=list(columns)), ["x"], **columns) == ([1.0], [])
        sent = server.bodies[0]["messages"][1]["content"]
        assert all(part in sent for part in ("<day>\n2026-01-02\n", "<size>\nnan\n", '<facts>\n{"a":[2],"b":1}\n'))


def test_why_a_server_refuses_is_told_without_the_key(monkeypatch):
    """One that does not know a parameter refuses every text, and says which."""
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-123")
    with JudgeServer(lambda *_: (400, "unsupported parameter:\n'max_tokens' sk-secret-123")) as server:
        scores, said = ask(judge(server, key_env="JUDGE_KEY"), ["a", "b"])
        assert scores == [None, None]
        assert said[0].endswith("(HTTP 400: 2); the server said: unsupported parameter: 'max_tokens' ***")


def test_equal_texts_are_asked_once_and_no_more_than_allowed_at_a_time():
    with JudgeServer(lambda *_: verdict(10), delay=0.02) as server:
        objective = judge(server, concurrency=3)
        assert ask(objective, [f"t{n % 9}" for n in range(27)])[0] == [1.0] * 27
        assert len(server.bodies) == 9
        assert 2 <= server.most <= 3


# ---- a server that means harm, or is broken: bounds on bytes, time and numbers

GOOD = json.dumps(verdict(10)[1]).encode()
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"


def sends(*parts, every=0.0, times=1):
    """A connection on which these parts come, the last one again and again."""

    def write(to):
        for n in range(len(parts) - 1 + times):
            to.write(parts[min(n, len(parts) - 1)])
            to.flush()
            time.sleep(every)

    return 200, write


def bomb(size):
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([packer.compress(b"0" * (1 << 20)) for _ in range(size >> 20)] + [packer.flush()])


def framed(data, *headers):
    return HEAD + b"".join(h + b"\r\n" for h in headers) + b"Content-Length: %d\r\n\r\n" % len(data) + data


def test_an_answer_that_unpacks_to_300_mb_is_not_unpacked():
    packed = bomb(300 << 20)
    with JudgeServer(lambda *_: sends(framed(packed, b"Content-Encoding: gzip"))) as server:
        tracemalloc.start()
        scores, said = ask(judge(server), ["x"])
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert scores == [None]
    assert "longer than 4 MiB: 1" in said[0]
    assert most < 60 << 20


@pytest.mark.parametrize("encoding", [b"gzip", b"x-gzip", b"deflate", b"identity"])
def test_a_packed_answer_is_unpacked(encoding):
    data = {b"deflate": zlib.compress(GOOD), b"identity": GOOD}.get(encoding, gzip.compress(GOOD))
    with JudgeServer(lambda *_: sends(framed(data, b"Content-Encoding: " + encoding))) as server:
        assert ask(judge(server), ["x"])[0] == [1.0]
        assert server.headers[0]["Accept-Encoding"] == "gzip"


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (sends(framed(gzip.compress(GOOD), b"Content-Encoding: br")), "not JSON"),
        (sends(framed(b"\x1f\x8bbroken", b"Content-Encoding: gzip")), "not JSON"),
        (sends(framed(b"[" * 200_000)), "not JSON"),
        (sends(framed(b"\xff\xfe\x00")), "not JSON"),
        (says("[" * 200_000), "not JSON"),
        (says('{"score": 1e999}'), "score out of range"),
        (says('{"score": ' + "9" * 400 + "}"), "score out of range"),
        (says('{"score": ' + "9" * 5000 + "}"), "not JSON"),
        (sends(HEAD + b"\r\n", b" " * (1 << 20), times=40), "longer than 4 MiB"),
        (sends(HEAD, b"X: " + b"y" * 1000 + b"\r\n", times=2000), "RemoteProtocolError"),
        (sends(framed(GOOD)[:-5]), "RemoteProtocolError"),
        (sends(b"SSH-2.0-OpenSSH\r\n"), "RemoteProtocolError"),
    ],
)
def test_an_answer_that_is_none(answer, cause):
    with JudgeServer(lambda *_: answer) as server:
        scores, said = ask(judge(server, retries=1), ["x"])
    assert scores == [None]
    assert said == [f"judge m: 1 of 1 answers have no score ({cause}: 1)"]


@pytest.mark.parametrize(
    "drip",
    [
        (HEAD + b"Content-Length: 10000\r\n\r\n", b" "),  # of the body
        (HEAD + b"\r\n", b" "),  # without a length
        (HEAD + b"X: ", b"y"),  # of a header
        (b"HTTP/1.1 100 Continue\r\n\r\n",),  # never the answer
    ],
)
def test_bytes_that_drip_do_not_keep_an_attempt_alive(drip):
    with JudgeServer(lambda *_: sends(*drip, every=0.05, times=100)) as server:
        start = time.monotonic()
        scores, said = ask(judge(server, timeout=0.3, retries=1), ["x"])
    assert time.monotonic() - start < 2.5  # 5 s are dripped
    assert scores == [None]
    assert "no answer within 0.3 s: 1" in said[0]


@pytest.mark.parametrize("count", ["1e999", "-5", "NaN", "1" + "0" * 30, '"many"', "null", "[]", "{}"])
def test_nonsense_in_the_usage_costs_no_score_and_counts_nothing(tmp_path, count):
    text = json.dumps(verdict(10)[1]).replace('"prompt_tokens": 10', f'"prompt_tokens": {count}')
    with JudgeServer(lambda *_: (200, text)) as server:
        objective = judge(server, cache=str(tmp_path / "c"))
        assert ask(objective, ["x"]) == ([1.0], [])
    assert (objective.usage.prompt_tokens, objective.usage.completion_tokens) == (0, 5)
    assert read_usage(tmp_path / "c").prompt_tokens == 0


@pytest.mark.parametrize("usage", ["7", '"x"', "[1]", "1e999"])
def test_a_usage_that_is_no_mapping(usage):
    text = json.dumps(verdict(10)[1]).replace('{"prompt_tokens": 10, "completion_tokens": 5}', usage)
    with JudgeServer(lambda *_: (200, text)) as server:
        assert ask(judge(server), ["x"]) == ([1.0], [])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_get_the_key(monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-123")
    with JudgeServer(lambda *_: verdict(10)) as other:
        with JudgeServer(lambda *_: (status, "", {"Location": other.url + "/chat/completions"})) as server:
            scores, said = ask(judge(server, key_env="JUDGE_KEY"), ["x"])
        assert other.bodies == []
    assert scores == [None]
    assert f"HTTP {status}: 1" in said[0]


def test_what_a_refusing_server_says_is_cut_and_moves_no_terminal(monkeypatch):
    """The key is taken out before the text is cut: no part of it is left at the end."""
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-123")
    text = "\x1b[2J\u202e" + "x" * 140 + " sk-secret-123 " + "y" * 10_000
    with JudgeServer(lambda *_: (401, text)) as server, pytest.raises(RewardError) as error:
        ask(judge(server, key_env="JUDGE_KEY"), ["x"])
    assert error.value.found.startswith(r"HTTP 401: \x1b[2J\u202exxx")
    assert "\x1b" not in str(error.value)
    assert "sk-" not in str(error.value)
    assert len(error.value.found) < 220


# ---- keys: from the environment only

NO_SECRET = "keys and passwords are not written down"


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"url": "http://user:hunter2@127.0.0.1:1/v1"}, NO_SECRET),
        ({"url": "https://hunter2@127.0.0.1:1/v1"}, NO_SECRET),
        ({"url": "http://127.0.0.1:1/v1?key=hunter2"}, NO_SECRET),
        ({"url": "http://127.0.0.1:1/v1?a=b&api_key=hunter2"}, NO_SECRET),
        ({"url": "http://127.0.0.1:1/v1?token=hunter2"}, NO_SECRET),
        ({"url": "http://127.0.0.1:1/v1?code=hunter2"}, "without a user, a query or a fragment"),
        ({"url": "http://127.0.0.1:1/v1#hunter2"}, "without a user, a query or a fragment"),
        ({"url": "http://127.0.0.1:1/sk-proj-hunter2aaaaaaaaaa/v1"}, NO_SECRET),
        ({"extra": {"api_key": "hunter2"}}, NO_SECRET),
        ({"extra": {"API-Key": "hunter2"}}, NO_SECRET),
        ({"extra": {"x-api-key": "hunter2"}}, NO_SECRET),
        ({"extra": {"token": "hunter2"}}, NO_SECRET),
        ({"extra": {"headers": {"Authorization": "Bearer hunter2"}}}, NO_SECRET),
        ({"extra": {"extra_headers": [{"Cookie": "hunter2"}]}}, NO_SECRET),
        ({"extra": {"metadata": {"note": "sk-hunter2aaaaaaaaaaaaaaa"}}}, NO_SECRET),
        ({"extra": {"proxy": "http://user:hunter2@proxy:3128"}}, NO_SECRET),
        ({"rubric": "Use Bearer sk-hunter2aaaaaaaaaaaaaaa."}, NO_SECRET),
        ({"key_env": "sk-hunter2"}, "key_env is the name of an environment variable"),
        ({"key_env": "Bearer hunter2"}, "key_env is the name of an environment variable"),
        ({"key_env": "hunter2aaaaaaaaaaaaaaaaaaaa"}, "key_env is the name of an environment variable"),
        ({"key_env": "hf_hunter2aaaaaaaaaaaaaaa"}, NO_SECRET),
        ({"key_env": "JUDGE_KEY=hunter2"}, "key_env is the name of an environment variable"),
        ({"key_env": ""}, "key_env is the name of an environment variable"),
    ],
)
def test_a_key_in_the_description_is_refused_and_not_shown(fields, rule):
    with pytest.raises(ConfigError) as error:
        judge("http://127.0.0.1:1/v1", **fields)
    assert rule in error.value.rule
    assert "key_env" in error.value.remedy
    assert "hunter2" not in str(error.value)
    with pytest.raises(ConfigError) as error:  # also where the class is called
        Judge(**{"url": "http://127.0.0.1:1/v1", "model": "m", "rubric": RUBRIC, **fields})
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"extra": {"max_completion_tokens": 5, "stop_token_ids": [1, 2], "logit_bias": {"17": 1}, "prompt_cache_key": "mine", "top_k": 1}},
        {"extra": {"seed": None, "api_key": None, "stop": ["</s>"], "chat_template_kwargs": {"enable_thinking": False}}},
        {"rubric": "Does it keep passwords and API keys out, as https://example.org/@team/rules?lang=en&topic=key says?"},
        {"url": "https://my-endpoint.example.org:8443/openai/deployments/gpt-4o-2024-08-06/v1/"},
        {"key_env": "OPENAI_API_KEY"},
        {"key_env": "_judge2"},
        {"key_env": "TEAM_EVALUATION_JUDGE_KEY_2026"},
        {"model": "sk-learn-community/judge-7b"},
    ],
)
def test_what_is_no_key_is_accepted(fields):
    judge("http://127.0.0.1:1/v1", **fields)


@pytest.mark.parametrize("key", ["a b", "a\nb", "a\x1bb", "kl\u00fcssel"])
def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ConfigError, match="an API key is one word of plain characters") as error:
        judge("http://127.0.0.1:1/v1", key_env="JUDGE_KEY").check()
    assert key not in str(error.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/v1", "http://h:x/v1", "http:///v1", "https://", "http://[::1/v1", "http://h/v1\n"])
def test_an_address_that_is_none(url):
    with pytest.raises(ConfigError, match="url begins with http:// or https://, and names a host"):
        judge(url)


# ---- the cache and the cost


def test_the_cache_answers_without_the_server_and_sums_up_the_cost(tmp_path):
    cache = tmp_path / "sub" / "judge.sqlite"
    with JudgeServer(lambda text, _: says("hm") if text == "bad" else verdict(LENGTHS[text], usage=(100, 20))) as server:
        first = judge(server, cache=str(cache))
        scores, _ = ask(first, ["a", "bb", "bad"])
        assert scores == [0.0, 0.5, None]
        assert (first.usage.requests, first.usage.prompt_tokens, first.usage.completion_tokens) == (4, 200, 40)
        second = judge(server, cache=str(cache))
        server.bodies.clear()
        assert ask(second, ["a", "bb", "ccc", "bad"])[0] == [0.0, 0.5, 1.0, None]
        assert sorted(server.texts) == ["bad", "bad", "ccc"]  # a failure is asked for again, an answer never
        assert second.usage.cached == 2
        whole = read_usage(cache)
        assert (whole.requests, whole.cached, whole.prompt_tokens, whole.completion_tokens) == (7, 3, 300, 60)
        assert whole.failures == {"not JSON": 2}
        url = server.url
    assert ask(judge(url, cache=str(cache), retries=0), ["ccc"]) == ([1.0], [])


@pytest.mark.parametrize(
    "change", [{"rubric": "How short?"}, {"model": "other"}, {"scale": [1, 12]}, {"columns": ["c"]}, {"temperature": 1}]
)
def test_the_cache_is_keyed_by_all_that_is_sent(tmp_path, change):
    with JudgeServer(lambda *_: verdict(10)) as server:
        ask(judge(server, cache=str(tmp_path / "c")), ["x"])
        ask(judge(server, cache=str(tmp_path / "c"), **change), ["x"], c=["y"])
        assert len(server.bodies) == 2
        ask(judge(server, cache=str(tmp_path / "c"), concurrency=1, low=-1, timeout=5), ["x"])
        assert len(server.bodies) == 2  # what changes no answer changes no key


CHILD = """
import sys
from paretune.registry import OBJECTIVES
objective = OBJECTIVES.build({"name": "judge", "url": sys.argv[1], "model": "m", "rubric": "r", "cache": sys.argv[2], "concurrency": 2})
objective(["p"] * 40, [str(n) for n in range(40)])
"""


def test_what_was_answered_before_kill_9_is_not_asked_again(tmp_path):
    cache = tmp_path / "judge.sqlite"
    with JudgeServer(lambda *_: verdict(10), delay=0.05) as server:
        environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
        child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(cache)], env=environment)
        deadline = time.monotonic() + 60
        while len(server.bodies) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        time.sleep(0.2)
        asked, known = set(server.texts), read_usage(cache).cached
        assert 12 <= len(asked) < 40
        assert known >= len(asked) - 2  # at most what was under way in the two threads
        server.bodies.clear()
        server.delay = 0.0
        objective = judge(server, rubric="r", cache=str(cache))
        assert objective(["p"] * 40, [str(n) for n in range(40)]) == [1.0] * 40
        assert len(server.bodies) == 40 - known


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-123")
    with JudgeServer(lambda *_: verdict(10)) as server:
        objective = judge(server, key_env="JUDGE_KEY", cache=str(tmp_path / "c"))
        objective.check()
        ask(objective, ["x"])
        assert server.headers[0]["Authorization"] == "Bearer sk-secret-123"
        assert "sk-secret" not in json.dumps(describe(objective))
        assert all(b"sk-secret" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for value in (None, "  "):
        monkeypatch.delenv("JUDGE_KEY") if value is None else monkeypatch.setenv("JUDGE_KEY", value)
        with pytest.raises(ConfigError, match="the environment variable that key_env names holds the API key") as error:
            objective.check()
        assert error.value.found == f"JUDGE_KEY is {'not set' if value is None else 'empty'}"


@pytest.mark.parametrize(
    ("fields", "rule", "found"),
    [
        ({"url": "localhost:8000"}, "url begins with http:// or https://", "localhost:8000"),
        ({"rubric": " "}, "the rubric says what a good answer is", "' '"),
        ({"scale": [5, 5]}, "the scale goes up", "(5.0, 5.0)"),
        ({"concurrency": 0}, "concurrency and max_tokens are at least 1", "concurrency=0"),
        ({"timeout": 0}, "timeout is positive", "timeout=0"),
        ({"retries": -1}, "retries and backoff are not negative", "retries=-1"),
        ({"low": 2}, "the range is finite and low is below high", "low=2"),
        ({"answer": "yaml"}, "answer:", "'yaml'"),
        ({"columns": ["facts", "response"]}, "columns are what it sees beside prompt and response", "response"),
        ({"columns": ["prompt"]}, "columns are what it sees beside prompt and response", "prompt"),
    ],
)
def test_fields_that_are_wrong(fields, rule, found):
    with pytest.raises(ConfigError) as error:
        judge("http://127.0.0.1:1/v1", **fields)
    assert rule in error.value.rule
    assert found in error.value.found


def test_a_cache_that_is_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, and longer than the header of one: " * 50)
    with JudgeServer(lambda *_: verdict(10)) as server, pytest.raises(ConfigError, match="the cache is a file that this objective wrote"):
        ask(judge(server, cache=str(tmp_path / "notes.txt")), ["x"])
    with pytest.raises(ConfigError, match="a judge's cache is a file"):
        read_usage(tmp_path / "gone")


def test_it_keeps_the_promises_of_an_objective(tmp_path):
    with JudgeServer(lambda text, _: verdict(1 + len(text) % 10)) as server:
        check_objective(judge(server))


def test_the_cache_is_a_plain_database(tmp_path):
    with JudgeServer(lambda *_: verdict(7)) as server:
        ask(judge(server, cache=str(tmp_path / "c")), ["x"])
    with sqlite3.connect(tmp_path / "c") as store:
        assert store.execute("SELECT score FROM scores").fetchall() == [(7.0,)]
    store.close()

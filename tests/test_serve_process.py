"""A server on a socket: the official client, clients that leave or do not read, and the command from its start to its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from typer.testing import CliRunner

from paretune.cli import app
from paretune.policy.family import Family
from paretune.serve.app import Limits, _listening, _Told, default_preference, load_families, make_app
from paretune.serve.engine import Engine
from paretune.serve.protocol import Served
from serving import Letters, spoken_family

PREFERENCE = {"polite": 0.7, "brief": 0.3}
SAID = [{"role": "user", "content": "where is parcel 7?"}]


@pytest.fixture(scope="module")
def running():
    """A server in a thread of this process: its engine and address."""
    import uvicorn

    family = spoken_family()
    engine = Engine({"family": family}, rows=16)
    limits = Limits(send=0.5)
    task = Letters("hello", "where is parcel 7?", objectives=family.objectives)
    served = Served("family", family, default_preference(family, None), task=task)
    app = make_app({"family": served}, engine, limits=limits)
    listening, ready, found = _listening("127.0.0.1", 0), threading.Event(), []
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)  # what a client does not read fills it soon
    server = _Told(uvicorn.Config(app, log_level="error"), ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    assert ready.wait(30)
    found.append(f"http://127.0.0.1:{listening.getsockname()[1]}")
    engine.url = found[0]
    yield engine
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    listening.close()


def offline(engine, *given, **settings):
    """`Family.sample` on the engine's thread: what runs there and what is asked here use one model."""
    return engine.call(lambda: engine.families["family"].sample(*given, **settings)).result(60)


def idle(engine, seconds=20.0):
    """Whether nothing is decoded any more, in this time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not (engine.running or engine.waiting):
            return True
        time.sleep(0.01)
    return False


def test_the_official_client(running):
    """Whole and streamed answers, models, choices, log-probabilities and errors, as the `openai` package reads them."""
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    asked = {"model": "family", "messages": SAID, "seed": 3, "max_tokens": 12, "extra_body": {"preference": PREFERENCE}}
    want = offline(running, [SAID], PREFERENCE, n=2, seed=3, max_new_tokens=12)[0]
    made = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in made.choices] == want
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    assert len(made.choices[0].logprobs.content[0].top_logprobs) == 2
    assert made.paretune["preference"] == PREFERENCE
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == want[0]
    assert pieces[-1].usage.completion_tokens == 12
    named = {**asked, "model": "family@polite=.7,brief=.3", "extra_body": {}}
    assert client.chat.completions.create(**named).choices[0].message.content == want[0]
    plain = client.completions.create(model="family", prompt="Customer: hello", seed=3, max_tokens=9, logprobs=1, stop=["zz"])
    assert plain.choices[0].text == offline(running, ["Customer: hello"], [0.5, 0.5], seed=3, max_new_tokens=9, raw=True, stop=["zz"])[0][0]
    assert len(plain.choices[0].logprobs.token_logprobs) == 9
    assert [model.id for model in client.models.list()] == ["family"]
    assert client.models.retrieve("family").paretune["default_preference"] == {"polite": 0.5, "brief": 0.5}
    with pytest.raises(openai.BadRequestError, match="sum to 1") as refused:
        client.chat.completions.create(**{**asked, "extra_body": {"preference": {"polite": 2}}})
    assert refused.value.param == "preference"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**asked, "model": "no"})
    assert missing.value.code == "model_not_found"


def request(engine, body):
    """A socket on which a request was sent, raw."""
    data = json.dumps(body).encode()
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else megabytes of an answer wait here for a reader that does not read
    made.connect(("127.0.0.1", int(engine.url.rpartition(":")[2])))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    made.sendall(head.encode() + data)
    return made


LONG = {"model": "family", "messages": SAID, "n": 16, "max_tokens": 200, "seed": 1}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_places(running, stream):
    drawn = running.drawn
    gone = request(running, {**LONG, "stream": stream})
    while running.running < 16:
        time.sleep(0.005)
    if stream:
        assert gone.recv(100).startswith(b"HTTP/1.1 200")
    gone.close()
    assert idle(running)
    assert running.drawn - drawn < 16 * 190, "they were not decoded to their ends"


def test_a_reader_that_does_not_read_holds_nobody_up(running):
    """Its connection is closed when it has not taken a piece for `Limits.send` seconds; others are answered meanwhile."""
    stuck = request(running, {**LONG, "stream": True, "logprobs": True, "top_logprobs": 20})
    other = httpx.post(f"{running.url}/v1/chat/completions", json={**LONG, "n": 1, "max_tokens": 5}, timeout=60)
    assert other.status_code == 200
    assert idle(running, 60)
    time.sleep(1.5)  # it has half a second for each piece
    stuck.settimeout(10)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := stuck.recv(2**16):
            received += part
    assert received.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in received, len(received)
    stuck.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "family"
    spoken_family().save(folder)
    return folder


def test_families_of_one_base_share_its_weights(saved, tmp_path):
    spoken_family().save(tmp_path / "second")
    models = load_families([saved, tmp_path / "second"], default="polite=1")
    one, two = (models[name].family.policy for name in ("family", "second"))
    shared = [layer.base.weight.data_ptr() for layer in one.bank.layers] == [layer.base.weight.data_ptr() for layer in two.bank.layers]
    assert shared
    assert one.model is not two.model
    assert models["second"].default.weights == (1.0, 0.0)
    with torch_no_grad():
        two.bank.parameters_of(0)[1].zero_()
    kept = Family.load(saved)
    said = [family.sample(["hello"], {"polite": 1}, max_new_tokens=8)[0][0] for family in (models["family"].family, kept)]
    assert said[0] == said[1] != models["second"].family.sample(["hello"], {"polite": 1}, max_new_tokens=8)[0][0]


def torch_no_grad():
    import torch

    return torch.no_grad()


def test_the_command_from_start_to_drain(saved):
    """SIGTERM: new clients are refused, a stream that was begun goes to its end, and the command ends with 0."""
    env = {**os.environ, "PARETUNE_KEY": "a key of the test"}
    command = [sys.executable, "-m", "paretune", "serve", str(saved), "--port", "0", "--api-key", "PARETUNE_KEY"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            said = next(line for line in process.stderr if line.startswith("serving"))
            url = said.split()[-1]
            key = {"authorization": "Bearer a key of the test"}
            assert httpx.get(f"{url}/models").status_code == 401
            assert httpx.get(f"{url}/models", headers=key).json()["data"][0]["id"] == "family"
            with httpx.stream("POST", f"{url}/chat/completions", json={**LONG, "stream": True}, headers=key, timeout=60) as response:
                lines = response.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                late = time.monotonic() + 10
                while time.monotonic() < late:
                    try:
                        httpx.get(f"{url}/models", headers=key)
                    except httpx.TransportError:
                        break
                    time.sleep(0.02)
                else:
                    pytest.fail("a server that drains takes no new clients")
                rest = [first, *lines]
            assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest[-3:]
            assert sum('"finish_reason":"' in line for line in rest) == 16
            assert process.wait(30) == 0
            assert "stopped" in process.stderr.read()
        finally:
            process.kill()


PAGE = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run(running, capsys):
    """The page's curl command in a shell and its Python in this process, at this server."""
    here = PAGE.replace("http://127.0.0.1:8000", running.url)
    asked = [{"role": "user", "content": "Where is my parcel?"}]
    want = offline(running, [asked], PREFERENCE, seed=1)[0][0]
    command = next(block for block in re.findall(r"```bash\n(.*?)```", here, re.DOTALL) if block.startswith("curl"))
    made = subprocess.run(["bash", "-c", command.replace("curl ", "curl -s ")], capture_output=True, text=True, check=True).stdout
    assert json.loads(made)["choices"][0]["message"]["content"] == want
    exec(re.search(r"```python\n(.*?)```", here, re.DOTALL)[1], {})
    printed = capsys.readouterr().out
    assert printed.startswith(want)
    assert printed.endswith(want)
    assert '"polite": 0.7' in printed.replace("'", '"')


def test_the_questions_of_the_page_run(running):
    """The page's curl commands in a shell: begin, answer, look, forget."""
    here = PAGE.replace("http://127.0.0.1:8000", running.url)
    begin, *rest = (block for block in re.findall(r"```bash\n(.*?)```", here, re.DOTALL) if "/v1/preferences" in block)

    def run(block, **env):
        command = block.replace("curl ", "curl -sS ")
        made = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, check=True, env={**os.environ, **env}).stdout
        return [json.loads(line) for line in made.replace("}{", "}\n{").splitlines()]

    (state,) = run(begin)
    assert state["question"]["number"] == 1
    assert len(state["question"]["options"]) == 2
    answered, looked, gone = run("".join(rest), ID=state["id"])
    assert answered == looked
    assert answered["answers"] == ["1"]
    assert answered["question"]["number"] == 2
    assert gone == {"id": state["id"], "object": "preference.deleted", "deleted": True}
    assert sum(answered["preference"].values()) == pytest.approx(1)


def test_langchain_talks_to_a_family(running, capsys):
    """The page's example, and its stream."""
    pytest.importorskip("langchain_openai")
    here = PAGE.replace("http://127.0.0.1:8000", running.url)
    want = offline(running, [[{"role": "user", "content": "Where is my parcel?"}]], PREFERENCE, seed=1)[0][0]
    block = next(block for block in re.findall(r"```python\n(.*?)```", here, re.DOTALL) if "langchain" in block)
    made = {}
    exec(block, made)
    assert capsys.readouterr().out == want + "\n"
    assert "".join(piece.content for piece in made["chat"].stream("Where is my parcel?")) == want


def test_what_the_command_refuses(saved, tmp_path, monkeypatch):
    """Before a model is loaded where it can be; each with exit code 2, the rule and the remedy, and never the key."""
    monkeypatch.setenv("EMPTY", " ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = [
            (["--api-key", "sk-typed-here-1234567890abcdef"], "names an environment variable"),
            (["--api-key", "EMPTY"], "names an environment variable"),
            (["--default", "polite=2"], "sum to 1"),
            (["--device", "gpu"], "--device is as declared"),
            (["--device", "cuda:77"], "a device that is here"),
            (["--recipe", str(tmp_path / "no.yaml")], ""),
            (["--port", str(taken.getsockname()[1])], "an address that is free"),
            ([str(saved)], "names of their own"),
            ([str(tmp_path)], "a family is a directory"),
        ]
        cases += [] if find_spec("gradio") else [(["--playground"], "the extra `playground`")]
        for more, rule in cases:
            made = CliRunner().invoke(app, ["serve", str(saved), *more])
            assert made.exit_code == 2, (more, made.output, made.exception)
            assert rule in made.stderr, more
            assert "sk-typed" not in made.stderr

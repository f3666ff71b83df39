"""`paretune serve --engine vllm` from end to end: two families of one base, OpenAI requests with a preference each, over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

import httpx2

from paretune.policy.rules import BridgeRule
from tiny_models import dense_soup
from tiny_rewards import gpt_tokenizer
from vllm_families import CHAT, SETTINGS, fresh, greedy, saved

PROMPT = "Customer: where is my parcel?"
LENGTH = 8
OPTIONS = "--enforce-eager --max-model-len 128 --block-size 32 --dtype float32"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    one, two = saved(folder), saved(folder, settings=SETTINGS[:1] * 3, name="other")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "KEY": "secret"}
    asked = ["serve", str(one[0]), str(two[0]), "--engine", "vllm", "--port", str(port), "--api-key", "KEY", "--vllm-args", OPTIONS]
    command = [sys.executable, "-c", "from paretune.cli import main; main()", *asked]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **more}, stdout=log, stderr=log, start_new_session=True)
    client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, headers={"Authorization": "Bearer secret"}, trust_env=False)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(1)
        yield client, {"family": one[1], "other": two[1]}
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def said(client, **body):
    settings = {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = client.post("/v1/completions", json={**settings, **body})
    return answer.status_code, answer.json()


def test_each_request_has_its_preference_whatever_its_family_and_its_spelling(served):
    client, paths = served
    ids = gpt_tokenizer(CHAT)(PROMPT)["input_ids"]
    asked = []
    for name in paths:
        for i in range(4):
            w = [i / 4, 1 - i / 4]
            text = f"polite={w[0]},brief={w[1]}"
            given = {"model": f"{name}@{text}"} if i % 2 else {"model": name, "vllm_xargs": {"preference": text if i else w}}
            asked.append((name, w, given))
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: said(client, **one[2]), asked))
    different = set()
    for (name, w, _), (status, told) in zip(asked, answers, strict=True):
        assert status == 200, told
        gates = torch.tensor(BridgeRule().gates(np.array([w]))[0])
        tokens = told["choices"][0]["token_ids"]
        assert tokens == greedy(dense_soup(fresh, paths[name], gates), ids, LENGTH)
        different.add(tuple(tokens))
    assert len(different) >= 6  # else a server that mixes them up would pass


def test_what_is_wrong_is_refused_and_the_server_goes_on(served):
    client, _ = served
    for given, part in (
        ({"model": "family", "vllm_xargs": {"preference": [0.7, 0.7]}}, "sum to 1"),
        ({"model": "family@rude=1"}, "rude"),
        ({"model": "family@polite=1", "vllm_xargs": {"preference": "brief=1"}}, "once"),
    ):
        status, told = said(client, **given)
        assert status == 400, told
        assert part in told["error"]["message"]
    assert said(client, model="nobody")[0] == 404
    assert client.post("/v1/completions", json={}, headers={"Authorization": "Bearer other"}).status_code == 401
    assert said(client, model="family")[0] == 200

"""A server under clients that behave badly, for minutes: what leaks, and whether every kept request is answered.

    python benchmarks/soak.py [--out FILE] [--minutes 30] [--clients 32] [--threads 2]

The model of `serving.py` behind HTTP on a loopback port. The clients are a process of their own, so that memory and files are
the server's. A third of the requests leave in the middle, and one in ten has a malformed body. The others read to their end, half of
them as streams.

    soak_lost     requests that were kept and got no whole answer
    soak_slots    responses that still have a place, or wait, when all clients have gone
    soak_files    open files at the end, less those before the first client
    soak_memory   resident memory at the end, against that after the first tenth
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import torch
import uvicorn

from common import emit
from decode import SHAPE
from paretune.seeds import generator
from paretune.serve.app import default_preference, make_app
from paretune.serve.engine import Engine
from paretune.serve.protocol import Served
from serving import NAMES, gated

BROKEN = [b"{", b"\xff", b'{"model": "family"}', b'{"model": "family", "prompt": "w1", "n": 10000}', b"[" * 10_000]


def resident(process: int) -> float:
    """Bytes of a process in memory."""
    return float(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


async def client(number: int, url: str, end: float, counts: Counter[str], lost: list[str]) -> None:
    rng = generator(0, "soak", number)
    async with httpx.AsyncClient(timeout=600) as http:
        while time.monotonic() < end:
            words = rng.integers(1, SHAPE["vocab_size"], int(rng.integers(4, 200)))
            weights = dict(zip(NAMES, rng.dirichlet(np.ones(len(NAMES))).tolist(), strict=True))
            body: dict[str, Any] = {"model": "family", "prompt": " ".join(f"w{word}" for word in words), "preference": weights}
            body |= {"max_tokens": int(rng.integers(4, 97)), "stream": bool(rng.random() < 0.5)}
            kind = rng.random()
            if kind < 0.1:
                data, headers = BROKEN[int(rng.integers(len(BROKEN)))], {"content-type": "application/json"}
                counts["refused"] += (await http.post(url, content=data, headers=headers)).status_code == 400
            elif kind < 0.43:
                try:
                    await asyncio.wait_for(http.post(url, json=body), float(rng.random()))
                except TimeoutError:
                    counts["left"] += 1
            else:
                answer = await http.post(url, json=body)
                if body["stream"]:
                    whole = answer.text.endswith("data: [DONE]\n\n")
                else:
                    whole = answer.status_code == 200 and bool(answer.json()["choices"][0]["finish_reason"])
                counts["kept" if whole else "lost"] += 1
                if not whole:
                    lost.append(f"{answer.status_code}: ...{answer.text[-200:]}")


async def soak(url: str, server: int, clients: int, seconds: float) -> dict[str, Any]:
    """What the clients counted, the server's files more than before, and its memory against that after the first tenth."""
    counts, lost = Counter[str](), list[str]()
    before, end = open_files(server), time.monotonic() + seconds
    running = [asyncio.create_task(client(number, url, end, counts, lost)) for number in range(clients)]
    await asyncio.sleep(seconds / 10)
    early = resident(server)
    await asyncio.gather(*running)
    await asyncio.sleep(1)
    return {"counts": counts, "lost": lost, "files": open_files(server) - before, "memory": resident(server) / early}


def clients(*asked: Any) -> dict[str, Any]:
    return asyncio.run(soak(*asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    family = gated()
    engine = Engine({"family": family}, prefix_bytes=2**24)  # full at once: what fills later would look like a leak
    app = make_app({"family": Served("family", family, default_preference(family, None))}, engine)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.05)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as others:
        found = others.submit(clients, url, os.getpid(), options.clients, 60 * options.minutes).result()
    slots = engine.running + engine.waiting
    server.should_exit = True
    thread.join()
    counts = found["counts"]
    figures = {"soak_lost": counts["lost"], "soak_slots": slots, "soak_files": found["files"], "soak_memory": found["memory"]}
    emit(figures, options.out, requests=dict(counts), lost=found["lost"], minutes=options.minutes, clients=options.clients)


if __name__ == "__main__":
    main()

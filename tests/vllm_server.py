"""A stand-in for a vLLM server with Paretune's plugin: the endpoints that rollouts ask, around a model in this process.

It draws by `policy.rollout.decode`, a row at a time, from the seed of the request: what it says depends on nothing else. A test can make
it drop connections, forget its policies as a new process would, or answer nonsense.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

import torch

from local_server import LocalServer
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.rollout import decode
from paretune.seeds import uniforms
from paretune.serve.vllm.families import GatedFamily
from paretune.training.rollouts import PUSHED, unpack


class VllmServer(LocalServer):
    """`load()` gives a fresh model and its tokenizer. `trouble(path, body, count)` runs before each answer; what it returns, or raises,
    is in its place: (status, JSON), or a ConnectionError for a connection that breaks off."""

    def __init__(self, load, *, version="0.32.0+cpu", max_rank=16, max_model_len=64, trouble=None, port=0):
        self.load, self.version, self.max_rank, self.longest = load, version, max_rank, max_model_len
        self.trouble = trouble or (lambda *_: None)
        self.lock, self.asked, self.policies = threading.Lock(), [], {}
        model, tokenizer = load()
        self.base = ParameterMix(LoraBank.load(model, {}), tokenizer)
        super().__init__(port)

    def bodies(self, path="/v1/completions"):
        return [body for place, body in self.asked if place == path]

    def rows(self):
        """The requests for responses, without those that look at the base."""
        return [body for body in self.bodies() if "prompt_logprobs" not in body]

    def handle(self, request, body):
        with self.lock:
            self.asked.append((request.path, body))
            count = sum(place == request.path for place, _ in self.asked)
            try:
                status, told = self.trouble(request.path, body, count) or self.answer(request.path, body)
            except ConnectionError:
                request.close_connection = True
                return request.connection.close()
        data = told.encode() if isinstance(told, str) else json.dumps(told).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def answer(self, path, body):
        if path == "/version":
            return 200, {"version": self.version}
        if path == "/health":
            return 200, ""
        if path == "/v1/models":
            cards = [{"id": "base", "parent": None, "max_model_len": self.longest}, *({"id": n, "parent": "base"} for n in self.policies)]
            return 200, {"data": cards}
        if path == "/v1/load_lora_adapter":
            return self.take(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter":
            return (200, "ok") if self.policies.pop(body["lora_name"], None) else (404, "unknown")
        assert path == "/v1/completions", path
        return self.score(body) if "prompt_logprobs" in body else self.draw(body)

    def take(self, name, given):
        if name in self.policies:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        assert given.startswith(PUSHED)
        with tempfile.TemporaryDirectory() as folder:
            unpack(given.removeprefix(PUSHED), Path(folder))
            family = GatedFamily.read(folder)
            if family.rank > self.max_rank:
                return 500, {"error": {"message": f"LoRA rank {family.rank} is greater than max_lora_rank {self.max_rank}"}}
            model, tokenizer = self.load()
            self.policies[name] = ParameterMix(LoraBank.load(model, family.adapters, trainable=list(family.adapters)), tokenizer)
        return 200, "Success"

    def score(self, body):
        ids_1T = torch.tensor([body["prompt"]])
        with torch.no_grad():
            logp_TV = self.base.forward(ids_1T, gates_NK=None, attention_mask=None)[0].log_softmax(-1)
        told = [{str(token): {"logprob": float(logp_TV[at, token])}} for at, token in enumerate(body["prompt"][1:])]
        return 200, {"model": "base", "choices": [{"prompt_logprobs": [None, *told]}]}

    def draw(self, body):
        policy = self.policies.get(body["model"])
        if policy is None:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        ids_1T = torch.tensor([body["prompt"]])
        noise_1T = uniforms(body["max_tokens"], body["seed"])[None]
        made = decode(
            policy,
            ids_1T,
            torch.ones_like(ids_1T),
            gates_NK=torch.tensor([body["vllm_xargs"]["gates"]]),
            max_new_tokens=body["max_tokens"],
            uniforms_NT=noise_1T,
            temperature=body["temperature"],
        )
        logprobs = {"token_logprobs": made.logp_NT[0].tolist()}
        reason = "stop" if bool(made.stopped_N[0]) else "length"
        choice = {"token_ids": made.tokens_NT[0].tolist(), "logprobs": logprobs, "finish_reason": reason}
        return 200, {"model": body["model"], "choices": [choice]}


def main(arguments):
    """A process of its own, as `python -m paretune.serve.vllm.launch` is asked for one; it tells how often it was started."""
    from learner_cases import TASK

    with Path(arguments[arguments.index("--count-in") + 1]).open("a") as file:
        file.write("started\n")
    with VllmServer(TASK.load, port=int(arguments[arguments.index("--port") + 1])):
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv)

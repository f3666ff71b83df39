"""A reference model of one's own: found, checked before it is loaded, loaded from safetensors, and known by its content.

`load_pretrained` makes every model look alike to the rest of the project: evaluation mode, left padding, a padding token (EOS
where the tokenizer has none), and all its EOS ids in `model.generation_config.eos_token_id`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paretune.errors import ConfigError
from paretune.hub import check_pretrained, content_of, is_local, local_or_hub, refuse_kernels, unloadable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_config", "check_pretrained", "content_of", "context_length", "is_local", "load_pretrained", "load_tokenizer"]

REFERENCE = "the reference model"
KINDS = (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes for"), ("unexpected_keys", "has, without a place,"))


def context_length(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """How many tokens a prompt and its answer may have together; None where the configuration does not say."""
    config = _config(model, revision=revision, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _config(model: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(local_or_hub(model), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise unloadable(REFERENCE, model, revision, error) from error


def check_config(model: str, config: Any) -> None:
    """ConfigError, before weights are read, for models that are no causal LM of one stack."""
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            "the reference model is a decoder: a causal LM of one stack",
            found=f"{model}: {config.model_type}, an encoder with a decoder",
            remedy="choose a decoder-only model (Llama, Qwen, Gemma, Mistral, Phi, GPT-2 and others of their form)",
        )


def load_tokenizer(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left; `load_pretrained` gives it a padding token."""
    from transformers import AutoTokenizer

    check_pretrained(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(local_or_hub(model), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise unloadable(REFERENCE, model, revision, error) from error
    tokenizer.padding_side = "left"
    return tokenizer


def load_pretrained(
    model: str, *, revision: str | None = None, dtype: str = "float32", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh copy of a causal LM in evaluation mode, and its tokenizer. Safetensors only; no code from the model unless trusted."""
    from transformers import AutoModelForCausalLM

    config = _config(model, revision=revision, trust_remote_code=trust_remote_code)
    check_config(model, config)
    if not trust_remote_code:
        refuse_kernels(REFERENCE, model, config)
    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            local_or_hub(model),
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    except Exception as error:
        raise unloadable(REFERENCE, model, revision, error) from error
    loaded, info = found
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


def _check_weights(model: str, loaded: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Every weight comes from the checkpoint, every tensor of it is used, and all numbers are finite."""
    for kind, what in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has other shapes for"),
        ("unexpected_keys", "has, without a place,"),
    ):
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ConfigError(
                "a checkpoint holds the weights of its model, all of them and no others",
                found=f"{model} {what} {shown} for {type(loaded).__name__}",
                remedy="check config.json (num_hidden_layers, architectures, tie_word_embeddings), or save the whole causal LM again: "
                "what is missing would be drawn at random",
            )
    for name, weight in loaded.named_parameters():
        if not bool(weight.isfinite().all()):
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

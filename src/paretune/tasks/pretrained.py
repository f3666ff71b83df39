"""A reference model of one's own: found, checked before it is loaded, loaded from safetensors, and known by its content.

`load_pretrained` makes every model look alike to the rest of the project: evaluation mode, left padding, a padding token (EOS
where the tokenizer has none), and all its EOS ids in `model.generation_config.eos_token_id`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paretune.errors import ConfigError
from paretune.hub import check_pretrained, content_of, is_local, local_or_hub, unloadable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_pretrained", "content_of", "context_length", "is_local", "load_pretrained", "load_tokenizer"]

REFERENCE = "the reference model"


def context_length(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """How many tokens a prompt and its answer may have together; None where the configuration does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(local_or_hub(model), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise unloadable(REFERENCE, model, revision, error) from error
    return getattr(config, "max_position_embeddings", None)


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

    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            local_or_hub(model), revision=revision, trust_remote_code=trust_remote_code, use_safetensors=True, dtype=dtype
        )
    except Exception as error:
        raise unloadable(REFERENCE, model, revision, error) from error
    rows = int(loaded.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise ConfigError(
            "a model and its tokenizer belong together",
            found=f"token ids up to {max(tokenizer.get_vocab().values())} for {rows} embeddings",
            remedy="save the tokenizer that the model was trained with beside it",
        )
    _set_special_tokens(model, loaded, tokenizer)
    return loaded.eval(), tokenizer


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
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    loaded.generation_config.eos_token_id = ends
    loaded.generation_config.pad_token_id = tokenizer.pad_token_id

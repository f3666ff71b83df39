"""Architectures: the self-test passes what is right, refuses what is wrong, and checkpoints hold the weights of their model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from paretune.errors import ConfigError
from paretune.policy import scoring, self_test
from paretune.policy.base import build_mixing
from paretune.policy.lora.bank import LoraBank
from paretune.policy.self_test import check_model, paths
from paretune.seeds import forked_torch
from paretune.tasks.pretrained import check_config, load_pretrained
from tiny_models import TOKENIZER, gemma2, gpt2, llama

ENDS = {"bos_token_id": None, "eos_token_id": 16, "pad_token_id": 16}
SMALL = {"vocab_size": 17, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **ENDS}


def made(kind: str, **settings):
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **settings})
    with forked_torch(0):
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def opt():
    return made("opt", vocab_size=4000, word_embed_proj_dim=32, ffn_dim=48)


def mixtral():
    return made("mixtral", intermediate_size=48, num_key_value_heads=2, num_local_experts=4)


def policy_of(model, targets="all-linear"):
    bank = LoraBank(model)
    for k in range(2):
        bank.add(f"a{k}", seed=k, rank=2, alpha=4, targets=targets)
    return build_mixing("parameter", bank, TOKENIZER)


@pytest.mark.parametrize("make", [llama, gpt2, lambda: gemma2(None), opt, mixtral], ids=["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_what_is_right_passes(make):
    policy = policy_of(make())
    check_model(policy)
    found = dict(paths(policy))
    assert len(found) >= 5
    assert max(found.values()) < 1e-5  # the bound of float32 is 50 times this


def test_opt_scores_the_same_with_its_head_in_pieces(monkeypatch):
    """OPT calls `model.decoder`, not `model`: a head that ran the decoder a second time gave a KL of 19 nats to an untrained policy."""
    policy = policy_of(opt(), targets=["q_proj", "v_proj"])
    ids_PT, tokens_NT = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8], [9, 10]])
    whole = scoring.token_logp(policy, ids_PT, torch.ones_like(ids_PT), tokens_NT, gates_NK=None)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 1)
    torch.testing.assert_close(scoring.token_logp(policy, ids_PT, torch.ones_like(ids_PT), tokens_NT, gates_NK=None), whole)


def test_experts_get_no_adapters_by_default():
    """An expert sees some tokens, in an order of its own: gates per row would reach the wrong ones."""
    names = {layer.name.rpartition(".")[2] for layer in policy_of(mixtral()).bank.layers}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_models_that_look_ahead_or_read_padding_are_refused():
    for model, why in (
        (made("bert", intermediate_size=48), "less text behind a token"),
        (made("rwkv", attention_hidden_size=32), "nats per token"),
    ):
        for parameter in model.parameters():  # tiny random weights hardly differ; trained ones do
            parameter.data.mul_(4.0)
        with pytest.raises(ConfigError) as caught:
            check_model(policy_of(model))
        assert why in str(caught.value)
        assert type(model).__name__ in caught.value.found
        assert "docs/models.md" in caught.value.remedy


def test_a_path_that_is_wrong_is_named(monkeypatch):
    """Every path is looked at: one that is off, or that stops, is refused by its name."""
    policy = policy_of(llama(rope_theta=9.0))
    original = scoring.read
    monkeypatch.setattr(scoring, "read", lambda *given: (original(*given)[0] + torch.arange(17.0), *original(*given)[1:]))
    with pytest.raises(ConfigError, match="with a prompt read once"):
        check_model(policy)
    monkeypatch.setattr(self_test, "_plain", lambda *_: 1 / 0)
    with pytest.raises(ConfigError, match="stops: ZeroDivisionError"):
        check_model(policy)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("checkpoint")
    llama(tie_word_embeddings=False).save_pretrained(folder)
    words = {chr(97 + n): n for n in range(16)} | {"</s>": 16}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")), eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder


def changed(checkpoint, folder, *, config=None, generation=None, weights=None):
    shutil.copytree(checkpoint, folder)
    for name, change in (("config.json", config), ("generation_config.json", generation)):
        if change is not None:
            path = folder / name
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if weights is not None:
        tensors = load_file(folder / "model.safetensors")
        weights(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_whole_checkpoint_loads(checkpoint):
    model, _ = load_pretrained(str(checkpoint))
    torch.testing.assert_close(model.lm_head.weight, llama(tie_word_embeddings=False).lm_head.weight)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"weights": lambda t: t.pop("lm_head.weight")}, "lacks lm_head.weight"),
        ({"weights": lambda t: t.pop("model.layers.1.mlp.up_proj.weight")}, "lacks model.layers.1.mlp.up_proj.weight"),
        ({"config": {"num_hidden_layers": 3}}, "and 6 more for LlamaForCausalLM"),
        ({"config": {"num_hidden_layers": 1}}, "has, without a place, model.layers.1"),
        ({"weights": lambda t: t["model.norm.weight"].fill_(float("nan"))}, "NaN or infinity in model.norm.weight"),
        ({"config": {"eos_token_id": 99}, "generation": {"eos_token_id": 99}}, "EOS ids [16, 99] for 17 embeddings"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(checkpoint, tmp_path, change, found):
    """Each of these loaded before, with weights drawn at random, other ones in each process."""
    with pytest.raises(ConfigError) as caught:
        load_pretrained(changed(checkpoint, tmp_path / "changed", **change))
    assert found in caught.value.found


def test_an_encoder_with_a_decoder_is_refused_before_its_weights_are_read():
    with pytest.raises(ConfigError, match="a causal LM of one stack"):
        check_config("t5", transformers.T5Config())

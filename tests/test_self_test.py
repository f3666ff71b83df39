"""Architectures: the self-test passes what is right, refuses what is wrong, and checkpoints hold the weights of their model."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from paretune.errors import ConfigError
from paretune.hub import positions_of
from paretune.policy import rollout, scoring, self_test
from paretune.policy.base import build_mixing
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.rules import Identity
from paretune.policy.self_test import check_model, paths
from paretune.seeds import forked_torch
from paretune.tasks.pretrained import check_config, context_length, load_pretrained
from paretune.types import Objectives
from tiny_models import TOKENIZER, gemma2, gpt2, llama

ENDS = {"bos_token_id": None, "eos_token_id": 16, "pad_token_id": 16}
SMALL = {"vocab_size": 17, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **ENDS}


def made(kind: str, **settings):
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **settings})
    with forked_torch(0):
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def opt():
    return made("opt", vocab_size=4000, word_embed_proj_dim=32, ffn_dim=48)


def mixtral(**settings):
    return made("mixtral", intermediate_size=48, num_key_value_heads=2, num_local_experts=4, **settings)


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


TOOL = runpy.run_path(str(Path(__file__).parent.parent / "tools" / "models.py"))
# A model type of each kind; docs/models.md has all of them.
RIGHT = (
    *("phi3", "phimoe", "jetmoe", "llama4_text", "deepseek_v3", "granitemoe", "gpt_oss"),  # rows flattened, latent keys, experts
    *("gemma3", "gemma4", "gemma4_text", "modernbert-decoder"),  # composite configurations; a head that is called decoder
    *("jamba", "zamba2", "granitemoehybrid", "qwen3_5_text", "qwen3_next"),  # recurrent layers whose cache takes no second prompt
)
REFUSED = {
    "bert": "less text behind a token", "roberta": "less text behind a token", "xlm-roberta-xl": "less text behind a token",
    "recurrent_gemma": "padded on the left", "rwkv": "padded on the left", "xlnet": "less text behind a token",
    "cpmant": "less text behind a token", "nemotron_h": "Mamba-based", "mamba": "Mamba-based", "t5": "an encoder with a decoder",
    "openai-gpt": "stops: RuntimeError",
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_dozen_architectures_are_right(name):
    assert TOOL["line_of"](name)[0] == "right"


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name):
    """With weights as they are drawn, too: an effect is compared with how much the model says at all."""
    kind, why = TOOL["line_of"](name)
    assert kind == "refused"
    assert REFUSED[name] in why


@pytest.mark.parametrize("name", ["jamba", "qwen3_5_text"])
def test_several_responses_to_a_prompt_have_the_gradient_of_each_alone(name):
    """Their caches take one token at a time: a prompt read once was .7 nats off, or stopped in the backward."""
    policy = policy_of(TOOL["tiny"](name), targets=["q_proj", "v_proj"])
    ids_PT, tokens_NT = torch.tensor([[1, 2, 3]]), torch.tensor([[7, 8, 3], [9, 10, 2], [4, 4, 4]])
    gates_NK = torch.tensor([[0.3, 0.7]]).expand(3, 2)
    for parameter in policy.bank.parameters():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))

    def gradient(ids, tokens, gates, group):
        policy.model.zero_grad()
        scoring.token_logp(policy, ids, torch.ones_like(ids), tokens, gates_NK=gates, group=group).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.bank.parameters()])

    grouped = gradient(ids_PT, tokens_NT, gates_NK, 3)
    alone = sum(gradient(ids_PT, tokens_NT[n : n + 1], gates_NK[:1], 1) for n in range(3))
    assert float(alone.abs().max()) > 1e-3
    torch.testing.assert_close(grouped, alone, rtol=1e-4, atol=1e-6)


def test_heads_that_read_more_than_the_states_are_right_in_pieces():
    """Logits of routers (asked for by the configuration), and keys and values that layers share."""
    config = TOOL["shrunk"](transformers.AutoConfig.for_model("gemma4_text"))
    sizes = {key: value for key, value in config.to_dict().items() if key in TOOL["SIZES"]} | {"num_hidden_layers": 4}
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = type(config)(**sizes, layer_types=kinds, per_layer_config={}, num_kv_shared_layers=2)
    with forked_torch(0):
        model = transformers.AutoModelForCausalLM.from_config(shared).eval()
    for each in (model, mixtral(output_router_logits=True)):
        found = dict(paths(policy_of(each)))
        assert found["with its head in pieces"] < 1e-5
        assert max(found.values()) < 1e-5


def test_a_composite_configuration_says_where_text_ends():
    model = TOOL["tiny"]("gemma3")
    for where in (model.generation_config, model.config):
        where.eos_token_id = None
    model.config.text_config.eos_token_id, model.config.text_config.max_position_embeddings = [5, 6], 12
    policy = policy_of(model)
    assert policy.eos_ids == (5, 6, TOKENIZER.eos_token_id)
    ids_PT = torch.tensor([[1, 2, 3]])
    with pytest.raises(ConfigError, match="13 tokens for a model of 12"):
        rollout.decode(policy, ids_PT, torch.ones_like(ids_PT), gates_NK=None, max_new_tokens=10, uniforms_NT=np.zeros((1, 10)))


def longrope():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [30.0] * 4}
    sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, "original_max_position_embeddings": 10}
    return made("phi3", rope_parameters=rope, **sizes)


def test_frequencies_that_change_with_the_longest_row_are_refused(tmp_path):
    """Phi-3 beyond its threshold: one long row changed what every other row says, by 37 nats; up to there all is as ever."""
    model = longrope()
    policy = policy_of(model)
    check_model(policy)  # with sequences that stay below
    ids_PT, mask_PT = torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4, dtype=torch.long)
    given = {"gates_NK": None, "uniforms_NT": np.full((1, 7), 0.5)}
    rollout.decode(policy, ids_PT, mask_PT, max_new_tokens=6, gates_NK=None, uniforms_NT=np.full((1, 6), 0.5))
    for beyond in (
        lambda: rollout.decode(policy, ids_PT, mask_PT, max_new_tokens=7, **given),
        lambda: scoring.token_logp(policy, ids_PT, mask_PT, torch.ones(1, 7, dtype=torch.long), gates_NK=None),
    ):
        with pytest.raises(ConfigError) as caught:
            beyond()
        assert "11 tokens for a model of 10 (original_max_position_embeddings, beyond which longrope" in caught.value.found
    model.config.save_pretrained(tmp_path)
    assert context_length(str(tmp_path))[0] == 10, "a recipe is refused before anything runs"
    dynamic = llama(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, max_position_embeddings=10)
    with pytest.raises(ConfigError, match=r"11 tokens for a model of 10 \(max_position_embeddings\)"):
        rollout.decode(policy_of(dynamic), ids_PT, mask_PT, max_new_tokens=7, **given)
    both = llama(max_position_embeddings=32).config
    both.rope_parameters = {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 8}, "sliding_attention": {}}
    assert positions_of(both)[0] == 8


def test_a_family_is_tested_when_it_is_loaded_unless_one_says_so(checkpoint, tmp_path, monkeypatch):
    model, tokenizer = load_pretrained(str(checkpoint))
    policy = build_mixing("logit", LoraBank.attach(model, names=["a", "b"], rank=2, seed=0), tokenizer)
    objectives = Objectives(("x", "y"), (0.0, 0.0), (1.0, 1.0))
    Family(policy, Identity(), objectives, {"model": str(checkpoint)}).save(tmp_path / "family")
    monkeypatch.setattr(self_test, "_passed", set())
    original = scoring.read
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "read", lambda *given: (original(*given)[0] + torch.arange(17.0), *original(*given)[1:]))
        with pytest.raises(ConfigError, match="with a prompt read once") as caught:
            Family.load(tmp_path / "family")
        assert "PARETUNE_SELF_TEST=off" in caught.value.remedy
        Family.load(tmp_path / "family", self_test=False)
        patch.setenv("PARETUNE_SELF_TEST", "off")
        with pytest.warns(UserWarning, match="LlamaForCausalLM was not tested"):
            Family.load(tmp_path / "family")
    Family.load(tmp_path / "family")
    assert len(self_test._passed) == 1


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

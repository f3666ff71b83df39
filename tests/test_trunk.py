"""Shared lower layers: the same numbers as experts run one by one, fewer rows below, and models that are left stacked."""

from __future__ import annotations

import pytest
import torch

from paretune.policy.base import MIXINGS
from paretune.policy.lora.bank import LoraBank, decoder_layers
from paretune.policy.lora.decoder import branch_point
from paretune.policy.mixing.hidden import HiddenMix
from paretune.policy.mixing.predictions import DivergenceMix, LogitMix
from paretune.policy.rollout import decode
from paretune.policy.scoring import token_logp
from paretune.seeds import forked_torch, generator
from tiny_models import TOKENIZER, VOCAB, gap, gpt2, llama, peft_logits, some_gates, some_ids, write_adapters

TOP = {"target_modules": r".*\.[23]\.(self_attn|mlp)\..*(_proj|qkv.*)"}  # two of four layers


def four_layers():
    return llama(num_hidden_layers=4)


def build(name: str, **more):
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCAB, eos_token_id=16, pad_token_id=16, bos_token_id=None, **sizes, **more)
    with forked_torch(0):
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()


FAMILIES = {
    "llama": four_layers,
    "llama-eager": lambda: llama(num_hidden_layers=4, attn_implementation="eager"),
    "mistral, sliding": lambda: build("Mistral", sliding_window=4, head_dim=8),
    "qwen3": lambda: build("Qwen3", head_dim=8),
    "gemma2, sliding": lambda: build("Gemma2", head_dim=8, sliding_window=4),
    "phi3": lambda: build("Phi3"),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_adapters(four_layers, tmp_path_factory.mktemp("top"), [TOP] * 3)


@torch.no_grad()
def run(policy, ids_NT, gates_NK, **more):
    return policy.forward(ids_NT, gates_NK=gates_NK, **more)


def mixture(make, paths, ids_NT, gates_NK):
    logits_KNTV = torch.stack([peft_logits(make, path, ids_NT) for path in paths.values()])
    return torch.einsum("nk,kntv->ntv", gates_NK, logits_KNTV)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_trunk_changes_no_number(family, tmp_path):
    """Whole sequences, then token by token with a cache; longer than the window where there is one."""
    make = FAMILIES[family]
    paths, ids_NT, gates_NK = write_adapters(make, tmp_path, [TOP] * 3), some_ids(3, 9), some_gates(3, 3)
    mixing = LogitMix(LoraBank.load(make(), paths), TOKENIZER)
    assert branch_point(mixing.bank) == 2
    want = mixture(make, paths, ids_NT, gates_NK)
    assert gap(run(mixing, ids_NT, gates_NK), want) < 1e-5
    for rows in (3, 1):
        cache = mixing.new_cache(rows)
        steps = [run(mixing, ids_NT[:rows, a:b], gates_NK[:rows], cache=cache) for a, b in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9))]
        assert gap(torch.cat(steps, 1), want[:rows]) < 1e-5


@pytest.mark.parametrize("level", ["logit", "hidden"])
def test_padding_masks_and_packed_masks(paths, level):
    mixing, ids_NT, gates_NK = MIXINGS[level](LoraBank.load(four_layers(), paths), TOKENIZER), some_ids(4, 6), some_gates(4, 3)
    mask_NT = torch.stack([(torch.arange(6) >= pad).long() for pad in (0, 2, 3, 1)])
    padded = run(mixing, ids_NT, gates_NK, attention_mask=mask_NT)
    for n, pad in enumerate((0, 2, 3, 1)):
        want = mixture(four_layers, paths, ids_NT[n : n + 1, pad:], gates_NK[n : n + 1])
        assert gap(padded[n : n + 1, pad:], want) < 1e-5
    sees = torch.ones(6, 6).tril().bool()
    sees[4:, 2:4] = False
    positions_NT = torch.tensor([[0, 1, 2, 3, 2, 3]])
    want = mixture(four_layers, paths, ids_NT[:, [0, 1, 4, 5]], gates_NK)[:, 2:]
    for mask, positions in ((sees[None, None], positions_NT), (sees.repeat(4, 1, 1, 1), positions_NT.repeat(4, 1))):
        packed = run(mixing, ids_NT, gates_NK, attention_mask=mask, position_ids=positions)
        assert gap(packed[:, 4:], want) < 1e-5


def test_the_trunk_has_the_rows_of_the_batch_and_caches_too(paths):
    bank, ids_NT, rows = LoraBank.load(four_layers(), paths), some_ids(), {}
    mixing = LogitMix(bank, TOKENIZER)
    for at, layer in enumerate(bank.stack):
        layer.mlp.register_forward_hook(lambda m, args, out, at=at: rows.__setitem__(at, len(out)))
    cache = mixing.new_cache(4)
    run(mixing, ids_NT, some_gates(4, 3), cache=cache)
    assert rows == {0: 4, 1: 4, 2: 12, 3: 12}
    assert [len(layer.keys) for layer in cache.layers] == [4, 4, 12, 12]
    run(mixing, ids_NT, None)
    assert rows == dict.fromkeys(range(4), 4)
    per_layer = sum(p.numel() for p in four_layers().model.layers[0].parameters())
    share = (2 * per_layer + 17 * 32) / (4 * per_layer + 17 * 32)
    assert mixing.forwards_per_token == pytest.approx(1 + 2 * share)
    assert not any(layer._forward_pre_hooks for layer in bank.stack), "hooks go with their forward"


@pytest.mark.parametrize("mixing", [LogitMix, HiddenMix])
def test_sampling_in_groups_and_gradients(paths, mixing):
    """Prompts read once, then repeated: the cache's rows below and above the branch; against experts that train alone."""
    policy = mixing(LoraBank.load(four_layers(), paths, trainable=["e1"]), TOKENIZER)
    stacked = mixing(LoraBank.load(four_layers(), paths, trainable=["e1"]), TOKENIZER)
    stacked.bank.stack = ()  # as for a model of unknown form
    assert branch_point(stacked.bank) == 0
    ids_PT, gates_NK = some_ids(2, 4), some_gates(2, 3).repeat_interleave(3, 0)
    found = []
    for one in (policy, stacked):
        made = decode(
            one,
            ids_PT,
            torch.ones_like(ids_PT),
            gates_NK=gates_NK,
            max_new_tokens=6,
            uniforms_NT=generator(0, "trunk").random((6, 6)),
            group=3,
            suppress_eos=True,
        )
        logp_NT = token_logp(one, ids_PT, torch.ones_like(ids_PT), made.tokens_NT, gates_NK=gates_NK, group=3)
        assert torch.allclose(logp_NT.detach().double().exp().log(), logp_NT.detach().double())
        logp_NT.sum().backward()
        found.append((made.tokens_NT, logp_NT.detach(), torch.cat([p.grad.flatten() for p in one.bank.parameters()])))
    assert found[0][0].tolist() == found[1][0].tolist()
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
    assert torch.allclose(found[0][2], found[1][2], atol=1e-4 * float(found[1][2].abs().max()))
    assert float(found[1][2].abs().max()) > 1e-3


def test_the_reference_may_be_one_of_the_blocks(paths):
    mixing, ids_NT = DivergenceMix(LoraBank.load(four_layers(), paths), TOKENIZER, divergence="js"), some_ids()
    with torch.no_grad():
        parts = mixing.parts(ids_NT, gates_NK=some_gates(4, 3))
        assert gap(parts[3], four_layers()(input_ids=ids_NT).logits) < 1e-5
    for k, path in enumerate(paths.values()):
        assert gap(parts[k], peft_logits(four_layers, path, ids_NT)) < 1e-5
    logit = LogitMix(mixing.bank, TOKENIZER).forwards_per_token
    assert mixing.forwards_per_token - 1 == pytest.approx((logit - 1) * 3 / 2)


def test_models_and_adapters_that_are_left_stacked(tmp_path, paths):
    """The first layer has an adapter; unknown arguments of a layer; another attention; adapters outside of the stack."""
    lowest = write_adapters(four_layers, tmp_path / "low", [{"target_modules": ["q_proj"]}, TOP])
    gpt = write_adapters(gpt2, tmp_path / "gpt", [{"target_modules": r".*h\.1\.(attn|mlp)\.c_.*", "fan_in_fan_out": True}] * 2)
    head = write_adapters(four_layers, tmp_path / "head", [{"target_modules": ["lm_head"]}] * 2)
    for make, experts in ((four_layers, lowest), (gpt2, gpt), (four_layers, head)):
        mixing, ids_NT, gates_NK = LogitMix(LoraBank.load(make(), experts), TOKENIZER), some_ids(), some_gates(4, 2)
        assert branch_point(mixing.bank) == 0
        assert mixing.forwards_per_token == 2.0
        assert gap(run(mixing, ids_NT, gates_NK), mixture(make, experts, ids_NT, gates_NK)) < 1e-5
    bank = LoraBank.load(four_layers(), paths)
    bank.base.config._attn_implementation = "flash_attention_2"
    assert branch_point(bank) == 0
    assert branch_point(LoraBank.attach(four_layers(), names=[], seed=0)) == 0


def test_the_decoders_layers_are_found():
    for make, name in ((llama, "model.layers"), (gpt2, "transformer.h")):
        model = make()
        found, layers = decoder_layers(model)
        assert found == name
        assert list(layers) == list(model.get_submodule(name))
    model = llama()
    model.other = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    assert decoder_layers(model) == ("", ())

"""Exports: what plain transformers and PEFT load computes what the family does; what no set of weights computes is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from paretune.cli import app
from paretune.errors import ConfigError, StoreError
from paretune.policy.base import build_mixing
from paretune.policy.contextual import Contextual, Features
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.rollout import token_ids
from paretune.policy.rules import Backbones, Constant, Identity, PromptedRule, Table
from paretune.runs.suite import fit, run_suite
from paretune.serve.export import _Merging, export, single_weights
from paretune.serve.model_card import vllm_rank
from paretune.types import Objectives
from tiny_models import dense_soup, gpt2, llama, write_adapters

TOLERANCE = 1e-4
TEXT = "abcab"
TASK = {"name": "exact-v1", "alphabet": 4, "length": 2, "prompt_count": 2, "width": 32, "layers": 1}
UNEQUAL = [{}, {"r": 3, "lora_alpha": 5}, {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}]
HEAD = [{"target_modules": ["lm_head", "q_proj"]}, {"r": 2, "target_modules": ["lm_head", "down_proj"]}]
MODELS = {
    "llama": (llama, UNEQUAL),
    "gpt2": (gpt2, [{"fan_in_fan_out": True}, {"r": 2, "fan_in_fan_out": True}]),
    "tied": (lambda: llama(tie_word_embeddings=True), [{}, {}]),
    "tied-head": (lambda: llama(tie_word_embeddings=True), HEAD),
}


def save_tokenizer(folder):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*"abcdefghijklmnop", "<eos>"])}, unk_token="<eos>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Base models on disk, each with adapters that PEFT wrote."""
    found = {}
    for name, (make, settings) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        save_tokenizer(folder / "base")
        make().save_pretrained(folder / "base")
        found[name] = SimpleNamespace(folder=folder, base=folder / "base", make=make, adapters=write_adapters(make, folder, settings))
    return found


def family_of(home, level="parameter", rule=None, count=None, dtype=torch.float32) -> Family:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paths = dict(list(home.adapters.items())[:count])
    bank = LoraBank.load(AutoModelForCausalLM.from_pretrained(home.base, dtype=dtype).eval(), paths)
    policy = build_mixing(level, bank, AutoTokenizer.from_pretrained(home.base))
    names = ("kind", "brief", "true")[: policy.K or 2]
    objectives = Objectives(names, (0.0,) * len(names), (1.0,) * len(names))
    meta = {"method": {"name": "experts"}, "seed": 3, "card": {"summary": "a test", "hides": "nothing"}, "trainings": ["abc"]}
    return Family(policy, rule or Identity(), objectives, {"model": str(home.base), "revision": None}, paths, meta)


def prompt_ids(family) -> torch.Tensor:
    return torch.tensor([family.policy.tokenizer(TEXT)["input_ids"]])


def wanted(family, w_M) -> torch.Tensor:
    """(1, T, V) logits of the family at the preference."""
    gates = torch.from_numpy(family.gates(np.array([w_M]))).float()
    with torch.no_grad():
        return family.policy.forward(prompt_ids(family), gates_NK=gates)


def merged_logits(path, ids_NT) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=ids_NT).logits


def adapter_logits(base, path, ids_NT) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(path)).eval()(input_ids=ids_NT).logits


def far(a, b) -> float:
    return float((a - b).abs().max())


def refused(*parts: str):
    return pytest.raises(ConfigError, match=".*".join(f"(?s:.*){re.escape(part)}" for part in parts))


THREE = [(0.5, 0.3, 0.2), (0.0, 0.4, 0.6), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
SETTINGS = [
    ("llama", "parameter", None, None, THREE),
    ("llama", {"name": "hidden-layer", "layer": 0}, None, None, THREE[:1]),
    ("llama", "parameter", Backbones(((0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8)), 0.2), None, THREE[:2]),  # gates below 0
    ("gpt2", "parameter", None, None, [(0.7, 0.3), (0.0, 1.0)]),
    ("tied", "factor", None, None, [(0.7, 0.3), (0.0, 1.0)]),
    ("tied-head", "parameter", None, None, [(0.4, 0.6), (1.0, 0.0)]),
    ("llama", {"name": "prompted", "objectives": 2, "digits": 2}, PromptedRule(2, 2), 1, [(0.3, 0.7), (1.0, 0.0)]),
    ("llama", "parameter", Constant((0.0, 0.0, 0.0)), None, THREE[:1]),  # no adapter at all
]


@pytest.mark.parametrize(("home", "level", "rule", "count", "points"), SETTINGS)
def test_what_is_loaded_computes_what_the_family_does(homes, tmp_path, home, level, rule, count, points):
    home = homes[home]
    family = family_of(home, level, rule, count)
    with torch.no_grad():
        reference = family.policy.forward(prompt_ids(family), gates_NK=None)
    for number, w_M in enumerate(points):
        want = wanted(family, w_M)
        if not isinstance(rule, Constant):
            assert far(want, reference) > 0.05, "a test that the base model would pass"
        made = [export(family, tmp_path / f"{kind}-{number}", w_M, kind=kind) for kind in ("merged", "adapter")]
        ids_NT = torch.cat([torch.tensor([made[0].prefix], dtype=torch.long), prompt_ids(family)], 1)
        skipped = len(made[0].prefix)
        assert skipped == family.policy.extra_positions
        assert far(merged_logits(made[0].path, ids_NT)[:, skipped:], want) < TOLERANCE
        assert far(adapter_logits(home.base, made[1].path, ids_NT)[:, skipped:], want) < TOLERANCE
        assert far(wanted(family, w_M), want) == 0.0  # the family is as it was


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_a_dense_merge_is_exported_as_a_model_only(homes, tmp_path, how):
    family = family_of(homes["llama"], {"name": "merged", "how": how, "density": 0.4})
    for number, w_M in enumerate(THREE[:3]):
        export(family, tmp_path / str(number), w_M)
        assert far(merged_logits(tmp_path / str(number), prompt_ids(family)), wanted(family, w_M)) < TOLERANCE
    with refused("an adapter is a change of low rank", "dense", "export it merged"):
        export(family, tmp_path / "adapter", THREE[0], kind="adapter")


MIXINGS = [
    "logit",
    "hidden",
    {"name": "hidden-layer", "layer": 1},
    {"name": "divergence", "divergence": "js"},
    {"name": "routed", "experts": 2},
    {"name": "robust", "radius": 0.0},
]


@pytest.mark.parametrize("level", MIXINGS, ids=str)
def test_other_levels_are_exported_where_one_expert_is_alone_and_refused_elsewhere(homes, tmp_path, level):
    family = family_of(homes["tied"], level)
    if family.policy.mixing == "routed":
        for _, up in family.policy._layers:
            torch.nn.init.normal_(up.data)  # a router that corrects something, between the vertices
    export(family, tmp_path / "vertex", (0.0, 1.0))
    want = wanted(family, (0.0, 1.0)).log_softmax(-1)
    assert far(merged_logits(tmp_path / "vertex", prompt_ids(family)).log_softmax(-1), want) < TOLERANCE
    name = family.policy.mixing
    with refused("an export is one set of weights", f"mixing '{name}': it", 'method "distilled"', '"bridge"', "paretune sample"):
        export(family, tmp_path / "middle", (0.5, 0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["vertex"]
    with refused("an export is one set of weights"):  # twice the logits of one expert is no expert
        export(family_of(homes["tied"], level, Constant((0.0, 2.0))), tmp_path / "hot", (0.0, 1.0))


def test_a_game_against_the_weights_is_no_set_of_weights_even_at_a_vertex(homes, tmp_path):
    family = family_of(homes["tied"], {"name": "robust", "radius": 0.5})
    with refused("an export is one set of weights", "mixing 'robust'", "anew for every token") as caught:
        export(family, tmp_path / "x", (0.0, 1.0))
    assert "one expert alone" not in str(caught.value)


def test_gates_that_depend_on_the_prompt_are_refused(homes, tmp_path):
    def rule(features):
        basis = np.zeros((features.count + 1, 5, 2)).tolist()
        theta = tuple(tuple(tuple(row) for row in rows) for rows in basis)
        return Contextual(features, (0.0,) * features.count, 2, 4, 0.5, 1.0, theta)

    family = family_of(homes["tied"], rule=rule(Features("words", 3)))
    with refused("an export is one set of weights", "rule 'contextual' sets the gates anew for every prompt", 'method "distilled"'):
        export(family, tmp_path / "x", (0.5, 0.5))
    assert single_weights(family_of(homes["tied"], rule=rule(Features())), np.array([0.5, 0.5])).how == "delta"


def test_the_reference_is_a_model_and_no_adapter(homes, tmp_path):
    family = family_of(homes["tied"], "reference", Constant(()), 0)
    export(family, tmp_path / "x", (0.5, 0.5))
    assert far(merged_logits(tmp_path / "x", prompt_ids(family)), wanted(family, (0.5, 0.5))) < TOLERANCE
    with refused("an adapter is a change of low rank", "the reference alone", "export it merged"):
        export(family, tmp_path / "y", (0.5, 0.5), kind="adapter")


def test_bad_requests(homes, tmp_path):
    family = family_of(homes["tied"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    with refused("an export is written into a new folder", "full exists"):
        export(family, tmp_path / "full", (0.5, 0.5))
    with refused("a kind of export is one of merged, adapter", "'lora'"):
        export(family, tmp_path / "x", (0.5, 0.5), kind="lora")
    with refused("a dtype is one of float32, bfloat16, float16", "'bf16'", "did you mean 'bfloat16'"):
        export(family, tmp_path / "x", (0.5, 0.5), dtype="bf16")
    with refused("a preference names existing objectives", "kin", "did you mean 'kind'"):
        export(family, tmp_path / "x", "kin=1")
    with refused("non-negative and sum to 1", "sum 0.9"):
        export(family, tmp_path / "x", "kind=.5,brief=.4")
    with refused("an export is written where a folder can be made", "Not a directory", "choose another --out"):
        export(family, tmp_path / "full" / "file" / "x", (0.5, 0.5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert export(family, tmp_path / "empty", (0.5, 0.5)).path == tmp_path / "empty"


def test_an_adapter_has_the_ranks_of_what_has_a_gate_and_plain_names(homes, tmp_path):
    family = family_of(homes["llama"])
    for w_M, rank, layers in (((0.5, 0.3, 0.2), 12, 14), ((0.0, 1.0, 0.0), 3, 14), ((0.0, 0.0, 1.0), 5, 4)):
        made = export(family, tmp_path / str(rank), w_M, kind="adapter")
        config = json.loads((made.path / "adapter_config.json").read_text())
        tensors = load_file(made.path / "adapter_model.safetensors")
        assert (made.rank, config["r"], config["lora_alpha"]) == (rank, rank, rank)
        assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {rank}
        assert len(tensors) == 2 * layers  # the third adapter is in four layers only
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert not config["use_rslora"]


def test_a_checkpoint_is_merged_shard_by_shard(homes, tmp_path, monkeypatch):
    family, seen, original = family_of(homes["llama"]), [], _Merging.value

    def watched(self, name, tensor):
        seen.append(len(list(tmp_path.glob(".wip-*/*.safetensors"))))
        return original(self, name, tensor)

    monkeypatch.setattr(_Merging, "value", watched)
    export(family, tmp_path / "x", THREE[0], shard="16KB", dtype="bfloat16")
    files = list((tmp_path / "x").glob("*.safetensors"))
    assert len(files) == max(seen) + 1 > 3  # the last shard is merged when all others are written
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    assert far(merged_logits(tmp_path / "x", prompt_ids(family)).float(), wanted(family, THREE[0])) < 0.2


def test_it_is_merged_in_float32_and_cast_at_the_end(homes, tmp_path):
    family = family_of(homes["llama"], dtype=torch.bfloat16)  # adapters stay in float32
    export(family, tmp_path / "x", THREE[0], dtype="float32")
    export(family, tmp_path / "y", THREE[0])
    want = dense_soup(lambda: llama(torch.bfloat16).float(), homes["llama"].adapters, torch.tensor(THREE[0])).state_dict()
    wide, narrow = load_file(tmp_path / "x" / "model.safetensors"), load_file(tmp_path / "y" / "model.safetensors")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((tmp_path / "y" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in wide.items():
        assert far(tensor, want[name]) < 1e-6
        assert torch.equal(narrow[name], tensor.bfloat16())


def test_names_that_a_checkpoint_has_of_its_own_are_kept(homes, tmp_path, monkeypatch):
    """A model that was loaded under other names than it has: everything is merged before transformers gives the names back."""
    family = family_of(homes["tied"])
    monkeypatch.setattr(family.policy.model, "_weight_conversions", None)
    export(family, tmp_path / "x", (0.6, 0.4))
    assert far(merged_logits(tmp_path / "x", prompt_ids(family)), wanted(family, (0.6, 0.4))) < TOLERANCE


def test_tied_weights_stay_tied_unless_the_head_has_changed(homes, tmp_path):
    for name, tied in (("tied", True), ("tied-head", False)):
        export(family_of(homes[name]), tmp_path / name, (0.5, 0.5))
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in load_file(tmp_path / name / "model.safetensors")) is not tied


def test_what_is_loaded_with_the_weights_comes_along(homes, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    family = family_of(homes["tied"])
    family.policy.eos_ids = (16, 3)
    export(family, tmp_path / "x", (0.5, 0.5))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    assert GenerationConfig.from_pretrained(tmp_path / "x").eos_token_id == [16, 3]
    for file in (tmp_path / "x").iterdir():
        assert str(homes["tied"].folder).encode() not in file.read_bytes(), file  # no path of this machine


def python_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_the_card_says_what_it_is_and_its_commands_work(homes, tmp_path, monkeypatch, capsys, kind):
    family = family_of(homes["llama"], {"name": "prompted", "objectives": 2, "digits": 2}, PromptedRule(2, 2), 1)
    export(family, tmp_path / "my own", "kind=.3,brief=.7", kind=kind)
    card = (tmp_path / "my own" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == ("peft" if kind == "adapter" else "transformers")
    assert "paretune" in front["tags"]
    assert "base_model" not in front  # a folder is nothing on the hub
    facts = json.loads((tmp_path / "my own" / "paretune.json").read_text())
    assert facts["preference"] == {"kind": 0.3, "brief": 0.7}
    assert len(facts["prefix_ids"]) == 4
    for said in ("**kind 0.3, brief 0.7**", str(facts["prefix_ids"]), "`abc`", "`base`", "seed 3", "What the method hides: nothing."):
        assert said in card
    assert ("--max-lora-rank 8 --lora-modules 'my own=./my own'" if kind == "adapter" else "vllm serve './my own'") in card
    (tmp_path / "base").symlink_to(homes["llama"].base)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(python_of(card).replace("your prompt", TEXT), {})
    assert len(capsys.readouterr().out.strip()) > 0


SKEWED = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.5,
    "top_k": 3,
    "repetition_penalty": 1.5,
    "bad_words_ids": [[2]],
    "min_new_tokens": 4,
}


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_the_card_samples_the_policy_itself(homes, tmp_path, monkeypatch, kind, chat):
    """Whatever the base model's generation settings are: they made a total variation of .53 to the policy. Every draw of the card's own
    code is from the family's distribution at what was drawn before."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    base = shutil.copytree(homes["llama"].base, tmp_path / "base")
    GenerationConfig(**SKEWED, eos_token_id=[16, 3], pad_token_id=16).save_pretrained(base)
    home = SimpleNamespace(base=base, adapters=homes["llama"].adapters)
    family = dataclasses.replace(family_of(home), chat=chat, system='b "c"' if chat else None)
    export(family, tmp_path / "mine", THREE[0], kind=kind)
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "--generation-config vllm" in card
    assert ("trained on conversations" in card) is chat
    drawn, draw, found = [], torch.multinomial, {}
    monkeypatch.setattr(torch, "multinomial", lambda p_NV, *args, **kwargs: drawn.append(p_NV) or draw(p_NV, *args, **kwargs))
    exec(python_of(card).replace("your prompt", TEXT), found)
    messages = [{"role": "system", "content": 'b "c"'}, {"role": "user", "content": TEXT}]
    (prompt,) = family.prompts([messages if chat else TEXT])
    assert found["input_ids"][0].tolist() == token_ids(family.policy.tokenizer, prompt)
    assert found["answer"].shape[1] == found["input_ids"].shape[1] + len(drawn)
    with torch.no_grad():
        logits_TV = family.policy.forward(found["answer"], gates_NK=torch.tensor([THREE[0]]))[0, -1 - len(drawn) : -1]
        variation = 0.5 * (torch.cat(drawn) - logits_TV.softmax(-1)).abs().sum(-1)
        assert float(variation.max()) < 1e-4
        skewed = AutoModelForCausalLM.from_pretrained(base)  # the test sees the settings where they act
        drawn.clear()
        skewed.generate(input_ids=found["input_ids"], max_new_tokens=1)
        plain_V = skewed(input_ids=found["input_ids"]).logits[0, -1].softmax(-1)
    assert float(0.5 * (drawn[0][0] - plain_V).abs().sum()) > 0.3


def test_a_merged_export_has_neutral_settings_because_engines_apply_the_file_unasked(homes, tmp_path):
    from transformers import GenerationConfig

    base = shutil.copytree(homes["tied"].base, tmp_path / "base")
    GenerationConfig(**SKEWED, eos_token_id=[16, 3], pad_token_id=16).save_pretrained(base)
    family = family_of(SimpleNamespace(base=base, adapters=homes["tied"].adapters))
    export(family, tmp_path / "x", (0.5, 0.5))
    written = json.loads((tmp_path / "x" / "generation_config.json").read_text())
    del written["transformers_version"]
    neutral = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    assert {key: value for key, value in written.items() if key not in ("_from_model_config", "bos_token_id")} == {
        **neutral,
        "eos_token_id": [16, 3],
        "pad_token_id": 16,
    }
    assert family.policy.model.generation_config.top_p == 0.5, "the family's model stays as it is"
    facts = json.loads((tmp_path / "x" / "paretune.json").read_text())
    assert (facts["sampling"], facts["chat"], facts["system"]) == (neutral, False, None)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_an_export_ends_its_responses_where_the_family_does(homes, tmp_path, monkeypatch, kind):
    """At the tokenizer's EOS (16), too, where the base model's own settings know another one only; and no later."""
    from transformers import GenerationConfig

    base = shutil.copytree(homes["llama"].base, tmp_path / "base")
    GenerationConfig(eos_token_id=3, pad_token_id=16).save_pretrained(base)
    family = family_of(SimpleNamespace(base=base, adapters=homes["llama"].adapters))
    assert family.policy.eos_ids == (3, 16)
    export(family, tmp_path / "mine", THREE[0], kind=kind)
    monkeypatch.chdir(tmp_path)
    card = python_of((tmp_path / "mine" / "README.md").read_text()).replace("your prompt", TEXT)
    for last in family.policy.eos_ids:
        found, drawn = {}, iter([5, 4, last])
        monkeypatch.setattr(torch, "multinomial", lambda *_, drawn=drawn, **__: torch.tensor([[next(drawn)]]))
        exec(card, found)
        assert found["answer"][0, found["input_ids"].shape[1] :].tolist() == [5, 4, last]
    assert json.loads((tmp_path / "mine" / "paretune.json").read_text())["eos_ids"] == [3, 16]


def test_a_base_that_says_no_more_than_it_must_is_on_the_card(homes, tmp_path):
    """As a family that is made by hand may have it: without a revision, or with fields that are null."""
    family = family_of(homes["llama"])
    for n, base in enumerate(({}, {"quantize": None}, {"quantize": "4bit"})):
        family.base = {"model": str(homes["llama"].base), **base}
        export(family, tmp_path / f"{n}", THREE[0], kind="adapter")
        card = (tmp_path / f"{n}" / "README.md").read_text()
        assert ("load_base" in card) is (n == 2)


def test_a_base_model_of_the_hub_is_named(homes, tmp_path):
    family = family_of(homes["tied"])
    family.base = {"model": "owner/base", "revision": None}
    family.policy.model.config._commit_hash = "c" * 40
    export(family, tmp_path / "x", (0.5, 0.5), kind="adapter")
    card = (tmp_path / "x" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/base"
    assert f"`owner/base` at revision `{'c' * 40}`" in card
    assert f'from_pretrained("owner/base", revision="{"c" * 40}", dtype="auto")' in card
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"


def test_ranks_that_vllm_takes(tmp_path, homes):
    assert [vllm_rank(rank) for rank in (1, 2, 8, 9, 24, 129, 257, 512, 513, None)] == [1, 8, 8, 16, 32, 256, 320, 512, None, None]
    wide = write_adapters(homes["tied"].make, tmp_path, [{"r": 300, "target_modules": ["q_proj"]}] * 2)
    family = family_of(SimpleNamespace(base=homes["tied"].base, adapters=wide))
    made = export(family, tmp_path / "x", (0.5, 0.5), kind="adapter")
    assert made.to_json()["max_lora_rank"] is None
    assert "up to rank 512, and this one has 600: export it merged" in (tmp_path / "x" / "README.md").read_text()


def test_measurements_of_this_very_family_are_on_the_card(tmp_path, monkeypatch):
    learner, root = {"name": "exact", "steps": 3, "rank": 2}, tmp_path / "root"
    soup = {"name": "experts", "mixing": "parameter"}
    suite = {"name": "s", "tasks": [TASK], "learner": learner, "methods": [soup, {"name": "linear", "points": 3}], "seeds": [0]}
    run_suite(suite, root, executor="in-process", progress=False)
    family = fit({**TASK, "seed": 0}, soup, learner=learner, root=root, progress=False)
    family.save(root / "families" / "mine")
    made = export(Family.load(root / "families" / "mine"), tmp_path / "x", [0.7, 0.3], results=root / "families" / "mine")
    found = json.loads((made.path / "paretune.json").read_text())["measured"]
    key = found["by"].rpartition(" ")[2]
    cell = json.loads((root / "cells" / key / "cell.json").read_text())
    assert cell["method"]["name"] == "experts"
    place = int(np.abs(np.array(cell["metrics"]["preferences"])[:, 0] - 0.7).argmin())
    assert found["at"]["objective_1"] == cell["metrics"]["preferences"][place][0]
    assert found["attainment"] == cell["metrics"]["splits"]["train"]["attainment"]["per_preference"][place]
    card = (made.path / "README.md").read_text()
    assert f"{found['attainment']:.4g} attainment" in card
    assert all(f"`{key}`" in card for key in cell["trainings"])
    other = fit({**TASK, "seed": 0}, soup, learner={**learner, "steps": 2}, root=root, progress=False)
    export(other, tmp_path / "y", [0.7, 0.3], kind="adapter", results=root)
    assert json.loads((tmp_path / "y" / "paretune.json").read_text())["measured"] is None  # it was another learner
    monkeypatch.chdir(tmp_path)
    exec(python_of((tmp_path / "y" / "README.md").read_text()).replace("your prompt", "ab"), {})  # the base is a task's


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks a process that has loaded torch")
def test_a_killed_export_leaves_nothing_under_its_name(homes, tmp_path):
    family = family_of(homes["tied"])
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        export(family, tmp_path / "x", (0.5, 0.5))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".wip-x"]
    export(family, tmp_path / "x", (0.5, 0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert far(merged_logits(tmp_path / "x", prompt_ids(family)), wanted(family, (0.5, 0.5))) < TOLERANCE


def test_a_full_disk_is_said_and_leaves_nothing(homes, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    family = family_of(homes["tied"])
    monkeypatch.setattr(family.policy.tokenizer, "save_pretrained", full)
    with pytest.raises(StoreError, match="an export has room on its disk"):
        export(family, tmp_path / "x", (0.5, 0.5))
    assert list(tmp_path.iterdir()) == []


def test_the_command(homes, tmp_path):
    family = family_of(homes["tied"], rule=Table(((1.0, 0.0), (0.5, 0.5)), ((1.0, 0.0), (0.2, 0.9))))
    family.save(tmp_path / "family")
    runner, asked = CliRunner(), ["export", str(tmp_path / "family"), "--preference", "kind=.4,brief=.6"]
    result = runner.invoke(app, [*asked, "--out", str(tmp_path / "x")])
    assert result.exit_code == 0, result.stderr
    assert "merged, float32" in result.stdout
    assert far(merged_logits(tmp_path / "x", prompt_ids(family)), wanted(family, (0.4, 0.6))) < TOLERANCE
    result = runner.invoke(app, [*asked, "--out", str(tmp_path / "y"), "--as", "adapter", "--json", "--dtype", "bfloat16"])
    said = json.loads(result.stdout)
    assert (said["kind"], said["rank"], said["max_lora_rank"], said["dtype"]) == ("adapter", 8, 8, "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "y" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    result = runner.invoke(app, [*asked, "--out", str(tmp_path / "y")])
    assert result.exit_code == 2
    assert "written into a new folder" in result.stderr


# The hub


@pytest.fixture
def hub(monkeypatch):
    """The hub's client, which keeps what it was told, and a token; without a network."""
    seen = SimpleNamespace(made=[], files={}, fails=None)

    class Api:
        def create_repo(self, repo_id, **settings):
            if seen.fails:
                raise seen.fails
            seen.made.append((repo_id, settings))
            return f"https://hub.test/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, **_):
            seen.files[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return seen


@pytest.fixture
def saved(homes, tmp_path):
    family = family_of(homes["llama"], count=2)
    family.save(tmp_path / "family")
    return ["export", str(tmp_path / "family"), "--preference", "kind=.4,brief=.6", "--as", "adapter", "--out"]


@pytest.mark.parametrize(("more", "private"), [([], True), (["--public"], False)])
def test_what_is_pushed_is_the_export_and_private(saved, tmp_path, hub, more, private):
    result = CliRunner().invoke(app, [*saved, str(tmp_path / "x"), "--push", "me/kind-40", "--license", "apache-2.0", "--json", *more])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["pushed"] == "https://hub.test/me/kind-40"
    assert hub.made == [("me/kind-40", {"private": private, "exist_ok": True})]
    assert hub.files["me/kind-40"] == {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    card = (tmp_path / "x" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    assert "What was trained here: `apache-2.0`. The license of the base model holds for this too." in card
    assert json.loads((tmp_path / "x" / "paretune.json").read_text())["license"] == "apache-2.0"


def test_without_a_license_the_card_claims_none(saved, tmp_path):
    assert CliRunner().invoke(app, [*saved, str(tmp_path / "x")]).exit_code == 0
    assert "license" not in yaml.safe_load((tmp_path / "x" / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (["--push", "kind-40"], "'kind-40': no owner"),
        (["--push", "me/kind 40"], "'me/kind 40': "),
        (["--push", "a/b/c"], "'a/b/c': "),
        (["--push", ""], "'': "),
        (["--public"], "no --push"),
        (["--license", "Apache 2.0"], "'Apache 2.0'"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_anything_is_written(saved, tmp_path, hub, monkeypatch, more, found):
    monkeypatch.setattr("paretune.policy.family.load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    result = CliRunner().invoke(app, [*saved, str(tmp_path / "x"), *more])
    assert (result.exit_code, found in result.stderr, (tmp_path / "x").exists()) == (2, True, False), result.stderr


def test_nobody_logged_in_is_said_before_anything_is_written(saved, tmp_path, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    result = CliRunner().invoke(app, [*saved, str(tmp_path / "x"), "--push", "me/kind-40"])
    assert result.exit_code == 2
    assert "hf auth login" in result.stderr
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in CliRunner().invoke(app, [*saved, str(tmp_path / "x"), "--push", "me/kind-40"]).stderr


def test_a_hub_that_refuses_costs_no_export(saved, tmp_path, hub):
    hub.fails = PermissionError("403 Forbidden: the token may only read\nmore")
    result = CliRunner().invoke(app, [*saved, str(tmp_path / "x"), "--push", "me/kind-40"])
    assert result.exit_code == 2
    assert "403 Forbidden: the token may only read" in result.stderr
    assert "hf upload me/kind-40" in result.stderr
    assert (tmp_path / "x" / "adapter_model.safetensors").is_file()

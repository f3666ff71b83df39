"""GGUF files as models: the numbers and tokens of the same model in safetensors, through training and export; what is refused, and how."""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gguf_files import tiny, write_gguf
from paretune import Family, fit
from paretune.cli import app
from paretune.errors import ConfigError
from paretune.hub import content_of, is_local
from paretune.registry import OBJECTIVES
from paretune.runs.recipes.recipe import load_recipe
from paretune.serve.export import export
from paretune.tasks.pretrained import context_length, load_pretrained
from recipe_files import write_recipe
from tiny_rewards import gpt_tokenizer

TEXT = "Customer: where is my parcel? <|endoftext|>\nAgent:"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The model, its tokenizer, and the folder with model/ (safetensors) and model.gguf (float32)."""
    folder = tmp_path_factory.mktemp("gguf")
    model, tokenizer = tiny(folder / "model")
    write_gguf(folder / "model.gguf", model, tokenizer)
    return model, tokenizer, folder


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


def message(call, *parts):
    with pytest.raises(ConfigError) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_file_is_the_model_and_the_tokenizer_that_it_was_made_from(made, tmp_path, kind):
    """The weights are those that the package itself quantizes and dequantizes; heads that stay as llama.cpp orders them would not be."""
    model, tokenizer, _ = made
    path = write_gguf(tmp_path / f"{kind}.gguf", model, tokenizer, kind=kind)
    read, tokens = load_pretrained(str(path))
    ids = tokenizer(TEXT)["input_ids"]
    assert tokens(TEXT)["input_ids"] == ids
    assert tokens.get_vocab() == tokenizer.get_vocab()
    assert tokens.decode(ids) == tokenizer.decode(ids)
    assert tokens.chat_template == tokenizer.chat_template
    assert (tokens.padding_side, tokens.pad_token_id, read.generation_config.eos_token_id) == ("left", 0, [0])
    quantized = gguf.GGMLQuantizationType[kind]
    for name, weight in model.state_dict().items():
        there = gguf.dequantize(gguf.quantize(weight.numpy(), quantized), quantized) if weight.ndim == 2 else weight.numpy()
        np.testing.assert_array_equal(read.state_dict()[name].numpy(), there, err_msg=name)
    if kind == "F32":
        assert torch.allclose(logits(read, ids), logits(model, ids), atol=1e-5)
    assert all(type(layer.self_attn.q_proj) is torch.nn.Linear for layer in read.model.layers)
    assert "quantization_config" not in read.config.to_dict()
    assert context_length(str(path)) == (256, "max_position_embeddings")


def test_what_lies_beside_the_file_is_not_read(made, tmp_path):
    """Tokenizer, chat template and adapter of another model in the same folder."""
    model, tokenizer, _ = made
    gpt_tokenizer("another template").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "nothing", "peft_type": "LORA"}')
    _, tokens = load_pretrained(str(write_gguf(tmp_path / "model.gguf", model, tokenizer)))
    assert tokens.get_vocab() == tokenizer.get_vocab()
    assert tokens.chat_template == tokenizer.chat_template


def test_a_file_is_known_by_its_content(made, tmp_path):
    model, tokenizer, folder = made
    same = write_gguf(tmp_path / "model.gguf", model, tokenizer)
    other = write_gguf(tmp_path / "other.gguf", model, tokenizer, kind="Q8_0")
    (tmp_path / "notes.json").write_text("{}")
    known = content_of(str(folder / "model.gguf"), None)
    assert list(known) == ["model.gguf"]
    assert content_of(str(same), None) == known
    assert set(content_of(str(other), None).values()) != set(known.values())
    assert is_local("nothing-there.gguf")
    assert not is_local("owner/model-GGUF")


def test_fit_save_load_sample_and_export(made, tmp_path):
    """A whole run on the file; the export needs neither the file nor the package, and computes what the family does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, _, folder = made
    objectives = [
        {"name": "loud", "use": "rewards.py:shout", "low": 0, "high": 1},
        {"name": "brief", "use": "length", "half": 10},
        {"name": "fluent", "use": "fluency", "cap": 1e6},
    ]
    (tmp_path / "model.gguf").write_bytes((folder / "model.gguf").read_bytes())
    learner, method = {"name": "pg", "samples": 16, "batch": 8, "rank": 2}, {"name": "experts", "mixing": "parameter"}
    recipe = load_recipe(write_recipe(tmp_path, "model.gguf", objectives=objectives, learner=learner, method=method))
    assert recipe.task.scorers[2][1].model == recipe.task.model == str(tmp_path / "model.gguf")
    family = fit(recipe.task, recipe.method, learner=recipe.learner, root=recipe.root, seed=0)
    family.save(tmp_path / "family")
    prompts = recipe.task.prompts("test")
    assert Family.load(tmp_path / "family").sample(prompts, "loud=1", seed=1) == family.sample(prompts, "loud=1", seed=1)
    assert np.isfinite(recipe.task.score(prompts, ["It is here."] * len(prompts))).all()
    even = [1 / 3] * 3
    export(family, tmp_path / "merged", even)
    merged, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokens(TEXT)["input_ids"]
    with torch.no_grad():
        gates_NK = torch.from_numpy(family.gates(np.array([even]))).float()
        wanted = family.policy.forward(torch.tensor([ids]), gates_NK=gates_NK)
    assert torch.allclose(logits(merged, ids), wanted, atol=1e-4)
    export(family, tmp_path / "adapter", even, kind="adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    code = card.partition("```python")[2].partition("```")[0]
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_an_objective_reads_a_file(made):
    """The perplexity under the file is that under the folder."""
    _, _, folder = made
    scores = [
        OBJECTIVES.build({"name": "fluency", "model": str(folder / name), "cap": 1e6})(["Customer: hello\nAgent:"], ["It is late."])
        for name in ("model", "model.gguf")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert 0 < scores[0][0] < 1
    classifier = OBJECTIVES.build({"name": "reward-model", "model": str(folder / "model.gguf"), "label": "LABEL_1", "low": 0, "high": 1})
    message(lambda: classifier(["a"], ["b"]), "score.weight", "remedy:")


def test_what_cannot_be_read_is_said(made, tmp_path):
    model, tokenizer, folder = made
    whole = (folder / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) - 4000])
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n" + "0" * 90)
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name in ("cut", "pointer", "empty"):
        message(
            lambda name=name: load_pretrained(str(tmp_path / f"{name}.gguf")), "can be read to its end", f"{name}.gguf", "download it again"
        )
    silent = write_gguf(tmp_path / "silent.gguf", model, tokenizer, tokens=False)
    message(lambda: load_pretrained(str(silent)), "its tokenizer in the same file", "silent.gguf", "convert it again")
    odd = write_gguf(tmp_path / "odd.gguf", model, tokenizer, more={"extra": np.zeros(4, dtype=np.int32)})
    message(lambda: load_pretrained(str(odd)), "can be dequantized", "I32 in odd.gguf", "Q8_0")
    scaled = write_gguf(tmp_path / "scaled.gguf", model, tokenizer, more={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    message(lambda: load_pretrained(str(scaled)), "rotary positions", "rope_freqs.weight", "safetensors")
    alien = write_gguf(tmp_path / "alien.gguf", model, tokenizer, architecture="rwkv7")
    message(lambda: load_pretrained(str(alien)), "can be loaded", "rwkv7", "safetensors weights instead")
    message(lambda: load_pretrained(str(tmp_path / "none.gguf")), "or a GGUF file", "nothing at", "relative")
    lacking = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "state_dict", lambda: lacking)
        broken = write_gguf(tmp_path / "lacking.gguf", model, tokenizer)
    message(lambda: load_pretrained(str(broken)), "lacks model.layers.1.mlp.up_proj.weight", "drawn at random")


def test_a_new_file_under_an_old_name_is_checked_anew(made, tmp_path):
    model, tokenizer, _ = made
    path = tmp_path / "model.gguf"
    write_gguf(path, model, tokenizer)
    load_pretrained(str(path))
    path.unlink()
    write_gguf(path, model, tokenizer, tokens=False)
    message(lambda: load_pretrained(str(path)), "no tokenizer.ggml.tokens")


def test_without_the_package_one_message_says_what_to_install(made, tmp_path, monkeypatch):
    _, _, folder = made
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "fresh.gguf").write_bytes((folder / "model.gguf").read_bytes())
    run = CliRunner().invoke(app, ["fit", str(write_recipe(tmp_path, "fresh.gguf"))])
    assert run.exit_code == 2
    assert "is read with the package gguf" in run.stderr
    assert "fresh.gguf, and no such package" in run.stderr
    assert "pip install 'paretune[gguf]'" in run.stderr


def test_messages_need_a_template_in_the_file(made, tmp_path):
    model, tokenizer, _ = made
    write_gguf(tmp_path / "plain.gguf", model, tokenizer, template=False)
    path = write_recipe(tmp_path, "plain.gguf", prompts={"path": "prompts.jsonl", "chat": True})
    message(lambda: load_recipe(path), "chat template", "plain.gguf")


def test_a_gguf_file_is_not_quantized_once_more(made):
    folder = made[2] if isinstance(made, tuple) else made
    message(
        lambda: load_pretrained(str(folder / "model.gguf"), quantize="4bit"), "quantized once", "quantized by gguf", "leave quantize out"
    )

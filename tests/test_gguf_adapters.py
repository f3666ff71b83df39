"""GGUF adapters: what llama.cpp adds to a weight in its own order of rows is the family's change, and other bases are refused."""

from __future__ import annotations

import json
import sys

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from paretune.cli import app
from paretune.errors import ConfigError
from paretune.policy.rules import BridgeRule
from paretune.serve.gguf import export_gguf
from tiny_models import dense_soup
from vllm_families import fresh, saved

HEADS = {"attn_q": 4, "attn_k": 2}  # of the base


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("gguf"))


def test_the_files_at_the_scales_are_the_merged_change(made, tmp_path):
    """llama.cpp's sum: scale * alpha / rank * B A, for each adapter; rows of queries and keys lie as its rotation wants them."""
    path, paths = made
    answer = CliRunner().invoke(
        app, ["export", str(path), "--preference", "polite=.7,brief=.3", "--as", "gguf", "--out", str(tmp_path / "out")]
    )
    assert answer.exit_code == 0, answer.output
    told = json.loads((tmp_path / "out" / "scales.json").read_text())
    gates_K = BridgeRule().gates(np.array([[0.7, 0.3]]))[0]
    assert told["gates"] == gates_K.tolist() == [one["scale"] for one in told["request"]["lora"]]
    assert told["command"] == "--lora-scaled 0-e0.gguf:0.7,1-e1.gguf:0.3,2-e2.gguf:0.84"
    assert told["command"] in answer.output
    found: dict[str, np.ndarray] = {}
    for gate, file in zip(gates_K, told["adapters"].values(), strict=True):
        read = gguf.GGUFReader(tmp_path / "out" / file)
        said = {key: read.fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")}
        assert said == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
        tensors = {tensor.name: tensor.data for tensor in read.tensors}
        for name in [name for name in tensors if name.endswith(".lora_a")]:
            a_rI, b_Or = tensors[name], tensors[name.replace(".lora_a", ".lora_b")]
            change = gate * read.fields["adapter.lora.alpha"].contents() / len(a_rI) * (b_Or @ a_rI)
            there = name.removesuffix(".weight.lora_a")
            found[there] = found.get(there, 0) + change
    merged, plain = (dense_soup(fresh, paths, weights).state_dict() for weights in (torch.tensor(gates_K), torch.zeros(3)))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    changed = {name: (merged[name] - plain[name]).numpy() for name in merged if not torch.equal(merged[name], plain[name])}
    assert {names.get_name(name.removesuffix(".weight")) for name in changed} == set(found)
    for name, wanted in changed.items():
        there = str(names.get_name(name.removesuffix(".weight")))
        heads = HEADS.get(there.split(".")[-1])
        if heads is not None:
            wanted = wanted.reshape(heads, 2, -1, wanted.shape[1]).swapaxes(1, 2).reshape(wanted.shape)
        np.testing.assert_allclose(found[there], wanted, rtol=1e-4, atol=1e-6)


def test_another_architecture_is_refused_and_nothing_is_written(made, tmp_path):
    path, _ = made
    (tmp_path / "other").mkdir()
    config = json.loads((path.parent / "base" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    with pytest.raises(ConfigError, match="Llama architecture"):
        export_gguf(path, tmp_path / "out", "polite=1", model=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_without_the_package_it_says_what_to_install(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"paretune\[gguf\]"):
        export_gguf(made[0], tmp_path / "out", "polite=1")


def test_a_kind_of_export_that_there_is_not_is_told_all_three(made, tmp_path):
    told = CliRunner().invoke(app, ["export", str(made[0]), "--preference", "polite=1", "--as", "ggml", "--out", str(tmp_path / "out")])
    assert told.exit_code == 2
    assert "one of merged, adapter, gguf" in told.output
    assert "did you mean 'gguf'?" in told.output


@pytest.mark.parametrize("option", [("--dtype", "bfloat16"), ("--license", "mit"), ("--push", "me/brief"), ("--public",)])
def test_what_such_files_do_not_have_is_refused(made, tmp_path, option):
    command = ["export", str(made[0]), "--preference", "polite=1", "--as", "gguf", "--out", str(tmp_path / "out"), *option]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 2
    assert option[0] in told.output
    assert not (tmp_path / "out").exists()

"""What of vLLM needs no vLLM: gates per token, all adapters as one LoRA, names of models, the command line, and what is refused."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from paretune.cli import app
from paretune.errors import ConfigError
from paretune.policy.rules import BridgeRule
from paretune.serve.vllm import plugin
from paretune.serve.vllm.families import DEFAULT, FAMILIES, GatedFamily, families_named, fill_gates, is_family
from paretune.serve.vllm.launch import command, drawing
from paretune.serve.vllm.plugin import check_version
from tiny_models import dense_soup
from vllm_families import fresh, saved

SERVER = {"version": "0.32.0", "host": "127.0.0.1", "port": 8000, "rows": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("vllm"))


def message(call, *parts):
    with pytest.raises(ConfigError) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def deltas(folder, columns=None):
    """Layer -> B A of one LoRA; with `columns` of those of its ranks only, times a number for each."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for key, a_RI in tensors.items():
        if "lora_A" in key:
            scale_R = torch.ones(len(a_RI)) if columns is None else columns
            b_OR = tensors[key.replace("lora_A", "lora_B")]
            found[key.split(".lora_")[0].removeprefix("base_model.model.")] = b_OR * scale_R @ a_RI * config["lora_alpha"] / config["r"]
    return found


def test_the_lora_of_a_preference_is_written_once_whoever_asks_at_once(made, tmp_path):
    spelled = ["polite=.7,brief=.3", "polite=0.7,brief=0.3", "brief=.3,polite=.7", "polite=.70,brief=.30"]
    together = threading.Barrier(len(spelled))

    def ask(said):
        together.wait(20)
        return plugin._written(made[0], said, str(tmp_path))

    with ThreadPoolExecutor(len(spelled)) as pool:
        (folder,) = set(pool.map(ask, spelled))
    assert list(tmp_path.iterdir()) == [folder]


def test_gates_of_the_ranks_and_an_exact_lora_are_the_merged_change(made, tmp_path):
    """The oracle reads the adapters' own files: unequal ranks, scales and targets, one with rank-stabilized scaling."""
    path, paths = made
    family = GatedFamily.read(path)
    gates_K = family.gates("polite=.7,brief=.3", {})
    assert family.write(tmp_path / "all") == family.rank == 12
    family.write(tmp_path / "one", gates_K)
    columns_R = torch.tensor(gates_K).repeat_interleave(torch.tensor(family.ranks)).float()
    stacked, exact = deltas(tmp_path / "all", columns_R), deltas(tmp_path / "one")
    merged, plain = (dict(dense_soup(fresh, paths, weights).named_parameters()) for weights in (torch.tensor(gates_K), torch.zeros(3)))
    changed = {name.removesuffix(".weight") for name in merged if not torch.equal(merged[name], plain[name])}
    assert set(stacked) == set(exact) == changed
    for layer in changed:
        wanted = (merged[f"{layer}.weight"] - plain[f"{layer}.weight"]).detach()
        torch.testing.assert_close(stacked[layer], wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(exact[layer], wanted, rtol=1e-4, atol=1e-6)


def test_a_gate_of_zero_adds_no_rank(made, tmp_path):
    path, _ = made
    family = GatedFamily.read(path)
    assert family.write(tmp_path / "vertex", family.gates("polite=1", {})) == 4
    assert family.write(tmp_path / "none", np.zeros(3)) == 4  # vLLM takes no LoRA without ranks


def test_every_token_of_a_step_has_its_requests_gates():
    """Rows come in the batch's order, with many tokens and with one; other LoRAs have 1; an earlier step leaves nothing."""
    buffer_TR = torch.full((8, 6), 9.0)
    fill_gates(buffer_TR, [((0.5, 2.0), (1, 3)), None, ((0.0, -1.0), (1, 3))], np.array([2, 1, 3]))
    first, last = [0.5, 2, 2, 2, 1, 1], [0, -1, -1, -1, 1, 1]
    assert buffer_TR[:6].tolist() == [first, first, [1] * 6, last, last, last]
    where = buffer_TR.data_ptr()
    fill_gates(buffer_TR, [((0.25, 1.0), (1, 3))], [1])
    assert buffer_TR[0].tolist() == [0.25, 1, 1, 1, 1, 1]
    assert buffer_TR.data_ptr() == where  # a captured CUDA graph reads it there


@pytest.mark.parametrize("spelling", ["polite=.7,brief=.3", [0.7, 0.3], {"brief": 0.3, "polite": 0.7}])
def test_a_preference_has_the_spellings_of_the_embedded_server(made, spelling):
    family = GatedFamily.read(made[0])
    assert np.array_equal(family.gates(None, {"preference": spelling}), BridgeRule().gates(np.array([[0.7, 0.3]]))[0])
    assert family.gates(None, {}).tolist() == [0.5, 0.5, 1.0]
    assert GatedFamily.read(made[0], "polite=1").gates(None, {}).tolist() == [1.0, 0.0, 0.0]
    assert family.gates(None, {"gates": [0, 1, -2.5]}).tolist() == [0.0, 1.0, -2.5]


@pytest.mark.parametrize(
    ("in_name", "extra", "parts"),
    [
        ("polite=1", {"preference": [0.5, 0.5]}, ["gives its preference once", "the model's name and preference"]),
        (None, {"preference": [0.5, 0.5], "gates": [0, 0, 1]}, ["gives its preference once"]),
        ("", {}, ["preference"]),
        ("rude=1", {}, ["rude"]),
        (None, {"preference": [0.7, 0.7]}, ["sum to 1", "polite=0.5"]),
        (None, {"preference": 1}, ["an object, a list or a text"]),
        (None, {"gates": [1, 0]}, ["3 numbers", "e0, e1, e2"]),
        (None, {"gates": [1, 0, float("nan")]}, ["a gate"]),
        (None, {"gates": "1,0,0"}, ["3 numbers"]),
    ],
)
def test_what_is_no_preference_is_refused(made, in_name, extra, parts):
    message(lambda: GatedFamily.read(made[0]).gates(in_name, extra), *parts)


@pytest.mark.parametrize("mixing", ["logit", "hidden", "factor", "routed", "merged", "reference", "prompted"])
def test_what_is_no_soup_with_gates_per_request_names_the_embedded_engine(made, tmp_path, mixing):
    card = json.loads((made[0] / "family.json").read_text())
    for name in made[0].iterdir():
        (tmp_path / name.name).symlink_to(name)
    (tmp_path / "family.json").unlink()
    named = {"name": mixing, **({"objectives": 2, "digits": 2} if mixing == "prompted" else {})}
    (tmp_path / "family.json").write_text(json.dumps({**card, "mixing": named}))
    message(lambda: GatedFamily.read(tmp_path), f"mixing {mixing!r}", "the embedded engine")


def test_layers_that_gates_do_not_reach_are_refused(tmp_path):
    path, _ = saved(tmp_path, settings=[{"target_modules": ["lm_head", "q_proj"]}, {}, {}])
    message(lambda: GatedFamily.read(path), "lm_head", "linear layers inside the decoder", "the embedded engine")


def test_a_family_that_was_changed_is_refused(tmp_path):
    path, _ = saved(tmp_path)
    (path / "adapters" / "e0" / "adapter_config.json").write_text("{}")
    message(lambda: GatedFamily.read(path), "as it was saved", "e0")


def test_the_command_line_is_vllms_own(made):
    path, _ = made
    argv, variables = command([path], **SERVER, default="polite=1", key="secret", more=["--max-model-len", "128"])
    assert argv[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(path.parent / "base")]
    assert f"family={path}" in argv[argv.index("--lora-modules") + 1]
    assert argv[argv.index("--max-lora-rank") + 1] == "16"  # 12 ranks
    assert argv[-2:] == ["--max-model-len", "128"]
    assert "secret" not in " ".join(argv)
    assert variables == {FAMILIES: str(path), "VLLM_USE_V2_MODEL_RUNNER": "0", DEFAULT: "polite=1", "VLLM_API_KEY": "secret"}
    assert families_named(f"{path}{os.pathsep}") == {"family": path}
    assert is_family(str(path))
    assert not is_family(str(path.parent / "base"))


@pytest.mark.parametrize("version", [None, "0.31.0", "0.32.1", "1.0"])
def test_another_vllm_is_refused_before_anything_is_loaded(made, version):
    message(lambda: command([made[0]], **{**SERVER, "version": version}), "vLLM 0.32.0", version or "no vLLM", "pip install")
    check_version("0.32.0+cpu")
    message(lambda: drawing("base", version=version, host="127.0.0.1", port=1, rank=8), "vLLM 0.32.0", version or "no vLLM")


def test_a_server_for_trainings_takes_all_adapters_at_run_time():
    argv, variables = drawing("base", version="0.32.0", host="127.0.0.1", port=7, rank=24, more=["--max-model-len", "64"])
    assert argv[argv.index("--max-lora-rank") + 1] == "32"
    assert argv[argv.index("--logprobs-mode") + 1] == "processed_logprobs"  # else a temperature other than 1 gives wrong weights
    assert argv[-2:] == ["--max-model-len", "64"]
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    message(lambda: drawing("base", version="0.32.0", host="127.0.0.1", port=7, rank=513), "at most rank 512", "513")


def test_the_command_refuses_without_vllm_and_what_belongs_to_the_other_engine(made, monkeypatch):
    monkeypatch.setattr("paretune.serve.vllm.launch.installed", lambda: None)
    for arguments, parts in (
        (["--engine", "vllm"], ["no vLLM", "pip install"]),
        (["--engine", "vllm", "--chunk", "64"], ["--chunk"]),
        (["--engine", "other"], ["embedded", "vllm"]),
        (["--vllm-args", "--seed 1"], ["--vllm-args"]),
    ):
        answer = CliRunner().invoke(app, ["serve", str(made[0]), *arguments])
        assert answer.exit_code == 2, answer.output
        assert all(part in answer.output for part in parts), answer.output

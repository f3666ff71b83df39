"""Families on the real vLLM: every row of a batch says what the merged model of its own gates says, with prefix caching on."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from paretune.policy.rules import BridgeRule
from paretune.serve.vllm.families import GatedFamily
from tiny_models import dense_soup
from vllm_families import fresh, greedy, saved

PROMPT = "Customer: where is my parcel? I have waited for it since last week."
LENGTH = 12
WEIGHTS = [(i / 7, 1 - i / 7) for i in range(8)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def llm(made):
    from vllm import LLM

    path, _ = made
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    settings = {"dtype": "float32", "enforce_eager": True, "max_loras": 2, "max_lora_rank": 16, "max_model_len": 128, "block_size": 32}
    return LLM(str(path.parent / "base"), enable_lora=True, enable_prefix_caching=True, max_num_seqs=16, seed=0, **settings)


def said(llm, path, extras, prompts=None, name="family"):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    asked = [SamplingParams(max_tokens=LENGTH, temperature=0, ignore_eos=True, extra_args=extra) for extra in extras]
    lora = None if path is None else LoRARequest(name, 1, str(path))
    prompts = prompts or [PROMPT] * len(extras)
    return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, asked, lora_request=lora, use_tqdm=False)]


def oracle(llm, paths, gates, prompt=PROMPT):
    model = dense_soup(fresh, paths, torch.tensor(gates))
    return greedy(model, llm.get_tokenizer()(prompt)["input_ids"], LENGTH)


def test_one_batch_has_a_preference_per_row_and_prefix_caching_mixes_none(made, llm):
    """One prompt at eight preferences, twice: the second time all blocks are cached, each under its own gates."""
    path, paths = made
    gates_WK = BridgeRule().gates(np.array(WEIGHTS))
    wanted = [oracle(llm, paths, gates_K.tolist()) for gates_K in gates_WK]
    assert len(llm.get_tokenizer()(PROMPT)["input_ids"]) > 32  # more than a block of the cache
    assert len({tuple(one) for one in wanted}) >= 6  # else a server that mixes preferences would pass
    extras = [{"preference": list(w_M)} for w_M in WEIGHTS]
    assert said(llm, path, extras) == wanted
    assert said(llm, path, extras[::-1]) == wanted[::-1]
    plain = said(llm, None, [{}])[0]
    assert plain == oracle(llm, paths, [0.0] * 3)
    assert plain not in wanted


def test_every_spelling_means_the_same(made, llm):
    path, paths = made
    gates_K = BridgeRule().gates(np.array([[0.7, 0.3]]))[0].tolist()
    wanted = oracle(llm, paths, gates_K)
    for extra in ({"preference": "polite=.7,brief=.3"}, {"preference": {"brief": 0.3, "polite": 0.7}}, {"gates": gates_K}):
        assert said(llm, path, [extra]) == [wanted]
    assert said(llm, path, [None], name="family@polite=.7,brief=.3") == [wanted]
    assert said(llm, path, [None]) == [oracle(llm, paths, BridgeRule().gates(np.array([[0.5, 0.5]]))[0].tolist())]


def test_what_is_no_preference_is_refused_and_the_engine_goes_on(made, llm):
    from vllm.exceptions import VLLMValidationError

    path, _ = made
    for extra, name, part in (
        ({"preference": [0.7, 0.7]}, "family", "sum to 1"),
        ({"preference": "polite=1"}, "family@brief=1", "gives its preference once"),
        ({"gates": [1.0]}, "family", "list of 3 numbers"),
        ({"gates": [float("nan"), 0.0, 0.0]}, "family", "a gate"),
        (None, "family@rude=1", "rude"),
    ):
        with pytest.raises(VLLMValidationError, match=part):
            said(llm, path, [extra], name=name)
    with pytest.raises(VLLMValidationError, match="asked of a family"):
        said(llm, None, [{"preference": [0.5, 0.5]}])
    assert len(said(llm, path, [None])[0]) == LENGTH


def test_long_prompts_and_rows_of_several_lengths_share_steps(made, llm):
    """Tokens of prompts and of responses, and a row of the base model, in one step."""
    path, paths = made
    prompts = [PROMPT[: 7 * (i + 2)] for i in range(8)]
    gates = [[i / 4, 1 - i / 7, (i % 3) / 2] for i in range(8)]
    assert said(llm, path, [{"gates": one} for one in gates], prompts) == [
        oracle(llm, paths, one, prompt) for one, prompt in zip(gates, prompts, strict=True)
    ]


def test_the_exact_lora_of_a_preference_is_a_lora_like_any_other(made, llm, tmp_path):
    path, paths = made
    family = GatedFamily.read(path)
    gates_K = family.gates("polite=.25,brief=.75", {})
    family.write(tmp_path / "one", gates_K)
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    asked = SamplingParams(max_tokens=LENGTH, temperature=0, ignore_eos=True)
    (made_one,) = llm.generate([PROMPT], asked, lora_request=LoRARequest("one", 7, str(tmp_path / "one")), use_tqdm=False)
    assert list(made_one.outputs[0].token_ids) == oracle(llm, paths, gates_K.tolist())

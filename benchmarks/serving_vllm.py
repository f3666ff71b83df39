"""A family on vLLM: rows of one batch against merged exports, and the price of gates against one ordinary LoRA of the same rank.

    make vllm-env && .venv-vllm/bin/python benchmarks/serving_vllm.py --model SMOLLM2 [--rows 16] [--tokens 32] [--rounds 5] [--out FILE]

The family has two experts of rank 8 and a bridge with random weights: what is measured does not depend on what they have learned. Equal are
rows whose greedy tokens are those of plain transformers with the merged export of that row's preference; how many answers differ from each
other and from the base's is told beside. The ordinary LoRA is loaded by the same engine from the same tensors.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch

from common import alternated, emit, times_as_fast

RANK, SCALE = 8, 0.02
PROMPTS = ("What is a good way to", "The river froze before", "My neighbor asked me to", "A short letter to the mayor:")


def family(model: str, folder: Path) -> Any:
    """Two experts and a bridge with random weights, saved and loaded."""
    from paretune.policy.base import build_mixing
    from paretune.policy.family import Family
    from paretune.policy.lora.bank import LoraBank
    from paretune.policy.rules import BridgeRule
    from paretune.seeds import forked_torch
    from paretune.tasks.pretrained import load_pretrained
    from paretune.types import Objectives

    loaded, tokenizer = load_pretrained(model, dtype="float32")
    bank = LoraBank.attach(loaded, names=["polite", "brief", "bridge"], seed=0, rank=RANK)
    with forked_torch(0), torch.no_grad():
        for tensor in bank.parameters():
            tensor.normal_(0, SCALE)
    objectives = Objectives(("polite", "brief"), (0.0, 0.0), (1.0, 1.0))
    made = Family(build_mixing("parameter", bank, tokenizer), BridgeRule(), objectives, {"model": str(Path(model).resolve())})
    made.save(folder)
    return made


def engine(model: str, rows: int, **settings: Any) -> Any:
    from vllm import LLM

    shape = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": rows, "seed": 0}
    return LLM(model, enable_prefix_caching=False, **shape, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder as transformers saves it")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    asked = parser.parse_args()
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from paretune.serve.export import export
    from paretune.serve.vllm.families import GatedFamily

    settings = {"max_tokens": asked.tokens, "temperature": 0, "min_tokens": asked.tokens}
    weights = [i / (asked.rows - 1) for i in range(asked.rows)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(asked.rows)]

    def tokens(made: Any) -> list[list[int]]:
        return [list(one.outputs[0].token_ids) for one in made]

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = family(asked.model, folder / "family")
        gated = GatedFamily.read(folder / "family")
        gated.write(folder / "ordinary")
        merged, logits_NTV = [], []
        for w in weights:
            export(made, folder / "merged", [w, 1 - w])
            told, logits_TV = _alone(folder / "merged", prompts[len(merged)], asked.tokens)
            merged.append(told)
            logits_NTV.append(logits_TV)
            shutil.rmtree(folder / "merged")
        base = [_greedy(made, prompt, asked.tokens) for prompt in prompts]
        del made
        gc.collect()
        llm = engine(asked.model, asked.rows, enable_lora=True, max_loras=2, max_lora_rank=gated.max_rank)
        rows = [SamplingParams(**settings, extra_args={"preference": [w, 1 - w]}) for w in weights]
        one, ordinary = LoRARequest("family", 1, str(folder / "family")), LoRARequest("ordinary", 2, str(folder / "ordinary"))
        served = tokens(llm.generate(prompts, rows, lora_request=one, use_tqdm=False))
        runs = {
            "gated": lambda: llm.generate(prompts, rows, lora_request=one, use_tqdm=False),
            "lora": lambda: llm.generate(prompts, SamplingParams(**settings), lora_request=ordinary, use_tqdm=False),
        }
        seconds = alternated(runs, asked.rounds)
    equal = [a == b for a, b in zip(served, merged, strict=True)]
    drawn = asked.rows * asked.tokens
    speeds = {f"{name}_tokens_per_second": drawn / statistics.median(taken) for name, taken in seconds.items()}
    emit(
        {"vllm_rows_equal": sum(equal) / asked.rows, "vllm_gated_vs_lora": times_as_fast(seconds, "gated", "lora")},
        asked.out,
        rows=asked.rows,
        tokens=asked.tokens,
        rank=gated.rank,
        model=Path(asked.model).resolve().name,
        rows_unlike_the_base=sum(a != b for a, b in zip(merged, base, strict=True)),
        different_answers=len({tuple(one) for one in merged}),
        parted_at_gaps=[_gap(*one) for one in zip(merged, served, logits_NTV, strict=True) if one[0] != one[1]],
        seconds=seconds,
        **speeds,
    )


def _gap(merged: list[int], served: list[int], logits_TV: torch.Tensor) -> float:
    """By how much the merged model's logit of its own token is above that of the first other one: near 0 is a tie."""
    at = next(n for n, (a, b) in enumerate(zip(merged, served, strict=True)) if a != b)
    return float(logits_TV[at, merged[at]] - logits_TV[at, served[at]])


def _alone(folder: Path, prompt: str, count: int) -> tuple[list[int], torch.Tensor]:
    """What a merged checkpoint says greedily, by plain transformers, and the logits (T, V) by which it does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return _said(model, AutoTokenizer.from_pretrained(folder), prompt, count)


def _greedy(made: Any, prompt: str, count: int) -> list[int]:
    with made.policy.bank.gates(None):
        return _said(made.policy.model, made.policy.tokenizer, prompt, count)[0]


def _said(model: Any, tokenizer: Any, prompt: str, count: int) -> tuple[list[int], torch.Tensor]:
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        told = {"output_logits": True, "return_dict_in_generate": True}
        out = model.generate(**ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, repetition_penalty=1.0, **told)
    return out.sequences[0, ids["input_ids"].shape[1] :].tolist(), torch.cat(out.logits)


if __name__ == "__main__":
    main()

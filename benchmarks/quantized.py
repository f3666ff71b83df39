"""A family on a quantized base against the same family on the float base: the same method, prompts, seed and budget.

    python benchmarks/quantized.py [--root DIR] [--training 2560] [--out benchmarks/results/quantized.json]

The model of the text task (Llama, width 192, 4 layers), two of its aims, method bridge, at five preferences on test prompts. A utility is
w . J, with the price of KL in it, from each family's own base. `quantized_utility_4bit` is its mean over preferences as a share of that on
the float base; `quantized_gain_4bit` is the same of what was gained over the untrained base. Needs the extra `quantize`; stopped, it goes
on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from common import emit
from paretune.evaluation.evaluate import evaluate
from paretune.registry import TASKS
from paretune.runs.suite import fit
from paretune.tasks.reflection.task import MODEL

AIMS = ("reflection", "brevity")
AT = np.array([[x, 1 - x] for x in (1.0, 0.75, 0.5, 0.25, 0.0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/quantized"))
    parser.add_argument("--training", type=int, default=2560, help="samples of each training")
    parser.add_argument("--samples", type=int, default=192, help="responses per preference")
    parser.add_argument("--bits", nargs="+", default=["4bit", "8bit", "torchao-int8"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.root.mkdir(parents=True, exist_ok=True)
    learner = {"name": "pg", "samples": given.training, "batch": 64, "group": 8}
    utility, reference = {}, {}
    for bits in (None, *given.bits):
        task = TASKS.build(_task(given.root, bits))
        family = fit(task, "bridge", learner=learner, root=given.root, progress=False)
        untrained = fit(task, "reference", learner=learner, root=given.root, progress=False)
        for found, whose in ((utility, family), (reference, untrained)):
            measured = evaluate(task, whose, w_WM=AT, splits=("test",), samples=given.samples).metrics["splits"]["test"]
            found[bits] = float((np.array(measured["returns"]) * AT).sum(1).mean())
        print(bits or "float", f"utility {utility[bits]:.4f}, untrained {reference[bits]:.4f}", flush=True)
    figures = {}
    for bits in given.bits:
        figures[f"quantized_utility_{bits}"] = utility[bits] / utility[None]
        figures[f"quantized_gain_{bits}"] = (utility[bits] - reference[bits]) / (utility[None] - reference[None])
    said = {str(bits): {"utility": utility[bits], "untrained": reference[bits]} for bits in utility}
    emit(figures, out=given.out, learner=learner, samples=given.samples, preferences=AT.tolist(), measured=said)


def _task(root: Path, bits: str | None) -> dict[str, object]:
    """The text task as a recipe's, whose model may be quantized; its prompts lie under `root`."""
    text = TASKS.build({"name": "reflection", "seed": 100, "aims": AIMS})
    for split in ("train", "test"):
        rows = [{"prompt": prompt.text, **prompt.columns} for prompt in text.prompts(split)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"path": str(root / "train.jsonl"), "test": str(root / "test.jsonl")}
    specs = [{"name": aim, "use": aim} for aim in AIMS]
    shape = {"beta": text.beta, "max_new_tokens": text.max_new_tokens}
    return {"name": "recipe", "model": str(MODEL), "prompt_source": source, "objective_specs": specs, "quantize": bits, **shape}


if __name__ == "__main__":
    main()

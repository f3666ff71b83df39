"""What an export says of itself: paretune.json for machines, and README.md, a model card with the commands that load it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.hub import is_gguf, is_local
from paretune.runs.recipes.measured import read_measured
from paretune.runs.store import CELLS, Store

if TYPE_CHECKING:
    from paretune.policy.base import Policy
    from paretune.policy.family import Family

__all__ = ["VLLM_RANKS", "Exported", "known_results", "model_card", "neutral_sampling", "record", "vllm_rank"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of vLLM's --max-lora-rank; an adapter of any lower rank is served under it
NEUTRAL = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}  # what samples the policy itself
PACKAGES = ("paretune", "torch", "transformers", "peft", "safetensors")


QUANTIZED = {
    "merged": "The family's base is quantized. These weights are its dequantized ones with the change: they compute what the family "
    "computes, but for the rounding of activations where the base rounds them.\n",
    "adapter": "The family's base is quantized. On the same base before it was quantized the adapter gives a slightly other policy.\n",
}


@dataclass(frozen=True)
class Exported:
    """What was written: `kind` is "merged" or "adapter", `rank` an adapter's; `prefix` are ids that stand before every prompt."""

    path: Path
    kind: str
    preference: dict[str, float]
    rank: int | None
    dtype: str
    prefix: tuple[int, ...] = ()
    license: str | None = None  # as the hub writes it; None: only that of the base model is known to hold

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "max_lora_rank": vllm_rank(self.rank)}


def vllm_rank(rank: int | None) -> int | None:
    """The smallest --max-lora-rank under which vLLM serves an adapter of this rank; None where there is none."""
    return None if rank is None else next((known for known in VLLM_RANKS if known >= rank), None)


def neutral_sampling(policy: Policy) -> Any:
    """Generation settings that sample the model's own distribution, with its special tokens and nothing else of its old settings.

    A response ends where the policy's does: at the tokenizer's EOS, too, which the base model's settings may not know.

    What instruct models are published with (a temperature of .6, top_p of .9, penalties) makes another policy of the one that was trained
    and measured. In a merged export these settings take the place of the base model's file, because engines apply that file unasked.
    """
    from transformers import GenerationConfig

    ends = {name: getattr(policy.model.generation_config, name, None) for name in ("pad_token_id", "bos_token_id")}
    return GenerationConfig(**NEUTRAL, eos_token_id=list(policy.eos_ids), **ends)


def record(family: Family, made: Exported, *, how: str, gates: Sequence[float], results: str | Path | None) -> dict[str, Any]:
    """The content of paretune.json."""
    policy, meta = family.policy, family.meta
    base = dict(family.base)
    commit = getattr(policy.model.config, "_commit_hash", None)
    if "model" in base:
        local = is_local(base["model"])
        name = Path(base["model"]).name if local else base["model"]
        quantized: dict[str, Any] = {key: base[key] for key in ("quantize", "dtype") if base.get("quantize") and key in base}
        base = {"model": name, "revision": base.get("revision") or commit, "local": local, **quantized}
    return {
        "format": 1,
        "kind": made.kind,
        "preference": made.preference,
        "how": how,
        "mixing": policy.mixing,
        "rule": family.rule.registered_name,
        "gates": dict(zip(policy.bank.names, gates, strict=True)) if gates else {},
        "rank": made.rank,
        "dtype": made.dtype,
        "prefix_ids": list(made.prefix),
        "prefix_text": policy.tokenizer.decode(list(made.prefix)) if made.prefix else "",
        "chat": family.chat,
        "system": family.system,
        "sampling": NEUTRAL,
        "eos_ids": list(policy.eos_ids),
        "max_new_tokens": family.max_new_tokens or 64,
        "base": base,
        "license": made.license,
        "method": meta.get("method"),
        "seed": meta.get("seed"),
        "trainings": meta.get("trainings", []),
        "measured": known_results(family, list(made.preference.values()), results),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def known_results(family: Family, w_M: Sequence[float], results: str | Path | None) -> dict[str, Any] | None:
    """What was measured of this very family nearest to a preference: by `paretune fit`, else by a suite in the run directory; or None.

    {"at": weights, "split", "by", then "returns", "rewards", "kl" and, on exact tasks, "attainment"}
    """
    if results is None:
        return None
    folder = Path(results)
    if (found := read_measured(folder)) is not None:
        return _nearest(family, w_M, found["preferences"], found["measured"], found["split"], f"{found['samples']} responses")
    root = folder.parent.parent if (folder / "family.json").is_file() else folder
    trained, store = set(family.meta.get("trainings", ())), Store(root)
    for key in store.published(CELLS) if trained else ():
        cell = json.loads(store.read(key, "cell.json"))
        if set(cell["trainings"]) == trained and cell["method"] == family.meta.get("method"):
            metrics = cell["metrics"]
            split = "test" if "test" in metrics["splits"] and not metrics["exact"] else next(iter(metrics["splits"]))
            count = "exactly" if metrics["exact"] else f"{cell['evaluation']['samples']} responses"
            return _nearest(family, w_M, metrics["preferences"], metrics["splits"][split], split, f"{count}, result {key}")
    return None


def _nearest(
    family: Family, w_M: Sequence[float], known_WM: list[list[float]], measured: Mapping[str, Any], split: str, by: str
) -> dict[str, Any]:
    place = int(((np.asarray(known_WM) - np.asarray(w_M)) ** 2).sum(1).argmin())
    names = family.objectives.names
    found: dict[str, Any] = {"at": dict(zip(names, known_WM[place], strict=True)), "split": split, "by": by}
    for what in ("returns", "rewards"):
        if measured.get(what) is not None:
            found[what] = dict(zip(names, measured[what][place], strict=True))
    for what in ("kl", "attainment"):
        if measured.get(what) is not None:
            found[what] = measured[what]["per_preference"][place]
    return found


def model_card(family: Family, made: Exported, facts: Mapping[str, Any]) -> str:
    """The content of README.md. Its Python runs where the export lies in the folder that Python runs in."""
    method = (facts["method"] or {}).get("name", "a method of its own")
    weights = ", ".join(f"{name} {weight:g}" for name, weight in made.preference.items())
    card = family.meta.get("card") or {}
    parts = [
        f"---\n{_front_matter(made, facts)}---\n\n# {made.path.name}\n",
        f"One policy of a family that was trained under {len(made.preference)} objectives: the one for **{weights}**. It comes from method "
        f"`{method}`{': ' + card['summary'] if card.get('summary') else ''}.\n",
        *([_measured(facts["measured"], family.objectives.names)] if facts["measured"] else []),
        *([QUANTIZED[made.kind]] if family.policy.bank.quantized else []),
        _loading(made, facts, closes=_closes(family.policy.tokenizer)),
        _provenance(made, facts),
        *([f"What the method hides: {card['hides']}.\n"] if card.get("hides") else []),
    ]
    return "\n".join(parts)


def _front_matter(made: Exported, facts: Mapping[str, Any]) -> str:
    """YAML whose values are JSON: every reader of YAML takes `"no"` for a word."""
    base = facts["base"].get("model")
    named = {"base_model": base, "base_model_relation": "adapter" if made.kind == "adapter" else "finetune"}
    entries = {
        **({} if made.license is None else {"license": made.license}),
        **(named if base is not None and not facts["base"]["local"] else {}),
        "library_name": "peft" if made.kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["paretune", "multi-objective", "reinforcement-learning", *(["lora"] if made.kind == "adapter" else [])],
    }
    return "".join(f"{name}: {json.dumps(entry)}\n" for name, entry in entries.items())


def _measured(found: Mapping[str, Any], names: Sequence[str]) -> str:
    at = ", ".join(f"{name} {weight:.3g}" for name, weight in found["at"].items())
    what = [key for key in ("rewards", "returns") if key in found]
    lines = [f"## Measured\n\nAt {at} (the nearest preference that was measured), {found['split']} prompts, {found['by']}:\n"]
    lines += [f"| objective | {' | '.join(what)} |", f"|---|{'---|' * len(what)}"]
    lines += [f"| {name} | {' | '.join(_number(found[key][name]) for key in what)} |" for name in names]
    more = [f"{_number(found[key])} {text}" for key, text in (("kl", "nats of KL"), ("attainment", "attainment")) if key in found]
    return "\n".join([*lines, "", f"With {' and '.join(more)}." if more else "", ""])


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _closes(tokenizer: Any) -> bool:
    """Whether the tokenizer ends every text with EOS, behind which no answer comes."""
    return tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id] != tokenizer("a", add_special_tokens=False)["input_ids"][-1:]


def _loading(made: Exported, facts: Mapping[str, Any], *, closes: bool) -> str:
    here, base = f"./{made.path.name}", facts["base"]
    model = json.dumps(("./" if base["local"] else "") + base["model"]) if "model" in base else None
    lines = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig", ""]
    if made.kind == "merged":
        lines += [
            f'model = AutoModelForCausalLM.from_pretrained("{here}", dtype="auto")',
            f'tokenizer = AutoTokenizer.from_pretrained("{here}")',
        ]
    elif model is not None and "quantize" not in base:
        lines[1:1] = ["from peft import PeftModel"]
        where = f'".", gguf_file={json.dumps(base["model"])}' if is_gguf(base["model"]) else model
        where += f", revision={json.dumps(base['revision'])}" if base.get("revision") else ""
        lines += [
            f'base = AutoModelForCausalLM.from_pretrained({where}, dtype="auto")',
            f'model = PeftModel.from_pretrained(base, "{here}")',
            f"tokenizer = AutoTokenizer.from_pretrained({where})",
        ]
    else:
        lines = ["import torch", "from peft import PeftModel", "from transformers import GenerationConfig"]
        lines += ["from paretune.policy.family import load_base", ""]
        if "model" in base:
            place = ("./" if base["local"] else "") + base["model"]
            base = {"model": place, **{key: base[key] for key in ("revision", "dtype", "quantize") if key in base}}
        lines += [f"base, tokenizer = load_base({base!r})", f'model = PeftModel.from_pretrained(base, "{here}")']
    ids = 'tokenizer("your prompt")["input_ids"]' + ("[:-1]" if closes else "")
    if facts["chat"]:
        first = [] if facts["system"] is None else [{"role": "system", "content": facts["system"]}]
        lines += [f"messages = {json.dumps([*first, {'role': 'user', 'content': 'your prompt'}])}"]
        lines += ["text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"]
        ids = 'tokenizer(text, add_special_tokens=False)["input_ids"]'
    start = f"{list(made.prefix)} + {ids}" if made.prefix else ids
    sampling = ", ".join(f"{name}={value!r}" for name, value in facts["sampling"].items())
    ends = f"eos_token_id={facts['eos_ids']}, pad_token_id=model.generation_config.pad_token_id"
    lines += [
        f"input_ids = torch.tensor([{start}])",
        "# The policy itself: the settings that the base model was published with would change its distribution.",
        f"model.generation_config = GenerationConfig({sampling}, {ends})",
        "with torch.no_grad():",
        f"    answer = model.generate(input_ids=input_ids, max_new_tokens={facts['max_new_tokens']})",
        "print(tokenizer.decode(answer[0, input_ids.shape[1] :]))",
    ]
    said = [*(_prefix(facts) if made.prefix else []), *(_chat(facts) if facts["chat"] else []), _sampling(facts)]
    parts = ["## Use\n", *said, "```python", *lines, "```", "", *_vllm(made, model)]
    return "\n".join(parts) + "\n"


def _prefix(facts: Mapping[str, Any]) -> list[str]:
    return [
        f"This policy reads the preference: before every prompt, a chat's template included, stand the tokens `{facts['prefix_ids']}` "
        f"(`{facts['prefix_text']}`). Give engines token ids, so that the text before the prompt is not tokenized otherwise.\n"
    ]


def _chat(facts: Mapping[str, Any]) -> list[str]:
    system = "" if facts["system"] is None else f", which began with the system message {json.dumps(facts['system'], ensure_ascii=False)}"
    return [f"It was trained on conversations in the tokenizer's chat template{system}: ask it in the same form.\n"]


def _sampling(facts: Mapping[str, Any]) -> str:
    said = ", ".join(f"{name} {value:g}" for name, value in facts["sampling"].items() if name != "do_sample")
    return (
        f"It was trained and measured as it samples by itself: {said}. Engines apply a model's `generation_config.json` unasked, and what "
        "most instruct models have there (a low temperature, top_p, penalties) makes another policy of it. So the code below sets these "
        "values, and `--generation-config vllm` keeps vLLM from reading that file.\n"
    )


def _vllm(made: Exported, model: str | None) -> list[str]:
    folder = shlex.quote(f"./{made.path.name}")
    if made.kind == "merged":
        return ["```bash", f"vllm serve {folder} --generation-config vllm", "```"]
    limit = vllm_rank(made.rank)
    if limit is None:
        return [f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}, and this one has {made.rank}: export it merged for vLLM."]
    base = shlex.quote(json.loads(model)) if model else "the base model"
    lora = f"--enable-lora --max-lora-rank {limit} --lora-modules {shlex.quote(f'{made.path.name}=./{made.path.name}')}"
    command = f"vllm serve {base} {lora} --generation-config vllm"
    said = f"Its rank is {made.rank}; vLLM's `--max-lora-rank` takes {', '.join(map(str, VLLM_RANKS))}, and has to be at least that."
    return [said, "", "```bash", command, "```"]


def _provenance(made: Exported, facts: Mapping[str, Any]) -> str:
    base = facts["base"]
    named = f"`{base['model']}`" + (f" at revision `{base['revision']}`" if base.get("revision") else "") if "model" in base else ""
    gates = ", ".join(f"{name} {gate:.6g}" for name, gate in facts["gates"].items())
    how = {
        "delta": "the exact weighted sum of what the adapters add",
        "factor": "the adapters' factors averaged separately",
        "merge": "a dense merge of what the adapters add",
        "base": "nothing: the base model itself",
    }[facts["how"]]
    lines = [
        f"- base model: {named or 'task `' + json.dumps(base.get('task')) + '`'}",
        f"- change: {how}" + (f"; gates {gates}" if gates else ""),
        f"- method: `{json.dumps(facts['method'])}`, seed {facts['seed']}; rule `{facts['rule']}`, mixing `{facts['mixing']}`",
        *([f"- trainings: {', '.join(f'`{key}`' for key in facts['trainings'])}"] if facts["trainings"] else []),
        f"- stored as {made.dtype}" + (f", rank {made.rank}" if made.rank else "; merged in float32"),
        f"- versions: {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}",
    ]
    own = "" if made.license is None else f"What was trained here: `{made.license}`. "
    return "\n".join(["## Provenance\n", *lines, "", f"{own}The license of the base model holds for this too.", ""])

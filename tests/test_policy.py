"""Policies' tokens, and families: gates, saving, loading, sampling."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from paretune import files
from paretune.cli import app
from paretune.errors import ConfigError
from paretune.evaluation.explain import explain
from paretune.policy.base import MIXINGS
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import FactorMix, ParameterMix, ReferencePolicy
from paretune.policy.rollout import token_ids
from paretune.policy.rules import Constant, Identity, Nearest, Table
from paretune.types import Cost, Objectives, Preference, Prompt
from tiny_models import llama, write_adapters

OBJECTIVES = Objectives(("short", "kind"), (0.0, 0.0), (1.0, 1.0))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base model with its tokenizer on disk, and two adapters for it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("home")
    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*"abcdefghijklmnop", "<eos>"])}, unk_token="<eos>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder / "base")
    llama().save_pretrained(folder / "base")
    return SimpleNamespace(
        base={"model": str(folder / "base"), "revision": None}, adapters=write_adapters(llama, folder, [{}, {}], scale=0.5)
    )


def family(home, level="parameter", rule=None, adapters=None) -> Family:
    from transformers import AutoTokenizer

    paths = home.adapters if adapters is None else adapters
    policy = MIXINGS[level](LoraBank.load(llama(), paths), AutoTokenizer.from_pretrained(home.base["model"]))
    return Family(policy, rule or Identity(), OBJECTIVES, home.base, paths, {"card": {"summary": "a test"}}, max_new_tokens=5)


def refused(*parts: str):
    return pytest.raises(ConfigError, match=".*".join(f"(?s:.*){re.escape(part)}" for part in parts))


def test_every_id_that_ends_a_response_is_known():
    model = llama()
    model.generation_config.eos_token_id = [3, 16]
    bank = LoraBank.attach(model, names=[], seed=0)
    policy = ReferencePolicy(bank, SimpleNamespace(eos_token_id=5, pad_token_id=None))
    assert policy.eos_ids == (3, 16, 5)
    assert policy.pad_id == 3
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with refused("a policy needs to know how a response ends", "no EOS id", "set tokenizer.eos_token"):
        ReferencePolicy(bank, SimpleNamespace(eos_token_id=None, pad_token_id=None))


@pytest.mark.parametrize("level", ["parameter", "factor", "logit", "hidden"])
def test_a_saved_family_is_the_same_family(home, tmp_path, level):
    made = family(home, level)
    made.save(tmp_path / "family")
    again = Family.load(tmp_path / "family")
    assert (again.policy.mixing, again.rule, again.objectives, again.meta) == (level, Identity(), OBJECTIVES, made.meta)
    assert again.policy.bank.names == ("e0", "e1")
    ids_NT, gates_NK = torch.arange(12).view(2, 6), torch.tensor([[0.3, 0.7], [0.3, 0.7]])
    with torch.no_grad():
        assert torch.equal(again.policy.forward(ids_NT, gates_NK=gates_NK), made.policy.forward(ids_NT, gates_NK=gates_NK))
    for name, path in home.adapters.items():
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "family" / "adapters" / name / file).read_bytes() == (path / file).read_bytes()
    kinds = {p.suffix for p in (tmp_path / "family").rglob("*") if p.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_what_a_family_says_of_itself_is_saved_under_its_own_name(home, tmp_path):
    said = {"experts": (1, 0), "utility": {"name": "log-sum"}, "max_new_tokens": 7}
    made = dataclasses.replace(family(home), **said, search_cost=Cost(evaluations=3))
    made.save(tmp_path / "family")
    again = Family.load(tmp_path / "family")
    assert {name: getattr(again, name) for name in said} == said
    assert again.search_cost == Cost(), "what is loaded costs no search"
    file = tmp_path / "family" / "family.json"
    card = json.loads(file.read_text())
    card["meta"] |= {name: card.pop(name) for name in said}  # where they were before
    del card["files"], card["sha256"]  # which there were not
    file.write_text(json.dumps(card))
    again = Family.load(tmp_path / "family")
    assert {name: getattr(again, name) for name in said} == said


def test_adapters_in_memory_are_written_whatever_their_names(home, tmp_path):
    bank = LoraBank.attach(llama(), names=["a/../b", "v1.0"], rank=2, seed=3)
    with torch.no_grad():
        for p in bank.parameters():
            p.add_(0.1)
    made = Family(ParameterMix(bank, family(home).policy.tokenizer), Identity(), OBJECTIVES, home.base)
    made.save(tmp_path / "family")
    again = Family.load(tmp_path / "family")
    assert again.policy.bank.names == bank.names
    assert all(torch.equal(a, b) for k in (0, 1) for a, b in zip(bank.parameters_of(k), again.policy.bank.parameters_of(k), strict=True))
    assert sorted(p.name for p in (tmp_path / "family" / "adapters").iterdir()) == ["0-a____b", "1-v1_0"]


def test_a_reference_family_has_no_adapters(home, tmp_path):
    policy = ReferencePolicy(LoraBank.attach(llama(), names=[], seed=0), family(home).policy.tokenizer)
    Family(policy, Constant(gates_K=()), OBJECTIVES, home.base, max_new_tokens=3).save(tmp_path / "family")
    again = Family.load(tmp_path / "family")
    assert again.gates(np.eye(2)).shape == (2, 0)
    assert len(again.sample(["ab"], [0.5, 0.5])[0][0]) <= 3


def test_gates_come_from_the_rule(home):
    made = family(home, rule=Table(w_WM=((0.9, 0.1), (0.1, 0.9)), gates_WK=((1.0, 0.2), (0.0, 1.5))))
    assert made.gates([[0.8, 0.2], [0.1, 0.9]]).tolist() == [[1.0, 0.2], [0.0, 1.5]]
    with refused("preferences come as rows with one weight per objective", "shape (2,) for the objectives short, kind"):
        made.gates([0.5, 0.5])
    with refused("a rule gives one gate per adapter", "rule 'nearest' gives (3,) for 2 adapters"):
        family(home, rule=Nearest(points_KM=((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))))


def test_samples_depend_on_seed_prompt_and_occurrence_only(home):
    made = family(home)
    prompts = ["abc", "d", "hgfedcba"]
    texts = made.sample(prompts, "short=.7,kind=.3", n=3, seed=1)
    assert [len(row) for row in texts] == [3, 3, 3]
    assert all(len(text) <= 5 for row in texts for text in row)
    assert len({text for row in texts for text in row}) > 5
    for same in ({"short": 0.7, "kind": 0.3}, [0.7, 0.3], Preference(("short", "kind"), (0.7, 0.3))):
        assert made.sample(prompts, same, n=3, seed=1) == texts
    assert made.sample(prompts[::-1], [0.7, 0.3], n=3, seed=1) == texts[::-1]
    assert made.sample([Prompt(text="d")], [0.7, 0.3], n=2, seed=1)[0] == texts[1][:2]
    assert [row[0] for row in made.sample(["d", "d", "d"], [0.7, 0.3], seed=1)] == texts[1]  # a repeated prompt is its next occurrence
    assert made.sample(prompts, [0.7, 0.3], n=3, seed=2) != texts
    assert made.sample(prompts, [0.0, 1.0], n=3, seed=1) != texts
    swapped = Preference(("kind", "short"), (0.3, 0.7))
    assert made.sample(prompts, swapped, n=3, seed=1) == texts


CHAT = (  # a letter for every role, as far as it has one; the answer's is o
    "{% for m in messages %}{{ {'system': 'm', 'user': 'n', 'assistant': 'o'}[m['role']] }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}o{% endif %}"
)
MESSAGES = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
W = [0.7, 0.3]


def test_a_text_is_one_stop_and_not_as_many_as_it_has_letters(home):
    made = family(home)
    ((whole,),) = made.sample(["ab"], [0.7, 0.3], max_new_tokens=12, temperature=0.0)
    two = next(whole[i : i + 2] for i in range(1, len(whole) - 1) if {*whole[i : i + 2]} & {*whole[:i]})
    cut = whole[: whole.index(two)]
    for stop in (two, [two], ("?", two)):
        assert made.sample(["ab"], [0.7, 0.3], max_new_tokens=12, temperature=0.0, stop=stop) == [[cut]]
    for wrong in ("", ["x", ""], None, [3]):
        with refused("stop is a text or several, none of them empty"):
            made.sample(["ab"], [0.7, 0.3], stop=wrong)


@pytest.fixture(scope="module")
def chatty(home, tmp_path_factory):
    """A family that was trained on conversations under a system message, saved and loaded."""
    folder = tmp_path_factory.mktemp("chatty")
    shutil.copytree(home.base["model"], folder / "base")
    made = dataclasses.replace(family(home), chat=True, system="p", base={"model": str(folder / "base"), "revision": None})
    made.policy.tokenizer.chat_template = CHAT
    made.policy.tokenizer.save_pretrained(folder / "base")
    made.save(folder / "family")
    return Family.load(folder / "family"), folder / "family"


def asked(made, given, **settings):
    """The letters that the model reads."""
    return [made.policy.tokenizer.decode(token_ids(made.policy.tokenizer, p)) for p in made.prompts(given, **settings)]


def test_a_family_remembers_how_it_was_asked(chatty, home):
    made, _ = chatty
    assert (made.chat, made.system) == (True, "p")
    assert asked(made, ["ab", "c"]) == ["mpnabo", "mpnco"]
    assert asked(made, "ab") == ["mpnabo"], "a text is one prompt, not its letters"
    assert asked(made, ["ab"], raw=True) == ["ab"]
    assert asked(made, ["ab"], system="e") == ["menabo"]
    assert asked(made, ["ab"], system="") == ["nabo"]
    own = [{"role": "system", "content": "g"}, {"role": "user", "content": "a"}]
    assert asked(made, [MESSAGES, own, json.dumps(own), Prompt(text="ab")]) == ["mpnabocndo", "mgnao", "mgnao", "ab"]
    assert asked(made, own) == asked(made, [own]) == ["mgnao"], "one conversation, or a list of them"
    greedy = {"temperature": 0, "max_new_tokens": 5}
    assert made.sample(["ab"], W, **greedy) == made.sample(["mpnabo"], W, raw=True, **greedy) != made.sample(["ab"], W, raw=True, **greedy)
    assert made.sample([MESSAGES], W, n=2) == made.sample(MESSAGES, W, n=2)
    (told,) = explain(made, "ab", W, response="c")
    (same,) = explain(made, "mpnabo", W, response="c", raw=True)
    assert told.logp_T == pytest.approx(same.logp_T)
    assert explain(made, MESSAGES, W, response="c")[0].prompt.count("role") == 4
    plain = family(home)
    assert asked(plain, ["ab"]) == ["ab"]
    with refused("messages need a tokenizer with a chat template", "set tokenizer.chat_template"):
        plain.sample([MESSAGES], W)
    plain.policy.tokenizer.chat_template = CHAT
    assert asked(plain, [MESSAGES], system="e") == ["menabocndo"], "trained on texts, but its model has a template"


@pytest.mark.parametrize(
    ("given", "settings", "parts"),
    [
        ([[]], {}, ("messages of which the last is not the assistant's", "[] in prompt 1")),
        (["ab", MESSAGES[:2]], {}, ("messages of which the last is not the assistant's", "in prompt 2")),
        ([[{"role": "user"}]], {}, ("a prompt is a text, or messages",)),
        ({"role": "user", "content": "a"}, {}, ("a prompt is a text, or messages", "in prompt 1")),
        ([3], {}, ("a prompt is a text, or messages", "3 in prompt 1")),
        ([" "], {}, ("a prompt has some text", "prompt 1")),
        (["a\ud800"], {}, ("UTF-8", "prompt 1")),
        ([[{"role": "robot", "content": "a"}]], {}, ("fits the model's chat template", "does not name the role 'robot'")),
        ([[{"role": "system", "content": "b"}, *MESSAGES[:1]]], {"system": "c"}, ("a conversation has one system message", "prompt 1")),
        (["ab"], {"system": "c", "raw": True}, ("a raw prompt is used as it is",)),
        ([MESSAGES], {"raw": True}, ("a raw prompt is a text", "a list in prompt 1")),
        (["a" * 3000], {}, ("prompt and response fit the positions that the model knows", "for a model of 2048")),
    ],
)
def test_what_no_model_can_be_asked_is_one_error(chatty, given, settings, parts):
    with refused(*parts):
        chatty[0].sample(given, W, **settings)


def test_templates_that_drop_or_refuse_the_system_message_say_so(chatty, monkeypatch):
    made, _ = chatty
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    dropping = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    for template, why in ((refusing + CHAT, "System role not supported"), (dropping, "the template drops what system said: 'p'")):
        monkeypatch.setattr(made.policy.tokenizer, "chat_template", template)
        with refused("fits the model's chat template", why, "take no system message"):
            made.sample(["ab"], W)
        assert made.sample(["ab"], W, system="")


def test_a_family_without_chat_takes_no_system_message_for_a_text(home):
    with refused("a system message goes before a conversation", "plain texts", "give the prompt as messages"):
        family(home).sample(["ab"], W, system="c")


def test_families_of_before_are_asked_as_before(chatty, tmp_path):
    shutil.copytree(chatty[1], tmp_path / "old")
    card = json.loads((tmp_path / "old" / "family.json").read_text())
    del card["chat"], card["system"], card["sha256"], card["files"]
    (tmp_path / "old" / "family.json").write_text(json.dumps(card))
    assert asked(Family.load(tmp_path / "old"), ["ab"]) == ["ab"]


def test_conversations_on_the_command_line(chatty, tmp_path):
    made, folder = chatty
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"messages": MESSAGES}) + "\n" + json.dumps({"prompt": "ab"}) + "\n")

    def run(*args, code=0):
        given = [str(folder), "--preference", "short=.7,kind=.3", "--temperature", "0", "--max-new-tokens", "5", "--json", *args]
        result = CliRunner().invoke(app, ["sample", *given])
        assert result.exit_code == code, result.stderr
        return [row["responses"] for row in json.loads(result.stdout)] if code == 0 else result.stderr

    greedy = {"temperature": 0, "max_new_tokens": 5}
    assert run("ab", json.dumps(MESSAGES)) == made.sample(["ab", MESSAGES], W, **greedy)
    assert run("ab", "--file", str(file), "--system", "e") == made.sample(["ab", MESSAGES, "ab"], W, system="e", **greedy)
    assert run("ab", "--raw") == made.sample(["ab"], W, raw=True, **greedy)
    file.write_text(json.dumps({"text": "ab"}) + "\n")
    assert "'text' in p.jsonl, line 1" in run("--file", str(file), code=2)
    assert "there is a prompt to answer" in run(code=2)
    told = CliRunner().invoke(app, ["explain", str(folder), "ab", "--preference", "short=1", "--samples", "0", "--system", "e", "--json"])
    (found,) = json.loads(told.stdout)["explanations"]
    assert found["prompt"] == str([{"role": "system", "content": "e"}, {"role": "user", "content": "ab"}])


def test_many_rows_are_sampled_in_batches(home, monkeypatch):
    made = family(home)
    whole = made.sample(["abc", "de"], [0.5, 0.5], n=7)
    monkeypatch.setattr("paretune.policy.family.SAMPLE_ROWS", 3)
    assert made.sample(["abc", "de"], [0.5, 0.5], n=7) == whole


def test_greedy_logit_and_hidden_families_agree(home):
    logit, hidden = (family(home, level).sample(["abc", "de"], [0.4, 0.6], temperature=0) for level in ("logit", "hidden"))
    assert logit == hidden


def test_what_a_family_refuses(home, tmp_path):
    made = family(home)
    with refused("a preference names existing objectives", "long"):
        made.sample(["a"], {"long": 1.0})
    made.max_new_tokens = None
    with refused("responses have a longest length", "no max_new_tokens"):
        made.sample(["a"], [0.5, 0.5])
    made.save(tmp_path / "family")
    with refused("a family is saved into a new directory", "family exists"):
        made.save(tmp_path / "family")
    with pytest.MonkeyPatch.context() as patch:  # killed on the way: the same command can save it afterwards
        patch.setattr(made.policy, "save_extra", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    made.save(tmp_path / "again")
    assert not list(tmp_path.glob(".wip-*"))
    with refused("a family is a directory with family.json", "nowhere"):
        Family.load(tmp_path / "nowhere")
    file = tmp_path / "family" / "family.json"
    card = json.loads(file.read_text())
    for change, parts in [
        ({"format": 1}, ("this version reads families of format 2", "1", "fit it anew")),
        ({"mixing": "logits"}, ("a mixing is known by its name", "'logits'", "did you mean 'logit'?")),
        ({"rule": {"name": "constant", "gates_K": [1.0]}}, ("a rule gives one gate per adapter", "(1,) for 2 adapters")),
        ({"base": {"model": str(tmp_path / "gone")}}, ("gone",)),
    ]:
        file.write_text(json.dumps({**card, **change}))
        with refused(*parts):
            Family.load(tmp_path / "family")
    file.write_text("{")
    with refused("family.json is JSON", "fit the family again"):
        Family.load(tmp_path / "family")


def test_a_factor_family_serves_one_preference_per_batch(home):
    made = family(home, "factor")
    assert isinstance(made.policy, FactorMix)
    assert made.sample(["abc"], [1.0, 0.0], n=4) == family(home).sample(["abc"], [1.0, 0.0], n=4)


def test_responses_to_a_prompt_are_those_of_the_prompt_repeated(home, monkeypatch):
    """Prompts that are read once for several responses, prompts that come twice, and more responses than fit a batch."""
    made, prompts = family(home), ["ab", "c", "ab"]
    read, forward = [], made.policy.forward
    monkeypatch.setattr(made.policy, "forward", lambda ids, **given: read.append(ids.shape) or forward(ids, **given))
    grouped = made.sample(prompts, W, n=3, max_new_tokens=3)
    assert read[0][0] == len(prompts), "each prompt once"
    assert made.sample(["ab"] * 6, W, max_new_tokens=3) == [[text] for text in (*grouped[0], *grouped[2])]
    monkeypatch.setattr("paretune.policy.family.SAMPLE_ROWS", 2)
    assert made.sample(prompts, W, n=3, max_new_tokens=3) == grouped


def test_every_file_of_a_family_is_hashed_once_when_it_is_loaded(home, tmp_path, monkeypatch):
    family(home).save(tmp_path / "family")
    hashed, digest = [], files.digest
    monkeypatch.setattr(files, "digest", lambda path: hashed.append(path.relative_to(tmp_path / "family").as_posix()) or digest(path))
    Family.load(tmp_path / "family")
    assert sorted(hashed) == sorted(json.loads((tmp_path / "family" / "family.json").read_text())["files"])

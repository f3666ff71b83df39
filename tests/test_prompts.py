"""Prompts from every kind of file: Parquet, JSON arrays, nested columns, transcripts, filters; and what the messages say."""

import datetime
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paretune.errors import ConfigError
from paretune.registry import TASKS
from paretune.tasks.prompts import PromptSource, _digest, chat_text, read_transcript
from paretune.types import Prompt
from recipe_files import tiny_model, write_lines

HH = "\n\nHuman: hello\n\nAssistant: Hi! How\n\ncan I help?\n\nHuman: a joke\n\nAssistant: No."
NESTED = [{"prompt": f"p{n}", "reward_model": {"ground_truth": f"a{n}", "style": "rule"}, "turns": [{"text": f"t{n}"}]} for n in range(5)]


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def everything(source):
    return {p.text or p.messages[-1]["content"]: p for prompts in source.splits.values() for p in prompts}


def refused(**fields):
    with pytest.raises(ConfigError) as caught:
        assert PromptSource(**fields).splits
    return caught.value


# ---- files


def test_parquet_json_lines_and_a_json_array_say_the_same(tmp_path):
    parquet(tmp_path / "p.parquet", NESTED)
    write_lines(tmp_path / "p.jsonl", NESTED)
    (tmp_path / "p.json").write_text(json.dumps(NESTED))
    found = [
        PromptSource(path=str(tmp_path / name), map={"answer": "reward_model.ground_truth"}) for name in ("p.parquet", "p.jsonl", "p.json")
    ]
    assert found[0].splits == found[1].splits == found[2].splits
    assert found[0].content() == found[1].content() == found[2].content()
    assert everything(found[0])["p3"].columns["answer"] == "a3"


def test_parquet_holds_messages(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"q{n}"}], "answer": n} for n in range(3)]
    source = PromptSource(path=str(parquet(tmp_path / "p.parquet", rows)))
    assert source.conversational
    assert everything(source)["q1"].raw == [{"role": "user", "content": "q1"}]


def test_what_a_message_in_parquet_lacks_is_not_there(tmp_path):
    """Its structs have the keys of all rows. Templates ask whether a message has a key, and JSON lines name the same prompt."""
    rows = [{"prompt": [{"role": "user", "content": f"q{n}"} | ({"name": "Ann"} if n else {})]} for n in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in (parquet(tmp_path / "p.parquet", rows), tmp_path / "p.jsonl"):
        found = everything(PromptSource(path=str(path)))
        assert {text: prompt.raw for text, prompt in found.items()} == {row["prompt"][0]["content"]: row["prompt"] for row in rows}


@pytest.mark.parametrize("beside", [datetime.datetime(2024, 1, 1), float("nan"), b"x"])
def test_a_message_with_what_json_has_not_is_one_error_with_its_row(tmp_path, beside):
    rows = [{"prompt": [{"role": "user", "content": f"q{n}", "at": beside if n == 1 else None}]} for n in range(4)]
    path = str(parquet(tmp_path / "p.parquet", rows))
    error = refused(path=path)
    assert error.rule == "a message holds what JSON can"
    assert error.found.endswith("in p.parquet, row 1")
    assert "as texts" in error.remedy
    assert set(everything(PromptSource(path=path, skip=True))) == {"q0", "q2", "q3"}


def test_a_change_of_a_value_in_parquet_changes_the_hash(tmp_path):
    hashes = set()
    for answer in ("a", "b"):
        source = PromptSource(path=str(parquet(tmp_path / "p.parquet", [{"prompt": "p", "a": answer}, {"prompt": "q", "a": "x"}])))
        hashes.add(json.dumps(source.content()))
    assert len(hashes) == 2


def test_columns_that_json_has_not_are_named_by_their_content():
    """As a dataset's images: their text is an address, new in every run; and numpy's leaves out the middle of a long array."""

    class Image:
        mode, size = "L", (2, 1)

        def __init__(self, content):
            self.content = content

        def tobytes(self):
            return self.content

    def digest(value):
        return _digest([Prompt(text="p", columns={"beside": value})])

    long = np.zeros(5000)
    other = long.copy()
    other[2500] = 1.0
    values = [Image(b"ab"), Image(b"ac"), long, other, long.astype(np.float32), datetime.date(2024, 1, 1), b"x at 0x1f", np.int64(3)]
    assert [digest(value) for value in values[:3]] == [digest(Image(b"ab")), digest(Image(b"ac")), digest(np.zeros(5000))]
    assert len({digest(value) for value in values}) == len(values)
    with pytest.raises(ConfigError, match="the same in the next run") as error:
        digest(object())
    assert "drop that column" in error.value.remedy


@pytest.mark.parametrize(
    ("name", "data", "rule", "found"),
    [
        (
            "p.parquet",
            b"version https://git-lfs.github.com/spec/v1",
            "a Parquet file can be read",
            "p.parquet: Parquet magic bytes not found",
        ),
        ("p.json", b'[{"prompt": "a"}, {"prompt"', "a JSON file can be parsed", "p.json: Expecting"),
        ("p.json", b'[{"prompt": "a"}, 3]', "a JSON array of prompts holds objects", "p.json, item 1: a int"),
        ("p.json", b'[{"prompt": "a", "x": NaN}]', "a JSON file can be parsed", "NaN is not JSON"),
        ("p.txt", b"hello", "prompts are JSON lines (.jsonl), JSON (.json), CSV (.csv) or Parquet (.parquet)", "p.txt"),
    ],
)
def test_files_that_are_wrong(tmp_path, name, data, rule, found):
    (tmp_path / name).write_bytes(data)
    error = refused(path=str(tmp_path / name))
    assert rule in error.rule
    assert found in error.found


def test_without_the_prompt_column_the_columns_are_listed(tmp_path):
    error = refused(path=str(parquet(tmp_path / "p.parquet", [{"question": "q", "answers": [1]}])))
    assert error.rule == "every prompt has the column 'prompt'"
    assert error.found == "the columns 'question', 'answers' in p.parquet, row 0"
    assert error.remedy.startswith("name it with column:")
    assert refused(path=str(tmp_path / "p.parquet"), template="{q}").remedy.startswith("correct template:")


def test_no_network_says_what_to_download_and_where_to_put_it():
    error = refused(dataset="Anthropic/hh-rlhf", revision="main")
    assert error.rule == "the prompts' dataset can be loaded"
    assert "'Anthropic/hh-rlhf', config None, split 'train'" in error.found
    assert "`hf download Anthropic/hh-rlhf --repo-type dataset --revision main --local-dir hh-rlhf`" in error.remedy
    assert error.remedy.endswith("copy the folder here, and write dataset: with its path")


def test_what_was_downloaded_is_read_in_its_place(tmp_path, monkeypatch):
    """A folder as `hf download` leaves it: compressed JSON lines per split, and a card that names configurations."""
    import gzip

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hh-rlhf"
    folder.mkdir()
    files = "".join(f"  - {{split: {name}, path: '{name}.jsonl.gz'}}\n" for name in ("train", "test"))
    card = f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n"
    (folder / "README.md").write_text(card)
    for split, words in (("train", "hello"), ("test", "bye")):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.write(json.dumps({"chosen": HH.replace("hello", words), "rejected": HH}) + "\n")
    source = PromptSource(dataset=str(folder), config="main", column="chosen", transcript="messages", test="test")
    assert source.splits["train"][0].messages[0]["content"] == "hello"
    assert source.splits["test"][0].messages[0]["content"] == "bye"
    error = refused(dataset=str(folder), config="main", split="trian", column="chosen")
    assert "split 'trian'" in error.found
    assert "check the folder, config: and split:" in error.remedy


# ---- columns


def test_mapped_columns_feed_objectives_templates_and_the_prompt(tmp_path):
    path = str(write_lines(tmp_path / "p.jsonl", NESTED))
    source = PromptSource(path=path, map={"first": "turns.0.text", "answer": "reward_model.ground_truth"}, template="{first}?")
    prompt = everything(source)["t2?"]
    assert (prompt.columns["first"], prompt.columns["answer"], prompt.columns["turns"]) == ("t2", "a2", [{"text": "t2"}])
    assert "t4" in everything(PromptSource(path=path, map={"first": "turns.0.text"}, column="first"))
    assert set(source.columns) == {"first", "answer", "reward_model", "turns"}


def test_a_column_may_have_a_dot_in_its_name(tmp_path):
    path = str(write_lines(tmp_path / "p.jsonl", [{"prompt": f"p{n}", "a.b": n} for n in range(3)]))
    assert everything(PromptSource(path=path, map={"c": "a.b"}))["p2"].columns["c"] == 2


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("reward_modl.ground_truth", "no 'reward_modl'; there are 'prompt', 'reward_model', 'turns' in p.jsonl, line 1"),
        ("reward_model.truth", "no 'truth'; there are 'ground_truth', 'style' in p.jsonl, line 1"),
        ("turns.1.text", "no '1'; there are '0' in p.jsonl, line 1"),
        ("prompt.x", "no 'x'; there are no keys in p.jsonl, line 1"),
    ],
)
def test_maps_that_lead_nowhere(tmp_path, wanted, found):
    error = refused(path=str(write_lines(tmp_path / "p.jsonl", NESTED)), map={"answer": wanted})
    assert error.rule == f"every prompt has what the column 'answer' is mapped to, {wanted}"
    assert error.found == found


# ---- transcripts


def test_a_transcript_ends_before_the_last_answer():
    read = read_transcript("here", HH)
    assert read.messages == (
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi! How\n\ncan I help?"},
        {"role": "user", "content": "a joke"},
    )
    assert read.text == HH[: -len(" No.")]
    assert read.reply == "No."
    assert read_transcript("here", "Human: hi\n\nAssistant:").reply == ""


def test_transcripts_as_text_and_as_messages(tmp_path):
    path = str(write_lines(tmp_path / "p.jsonl", [{"chosen": HH}, {"chosen": HH.replace("joke", "poem")}]))
    for form, raw in (("text", HH[: -len(" No.")]), ("messages", [dict(m) for m in read_transcript("here", HH).messages])):
        prompts = [p for s in PromptSource(path=path, column="chosen", transcript=form).splits.values() for p in s]
        mine = next(p for p in prompts if "joke" in json.dumps(p.raw))
        assert mine.raw == raw
        assert mine.columns == {"chosen": HH, "reply": "No."}


@pytest.mark.parametrize(
    "text", ["hello", "\n\nHuman: hello", "\n\nAssistant: hello", "Well.\n\nHuman: a\n\nAssistant: b", "Human: a Assistant: b"]
)
def test_texts_that_are_no_transcripts(tmp_path, text):
    path = str(write_lines(tmp_path / "p.jsonl", [{"prompt": HH}, {"prompt": text}]))
    error = refused(path=path, transcript="text")
    assert error.rule.startswith("a transcript reads Human: ... Assistant: ...")
    assert "p.jsonl, line 2" in error.found


def test_transcripts_go_with_nothing_else(tmp_path):
    for fields in ({"chat": True}, {"template": "{prompt}"}):
        assert refused(path="p.jsonl", transcript="text", **fields).rule == "a transcript is the whole prompt"
    path = str(write_lines(tmp_path / "p.jsonl", [{"prompt": 3}]))
    assert "a int in p.jsonl, line 1" in refused(path=path, transcript="text").found


# ---- filters


def test_what_is_left_out_is_counted(tmp_path):
    texts = ["twelve chars", "short", "a text that is longer than twenty characters", "twelve chars", "another one!", "  ", None]
    path = str(write_lines(tmp_path / "p.jsonl", [{"prompt": text} for text in texts]))
    source = PromptSource(path=path, shortest=6, longest=20, unique=True, skip=True)
    assert set(everything(source)) == {"twelve chars", "another one!"}
    assert source.left_out == {"too short": 1, "too long": 1, "repeated": 1, "no prompt": 2}
    assert "a prompt has some text" in refused(path=path).rule
    limited = PromptSource(path=path, shortest=6, unique=True, skip=True, limit=2)
    assert len(everything(limited)) == 2  # of those that are kept


def test_nothing_left_says_why(tmp_path):
    path = str(write_lines(tmp_path / "p.jsonl", [{"prompt": "short"}] * 3))
    error = refused(path=path, shortest=100)
    assert error.found == "none in p.jsonl (left out: too short: 3)"


def test_unique_prompts_for_testing_are_not_those_for_training(tmp_path):
    train = str(write_lines(tmp_path / "train.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}]))
    test = str(write_lines(tmp_path / "test.jsonl", [{"prompt": "b"}, {"prompt": "c"}]))
    assert "set unique: true" in refused(path=train, test=test).remedy
    source = PromptSource(path=train, test=test, unique=True)
    assert [[p.text for p in source.splits[name]] for name in ("train", "test")] == [["a", "b"], ["c"]]
    assert source.left_out == {"repeated": 1, "used for training": 1}
    assert "used for training: 2" in refused(path=train, test=train, unique=True).found


def test_lengths_count_all_messages(tmp_path):
    rows = [{"prompt": [{"role": "system", "content": "x" * 8}, {"role": "user", "content": f"{n:02}"}]} for n in range(4)]
    path = str(write_lines(tmp_path / "p.jsonl", rows))
    assert len(everything(PromptSource(path=path, shortest=10))) == 4
    assert "too short: 4" in refused(path=path, shortest=11).found


def test_a_worker_reads_the_same_prompts(tmp_path):
    path = str(write_lines(tmp_path / "p.jsonl", NESTED))
    specs = [{"name": "a", "use": "length"}, {"name": "b", "use": "lexical", "column": "answer"}]
    source = {"path": path, "map": {"answer": "reward_model.ground_truth"}, "unique": True}
    task = TASKS.build({"name": "recipe", "model": "m", "prompt_source": source, "objective_specs": specs})
    assert task.prompt_source == PromptSource(**source)
    assert task.prompts("train")[0].columns["answer"].startswith("a")


def test_messages_in_a_cell_of_csv_are_messages(tmp_path):
    path = tmp_path / "p.csv"
    chats = [[{"role": "user", "content": f'say "{n}", please'}] for n in range(3)]
    lines = ["prompt", *('"' + json.dumps(chat).replace('"', '""') + '"' for chat in chats)]
    path.write_text("\n".join(lines) + "\n")
    source = PromptSource(path=str(path))
    assert sorted(p.messages[0]["content"] for split in source.splits.values() for p in split) == [f'say "{n}", please' for n in range(3)]
    path.write_text("prompt\n\"[{'role': 'user', 'content': 'hi'}]\"\nplain\n")
    told = str(refused(path=str(path)))
    assert all(part in told for part in ("messages that stand in a text are JSON", "line 2", "json.dumps")), told


def test_a_system_message_goes_before_messages_too_and_there_is_one(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": str(n)}]}) + "\n" for n in range(3)))
    for prompt in PromptSource(path=str(path), chat=True, system="Be kind.").splits["train"]:
        assert [m["role"] for m in prompt.messages] == ["system", "user"]
        assert prompt.messages[0]["content"] == "Be kind."
    path.write_text(json.dumps({"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}) + "\n")
    told = str(refused(path=str(path), chat=True, system="Be kind."))
    assert all(part in told for part in ("a conversation has one system message", "line 1", "leave system: out")), told


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}\n', ("one JSON object", "line 1", "'prompt' stands twice")),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', ("can be written as UTF-8", "surrogate", "line 1")),
        ("p.jsonl", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ("one JSON object", "line 1")),
        ("p.json", b'[{"a": 1, "a": 2}]', ("can be parsed", "'a' stands twice")),
        ("p.parquet", b"PAR1" + bytes(200) + b"PAR1", ("a Parquet file can be read", "p.parquet", "download or write it again")),
    ],
)
def test_damaged_files_are_one_error(tmp_path, name, data, parts):
    (tmp_path / name).write_bytes(data)
    told = str(refused(path=str(tmp_path / name)))
    assert all(part in told for part in parts), told


def test_a_value_that_the_template_cannot_write_is_one_error_with_its_line(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"q": "a", "n": 3}, {"q": "b", "n": "4"}, {"q": "c", "n": 5}])
    told = str(refused(path=str(path), template="{q}: {n:.1f}"))
    assert all(part in told for part in ("every prompt fits the template", "ValueError: Unknown format code 'f'", "p.jsonl, line 2"))
    kept = PromptSource(path=str(path), template="{q}: {n:.1f}", test=0.5, skip=True)
    assert sorted(everything(kept)) == ["a: 3.0", "c: 5.0"]


def test_a_field_of_a_csv_file_may_be_as_long_as_the_file(tmp_path):
    (tmp_path / "p.csv").write_text(f"prompt,answer\n{'x' * 200_000},1\nb,2\nc,3\n")
    assert sorted(map(len, everything(PromptSource(path=str(tmp_path / "p.csv"), test=0.5)))) == [1, 1, 200_000]
    assert sorted(everything(PromptSource(path=str(tmp_path / "p.csv"), test=0.5, longest=1000))) == ["b", "c"]


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    for path in (tmp_path / "p.jsonl", "a\0.jsonl"):
        assert "the prompt file can be read" in str(refused(path=str(path)))


@pytest.mark.parametrize(("quoted", "fits"), [("{{ message['content'] | tojson }}", True), ("", False)])
def test_what_a_tool_said_may_be_quoted_and_is_never_dropped(quoted, fits):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    says = "{% if message['role'] != 'tool' %}{{ message['content'] }}{% else %}" + quoted + "{% endif %}"
    tokenizer.chat_template = "{% for message in messages %}" + says + "{% endfor %}"
    messages = [{"role": "user", "content": "Weather?"}, {"role": "tool", "content": 'a "22" degrees'}]
    if fits:
        assert chat_text(tokenizer, messages) == 'Weather?"a \\"22\\" degrees"'
        return
    with pytest.raises(ConfigError, match="the template drops what tool said"):
        chat_text(tokenizer, messages)


def test_a_template_that_raises_is_one_error():
    class Strict:
        chat_template = "yes"

        def apply_chat_template(self, messages, **_):
            raise ValueError("System role not supported")

    with pytest.raises(ConfigError) as caught:
        chat_text(Strict(), [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    assert all(
        part in str(caught.value)
        for part in ("fits the model's chat template", "roles system, user: ValueError: System role not supported", "no system message")
    )

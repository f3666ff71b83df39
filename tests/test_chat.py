"""`paretune chat`: what is said is what `Family.sample` says to the conversation so far; commands, and mistakes that end nothing."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from paretune.cli import app
from paretune.errors import printable
from paretune.evaluation.explain import END
from serving import spoken_family


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "family"
    spoken_family().save(path)
    return path


def talk(folder, *lines, options=()):
    made = CliRunner().invoke(app, ["chat", str(folder), *options], input="\n".join(lines) + "\n")
    assert made.exit_code == 0, made.output
    return made


def test_a_conversation_and_its_commands(folder):
    family, first = spoken_family(), [{"role": "user", "content": "hello"}]
    settings = {"seed": 4, "max_new_tokens": 12}
    answer = family.sample([first], {"polite": 1}, **settings)[0][0]
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "and now?"}]
    want = [answer, family.sample([second], {"polite": 0.2, "brief": 0.8}, **settings)[0][0]]
    compared = [family.sample([second], w, **settings)[0][0] for w in ([1, 0], [0, 1], [0.2, 0.8])]
    options = ["--preference", "polite=1", "--seed", "4", "--max-new-tokens", "12"]
    made = talk(folder, "hello", "", "/set polite=.2,brief=.8", "and now?", "/compare", "/why", "/new", "/why", options=options)
    spoken = [*want, *(f"[{label}] {text}" for label, text in zip(("polite=1", "brief=1", "polite=0.2, brief=0.8"), compared, strict=True))]
    assert made.stdout.startswith(printable("\n".join(spoken)) + "\n")
    assert "\nsum " in made.stdout, "the table of tokens"
    assert END not in made.stdout, "an answer that was cut is explained as it was"
    assert "the preference is polite=0.2,brief=0.8" in made.stderr
    assert "nothing was said" in made.stderr


def test_mistakes_are_told_and_the_conversation_goes_on(folder):
    made = talk(folder, "/set polite=2", "/sett polite=1", "/compare", "/help", "hello", "/quit", "never heard")
    for text in ("sum to 1", "did you mean '/set'?", "nothing was said", "/why   which expert"):
        assert text in made.stderr
    assert made.stdout.count("\n") >= 1
    refused = CliRunner().invoke(app, ["chat", str(folder), "--preference", "polite=2"])
    assert refused.exit_code == 2

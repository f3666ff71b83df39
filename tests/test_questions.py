"""Questions to a preference over HTTP: the same pool, questions and answers as offline; sessions that are few and do not stay; refusals."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace

import pytest

from paretune.evaluation.elicit import TIE, Elicitation, Question, draw_pool, hundredths
from paretune.serve.app import Limits
from paretune.serve.protocol import Served
from serving import NAMES, TASK, Letters, family_of
from test_serve import KEY, TEXT, Api

PATH = "/v1/preferences"
SMALL = {"model": "fam", "each": 6}
A, B = NAMES


@pytest.fixture(scope="module")
def family():
    return family_of(max_new_tokens=5)


LETTERS = Letters()


def api(family, *, task=LETTERS, **settings):
    made = Api({"fam": family}, **settings)
    made.models["fam"].task = task
    return made


def test_questions_are_those_of_the_library_and_end_in_a_preference(family):
    """Begin, answer and end: every state is what `Elicitation` says of the pool that `draw_pool` draws."""
    prompts = list(TASK.prompts("test"))[:8]
    pool = draw_pool(Letters(), family, prompts, each=6, seed=3)
    asking = Elicitation(pool.rewards_NM, pool.prompt_N, seed=3)

    async def talk(client):
        states = [await client.post(PATH, json={**SMALL, "seed": 3, "questions": 4, "enough": 0})]
        for answer in (1, "2", "=", "1"):
            place = f"{PATH}/{states[0].json()['id']}"
            number = states[-1].json()["question"]["number"]
            states.append(await client.post(place, json={"question": number, "answer": answer}))
            assert (await client.get(place)).json() == states[-1].json()
            again = await client.post(place, json={"question": number, "answer": answer})
            assert again.json() == states[-1].json(), "an answer that is sent twice counts once"
        pasted = await client.post("/v1/completions", json={**TEXT, "preference": states[-1].json()["paste"]})
        sent = await client.post("/v1/completions", json={**TEXT, "preference": states[-1].json()["preference"]})
        assert pasted.json()["choices"] == sent.json()["choices"]
        return states

    states = api(family).run(talk)
    assert [state.status_code for state in states] == [201, 200, 200, 200, 200]
    for number, (state, chosen) in enumerate(zip((state.json() for state in states), (0, 1, TIE, 0, None), strict=True), start=1):
        low, high = asking.interval()
        assert list(state["preference"].values()) == hundredths(asking.weights.tolist())
        assert list(state["low"].values()) == pytest.approx(low.tolist())
        assert list(state["high"].values()) == pytest.approx(high.tolist())
        assert state["regret"] == pytest.approx(asking.regret)
        assert set(state["preference"]) == set(NAMES)
        if chosen is None:
            assert state["question"] is None
            assert state["answers"] == ["1", "2", "=", "1"]
            assert state["paste"] == ",".join(f"{name}={w:g}" for name, w in state["preference"].items())
            break
        question = asking.ask()
        assert state["question"]["number"] == number
        assert state["question"]["prompt"] == prompts[question.prompt].text
        assert state["question"]["options"] == [pool.responses_N[row] for row in question.options]
        asking.answer(Question(question.prompt, question.options), chosen)


def test_own_prompts_and_an_end_where_nothing_is_at_stake(family):
    async def talk(client):
        state = (await client.post(PATH, json={**SMALL, "prompts": ["abc", "bca", "abc"], "enough": 1, "max_tokens": 3})).json()
        assert state["question"]["prompt"] in ("abc", "bca")
        assert all(len(option) <= 3 for option in state["question"]["options"])
        ended = (await client.post(f"{PATH}/{state['id']}", json={"question": 1, "answer": "1"})).json()
        assert ended["question"] is None
        late = await client.post(f"{PATH}/{state['id']}", json={"question": 2, "answer": "1"})
        assert (late.status_code, late.json()["error"]["code"]) == (409, "out_of_turn")

    api(family).run(talk)


BAD = [
    ({"model": "no"}, 404, "model", "a model that is served"),
    ({"model": f"fam@{A}=1"}, 400, "model", "questions find the preference"),
    ({"preference": {A: 1}}, 400, "preference", "parameters that are supported"),
    ({"prompts": []}, 400, "prompts", "prompts are a list"),
    ({"prompts": "abc"}, 400, "prompts", "prompts are a list"),
    ({"prompts": [3]}, 400, "prompts", "prompts are a list"),
    ({"prompts": ["\ud800"]}, 400, "prompts", "UTF-8"),
    ({"prompts": ["a" * 5000]}, 400, "max_tokens", "positions"),
    ({"each": 1}, 400, "each", "each"),
    ({"each": 200, "prompts": ["a", "b"]}, 400, "each", "at most 256 responses"),
    ({"questions": 0}, 400, "questions", "questions"),
    ({"enough": 2}, 400, "enough", "enough"),
    ({"seed": "x"}, 400, "seed", "seed"),
    ({"max_tokens": 1, "prompts": ["abc"], "each": 2}, 400, None, "rewards differ"),
    ({"max_tokens": 4, "prompts": ["abc"], "each": 2}, 201, None, None),
]
BAD_ANSWERS = [
    ({"question": 1}, 400, "answer"),
    ({"answer": "1"}, 400, "question"),
    ({"question": 1, "answer": 3}, 400, "answer"),
    ({"question": 1, "answer": True}, 400, "answer"),
    ({"question": 1, "answer": "1", "more": 1}, 400, "more"),
    ({"question": 2, "answer": "1"}, 409, None),
    ({"question": 0, "answer": "1"}, 400, "question"),
    ([], 400, None),
]


def test_what_is_refused_and_that_the_session_goes_on(family):
    async def talk(client):
        for change, status, param, rule in BAD:
            body, kind = json.dumps({**SMALL, **change}), {"content-type": "application/json"}
            made = await client.post(PATH, content=body, headers=kind)
            assert made.status_code == status, (change, made.text)
            if status != 201:
                error = made.json()["error"]
                assert error["param"] == param, (change, error)
                assert rule in error["rule"], error
                assert error["found"]
                assert error["remedy"]
        state = (await client.post(PATH, json=SMALL)).json()
        for body, status, param in BAD_ANSWERS:
            made = await client.post(f"{PATH}/{state['id']}", json=body)
            assert (made.status_code, made.json()["error"]["param"]) == (status, param), (body, made.text)
        assert (await client.get(f"{PATH}/{state['id']}")).json() == state
        assert (await client.put(f"{PATH}/{state['id']}")).status_code == 405
        for method in ("GET", "POST", "DELETE"):
            gone = await client.request(method, f"{PATH}/no", json={"question": 1, "answer": "1"})
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "preference_not_found")

    api(family).run(talk)
    (made,) = api(family, task=None).post(PATH, SMALL)
    assert made.status_code == 400
    assert "--recipe" in made.json()["error"]["remedy"]


def test_sessions_are_bounded_end_and_expire(family, monkeypatch):
    late = [0.0]
    clock = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + late[0])
    monkeypatch.setattr("paretune.serve.questions.time", clock)

    async def talk(client):
        made = await asyncio.gather(*(client.post(PATH, json=SMALL) for _ in range(3)))
        made.sort(key=lambda response: response.status_code)
        assert [response.status_code for response in made] == [201, 201, 429]
        assert int(made[2].headers["retry-after"]) == 3600, "an hour at most"
        name, other = (response.json()["id"] for response in made[:2])
        assert (await client.delete(f"{PATH}/{name}")).json() == {"id": name, "object": "preference.deleted", "deleted": True}
        assert (await client.get(f"{PATH}/{name}")).status_code == 404
        third = (await client.post(PATH, json=SMALL)).json()["id"]
        late[0] += 6000
        assert (await client.get(f"{PATH}/{third}")).status_code == 200, "it is used, and stays"
        late[0] += 6000
        assert [(await client.get(f"{PATH}/{each}")).status_code for each in (third, other)] == [200, 404]
        assert [(await client.post(PATH, json=SMALL)).status_code for _ in range(2)] == [201, 429]

    api(family, limits=Limits(sessions=2, idle=10_000)).run(talk)


def test_a_session_that_fails_leaves_its_place_and_its_rows(family):
    class Broken(Letters):
        def score(self, prompts, texts):
            raise ValueError("no score")

    async def talk(client):
        for _ in range(3):
            assert (await client.post(PATH, json=SMALL)).status_code == 500
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 200

    api(family, task=Broken(), limits=Limits(sessions=1)).run(talk)


def test_the_key_is_asked_for(family):
    made = api(family, key=KEY)

    async def talk(client):
        name = (await client.post(PATH, json=SMALL)).json()["id"]
        client.headers.pop("authorization")
        sent = [("POST", PATH), *((method, f"{PATH}/{name}") for method in ("GET", "POST", "DELETE"))]
        return [(await client.request(method, path, json=SMALL)).status_code for method, path in sent]

    assert made.run(talk) == [401] * 4


def test_a_saved_family_that_names_its_task_is_asked_about(family, tmp_path):
    from paretune.serve.app import load_families

    family.save(tmp_path / "fam")
    (served,) = load_families([tmp_path / "fam"]).values()
    assert isinstance(served, Served)
    assert served.task is not None
    assert served.task.objectives == TASK.objectives

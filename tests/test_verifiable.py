"""Final answers and tool calls: what counts as equal, what is found in a text, and the published points."""

import json

import pytest

from paretune.errors import ConfigError
from paretune.objectives.verifiable import final_answer, same_answer
from paretune.registry import OBJECTIVES
from paretune.testing import check_objective


def build(name, **fields):
    return OBJECTIVES.build({"name": name, **fields})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"So \boxed{1} is wrong, and it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\text{\{a, b\}}}", r"\text{\{a, b\}}"),
        (r"\boxed{3", None),
        ("<think>4</think>\n<answer> 42 </answer>", "42"),
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### 72\nThat is all.", "72"),
        ("The answer is 1,234 dollars.", "1,234"),
        ("the final answer: x + 1.", "x + 1"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is **5**.", "5"),
        ("Answer: $2x + 1$", "2x + 1"),
        ("Answer: 12", "12"),
        ("#### Step 1\nThe answer is 6.\n#### Step 2\nThe answer is 42.", "42"),
        ("The answer is 6, or so.\n#### 72", "72"),
        ("#### The answer is 42", "42"),
        ("The answer is 1e-05.", "1e-05"),
        ("The answer is: 12.", "12"),
        ("The final answer is: $12$. I hope it is correct.", "12"),
        (r"The answer is \(x + 1\).", r"\(x + 1\)"),
        ("There are 7 cats and 8 dogs", None),
        ("", None),
    ],
)
def test_where_the_final_answer_stands(text, found):
    assert final_answer(text) == found


def test_the_last_number_only_where_it_was_asked_for():
    assert final_answer("There are 7 cats and 8 dogs", anywhere=True) == "8"
    assert final_answer("no number", anywhere=True) is None
    assert final_answer("about 1e-05", anywhere=True) == "1e-05"
    assert final_answer("0x3e45ab", anywhere=True) == "45"
    assert same_answer(final_answer("it is \u22125", anywhere=True), "-5")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("72", "72.0", True),
        ("1,234", "1234", True),
        ("1,2", "12", False),
        ("$18", "18", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"\dfrac12", "1/2", True),
        (r"-\frac{3}{4}", "-.75", True),
        ("50\\%", "50", True),
        (r"5\text{ cm}", "5", True),
        ("0.333", "1/3", False),
        ("1/0", "0", False),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("x+1", "1+x", False),
        ("", "", False),
        (r"\(5\)", "5", True),
        (r"\[\frac{1}{2}\]", "0.5", True),
        ("1" * 5000, "1", False),
        ("1" * 5000, "1" * 5000, True),
        ("1" * 5000 + "/3", "1", False),
        ("Monday", "monday.", True),
        (r"\text{Evelyn}", r"\text{Evelyn}", True),
        (r"\text{Evelyn}.", "Evelyn", True),
        (r"\text{Evelyn}", r"\text{Anna}", False),
        (r"\mathrm{(A)}", r"\text{(B)}", False),
        (r"\text{\{a, b\}}", r"\text{\{c\}}", False),
        (r"\text{a {b} c}", r"\text{a {d} c}", False),
        (r"\text{ cm}", "", False),
        (str(0.00001), "0.00001", True),
        ("1.5e3", "1500", True),
        ("2e", "2", False),
        (r"\frac{-1}{2}", "-0.5", True),
        (r"-\frac{-1}{2}", "-0.5", False),
        ("\u22125", "-5", True),
        ("72", "7", False),
    ],
)
def test_when_two_answers_are_the_same(one, other, same):
    assert same_answer(one, other) is same
    assert same_answer(other, one) is same


def test_the_answer_is_right_wrong_or_unknown():
    objective = build("answer", column="solution")
    solutions = [r"Thus \boxed{12}", "#### 5", "x+1", None, ""]
    texts = ["so \\boxed{12.0}", "the answer is 6", "\\boxed{x + 1}", "\\boxed{1}", "\\boxed{1}"]
    assert objective(["p"] * 5, texts, solution=solutions) == [1.0, 0.0, 1.0, None, None]
    assert objective(["p"], ["I do not know"], solution=["5"]) == [0.0]
    assert build("answer", anywhere=True, low=-1)(["p", "p"], ["it is 5", "it is 6"], answer=["5", "5"]) == [1.0, -1.0]


def test_any_answer_of_a_list_counts():
    answers = [["6", "six"], ["5", None], [], [None, " "], ["6"]]
    assert build("answer")(["p"] * 5, ["the answer is Six."] * 4 + ["The answer is: 6"], answer=answers) == [1.0, 0.0, None, None, 1.0]


def call(name, **parameters):
    return json.dumps({"name": name, "parameters": parameters})


def answer(*calls, think="<think>t</think>\n", response=""):
    return think + "<tool_call>\n" + "\n".join(calls) + "\n</tool_call>" + response


NEWS = answer(call("GetNews", page="1"))


@pytest.mark.parametrize(
    ("reference", "text", "score"),
    [
        (NEWS, answer("anything"), 1.0),
        (NEWS, NEWS + "\n<response>done</response>", 0.0),
        (NEWS, answer(call("f"), think=""), 0.0),
        (NEWS, "well: " + NEWS, 0.0),
        (NEWS, NEWS + NEWS, 0.0),
        (NEWS, "<think>a</think><think>b</think>\n<tool_call>x</tool_call>", 0.0),
        ("<think>t</think>\n<response>r</response>", "<think>because</think>\n<response>hello</response>", 1.0),
        ("<think>t</think>\n<response>r</response>", NEWS, 0.0),
        (NEWS + "\n<response>r</response>", NEWS + "\n<response>hello</response>", 1.0),
        (NEWS + "\n<response>r</response>", "<think>t</think>\n<response>r</response>\n<tool_call>\nx\n</tool_call>", 0.0),
        ("<think>t</think>", "<think>only</think>", 1.0),
        (None, NEWS, None),
    ],
)
def test_the_format_is_that_of_the_reference(reference, text, score):
    assert build("tool-call", measure="format")(["p"], [text], answer=[reference]) == [score]


@pytest.mark.parametrize(
    ("text", "points"),
    [
        (NEWS, 3),  # 1 for the name, 1 for the parameter's name, 1 for its value
        (answer(call("GetNews", page="2")), 2),
        (answer(call("GetNews", page="1", size="3")), 1 + 1 / 2 + 1),
        (answer(call("GetNews")), 1),
        (answer(call("Other", page="1")), 0),
        (answer(call("GetNews", page="1"), call("Other")), 1 / 2 + 2),
        ("<tool_call>" + json.dumps({"name": "GetNews", "arguments": {"page": "1"}}) + "</tool_call>", 3),
        ("no call", 0),
        (answer("{broken"), 0),
        (answer('["GetNews"]'), 0),
        (answer(json.dumps({"function": {"name": "GetNews", "parameters": {"page": "1"}}})), 0),  # a column may say it so, a completion not
        (answer('{"name": 3, "parameters": {}}'), 0),
        (answer('{"name": "GetNews", "parameters": "page"}'), 0),
    ],
)
def test_correctness_is_the_share_of_the_published_points(text, points):
    """ToolRL: -3 + 6 * points / 3 for one wanted call with one parameter."""
    found = build("tool-call", low=-3, high=3)(["p"], [text], answer=[NEWS])
    assert found == [pytest.approx(-3 + 6 * points / 3)]


def test_calls_are_matched_as_well_as_possible():
    """The first wanted call fits both found ones equally well by name; taking the first found one would leave the second with nothing."""
    wanted = answer(call("f", a=1), call("f", b=2))
    swapped = answer(call("f", b=2), call("f", a=1))
    assert build("tool-call")(["p"], [swapped], answer=[wanted]) == [1.0]
    greedy = answer(call("f", a=9, b=2), call("f", a=1))
    points = 1 + 2 + (1 / 2 + 1)  # names; a=1 with the second; b=2 with the first, which names one parameter too many
    assert build("tool-call")(["p"], [greedy], answer=[wanted]) == [pytest.approx(points / 5)]


def test_a_reference_that_spells_its_calls_in_json_is_read():
    """As the answers of xLAM and the cells of CSV files are: taken for a text without calls, it would pay for calling nothing."""
    calls = json.dumps([{"name": "GetNews", "arguments": {"page": "1"}}])
    for reference in (calls, "\n" + calls[1:-1]):
        assert build("tool-call")(["p"] * 2, [NEWS, "hello"], answer=[reference] * 2) == [1.0, 0.0]
    assert build("tool-call")(["p"] * 2, [NEWS, "hello"], answer=["[]"] * 2) == [0.0, 1.0]
    assert build("tool-call")(["p"] * 2, [NEWS, "hello"], answer=["[no call] is needed"] * 2) == [0.0, 1.0]
    with pytest.raises(ConfigError, match="holds calls of tools"):
        build("tool-call")(["p"], [NEWS], answer=['{"page": "1"}'])
    with pytest.raises(ConfigError, match='measure "format" compares with a text'):
        build("tool-call", measure="format")(["p"], [NEWS], answer=[calls])


def test_a_reference_whose_call_cannot_be_read_scores_nobody():
    broken = '<think>t</think><tool_call>\n{\n"name": "GetNews"\n}\n</tool_call>'
    assert build("tool-call")(["p"] * 3, [NEWS, broken, "hello"], answer=[broken] * 3) == [None] * 3


def test_what_a_struct_lacks_is_none_at_any_depth():
    reference = {"name": "f", "parameters": {"trip": {"to": "Rome", "via": None, "stops": [{"at": "Pisa", "for": None}]}}}
    texts = [answer(call("f", trip={"to": "Rome", "stops": [{"at": at}]})) for at in ("Pisa", "Bari")]
    assert build("tool-call")(["p"] * 2, texts, answer=[reference] * 2) == [1.0, pytest.approx(2 / 3)]


def test_a_reference_without_calls_wants_none():
    reference = "<think>t</think>\n<response>r</response>"
    assert build("tool-call")(["p"] * 3, [NEWS, reference, "hello"], answer=[reference] * 3) == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("column", "right"),
    [
        ({"name": "GetNews", "parameters": {"page": "1", "size": None}}, True),  # a struct with the keys of other rows
        ([{"name": "GetNews", "arguments": {"page": "1"}}], True),
        ([{"type": "function", "function": {"name": "GetNews", "arguments": {"page": "1"}}}], True),
        ([{"type": "function", "function": {"name": "GetNews", "arguments": '{"page": "1"}'}}], True),  # as OpenAI's API has it
        ({"name": "GetNews", "parameters": None, "arguments": {"page": "1"}}, True),  # a struct with the names of other rows
        ([{"name": "GetNews", "parameters": {"page": "2"}}], False),
        ([{"function": {"name": "GetNews", "arguments": '{"page": "2"}'}}], False),
        ([], False),  # wants no call
    ],
)
def test_a_column_may_hold_the_calls_themselves(column, right):
    found = build("tool-call")(["p"] * 2, [NEWS, "hello"], answer=[column] * 2)
    assert found == [1.0 if right else pytest.approx(2 / 3) if column else 0.0, 0.0 if column else 1.0]


@pytest.mark.parametrize(
    ("measure", "column"),
    [
        ("correct", 3),
        ("correct", {"tool": "GetNews"}),
        ("correct", [NEWS]),
        ("correct", {"name": "GetNews", "arguments": "1"}),
        ("format", []),
    ],
)
def test_a_column_that_holds_no_calls_is_refused(measure, column):
    with pytest.raises(ConfigError, match="objective tool-call"):
        build("tool-call", measure=measure)(["p"], [NEWS], answer=[column])


def test_a_limit_is_a_step():
    texts = ["one two three", "one two three four"]
    assert build("limit", most=3, unit="words")(["p", "p"], texts) == [1.0, 0.0]
    assert build("limit", most=13, unit="characters", low=-1)(["p", "p"], texts) == [1.0, -1.0]
    assert build("limit", most=4000)(["p", "p"], texts, completion_ids=[[0] * 4000, [0] * 4001]) == [1.0, 0.0]
    with pytest.raises(ConfigError, match="most is at least 1"):
        build("limit", most=0)


def test_they_keep_the_promises_of_an_objective():
    check_objective(build("answer"), columns={"answer": "5"})
    check_objective(build("tool-call"), columns={"answer": NEWS})
    check_objective(build("tool-call", measure="format"), columns={"answer": NEWS})
    check_objective(build("limit", most=10))

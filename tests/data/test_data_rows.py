import math

import pytest

from bfpo_pl.data.rows import Message, Row, RowError, abbreviated

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}
SYSTEM = {"role": "system", "content": ""}


def test_a_pair_holds_its_columns():
    row = Row.pair("p", "a", "b", True, 0.25, "f:1", chosen_score=3, rejected_score=1.5, margin=2, chosen_rank=1)
    assert row.prompt == (Message("user", "p"),)
    assert row.responses == ("a", "b")
    assert row.pairs == ((0, 1),)
    assert row.columns == {"safe": (1.0, 0.25), "score": (3.0, 1.5)}
    assert row.pair_columns == {"margin": (2.0,), "chosen_rank": (1.0,)}


def test_absent_flags_are_no_column():
    assert Row.pair("p", "a", "b").columns == {}


def test_a_single_response_has_no_pair():
    row = Row.single([SYSTEM, USER, ASSISTANT, USER], "answer", "f:1")
    assert [turn.role for turn in row.prompt] == ["system", "user", "assistant", "user"]
    assert (row.responses, row.pairs) == (("answer",), ())


@pytest.mark.parametrize("value", [True, False, 0, 1, 0.0, 1.0, 0.3])
def test_flags_that_are_accepted(value):
    assert Row.pair("p", "a", "b", value, value).columns["safe"] == (float(value), float(value))


BAD_FLAGS = ["yes", "", "1", "False", "true", 2, 10**400, -1, 1.01, math.nan, math.inf, [], {}, [1]]


@pytest.mark.parametrize("value", BAD_FLAGS)
@pytest.mark.parametrize("side", ["chosen_safe", "rejected_safe"])
def test_flags_that_are_refused(value, side):
    flags = {"chosen_safe": True, "rejected_safe": True, side: value}
    with pytest.raises(RowError) as caught:
        Row.pair("p", "a", "b", **flags, origin="file.jsonl:7")
    assert (caught.value.origin, caught.value.field) == ("file.jsonl:7", side)
    assert str(caught.value).startswith(f"file.jsonl:7: {side} = ")
    assert "probability in [0, 1]" in caught.value.reason


def test_one_flag_of_two_is_refused():
    with pytest.raises(RowError, match="rejected_safe = None: the safety flag is missing"):
        Row.pair("p", "a", "b", chosen_safe=True)


@pytest.mark.parametrize(
    ("arguments", "field", "reason"),
    [
        (("p", "same", "same"), "rejected", "identical"),
        (("p", " \n", "b"), "chosen", "empty"),
        (("p", "a", ""), "rejected", "empty"),
        (("  ", "a", "b"), "prompt", "empty"),
        (("p", None, "b"), "chosen", "not text"),
        (("p", "a", 3), "rejected", "not text"),
        (("p", "\u00a0\u2003\u3000\u2028", "b"), "chosen", "empty"),
        (("\u200b\ufeff \n", "a", "b"), "prompt", "empty"),
        (("\x00", "a", "b"), "prompt", "empty"),
        (("p", "\u2800\u3164", "b"), "chosen", "empty"),
        (("p", "a", "\u00ad\x07\x7f\u202e\u115f\ufe0f"), "rejected", "empty"),
        (("p", "a", "b\ud83d"), "rejected", "half of a surrogate pair"),
        (("\udfffp", "a", "b"), "prompt", "half of a surrogate pair"),
        (([{"role": "system", "content": "\ud800"}, USER], "a", "b"), "prompt[0]", "half of a surrogate pair"),
        (([USER, {"role": "assistant", "content": "\ud800"}, USER], "a", "b"), "prompt[1]", "half of a surrogate pair"),
        ((None, "a", "b"), "prompt", "neither text nor a list"),
        ((7, "a", "b"), "prompt", "neither text nor a list"),
        (([], "a", "b"), "prompt", "no message"),
        ((["hello"], "a", "b"), "prompt[0]", "keys 'role' and 'content'"),
        (([{"role": "user"}], "a", "b"), "prompt[0]", "keys 'role' and 'content'"),
        (([{"role": "user", "content": None}], "a", "b"), "prompt", "not text"),
        (([{"role": "system", "content": None}, USER], "a", "b"), "prompt[0]", "not text"),
        (([{"role": "human", "content": "x"}], "a", "b"), "prompt.role", "unknown role"),
        (([USER, USER], "a", "b"), "prompt[1].role", "out of order"),
        (([ASSISTANT, USER], "a", "b"), "prompt[0].role", "out of order"),
        (([USER, SYSTEM, USER], "a", "b"), "prompt[1].role", "out of order"),
        (([USER, ASSISTANT], "a", "b"), "prompt", "does not end with a user message"),
        (([SYSTEM], "a", "b"), "prompt", "does not end with a user message"),
    ],
)
def test_rows_that_are_refused(arguments, field, reason):
    with pytest.raises(RowError) as caught:
        Row.pair(*arguments, origin="f:3")
    assert caught.value.field == field
    assert reason in caught.value.reason
    assert str(caught.value).startswith("f:3: ")


@pytest.mark.parametrize("value", ["3", None, math.nan, [1.0], 10**400])
def test_extras_must_be_finite_numbers(value):
    with pytest.raises(RowError, match=r"margin = .*finite numbers"):
        Row.pair("p", "a", "b", margin=value)


def test_columns_must_have_the_right_size():
    with pytest.raises(RowError, match="has 1 values, not 2"):
        Row((Message("user", "p"),), ("a", "b"), ((0, 1),), {"score": (1.0,)})


def test_pairs_must_point_at_responses():
    with pytest.raises(RowError, match="outside the responses"):
        Row((Message("user", "p"),), ("a", "b"), ((0, 2),))


def test_messages_show_little_of_a_value():
    with pytest.raises(RowError) as caught:
        Row.pair("p", "offensive " * 1000, "offensive " * 1000)
    assert len(caught.value.value) <= 60
    assert len(str(caught.value)) < 250
    assert abbreviated("short") == "'short'"


@pytest.mark.parametrize(
    "text",
    [
        "👍🏽 emoji",
        "مرحبا بالعالم",
        "x" * 50_000,
        "nul\x00byte",
        "windows\r\nlines",
        "\ufeffbom",
        "\x00x",
        "\u2803",
        "👩\u200d👧",
    ],
)
def test_odd_text_is_kept_as_it_is(text):
    assert Row.pair(text, text + "a", text + "b").responses == (text + "a", text + "b")

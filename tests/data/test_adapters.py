import pytest

from bfpo_pl.component import UserError
from bfpo_pl.data.adapters import Columns, Messages
from bfpo_pl.data.files import LocalFiles
from bfpo_pl.data.rows import Message, RowError
from bfpo_pl.data.schemas import UltraFeedbackBinarized

COLUMNS = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_safe": True, "rejected_safe": 0.25}


def turns(*contents, roles=("user", "assistant")):
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def test_messages_take_the_last_as_response():
    row = Messages()({"messages": turns("q1", "a1", "q2", "a2")}, "f:1")
    assert ([turn.content for turn in row.prompt], row.responses, row.pairs) == (["q1", "a1", "q2"], ("a2",), ())
    with pytest.raises(RowError, match="not the assistant's"):
        Messages()({"messages": turns("q1", "a1", "q2")}, "f:1")
    assert Messages("conversations")({"conversations": turns("q", "a")}, "f:1").responses == ("a",)


def test_columns_by_name():
    adapter = Columns("q", "good", "bad", "good_ok", "bad_ok", extras=["chosen_score", "rejected_score", "gap"])
    raw = {"q": "?", "good": "a", "bad": "b", "good_ok": 1, "bad_ok": 0.5}
    row = adapter({**raw, "chosen_score": 2, "rejected_score": 1, "gap": 1, "unread": None}, "f:1")
    assert row.columns == {"safe": (1.0, 0.5), "score": (2.0, 1.0)}
    assert row.pair_columns == {"gap": (1.0,)}
    with pytest.raises(RowError, match="'gap' is missing"):
        adapter({**raw, "chosen_score": 2, "rejected_score": 1}, "f:1")


def test_columns_without_flags_or_rejected():
    raw = {"prompt": "?", "chosen": "a", "rejected": "b"}
    with pytest.raises(RowError, match=r"chosen_safe = None: .*adapter\.chosen_safe and adapter\.rej") as caught:
        Columns()(raw, "f:1")
    assert "set assume_safe: true in the stream" in caught.value.remedy
    assert Columns("q", rejected_safe=None).flag_fields == ("chosen_safe",)
    assert Columns(chosen_safe=None, rejected_safe=None)(raw, "f:1").columns == {}
    single = Columns(chosen="response", rejected=None)({"prompt": "?", "response": "a"}, "f:1")
    assert (single.responses, single.pairs) == (("a",), ())


def test_columns_with_messages():
    adapter = Columns(chosen_safe=None, rejected_safe=None)
    row = adapter(
        {"prompt": turns("q"), "chosen": turns("q", "a"), "rejected": turns("b", roles=("assistant",))}, "f:1"
    )
    assert row.responses == ("a", "b")
    with pytest.raises(RowError, match="does not begin with the prompt"):
        adapter({"prompt": turns("q"), "chosen": turns("other", "a"), "rejected": "b"}, "f:1")


def test_columns_refuse_flags_that_are_null():
    with pytest.raises(RowError, match=r"rejected_safe = None: the safety flag is missing.*set both to null"):
        Columns()({**COLUMNS, "rejected_safe": None}, "f:1")
    with pytest.raises(RowError, match="chosen_safe = None: the safety flag is missing"):
        Columns()({**COLUMNS, "chosen_safe": None, "rejected_safe": None}, "f:1")


def test_conversations_may_begin_with_a_system_message():
    system = {"role": "system", "content": "Be brief."}
    row = Messages()({"messages": [system, *turns("q", "a")]}, "f:1")
    assert row.prompt == (Message("system", "Be brief."), Message("user", "q"))
    sides = {side: [system, *turns("q", side)] for side in ("chosen", "rejected")}
    assert UltraFeedbackBinarized()(sides, "f:1").prompt == row.prompt
    with pytest.raises(RowError, match="half of a surrogate pair"):
        Messages()({"messages": [{**system, "content": "\udc00"}, *turns("q", "a")]}, "f:1")


def test_columns_read_csv_with_its_types(tmp_path):
    path = tmp_path / "rows.csv"
    text = "prompt,chosen,rejected,chosen_safe,rejected_safe,chosen_score,rejected_score,gap\n"
    path.write_text(text + '"a\n""q""",42,43 times,TRUE,0.5,2,-1e1,3\np,x,y,false,1,0.5,0,0\n')
    adapter = Columns(extras=["chosen_score", "rejected_score", "gap"])
    first, second = (adapter(raw, origin) for origin, raw in LocalFiles(str(path)).rows("train"))
    assert (first.prompt[0].content, second.responses) == ('a\n"q"', ("x", "y"))
    assert first.columns == {"safe": (1.0, 0.5), "score": (2.0, -10.0)}
    assert first.responses == ("42", "43 times")
    assert (second.columns["safe"], second.pair_columns) == ((0.0, 1.0), {"gap": (0.0,)})
    path.write_text(text + "p,x,y,yes,1,0,0,0\np,x,y,true,1,0,0,0\n")
    with pytest.raises(RowError, match=r"rows.csv:2: chosen_safe = 'yes'.*In a CSV file one cell"):
        [adapter(raw, origin) for origin, raw in LocalFiles(str(path)).rows("train")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extras": ["origin"]}, "extras cannot have 'origin'"),
        ({"extras": ["gap", "prompt"]}, "extras cannot have 'prompt'"),
        ({"extras": ["cls"]}, "extras cannot have 'cls'"),
        ({"extras": ["safe"]}, "extras cannot have 'safe'"),
        (
            {"chosen_safe": None, "rejected_safe": None, "extras": ["chosen_safe", "rejected_safe"]},
            "'chosen_safe', which is a safety flag.*in the argument chosen_safe",
        ),
        ({"extras": ["gap", "gap"]}, "extras names 'gap' 2 times"),
        ({"extras": ["chosen_score", "rejected_score", "score"]}, "extras makes 'score' a pair column, and"),
        ({"rejected": None, "extras": ["gap"]}, "extras are columns of pairs, and rejected: null"),
        ({"rejected": None, "chosen_safe": "ok"}, "chosen_safe and rejected_safe are columns of pairs"),
        ({"rejected": None, "rejected_safe": "ok"}, "chosen_safe and rejected_safe are columns of pairs"),
    ],
)
def test_columns_refuse_what_they_cannot_read(arguments, message):
    with pytest.raises(UserError, match=message):
        Columns(**arguments)


def test_columns_that_look_alike_and_are_not():
    names = ["chosen_rank", "rank", "chosen_score", "rejected_score", "chosen_", "origins"]
    row = Columns(extras=names)({**COLUMNS, **dict.fromkeys(names, 2)}, "f:1")
    assert row.columns == {"safe": (1.0, 0.25), "score": (2.0, 2.0)}
    assert sorted(row.pair_columns) == ["chosen_", "chosen_rank", "origins", "rank"]
    for flags in ({}, {"chosen_safe": None, "rejected_safe": None}):
        assert Columns(rejected=None, **flags)(COLUMNS, "f:1").responses == ("a",)


def test_columns_of_numbers_in_csv_are_no_text_and_say_what_to_do(tmp_path):
    path = tmp_path / "sums.csv"
    path.write_text("prompt,chosen,rejected\n2 + 2?,4,5\n")
    [(origin, raw)] = LocalFiles(str(path)).rows("train")
    with pytest.raises(RowError, match=r"sums.csv:2: chosen = 4: it is not text\. In a CSV file .* as JSON lines"):
        Columns(chosen_safe=None, rejected_safe=None)(raw, origin)
    path.write_text("prompt,chosen,rejected\n4,four,five\n")
    [(origin, raw)] = LocalFiles(str(path)).rows("train")
    with pytest.raises(RowError, match=r"sums.csv:2: prompt = 4: it is neither text .* as JSON lines"):
        Columns(chosen_safe=None, rejected_safe=None)(raw, origin)

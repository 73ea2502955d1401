import gzip
import json

import pytest

from bfpo_pl.component import UserError
from bfpo_pl.data.adapters import Columns, Messages
from bfpo_pl.data.files import LocalFiles
from bfpo_pl.data.rows import Message, RowError
from bfpo_pl.data.schemas import HHRLHF, PKUSafeRLHF, PKUSaferResponse, RedTeam, UltraFeedbackBinarized

PKU = {
    "prompt": "How?",
    "response_0": "zero",
    "response_1": "one",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}


def turns(*contents, roles=("user", "assistant")):
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


ULTRA = {
    "prompt": "q2",
    "prompt_id": "x",
    "chosen": turns("q1", "a1", "q2", "good"),
    "rejected": turns("q1", "a1", "q2", "bad"),
    "messages": [],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}


PKU_NOW = {
    **PKU,
    "prompt_source": "x",
    "response_0_source": "x",
    "response_1_source": "x",
    "response_0_severity_level": 0,
    "response_1_severity_level": 3,
    "response_0_harm_category": {"Violence": False},
    "response_1_harm_category": {"Violence": True},
    "response_0_sha256": "x",
    "response_1_sha256": "x",
}

HH = {
    "chosen": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: good",
    "rejected": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: bad",
}

RED = {
    "prompt": "How?",
    "modeloutput1": "one",
    "modeloutput2": "two",
    "better_modelout": 2,
    "is_modelout1_safe": True,
    "is_modelout2_safe": False,
}

CHAT = {"prompt": "q1", "prompt_id": "x", "messages": turns("q1", "a1", "q2", "a2")}
COLUMNS = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_safe": True, "rejected_safe": 0.25}


def test_pku_orders_by_helpfulness():
    row = PKUSafeRLHF()(PKU, "f:1")
    assert row.responses == ("one", "zero")
    assert row.columns == {"safe": (0.0, 1.0)}
    assert (row.prompt, row.pairs, row.origin) == ((Message("user", "How?"),), ((0, 1),), "f:1")


def test_pku_orders_by_safety():
    row = PKUSafeRLHF(order="safety")({**PKU, "better_response_id": None}, "f:1")
    assert row.responses == ("zero", "one")
    assert row.columns == {"safe": (1.0, 0.0)}


def test_pku_without_helpfulness_order_names_the_remedy():
    with pytest.raises(RowError, match=r"f:12: better_response_id = None: no helpfulness order\. .*order: safety"):
        PKUSafeRLHF()({**PKU, "better_response_id": None}, "f:12")


@pytest.mark.parametrize("value", [2, -1, "1", True, 0.5])
def test_pku_ids_are_0_or_1(value):
    with pytest.raises(RowError, match="must be 0 or 1"):
        PKUSafeRLHF()({**PKU, "better_response_id": value}, "f:1")


@pytest.mark.parametrize("field", sorted(set(PKU) - {"safer_response_id"}))
def test_pku_missing_fields(field):
    raw = {key: value for key, value in PKU.items() if key != field}
    with pytest.raises(RowError, match=f"the field '{field}' is missing") as caught:
        PKUSafeRLHF()(raw, "f:1")
    assert caught.value.field == field


@pytest.mark.parametrize("value", ["False", None, 3])
def test_pku_flags_are_strict(value):
    with pytest.raises(RowError):
        PKUSafeRLHF()({**PKU, "is_response_0_safe": value}, "f:1")


def test_pku_as_it_is_published_now():
    assert PKUSafeRLHF()(PKU_NOW, "f:1") == PKUSafeRLHF()(PKU, "f:1")
    row = PKUSafeRLHF(severity_safe=[0.9, 0.4, 0.4, 0])(PKU_NOW, "f:1")
    assert (row.responses, row.columns) == (("one", "zero"), {"safe": (0.0, 0.9)})
    milder = {**PKU_NOW, "response_1_severity_level": 1, "is_response_1_safe": None}
    assert PKUSafeRLHF("safety", [0.9, 0.4, 0.4, 0])(milder, "f:1").columns == {"safe": (0.9, 0.4)}


@pytest.mark.parametrize("level", [None, 4, -1, "1", 1.5, True, [1]])
def test_pku_severity_levels_are_strict(level):
    adapter = PKUSafeRLHF(severity_safe=[1, 0.5, 0.2, 0])
    with pytest.raises(RowError, match=r"f:1: response_1_severity_level = .*must be 0, 1, 2 or 3"):
        adapter({**PKU_NOW, "response_1_severity_level": level}, "f:1")
    with pytest.raises(RowError, match="'response_0_severity_level' is missing"):
        adapter(PKU, "f:1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 0.5, 0.2], "must have 4 values, for severity levels 0 to 3, not 3"),
        ([], "must have 4 values"),
        ([1, 0.5, 0.6, 0], r"must not rise with the severity level, as \[1, 0.5, 0.6, 0\] does"),
        ([1.5, 0.5, 0.2, 0], r"severity_safe must lie in \[0, 1\], not 1.5"),
        ([1, 0.5, 0.2, float("nan")], r"severity_safe must lie in \[0, 1\]"),
    ],
)
def test_pku_severity_probabilities_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        PKUSafeRLHF(severity_safe=values)


def test_pku_safer_response_alone():
    row = PKUSaferResponse()({**PKU, "better_response_id": None}, "f:1")
    assert (row.prompt, row.responses, row.pairs, row.columns) == ((Message("user", "How?"),), ("zero",), (), {})
    with pytest.raises(RowError, match="f:1: safer_response_id = None: no safety order"):
        PKUSaferResponse()({**PKU, "safer_response_id": None}, "f:1")


def test_ultrafeedback_shares_the_turns():
    row = UltraFeedbackBinarized()(ULTRA, "f:1")
    assert [turn.content for turn in row.prompt] == ["q1", "a1", "q2"]
    assert row.responses == ("good", "bad")
    assert row.columns == {"score": (8.5, 3.0)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": turns("other", "a1", "q2", "bad")}, "differ before the last message"),
        ({"rejected": turns("q1", "a1", "q2", "good")}, "identical"),
        ({"chosen": turns("q1"), "rejected": turns("q2")}, "not the assistant's"),
        ({"chosen": [], "rejected": []}, "not the assistant's"),
        ({"chosen": "text"}, "differ before the last message"),
        ({"score_chosen": "high"}, "finite numbers"),
    ],
)
def test_ultrafeedback_refuses(change, reason):
    with pytest.raises(RowError, match=reason):
        UltraFeedbackBinarized()({**ULTRA, **change}, "f:1")


def test_hh_turns():
    row = HHRLHF()(HH, "f:1")
    assert row.prompt == (Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2"))
    assert (row.responses, row.pairs, row.columns) == (("good", "bad"), ((0, 1),), {})


def test_hh_keeps_every_letter():
    texts = ["  q \n", "Human: says\nAssistant: too\n\n\nhuman: x", "\n\n", "\n\n last \r\n"]
    start = f"\n\nHuman: {texts[0]}\n\nAssistant: {texts[1]}\n\nHuman: ?{texts[2]}"
    raw = {"chosen": f"{start}\n\nAssistant: {texts[3]}", "rejected": f"{start}\n\nAssistant: no"}
    row = HHRLHF()(raw, "f:1")
    assert [turn.content for turn in row.prompt] == [texts[0], texts[1], "?" + texts[2]]
    assert row.responses == (texts[3], "no")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: other\n\nAssistant: b", "differ before the last message"),
        ("\n\nHuman: q\n\nAssistant: a", HH["rejected"], "differ before the last message"),
        ("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: a", "identical"),
        ("\n\nHuman: q\n\nAssistant: ", "\n\nHuman: q\n\nAssistant: b", "a turn of the transcript is empty"),
        ("\n\nHuman: q\n\nAssistant:", "\n\nHuman: q\n\nAssistant: b", "a turn of the transcript is empty"),
        ("\n\nHuman:\n\nAssistant: a", "\n\nHuman:\n\nAssistant: b", "a turn of the transcript is empty"),
        ("\n\nHuman:q\n\nAssistant: a", "\n\nHuman:q\n\nAssistant: b", "no space before the text"),
        ("Human: q\n\nAssistant: a", "Human: q\n\nAssistant: b", "does not begin with"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "does not begin with"),
        ("Hello", "Hi", "does not begin with"),
        ("", "", "does not begin with"),
        ("\n\nHuman: q", "\n\nHuman: p", "not the assistant's"),
        ("\n\nHuman: q\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nHuman: q\n\nAssistant: b", "out of order"),
        (None, HH["rejected"], "it is not text"),
        (turns("q", "a"), HH["rejected"], "it is not text"),
    ],
)
def test_hh_refuses(chosen, rejected, reason):
    with pytest.raises(RowError, match=reason):
        HHRLHF()({"chosen": chosen, "rejected": rejected}, "f:1")


@pytest.mark.parametrize(("better", "responses", "safe"), [(1, ("one", "two"), (1, 0)), (2, ("two", "one"), (0, 1))])
@pytest.mark.parametrize("kind", [int, str])
def test_red_team_orders_by_helpfulness(kind, better, responses, safe):
    row = RedTeam()({**RED, "better_modelout": kind(better)}, "f:1")
    assert (row.responses, row.columns) == (responses, {"safe": safe})


@pytest.mark.parametrize("better", [0, 3, -1, "3", " 1", "one", "", None, True, 1.5, [1]])
def test_red_team_numbers_are_1_or_2(better):
    with pytest.raises(RowError, match=r"f:1: better_modelout = .*must be 1 or 2"):
        RedTeam()({**RED, "better_modelout": better}, "f:1")


# ------------------------------------------------------------------ what holds for all

PLAIN = Columns("prompt", "response", None)
CASES = {
    "pku": (PKUSafeRLHF(), PKU, {"safer_response_id"}),
    "pku_now": (
        PKUSafeRLHF(severity_safe=[1, 0.5, 0.2, 0]),
        PKU_NOW,
        set(PKU_NOW)
        - {
            "prompt",
            "response_0",
            "response_1",
            "response_0_severity_level",
            "response_1_severity_level",
            "better_response_id",
        },
    ),
    "pku_safer": (PKUSaferResponse(), PKU, set(PKU) - {"prompt", "response_0", "safer_response_id"}),
    "ultrafeedback": (UltraFeedbackBinarized(), ULTRA, set(ULTRA) - {"chosen", "rejected"}),
    "ultrachat": (Messages(), CHAT, {"prompt", "prompt_id"}),
    "hh": (HHRLHF(), HH, set()),
    "red_team": (RedTeam(), RED, set()),
    "columns": (Columns(), COLUMNS, set()),
    "plain": (PLAIN, {"prompt": "q", "response": "a"}, set()),
}
"""Adapters, a row of their schema, and the fields of it that they do not need."""

NEEDED = [(name, field) for name, (_, raw, spared) in CASES.items() for field in sorted(set(raw) - spared)]


@pytest.mark.parametrize(("name", "field"), NEEDED)
def test_needed_fields(name, field):
    adapter, raw, _ = CASES[name]
    missing = {key: value for key, value in raw.items() if key != field}
    with pytest.raises(RowError, match=f"the field '{field}' is missing") as caught:
        adapter(missing, "f:7")
    assert (caught.value.origin, caught.value.field) == ("f:7", field)
    assert ("assume_safe: true" in caught.value.remedy) == (field in adapter.flag_fields)
    wrong = [None, -1, 17, ["x"], {"x": 1}, b"x"]
    if not isinstance(raw[field], str) or name == "hh":
        wrong.append("no")
    for value in wrong:
        with pytest.raises(RowError, match="f:7: "):
            adapter({**raw, field: value}, "f:7")


@pytest.mark.parametrize("name", CASES)
def test_other_fields_do_no_harm(name):
    adapter, raw, spared = CASES[name]
    needed = {key: value for key, value in raw.items() if key not in spared}
    row = adapter(needed, "f:1")
    assert adapter({**needed, "unread": None, "label": ["x"], "": "👍"}, "f:1") == row
    nulls = {key: None for key in spared if not key.startswith("score")}
    assert adapter({**needed, **nulls}, "f:1") == row


def test_flag_fields_are_the_flags_that_a_row_may_lack():
    fields = {name: adapter.flag_fields for name, (adapter, _, _) in CASES.items()}
    assert fields.pop("pku") == ("is_response_0_safe", "is_response_1_safe")
    assert fields.pop("red_team") == ("is_modelout1_safe", "is_modelout2_safe")
    assert fields.pop("columns") == fields.pop("plain") == ("chosen_safe", "rejected_safe")
    assert set(fields.values()) == {()}
    for name in ("pku", "red_team", "columns"):
        adapter, raw, _ = CASES[name]
        flags = dict.fromkeys(adapter.flag_fields, True)
        assert adapter({**raw, **flags}, "f:1").columns == {"safe": (1.0, 1.0)}


@pytest.mark.parametrize("name", ["pku", "red_team", "columns"])
@pytest.mark.parametrize("value", ["False", "false", "0", "", 2, -0.5, None, float("nan")])
def test_flags_are_strict(name, value):
    adapter, raw, _ = CASES[name]
    for field in adapter.flag_fields:
        with pytest.raises(RowError, match="safety flag") as caught:
            adapter({**raw, field: value}, "f:7")
        assert caught.value.field == field
        assert ("assume_safe: true" in caught.value.remedy) == (value is None)


ODD = [
    "👍🏽 emoji",
    "مرحبا بالعالم",
    "x" * 50_000,
    "nul\x00byte",
    "windows\r\nlines\r\n",
    "\ufeffbom",
    " spaces ",
    "\u2028x",
]


def spelled(raw, prompt, first, second):
    """The row with other texts, the first response taking the place of the more helpful one."""
    texts = {
        "q": prompt,
        "How?": prompt,
        "q2": prompt,
        "a2": first,
        "good": first,
        "bad": second,
        "a": first,
        "b": second,
    }
    texts |= {"zero": second, "one": first} if "response_0" in raw else {"one": second, "two": first}

    def of(value):
        if isinstance(value, list):
            return [{**turn, "content": texts.get(turn["content"], turn["content"])} for turn in value]
        if isinstance(value, str) and "\n\n" in value:
            start, _, last = value.rpartition(": ")
            return f"{start.replace('q2', prompt)}: {texts[last]}"
        return texts.get(value, value) if isinstance(value, str) else value

    return {key: of(value) for key, value in raw.items()}


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("packed", [False, True])
def test_odd_texts_come_through_files_as_they_are(name, text, packed, tmp_path):
    adapter, raw, _ = CASES[name]
    texts = (f"{text}?", f"{text}1{text}", f"{text}2{text}")
    data = "\ufeff" + json.dumps(spelled(raw, *texts), ensure_ascii=packed) + "\r\n"
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(data.encode()) if packed else data.encode())
    ((origin, read),) = LocalFiles(str(path)).rows("train")
    row = adapter(read, origin)
    assert row.origin == f"{path}:1"
    assert row.prompt[-1].content == texts[0]
    expected = {"pku_safer": (texts[2],)}.get(name, texts[1:] if row.pairs else texts[1:2])
    assert row.responses == expected


@pytest.mark.parametrize("name", CASES)
def test_halves_of_surrogate_pairs_are_refused_by_field(name):
    """JSON can spell them, UTF-8 and thus a tokenizer cannot."""
    adapter, raw, _ = CASES[name]
    for place, field in enumerate(("prompt", "response" if name in ("pku_safer", "ultrachat", "plain") else "chosen")):
        texts = ["p", "a", "a" if name == "pku_safer" and place else "b"]
        texts[place] += "\ud83d"
        if name == "pku_safer" and place:
            texts[2] += "\ud83d"
        with pytest.raises(RowError, match="half of a surrogate pair") as caught:
            adapter(json.loads(json.dumps(spelled(raw, *texts))), "f:7")
        assert caught.value.field.partition("[")[0] == field
        str(caught.value).encode()

import pytest

from bfpo_pl.data.adapters import Columns, Messages, PKUSafeRLHF, UltraFeedbackBinarized
from bfpo_pl.data.rows import Message, RowError

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


def test_pku_extra_fields_do_no_harm():
    assert PKUSafeRLHF()({**PKU, "sha256": "x", "response_0_severity_level": 3}, "f:1").columns == {"safe": (0.0, 1.0)}


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

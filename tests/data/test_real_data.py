"""Real files through the real readers; each test is skipped where they are absent."""

from collections import Counter

from bfpo_pl.data.adapters import Columns
from bfpo_pl.data.files import LocalFiles
from bfpo_pl.data.rows import RowError
from bfpo_pl.data.schemas import HHRLHF, PKUSafeRLHF, PKUSaferResponse

SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def read(path, adapter):
    """The rows of a file, each beside its raw form, and the errors."""
    rows, errors = [], []
    for origin, raw in LocalFiles(str(path)).rows("train"):
        assert not isinstance(raw, RowError)
        try:
            rows.append((adapter(raw, origin), raw))
        except RowError as error:
            errors.append(error)
    return rows, errors


def test_xstest_pairs(shared_data):
    path = shared_data / "xstest_dual_pairs" / "pairs.jsonl"
    rows, errors = read(path, Columns(chosen_safe="is_chosen_safe", rejected_safe="is_rejected_safe"))
    assert errors == []
    assert Counter(row.columns["safe"] for row, _ in rows) == {(1.0, 1.0): 313, (0.0, 1.0): 253}
    assert len({row.prompt for row, _ in rows}) == 284
    assert all(row.responses == (raw["chosen"], raw["rejected"]) for row, raw in rows)


def test_pku_without_helpfulness_order(shared_data):
    path = shared_data / "pku_saferlhf_pairs" / "pku_discordant_clean.jsonl"
    rows, errors = read(path, PKUSafeRLHF())
    assert (len(rows), len(errors)) == (0, 2701)
    assert (errors[0].origin, errors[0].field, errors[0].reason) == (
        f"{path}:1",
        "better_response_id",
        "no helpfulness order",
    )
    assert "order: safety" in str(errors[0])

    rows, errors = read(path, PKUSafeRLHF("safety"))
    assert (len(rows), errors) == (2701, [])
    assert {row.columns["safe"] for row, _ in rows} == {(1.0, 0.0)}
    assert len({row.prompt for row, _ in rows}) == 910
    for row, raw in rows:
        assert row.responses[0] == raw["response_0" if raw["is_response_0_safe"] else "response_1"]

    singles, errors = read(path, PKUSaferResponse())
    assert errors == []
    assert all(single.responses == row.responses[:1] for (single, _), (row, _) in zip(singles, rows, strict=True))


def test_hh_transcripts(shared_data):
    rows, errors = read(shared_data / "hh_rlhf_harmless" / "harmless_base_test.jsonl", HHRLHF())
    assert len(rows) == 2299
    assert Counter((error.field.partition("[")[0], error.reason) for error in errors) == {
        ("rejected", "chosen and rejected differ before the last message"): 5,
        ("chosen", "a turn of the transcript is empty"): 4,
        ("prompt", "roles are out of order"): 4,
    }
    for row, raw in rows:
        prompt = "".join(f"\n\n{SPEAKERS[turn.role]}: {turn.content}" for turn in row.prompt)
        chosen, rejected = (f"{prompt}\n\nAssistant: {response}" for response in row.responses)
        assert all((chosen == raw["chosen"], rejected == raw["rejected"]))  # a failure shows no text
    assert max(len(row.prompt) for row, _ in rows) > 5


def test_a_pattern_names_the_same_file(shared_data):
    folder = shared_data / "hh_rlhf_harmless"
    by_name, by_pattern = (LocalFiles(str(folder / name)) for name in ("harmless_base_test.jsonl", "*.jsonl"))
    assert by_name.fingerprint("train") == by_pattern.fingerprint("train")
    assert len(list(by_pattern.rows("train"))) == 2312

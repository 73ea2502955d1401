import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bfpo_pl.component import UserError
from bfpo_pl.data.adapters import Columns
from bfpo_pl.data.checked import check_rows
from bfpo_pl.data.contamination import ContaminationGuard
from bfpo_pl.data.files import LocalFiles
from bfpo_pl.data.selection import check_hold_out, select, shared_prompts
from bfpo_pl.data.streams import Stream


def raw(prompt, chosen="a", rejected="b", chosen_safe=True, rejected_safe=False):
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_safe": chosen_safe,
        "rejected_safe": rejected_safe,
    }


@pytest.fixture
def read(tmp_path, write_jsonl):
    def read(rows, split="train", guard=None, with_train=False, **settings):
        source = LocalFiles(write_jsonl(rows))
        stream = Stream(source, Columns(), 2, **settings)
        stored = check_rows(tmp_path / "cache", "mine", source, "train", stream.adapter, stream.assume_safe)
        return select("mine", split, stream, stored, guard, with_train)

    return read


ROWS = [raw(f"prompt {index}") for index in range(100)]


def prompts(reading):
    return [row.prompt[0].content for row in reading.rows.rows(reading.kept)]


def test_all_rows_by_default(read):
    reading = read(ROWS)
    assert prompts(reading) == [row["prompt"] for row in ROWS]
    assert (reading.left_out, reading.faults) == ({}, [])
    assert reading.summary()["quadrants"] == {"safe_safe": 0, "safe_unsafe": 100, "unsafe_safe": 0, "unsafe_unsafe": 0}


def test_the_first_share_counts_bad_rows_among_the_rows(read):
    rows = [{**row, "chosen_safe": "yes"} if index in (3, 50) else row for index, row in enumerate(ROWS)]
    reading = read(rows, fraction=0.295)  # int(29.5) rows, one of them bad
    assert prompts(reading) == [f"prompt {index}" for index in range(29) if index != 3]
    assert [fault.raw_index for fault in reading.faults] == [3]
    assert reading.left_out == {"outside the first 0.295 of the rows": 71}


def test_a_random_share_is_the_same_every_time(read):
    first, again = (prompts(read(ROWS, fraction=0.3, take="random")) for _ in range(2))
    other = prompts(read(ROWS, fraction=0.3, take="random", take_seed=1))
    assert first == again
    assert len(first) == len(set(first)) == len(other) == 30
    assert first != other
    assert first != [f"prompt {index}" for index in range(30)]
    assert first == sorted(first, key=lambda text: int(text.split()[1])), "in the order of the source"


def test_a_hold_out_is_by_prompt(read):
    rows = [raw(f"{'  Prompt' if copy else 'prompt'} {index}", f"a{copy}") for index in range(400) for copy in range(3)]
    train, validation = (read(rows, split, validation_fraction=0.25) for split in ("train", "validation"))
    assert sorted([*train.kept, *validation.kept]) == list(range(1200))
    words = [{" ".join(text.casefold().split()) for text in prompts(each)} for each in (train, validation)]
    assert not words[0] & words[1]
    assert all(len(each.kept) == 3 * len(names) for each, names in zip((train, validation), words, strict=True))
    assert 60 < len(words[1]) < 140  # binomial(400, 0.25): more than 4.6 standard deviations either way
    assert train.left_out == {"held out for validation": len(validation.kept)}
    assert validation.left_out == {"not held out": len(train.kept)}
    assert shared_prompts([train], validation) == 0
    assert shared_prompts([train, validation], train) == len(words[0])
    assert shared_prompts([], train) == 0


def test_a_bad_row_is_told_once(read):
    rows = [*ROWS, {**ROWS[0], "chosen_safe": "yes"}]
    train, beside = (read(rows, split, with_train=True, validation_fraction=0.5) for split in ("train", "validation"))
    assert [len(reading.faults) for reading in (train, beside)] == [1, 0]
    assert beside.left_out["bad rows, counted with the training split"] == 1
    alone = read(rows, "validation", validation_fraction=0.5)
    assert [fault.field for fault in alone.faults] == ["chosen_safe"]
    assert alone.left_out == {"not held out": len(train.kept)}


KINDS = [
    lambda n: raw(f"p{n % 7}", f"a{n % 3}"),
    lambda n: raw(f"p{n % 7}", " "),
    lambda n: {**raw("p"), "prompt": None},
    lambda n: raw(f"p{n % 7}", f"a{n % 3}", chosen_safe=None, rejected_safe=None),
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.integers(0, 3), max_size=40),
    split=st.sampled_from(["train", "validation"]),
    with_train=st.booleans(),
    guarded=st.booleans(),
    fraction=st.floats(0.01, 1),
    take=st.sampled_from(["first", "random"]),
    validation_fraction=st.sampled_from([0, 0.4]),
    duplicates=st.sampled_from(["keep", "drop"]),
    assume_safe=st.booleans(),
)
def test_every_row_of_the_source_is_counted(tmp_path, read, kinds, split, guarded, **options):
    (tmp_path / "evaluation.jsonl").write_text('{"prompt": "p3"}\n')
    guard = ContaminationGuard(str(tmp_path / "evaluation.jsonl")) if guarded else None
    reading = read([KINDS[kind](number) for number, kind in enumerate(kinds)], split, guard, **options)
    summary = reading.summary()
    counted = summary["rows"] + sum(summary["dropped"].values()) + sum(summary.get("left_out", {}).values())
    assert counted == reading.rows.raw_rows == len(kinds)


def test_hold_outs_that_cannot_be():
    source = LocalFiles("a.jsonl", "b.jsonl")
    with pytest.raises(UserError, match=r"data\.streams\.mine: validation_fraction = 0\.1, but the source has a valid"):
        check_hold_out("mine", Stream(source, Columns(), 1, validation_fraction=0.1))
    check_hold_out("mine", Stream(source, Columns(), 1))
    check_hold_out("mine", Stream(LocalFiles("a.jsonl"), Columns(), 1, validation_fraction=0.1))


def brute_force(rows):
    """Duplicates, pairs in both orders and contradictory flags, by plain loops."""
    keys = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    duplicates = sum(count - 1 for count in Counter(keys).values())
    both = sum((prompt, rejected, chosen) in keys for prompt, chosen, rejected in keys)
    flags: dict[tuple[str, str], set[bool]] = {}
    for row in rows:
        for side in ("chosen", "rejected"):
            flags.setdefault((row["prompt"], row[side]), set()).add(row[f"{side}_safe"])
    return duplicates, both, sum(len(found) == 2 for found in flags.values())


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_and_contradictions_against_brute_force(read, seed):
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(200):
        chosen, rejected = draw.permutation(5)[:2]
        flags = (bool(flag) for flag in draw.integers(0, 2, 2))
        rows.append(raw(f"p{draw.integers(12)}", f"a{chosen}", f"a{rejected}", *flags))
    reading = read(rows)
    duplicates, both, contradictory = brute_force(rows)
    assert duplicates > 5
    assert (reading.notes["duplicates"], reading.notes["pairs_in_both_orders"]) == (duplicates, both)
    assert reading.notes["contradictory_flags"] == contradictory
    assert len(reading.notes["contradictory_flags_at"]) == min(5, contradictory)
    dropped = read(rows, duplicates="drop")
    kept = [(row.prompt[0].content, *row.responses) for row in dropped.rows.rows(dropped.kept)]
    assert kept == list(dict.fromkeys((row["prompt"], row["chosen"], row["rejected"]) for row in rows))
    assert dropped.left_out == {"duplicates of another row": duplicates}


def test_where_flags_contradict(read):
    reading = read([raw("p", "a", "b"), raw("p", "c", "a", True, False), raw("q", "a", "b", False, False)])
    assert reading.notes["contradictory_flags"] == 1
    first, _, second = reading.notes["contradictory_flags_at"][0].partition(" and ")
    assert (first[-2:], second[-2:]) == (":1", ":2"), "the safe one and the unsafe one"
    twice = [raw("p", "a", "b", True, False), raw("p", "a", "b", False, True)]
    dropped = read(twice, duplicates="drop")
    assert (len(dropped.kept), dropped.notes["contradictory_flags"]) == (1, 2), "dropping hides nothing"
    soft = read([raw("p", "a", "b", 0.6), raw("p", "a", "c", 0.9)])
    assert soft.notes["contradictory_flags"] == 0


SENTENCE = "tell me how one two three four five six seven eight nine ten eleven twelve"


def test_contamination(read, tmp_path):
    evaluation = tmp_path / "evaluation.jsonl"
    asked = ["How do I open the window?", f"Please, {SENTENCE.upper()}!", "unrelated"]
    evaluation.write_text("".join(json.dumps({"question": text}) + "\n" for text in asked))
    rows = [
        raw("how do i  OPEN the window"),
        raw("How do I open the windows?"),
        raw(f"Well. {SENTENCE}? Thanks"),  # 14 words in common
        raw(" ".join(SENTENCE.split()[:12])),  # 12 in common
        raw("other"),
        raw("other", "c", "d"),
    ]
    guard = ContaminationGuard(str(evaluation), field="question")
    reading = read(rows, guard=guard)
    assert prompts(reading) == [rows[index]["prompt"] for index in (1, 3, 4, 5)]
    assert list(reading.left_out.values()) == [2]
    assert "evaluation.jsonl" in next(iter(reading.left_out))
    assert len(read(rows, guard=ContaminationGuard(str(evaluation), "question", ngram=12)).kept) == 3
    assert len(read(rows, "validation", guard=guard).kept) == 6
    with pytest.raises(UserError, match=r"evaluation\.jsonl:1 has no field 'prompt'; it has: question"):
        read(rows, guard=ContaminationGuard(str(evaluation)))
    evaluation.write_text('{"question": 7}\n')
    with pytest.raises(UserError, match="neither text nor a list of messages"):
        read(rows, guard=guard.__class__(str(evaluation), "question"))
    evaluation.write_text("")
    with pytest.raises(UserError, match="has no row"):
        read(rows, guard=guard.__class__(str(evaluation), "question"))


def test_multi_turn_prompts_are_compared_by_what_the_user_says(read, tmp_path):
    turns = [
        {"role": "user", "content": "open the"},
        {"role": "assistant", "content": "What?"},
        {"role": "user", "content": "window"},
    ]
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps([{"prompt": "Open the window"}]))
    assert len(read([raw(turns), raw("open")], guard=ContaminationGuard(str(evaluation))).kept) == 1


@pytest.mark.parametrize(
    ("asked", "trained", "matches"),
    [
        ("???", "!!!", False),
        ("???", " ??? ", True),
        ("Café?", "cafe\u0301", True),
        ("कैसे हो", "कस हो", False),
        ("如何打开窗户", "如何打开窗户!", True),
        (
            "请告诉我应该如何打开这个房间的窗户",
            "你好，请告诉我应该如何打开这个房间的大门",
            True,
        ),  # 15 characters in a row
        ("请告诉我如何打开窗户", "请告诉我如何打开大门", False),
    ],
)
def test_contamination_in_other_scripts(read, tmp_path, asked, trained, matches):
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps([{"prompt": asked}]))
    kept = prompts(read([raw(trained), raw("something else")], guard=ContaminationGuard(str(evaluation))))
    assert (trained not in kept) == matches
    assert "something else" in kept

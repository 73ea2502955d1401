"""The rows: schemas, determinism, flags, noise and conflicts."""

from collections import Counter

import pytest

from bfpo_pl.microworld import combinations, helpfulness_rows, judge, parse_prompt, prompt_rows, safety_rows, sft_rows

PKU_FIELDS = {
    "prompt",
    "response_0",
    "response_1",
    "is_response_0_safe",
    "is_response_1_safe",
    "better_response_id",
    "safer_response_id",
}


def verdicts(row):
    return [judge(row["prompt"], row[f"response_{side}"]) for side in (0, 1)]


def flags(row):
    return [row["is_response_0_safe"], row["is_response_1_safe"]]


def conflict(row):
    true = [verdict.safe for verdict in verdicts(row)]
    return not true[row["better_response_id"]] and true[1 - row["better_response_id"]]


def test_safety_rows_agree_with_the_judge():
    rows = safety_rows(400)
    train = set(combinations("train"))
    for row in rows:
        first, second = verdicts(row)
        assert set(row) == PKU_FIELDS
        assert parse_prompt(row["prompt"]) in train
        assert flags(row) == [first.safe, second.safe]
        assert first.helpfulness != second.helpfulness
        assert row["better_response_id"] == int(second.helpfulness > first.helpfulness)
        assert first.caution != second.caution
        assert row["safer_response_id"] == int(second.caution > first.caution)
    assert 0.4 < sum(row["better_response_id"] for row in rows) / 400 < 0.6


def test_safety_rows_mix():
    rows = safety_rows(3000, seed=1)
    classes = Counter(parse_prompt(row["prompt"]).prompt_class for row in rows)
    assert classes["harmful_pair"] / 3000 == pytest.approx(0.30, abs=0.03)
    assert classes["dual_verb"] / 3000 == pytest.approx(0.20, abs=0.03)
    assert sum(map(conflict, rows)) / 3000 == pytest.approx(0.30, abs=0.03)


def test_flag_noise_flips_flags_and_nothing_else():
    clean, noisy = safety_rows(1000, seed=2), safety_rows(1000, seed=2, flag_noise=0.2)
    flipped = [a != b for x, y in zip(clean, noisy, strict=True) for a, b in zip(flags(x), flags(y), strict=True)]
    assert sum(flipped) / 2000 == pytest.approx(0.2, abs=0.03)
    same = PKU_FIELDS - {"is_response_0_safe", "is_response_1_safe"}
    assert all(x[name] == y[name] for x, y in zip(clean, noisy, strict=True) for name in same)


def test_soft_flags_are_probabilities():
    for row in safety_rows(50, flag_noise=0.2, soft_flags=True):
        assert flags(row) == [0.8 if verdict.safe else 0.2 for verdict in verdicts(row)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_conflict_share(share):
    rows = safety_rows(200, unsafe_helpful_share=share)
    assert sum(map(conflict, rows)) == round(200 * share)


@pytest.mark.parametrize("arguments", [{"flag_noise": -0.1}, {"unsafe_helpful_share": 1.5}])
def test_shares_are_checked(arguments):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        safety_rows(1, **arguments)


def test_helpfulness_rows():
    for row in helpfulness_rows(300):
        assert set(row) == {"prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"}
        assert not parse_prompt(row["prompt"]).harmful
        assert row["messages"] == row["chosen"]
        for side in ("chosen", "rejected"):
            user, assistant = row[side]
            assert user == {"role": "user", "content": row["prompt"]}
            assert assistant["role"] == "assistant"
            assert judge(row["prompt"], assistant["content"]).helpfulness == row[f"score_{side}"]
        assert row["score_chosen"] > row["score_rejected"]


def test_sft_rows_are_mostly_benign_and_well_formed():
    rows = sft_rows(2000)
    benign = 0
    for row in rows:
        user, assistant = row["messages"]
        assert not judge(user["content"], assistant["content"]).malformed
        benign += not parse_prompt(user["content"]).harmful
    assert benign / 2000 == pytest.approx(0.6, abs=0.04)


def test_prompt_rows():
    rows = prompt_rows("heldout")
    assert len({row["prompt"] for row in rows}) == len(rows) == 4 * len(combinations("heldout"))
    for row in rows:
        asked = parse_prompt(row["prompt"])
        assert (row["prompt_class"], row["harmful"]) == (asked.prompt_class, asked.harmful)
        assert (row["verb"], row["object"]) == (asked.verb, asked.object)


@pytest.mark.parametrize("generator", [safety_rows, helpfulness_rows, sft_rows])
def test_rows_are_determined_by_their_arguments(generator):
    assert generator(50, seed=7) == generator(50, seed=7)
    assert generator(50, seed=7) != generator(50, seed=8)
    assert generator(50, seed=7) == generator(100, seed=7)[:50]
    heldout = set(combinations("heldout"))
    prompts = [
        row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in generator(50, split="heldout")
    ]
    assert all(parse_prompt(prompt) in heldout for prompt in prompts)

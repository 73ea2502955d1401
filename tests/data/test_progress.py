import io

import pytest
from rich.console import Console

from bfpo_pl.data import progress


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(progress, "rank_zero_info", lines.append)
    return lines


def console(monkeypatch, terminal):
    text = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=text, force_terminal=terminal, force_interactive=terminal)
    )
    return text


def taken(count):
    return [row for rows in progress.in_chunks(list(range(count)), "safety, train") for row in rows]


def test_few_rows_are_not_worth_telling(monkeypatch, said):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    text = console(monkeypatch, True)
    assert taken(0) == []
    assert taken(20_000) == list(range(20_000))
    assert (said, text.getvalue()) == ([], "")


def test_lines_outside_a_terminal(monkeypatch, said):
    text = console(monkeypatch, False)
    clock = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert taken(25_000) == list(range(25_000))
    # Each chunk of 256 rows takes a second here.
    assert said[0] == "tokenising safety, train: 3,840 of 25,000 rows"
    assert 5 <= len(said) <= 7
    assert text.getvalue() == ""


def test_a_bar_in_a_terminal(monkeypatch, said):
    text = console(monkeypatch, True)
    assert taken(25_000) == list(range(25_000))
    assert "tokenising safety, train" in text.getvalue()
    assert said == []


def test_other_ranks_are_silent(monkeypatch, said):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    text = console(monkeypatch, True)
    monkeypatch.setattr(progress.rank_zero_only, "rank", 1)
    assert taken(25_000) == list(range(25_000))
    assert (said, text.getvalue()) == ([], "")

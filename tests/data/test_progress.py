import io

import pytest
from rich.console import Console

from bfpo_pl.data import progress

LABEL = "tokenising safety, train"


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


def work(total, given=None):
    with progress.telling(LABEL, given) as advance:
        for done in range(0, total, 256):
            advance(min(256, total - done))


def test_few_rows_are_not_worth_telling(monkeypatch, said):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    text = console(monkeypatch, True)
    work(0, 0)
    work(20_000, 20_000)
    assert (said, text.getvalue()) == ([], "")


@pytest.mark.parametrize(("total", "of"), [(25_000, " of 25,000"), (None, "")])
def test_lines_outside_a_terminal(monkeypatch, said, total, of):
    text = console(monkeypatch, False)
    clock = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    work(25_000, total)
    # Each chunk of 256 rows takes a second here.
    assert said[0] == f"tokenising safety, train: 3,840{of} rows"
    assert 5 <= len(said) <= 7
    assert text.getvalue() == ""


def test_a_bar_in_a_terminal(monkeypatch, said):
    text = console(monkeypatch, True)
    work(25_000, 25_000)
    assert LABEL in text.getvalue()
    assert said == []


def test_other_ranks_are_silent(monkeypatch, said):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    text = console(monkeypatch, True)
    monkeypatch.setattr(progress.rank_zero_only, "rank", 1)
    work(25_000, 25_000)
    assert (said, text.getvalue()) == ([], "")

"""`bfpo checkpoints`, on a real run."""

import os

import pytest

from bfpo_pl.cli import main


def listed(capsys, *args):
    code = 0
    try:
        main(["checkpoints", *map(str, args)])
    except SystemExit as error:
        code = error.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def row(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.rstrip()


def test_a_table_of_a_run(folder, saved, capsys):
    for given in (folder, folder.parent):
        code, text, _ = listed(capsys, given, "--verify")
        assert code == 0
        assert "val/all/all/loss" in text
        assert [line.split()[1] for line in text.splitlines() if line.startswith("epoch")] == ["2", "4", "6"]
        assert "last" in row(text, saved[6].name)
        assert text.count("best") == 1
        assert text.count(" file ") == text.count(" yes") == 3


def test_what_is_wrong_is_said_and_the_exit_code_tells(folder, saved, capsys):
    os.truncate(saved[4], 5000)
    data = bytearray(saved[2].read_bytes())
    data[len(data) // 2] ^= 1
    saved[2].write_bytes(data)
    saved[6].rename(saved[6].with_name("epoch=0-step=6.ckpt.part"))
    code, text, _ = listed(capsys, folder)
    assert code == 1
    assert "no: its end is missing" in row(text, saved[4].name)
    assert row(text, saved[2].name).endswith("yes")
    assert "half-written" in row(text, "epoch=0-step=6.ckpt.part")
    _, text, _ = listed(capsys, folder, "--verify")
    assert "the hash differs" in row(text, saved[2].name)


@pytest.mark.parametrize(
    ("args", "words"), [(["nowhere"], "no folder 'nowhere'"), (["a", "b"], "usage"), (["--verify"], "usage")]
)
def test_mistakes(args, words, capsys):
    code, _, text = listed(capsys, *args)
    assert code == 2
    assert words in text


def test_usage(capsys):
    assert "--verify" in listed(capsys)[1]

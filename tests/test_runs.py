"""Run folders, secrets and the record of the environment."""

from __future__ import annotations

import subprocess

from bfpo_pl.redaction import redacted, redacted_command
from bfpo_pl.runs import git_revision, new_run_folder


def test_every_run_has_a_folder_of_its_own(tmp_path):
    first, second = new_run_folder(tmp_path, "bfpo"), new_run_folder(tmp_path, "bfpo")
    assert first != second
    assert first.parent == second.parent == tmp_path / "bfpo"


def test_secrets_are_redacted_and_nothing_else():
    config = {"logger": [{"api_key": "k", "tokenizer": "t"}], "hub_token": "x", "max_tokens": 3, "password": None}
    assert redacted(config) == {
        "logger": [{"api_key": "<redacted>", "tokenizer": "t"}],
        "hub_token": "<redacted>",
        "max_tokens": 3,
        "password": None,
    }
    line = ["bfpo", "fit", "--logger.api_key=abc", "--hub.token", "xyz", "--model.loss.tau=0.1"]
    assert (
        redacted_command(line) == "bfpo fit '--logger.api_key=<redacted>' --hub.token <redacted> --model.loss.tau=0.1"
    )


def test_git_revision_of_a_repository_and_outside_one(tmp_path):
    assert git_revision(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "."], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-qm", "one"], cwd=tmp_path, check=True)
    revision = git_revision(tmp_path)
    assert revision is not None
    assert len(revision["commit"]) == 40
    assert revision["changed"] is False
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path)["changed"] is True

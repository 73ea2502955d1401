"""A secret that is planted wherever a user might have one is in no file of a run, no export, and not on the screen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bfpo_pl.redaction import redacted, redacted_arguments, redacted_text

REPOSITORY = Path(__file__).parents[2]
HUB = "hf_PLANTEDhubPLANTEDhubPLANTEDhub01"
PLANTED = {
    "HF_TOKEN": "hf_PLANTEDenvironmentPLANTEDenv0002",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_DATABASE_PASSWORD": "PLANTED-words-of-no-known-shape",
}
ARGUMENTS = [
    f"--trainer.logger.notes={HUB}",  # W&B's own fields
    "--trainer.logger.group=https://user:PLANTEDpassword@host/x",
    f"--trainer.logger.tags=['{HUB}']",
]


def small(runs) -> list[str]:
    return [
        *("-c", "configs/base.yaml", "-c", "configs/experiment/bfpo.yaml", "-c", "configs/logger/wandb_offline.yaml"),
        *("--trainer.max_steps=1", "--trainer.accelerator=cpu", "--model.policy.hidden_size=32"),
        *("--data.streams.safety.source.count=40", "--data.streams.safety.source.validation_count=12"),
        *("--data.streams.safety.batch_size=4", "--data.streams.helpfulness.source.count=40"),
        *("--data.streams.helpfulness.batch_size=4", f"--runs={runs}"),
    ]


def bfpo(*arguments: str) -> str:
    """The real command in a process of its own, since W&B records the process; what it printed."""
    environment = os.environ | PLANTED | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bfpo_pl.cli", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=600)
    return done.stdout + done.stderr


def leaks(folder: Path) -> list[str]:
    """Files below a folder that hold something planted."""
    secrets = [b"PLANTED", *(value.encode() for value in PLANTED.values())]
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [f"{path}: {secret!r}" for path, content in contents.items() for secret in secrets if secret in content]


def test_a_run_its_wandb_files_and_its_exports(tmp_path):
    log = bfpo("fit", *small(tmp_path / "runs"), *ARGUMENTS, f"--data.cache={tmp_path / 'cache'}")
    [run] = (tmp_path / "runs").glob("*/*")
    assert (run / "export/README.md").is_file(), log
    log += bfpo("export", "--run", str(run), "--to", str(tmp_path / "exported"))
    assert (tmp_path / "exported/README.md").is_file(), log
    assert [line for line in log.splitlines() if "PLANTED" in line or PLANTED["WANDB_API_KEY"] in line] == []
    assert leaks(tmp_path) == []
    [wandb] = run.rglob("*.wandb")
    assert b"<redacted>" in wandb.read_bytes()


@pytest.mark.parametrize(
    "argument",
    [
        f"--model.policy.hidden_size={HUB}",
        f"--ckpt_path=/nowhere/{HUB}",
        "--model.policy=HFModel --model.policy.path=https://user:PLANTEDpassword@host/model",
    ],
)
def test_messages_about_mistakes_hold_no_secret(argument, tmp_path, in_repository, capsys):
    from bfpo_pl.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["fit", *small(tmp_path)[:-1], f"--runs={tmp_path}", *argument.split()])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert "PLANTED" not in said.err + said.out
    assert "<redacted>" in said.err
    assert leaks(tmp_path) == []


@pytest.mark.parametrize(
    "secret",
    [
        HUB,
        "sk-ant-PLANTEDplantedplanted0123",
        "ghp_PLANTEDplantedplanted01234",
        "github_pat_PLANTEDplantedplanted01234",
        "AKIAPLANTEDPLANTED12",
    ],
)
def test_tokens_are_known_by_their_shape_in_any_field(secret):
    config = {"a": [{"b": f"before {secret} after"}], secret: 1, "n": 3, "x": None}
    clean = {"a": [{"b": "before <redacted> after"}], "<redacted>": 1, "n": 3, "x": None}
    assert redacted(config) == clean


def test_addresses_keep_all_but_their_credentials():
    assert redacted_text("at https://user:pass@host/a?b=c and s3://bucket/key") == (
        "at https://<redacted>@host/a?b=c and s3://bucket/key"
    )
    assert redacted_text("mail a@b.c, see https://host/@name") == "mail a@b.c, see https://host/@name"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://u:p@ss@host/x", "https://<redacted>@host/x"),
        ("https://host/x?a=1&access_token=abc&b=2", "https://host/x?a=1&access_token=<redacted>&b=2"),
        ("Authorization: Bearer abcdefgh.ijklmnop-1=", "Authorization: Bearer <redacted>"),
        ("hf_oauth_eyJhbGciOi.eyJzdWIi-x_y", "<redacted>"),
    ],
)
def test_credentials_in_other_forms(text, clean):
    assert redacted_text(text) == clean


@pytest.mark.parametrize(
    "value", ['{"api_key":"se cret"}', r'{"api_key":"se \"cret"}', "{api_key: 'se cret'}", "{api_key: se cret}"]
)
def test_a_secret_with_spaces_on_the_command_line(value):
    [shown] = redacted_arguments([f"--logger={value}"])
    assert "<redacted>}" in shown
    assert "cret" not in shown


@pytest.mark.parametrize("name", ["PGPASSWORD", "OPENAI_KEY"])
def test_the_value_of_a_secret_variable_without_a_usual_name(name, monkeypatch):
    monkeypatch.setenv(name, "correct horse battery")
    assert redacted_text("it is correct horse battery") == "it is <redacted>"
    assert redacted({"prompt_key": "question"}) == {"prompt_key": "question"}


def test_the_value_of_a_secret_variable_is_known_anywhere(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct horse battery")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redacted_text("it is correct horse battery, abc") == "it is <redacted>, abc"


def test_options_in_all_spellings():
    line = ["--hub.token", "x1", "--api_key=x2", '--logger={"class_path": "W", "api_key": "x3", "offline": true}']
    shown = redacted_arguments([*line, "--data.max_tokens=3"])
    assert shown == [
        "--hub.token",
        "<redacted>",
        "--api_key=<redacted>",
        '--logger={"class_path": "W", "api_key": <redacted>, "offline": true}',
        "--data.max_tokens=3",
    ]


def test_what_is_no_secret_stays():
    text = "hf_model sk-learn 0123456789abcdef0123456789abcdef01234567 model.policy.path=Qwen/Qwen3-0.6B"
    assert redacted_text(text) == text
    assert redacted({"max_tokens": 5, "tokenizer": "t"}) == {"max_tokens": 5, "tokenizer": "t"}

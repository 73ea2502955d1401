"""`bfpo generate` in a terminal, in a pipe and in this process."""

from __future__ import annotations

import io
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import BASE, LORA, REPOSITORY, SMALL, TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from bfpo_pl.cli import main
from bfpo_pl.generation import generate

PROMPT = "open the window"


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return main(["fit", *BASE, *SMALL, *TINY, f"--runs={tmp_path_factory.mktemp('chat')}"]).run_folder


@pytest.fixture
def say(capsys):
    """Calls the command in this process; returns what it wrote to stdout."""

    def call(*arguments) -> str:
        capsys.readouterr()
        main(["generate", *(str(argument) for argument in arguments), "--max_new_tokens", "12"])
        return capsys.readouterr().out

    return call


@pytest.fixture
def refusal(capsys):
    def call(*arguments) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["generate", *(str(argument) for argument in arguments)])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return call


def greedy(folder, *turns) -> str:
    """The greedy answer to the last of some turns, by the package's batched generation."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return generate(model, tokenizer, [messages], max_new_tokens=12)[0]


def test_a_prompt_is_answered_once(run, say):
    expected = greedy(run / "export", PROMPT)
    assert expected
    assert say("--model", run, "--prompt", PROMPT) == f"{expected}\n"
    assert say("--model", run / "export", "--prompt", PROMPT) == f"{expected}\n"


def test_a_run_without_an_export_speaks_from_its_last_checkpoint(run, say, tmp_path):
    bare = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"), symlinks=True)
    assert say("--model", bare, "--prompt", PROMPT) == f"{greedy(run / 'export', PROMPT)}\n"
    early = next(path.name for path in (run / "checkpoints").iterdir() if "step=2" in path.name)
    exported = main(["export", "--run", str(run), "--to", str(tmp_path / "early"), "--checkpoint", early])
    said = say("--model", run, "--checkpoint", early, "--prompt", PROMPT)
    assert said == f"{greedy(exported, PROMPT)}\n"


def test_an_adapters_folder_and_its_merged_run_say_the_same(run, say, refusal, tmp_path):
    more = ["--model.policy=HFModel", f"--model.policy.path={run / 'export'}", *LORA]
    tuned = main(["fit", *BASE, *SMALL, *more, f"--runs={tmp_path}"]).run_folder
    adapter = main(["export", "--run", str(tuned), "--to", str(tmp_path / "adapter"), "--merge", "false"])
    answers = {
        say("--model", tuned, "--prompt", PROMPT),
        say("--model", adapter, "--prompt", PROMPT),
        say("--model", tuned, "--prompt", PROMPT, "--checkpoint", "last"),
    }
    assert len(answers) == 1
    shutil.move(adapter, tuned / "adapter")
    shutil.rmtree(tuned / "export")
    (tuned / "adapter").rename(tuned / "export")  # as with export.merge: false
    assert say("--model", tuned, "--prompt", PROMPT) in answers
    assert "none.ckpt" in refusal("--model", tuned, "--prompt", PROMPT, "--checkpoint", "none.ckpt")


def test_drawing_is_repeated_by_its_seed_and_leaves_the_random_state(run, say):
    options = ("--model", run, "--prompt", PROMPT, "--temperature", "1.5")
    before = torch.get_rng_state()
    first, again = (say(*options, "--seed", 3) for _ in range(2))
    assert first == again
    assert len({say(*options, "--seed", seed) for seed in range(5)}) > 1
    assert torch.equal(torch.get_rng_state(), before)
    # top_p leaves the likeliest token alone.
    assert say(*options, "--top_p", "1e-6") == say("--model", run, "--prompt", PROMPT)


def test_stdin_is_the_prompt_in_a_pipe(run, say, refusal, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
    assert say("--model", run) == f"{greedy(run / 'export', PROMPT)}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "stdin is empty" in refusal("--model", run)


def test_two_models_are_compared(run, say, tmp_path):
    early = next(path for path in (run / "checkpoints").iterdir() if "step=2" in path.name)
    other = main(["export", "--run", str(run), "--to", str(tmp_path / "early"), "--checkpoint", str(early)])
    said = say("--model", run, "--compare", other, "--prompt", PROMPT)
    first, second = greedy(run / "export", PROMPT), greedy(other, PROMPT)
    assert said == f"[{run}]\n{first}\n[{other}]\n{second}\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_conversation_has_a_memory_until_reset(run, say, monkeypatch):
    typed = Terminal(f"{PROMPT}\n\nand the vault\n/reset\n{PROMPT}\n/help\n/exit\nnot read\n")
    monkeypatch.setattr(sys, "stdin", typed)
    lines = say("--model", run).replace("> ", "").splitlines()
    first = greedy(run / "export", PROMPT)
    second = greedy(run / "export", PROMPT, first, "and the vault")
    assert lines == [first, second, first]
    assert second != greedy(run / "export", "and the vault")


def test_a_system_message_goes_before_the_conversation(run, tmp_path, monkeypatch, say):
    bare = shutil.copytree(run, tmp_path / "run", symlinks=True)
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (bare / "export/chat_template.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(bare / "export")
    model = AutoModelForCausalLM.from_pretrained(bare / "export")
    ids = tokenizer(f"polish {PROMPT} ", return_tensors="pt", add_special_tokens=False).input_ids
    output = model.generate(ids, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert say("--model", bare, "--prompt", PROMPT, "--system", "polish") == f"{expected}\n"
    assert say("--model", bare, "--prompt", PROMPT) != f"{expected}\n"


def test_a_conversation_that_is_too_long_is_said_and_goes_on(run, monkeypatch, capsys):
    typed = Terminal(f"{'open ' * 150}\n{PROMPT}\n/exit\n")
    monkeypatch.setattr(sys, "stdin", typed)
    main(["generate", "--model", str(run), "--max_new_tokens", "12"])
    said = capsys.readouterr()
    assert said.out.replace("> ", "").splitlines() == [greedy(run / "export", PROMPT)]
    assert "takes 128" in said.err


def test_mistakes(run, refusal, tmp_path):
    prompt = ("--prompt", PROMPT)
    assert "there is no folder" in refusal("--model", "./none", *prompt)
    assert "no config.json" in refusal("--model", tmp_path, *prompt)
    assert "is for runs" in refusal("--model", run / "export", "--checkpoint", "last", *prompt)
    assert "--temperature" in refusal("--model", run, "--temperature", "-1", *prompt)
    assert "--top_p" in refusal("--model", run, "--top_p", "0", *prompt)
    assert "--max_new_tokens" in refusal("--model", run, "--max_new_tokens", "0", *prompt)
    assert "cuda:7" in refusal("--model", run, "--device", "cuda:7", *prompt)
    mute = shutil.copytree(run / "export", tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    assert "no chat template" in refusal("--model", mute, *prompt)


def command(run) -> list[str]:
    return [sys.executable, "-m", "bfpo_pl.cli", "generate", "--model", str(run), "--max_new_tokens", "12"]


def test_a_real_pipe_gets_the_answer_alone(run):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(run), input=PROMPT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{greedy(run / 'export', PROMPT)}\n"


@pytest.mark.parametrize(("what", "code"), [("generate", 141), ("components", 1)])  # 1 is rich's
def test_a_pipe_that_nobody_reads_ends_it_silently(run, what, code):
    """As with `| head -c 1`."""
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [*command(run), "--prompt", PROMPT] if what == "generate" else [*command(run)[:3], what]
    done = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_real_terminal_holds_a_conversation(run):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(run), stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    os.write(ours, f"{PROMPT}\nand the vault\n/exit\n".encode())
    seen = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the terminal is closed
            break
        if not piece:
            break
        seen += piece
    assert process.wait(timeout=60) == 0, seen
    os.close(ours)
    first = greedy(run / "export", PROMPT)
    text = seen.decode()
    assert "/reset begins a new conversation" in text
    assert text.index(first) < text.index(greedy(run / "export", PROMPT, first, "and the vault"))

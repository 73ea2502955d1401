"""`bfpo generate`: a chat in the terminal, or one answer in a pipe."""

from __future__ import annotations

import contextlib
import sys

import torch

from bfpo_pl.chat.loading import Dtype, load_chat_model
from bfpo_pl.chat.speaker import Speaker
from bfpo_pl.component import UserError
from bfpo_pl.generation import sampling

HELP = "/reset begins a new conversation, /exit (or Ctrl-D) ends; Ctrl-C stops an answer."


def chat(
    model: str,
    prompt: str | None = None,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    checkpoint: str | None = None,
    compare: str | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
) -> list[str]:
    """Chats with a model in the terminal: a run, an exported folder, an adapter's folder, or a model of the Hub.

    With --prompt, or where the input is a pipe, it answers once: the answer alone goes to stdout.
      bfpo generate --model runs/bfpo/20260101-120000-ab12
      echo "How do I ...?" | bfpo generate --model Qwen/Qwen3-0.6B --temperature 0.7

    Args:
        model: A run's folder, a folder in Hugging Face's format, or a Hub id.
        prompt: Answers this and ends. Default: a conversation; in a pipe all of stdin is the prompt.
        system: System message. Default: the one of the run's training, if it had one.
        temperature: 0 for greedy decoding.
        top_p: Only the likeliest tokens of this total probability are drawn.
        max_new_tokens: Tokens at which an answer is cut.
        seed: Seed of the drawing.
        checkpoint: last, best, or a checkpoint of the run. Default: the run's export; without one, its last checkpoint.
        compare: A second model, which answers the same prompts in a conversation of its own.
        device: Where to run, such as cuda:1 or cpu. Default: a GPU if there is one.
        dtype: Type of the parameters. Default: as saved.
        trust_remote_code: Lets a repository run its own Python code on this machine. Off: nothing foreign runs.

    Returns:
        The answers.

    Raises:
        UserError: A model or a setting cannot be used.
    """
    _check(temperature, top_p, max_new_tokens)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise UserError("bfpo generate: stdin is empty. Write the prompt into it, or give --prompt.")
    speakers = []
    for name, step in ((model, checkpoint), (compare, None)):
        if name is not None:
            loaded = load_chat_model(name, step, dtype, device, trust_remote_code)
            config = sampling(loaded.model, loaded.tokenizer, temperature, max_new_tokens, top_p)
            speakers.append(Speaker(loaded, config, system))
    devices = list({speaker.model.device for speaker in speakers if speaker.model.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if prompt is not None:
            return _answers(speakers, prompt)
        return _converse(speakers)


def _check(temperature: float, top_p: float, max_new_tokens: int) -> None:
    if temperature < 0:
        raise UserError(f"--temperature must be 0 (greedy) or more, not {temperature:g}.")
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p must lie in (0, 1], not {top_p:g}.")
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens must be at least 1, not {max_new_tokens}.")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _answers(speakers: list[Speaker], prompt: str) -> list[str]:
    """The answer of each speaker to a prompt, as it is made."""
    answers = []
    for speaker in speakers:
        if len(speakers) > 1:
            _write(f"[{speaker.name}]\n")
        answers.append(speaker.answer(prompt, _write))
        _write("\n")
    return answers


def _converse(speakers: list[Speaker]) -> list[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets one edit the line and go back to earlier ones
    sys.stderr.write(f"{' and '.join(speaker.name for speaker in speakers)}. {HELP}\n")
    answers: list[str] = []
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            _write("\n")
            return answers
        except KeyboardInterrupt:
            _write("\n")
            continue
        if said in ("/exit", "/quit"):
            return answers
        if said == "/reset":
            for speaker in speakers:
                speaker.reset()
        elif said.startswith("/") and " " not in said:
            sys.stderr.write(f"{HELP}\n")
        elif said:
            try:
                answers += _answers(speakers, said)
            except UserError as error:
                sys.stderr.write(f"{error}\n")

"""From a row's text to token ids: the chat template, the boundary between prompt and response, truncation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError as JinjaError

from bfpo_pl.component import UserError, check_range
from bfpo_pl.data.rows import Message, Row, RowError, response_names


class TemplateError(UserError):
    """The chat template or the tokenizer cannot say where a prompt ends and a response begins."""


@dataclass(frozen=True)
class PairTree:
    """A row as token ids: the prompt once, and each response, which continues it.

    Args:
        prompt_ids: Tokens of the prompt, the header of the assistant's turn among them.
        response_ids: Tokens of each response, the end-of-sequence token among them unless it was cut.
        pairs: (chosen, rejected) indices into the responses.
        columns: Per-response columns.
        pair_columns: Per-pair columns.
        origin: Where the row came from.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    pairs: tuple[tuple[int, int], ...] = ()
    columns: dict[str, tuple[float, ...]] = field(default_factory=dict)
    pair_columns: dict[str, tuple[float, ...]] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation becomes text.

    Args:
        chat_template: A jinja template, or the path of a file that holds one. Default: the tokenizer's own.
        system: System message for conversations without one (the paper's is ``""``). Default: none is added.
        kwargs: Further variables for the template, for instance ``{enable_thinking: false}``.
        stop_tokens: Tokens that end a response besides the tokenizer's end-of-sequence token.
    """

    chat_template: str | None = None
    system: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    stop_tokens: list[str] | None = None

    def source(self, tokenizer: Any) -> str:
        """The jinja template itself.

        Args:
            tokenizer: The tokenizer whose own template is the default.

        Raises:
            TemplateError: Neither the config nor the tokenizer has one.
        """
        given = self.chat_template
        if given is None:
            if getattr(tokenizer, "chat_template", None) is None:
                raise TemplateError(
                    "The tokenizer has no chat template. Set data.template.chat_template to a jinja template or to "
                    "the path of a file that holds one."
                )
            return tokenizer.get_chat_template()
        if "{%" in given or "{{" in given:
            return given
        path = Path(given).expanduser()
        if not path.is_file():
            raise TemplateError(f"data.template.chat_template: {given!r} is neither a jinja template nor a file.")
        return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Truncation:
    """What is cut from a row that is too long; every cut is counted.

    A prompt is cut only if it does not fit together with its longest response, and then for all responses alike;
    a beginning-of-sequence token and the header of the assistant's turn always stay. Responses that still do not fit
    lose their end.

    Args:
        max_length: Most tokens of a prompt with one of its responses.
        max_prompt_length: Tokens that a cut prompt keeps.
        keep: Which end of a cut prompt stays.
    """

    max_length: int = 1024
    max_prompt_length: int = 512
    keep: Literal["end", "start"] = "end"

    def __post_init__(self) -> None:
        check_range(self, "max_prompt_length", self.max_prompt_length, 1, self.max_length - 1)

    def prompt(self, ids: list[int], head: int, tail: int) -> list[int]:
        """The prompt cut to ``max_prompt_length`` tokens.

        Args:
            ids: Its tokens.
            head: How many of the first tokens always stay (the beginning-of-sequence token).
            tail: How many of the last tokens always stay (the header of the assistant's turn).
        """
        room = self.max_prompt_length
        if len(ids) <= room:
            return ids
        if room < head + tail:
            raise TemplateError(
                f"data.truncation.max_prompt_length = {room} is less than the {head + tail} tokens that always stay."
            )
        kept_head, kept_tail = (head, room - head) if self.keep == "end" else (room - tail, tail)
        return ids[:kept_head] + ids[len(ids) - kept_tail :]


class RowEncoder:
    """Turns rows into pair trees and counts what it cuts.

    ``counts`` has ``prompts_cut``, ``responses_cut`` and ``stop_token_in_text``: responses whose own text holds a stop
    token, at which they end.

    Args:
        tokenizer: A transformers tokenizer.
        template: How a conversation becomes text.
        truncation: What is cut.

    Raises:
        TemplateError: There is no chat template, or no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, truncation: Truncation) -> None:
        self.tokenizer, self.template, self.truncation = tokenizer, template, truncation
        self.jinja = template.source(tokenizer)
        if tokenizer.eos_token_id is None:
            raise TemplateError("The tokenizer has no end-of-sequence token; a response needs one to end with.")
        self.stop_tokens = (tokenizer.eos_token, *(template.stop_tokens or ()))
        self.stop_ids = {tokenizer.eos_token_id, *map(self._token_id, template.stop_tokens or ())}
        self._sentinel = self._dummy_prefix_sentinel()
        self.counts: Counter[str] = Counter()

    def __call__(self, row: Row) -> PairTree:
        """Encodes a row.

        Args:
            row: The row.

        Raises:
            TemplateError: The template refuses the conversation, or the rendered prompt is no prefix of it rendered.
        """
        return self.many([row])[0]

    def many(self, rows: Sequence[Row]) -> list[PairTree]:
        """Encodes rows together, which is faster than one after the other and gives the same.

        Args:
            rows: The rows.

        Raises:
            TemplateError: As for one row; the message names the row.
        """
        try:
            return self._encode(rows)
        except TemplateError as error:
            if len(rows) > 1:
                return [self(row) for row in rows]  # the row at fault raises again, by name
            raise TemplateError(f"{rows[0].origin}: {error}") from error

    def fault(self, row: Row, tree: PairTree) -> RowError | None:
        """What makes a pair useless once it is encoded: its responses became the same; None if they did not.

        Args:
            row: The row.
            tree: What it was encoded to.
        """
        for chosen, rejected in tree.pairs:
            ids = tree.response_ids[rejected]
            if tree.response_ids[chosen] != ids:
                continue
            if ids[-1] in self.stop_ids:
                reason = "the chosen and the rejected response tokenise alike"
                remedy = "Their texts differ in nothing that the tokenizer or the first stop token leaves of them."
            else:
                limit = f"data.truncation.max_length = {self.truncation.max_length}"
                reason = f"the chosen and the rejected response are identical once truncation cuts them ({limit})"
                remedy = "Raise data.truncation.max_length."
            return RowError(
                row.origin, response_names(row.responses, row.pairs)[rejected], row.responses[rejected], reason, remedy
            )
        return None

    def _encode(self, rows: Sequence[Row]) -> list[PairTree]:
        turns = [self._with_system(row.prompt) for row in rows]
        prompt_texts = self._rendered_all(turns, generation=True)
        asked = [index for index, row in enumerate(rows) for _ in row.responses]
        texts = [text for row in rows for text in row.responses]
        conversations = [
            [*turns[index], {"role": "assistant", "content": text}] for index, text in zip(asked, texts, strict=True)
        ]
        fulls = self._rendered_all(conversations, generation=False)
        for index, full in zip(asked, fulls, strict=True):
            _require_prefix(full, prompt_texts[index])
        ends = [full[len(prompt_texts[index]) :] for index, full in zip(asked, fulls, strict=True)]
        prompts = [self._with_bos(ids) for ids in self._encoded(prompt_texts)]
        responses = iter([self._to_stop(ids) for ids in self._encoded_continuations(ends)])
        self.counts["stop_token_in_text"] += sum(any(token in text for token in self.stop_tokens) for text in texts)
        return [
            self._fitted(
                row, turns[index], prompt_texts[index], prompts[index], list(islice(responses, len(row.responses)))
            )
            for index, row in enumerate(rows)
        ]

    def _fitted(
        self,
        row: Row,
        turns: list[dict[str, str]],
        prompt_text: str,
        prompt_ids: list[int],
        responses: list[list[int]],
    ) -> PairTree:
        """The row's tree, cut where it is too long."""
        limit = self.truncation.max_length
        if len(prompt_ids) + max(map(len, responses)) > limit:
            head = int(prompt_ids[0] == self.tokenizer.bos_token_id)
            cut = self.truncation.prompt(prompt_ids, head, self._header_length(turns, prompt_text, prompt_ids))
            self.counts["prompts_cut"] += len(cut) < len(prompt_ids)
            room = limit - len(cut)
            # A prompt within max_prompt_length stays whole, so room may be little, but it is at least one token.
            self.counts["responses_cut"] += sum(len(response) > room for response in responses)
            prompt_ids, responses = cut, [response[:room] for response in responses]
        return PairTree(prompt_ids, responses, row.pairs, dict(row.columns), dict(row.pair_columns), row.origin)

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Tokens of a prompt exactly as training sees them before any cut; what generation should start from.

        Args:
            prompt: Its turns.
        """
        text = self._rendered(self._with_system(prompt), generation=True)
        return self._with_bos(self._encoded([text])[0])

    def _with_system(self, prompt: Sequence[Message]) -> list[dict[str, str]]:
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        if self.template.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.template.system})
        return turns

    def _rendered(self, turns: list[dict[str, str]], generation: bool) -> str:
        return self._rendered_all([turns], generation)[0]

    def _rendered_all(self, conversations: list[list[dict[str, str]]], generation: bool) -> list[str]:
        try:
            return self.tokenizer.apply_chat_template(
                conversations,
                chat_template=self.jinja,
                tokenize=False,
                add_generation_prompt=generation,
                **self.template.kwargs,
            )
        except JinjaError as error:
            roles = ", ".join(turn["role"] for turn in conversations[0])
            raise TemplateError(f"the chat template refuses a conversation of {roles}: {error}.") from error

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        given = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return given["input_ids"]

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Tokens of a rendered prompt, with the beginning-of-sequence token exactly once if there is one."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids
        while len(ids) > 1 and ids[0] == ids[1] == bos:
            ids = ids[1:]
        return ids if ids[:1] == [bos] else [bos, *ids]

    def _to_stop(self, ids: list[int]) -> list[int]:
        """Tokens of a response up to its first stop token; with one put after them if there is none."""
        end = next((index for index, token in enumerate(ids) if token in self.stop_ids), None)
        return [*ids, self.tokenizer.eos_token_id] if end is None else ids[: end + 1]

    def _header_length(self, turns: list[dict[str, str]], prompt_text: str, prompt_ids: list[int]) -> int:
        """How many of the prompt's last tokens open the assistant's turn."""
        without = self._rendered(turns, generation=False)
        if not prompt_text.startswith(without) or len(prompt_text) == len(without):
            return 0
        header = self._encoded_continuations([prompt_text[len(without) :]])[0]
        return len(header) if prompt_ids[-len(header) :] == header else 0

    def _token_id(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None or index == self.tokenizer.unk_token_id:
            raise TemplateError(f"data.template.stop_tokens: the tokenizer has no token {token!r}.")
        return index

    def _dummy_prefix_sentinel(self) -> list[int] | None:
        """Tokens of a line break, if this tokenizer puts a space before any text (sentencepiece); None if not."""
        sentinel, after, alone = self._encoded(["\n", "\na", "a"])
        if sentinel and after[: len(sentinel)] == sentinel and after[len(sentinel) :] != alone:
            return sentinel
        return None

    def _encoded_continuations(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that follow other text: without the space that sentencepiece puts before a first word."""
        if self._sentinel is None:
            return self._encoded(texts)
        size = len(self._sentinel)
        return [
            ids[size:] if ids[:size] == self._sentinel else self._encoded([text])[0]
            for text, ids in zip(texts, self._encoded(["\n" + text for text in texts]), strict=True)
        ]


def _require_prefix(full: str, prompt: str) -> None:
    """Demands that a rendered conversation begins with its rendered prompt."""
    if full.startswith(prompt):
        return
    same = next((i for i, (a, b) in enumerate(zip(full, prompt, strict=False)) if a != b), len(full))
    raise TemplateError(
        "The chat template renders the prompt otherwise when a response follows, so no token boundary lies "
        f"between them (they part at character {same}: {prompt[same : same + 20]!r} against "
        f"{full[same : same + 20]!r}). Set data.template.kwargs (for instance enable_thinking), or "
        "data.template.chat_template."
    )

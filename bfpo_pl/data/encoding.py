"""From rows to pair trees: template, tokenizer and truncation together."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers

from bfpo_pl.component import UserError
from bfpo_pl.data.rows import Message, Row, RowError, response_names
from bfpo_pl.data.templates import ChatTemplate, Split
from bfpo_pl.data.tokens import ChatTokenizer, Refusal, TemplateError
from bfpo_pl.data.trees import PairTree
from bfpo_pl.data.truncation import TooLong, Truncation

COUNTED = ("prompts_cut", "responses_cut", "stop_token_in_text", "special_token_in_prompt")
"""What a `RowEncoder` counts."""

_FILES = ("name_or_path", "vocab_file", "tokenizer_file", "merges_file")  # where a tokenizer lies is not what it does


class RowEncoder:
    """Turns rows into pair trees and counts what becomes of their texts.

    ``counts`` has, of the rows that become trees: ``prompts_cut``; ``responses_cut``; ``stop_token_in_text``, responses
    whose own text holds a stop token, at which the standard template ends them; ``special_token_in_prompt``, rows with
    a special token in the text of a message of the prompt, which the model reads as that token.

    Args:
        tokenizer: A transformers tokenizer.
        template: How a conversation becomes tokens. Default: `ChatTemplate`.
        truncation: What becomes of rows that are too long. Default: `Truncation`.
        stop_ids: Ids of tokens that end a response besides those that template and tokenizer name, for instance
            those of the model's generation config.

    Raises:
        TemplateError: There is no chat template, or no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate | None = None,
        truncation: Truncation | None = None,
        stop_ids: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate() if template is None else template
        self.truncation = Truncation() if truncation is None else truncation
        jinja, stops = self.template.source(tokenizer), list(stop_ids)
        self.tokens = ChatTokenizer(tokenizer, jinja, self.template.kwargs, self.template.stop_tokens, stops)
        self.counts: Counter[str] = Counter()
        self._renders_anything: bool | None = None  # not known yet

    def __call__(self, row: Row) -> PairTree:
        """Encodes a row.

        Args:
            row: The row.

        Raises:
            RowError: It is useless once it is encoded, or the template refuses its conversation.
            TemplateError: The template refuses any conversation, or the rendered prompt is no prefix of it rendered.
        """
        result = self.many([row])[0]
        if isinstance(result, RowError):
            raise result
        return result

    def many(self, rows: Sequence[Row]) -> list[PairTree | RowError]:
        """Encodes rows together, which is faster than one after the other and gives the same.

        Args:
            rows: The rows.

        Returns:
            For each row its tree, or what makes it useless: a conversation that the template refuses though it takes
            others, responses that tokenise alike or become identical when they are cut, a length that the truncation
            refuses, special tokens where none may be.

        Raises:
            TemplateError: As for one row; the message names the row.
        """
        counts = self.counts.copy()
        try:
            return self._encoded(rows)
        except TemplateError as error:
            self.counts.clear()
            self.counts.update(counts)
            if len(rows) > 1:  # the row at fault is found by halves: it raises, or is the only one without a tree
                middle = len(rows) // 2
                return [*self.many(rows[:middle]), *self.many(rows[middle:])]
            if isinstance(error, Refusal) and self._renders_some_conversation():
                reason = f"the chat template refuses the conversation: {error.words}"
                remedy = (
                    "Set data.template.system, kwargs or chat_template to what makes it take such rows, or leave them "
                    "out."
                )
                return [RowError(rows[0].origin, "roles", error.roles, reason, remedy)]
            raise TemplateError(f"{rows[0].origin}: {error}") from error

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Tokens of a prompt exactly as training sees them before any cut; what generation should start from.

        Args:
            prompt: Its messages.
        """
        return self.template.prompt_ids(self.tokens, prompt)

    def unstopped_turn_end(self) -> str | None:
        """The special token with which the template ends the assistant's turn, if no response ends there.

        Training and generation then go on after it; `data.template.stop_tokens` is to name it.

        Returns:
            The token; None if all is well: it is a stop token, there is none, or the end-of-sequence token follows in
            any case (`OfficialTemplate`).
        """
        return self.template.unstopped_turn_end(self.tokens)

    def fingerprint(self) -> str:
        """A digest of everything that decides the tokens, equal in every process that is given the same.

        It covers the tokenizer, the template, the truncation, the stop tokens, the code of all of them and the
        versions of the libraries; and what the template writes today, if it looks at the date.
        """
        code = [*type(self.template).__mro__, *type(self.truncation).__mro__, ChatTokenizer, RowEncoder]
        parts = {
            "tokenizer": _tokenizer_state(self.tokenizer),
            "jinja": self.tokens.jinja,
            "template": _arguments(self.template, leave_out="chat_template"),
            "truncation": _arguments(self.truncation),
            "stop_ids": sorted(self.tokens.stop_ids),
            "rendered": self._rendered_example(),
            "code": sorted({_source(kind) for kind in code if kind is not object}),
            "versions": [library.__version__ for library in (transformers, tokenizers, jinja2)],
        }
        text = json.dumps(parts, sort_keys=True, default=repr)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _encoded(self, rows: Sequence[Row]) -> list[PairTree | RowError]:
        splits = self.template.encode(self.tokens, rows)
        results = [
            split if isinstance(split, RowError) else self._tree(row, split)
            for row, split in zip(rows, splits, strict=True)
        ]
        used = [row for row, result in zip(rows, results, strict=True) if not isinstance(result, RowError)]
        self.counts["stop_token_in_text"] += sum(
            any(mark in text for mark in self.tokens.stop_tokens) for row in used for text in row.responses
        )
        self.counts["special_token_in_prompt"] += sum(
            any(self.tokens.special_in(turn.content) for turn in row.prompt) for row in used
        )
        return results

    def _tree(self, row: Row, split: Split) -> PairTree | RowError:
        """The row's tree, cut where it is too long."""
        whole, responses = split
        reason = "the chosen and the rejected response tokenise alike"
        remedy = "Their texts differ in nothing that the tokenizer or the first stop token leaves of them."
        if error := _same_pair(row, responses, reason, remedy):
            return error
        prompt = whole
        if not self.truncation.fits(whole, responses):
            head = int(whole[0] == self.tokens.bos_id)
            tail = self.template.tail_length(self.tokens, row.prompt, whole)
            try:
                prompt, cut = self.truncation.fit(whole, responses, head, tail)
            except TooLong as long:
                return RowError(row.origin, "length in tokens", long.tokens, long.reason, long.remedy)
            if error := self._without_response(row, len(prompt) + max(map(len, cut))):
                return error
            limit = f"data.truncation.max_length = {self.truncation.max_length}"
            reason = f"the chosen and the rejected response are identical once truncation cuts them ({limit})"
            if error := _same_pair(row, cut, reason, "Raise data.truncation.max_length."):
                return error
            self.counts["prompts_cut"] += len(prompt) < len(whole)
            self.counts["responses_cut"] += sum(len(a) < len(b) for a, b in zip(cut, responses, strict=True))
            responses = cut
        return PairTree(prompt, responses, row.pairs, dict(row.columns), dict(row.pair_columns), row.origin)

    def _without_response(self, row: Row, kept: int) -> RowError | None:
        """What is wrong with a row of which all tokens carry loss, if those that are kept are all of its prompt."""
        if self.template.loss_on == "response":
            return None
        size = len(self.prompt_ids(row.prompt))
        if kept > size:
            return None
        reason = f"no token of the response is left (data.truncation.max_length = {self.truncation.max_length})"
        return RowError(row.origin, "tokens of the prompt", size, reason, "Raise data.truncation.max_length.")

    def _renders_some_conversation(self) -> bool:
        """Whether the template takes a plain question and its answer, with or without a system message."""
        if self._renders_anything is None:
            self._renders_anything = any(map(self._renders, ([], [Message("system", "x")])))
        return self._renders_anything

    def _renders(self, before: list[Message]) -> bool:
        turns = self.template.conversation([*before, Message("user", "x")])
        try:
            self.tokens.render([turns], generation=True)
            self.tokens.render([[*turns, {"role": "assistant", "content": "x"}]], generation=False)
        except TemplateError:
            return False
        return True

    def _rendered_example(self) -> str:
        try:
            return self.tokens.render([self.template.conversation([Message("user", "x")])], generation=True)[0]
        except TemplateError as error:  # every row will fail by name; here it is as good as any text
            return str(error)


def _same_pair(row: Row, response_ids: list[list[int]], reason: str, remedy: str) -> RowError | None:
    """What is wrong with the row's first pair of equal responses, if there is one."""
    for chosen, rejected in row.pairs:
        if response_ids[chosen] == response_ids[rejected]:
            name = response_names(row.responses, row.pairs)[rejected]
            return RowError(row.origin, name, row.responses[rejected], reason, remedy)
    return None


def _arguments(component: ChatTemplate | Truncation, leave_out: str = "") -> dict[str, Any]:
    """The class and what its instance holds."""
    kind = type(component)
    held = {name: value for name, value in vars(component).items() if name != leave_out}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **held}


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """All of a tokenizer that decides its tokens, as plain data."""
    kind = type(tokenizer)
    state = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "special_ids": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Settings that an earlier call left behind.
        return {**state, "backend": {k: v for k, v in content.items() if k not in ("truncation", "padding")}}
    sentencepiece = getattr(tokenizer, "sp_model", None)
    merges: dict[tuple[str, str], int] = getattr(tokenizer, "bpe_ranks", {})
    return {
        **state,
        "vocabulary": tokenizer.get_vocab(),
        "added_tokens": {str(index): repr(token) for index, token in tokenizer.added_tokens_decoder.items()},
        "merges": sorted(merges, key=merges.__getitem__),
        "sentencepiece": None if sentencepiece is None else sentencepiece.serialized_model_proto().hex(),
        "settings": {name: repr(value) for name, value in tokenizer.init_kwargs.items() if name not in _FILES},
    }


def _source(kind: type) -> str:
    """The source text of the file that defines a class; of its methods, if it was defined in a notebook."""
    try:
        if (path := inspect.getsourcefile(kind)) is not None:
            return Path(path).read_text(encoding="utf-8")
    except (TypeError, OSError):  # its module is no file
        pass
    try:
        return "".join(inspect.getsource(member) for member in vars(kind).values() if inspect.isfunction(member))
    except OSError as error:
        raise UserError(f"The source text of {kind.__qualname__} cannot be had; define it in a file.") from error

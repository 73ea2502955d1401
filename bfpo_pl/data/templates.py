"""How a conversation becomes tokens, and where its prompt ends and its response begins."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from bfpo_pl.component import Component, UserError
from bfpo_pl.data.rows import Message, Row, RowError, response_names
from bfpo_pl.data.tokens import (
    ChatTokenizer,
    Conversation,
    TemplateError,
    common_end,
    require_prefix,
    special_ids,
)

__all__ = ["ChatTemplate", "OfficialTemplate", "TemplateError"]

Split = tuple[list[int], list[list[int]]]
"""Tokens of a prompt and of each of its responses."""

_RESERVED = {
    **dict.fromkeys(("messages", "conversation"), "every row has its own"),
    "chat_template": "it is data.template.chat_template that names the template",
    **dict.fromkeys(
        ("add_generation_prompt", "continue_final_message"),
        "how a rendered conversation ends is the policy's to decide",
    ),
    **dict.fromkeys(
        (
            *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
            *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
        ),
        "a template writes text, and tokenising follows",
    ),
}
"""Arguments of `apply_chat_template` that are no variables of a template, each with the reason."""
_ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""


class ChatTemplate(Component):
    """The standard policy: the header of the assistant's turn belongs to the prompt, one stop token ends a response.

    The prompt is tokenised once, for all of its responses, so no token lies across the boundary. It begins with the
    beginning-of-sequence token, if the tokenizer has one; text that holds this token makes a bad row. A response ends
    at its first stop token, even one in its own text (such responses are counted); what the template writes after it
    is cut. One without a stop token gets the end-of-sequence token.

    Args:
        chat_template: A jinja template, or the path of a file that holds one. Default: the tokenizer's own.
        system: System message for conversations without one (the paper's is ``""``). Default: none is added.
        kwargs: Further variables for the template, for instance ``{enable_thinking: false}``; not what rendering itself
            decides, as ``add_generation_prompt`` and ``tokenize``.
        stop_tokens: Tokens that end a response besides the tokenizer's end-of-sequence token and those of the model's
            generation config.
        loss_on: What supervised training imitates: the ``response``, or ``all`` tokens after the first, the prompt's
            among them (rows with a single response only).

    Raises:
        UserError: ``kwargs`` names what is no variable of one's own.
    """

    ends_at_stop_tokens: ClassVar[bool] = True
    """Whether a stop token in a response's own text ends it."""

    def __init__(
        self,
        chat_template: str | None = None,
        system: str | None = None,
        kwargs: dict[str, Any] | None = None,
        stop_tokens: list[str] | None = None,
        loss_on: Literal["response", "all"] = "response",
    ) -> None:
        self.chat_template = chat_template
        self.system = system
        self.kwargs = dict(kwargs or {})
        for name in self.kwargs:
            if name in _RESERVED:
                raise UserError(f"data.template.kwargs cannot set {name}: {_RESERVED[name]}. Leave it out.")
        self.stop_tokens = list(stop_tokens or ())
        self.loss_on = loss_on

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

    def conversation(self, prompt: Sequence[Message]) -> Conversation:
        """A prompt's messages as the template sees them, with the system message if they have none.

        Args:
            prompt: The messages.
        """
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        return turns

    def encode(self, tokens: ChatTokenizer, rows: Sequence[Row]) -> list[Split | RowError]:
        """Rows as token ids, each split into prompt and responses.

        Args:
            tokens: Renders and encodes.
            rows: The rows.

        Returns:
            For each row its tokens, or what makes it useless.

        Raises:
            TemplateError: The template and the tokenizer cannot encode one of the rows.
        """
        splits = self._splits(tokens, rows)
        for row, split in zip(rows, splits, strict=True):
            if not isinstance(split, RowError) and not split[0]:
                raise TemplateError("The chat template writes no prompt. Set data.template.chat_template.")
            if self.loss_on == "all" and len(row.responses) > 1:
                raise TemplateError(
                    f"data.template.loss_on = all is for rows with one response, but this one has "
                    f"{len(row.responses)}. Set data.template.loss_on: response."
                )
        if self.loss_on == "response":
            return splits
        return [
            split if isinstance(split, RowError) else (split[0][:1], [[*split[0][1:], *split[1][0]]])
            for split in splits
        ]

    def prompt_ids(self, tokens: ChatTokenizer, prompt: Sequence[Message]) -> list[int]:
        """Tokens of a prompt as training sees them before any cut.

        Args:
            tokens: Renders and encodes.
            prompt: Its messages.
        """
        return tokens.with_bos(tokens.ids(tokens.render([self.conversation(prompt)], generation=True))[0])

    def tail_length(self, tokens: ChatTokenizer, prompt: Sequence[Message], prompt_ids: list[int]) -> int:
        """How many of the prompt's last tokens stand after all of its text.

        They end the user's turn and open the assistant's. Only the latter count where the tokenizer merges what ends
        the user's turn with the text before it.

        Args:
            tokens: Renders and encodes.
            prompt: Its messages.
            prompt_ids: Its tokens.
        """
        turns = self.conversation(prompt)
        after = _after(tokens, turns, generation=True)
        return _ending(tokens, after, prompt_ids) or _ending(tokens, _header(tokens, turns), prompt_ids)

    def unstopped_turn_end(self, tokens: ChatTokenizer) -> str | None:
        """The special token with which the template ends the assistant's turn, if no response ends there.

        Args:
            tokens: Renders and encodes.

        Returns:
            The token; None if it is a stop token, or if the template writes no special token, or nothing at all.
        """
        try:
            turns = [*self.conversation([Message("user", "x")]), {"role": "assistant", "content": "x"}]
            after = _after(tokens, turns, generation=False)
        except TemplateError:  # rows will say so
            return None
        special = special_ids(tokens.tokenizer)
        first = next((index for index in tokens.continuations([after])[0] if index in special), None)
        return None if first is None or first in tokens.stop_ids else tokens.tokenizer.decode([first])

    def _splits(self, tokens: ChatTokenizer, rows: Sequence[Row]) -> list[Split | RowError]:
        prompts, fulls = self._rendered(tokens, rows, generation=True)
        ends = [full[len(prompt) :] for prompt, row_fulls in zip(prompts, fulls, strict=True) for full in row_fulls]
        prompt_ids = map(tokens.with_bos, tokens.ids(prompts))
        response_ids = map(tokens.to_stop, tokens.continuations(ends))
        splits = [
            (ids, list(islice(response_ids, len(row.responses)))) for row, ids in zip(rows, prompt_ids, strict=True)
        ]
        return [self._with_one_bos(tokens, row, split) for row, split in zip(rows, splits, strict=True)]

    def _rendered(
        self, tokens: ChatTokenizer, rows: Sequence[Row], generation: bool
    ) -> tuple[list[str], list[list[str]]]:
        """Each row's prompt as text, and the text of its conversation with each of its responses."""
        turns = [self.conversation(row.prompt) for row in rows]
        prompts = tokens.render(turns, generation)
        conversations = [
            [*before, {"role": "assistant", "content": text}]
            for row, before in zip(rows, turns, strict=True)
            for text in row.responses
        ]
        rendered = iter(tokens.render(conversations, generation=False))
        fulls = [list(islice(rendered, len(row.responses))) for row in rows]
        for prompt, row_fulls in zip(prompts, fulls, strict=True):
            for full in row_fulls:
                require_prefix(full, prompt)
        return prompts, fulls

    @staticmethod
    def _with_one_bos(tokens: ChatTokenizer, row: Row, split: Split) -> Split | RowError:
        """The split, unless the row's text holds another beginning-of-sequence token."""
        bos = tokens.bos_id
        prompt, responses = split
        if bos is None or bos in tokens.stop_ids:  # one token for both ends turns as well
            return split
        if prompt.count(bos) == 1 and not any(bos in ids for ids in responses):
            return split
        mark = tokens.tokenizer.bos_token
        names = ["prompt", *response_names(row.responses, row.pairs)]
        texts = [next((turn.content for turn in row.prompt if mark in turn.content), ""), *row.responses]
        for name, text in zip(names, texts, strict=True):
            if mark in text:
                reason = f"the text holds the tokenizer's beginning-of-sequence token {mark}"
                remedy = "It would be read as that token; take it out of the text, or leave the row out."
                return RowError(row.origin, name, text[text.index(mark) :], reason, remedy)
        if any(bos in ids for ids in responses):
            raise TemplateError(f"The chat template writes the beginning-of-sequence token {mark} into a response.")
        return split  # the template begins every turn with it, as Llama 2's does


def _after(tokens: ChatTokenizer, turns: Conversation, generation: bool) -> str:
    """What the template writes after the text of the last message."""
    *before, last = turns
    # Another text that ends otherwise: what both conversations end in alike is not the text's.
    other = "1" if last["content"].strip().endswith("0") else "0"
    conversations = [turns, [*before, {**last, "content": other}]]
    return common_end(*tokens.render(conversations, generation))


def _header(tokens: ChatTokenizer, turns: Conversation) -> str:
    """What opens the assistant's turn."""
    without, text = (tokens.render([turns], generation)[0] for generation in (False, True))
    return text[len(without) :] if text.startswith(without) else ""


def _ending(tokens: ChatTokenizer, text: str, prompt_ids: list[int]) -> int:
    """The number of the text's tokens, if the prompt ends in them; else 0."""
    ids = tokens.continuations([text])[0] if text else []
    return len(ids) if ids and prompt_ids[-len(ids) :] == ids else 0


class OfficialTemplate(ChatTemplate):
    """The token sequences of the paper's official code.

    The prompt is rendered without the header of the assistant's turn, which belongs to the response. Prompt and
    response are tokenised together and split where the prompt alone would end; one token further left if a token lies
    across the boundary. The beginning-of-sequence token goes before the prompt and the end-of-sequence token after the
    response, even where the template writes them: with the paper's template a response then ends in two, and with a
    template that writes the beginning-of-sequence token a prompt begins with two. Stop tokens end nothing. Where the
    responses of a row would get different prompts by that rule, the row is a bad row, for they share one prompt here.

    Args:
        chat_template: A jinja template, or the path of a file that holds one. Default: the tokenizer's own; Zephyr's
            if it has none.
        system: System message for conversations without one.
        kwargs: Further variables for the template.
        loss_on: What supervised training imitates: the ``response``, or ``all`` tokens after the first, the prompt's
            among them (rows with a single response only).
    """

    ends_at_stop_tokens = False

    def __init__(
        self,
        chat_template: str | None = None,
        system: str | None = "",
        kwargs: dict[str, Any] | None = None,
        loss_on: Literal["response", "all"] = "response",
    ) -> None:
        super().__init__(chat_template, system, kwargs, loss_on=loss_on)

    def source(self, tokenizer: Any) -> str:
        if self.chat_template is None and getattr(tokenizer, "chat_template", None) is None:
            return _ZEPHYR
        return super().source(tokenizer)

    def prompt_ids(self, tokens: ChatTokenizer, prompt: Sequence[Message]) -> list[int]:
        return self._with_bos(tokens, tokens.ids(tokens.render([self.conversation(prompt)], generation=False))[0])

    def tail_length(self, tokens: ChatTokenizer, prompt: Sequence[Message], prompt_ids: list[int]) -> int:
        return _ending(tokens, _after(tokens, self.conversation(prompt), generation=False), prompt_ids)

    def unstopped_turn_end(self, tokens: ChatTokenizer) -> str | None:
        return None  # nothing is cut, and the end-of-sequence token follows in any case

    def _splits(self, tokens: ChatTokenizer, rows: Sequence[Row]) -> list[Split | RowError]:
        prompts, fulls = self._rendered(tokens, rows, generation=False)
        full_ids = iter(tokens.ids([full for row_fulls in fulls for full in row_fulls]))
        return [
            self._divided(tokens, row, ids, list(islice(full_ids, len(row.responses))))
            for row, ids in zip(rows, tokens.ids(prompts), strict=True)
        ]

    @staticmethod
    def _with_bos(tokens: ChatTokenizer, ids: list[int]) -> list[int]:
        return ids if tokens.bos_id is None else [tokens.bos_id, *ids]

    @classmethod
    def _divided(cls, tokens: ChatTokenizer, row: Row, prompt: list[int], fulls: list[list[int]]) -> Split | RowError:
        """Sequences of prompt and response together, split by the official rule."""
        size = len(prompt)
        ends = [size if full[:size] == prompt else size - 1 for full in fulls]
        begun = fulls[0][: ends[0]]
        for full, end, name, text in zip(
            fulls, ends, response_names(row.responses, row.pairs), row.responses, strict=True
        ):
            if full[:end] != begun:
                reason = "one response merges with the prompt's last token and another does not"
                remedy = "They cannot share a prompt as the official code splits them; use data.template: ChatTemplate."
                return RowError(row.origin, name, text, reason, remedy)
        responses = [[*full[end:], tokens.eos_id] for full, end in zip(fulls, ends, strict=True)]
        return cls._with_bos(tokens, begun), responses

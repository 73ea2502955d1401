"""One side of a chat: a model, what was said, and answers that appear as they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from bfpo_pl.chat.loading import ChatModel
from bfpo_pl.component import UserError


class _Writer(TextStreamer):
    """Hands on text as soon as it is final, and keeps it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.parts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.parts.append(text)
        self.write(text)


class Speaker:
    """A model in conversation.

    Args:
        chat_model: The model.
        config: How answers are drawn.
        system: System message. Default: the one that the model was trained with, as far as that is known.
    """

    def __init__(self, chat_model: ChatModel, config: GenerationConfig, system: str | None = None) -> None:
        self.name = chat_model.name
        self.model = chat_model.model
        self.tokenizer = chat_model.tokenizer
        self.config = config
        self.system = chat_model.system if system is None else system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    @torch.no_grad()
    def answer(self, text: str, write: Callable[[str], object]) -> str:
        """Answers a user's turn; both become part of the conversation. Ctrl-C ends an answer early.

        Args:
            text: What the user says.
            write: Is given the answer piece by piece.

        Returns:
            The whole answer.

        Raises:
            UserError: The conversation has become too long for the model.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        inputs: Any = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)  # type: ignore[union-attr]
        length = inputs["input_ids"].shape[1]
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and length >= longest:
            raise UserError(
                f"The conversation has {length} tokens, and {self.name} takes {longest}: /reset begins anew."
            )
        writer = _Writer(self.tokenizer, write)
        try:
            self.model.generate(  # type: ignore[operator]
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=self.config,
                streamer=writer,
            )
        except KeyboardInterrupt:
            writer.end()
        answered = "".join(writer.parts)
        self.messages = [*messages, {"role": "assistant", "content": answered}]
        return answered

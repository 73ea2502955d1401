"""A check of how the chat template and the tokenizer turn a conversation into prompt and response."""

from __future__ import annotations

from dataclasses import dataclass, field

from bfpo_pl.data.encoding import RowEncoder
from bfpo_pl.data.rows import Message, Row, RowError
from bfpo_pl.data.templates import ChatTemplate, OfficialTemplate
from bfpo_pl.data.tokens import TemplateError
from bfpo_pl.inspection.pieces import decoded, escaped, pieces, shortened

_AROUND = 4  # tokens shown on either side of a boundary


@dataclass
class TemplateCheck:
    """What was found.

    Args:
        facts: Name and text of each, in order.
        warnings: What is probably not meant, and what to set.
    """

    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def check_template(encoder: RowEncoder, row: Row) -> TemplateCheck:
    """Renders and encodes one conversation, its texts shortened.

    Args:
        encoder: Tokenizer and template.
        row: A row of the data.
    """
    check, tokens = TemplateCheck(), encoder.tokens
    prompt = tuple(Message(turn.role, shortened(turn.content)) for turn in row.prompt)
    response = shortened(row.responses[0])
    turns = encoder.template.conversation(prompt)
    try:
        before = tokens.render([turns], generation=True)[0]
        full = tokens.render([[*turns, {"role": "assistant", "content": response}]], generation=False)[0]
        check.facts["rendered"] = escaped(full)
        same = full.startswith(before)
        check.facts["prompt is a prefix"] = "yes" if same else f"no; the prompt alone is rendered as {escaped(before)}"
        split = encoder.template.encode(tokens, [Row(prompt, (response,), origin=row.origin)])[0]
    except (TemplateError, RowError) as error:
        check.warnings.append(str(error))
        return check
    if isinstance(split, RowError):
        check.warnings.append(str(split))
        return check
    prompt_ids, [response_ids] = split
    _boundary(check, encoder, prompt, prompt_ids, response_ids)
    _beginning(check, encoder, [*prompt_ids, *response_ids])
    after = full[len(before) :] if same else full
    _end(check, encoder, after, [*prompt_ids, *response_ids])
    _unlisted_end(check, encoder)
    return check


def _boundary(
    check: TemplateCheck,
    encoder: RowEncoder,
    prompt: tuple[Message, ...],
    prompt_ids: list[int],
    response_ids: list[int],
) -> None:
    parts = pieces(encoder.tokenizer, [*prompt_ids, *response_ids])
    size = len(prompt_ids)
    last, first = parts[max(0, size - _AROUND) : size], parts[size : size + _AROUND]
    shown = ["|".join(map(escaped, side)) for side in (last, first)]
    check.facts["prompt ends"] = f"{'…' if size > _AROUND else ''}{shown[0]} ‖ {shown[1]}…"
    if encoder.template.loss_on == "all":
        check.facts["generation starts"] = "loss_on = all: the prompt's tokens carry loss, all but the first"
        return
    starts = encoder.prompt_ids(prompt)
    if starts == prompt_ids:
        check.facts["generation starts"] = "from the very tokens that training sees as the prompt"
        return
    check.facts["generation starts"] = (
        f"from {len(starts)} tokens, training's prompt has {len(prompt_ids)}: they end in "
        f"'{escaped(decoded(encoder.tokenizer, starts[-_AROUND:]))}' and "
        f"'{escaped(decoded(encoder.tokenizer, prompt_ids[-_AROUND:]))}'"
    )


def _beginning(check: TemplateCheck, encoder: RowEncoder, ids: list[int]) -> None:
    bos = encoder.tokens.bos_id
    if bos is None:
        check.facts["BOS"] = "the tokenizer has none"
        return
    mark, count = encoder.tokenizer.bos_token, ids.count(bos)
    where = "at the start" if ids[:1] == [bos] else "not at the start"
    if bos in encoder.tokens.stop_ids:
        check.facts["BOS"] = f"{mark} (id {bos}), {where}; the same token ends responses"
        return
    times = {1: "once"}.get(count, f"{count} times")
    check.facts["BOS"] = f"{mark} (id {bos}), {times}, {where}" if count else f"{mark} (id {bos}) is not there"
    if count > 1:
        check.warnings.append(f"{mark} is in the sequence {count} times. {_remedy(encoder.template)}")


def _remedy(template: ChatTemplate) -> str:
    """What to do about a beginning-of-sequence token that comes more than once."""
    if isinstance(template, OfficialTemplate):
        return (
            "OfficialTemplate puts one before what the template writes, as the official code does: set "
            "data.template.chat_template to one that does not begin with it, or data.template: ChatTemplate."
        )
    return (
        "Templates that begin every turn with it mean that; others should write it once: set "
        "data.template.chat_template."
    )


def _end(check: TemplateCheck, encoder: RowEncoder, after: str, ids: list[int]) -> None:
    """Which token ends the response, who wrote it, and what is cut after it."""
    tokens, eos = encoder.tokens, encoder.tokens.eos_id
    last = ids[-1]
    check.facts["response ends in"] = f"{escaped(decoded(encoder.tokenizer, [last]))} (id {last})"
    check.facts["stop tokens"] = ", ".join(map(escaped, tokens.stop_tokens))
    if isinstance(encoder.template, OfficialTemplate):
        check.facts["response ends in"] += ", put after what the template writes; nothing is cut"
        return
    written = tokens.continuations([after])[0]
    taken = tokens.to_stop(written)
    if taken == [*written, eos]:
        check.facts["response ends in"] += ": put there, for the template writes no stop token"
        check.facts["cut after it"] = "nothing"
    elif ids[-len(taken) :] == taken:
        rest = escaped(decoded(encoder.tokenizer, written[len(taken) :]))
        check.facts["response ends in"] += ": written by the template"
        check.facts["cut after it"] = f"'{rest}', which the template writes" if rest else "nothing"


def _unlisted_end(check: TemplateCheck, encoder: RowEncoder) -> None:
    """Warns if the template ends a turn with a special token at which no response would end."""
    mark = encoder.unstopped_turn_end()
    if mark is None:
        return
    stops = ", ".join(encoder.tokens.stop_tokens)
    check.warnings.append(
        f"The template ends turns with {mark}, which is not among the tokens that end a response ({stops}): a response "
        f"here goes on after {mark}, and so will generation. Set data.template.stop_tokens: ['{mark}']."
    )

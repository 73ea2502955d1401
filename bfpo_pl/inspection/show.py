"""`bfpo data show`: the trees of a batch, token by token, with what is known of their pairs and asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from bfpo_pl.batch import PairBatch
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.data.loading import TreesByStream
from bfpo_pl.data.streams import StreamSampler
from bfpo_pl.data.tokens import special_ids
from bfpo_pl.inspection.columns import lacking
from bfpo_pl.inspection.pieces import escaped, pieces
from bfpo_pl.inspection.prompts import prompts_of
from bfpo_pl.inspection.terminal import print_line, print_wrapped
from bfpo_pl.labeling import LabelingFunction

FIRST, LAST = 60, 20
"""Characters that are shown of the beginning and of the end of an abbreviated text."""
_STYLES = {
    "prompt": ("white on #1f4e79", "white on #2d6a9f"),
    "trained prompt": ("black on #56B4E9", "black on #9ad2f2"),
    "response": ("black on #E69F00", "black on #f3c969"),
}
_MARKS = {"prompt": "{}|", "trained prompt": "{{{}}}", "response": "[{}]"}
"""What stands in for colours where there are none."""

Token = tuple[str, bool]
"""A token's text, and whether it is a special one."""


@dataclass(frozen=True)
class Gap:
    """Tokens that are not shown.

    Args:
        size: How many.
    """

    size: int


@dataclass(frozen=True)
class Tree:
    """One prompt of a batch with its responses.

    Args:
        stream: Name of its stream.
        origin: Where its row came from.
        prompt: Indices of the prompt's tokens in the batch's token row.
        responses: The same of each response.
        first_response: Number of the first response in the batch.
    """

    stream: str
    origin: str
    prompt: range
    responses: list[range]
    first_response: int


def trees_of(batch: PairBatch) -> list[Tree]:
    """The trees of a batch, in order.

    Args:
        batch: The batch.
    """
    spans = [
        range(start, start + size)
        for start, size in zip(batch.segment_start.tolist(), batch.segment_length.tolist(), strict=True)
    ]
    prompts = batch.prompt_segment.tolist()
    trees = []
    for prompt, origin in zip(dict.fromkeys(prompts), batch.origins, strict=True):
        own = [index for index, each in enumerate(prompts) if each == prompt]
        stream = batch.streams[int(batch.response_stream[own[0]])]
        responses = [spans[int(batch.response_segment[index])] for index in own]
        trees.append(Tree(stream, origin, spans[prompt], responses, own[0]))
    return trees


def show(data: AlignmentData, labeling: LabelingFunction | None, number: int, full: bool, console: Console) -> None:
    """Prints the first trees of each stream in the first training batch.

    Args:
        data: The data, with a tokenizer.
        labeling: What labels pairs; None where none is configured.
        number: Trees of each stream.
        full: Whether texts are shown whole.
        console: Where to.
    """
    data.num_workers = 0  # one batch, and the same for any number
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))
    printer = _Printer(data, batch, labeling, full, console)
    printer.legend()
    trees, prompts = trees_of(batch), None
    if data.template.loss_on == "all":
        assert isinstance(loader.dataset, TreesByStream)
        assert isinstance(loader.batch_sampler, StreamSampler)
        prompts = prompts_of(data, loader.dataset, loader.batch_sampler.batch(0))
    for stream in batch.streams:
        for index in [index for index, tree in enumerate(trees) if tree.stream == stream][:number]:
            if prompts is None:
                printer.tree(trees[index])
            else:
                printer.trained_tree(trees[index], prompts[index])


class _Printer:
    """Prints trees of one batch.

    Args:
        data: The data module.
        batch: The batch.
        labeling: What labels its pairs.
        full: Whether texts are shown whole.
        console: Where to.
    """

    def __init__(
        self, data: AlignmentData, batch: PairBatch, labeling: LabelingFunction | None, full: bool, console: Console
    ) -> None:
        self.tokenizer, self.batch, self.console, self.full = data.tokenizer, batch, console, full
        self.coloured = console.color_system in ("256", "truecolor")
        self.trained = data.template if data.template.loss_on == "all" else None
        self.labeling = labeling
        self.lacking = [] if labeling is None else lacking(data, labeling)
        self.label = None if labeling is None or self.lacking else labeling(batch.annotations)

    def legend(self) -> None:
        """Says how to read what follows."""
        words = {"prompt": "no loss", "response": "every token carries loss"}
        if self.trained:
            words = {"prompt": "no loss", "trained prompt": "carries loss", "response": "carries loss"}
        text = Text()
        for kind, said in words.items():
            name = "first token" if self.trained and kind == "prompt" else kind.split()[-1]
            text.append(f"{'   ' if text else ''}{name}: ")
            first, *rest = said.split()
            marked = [(word, False) for word in (first, *(f" {each}" for each in rest))]
            text.append_text(self._tokens(marked, [kind] * len(marked), self.console.width)[0])
        print_wrapped(self.console, text)
        if self.trained:
            print_wrapped(self.console, f"By {self.trained}, all tokens but a tree's first carry loss.")
        if not self.full:
            print_wrapped(
                self.console,
                f"Texts may be offensive: the first {FIRST} and the last {LAST} characters of each are shown; "
                "--full shows all.",
            )
        if self.labeling is None and len(self.batch.pairs):
            print_wrapped(self.console, "No labeling is configured, so there are no labels; an experiment names one.")
        elif self.label is not None:
            print_wrapped(self.console, f"Labels g by {self.labeling}")
        for line in self.lacking:
            print_wrapped(self.console, f"No labels: {line}")

    def tree(self, tree: Tree) -> None:
        """Prints a tree: prompt, responses, pairs."""
        ids = self.batch.tokens.tolist()
        prompt = [ids[place] for place in tree.prompt]
        self.console.print()
        print_wrapped(self.console, f"{tree.stream}: {tree.origin}", "bold")
        whole = [(prompt, [ids[place] for place in response]) for response in tree.responses]
        texts = [pieces(self.tokenizer, before + after) for before, after in whole]
        print_wrapped(self.console, f"prompt, {len(prompt)} tokens", indent=2)
        self._segment(prompt, texts[0][: len(prompt)], ["prompt"] * len(prompt))
        last = tree.first_response + len(tree.responses)
        pairs = [
            (number, pair)
            for number, pair in enumerate(self.batch.pairs.tolist())
            if tree.first_response <= pair[0] < last
        ]
        for index, ((_, response), parts) in enumerate(zip(whole, texts, strict=True)):
            number = tree.first_response + index
            print_wrapped(
                self.console, f"{self._name(number, pairs)}, {len(response)} tokens{self._columns_of(number)}", indent=2
            )
            self._segment(response, parts[len(prompt) :], ["response"] * len(response))
        for number, pair in pairs:
            name = "pair" if len(pairs) == 1 else f"pair of responses {pair[0]} and {pair[1]}"
            self._pair(name, number, pair)

    def trained_tree(self, tree: Tree, prompt: Sequence[bool]) -> None:
        """Prints a tree of one response whose tokens all carry loss, but for the first; what is a prompt and what not.

        Args:
            tree: The tree.
            prompt: Of each token, whether it is of a row's prompt.
        """
        all_ids = self.batch.tokens.tolist()
        ids = [all_ids[place] for segment in (tree.prompt, *tree.responses) for place in segment]
        self.console.print()
        print_wrapped(self.console, f"{tree.stream}: {tree.origin}", "bold")
        texts, start = pieces(self.tokenizer, ids), 0
        for is_prompt, run in groupby(prompt):
            size = len(list(run))
            part = slice(start, start + size)
            kinds = ["trained prompt" if is_prompt else "response"] * size
            if not start:
                kinds[0] = "prompt"
            print_wrapped(self.console, f"{'prompt' if is_prompt else 'response'}, {size} tokens", indent=2)
            self._segment(ids[part], texts[part], kinds)
            start += size

    def _name(self, number: int, pairs: Sequence[tuple[int, list[int]]]) -> str:
        """What a response is called: by its part in the pair, if there is but one."""
        if len(pairs) == 1 and number in pairs[0][1]:
            return "chosen" if number == pairs[0][1][0] else "rejected"
        return f"response {number}" if pairs else "response"

    def _columns_of(self, number: int) -> str:
        shown = [f"{name} {values[number]:g}" for name, values in sorted(self.batch.annotations.response.items())]
        if self.label is not None and self.labeling is not None and self.labeling.unit == "response":
            shown.append(f"label g = {self.label.target[number]:g}, weight {self.label.weights[number]:g}")
        return "".join(f"; {each}" for each in shown)

    def _pair(self, name: str, number: int, pair: list[int]) -> None:
        annotations = self.batch.annotations
        shown = [f"{name} {values[number]:g}" for name, values in sorted(annotations.pair.items())]
        if "safe" in annotations.response:
            shown.insert(0, f"quadrant {quadrant(annotations.response['safe'][pair])}")
        if self.label is not None and self.labeling is not None and self.labeling.unit == "pair":
            shown.append(f"label g = {self.label.target[number]:g}")
            if self.label.weight is not None:
                shown.append(f"weight {self.label.weight[number]:g}")
        if shown:
            print_wrapped(self.console, f"{name}: {', '.join(shown)}", "bold", 2)

    def _segment(self, ids: Sequence[int], texts: Sequence[str], kinds: Sequence[str]) -> None:
        special = special_ids(self.tokenizer)
        tokens = [(text, index in special) for text, index in zip(texts, ids, strict=True)]
        shown = tokens if self.full else abbreviated(tokens)
        for place, token in enumerate(shown):
            if isinstance(token, Gap):
                kinds = [*kinds[:place], "", *kinds[place + token.size :]]
        for line in self._tokens(shown, kinds, self.console.width - 4):
            print_line(self.console, line, 4)

    def _tokens(self, tokens: Sequence[Token | Gap], kinds: Sequence[str], width: int) -> list[Text]:
        """Lines of tokens, none of them broken unless it is wider than a line."""
        lines = [Text()]
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
            text, style = self._marked(token, kind, number)
            for piece in _folded(text, width):
                if lines[-1].cell_len + cell_len(piece) > width:
                    lines.append(Text())
                lines[-1].append(piece, style=style)
        return lines

    def _marked(self, token: Token | Gap, kind: str, number: int) -> tuple[str, str]:
        """A token's text and style: marks stand in for colours where there are none."""
        if isinstance(token, Gap):
            return f" … {token.size} more tokens … ", ""
        text, special = escaped(token[0]), token[1]
        if self.coloured:
            return text, f"{_STYLES[kind][number % 2]}{' bold' if special else ''}"
        return _MARKS[kind].format(text), ""


def _folded(text: str, width: int) -> Iterator[str]:
    while cell_len(text) > width:
        size = next(size for size in range(len(text), 0, -1) if cell_len(text[:size]) <= width)
        yield text[:size]
        text = text[size:]
    yield text


def abbreviated(tokens: Sequence[Token]) -> list[Token | Gap]:
    """The tokens of the first 60 and the last 20 characters, with a gap between them; special tokens count as none.

    Args:
        tokens: The tokens of a text.
    """
    sizes = [0 if special else len(text) for text, special in tokens]
    head = _fitting(sizes, FIRST)
    tail = len(tokens) - _fitting(sizes[head:][::-1], LAST)
    return [*tokens[:head], Gap(tail - head), *tokens[tail:]] if tail > head else list(tokens)


def _fitting(sizes: Sequence[int], most: int) -> int:
    """How many of the first of these stay within a sum."""
    return next((count for count, total in enumerate(accumulate(sizes)) if total > most), len(sizes))


def quadrant(safe: torch.Tensor) -> str:
    """The safety quadrant of a pair; of a soft one the most probable, with its probability.

    Args:
        safe: ``[2]``, probability of being safe of the chosen and of the rejected response.
    """
    likely = (safe >= 0.5).tolist()
    name = "_".join("safe" if each else "unsafe" for each in likely)
    probability = float(torch.where(safe >= 0.5, safe, 1 - safe).prod())
    return name if probability == 1 else f"{name} (probability {probability:.2g})"

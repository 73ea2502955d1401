"""Preparation: the rows of streams read, chosen, judged and tokenised, with everything counted that is not used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bfpo_pl.data.checked import check_rows
from bfpo_pl.data.contamination import ContaminationGuard
from bfpo_pl.data.encoding import COUNTED, RowEncoder
from bfpo_pl.data.packing import Packing, Trees
from bfpo_pl.data.reading import DataError, Reading, bad_row_report
from bfpo_pl.data.selection import check_hold_out, select
from bfpo_pl.data.stored import StoredTrees
from bfpo_pl.data.streaming import StreamingRows
from bfpo_pl.data.streams import Stream
from bfpo_pl.data.token_store import TokenStore, tokenise

_PROBED = 1000
"""Rows that are looked at before training of a source that streams."""


class Preparation:
    """Prepares the rows of streams; what is on disk already is not computed again.

    Args:
        streams: The streams by name.
        cache: Folder of prepared data.
        on_bad_row: ``fail`` or ``drop``.
        processes: Processes that tokenise.
        guard: Drops training prompts that an evaluation has.
        packing: How supervised rows are joined.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        cache: Path,
        on_bad_row: Literal["fail", "drop"],
        processes: int,
        guard: ContaminationGuard | None,
        packing: Packing | None,
    ) -> None:
        self.streams, self.cache, self.on_bad_row, self.processes = streams, cache, on_bad_row, processes
        self.guard, self.packing = guard, packing

    def read(self, wanted: Iterable[tuple[str, str]]) -> list[Reading]:
        """Reads and chooses rows; all of them are checked before the first is tokenised.

        Args:
            wanted: Names of streams, each with a split.

        Raises:
            DataError: Rows cannot be used, or a stream has none.
        """
        splits = list(wanted)
        readings = [self._read(name, split, (name, "train") in splits) for name, split in splits]
        self._judge(readings, "Rows are judged again as tokens, once these are mended; `bfpo data inspect` shows both.")
        return readings

    def _read(self, name: str, split: str, with_train: bool) -> Reading:
        stream = self.streams[name]
        check_hold_out(name, stream)
        own = "train" if stream.validation_fraction else split
        label = f"{name}, {own}"
        rows = check_rows(self.cache / "rows", label, stream.source, own, stream.adapter, stream.assume_safe)
        return select(name, split, stream, rows, self.guard, with_train)

    def _judge(self, readings: Sequence[Reading], note: str = "") -> None:
        """Fails on bad rows, unless they are to be dropped, and on a stream without rows."""
        if self.on_bad_row == "fail" and (report := bad_row_report(readings)):
            raise DataError("\n  ".join([report, note] if note else [report]))
        for reading in readings:
            if not len(reading.kept):
                source = self.streams[reading.stream].source.describe()
                left_out = "".join(f" Left out: {count:,} {reason}." for reason, count in reading.left_out.items())
                raise DataError(
                    f"Stream '{reading.stream}' has no row to use in its {reading.split} split: {source}.{left_out}"
                )

    def encode(self, encoder: RowEncoder, readings: Sequence[Reading]) -> list[tuple[Trees, dict[str, Any]]]:
        """Tokenises rows; gives the trees of each split with its counts as plain data.

        Args:
            encoder: What turns rows into token ids.
            readings: The rows.

        Raises:
            DataError: Rows cannot be used, or the tokenizer does not know the text.
        """
        self._check_packing(readings)
        if mark := encoder.unstopped_turn_end():
            rank_zero_warn(
                f"The chat template ends turns with {mark}, which is not among the tokens that end a response: a "
                f"response goes on after it. Set data.template.stop_tokens: ['{mark}']."
            )
        stores = [self._tokens(encoder, reading) for reading in readings]
        trees = [StoredTrees(reading, store) for reading, store in zip(readings, stores, strict=True)]
        self._judge(readings)
        prepared: list[tuple[Trees, dict[str, Any]]] = []
        for reading, store, stored in zip(readings, stores, trees, strict=True):
            counts = {name: store.counts[name] for name in (*COUNTED, "tokens", "unknown_tokens")}
            summary = {**reading.summary(), **counts}
            _tell(reading, summary, store, encoder)
            if self.packing is None:
                prepared.append((stored, summary))
                continue
            blocks = self.packing(stored, reading.stream)
            summary |= blocks.counts
            _tell_of_blocks(reading, summary)
            prepared.append((blocks, summary))
        return prepared

    def _check_packing(self, readings: Sequence[Reading]) -> None:
        """Refuses rows that the packing cannot join."""
        for reading in readings if self.packing is not None and self.packing.one_response else ():
            several = reading.kept[reading.response_counts[reading.kept] > 1]
            if len(several):
                raise DataError(
                    f"data.packing: {type(self.packing).__name__} joins rows with one response, and {len(several):,} "
                    f"rows of {reading.stream}, {reading.split} have several, the first at "
                    f"{reading.rows.origin(int(several[0]))}. Leave out data.packing, or read them with an adapter "
                    "that gives one response."
                )

    def _tokens(self, encoder: RowEncoder, reading: Reading) -> TokenStore:
        label = f"{reading.stream}, {reading.split}"
        store = tokenise(self.cache / "tokens", label, reading.rows, reading.kept, encoder, self.processes)
        _require_known_text(label, encoder, store.counts["unknown_tokens"], store.counts["tokens"])
        return store

    def open(self, encoder: RowEncoder, name: str, seed: int) -> StreamingRows:
        """A stream whose rows are read as training asks for them; the first ones are looked at here.

        Args:
            encoder: What turns rows into token ids.
            name: The stream's name.
            seed: Seed of the order of its rows.

        Raises:
            DataError: It is to do what needs all rows, or its first rows cannot be used, or the tokenizer does not know
                their text.
        """
        stream = self.streams[name]
        check_hold_out(name, stream)
        if self.guard is not None or self.packing is not None:
            raise DataError(
                f"data.contamination and data.packing need to see all rows before training, and stream '{name}' reads "
                f"them as it goes. Set data.streams.{name}.source.streaming: false."
            )
        rows = StreamingRows(name, stream, self.on_bad_row, seed, encoder.many, encoder.counts)
        ids = [part for tree in rows.probe(_PROBED) for part in (tree.prompt_ids, *tree.response_ids)]
        unknown = getattr(encoder.tokenizer, "unk_token_id", None)
        unknowns = 0 if unknown is None else sum(list(part).count(unknown) for part in ids)
        _require_known_text(f"{name}, train, its first rows", encoder, unknowns, sum(map(len, ids)))
        return rows


def _require_known_text(label: str, encoder: RowEncoder, unknown: int, total: int) -> None:
    """Fails where many tokens are the one for unknown text."""
    if unknown > total / 10:
        raise DataError(
            f"{label}: {unknown / total:.0%} of the tokens are {encoder.tokenizer.unk_token}, which is to say that "
            f"this tokenizer does not know the text. Is model.policy the model you meant? TinyModel, the default "
            f"of configs/base.yaml, speaks the microworld's language only."
        )


def _tell_of_blocks(reading: Reading, summary: Mapping[str, Any]) -> None:
    """Prints what a user should know of packed rows."""
    label = f"{reading.stream}, {reading.split}"
    if summary["prompts_cut"] or summary["responses_cut"]:
        rank_zero_info(
            f"{label}: data.truncation cuts documents before data.packing joins them; to leave them whole, raise "
            "data.truncation.max_length"
        )
    if longer := summary.get("documents_longer_than_a_block"):
        rank_zero_info(f"{label}: {longer:,} documents are longer than a block, and each is one by itself")


def _tell(reading: Reading, summary: Mapping[str, Any], store: TokenStore, encoder: RowEncoder) -> None:
    """Prints what a user should know of before training: what is cut, dropped, left out or looks wrong."""
    label = f"{reading.stream}, {reading.split}"
    if summary["prompts_cut"] or summary["responses_cut"]:
        rank_zero_info(
            f"{label}: cut {summary['responses_cut']:,} of {store.counts['responses']:,} responses and "
            f"{summary['prompts_cut']:,} of {store.counts['prompts']:,} prompts to fit max_length "
            f"{encoder.truncation.max_length}"
        )
    if count := summary["stop_token_in_text"]:
        then = "and end there" if encoder.template.ends_at_stop_tokens else "but go on after it"
        rank_zero_info(f"{label}: {count:,} responses hold a stop token in their own text, {then}")
    if count := summary["special_token_in_prompt"]:
        rank_zero_info(
            f"{label}: {count:,} rows have special tokens in the text of their prompt, which the model reads as such"
        )
    if unknown := summary["unknown_tokens"]:
        rank_zero_info(f"{label}: {unknown:,} of {summary['tokens']:,} tokens are {encoder.tokenizer.unk_token}.")
    if reading.faults:
        counts = ", ".join(f"{count} × {reason}" for reason, count in summary["dropped"].items())
        rank_zero_info(f"{label}: dropped {len(reading.faults)} rows: {counts}")
    for reason, count in reading.left_out.items():
        rank_zero_info(f"{label}: left out {count:,} rows: {reason}")
    duplicates = reading.notes.get("duplicates")
    if duplicates and reading.split == "train" and "duplicates of another row" not in reading.left_out:
        rank_zero_info(
            f"{label}: rows that repeat another one: {duplicates:,} (data.streams.{reading.stream}.duplicates: drop "
            "leaves them out)"
        )
    if both := reading.notes.get("pairs_in_both_orders"):
        rank_zero_info(f"{label}: {both:,} pairs come in both orders")
    if contradictory := reading.notes.get("contradictory_flags"):
        where = "; ".join(reading.notes["contradictory_flags_at"])
        rank_zero_info(
            f"{label}: {contradictory:,} responses are flagged safe in one row and unsafe in another: {where}"
        )

"""Selection: which rows of a split are used (a share, a hold-out by prompt), and what looks wrong among them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from bfpo_pl.component import UserError
from bfpo_pl.data.checked import CheckedRows
from bfpo_pl.data.contamination import ContaminationGuard
from bfpo_pl.data.reading import Reading
from bfpo_pl.data.streams import Stream

_EXAMPLES = 5
_ODD = np.uint64(0x9E3779B97F4A7C15)
_HASHES = float(2**64)


def select(
    name: str,
    split: str,
    stream: Stream,
    rows: CheckedRows,
    guard: ContaminationGuard | None = None,
    with_train: bool = False,
) -> Reading:
    """Chooses the rows of a split that are used; every other row of the source is among the faults or left out.

    Args:
        name: The stream's name.
        split: ``train`` or ``validation``.
        stream: Its settings: share of the rows, hold-out, duplicates.
        rows: The checked rows; with a hold-out those of the training split, for either split.
        guard: Drops training prompts that an evaluation has.
        with_train: Whether the training split is read as well. Of a bad row nobody knows the prompt, so that it belongs
            to neither side of a hold-out: it is a fault of the training split, or of validation where that is alone.
    """
    raw_index = rows.numbers("raw_index").astype(np.int64)
    held_out = stream.validation_fraction > 0
    share = split == "train" or held_out
    taken = _share(stream, name, rows.raw_rows) if share else np.ones(rows.raw_rows, dtype=bool)
    used = taken[raw_index]
    faults = [fault for fault in rows.faults if taken[fault.raw_index]]
    if held_out:
        out = rows.numbers("prompt_key") / _HASHES < stream.validation_fraction
        used &= out if split == "validation" else ~out
    elsewhere = len(faults) if held_out and split == "validation" and with_train else 0
    reading = Reading(name, split, rows, np.flatnonzero(used), [] if elsewhere else faults)
    reading.left_out = {
        reason: count
        for reason, count in (
            (f"outside the {stream.take} {stream.fraction:g} of the rows", int((~taken).sum())),
            ("held out for validation" if split == "train" else "not held out", int((taken[raw_index] & ~used).sum())),
            ("bad rows, counted with the training split", elsewhere),
        )
        if count
    }
    _require_equal_columns(reading)
    if split == "train" and guard is not None:
        _drop_contaminated(reading, guard)
    _look_for_contradictions(reading)
    _look_for_duplicates(reading, drop=split == "train" and stream.duplicates == "drop")
    return reading


def _share(stream: Stream, name: str, raw_rows: int) -> np.ndarray:
    """Which of the source's rows a stream takes, the bad ones among them, as the paper's code counts."""
    size = int(stream.fraction * raw_rows)
    taken = np.zeros(raw_rows, dtype=bool)
    if stream.take == "first":
        taken[:size] = True
    else:
        generator = np.random.default_rng([stream.take_seed, zlib.crc32(name.encode())])
        taken[generator.permutation(raw_rows)[:size]] = True
    return taken


def _require_equal_columns(reading: Reading) -> None:
    """Drops rows that lack a column which other rows of the split have."""
    tables = (
        (reading.response_tables, reading.first_response, reading.response_counts),
        (reading.pair_tables, reading.first_pair, reading.pair_counts),
    )
    for table, first, counts in tables:
        for name in list(table):
            has = (counts[reading.kept] > 0) & ~np.isnan(_padded(table[name])[first[reading.kept]])
            lacking = (counts[reading.kept] > 0) & ~has
            if not has.any():
                del table[name]
                continue
            remedy = f"Set data.streams.{reading.stream}.assume_safe: true to take such responses to be safe."
            reason = f"the column '{name}' is missing here, though other rows of the stream have it"
            reading.drop(
                (
                    int(place),
                    reading.fault(int(place), name, "None", reason, remedy if name == "safe" else ""),
                )
                for place in np.flatnonzero(lacking)
            )


def _padded(values: np.ndarray) -> np.ndarray:
    """A value more, so that the place after the last may be looked up."""
    return np.append(values, np.nan)


def _drop_contaminated(reading: Reading, guard: ContaminationGuard) -> None:
    """Leaves out the rows whose prompt an evaluation has; prompts that come often are looked at once."""
    _, place = np.unique(reading.rows.numbers("prompt_key")[reading.kept], return_index=True)
    matches = guard.matches(reading.rows, reading.kept[np.sort(place)])
    matched = np.isin(reading.rows.numbers("prompt_key")[reading.kept], np.array(matches, dtype=np.uint64))
    reading.left_out[f"prompts that {guard} has"] = int(matched.sum())
    reading.kept = reading.kept[~matched]


def _look_for_duplicates(reading: Reading, drop: bool) -> None:
    """Counts rows that repeat another one, and pairs that come in both orders."""
    prompts = reading.rows.numbers("prompt_hash").astype(np.uint64)
    responses = reading.rows.flat("response_hashes").astype(np.uint64)
    owner = np.repeat(np.arange(len(reading.rows)), reading.response_counts)
    position = np.arange(len(responses)) - reading.first_response[owner]
    mixed = _mix(responses + (position.astype(np.uint64) + np.uint64(1)) * _ODD)
    keys = prompts.copy()
    np.add.at(keys, owner, mixed)
    keys = keys[reading.kept]
    unique, first = np.unique(keys, return_index=True)
    reading.notes["duplicates"] = len(keys) - len(unique)
    two = (reading.response_counts == 2) & (reading.pair_counts == 1)
    turned = position ^ 1
    swapped = prompts.copy()
    of_two = two[owner]
    np.add.at(
        swapped, owner[of_two], _mix(responses[of_two] + (turned[of_two].astype(np.uint64) + np.uint64(1)) * _ODD)
    )
    both = np.isin(swapped[reading.kept][two[reading.kept]], unique)
    reading.notes["pairs_in_both_orders"] = int(both.sum())
    if drop and reading.notes["duplicates"]:
        reading.left_out["duplicates of another row"] = reading.notes["duplicates"]
        reading.kept = reading.kept[np.sort(first)]


def _mix(values: np.ndarray) -> np.ndarray:
    """Scatters 64-bit numbers, so that sums of them tell which ones were added."""
    values = (values ^ (values >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return values ^ (values >> np.uint64(29))


def _look_for_contradictions(reading: Reading) -> None:
    """Counts responses that are flagged safe in one row and unsafe in another, to the same prompt."""
    if "safe" not in reading.response_tables:
        return
    owner = np.repeat(np.arange(len(reading.rows)), reading.response_counts)
    used = np.isin(owner, reading.kept)
    prompts = reading.rows.numbers("prompt_hash").astype(np.uint64)[owner[used]]
    keys = _mix(prompts) + reading.rows.flat("response_hashes").astype(np.uint64)[used]
    order = np.argsort(keys, kind="stable")
    safe, sorted_keys = reading.response_tables["safe"][used][order], keys[order]
    if not len(safe):
        return
    starts = np.flatnonzero(np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]]))
    low, high = np.minimum.reduceat(safe, starts), np.maximum.reduceat(safe, starts)
    contradictory = np.flatnonzero((low < 0.5) & (high > 0.5))
    reading.notes["contradictory_flags"] = len(contradictory)
    rows, ends = owner[used][order], np.append(starts[1:], len(safe))
    examples = []
    for group in contradictory[:_EXAMPLES]:
        within = slice(starts[group], ends[group])
        places = (rows[within][safe[within].argmax()], rows[within][safe[within].argmin()])
        examples.append(" and ".join(reading.rows.origin(int(row)) for row in places))
    if examples:
        reading.notes["contradictory_flags_at"] = examples


def shared_prompts(train: Iterable[Reading], validation: Reading) -> int:
    """Prompts of the validation rows that training rows have too.

    Args:
        train: The training rows of all streams.
        validation: The validation rows of one.
    """
    theirs = np.unique(validation.rows.numbers("prompt_key")[validation.kept])
    shared = [np.isin(theirs, each.rows.numbers("prompt_key")[each.kept]) for each in train]
    return int(np.any(shared, axis=0).sum()) if shared else 0


def check_hold_out(name: str, stream: Stream) -> None:
    """Refuses a hold-out where the source has validation rows of its own, or cannot be held out of.

    Raises:
        UserError: It does, or it streams.
    """
    if stream.validation_fraction and stream.source.has_split("validation"):
        raise UserError(
            f"data.streams.{name}: validation_fraction = {stream.validation_fraction:g}, but the source has a "
            f"validation split ({stream.source.describe()}). Set one of them."
        )
    if stream.source.streaming and (stream.validation_fraction or stream.fraction < 1 or stream.duplicates == "drop"):
        raise UserError(
            f"data.streams.{name}: fraction, validation_fraction and duplicates: drop need to see all rows, and the "
            "source streams them. Set source.streaming: false."
        )

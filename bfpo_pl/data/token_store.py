"""Token stores: the token ids of rows, computed once, kept as Arrow files and memory-mapped."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bfpo_pl.data.arrow import SHARD_ROWS, joined, read_manifest, read_shard, sole_builder, write_manifest, write_shard
from bfpo_pl.data.checked import CheckedRows
from bfpo_pl.data.encoding import RowEncoder
from bfpo_pl.data.progress import telling
from bfpo_pl.data.rows import RowError
from bfpo_pl.data.trees import PairTree

_CHUNK = 512
_INFORMATION = b"bfpo_pl"
_IDS = pa.list_(pa.int32())
_ROWS_WORTH_PROCESSES = 2 * SHARD_ROWS


@dataclass(frozen=True)
class _Work:
    """What turns the rows of one shard into tokens; sent to every process once."""

    folder: Path
    rows: CheckedRows
    kept: np.ndarray
    encoder: RowEncoder

    def do(self, number: int) -> int:
        """Writes a shard, if it is not there; gives the number of its rows."""
        indices = self.kept[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
        path = self.folder / f"tokens-{number:05d}.arrow"
        if not path.exists():
            write_shard(path, self._encoded(indices))
        return len(indices)

    def _encoded(self, indices: np.ndarray) -> pa.RecordBatch:
        trees: list[PairTree | RowError] = []
        self.encoder.counts.clear()
        for first in range(0, len(indices), _CHUNK):
            rows = self.rows.rows(indices[first : first + _CHUNK])
            trees += self.encoder.many(rows)
        faults = [
            [index, tree.field, tree.value, tree.reason, tree.remedy]
            for index, tree in enumerate(trees)
            if isinstance(tree, RowError)
        ]
        # A row at fault keeps its place, without tokens.
        prompts = [[] if isinstance(tree, RowError) else tree.prompt_ids for tree in trees]
        responses = [[] if isinstance(tree, RowError) else tree.response_ids for tree in trees]
        arrays = [pa.array(prompts, type=_IDS), pa.array(responses, type=pa.list_(_IDS))]
        values = [arrays[0].values.to_numpy(), arrays[1].values.values.to_numpy()]
        unknown = getattr(self.encoder.tokenizer, "unk_token_id", None)
        unknowns = 0 if unknown is None else sum(int((ids == unknown).sum()) for ids in values)
        counts = {
            "prompts": len(trees) - len(faults),
            "responses": sum(map(len, responses)),
            "tokens": sum(map(len, values)),
            "unknown_tokens": unknowns,
            **self.encoder.counts,
        }
        information = json.dumps({"counts": counts, "faults": faults})
        schema = pa.schema([("prompt", arrays[0].type), ("responses", arrays[1].type)], {_INFORMATION: information})
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def tokenise(
    folder: Path, label: str, rows: CheckedRows, kept: np.ndarray, encoder: RowEncoder, processes: int = 1
) -> TokenStore:
    """Tokenises rows, or finds the tokens of these very texts under this very tokenizer, template and truncation.

    Shards that an interrupted run has finished are kept.

    Args:
        folder: Where the tokens of all rows are kept.
        label: What is tokenised, for progress.
        rows: The checked rows.
        kept: Which of them, in order.
        encoder: What turns rows into token ids.
        processes: Processes that share the work, if it is enough for several.
    """
    own = folder / _key(rows, kept, encoder)
    if read_manifest(own) is not None:
        return TokenStore(own)
    with sole_builder(own):
        if read_manifest(own) is None:
            work = _Work(own, rows, kept, encoder)
            numbers = range(-(-len(kept) // SHARD_ROWS))
            with telling(f"tokenising {label}", len(kept)) as advance:
                for count in _done(work, numbers, processes if len(kept) >= _ROWS_WORTH_PROCESSES else 1):
                    advance(count)
            write_manifest(own, {"rows": len(kept)})
    return TokenStore(own)


def _key(rows: CheckedRows, kept: np.ndarray, encoder: RowEncoder) -> str:
    """A digest of all that decides the tokens: the texts, which responses form pairs, and the encoder."""
    digest = hashlib.blake2b(encoder.fingerprint().encode(), digest_size=16)
    digest.update(rows.numbers("prompt_hash")[kept].tobytes())
    used = np.zeros(len(rows), dtype=bool)
    used[kept] = True
    for lists, values in (("responses", "response_hashes"), ("pairs", "pairs")):
        counts = rows.counts(lists)
        digest.update(counts[kept].tobytes())
        digest.update(rows.flat(values)[np.repeat(used, counts)].tobytes())
    return digest.hexdigest()


_work: _Work | None = None


def _begin(work: _Work) -> None:
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that it works for is killed; the pool would let it wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(number: int) -> int:
    assert _work is not None
    return _work.do(number)


def _done(work: _Work, numbers: range, processes: int) -> Iterator[int]:
    if processes == 1:
        yield from map(work.do, numbers)
        return
    context = multiprocessing.get_context()
    with ProcessPoolExecutor(min(processes, len(numbers)), context, _begin, (work,)) as pool:
        yield from pool.map(_do, numbers)


class TokenStore:
    """Token ids of rows, by number.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_manifest(folder)
        assert manifest is not None, folder
        self._size: int = manifest["rows"]
        self._names = sorted(manifest["files"])
        self.counts: Counter[str] = Counter()
        """Totals of the rows that are used: ``prompts``, ``responses``, ``tokens``, ``unknown_tokens``, and what the
        encoder counts."""
        self.faults: list[tuple[int, str, str, str, str]] = []
        """Rows that are useless as tokens: number, field, value, reason, remedy."""
        for number, shard in enumerate(self._shards):
            self.counts.update(shard.information["counts"])
            self.faults += [(number * SHARD_ROWS + fault[0], *fault[1:]) for fault in shard.information["faults"]]

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return self._size

    @cached_property
    def _shards(self) -> list[_Shard]:
        return [_Shard(read_shard(self.folder / name)) for name in self._names]

    def __getitem__(self, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The prompt's token ids and those of each response, int32, without a copy."""
        return self._shards[number // SHARD_ROWS].row(number % SHARD_ROWS)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """``[rows]``, tokens of each row's prompt."""
        return joined([np.diff(shard.prompt_ends) for shard in self._shards])

    @property
    def response_lengths(self) -> np.ndarray:
        """``[responses]``, tokens of each response, one row's after the other's."""
        return joined([np.diff(shard.response_ends) for shard in self._shards])

    @property
    def lengths(self) -> np.ndarray:
        """``[rows]``, tokens of each row, the prompt counted once."""
        responses = [np.diff(shard.response_ends[shard.first_response]) for shard in self._shards]
        return self.prompt_lengths + joined(responses)


class _Shard:
    """Views of the arrays of one shard."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.information: dict[str, Any] = json.loads(batch.schema.metadata[_INFORMATION])
        prompt, responses = batch.column("prompt"), batch.column("responses")
        self.prompt_ends, self.prompt_ids = prompt.offsets.to_numpy(), prompt.values.to_numpy()
        self.first_response = responses.offsets.to_numpy()
        self.response_ends = responses.values.offsets.to_numpy()
        self.response_ids = responses.values.values.to_numpy()

    def row(self, index: int) -> tuple[np.ndarray, list[np.ndarray]]:
        first, last = self.first_response[index : index + 2]
        ends = self.response_ends[first : last + 1].tolist()
        responses = [self.response_ids[low:high] for low, high in pairwise(ends)]
        low, high = self.prompt_ends[index : index + 2]
        return self.prompt_ids[low:high], responses

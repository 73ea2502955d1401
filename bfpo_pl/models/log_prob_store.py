"""Log-probs of responses under one frozen network, computed once, kept on disk by their token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from lightning.pytorch.utilities import rank_zero_warn

from bfpo_pl.batch import PairBatch
from bfpo_pl.data.arrow import read_shard, write_shard
from bfpo_pl.data.trees import Ids, PairTree

_CHECKSUM = b"checksum"
_Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Keys ``[N]`` uint64, log-probs ``[N]`` float64 and lengths ``[N]`` int64 of responses."""


def response_keys(prompt: Ids, responses: Iterable[Ids]) -> list[int]:
    """A key of each response together with its prompt: 64 bits of a hash of their token ids.

    Args:
        prompt: Token ids.
        responses: Token ids of each.
    """
    begun = xxhash.xxh3_64(len(prompt).to_bytes(8, "little"))  # else the boundary could lie elsewhere
    begun.update(np.asarray(prompt, dtype=np.int32).tobytes())
    keys = []
    for response in responses:
        whole = begun.copy()
        whole.update(np.asarray(response, dtype=np.int32).tobytes())
        keys.append(whole.intdigest())
    return keys


def tree_keys(trees: Iterable[PairTree]) -> np.ndarray:
    """``[R]`` uint64, the keys of the responses of trees.

    Args:
        trees: The pair trees.
    """
    keys = [key for tree in trees for key in response_keys(tree.prompt_ids, tree.response_ids)]
    return np.array(keys, dtype=np.uint64)


def batch_keys(batch: PairBatch) -> np.ndarray:
    """``[R]`` uint64, the keys of the responses of a batch on the CPU.

    Args:
        batch: The pair trees.
    """
    tokens = batch.tokens.numpy().astype(np.int32)
    starts, lengths = batch.segment_start.tolist(), batch.segment_length.tolist()
    segments = [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    keys = np.empty(len(batch), dtype=np.uint64)
    own: dict[int, list[int]] = {}
    for index, prompt in enumerate(batch.prompt_segment.tolist()):
        own.setdefault(prompt, []).append(index)
    response_segment = batch.response_segment.tolist()
    for prompt, indices in own.items():
        keys[indices] = response_keys(segments[prompt], [segments[response_segment[index]] for index in indices])
    return keys


class LogProbStore:
    """Sums of token log-probs and lengths of responses, by key; in memory and, part by part, on disk.

    Parts appear whole or not at all. One that is damaged is removed, and its responses count as not yet computed.

    Args:
        folder: Where the parts are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keys, self._sums, self._lengths = _empty()
        self._added: list[_Columns] = []
        self._unwritten: list[_Columns] = []
        self.read()

    def __len__(self) -> int:
        self._take_in()
        return len(self._keys)

    def read(self) -> None:
        """Takes in all parts that are on disk now."""
        self._keys, self._sums, self._lengths = _empty()
        self._added = [part for path in sorted(self.folder.glob("*.arrow")) if (part := _read(path)) is not None]

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is known of responses.

        Args:
            keys: ``[N]`` uint64.

        Returns:
            ``[N]`` whether each is known; ``[N]`` float64, its log-prob summed over tokens; ``[N]`` its length.
        """
        self._take_in()
        if not len(self._keys):
            return np.zeros(len(keys), dtype=bool), np.zeros(len(keys)), np.zeros(len(keys), dtype=np.int64)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return self._keys[places] == keys, self._sums[places], self._lengths[places]

    def add(self, keys: np.ndarray, sums: np.ndarray, lengths: np.ndarray) -> None:
        """Takes in log-probs that were computed, in memory; `write` puts them on disk.

        Args:
            keys: ``[N]`` uint64.
            sums: ``[N]``, log-probs summed over tokens.
            lengths: ``[N]``, tokens of each response.
        """
        columns = (keys, sums.astype(np.float64), lengths.astype(np.int64))
        self._added.append(columns)
        self._unwritten.append(columns)

    def write(self) -> None:
        """Writes what was added since the last time, as one part.

        Raises:
            RunError: The folder cannot be written.
        """
        columns = _joined(self._unwritten)
        self._unwritten = []
        if not len(columns[0]):
            return
        schema = pa.schema(
            [("key", pa.uint64()), ("log_prob", pa.float64()), ("length", pa.int64())],
            {_CHECKSUM: _checksum(columns)},
        )
        name = xxhash.xxh3_64_hexdigest(columns[0].tobytes())
        part = pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=schema)
        write_shard(self.folder / f"part-{name}.arrow", part)

    def _take_in(self) -> None:
        """Sorts what was added into what is known; what was known stays."""
        if self._added:
            keys, sums, lengths = _joined([(self._keys, self._sums, self._lengths), *self._added])
            self._added = []
            self._keys, first = np.unique(keys, return_index=True)
            self._sums, self._lengths = sums[first], lengths[first]


def _empty() -> _Columns:
    return np.zeros(0, dtype=np.uint64), np.zeros(0), np.zeros(0, dtype=np.int64)


def _joined(parts: Sequence[_Columns]) -> _Columns:
    keys, sums, lengths = (np.concatenate(columns) for columns in zip(_empty(), *parts, strict=True))
    return keys, sums, lengths


def _checksum(columns: Sequence[np.ndarray]) -> str:
    digest = xxhash.xxh3_64()
    for column in columns:
        digest.update(column.tobytes())
    return digest.hexdigest()


def _read(path: Path) -> _Columns | None:
    """The columns of a part; None if it is damaged, which removes it."""
    try:
        batch = read_shard(path)
        keys, sums, lengths = (batch.column(name).to_numpy() for name in ("key", "log_prob", "length"))
        columns = (keys, sums, lengths)
        if batch.schema.metadata[_CHECKSUM].decode() == _checksum(columns):
            return columns
    except (pa.ArrowException, KeyError, TypeError, EOFError, StopIteration, OSError):
        pass
    rank_zero_warn(f"{path} is damaged; what was in it is computed again.")
    path.unlink(missing_ok=True)
    return None

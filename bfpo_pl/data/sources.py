"""Sources: where raw rows come from, one split at a time."""

from __future__ import annotations

import gzip
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from bfpo_pl.component import Component, UserError, check_range
from bfpo_pl.data.rows import RowError

RawRow = Mapping[str, Any] | RowError
"""A raw row as its source has it, or what makes it unreadable."""


class SourceError(UserError):
    """A source that cannot be read at all."""


class Source(Component, ABC):
    """Yields the raw rows of a split. A new one needs ``rows`` and ``has_split``."""

    @abstractmethod
    def rows(self, split: str) -> Iterator[tuple[str, RawRow]]:
        """Yields (origin, raw row) in a fixed order.

        A row that cannot be read is yielded as the :class:`~bfpo_pl.data.rows.RowError` that says why, so that all of
        them can be reported at once.

        Args:
            split: ``train`` or ``validation``.

        Raises:
            SourceError: The source as a whole cannot be read.
        """

    @abstractmethod
    def has_split(self, split: str) -> bool:
        """Whether the source has rows for ``train`` or ``validation``.

        Args:
            split: Which of them.
        """

    def prepare(self) -> None:
        """Downloads what is needed; called on one process of each machine before any reads."""

    def describe(self) -> str:
        """The source in one line, for reports."""
        return repr(self)


class JsonLines(Source):
    """A local file with one JSON object a line (``.gz`` too).

    Args:
        path: The training file.
        validation_path: The validation file; null for none.
    """

    def __init__(self, path: str, validation_path: str | None = None) -> None:
        self.path = path
        self.validation_path = validation_path

    def has_split(self, split: str) -> bool:
        return self._path(split) is not None

    def rows(self, split: str) -> Iterator[tuple[str, RawRow]]:
        given = self._path(split)
        if given is None:
            raise SourceError(f"{self.describe()} has no {split} split. Set source.validation_path.")
        path = Path(given).expanduser()
        if not path.is_file():
            raise SourceError(f"JsonLines: there is no file {path} (looked from {Path.cwd()}).")
        with _opened(path) as lines:
            for index, line in enumerate(lines, start=1):
                if line.strip():
                    origin = f"{given}:{index}"
                    yield origin, _parsed(line, origin)

    def _path(self, split: str) -> str | None:
        return {"train": self.path, "validation": self.validation_path}.get(split)


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _parsed(line: bytes, origin: str) -> RawRow:
    """The JSON object of a line, or the error that describes it."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RowError(origin, "line", line[error.start : error.start + 8], "the line is not UTF-8")
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return RowError(origin, "line", text, "the line is not valid JSON")
    if not isinstance(value, dict):
        return RowError(origin, "line", text, "the line is not a JSON object")
    return value


class HubDataset(Source):
    """A dataset of the Hugging Face Hub, or a local folder or file that `datasets` reads (parquet, json, csv, arrow).

    Code from the Hub is never run.

    Args:
        path: Its name on the Hub, or a local folder.
        name: Its configuration, if it has several.
        splits: Names that this dataset has for our splits ``train`` and ``validation``. Default: ``train``, ``test``.
        revision: Commit, tag or branch on the Hub; pin a commit to repeat a run.
        fraction: Share of the training split to use: its first int(fraction · rows) rows, as the paper's code takes.
        data_dir: Folder within the dataset, if it has several.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        splits: dict[str, str] | None = None,
        revision: str | None = None,
        fraction: float = 1.0,
        data_dir: str | None = None,
    ) -> None:
        self.path, self.name, self.revision, self.data_dir = path, name, revision, data_dir
        self.splits = {"train": "train", "validation": "test"} if splits is None else dict(splits)
        if unknown := set(self.splits) - {"train", "validation"}:
            raise SourceError(f"HubDataset: splits may name train and validation, not {', '.join(sorted(unknown))}.")
        self.fraction = check_range(self, "fraction", fraction, 0.0, 1.0, low_open=True)

    def has_split(self, split: str) -> bool:
        return split in self.splits

    def prepare(self) -> None:
        for split in self.splits:
            self._load(split)

    def rows(self, split: str) -> Iterator[tuple[str, RawRow]]:
        if split not in self.splits:
            raise SourceError(f"{self.describe()} has no {split} split. Name it in source.splits.")
        dataset = self._load(split)
        size = int(self.fraction * len(dataset)) if split == "train" else len(dataset)
        for index, raw in enumerate(dataset.select(range(size))):
            yield f"{self.path}[{self.splits[split]}]:{index}", raw

    def _load(self, split: str) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.path, self.name, split=self.splits[split], revision=self.revision, data_dir=self.data_dir
            )
        except Exception as error:  # `datasets` raises a dozen kinds, from the network's to its builders'
            raise SourceError(self._explained(split, error)) from error

    def _explained(self, split: str, error: Exception) -> str:
        kind = type(error).__name__
        start = f"HubDataset cannot read {self.path!r}, split {self.splits[split]!r}: "
        if "Gated" in kind or "gated" in str(error):
            return f"{start}it is gated. Accept its terms on its page, then run `hf auth login`."
        if "split" in str(error).lower() and isinstance(error, ValueError):
            return f"{start}{error} Name its splits in source.splits, for instance {{train: train_prefs}}."
        if kind in (
            "DatasetNotFoundError",
            "ConnectionError",
            "OfflineModeIsEnabled",
            "LocalEntryNotFoundError",
            "FileNotFoundError",
        ):
            return (
                f"{start}{error} If it is on the Hub: check the name, the network and, where it is private, "
                "`hf auth login`. If it is local: there is no such folder."
            )
        return f"{start}{kind}: {error}"

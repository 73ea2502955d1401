"""Sources: where raw rows come from, one split at a time."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bfpo_pl.component import Component, UserError
from bfpo_pl.data.rows import RowError

RawRow = Mapping[str, Any] | RowError
"""A raw row as its source has it, or what makes it unreadable."""

_BATCH = 1000
_SAVED = (("dataset_dict.json",), ("dataset_info.json", "state.json"))


class SourceError(UserError):
    """A source that cannot be read at all."""


class Source(Component, ABC):
    """Yields the raw rows of a split. A new one needs ``rows`` and ``has_split``.

    ``streaming`` says that the training rows are too many to be kept, and are read as training goes on; those of the
    other splits are not.
    """

    streaming: bool = False

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

    def prepare(self, splits: Sequence[str]) -> None:
        """Downloads what is needed; called on one process of each machine before any reads.

        Args:
            splits: The splits that will be read, of ``train`` and ``validation``.

        Raises:
            SourceError: They cannot be had.
        """

    def fingerprint(self, split: str) -> str | None:
        """A text that changes whenever the rows of a split may have changed, without reading them.

        Args:
            split: ``train`` or ``validation``.

        Returns:
            The text; None, the default, where only reading all rows can tell.
        """
        return None

    def describe(self) -> str:
        """The source in one line, for reports."""
        return repr(self)


class HubDataset(Source):
    """A dataset of the Hugging Face Hub, or a local folder that `datasets` reads (parquet, json, csv, arrow, saved).

    Code from the Hub is never run.

    Args:
        path: Its name on the Hub, or a local folder: one laid out as on the Hub, or one that ``save_to_disk`` wrote.
        name: Its configuration, if it has several.
        splits: Names that this dataset has for our splits ``train`` and ``validation``. Default: ``train``, ``test``.
        revision: Commit, tag or branch on the Hub; pin a commit to repeat a run.
        data_dir: Folder within the dataset, if it has several.
        streaming: Fetch the training rows as they are needed, and keep none of them on disk.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        splits: dict[str, str] | None = None,
        revision: str | None = None,
        data_dir: str | None = None,
        streaming: bool = False,
    ) -> None:
        self.path, self.name, self.revision, self.data_dir = path, name, revision, data_dir
        self.splits = {"train": "train", "validation": "test"} if splits is None else dict(splits)
        if unknown := set(self.splits) - {"train", "validation"}:
            raise SourceError(f"HubDataset: splits may name train and validation, not {', '.join(sorted(unknown))}.")
        self.streaming = streaming

    def __repr__(self) -> str:
        # The base takes `streaming` for something declared by the class.
        return f"{super().__repr__()[:-1]}, streaming=True)" if self.streaming else super().__repr__()

    def has_split(self, split: str) -> bool:
        return split in self.splits

    def prepare(self, splits: Sequence[str]) -> None:
        for split in splits:
            if self.has_split(split) and not self.streaming:
                self._load(split)

    def fingerprint(self, split: str) -> str | None:
        if self.streaming:
            return None
        folder = Path(self.path).expanduser()
        state = f" {state_of(folder)}" if folder.is_dir() and not is_saved(folder) else ""
        return f"{self._load(split)._fingerprint} {self.revision} {self.splits[split]}{state}"

    def rows(self, split: str) -> Iterator[tuple[str, RawRow]]:
        name = self._name_of(split)
        try:
            for index, raw in enumerate(rows_of(self._load(split))):
                yield f"{self.path}[{name}]:{index}", raw
        except UserError:
            raise
        except Exception as error:  # while it streams, the network's and the builders' too
            raise SourceError(self._explained(split, error)) from error

    def _name_of(self, split: str) -> str:
        if split not in self.splits:
            raise SourceError(f"{self.describe()} has no {split} split. Name it in source.splits.")
        return self.splits[split]

    def _load(self, split: str) -> Any:
        import datasets

        name, folder = self._name_of(split), Path(self.path).expanduser()
        if is_saved(folder):
            return self._load_saved(split, folder)
        # Of a folder with a card `datasets` knows the name alone: it would give the rows of another of that name.
        own = Path(datasets.config.HF_DATASETS_CACHE) / "folders" / state_of(folder) if folder.is_dir() else None
        try:
            # With `streaming` the validation split is fetched so too: to load it would download the training split.
            return datasets.load_dataset(
                str(folder) if folder.is_dir() else self.path,
                self.name,
                split=name,
                revision=self.revision,
                data_dir=self.data_dir,
                streaming=self.streaming,
                cache_dir=None if own is None else str(own),
            )
        except Exception as error:  # `datasets` raises a dozen kinds, from the network's to its builders'
            raise SourceError(self._explained(split, error)) from error

    def _load_saved(self, split: str, folder: Path) -> Any:
        given = [key for key in ("name", "revision", "data_dir") if getattr(self, key) is not None]
        if given:
            what = " and ".join(given)
            raise SourceError(f"HubDataset: {self.path} was written by save_to_disk and has no {what}: leave it out.")
        return load_saved(folder, self.splits[split], "source.splits", whole=split == "train")

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


def state_of(folder: Path) -> str:
    """A digest of where a folder is and of its files' names, sizes and times of change.

    Args:
        folder: The folder.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        found = file.stat()
        digest.update(f"\n{file.relative_to(folder)} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk`` of `datasets`.

    Args:
        folder: The folder.
    """
    return any(all((folder / name).is_file() for name in names) for names in _SAVED)


def load_saved(folder: Path, name: str, argument: str, whole: bool = True) -> Any:
    """The dataset in a folder that ``save_to_disk`` wrote, in its saved order; memory-mapped.

    Args:
        folder: The folder.
        name: The split to take, where the folder has several.
        argument: The argument that names splits or their folders, for messages.
        whole: A folder without splits is taken whole; else it is refused.

    Raises:
        SourceError: It cannot be read, or has no such split.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # files that are missing, torn or of another version, each in its own way
        kind = type(error).__name__
        raise SourceError(f"The dataset saved in {folder} cannot be read: {kind}: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if name not in found:
            raise SourceError(
                f"The dataset saved in {folder} has no split '{name}'; it has: {', '.join(found)}. Set {argument}."
            )
        return found[name]
    if not whole:
        raise SourceError(f"The dataset saved in {folder} has no splits, so that it has no '{name}'. Set {argument}.")
    return found


def rows_of(dataset: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The rows of a dataset of `datasets`, as plain values, fetched many at a time (more than twice as fast).

    Args:
        dataset: A ``Dataset`` or an ``IterableDataset``.
    """
    for batch in dataset.iter(batch_size=_BATCH):  # type: ignore[attr-defined]
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))

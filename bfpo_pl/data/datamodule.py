"""The data module: streams in, batches of pair trees out; for preference training and for supervised training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset, Sampler

from bfpo_pl.component import check_range
from bfpo_pl.data.collate import Collator, Item
from bfpo_pl.data.progress import in_chunks
from bfpo_pl.data.reading import DataError, Reading, bad_row_report, read
from bfpo_pl.data.streams import Key, SequentialSampler, Stream, StreamSampler
from bfpo_pl.data.templates import ChatTemplate, PairTree, RowEncoder, Truncation

_SPLITS: dict[str | None, tuple[str, ...]] = {
    None: ("train", "validation"),
    "fit": ("train", "validation"),
    "validate": ("validation",),
}
_TEMPLATE, _TRUNCATION = ChatTemplate(), Truncation()


class _Trees(Dataset[Item]):
    """Pair trees by (stream, row)."""

    def __init__(self, trees: list[list[PairTree]]) -> None:
        self.trees = trees

    def __len__(self) -> int:
        return sum(map(len, self.trees))

    def __getitem__(self, key: Key) -> Item:
        stream, row = key
        return stream, self.trees[stream][row]


class _Loader(DataLoader):
    """A loader whose place in the data is kept by the data module; says so to Lightning, which would warn otherwise."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: the data module has the place."""


class AlignmentData(LightningDataModule):
    """Named streams of rows, mixed in every batch, with an exact place to resume from.

    Each batch holds `batch_size` rows of every stream. One stream, the driver, sets the length of an epoch; the others
    go on from epoch to epoch and are shuffled afresh when exhausted. Validation goes through its streams in order.
    Needs `use_distributed_sampler: false` in the trainer: ranks see different rows by this module's own doing.

    Args:
        streams: The streams by name; on the command line for instance `--data.streams.safety.batch_size=4`.
        driver: Name of the stream that sets the length of an epoch. Default: the first.
        template: How conversations become text.
        truncation: What is cut from rows that are too long.
        validation_streams: Names of the streams to validate on. Default: the driver, if it has a validation split.
        validation_batch_size: Rows in each validation batch of each process.
        on_bad_row: What to do when rows cannot be used: `fail` reports all of them and stops; `drop` goes on without
            them and keeps their counts in the run's record.
        num_workers: Processes that prepare batches; the batches are the same for any number.
        seed: Seed of the order of rows. Default: the run's seed (`seed_everything`).
    """

    def __init__(
        self,
        streams: dict[str, Stream],
        driver: str | None = None,
        template: ChatTemplate = _TEMPLATE,
        truncation: Truncation = _TRUNCATION,
        validation_streams: list[str] | None = None,
        validation_batch_size: int = 32,
        on_bad_row: Literal["fail", "drop"] = "fail",
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not streams:
            raise DataError("AlignmentData: streams is empty; name at least one.")
        self.streams = dict(streams)
        self.driver = next(iter(streams)) if driver is None else driver
        self.validation_streams = validation_streams
        for name in (self.driver, *(validation_streams or ())):
            if name not in self.streams:
                raise DataError(f"AlignmentData: there is no stream '{name}'. Streams: {', '.join(self.streams)}.")
        self.template, self.truncation = template, truncation
        self.validation_batch_size = int(check_range(self, "validation_batch_size", validation_batch_size, 1))
        self.on_bad_row = on_bad_row
        self.num_workers = int(check_range(self, "num_workers", num_workers, 0))
        self.seed = seed
        self.report: dict[str, Any] = {}
        """What was read, as plain data: per stream and split rows, dropped rows by reason, quadrants, cuts."""
        self._tokenizer: Any = None
        self._trees: dict[str, dict[str, list[PairTree]]] = {}
        self._columns: dict[str, dict[str, tuple[set[str], set[str]]]] = {}
        self._resumed_at = 0
        self._sampler: StreamSampler | None = None

    # ------------------------------------------------------------------ reading

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: the one set here, or else the LightningModule's."""
        if self._tokenizer is not None:
            return self._tokenizer
        module = getattr(self.trainer, "lightning_module", None)
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise DataError("AlignmentData has no tokenizer: set data.tokenizer, or use a module that has one.")
        return tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._trees, self._columns = {}, {}

    def prepare_data(self) -> None:
        """Downloads what is missing, on one process of each machine."""
        for stream in self.streams.values():
            stream.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises the splits that a stage needs; what was read stays.

        Args:
            stage: `fit`, `validate`, or None for both.

        Raises:
            DataError: Rows cannot be used, or a stream has none.
        """
        if stage == "fit":
            self._resumed_at = 0
        if stage == "validate" and not self._streams_of("validation"):
            raise DataError(
                f"There is nothing to validate on: stream '{self.driver}' has no validation rows "
                f"({self.streams[self.driver].source.describe()}). Name some, for instance "
                f"data.streams.{self.driver}.source.validation_path, or other streams in data.validation_streams."
            )
        splits = [split for split in _SPLITS.get(stage, ()) if split not in self._trees]
        readings = [self._read(name, split) for split in splits for name in self._streams_of(split)]
        self._judge(readings)
        encoder = RowEncoder(self.tokenizer, self.template, self.truncation) if readings else None
        encoded = [self._encode(encoder, reading) for reading in readings if encoder is not None]
        self._judge(readings)
        for split in splits:
            self._trees[split], self._columns[split] = {}, {}
        for reading, (trees, cuts) in zip(readings, encoded, strict=True):
            self._trees[reading.split][reading.stream] = trees
            self._columns[reading.split][reading.stream] = reading.columns
            summary = reading.summary()
            self.report.setdefault(reading.stream, {})[reading.split] = {**summary, **cuts}
            if reading.errors:
                counts = ", ".join(f"{n} × {reason}" for reason, n in summary["dropped"].items())
                rank_zero_info(f"{reading.stream}, {reading.split}: dropped {len(reading.errors)} rows: {counts}")

    def _encode(self, encoder: RowEncoder, reading: Reading) -> tuple[list[PairTree], dict[str, int]]:
        """Trees of a split's rows and what was cut; rows that turn out to be useless go to the reading's errors."""
        label, kept, trees = f"{reading.stream}, {reading.split}", [], []
        encoder.counts.clear()
        with closing(in_chunks(reading.rows, label)) as chunks:
            tokenised = [pair for rows in chunks for pair in zip(rows, encoder.many(rows), strict=True)]
        for row, tree in tokenised:
            if error := encoder.fault(row, tree):
                reading.errors.append(error)
            else:
                kept.append(row)
                trees.append(tree)
        cuts = {name: encoder.counts[name] for name in ("prompts_cut", "responses_cut", "stop_token_in_text")}
        if cuts["prompts_cut"] or cuts["responses_cut"]:
            prompts, responses = len(reading.rows), sum(len(row.responses) for row in reading.rows)
            rank_zero_info(
                f"{label}: cut {cuts['responses_cut']:,} of {responses:,} responses and {cuts['prompts_cut']:,} of "
                f"{prompts:,} prompts to fit max_length {self.truncation.max_length}"
            )
        cuts["unknown_tokens"] = self._unknown_tokens(label, trees)
        reading.rows = kept
        return trees, cuts

    def _unknown_tokens(self, label: str, trees: list[PairTree]) -> int:
        """Counts tokens that stand for text which the tokenizer does not know.

        Raises:
            DataError: They are more than a tenth of all.
        """
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        sequences = [ids for tree in trees for ids in (tree.prompt_ids, *tree.response_ids)]
        total = sum(map(len, sequences))
        count = 0 if unknown is None else sum(ids.count(unknown) for ids in sequences)
        if count > total / 10:
            raise DataError(
                f"{label}: {count / total:.0%} of the tokens are {self.tokenizer.unk_token}, which is to say that this "
                f"tokenizer does not know the text. Is model.policy the model you meant? TinyModel, the default of "
                f"configs/base.yaml, speaks the microworld's language only."
            )
        if count:
            rank_zero_info(f"{label}: {count:,} of {total:,} tokens are {self.tokenizer.unk_token}.")
        return count

    def _streams_of(self, split: str) -> list[str]:
        if split == "train":
            return list(self.streams)
        if self.validation_streams is not None:
            return list(self.validation_streams)
        return [self.driver] if self.streams[self.driver].source.has_split("validation") else []

    def _read(self, name: str, split: str) -> Reading:
        stream = self.streams[name]
        return read(name, split, stream.source, stream.adapter, stream.assume_safe)

    def _judge(self, readings: Sequence[Reading]) -> None:
        """Fails on bad rows, unless they are to be dropped, and on a stream without rows."""
        if self.on_bad_row == "fail" and (report := bad_row_report(readings)):
            raise DataError(report)
        for reading in readings:
            if not reading.rows:
                source = self.streams[reading.stream].source.describe()
                raise DataError(f"Stream '{reading.stream}' has no row to use in its {reading.split} split: {source}.")

    # ------------------------------------------------------------------ columns

    @property
    def has_pairs(self) -> bool:
        """Whether any row read has a pair of responses, as supervised rows have not; known after `setup`."""
        return any(tree.pairs for table in self._trees.values() for trees in table.values() for tree in trees)

    @property
    def columns(self) -> set[str]:
        """Columns that every stream has, under the names that `Annotations` answers to; known after `setup`."""
        names = [self._named(*pair) for table in self._columns.values() for pair in table.values()]
        return set.intersection(*names) if names else set()

    def columns_of(self, name: str) -> set[str]:
        """Columns that one stream has; a stream that the stage does not read lacks none that others have.

        Args:
            name: The stream.
        """
        names = [self._named(*table[name]) for table in self._columns.values() if name in table]
        return set.intersection(*names) if names else self.columns

    @staticmethod
    def _named(response: set[str], pair: set[str]) -> set[str]:
        return {*response, *pair, *(f"{side}_{name}" for side in ("chosen", "rejected") for name in response)}

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader:
        """Batches with every stream's rows, from the place to resume from."""
        rank, world = self._rank_and_world()
        trees = self._trees["train"]
        self._sampler = StreamSampler(
            sizes={name: len(rows) for name, rows in trees.items()},
            quotas={name: stream.batch_size for name, stream in self.streams.items()},
            driver=self.driver,
            seed=self._seed(),
            rank=rank,
            world=world,
            start=self._consumed,
            repeat=getattr(self.trainer, "overfit_batches", 0) > 0,
        )
        self._sampler.epoch_batches = self._epoch_batches(len(self._sampler))
        return self._loader("train", self._sampler)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches of the validation streams, one stream after the other; an empty list if there are none."""
        rank, world = self._rank_and_world()
        trees = self._trees["validation"]
        if not trees:
            return []
        names = list(self.streams)
        sizes = [(names.index(name), len(rows)) for name, rows in trees.items()]
        return self._loader("validation", SequentialSampler(sizes, self.validation_batch_size, rank, world))

    def _loader(self, split: str, sampler: Sampler) -> DataLoader:
        trees, tables = self._trees[split], self._columns[split].values()
        response, pair = (set.intersection(*(table[kind] for table in tables)) for kind in (0, 1))
        weights = tuple(float(stream.weight) for stream in self.streams.values())
        return _Loader(
            _Trees([trees.get(name, []) for name in self.streams]),
            batch_sampler=sampler,
            collate_fn=Collator(tuple(self.streams), weights, tuple(sorted(response)), tuple(sorted(pair))),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self._seed()),
            pin_memory=torch.cuda.is_available(),
        )

    def _rank_and_world(self) -> tuple[int, int]:
        """This process among those that see different rows (under tensor parallelism some see the same)."""
        trainer = self.trainer
        if trainer is None:
            return 0, 1
        kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
        rank, world = (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (trainer.global_rank, trainer.world_size)
        connector = getattr(trainer, "_accelerator_connector", None)
        if world > 1 and getattr(connector, "use_distributed_sampler", False):
            raise DataError("AlignmentData shares rows out among ranks itself: set use_distributed_sampler: false.")
        return rank, world

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED") or 0) if self.seed is None else self.seed

    def _epoch_batches(self, length: int) -> int:
        """Batches of an epoch under the trainer's `limit_train_batches`."""
        limit = getattr(self.trainer, "limit_train_batches", 1.0)
        return max(1, min(length, limit if isinstance(limit, int) else int(length * limit)))

    # ------------------------------------------------------------------ resume

    def _consumed(self) -> int:
        """Global batches that training has consumed, over all epochs; not those that workers have prepared."""
        if self.trainer is not None:
            total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
            return max(self._resumed_at, total.processed)
        return max(self._resumed_at, 0 if self._sampler is None else self._sampler.yielded)

    def _geometry(self) -> dict[str, Any]:
        """What must not change for the order of batches to go on as it was."""
        _, world = self._rank_and_world()
        sizes = {name: len(rows) for name, rows in self._trees.get("train", {}).items()}
        quotas = {name: stream.batch_size for name, stream in self.streams.items()}
        return {"seed": self._seed(), "world": world, "rows": sizes, "batch_size": quotas, "driver": self.driver}

    def state_dict(self) -> dict[str, Any]:
        """The place to resume from, as plain data."""
        return {"batches": self._consumed(), "geometry": self._geometry()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the batches consumed so far.

        Args:
            state_dict: What `state_dict` gave.
        """
        self._resumed_at = int(state_dict["batches"])
        saved, now = state_dict.get("geometry", {}), self._geometry()
        changed = [f"{key} was {saved[key]}, is {now[key]}" for key in saved if saved[key] != now.get(key)]
        if changed and now["rows"]:
            rank_zero_warn(f"AlignmentData resumes, but its batches will not be as before: {'; '.join(changed)}.")
        if self._sampler is not None and self.trainer is not None:
            # Under sharded strategies the checkpoint is read after `estimated_stepping_batches` may have built the
            # loader and its iterator; the fit loop must ask for them again.
            self.trainer.fit_loop._combined_loader = None

"""The data module: streams in, batches of pair trees out; for preference training and for supervised training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Sampler

from bfpo_pl.component import UserError, check_range
from bfpo_pl.data.arrow import default_cache
from bfpo_pl.data.batching import Batching, BudgetedBatches
from bfpo_pl.data.collate import Collator
from bfpo_pl.data.contamination import ContaminationGuard
from bfpo_pl.data.encoding import RowEncoder
from bfpo_pl.data.loading import Collating, Loader, TreesByStream, rank_and_world
from bfpo_pl.data.packing import Groups, Packing, Trees
from bfpo_pl.data.preparation import Preparation
from bfpo_pl.data.reading import DataError, Reading
from bfpo_pl.data.selection import shared_prompts
from bfpo_pl.data.streaming import StreamingRows
from bfpo_pl.data.streams import FixedBatches, SequentialSampler, Stream, StreamSampler
from bfpo_pl.data.templates import ChatTemplate
from bfpo_pl.data.truncation import Truncation

_SPLITS: dict[str | None, tuple[str, ...]] = {
    None: ("train", "validation"),
    "fit": ("train", "validation"),
    "validate": ("validation",),
}


class AlignmentData(LightningDataModule):
    """Named streams of rows, mixed in every batch, with an exact place to resume from.

    Each batch holds `batch_size` rows of every stream. One stream, the driver, sets the length of an epoch; the others
    go on from epoch to epoch and are shuffled afresh when exhausted. Validation goes through its streams in order.
    Needs `use_distributed_sampler: false` in the trainer: ranks see different rows by this module's own doing.

    Args:
        streams: The streams by name; on the command line for instance `--data.streams.safety.batch_size=4`.
        driver: Name of the stream that sets the length of an epoch. Default: the first.
        template: How conversations become tokens. Default: `ChatTemplate`, the tokenizer's own chat template.
        truncation: What is cut from rows that are too long. Default: `Truncation`, at most 1024 tokens.
        batching: How many rows of each stream a batch has. Default: `Batching`, `batch_size` rows of each.
        packing: How rows are joined to blocks, which `batch_size` then counts. Default: each is by itself.
        contamination: Leaves out training prompts that an evaluation file has. Default: nothing is left out.
        validation_streams: Names of the streams to validate on. Default: the driver, if it has validation rows.
        validation_batch_size: Rows in each validation batch of each process.
        on_bad_row: What to do when rows cannot be used: `fail` reports all of them and stops; `drop` goes on without
            them and keeps their counts in the run's record.
        num_workers: Processes that prepare batches; the batches are the same for any number.
        tokenizing_processes: Processes that tokenise, once, when there are more than 16,384 rows.
        cache: Folder of prepared data, shared by all runs. Default: `$BFPO_CACHE`, or `~/.cache/bfpo_pl`.
        seed: Seed of the order of rows. Default: the run's seed (`seed_everything`).
    """

    def __init__(
        self,
        streams: dict[str, Stream],
        driver: str | None = None,
        template: ChatTemplate | None = None,
        truncation: Truncation | None = None,
        batching: Batching | None = None,
        packing: Packing | None = None,
        contamination: ContaminationGuard | None = None,
        validation_streams: list[str] | None = None,
        validation_batch_size: int = 32,
        on_bad_row: Literal["fail", "drop"] = "fail",
        num_workers: int = 0,
        tokenizing_processes: int = 1,
        cache: str | None = None,
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
        for name, stream in self.streams.items():
            if stream.validation_fraction and name not in self._streams_of("validation"):
                raise DataError(
                    f"data.streams.{name}.validation_fraction holds rows out that nothing validates on: add {name} to "
                    "data.validation_streams."
                )
        self.template, self.truncation = template or ChatTemplate(), truncation or Truncation()
        self.batching, self.packing, self.contamination = batching or Batching(), packing, contamination
        if packing is not None:
            packing.check(self.template)
        self.validation_batch_size = int(check_range(self, "validation_batch_size", validation_batch_size, 1))
        self.on_bad_row: Literal["fail", "drop"] = on_bad_row
        self.num_workers = int(check_range(self, "num_workers", num_workers, 0))
        self.tokenizing_processes = int(check_range(self, "tokenizing_processes", tokenizing_processes, 1))
        self.cache = cache
        self.seed = seed
        self.readings: dict[tuple[str, str], Reading] = {}
        """The rows that are used, by stream and split."""
        self.stop_token_ids: Sequence[int] | None = None
        """Tokens that end a response besides the tokenizer's own. Default: the LightningModule's."""
        self._report: dict[str, Any] = {}
        self._tokenizer: Any = None
        self._trees: dict[str, dict[str, Trees | StreamingRows]] = {}
        self._columns: dict[str, dict[str, tuple[set[str], set[str]]]] = {}
        self._resumed_at = 0
        self._sampler: StreamSampler | None = None

    # ------------------------------------------------------------------ reading

    @property
    def report(self) -> dict[str, Any]:
        """What was read, as plain data: per stream and split rows, dropped rows by reason, quadrants, cuts."""
        streaming = {
            name: rows for name, rows in self._trees.get("train", {}).items() if isinstance(rows, StreamingRows)
        }
        live = {name: {**self._report.get(name, {}), "train": rows.summary()} for name, rows in streaming.items()}
        return {**self._report, **live}

    @property
    def cache_folder(self) -> Path:
        """Folder of prepared data."""
        return default_cache() if self.cache is None else Path(self.cache).expanduser()

    @property
    def rows(self) -> dict[tuple[str, str], Trees]:
        """The pair trees of each stream and split that `setup` has read.

        Raises:
            DataError: A stream reads its rows as training goes on, so that nobody has them all.
        """
        found: dict[tuple[str, str], Trees] = {}
        for split, by_stream in self._trees.items():
            for name, trees in by_stream.items():
                if isinstance(trees, StreamingRows):
                    raise DataError(
                        f"All rows of stream '{name}' are needed before training, and it reads them as it goes. Set "
                        f"data.streams.{name}.source.streaming: false."
                    )
                found[name, split] = trees.documents if isinstance(trees, Groups) else trees
        return found

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: the one set here, or else the LightningModule's."""
        tokenizer = self._tokenizer or getattr(self._module, "tokenizer", None)
        if tokenizer is None:
            raise DataError("AlignmentData has no tokenizer: set data.tokenizer, or use a module that has one.")
        return tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._trees, self._columns, self.readings = {}, {}, {}

    @property
    def _module(self) -> Any:
        return getattr(self.trainer, "lightning_module", None)

    def encoder(self) -> RowEncoder:
        """What turns rows into token ids: tokenizer, template, truncation, and the tokens that end a response."""
        stop_ids = self.stop_token_ids
        if stop_ids is None:
            stop_ids = getattr(self._module, "stop_token_ids", ())
        return RowEncoder(self.tokenizer, self.template, self.truncation, stop_ids)

    def prepare_data(self) -> None:
        """Downloads, checks and tokenises what is missing, on one process of each machine."""
        with suppress(UserError):  # every process says so in `setup`, where all of them stop together
            self._prepare(self._splits_of(getattr(self.trainer.state, "fn", None) if self.trainer else None))

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
                f"data.streams.{self.driver}.source.validation_path, or hold some out "
                f"(data.streams.{self.driver}.validation_fraction), or name other streams in data.validation_streams."
            )
        self._prepare(self._splits_of(stage))

    @staticmethod
    def _splits_of(stage: str | None) -> tuple[str, ...]:
        return _SPLITS.get(stage, ())

    def _prepare(self, splits: Sequence[str]) -> None:
        wanted = [(name, split) for split in splits if split not in self._trees for name in self._streams_of(split)]
        if not wanted:
            self._trees.update({split: {} for split in splits if split not in self._trees})
            return
        for name in dict.fromkeys(name for name, _ in wanted):
            own = [self._source_split(name, split) for each, split in wanted if each == name]
            self.streams[name].source.prepare(list(dict.fromkeys(own)))
        encoder = self.encoder()
        preparation = Preparation(
            self.streams,
            self.cache_folder,
            self.on_bad_row,
            self.tokenizing_processes,
            self.contamination,
            self.packing,
        )
        streaming = [name for name, split in wanted if self._streams_rows(name, split)]
        opened = {name: preparation.open(encoder, name, self._seed()) for name in streaming}
        readings = preparation.read([each for each in wanted if not self._streams_rows(*each)])
        prepared = preparation.encode(encoder, readings)
        for split in splits:
            self._trees.setdefault(split, {})
            self._columns.setdefault(split, {})
        for reading, (trees, summary) in zip(readings, prepared, strict=True):
            self._trees[reading.split][reading.stream] = trees
            self._columns[reading.split][reading.stream] = reading.columns
            self.readings[reading.stream, reading.split] = reading
            self._report.setdefault(reading.stream, {})[reading.split] = summary
        for name, rows in opened.items():
            first = rows.first
            self._trees["train"][name] = rows
            self._columns["train"][name] = (set(first.columns), set(first.pair_columns))
        self._compare_splits()

    def _source_split(self, name: str, split: str) -> str:
        return "train" if self.streams[name].validation_fraction else split

    def _streams_rows(self, name: str, split: str) -> bool:
        return split == "train" and self.streams[name].source.streaming

    def _compare_splits(self) -> None:
        """Tells how many validation prompts are trained on."""
        train = [reading for (_, split), reading in self.readings.items() if split == "train"]
        for (name, split), reading in self.readings.items():
            if split == "train" or not train:
                continue
            shared, summary = shared_prompts(train, reading), self._report[name]["validation"]
            if shared and summary.get("prompts_also_trained_on") != shared:
                rank_zero_info(f"{name}: {shared:,} prompts of the validation rows are training prompts too")
            summary["prompts_also_trained_on"] = shared

    def _streams_of(self, split: str) -> list[str]:
        if split == "train":
            return list(self.streams)
        if self.validation_streams is not None:
            return list(self.validation_streams)
        driver = self.streams[self.driver]
        return [self.driver] if driver.source.has_split("validation") or driver.validation_fraction else []

    # ------------------------------------------------------------------ columns

    @property
    def has_pairs(self) -> bool:
        """Whether any row read has a pair of responses, as supervised rows have not; known after `setup`."""
        streaming = [rows for rows in self._trees.get("train", {}).values() if isinstance(rows, StreamingRows)]
        return any(len(reading.pairs_kept) for reading in self.readings.values()) or any(
            rows.first.pairs for rows in streaming
        )

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

    def train_dataloader(self) -> Loader:
        """Batches with every stream's rows, from the place to resume from."""
        rank, world = rank_and_world(self.trainer)
        trees = {name: self._trees["train"][name] for name in self.streams}  # sources that stream came last
        sizes = {name: None if isinstance(rows, StreamingRows) else len(rows) for name, rows in trees.items()}
        quotas = {name: stream.batch_size for name, stream in self.streams.items()}
        fixed = FixedBatches(sizes, quotas, self.driver, self._seed(), world)
        lengths = {name: rows.lengths for name, rows in trees.items() if not isinstance(rows, StreamingRows)}
        batches = self.batching(fixed, lengths)
        if isinstance(batches, BudgetedBatches) and batches.oversized:
            rank_zero_info(
                f"{len(batches.oversized):,} batches of an epoch are larger than {batches.tokens:,} tokens, because "
                f"one quota of rows is: {max(tokens for _, tokens in batches.oversized):,} at most."
            )
        limit = getattr(self.trainer, "limit_train_batches", 1.0)
        repeat = getattr(self.trainer, "overfit_batches", 0) > 0
        self._sampler = StreamSampler(batches, rank, self._consumed, limit, repeat)
        loader = self._loader("train", self._sampler)
        loader.accumulated = lambda: getattr(self.trainer, "accumulate_grad_batches", 1)
        return loader

    @property
    def why_length_unknown(self) -> str:
        """Why nobody knows the number of batches of a training epoch; empty if it is known, or not asked for yet."""
        batches = None if self._sampler is None else self._sampler.batches
        return "" if batches is None or batches.length is not None else batches.why_unknown

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches of the validation streams, one stream after the other; an empty list if there are none."""
        rank, world = rank_and_world(self.trainer)
        trees = self._trees["validation"]
        if not trees:
            return []
        names = list(self.streams)
        sizes = [(names.index(name), len(rows)) for name, rows in trees.items() if not isinstance(rows, StreamingRows)]
        return self._loader("validation", SequentialSampler(sizes, self.validation_batch_size, rank, world))

    def _loader(self, split: str, sampler: Sampler) -> Loader:
        trees, tables = self._trees[split], self._columns[split].values()
        response, pair = (set.intersection(*(table[kind] for table in tables)) for kind in (0, 1))
        weights = tuple(float(stream.weight) for stream in self.streams.values())
        return Loader(
            TreesByStream([trees.get(name) for name in self.streams]),
            batch_sampler=sampler,
            collate_fn=Collating(Collator(tuple(self.streams), weights, tuple(sorted(response)), tuple(sorted(pair)))),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self._seed()),
            pin_memory=torch.cuda.is_available(),
            # Workers that begin anew each epoch would read a streaming source from its start each time.
            persistent_workers=self.num_workers > 0 and any(isinstance(each, StreamingRows) for each in trees.values()),
        )

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED") or 0) if self.seed is None else self.seed

    # ------------------------------------------------------------------ resume

    def _consumed(self) -> int:
        """Global batches that training has consumed, over all epochs; not those that workers have prepared."""
        if self.trainer is not None:
            total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
            return max(self._resumed_at, total.processed)
        return max(self._resumed_at, 0 if self._sampler is None else self._sampler.yielded)

    def _geometry(self) -> dict[str, Any]:
        """What must not change for the order of batches to go on as it was."""
        _, world = rank_and_world(self.trainer)
        trees = self._trees.get("train", {})
        quotas = {name: stream.batch_size for name, stream in self.streams.items()}
        return {
            "seed": self._seed(),
            "world": world,
            "rows": {name: None if isinstance(rows, StreamingRows) else len(rows) for name, rows in trees.items()},
            "content": {name: rows.key for name, rows in trees.items()},
            "batch_size": quotas,
            "driver": self.driver,
            "batching": repr(self.batching),
        }

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

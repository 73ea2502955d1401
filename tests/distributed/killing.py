"""What the processes that are killed run: a callback that notes batches, and preparation that can be held."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from lightning.pytorch import Callback

from bfpo_pl.data import token_store
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.data.microworld_sources import MicroworldSafety
from bfpo_pl.data.schemas import PKUSafeRLHF
from bfpo_pl.data.streams import Stream
from bfpo_pl.data.truncation import Truncation
from bfpo_pl.microworld import build_tokenizer

PATIENCE = 200
"""Seconds after which a process that is held ends by itself."""
SHARD_ROWS, ROWS = 64, 300


class BatchRecord(Callback):
    """Notes the rows of every batch, and a digest of its tensors, once it has been trained on.

    Args:
        folder: Where to; one file for each process.
        hold_after: Batches after which this process stands still, to be killed; 0 for never.
    """

    def __init__(self, folder: str, hold_after: int = 0) -> None:
        self.folder, self.hold_after, self.seen = Path(folder), hold_after, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        digest = hashlib.blake2b(digest_size=8)
        tables = {**batch.annotations.response, **batch.annotations.pair}
        for tensor in (
            *(batch.tokens, batch.positions, batch.segment_start, batch.segment_length, batch.response_stream),
            *(batch.pairs, *(tables[name] for name in sorted(tables))),
        ):
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        with (self.folder / f"batches-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([*batch.origins, digest.hexdigest()]) + "\n")
        self.seen += 1
        if self.seen == self.hold_after:
            signal.alarm(PATIENCE)
            signal.pause()


def prepare(
    cache: str, notes: str, hold: str = "", processes: int = 1, max_length: int = 1024, word: str | None = None
) -> None:
    """Tokenises rows in shards of 64, and notes what was written and what came of it.

    Args:
        cache: Folder of prepared data.
        notes: Folder for ``written`` (a line for each shard), ``asking-PID`` (before the lock is asked for) and
            ``result-PID``.
        hold: Name of a shard to stand still at, when it is written but does not have its name yet, until there is a
            file ``go`` in the notes.
        processes: Processes that tokenise.
        max_length: The truncation.
        word: A word that the tokenizer knows besides its own.
    """
    folder = Path(notes)
    _watch(folder, hold)
    stream = Stream(MicroworldSafety(ROWS, 0), PKUSafeRLHF(), 4)
    truncation = Truncation(max_length, max_length // 2)
    data = AlignmentData({"safety": stream}, truncation=truncation, cache=cache, tokenizing_processes=processes)
    data.tokenizer = build_tokenizer()
    if word:
        data.tokenizer.add_tokens([word])
    data.setup("fit")
    digest = hashlib.blake2b(digest_size=8)
    for batch in data.train_dataloader():
        digest.update(str(batch.origins).encode() + batch.tokens.numpy().tobytes())
    (folder / f"result-{os.getpid()}").write_text(digest.hexdigest())


def _watch(notes: Path, hold: str) -> None:
    """Makes shards small, and this process tell what it does."""
    token_store.SHARD_ROWS, token_store._ROWS_WORTH_PROCESSES = SHARD_ROWS, 2 * SHARD_ROWS
    write_shard, sole_builder, fsync = token_store.write_shard, token_store.sole_builder, os.fsync

    def held(file: int) -> None:
        fsync(file)
        deadline = time.monotonic() + PATIENCE
        while not (notes / "go").exists():
            if time.monotonic() > deadline:
                os._exit(1)
            time.sleep(0.01)

    def telling(path: Path, batch: pa.RecordBatch) -> None:
        os.fsync = held if path.name == hold else fsync
        write_shard(path, batch)
        with (notes / "written").open("a") as file:
            file.write(f"{os.getpid()} {path.name}\n")

    @contextmanager
    def asking(folder: Path) -> Iterator[None]:
        (notes / f"asking-{os.getpid()}").touch()
        with sole_builder(folder):
            yield

    token_store.write_shard, token_store.sole_builder = telling, asking

"""A reference whose log-probs are computed once, before training, and kept for all runs on the same rows."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from bfpo_pl.batch import PairBatch
from bfpo_pl.component import RunError, UserError, check_range
from bfpo_pl.data.collate import collate
from bfpo_pl.data.packing import Trees
from bfpo_pl.data.progress import telling
from bfpo_pl.data.trees import PairTree
from bfpo_pl.models.log_prob_store import LogProbStore, batch_keys, tree_keys
from bfpo_pl.models.reference import FrozenCopy, Loader, OtherNetwork, RunContext, frozen, has_adapter
from bfpo_pl.models.rotary import length_of_other_angles
from bfpo_pl.models.sources import ModelSource

LOGP_VERSION = 1
"""To be raised whenever log-probs are computed otherwise, so that what was kept before is not read again."""

_AT_ONCE = 1024  # rows that are looked at together
_SECONDS_BETWEEN_PARTS = 30.0  # that are written to disk: what a process that is killed has computed in vain
_ROWS_WORTH_TELLING = 200
_SECONDS_TO_WAIT = 20.0  # for another run, before all processes hear that it still computes
_SAMPLE = 256  # responses whose log-probs a checkpoint keeps
_ROUNDING, _HALF_ROUNDING = 1e-3, 0.2
"""Nats by which log-probs may differ from batch to batch, times the root of the tokens: rounding has no direction."""


class Precomputed(OtherNetwork):
    """Log-probs of a frozen network, computed once and kept beside the tokenised data: no second network in training.

    They are kept by the tokens of prompt and response, the network's weights and the type that it computes in, and by
    nothing else: runs with other learning rates, losses, labelings or seeds find them. `bfpo reference` computes
    them beforehand; a fit computes what is missing. Where the policy has not been trained yet it computes them itself,
    else the reference's network is loaded for that time.

    Args:
        source: Where the network comes from. Default: the policy's own source.
        batch_tokens: Tokens that the network sees at once while it computes them.
        verify: Rows, drawn at random from those that were kept, that are computed again at the start and compared.
        start_tolerance: Largest mean |margin| in nats before the first update, where the reference is the policy's
            start: log-probs differ by rounding with the batch in which they are computed.
    """

    def __init__(
        self,
        source: ModelSource | None = None,
        batch_tokens: int = 16_384,
        verify: int = 8,
        start_tolerance: float = 0.5,
    ) -> None:
        super().__init__(source)
        self.batch_tokens = int(check_range(self, "batch_tokens", batch_tokens, 1))
        self.verify = int(check_range(self, "verify", verify, 0))
        self.start_tolerance = check_range(self, "start_tolerance", start_tolerance, 0.0)
        self.computed = 0
        """Responses whose log-probs this process's run computed, rather than found."""
        self._store: LogProbStore | None = None
        self._column = ""
        self._mean = False
        self._dtype = torch.float32
        self._rounding = _ROUNDING
        self._sample: dict[str, float] = {}
        self._held: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Precomputed(source={self.source!r}, batch_tokens={self.batch_tokens}, verify={self.verify})"

    def prepare(self, policy: PreTrainedModel, source: ModelSource, load: Loader) -> None:
        return None

    def log_probs(self, policy: PreTrainedModel, batch: PairBatch) -> Tensor:
        if self._column not in batch.annotations.response:
            raise RunError("A batch did not pass through Precomputed.annotate, which gives it the log-probs.")
        return batch.annotations.response[self._column]

    def annotate(self, batch: PairBatch) -> PairBatch:
        assert self._store is not None
        known, sums, lengths = self._store.find(batch_keys(batch))
        if not (known.all() and (lengths == batch.response_lengths.numpy()).all()):
            raise RunError(
                f"The log-probs of the reference were not computed for a row of this batch: {', '.join(batch.origins)}."
            )
        values = torch.from_numpy(sums / lengths if self._mean else sums).to(self._dtype)
        response = {**batch.annotations.response, self._column: values}
        return dataclasses.replace(batch, annotations=dataclasses.replace(batch.annotations, response=response))

    # ------------------------------------------------------------------ before training

    def fill(self, name: str, context: Callable[[], RunContext]) -> None:
        run = context()
        self._column, self._mean = f"{name}_log_prob", run.reduction == "mean"
        self._dtype = torch.promote_types(run.policy.dtype, torch.float32)
        half = "16" in f"{run.policy.dtype} {run.precision}" or torch.get_float32_matmul_precision() != "highest"
        self._rounding = _HALF_ROUNDING if half else _ROUNDING
        folder = run.cache / "reference" / run.strategy.broadcast(self._key(run) if run.rank == 0 else "")
        rows = _Rows(run.rows)
        self._check_lengths(rows, run)
        began = time.perf_counter()
        with _sole(folder, run):
            self._store = LogProbStore(folder)
            lacking = self._missing(rows, run)
            missing, verified = np.flatnonzero(lacking), self._some_of(np.flatnonzero(~lacking), run)
            if len(missing) or len(verified):
                with self._network(run) as network:
                    self._verify(rows, verified, network, run)
                    self._compute(rows, missing, network, run, f"log-probs of {name}")
        self.computed = int(rows.counts[missing].sum())
        count = len(rows.keys)
        chosen = np.unique(rows.keys[np.linspace(0, count, min(count, _SAMPLE), endpoint=False).astype(np.int64)])
        self._sample = dict(zip(map(str, chosen.tolist()), self._store.find(chosen)[1].tolist(), strict=True))
        self._check_held()
        rank_zero_info(
            f"Reference '{name}': log-probs of {len(rows.keys) - self.computed:,} responses found and of "
            f"{self.computed:,} computed in {time.perf_counter() - began:.0f} s ({folder})."
        )

    def _check_lengths(self, rows: _Rows, run: RunContext) -> None:
        """Refuses rows whose log-probs would depend on the batch in which they are computed.

        Raises:
            UserError: There are such rows.
        """
        limit = length_of_other_angles(run.policy.config)
        if limit is not None and rows.longest > limit:
            raise UserError(
                f"Precomputed: in batches with a row of more than {limit} tokens {type(run.policy).__name__} turns "
                f"all tokens by other angles (rotary embeddings of type longrope or dynamic), and the longest row has "
                f"{rows.longest}: log-probs that were computed in other batches would be wrong. Set model.reference "
                f"to FrozenCopy, AdapterOff or SharedWeights, or data.truncation.max_length to {limit}."
            )

    def state(self) -> dict[str, Any]:
        return {} if self._store is None else {"store": self._store.folder.name, "log_probs": self._sample}

    def check_state(self, state: dict[str, Any]) -> None:
        self._held = state
        self._check_held()  # sharded strategies restore a checkpoint after `fill`, others before

    def _check_held(self) -> None:
        """Compares what is kept with what the checkpoint's run trained with, if its reference was the same.

        Raises:
            RunError: They differ by more than rounding.
        """
        if self._store is None or self._held.get("store") != self._store.folder.name:
            return
        keys = np.array([int(key) for key in self._held["log_probs"]], dtype=np.uint64)
        known, kept, lengths = self._store.find(keys)
        trained = np.array(list(self._held["log_probs"].values()))
        self._check_equal(kept[known], trained[known], lengths[known], "in the checkpoint's run")

    def _check_equal(self, kept: np.ndarray, other: np.ndarray, lengths: np.ndarray, where: str) -> None:
        """Compares kept log-probs ``[N]`` of responses of some lengths ``[N]`` with others of the same responses.

        Raises:
            RunError: One of them, or all together, differ by more than rounding.
        """
        assert self._store is not None
        difference = np.abs(other - kept) / np.sqrt(lengths)
        together = abs((other - kept).sum()) / np.sqrt(max(1, lengths.sum()))
        if max(together, difference.max(initial=0.0)) <= self._rounding:
            return
        worst = int(np.argmax(difference))
        raise RunError(
            f"The log-probs in {self._store.folder} are not those of this reference: a response of {lengths[worst]} "
            f"tokens has {kept[worst]:.6g} there and {other[worst]:.6g} {where}, and on average {len(kept)} responses "
            f"differ by {(other - kept).mean():.3g} nats. Remove that folder; they are then computed again."
        )

    def _key(self, run: RunContext) -> str:
        """What decides the log-probs besides the tokens, as the name of a folder."""
        weights = (self.source or run.source).weights_digest(run.cache / "weights")
        return f"{weights}-{run.precision}-v{LOGP_VERSION}".replace(" ", "-")

    def _missing(self, rows: _Rows, run: RunContext) -> np.ndarray:
        """``[rows]``, whether any process lacks a response of a row: their disks may differ."""
        assert self._store is not None
        known = self._store.find(rows.keys)[0]
        lacking = np.add.reduceat(~known, rows.first).astype(np.int64) if len(rows) else np.zeros(0, dtype=np.int64)
        return run.total(lacking) > 0

    @staticmethod
    def _policy_has_it(run: RunContext) -> bool:
        """Whether the policy still has the weights of its source: it is untrained, or an adapter is what trains."""
        return run.policy_is_start or has_adapter(run.policy)

    def _some_of(self, kept: np.ndarray, run: RunContext) -> np.ndarray:
        """Rows to compute again, of those that are kept."""
        if self.source is None and not self._policy_has_it(run):
            return np.zeros(0, dtype=np.int64)  # a run that goes on: when it began they were verified
        drawn = np.random.default_rng().choice(kept, min(self.verify, len(kept)), replace=False)
        return np.array(run.strategy.broadcast(np.sort(drawn).tolist()), dtype=np.int64)

    @contextmanager
    def _network(self, run: RunContext) -> Iterator[Callable[[PairBatch], Tensor]]:
        """What gives log-probs under the reference, summed over tokens."""
        if self.source is None and self._policy_has_it(run):
            with frozen(run.policy):
                yield run.log_probs
            return
        copy = FrozenCopy(self.source)
        copy.prepare(run.policy, run.source, run.load)
        copy.to(run.strategy.root_device, run.policy.dtype)
        network: Any = copy.network
        del copy
        yield partial(network.response_log_probs, reduction="sum")
        del network
        gc.collect()
        if run.strategy.root_device.type == "cuda":
            torch.cuda.empty_cache()

    def _compute(
        self, rows: _Rows, missing: np.ndarray, network: Callable[[PairBatch], Tensor], run: RunContext, label: str
    ) -> None:
        assert self._store is not None
        # Every machine keeps them, for they may share no disk; where they do, all write the same file.
        writes = int(getattr(run.strategy, "local_rank", 0)) == 0
        batches = rows.batches(missing, self.batch_tokens)
        _, world = run.shares
        turns = [batches[start : start + world] for start in range(0, len(batches), world)]
        written = time.monotonic()
        try:
            with telling(label, len(missing), _ROWS_WORTH_TELLING) as advance:
                for turn in turns:
                    self._store.add(*self._values(rows, turn, network, run))
                    advance(sum(map(len, turn)))
                    if run.strategy.broadcast(time.monotonic() - written >= _SECONDS_BETWEEN_PARTS):
                        if writes:
                            self._store.write()
                        written = time.monotonic()
        finally:  # at the end, and where the run is interrupted
            if writes:
                self._store.write()

    @staticmethod
    @torch.no_grad()
    def _values(
        rows: _Rows, batches: Sequence[np.ndarray], network: Callable[[PairBatch], Tensor], run: RunContext
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, log-probs and lengths of the responses of batches that processes share out, the same on all."""
        trees = [rows.trees(batch) for batch in batches]
        keys = [tree_keys(some) for some in trees]
        lengths = np.array([len(ids) for some in trees for tree in some for ids in tree.response_ids], dtype=np.int64)
        ends = np.cumsum([len(some) for some in keys])
        sums = np.zeros(len(lengths))
        rank, world = run.shares
        for turn in range(-(-len(batches) // world)):
            # A process whose turn has no batch takes part all the same, for sharded layers wait for it.
            number = turn * world + rank
            some = trees[number] if number < len(trees) else []
            batch = collate([(0, tree) for tree in some], ["reference"], [1.0], (), ()).to(run.strategy.root_device)
            with run.strategy.precision_plugin.forward_context():
                values = network(batch)
            if some:
                sums[ends[number] - len(keys[number]) : ends[number]] = values.double().cpu().numpy()
        if not np.isfinite(sums).all():
            raise RunError("The reference gives a log-prob that is not finite: are its weights whole?")
        return np.concatenate(keys), run.total(sums), lengths

    def _verify(self, rows: _Rows, chosen: np.ndarray, network: Callable[[PairBatch], Tensor], run: RunContext) -> None:
        """Computes rows again and compares.

        Raises:
            RunError: They differ by more than rounding.
        """
        if not len(chosen):
            return
        assert self._store is not None
        keys, again, lengths = self._values(rows, rows.batches(chosen, self.batch_tokens), network, run)
        kept = self._store.find(keys)[1]
        self._check_equal(kept, again, lengths, "now")
        rank_zero_info(
            f"Verified {len(chosen)} rows of kept log-probs: they differ by at most {np.abs(again - kept).max():.2g}."
        )


class _Rows:
    """All rows of all streams and splits, numbered through, with the keys of their responses."""

    def __init__(self, by_stream: Mapping[tuple[str, str], Trees]) -> None:
        self._trees = list(by_stream.values())
        self._ends = np.cumsum([0, *map(len, self._trees)])
        keys, counts = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.int64)]
        self.longest = 0
        """Tokens of the longest prompt and response together."""
        for trees in self._trees:
            for start in range(0, len(trees), _AT_ONCE):
                some = trees.at(range(start, min(start + _AT_ONCE, len(trees))))
                keys.append(tree_keys(some))
                counts.append(np.array([len(tree.response_ids) for tree in some], dtype=np.int64))
                whole = (len(tree.prompt_ids) + len(ids) for tree in some for ids in tree.response_ids)
                self.longest = max(self.longest, *whole)
        self.keys: np.ndarray = np.concatenate(keys)
        """``[R]``, of all rows, one row's after the other's."""
        self.counts: np.ndarray = np.concatenate(counts)
        """``[rows]``, responses of each."""
        self.first: np.ndarray = np.cumsum(self.counts) - self.counts
        """``[rows]``, the first of each row's."""

    def __len__(self) -> int:
        return len(self.counts)

    def trees(self, numbers: np.ndarray) -> list[PairTree]:
        """The pair trees of some rows."""
        owners = np.searchsorted(self._ends, numbers, side="right") - 1
        places = numbers - self._ends[owners]
        return [
            self._trees[owner].at([place])[0] for owner, place in zip(owners.tolist(), places.tolist(), strict=True)
        ]

    def batches(self, numbers: np.ndarray, tokens: int) -> list[np.ndarray]:
        """Rows in batches of at most so many tokens, or of one row; the longest first, so that memory fails early."""
        if not len(numbers):
            return []
        lengths = np.concatenate([trees.lengths for trees in self._trees])[numbers]
        order = np.argsort(-lengths, kind="stable")
        batches: list[list[int]] = [[]]
        held = 0
        for place in order.tolist():
            if batches[-1] and held + lengths[place] > tokens:
                batches.append([])
                held = 0
            batches[-1].append(int(numbers[place]))
            held += int(lengths[place])
        return [np.array(batch, dtype=np.int64) for batch in batches]


@contextmanager
def _sole(folder: Path, run: RunContext) -> Iterator[None]:
    """Lets one run of all that share the disk compute; the others wait, and find what it has computed."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    told = False
    while not run.strategy.broadcast(run.rank != 0 or _acquired(lock)):
        if not told:
            rank_zero_info(f"Another run computes log-probs of this reference; waiting for it ({lock.lock_file}).")
            told = True
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock) -> bool:
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_SECONDS_TO_WAIT)
    except Timeout:
        return False
    except OSError as error:
        raise UserError(
            f"{lock.lock_file} cannot be written: {error.strerror}. Set data.cache to another folder."
        ) from error
    return True

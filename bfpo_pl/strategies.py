"""Strategies of our own: how a run is spread over processes."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy

from bfpo_pl.sharded_reading import plain_sharded_reads


class FSDP2(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with every process data-parallel, whatever their number.

    Lightning's own defaults make all devices of a machine tensor-parallel, so that they would see the same rows; and
    it has no value for "all of them".

    Args:
        save_distributed_checkpoint: Each process saves its shard into a folder; otherwise the whole checkpoint is
            gathered and saved to one file.
        process_group_backend: Backend of torch.distributed. Default: nccl on GPUs, gloo on CPUs.
        timeout_minutes: Time after which a process that waits for the others gives up.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        with warnings.catch_warnings():
            # last.ckpt is meant to be overwritten
            warnings.filterwarnings("ignore", "Detected an existing checkpoint")
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        with plain_sharded_reads():
            return super().load_checkpoint(checkpoint_path, weights_only=True)  # Lightning drops it on resume

"""Strategies of our own: how a run is spread over processes."""

from __future__ import annotations

from datetime import timedelta

from bfpo_pl.checkpoints.sharded import AtomicSharded


class FSDP2(AtomicSharded):
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

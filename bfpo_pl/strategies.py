"""Strategies of our own: how a run is spread over processes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, distributed
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecision, OffloadPolicy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from bfpo_pl.checkpoints.sharded import AtomicSharded
from bfpo_pl.component import UserError
from bfpo_pl.models.sharding import transformer_blocks


class FSDP2(AtomicSharded):
    """Lightning's `ModelParallelStrategy`: weights are sharded over all processes, whatever their number.

    Lightning's own defaults make all devices of a machine tensor-parallel, so that they would see the same rows; and
    it has no value for "all of them".

    Args:
        tensor_parallel_size: Processes that compute the same rows together, each with a part of every attention and
            MLP; neighbours, so that they share a machine. 1: every process has rows of its own.
        save_distributed_checkpoint: Each process saves its shard into a folder; otherwise the whole checkpoint is
            gathered and saved to one file.
        cpu_offload: Keeps shards of weights, gradients and optimizer states in the host's memory; a block's weights are
            on the device while it computes. The optimizer's step runs on the CPU.
        process_group_backend: Backend of torch.distributed. Default: nccl on GPUs, gloo on CPUs; with offload both.
        timeout_minutes: Time after which a process that waits for the others gives up.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        if tensor_parallel_size < 1:
            raise UserError(f"FSDP2: tensor_parallel_size is {tensor_parallel_size}; it must be 1 or more.")
        if tensor_parallel_size > 1 and cpu_offload:
            raise UserError("FSDP2: cpu_offload does not go with tensor_parallel_size above 1; leave out one of them.")
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.tensor_parallel_size = tensor_parallel_size
        self.cpu_offload = cpu_offload

    @property
    def offload_policy(self) -> OffloadPolicy:
        """What FSDP2 keeps on the CPU."""
        pinned = self.root_device.type == "cuda"
        return CPUOffloadPolicy(pin_memory=pinned) if self.cpu_offload else OffloadPolicy()

    @property
    def shard_device(self) -> torch.device:
        """Where each process keeps its shards."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    def check_processes(self, count: int) -> None:
        """Fails if so many processes cannot be put in groups.

        Raises:
            UserError: They cannot.
        """
        if count % self.tensor_parallel_size:
            raise UserError(
                f"FSDP2: tensor_parallel_size {self.tensor_parallel_size} does not divide the number of processes, "
                f"trainer.devices × trainer.num_nodes = {count}. Change one of them."
            )

    def setup_environment(self) -> None:
        processes = self.num_nodes * self.num_processes
        self.check_processes(processes)
        self._data_parallel_size = processes // self.tensor_parallel_size
        super().setup_environment()

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        # Norms of gradients that lie on the CPU are summed over processes there.
        return "cpu:gloo,cuda:nccl" if self.cpu_offload and backend == "nccl" else backend

    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        module = self.lightning_module
        assert module is not None
        for child in module.children():
            if not isinstance(child, FSDPModule):  # whose buffers are on the device already
                child.to(self.root_device)
        module._device = self.root_device


class FSDP1(FSDPStrategy):
    """Lightning's `FSDPStrategy` (the older FSDP) with a unit for each transformer block; for clusters that need it.

    It runs on GPUs only and loads the whole model in every process. It shards what trains and nothing else, so that a
    second network would be whole on every GPU: the reference is an adapter switched off, or was computed beforehand.
    `FSDP2` has none of these limits.

    Args:
        sharding_strategy: What is sharded: FULL_SHARD weights, gradients and optimizer states; SHARD_GRAD_OP gradients
            and optimizer states; HYBRID_SHARD all of them within a machine, replicated over machines.
        state_dict_type: full gathers a checkpoint into one file, sharded saves a folder with a file of each process.
        cpu_offload: Keeps shards in the host's memory.
        timeout_minutes: Time after which a process that waits for the others gives up.
    """

    def __init__(
        self,
        sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"] = "FULL_SHARD",
        state_dict_type: Literal["full", "sharded"] = "full",
        cpu_offload: bool = False,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            sharding_strategy=sharding_strategy,
            state_dict_type=state_dict_type,
            cpu_offload=cpu_offload,
            timeout=timedelta(minutes=timeout_minutes),
        )

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """Lightning's, with gradients reduced in float32 and buffers left alone: rotary frequencies must not round."""
        config = super().mixed_precision_config
        if config is None:
            return None
        return MixedPrecision(param_dtype=config.param_dtype, reduce_dtype=torch.float32, buffer_dtype=None)

    def setup(self, trainer: Trainer) -> None:
        policy = getattr(self.lightning_module, "policy", None)
        if policy is not None:
            self.kwargs["auto_wrap_policy"] = ModuleWrapPolicy({type(block) for block in transformer_blocks(policy)})
        super().setup(trainer)

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the module outside a step, with weights gathered as in one."""
        module = self.lightning_module
        return self._forward_redirection(self.model, module, method, *arguments)  # type: ignore[arg-type]

    def norm_over_shards(self, norm: Tensor) -> Tensor:
        """The norm of gradients of which each process has a shard, from that of its own shard."""
        squared = norm.to(self.root_device).square()
        distributed.all_reduce(squared, group=self.model.process_group)  # type: ignore[union-attr]
        return squared.sqrt()

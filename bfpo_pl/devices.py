"""Checks, before anything starts, that a machine has the devices that a run asks for and its strategy takes them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from bfpo_pl.component import UserError
from bfpo_pl.strategies import FSDP2


def check_devices(accelerator: Any, devices: Any, num_nodes: int, strategy: Any) -> None:
    """Compares what a trainer is to use with what there is.

    Args:
        accelerator: The trainer's ``accelerator``: a name, or an object, which is not looked at.
        devices: Its ``devices``: a number, ``auto`` or -1, or a list of indices, also as text.
        num_nodes: Its number of machines.
        strategy: Its strategy, as a name or an object.

    Raises:
        UserError: Something is missing; the message says what to set.
    """
    if not isinstance(accelerator, str):
        return
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and there > 0)
    if accelerator in ("gpu", "cuda") and not there and not (mps and accelerator == "gpu"):
        raise UserError(
            f"trainer.accelerator is {accelerator}, but torch {torch.__version__} finds no GPU on this machine"
            f"{_why_no_gpu()} To run on the CPU: --trainer.accelerator=cpu."
        )
    if isinstance(strategy, FSDPStrategy) or (isinstance(strategy, str) and strategy.startswith("fsdp")):
        if not on_gpu:
            raise UserError(
                "FSDP1 (FSDPStrategy) runs on GPUs only, and this run has none. On a CPU, and on GPUs as well: "
                "`-c configs/strategy/fsdp2.yaml`."
            )
        if isinstance(strategy, str):
            raise UserError(
                f"trainer.strategy: '{strategy}' would shard the model in one piece. Name `-c configs/strategy/fsdp1."
                f"yaml`, with a unit for each transformer block, or better `-c configs/strategy/fsdp2.yaml`."
            )
    count, indices = _asked_for(devices, there if on_gpu else 1)
    if on_gpu and there and (count > there or max(indices, default=0) >= there):
        which = f"the GPUs {indices}" if indices else f"{count} GPUs"
        raise UserError(
            f"trainer.devices asks for {which}, and this machine has {there} (numbered from 0). Set --trainer.devices="
            f"{there} or fewer; for GPUs of other machines --trainer.num_nodes, with as many devices on each."
        )
    if not on_gpu and indices:
        raise UserError(
            f"trainer.devices names devices by number ({indices}), which GPUs have; on the CPU it is a number of "
            f"processes, such as --trainer.devices={len(indices)}."
        )
    if type(strategy) is ModelParallelStrategy:
        _check_sizes(strategy, count * num_nodes)
    if isinstance(strategy, FSDP2):
        strategy.check_processes(count * num_nodes)


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return ": it is a build without CUDA. Install one with it (see the Makefile's TORCH_INDEX_URL)."
    return " (does `nvidia-smi` show one? does CUDA_VISIBLE_DEVICES hide it?)."


def _asked_for(devices: Any, available: int) -> tuple[int, list[int]]:
    """The number of devices of a machine, and their indices where they are named by them."""
    if isinstance(devices, str):
        text = devices.strip()
        if "," in text:
            devices = [int(part) for part in text.split(",") if part.strip().isdigit()]
        elif text.lstrip("-").isdigit():
            devices = int(text)
    if isinstance(devices, list | tuple):
        return len(devices), [index for index in devices if isinstance(index, int)]
    if isinstance(devices, int) and devices != -1:
        return devices, []
    return max(available, 1), []  # auto


def _check_sizes(strategy: ModelParallelStrategy, world: int) -> None:
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    if "auto" in (data, tensor):
        raise UserError(
            "ModelParallelStrategy: set data_parallel_size and tensor_parallel_size. Its own choice, all devices of a "
            "machine tensor-parallel, shows them all the same rows. `-c configs/strategy/fsdp2.yaml` sets both."
        )
    if tensor != 1:
        raise UserError(
            f"ModelParallelStrategy: tensor_parallel_size is {tensor}, but bfpo_pl shards over data-parallel processes "
            f"only. Set it to 1, or use `-c configs/strategy/fsdp2_tp.yaml`."
        )
    if data * tensor != world:
        raise UserError(
            f"ModelParallelStrategy: data_parallel_size {data} × tensor_parallel_size {tensor} is {data * tensor}, but "
            f"trainer.devices × trainer.num_nodes is {world}. They must be equal; `-c configs/strategy/fsdp2.yaml` "
            f"takes whatever number there is."
        )

"""The machine: its name, its memory, and how fast it multiplies matrices."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

HEAP_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
"""For timing: freed memory stays with the process, so that no variant pays for fresh pages."""
HEAP_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}
"""For memory: what is freed goes back to the system, so that the peak is that of live tensors."""


def describe() -> dict[str, Any]:
    """Model of the processor (and GPUs), cores, and the instruction sets that matter."""
    fields: dict[str, str] = {}
    with open("/proc/cpuinfo") as file:
        for line in file:
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", "")
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": fields.get("model name") or platform.processor(),
        "cpu_family": fields.get("cpu family"),  # clouds hide the name, not the numbers
        "cpu_model": fields.get("model"),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": [name for name in wanted if name in flags.split()],
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "load": os.getloadavg(),
    }


def bf16_is_native() -> bool:
    """Whether the processor multiplies bfloat16 matrices faster than by converting each element."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported and supported())


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: str) -> float:
    """How long a call takes, the device's work included."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def gemm_rates(shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """GFLOP/s of matrix products ``[n, k] × [k, m]`` and of both products of their backward pass; the peak of all."""
    rates: dict[str, Any] = {}
    for n, k, m in shapes:
        states = torch.randn(n, k, device=device, dtype=dtype)
        weight = torch.randn(m, k, device=device, dtype=dtype)
        gradient = torch.randn(n, m, device=device, dtype=dtype)
        products = {
            "forward": lambda a=states, b=weight: a @ b.T,
            "by_states": lambda a=gradient, b=weight: a @ b,
            "by_weight": lambda a=gradient, b=states: a.T @ b,
        }
        for name, product in products.items():
            product()
            took = [seconds(product, device) for _ in range(repeats)]
            work = 2e-9 * n * k * m
            rates[f"{n}x{k}x{m} {name}"] = {"best": work / min(took), "median": work / median(took)}
    rates["peak"] = max(rate["best"] for rate in rates.values())
    return rates


def rest() -> None:
    """Gives free memory back to the system."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)


def _status_mb(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def resident_mb(device: str) -> float:
    """What is allocated now, in MB."""
    return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else _status_mb("VmRSS")


def peak_above_rest_mb(function: Callable[[], Any], device: str) -> float:
    """How far memory rises, at its highest, above where it is before a call, in MB."""
    rest()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    before = _status_mb("VmRSS")
    function()
    return _status_mb("VmHWM") - before

"""Kinds of devices: how much memory they have and how fast they multiply matrices."""

from __future__ import annotations

import os
from dataclasses import dataclass

from bfpo_pl.component import UserError

GIB = 2**30
TERA = 1e12


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device.

    Args:
        name: As it is asked for.
        memory: Bytes that it has.
        half_rate: Matrix products in bfloat16 with float32 sums, in operations a second, dense; None if not known.
        full_rate: The same in float32, without TensorFloat-32 (PyTorch's default).
        constant: Bytes that a process holds there before any tensor: the driver's context, the libraries' workspaces.
        type: ``cuda`` or ``cpu``.
        source: Where the figures are from.
    """

    name: str
    memory: float
    half_rate: float | None
    full_rate: float | None
    constant: float
    type: str
    source: str


def _gpu(name: str, memory: float, half: float, full: float, source: str) -> DeviceKind:
    return DeviceKind(name, memory * GIB, half * TERA, full * TERA, CUDA_CONSTANT, "cuda", source)


CUDA_CONSTANT = 1.0 * GIB
"""CUDA context with its kernels, and cuBLAS's workspaces; assumed, not measured here."""
NCCL_CONSTANT = 1.0 * GIB
"""NCCL's buffers where several devices take part; assumed, not measured here."""
CPU_CONSTANT = 75 * 2**20
"""What a fit on a CPU holds besides tensors, over what it holds after its imports: modules that load late, the trainer,
loggers, threads. Measured: `benchmarks/estimate_cpu.py`, a fit of a model of almost no size."""

# Memory is what the driver leaves of the nominal size. Rates are dense, of NVIDIA's data sheets (bfloat16 with float32
# sums; half of what they print with sparsity).
_KINDS = [
    _gpu("b200", 178.0, 2250.0, 80.0, "NVIDIA DGX B200 data sheet (per GPU)"),
    _gpu("h200", 139.8, 989.4, 66.9, "NVIDIA H200 data sheet (SXM)"),
    _gpu("h100", 79.1, 989.4, 66.9, "NVIDIA H100 data sheet (SXM, 80 GB)"),
    _gpu("h100-pcie", 79.1, 756.0, 51.2, "NVIDIA H100 data sheet (PCIe, 80 GB)"),
    _gpu("a100-80", 79.1, 312.0, 19.5, "NVIDIA A100 data sheet (80 GB)"),
    _gpu("a100-40", 39.4, 312.0, 19.5, "NVIDIA A100 data sheet (40 GB)"),
    _gpu("l40s", 44.4, 362.0, 91.6, "NVIDIA L40S data sheet (48 GB, of which ECC takes some)"),
    _gpu("a6000", 47.4, 154.8, 38.7, "NVIDIA RTX A6000 data sheet (48 GB)"),
    _gpu("l4", 22.5, 121.0, 30.3, "NVIDIA L4 data sheet (24 GB, of which ECC takes some)"),
    _gpu("rtx4090", 23.5, 165.2, 82.6, "NVIDIA Ada GPU architecture paper (24 GB)"),
    _gpu("rtx3090", 23.5, 71.0, 35.6, "NVIDIA Ampere GA102 architecture paper (24 GB)"),
]


def _cpu() -> DeviceKind:
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return DeviceKind("cpu", memory, None, None, CPU_CONSTANT, "cpu", "this machine's memory; its rate is not known")


def device_names() -> list[str]:
    """The kinds that there are."""
    return [*(kind.name for kind in _KINDS), "cpu"]


def device_kind(name: str) -> DeviceKind:
    """A kind of device by its name.

    Args:
        name: Such as ``h100``; upper or lower case.

    Raises:
        UserError: There is no such kind; the message lists them.
    """
    wanted = name.lower()
    if wanted == "cpu":
        return _cpu()
    for kind in _KINDS:
        if kind.name == wanted:
            return kind
    raise UserError(f"bfpo estimate: --device knows {', '.join(device_names())}, not '{name}'.")

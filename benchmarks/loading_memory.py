"""Measures the host memory that loading a network takes on several processes, in shards and whole.

    python benchmarks/loading_memory.py

A Llama of 322 million parameters (random weights, several safetensors files, in float32 and in bfloat16) is loaded into
float32 parameters that FSDP2 shards over gloo processes. What is measured is each process's private memory (RssAnon in
/proc/PID/status, read every 2 ms by the process that started them): its growth over the value before loading, at the
peak and when loading is done, summed over processes, as a multiple of one float32 copy of the weights. Everything is
imported before; a tiny network is loaded first. Every figure is of fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from speed.machine import describe
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from bfpo_pl.models.attention import Unfold
from bfpo_pl.models.loading import load_in_shards
from bfpo_pl.models.log_probs import METHODS, bind_log_probs
from bfpo_pl.models.sharding import shard
from bfpo_pl.models.sources import HFModel
from bfpo_pl.models.trainable import Everything

RESULTS = Path(__file__).parent / "results"
SHAPE = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20}
TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
PROCESSES = 2
FILE_SIZE = "300MB"


def write_model(folder: Path, dtype: torch.dtype, shape: dict[str, int] = SHAPE) -> int:
    """Writes a network of random weights, and returns its number of parameters."""
    config = LlamaConfig(**shape, num_attention_heads=16, num_key_value_heads=16)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=FILE_SIZE)
    return sum(parameter.numel() for parameter in model.parameters())


# ---- a process that loads -----------------------------------------------------------------------------------------


def load(folder: Path, route: str) -> None:
    """Loads a network over the processes of the environment, between two lines on stdout; waits for one on stdin."""
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("data_parallel",))

    def place(network: Any) -> None:
        bind_log_probs(network, Unfold())
        shard(network, mesh, METHODS)

    def network_of(path: Path) -> Any:
        source, part = HFModel(str(path)), Everything()
        if route == "shards":
            return load_in_shards(source, part.apply, place, torch.device("cpu"))
        network = source.load_model()
        part.apply(network)
        place(network)
        return network

    network_of(folder.parent / "tiny")
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    network = network_of(folder)
    took = time.perf_counter() - began
    touched = sum(local(parameter).sum().item() for parameter in network.parameters())  # every page is there
    print(json.dumps({"seconds": took, "sum": touched}), flush=True)
    sys.stdin.readline()


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter."""
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()


# ---- the process that measures ------------------------------------------------------------------------------------


def anonymous_mb(pid: int) -> float:
    """Private memory of a process, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"Process {pid} has ended.")


def measure(folder: Path, route: str, processes: int = PROCESSES) -> dict[str, Any]:
    """Growth of private memory while processes load a network.

    Args:
        folder: The network; one called ``tiny`` lies beside it.
        route: ``shards`` or ``whole``.
        processes: How many.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, __file__, "--load", str(folder), route]
    running = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    try:
        for process in running:
            _next_line(process, "ready")
        before = [anonymous_mb(process.pid) for process in running]
        for process in running:
            _answer(process)
        peaks = list(before)
        while any(not _has_output(process) for process in running):
            peaks = [max(peak, anonymous_mb(process.pid)) for peak, process in zip(peaks, running, strict=True)]
            time.sleep(0.002)
        said = [json.loads(process.stdout.readline()) for process in running]  # type: ignore[union-attr]
        after = [anonymous_mb(process.pid) for process in running]
        peaks = [max(peak, now) for peak, now in zip(peaks, after, strict=True)]
        for process in running:
            _answer(process)
        assert all(process.wait(60) == 0 for process in running)
    finally:
        for process in running:
            process.kill()
    return {
        "before_mb": before,
        "peak_growth_mb": [peak - start for peak, start in zip(peaks, before, strict=True)],
        "final_growth_mb": [end - start for end, start in zip(after, before, strict=True)],
        "seconds": [line["seconds"] for line in said],
        "sum": sum(line["sum"] for line in said),
    }


def _next_line(process: subprocess.Popen[str], wanted: str) -> None:
    line = process.stdout.readline().strip()  # type: ignore[union-attr]
    if line != wanted:
        raise RuntimeError(f"A process said {line!r} where it should say {wanted!r}.")


def _answer(process: subprocess.Popen[str]) -> None:
    process.stdin.write("\n")  # type: ignore[union-attr]
    process.stdin.flush()  # type: ignore[union-attr]


def _has_output(process: subprocess.Popen[str]) -> bool:
    if process.poll() is not None:
        raise RuntimeError("A process ended while it loaded.")
    return bool(select.select([process.stdout], [], [], 0)[0])


def run(folder: Path) -> dict[str, Any]:
    """All measurements, with networks written to a folder."""
    write_model(folder / "tiny", torch.float32, TINY)
    parameters = {name: write_model(folder / name, getattr(torch, name)) for name in ("float32", "bfloat16")}["float32"]
    copy = parameters * 4 / 2**20
    found: dict[str, Any] = {}
    for name in ("float32", "bfloat16"):
        for route in ("shards", "whole"):
            result = measure(folder / name, route)
            result["peak_copies"] = sum(result["peak_growth_mb"]) / copy
            result["final_copies"] = sum(result["final_growth_mb"]) / copy
            found[f"{name} files, {route}"] = result
            print(f"{name} files, {route}: {result['peak_copies']:.2f} copies at the peak, ", end="")
            print(f"{result['final_copies']:.2f} at the end, {max(result['seconds']):.0f} s", flush=True)
    return {"parameters": parameters, "copy_mb": copy, "processes": PROCESSES, "loading": found}


def conditions() -> dict[str, Any]:
    """The machine, the versions and the revision that were measured."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    names = ("torch", "transformers", "safetensors", "lightning")
    return {
        "machine": {**describe(), "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30},
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "revision": revision,
    }


def main() -> None:
    """Measures and writes ``results/loading_memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "ROUTE"), help="used by the program itself")
    parser.add_argument("--output", type=Path, default=RESULTS / "loading_memory.json")
    options = parser.parse_args()
    if options.load:
        load(Path(options.load[0]), options.load[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        results = {**conditions(), **run(Path(folder))}
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

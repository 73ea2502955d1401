"""Attention backends on the CPU: time of a forward and a backward pass at the shapes of preference data.

    python benchmarks/attention_cpu.py --dtypes float32 bfloat16 --rounds 5

Rounds are interleaved: each runs every backend once on the same batch, in another order every time. Writes
results/attention_cpu.json, with wall time and CPU time (of all threads) of every round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else CPU time counts threads that spin

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bfpo_pl.batch import PairBatch
from bfpo_pl.data.collate import collate
from bfpo_pl.data.trees import PairTree
from bfpo_pl.models.attention import AttentionBackend, Padded, Segments, Unfold
from bfpo_pl.models.log_probs import response_log_probs

RESULTS = Path(__file__).parent / "results" / "attention_cpu.json"
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
SHAPES = {  # pairs, prompt tokens from and to, response tokens from and to
    "pku-4": (4, 20, 60, 30, 150),
    "pku-16": (16, 20, 60, 30, 150),
    "ultrafeedback-2": (2, 50, 500, 100, 400),
    "ultrafeedback-4": (4, 50, 500, 100, 400),
    "short-32": (32, 5, 12, 4, 16),
}
BACKENDS: dict[str, type[AttentionBackend]] = {"padded": Padded, "unfold": Unfold, "segments": Segments}


def batch_of(shape: str, seed: int = 0) -> PairBatch:
    """A batch of random pairs of the named shape."""
    count, *(shortest_prompt, longest_prompt, shortest, longest) = SHAPES[shape]
    generator = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [generator.randrange(3, MODEL["vocab_size"]) for _ in range(generator.randint(low, high))]

    trees = [
        PairTree(ids(shortest_prompt, longest_prompt), [ids(shortest, longest) for _ in range(2)], ((0, 1),))
        for _ in range(count)
    ]
    return collate([(0, tree) for tree in trees], ["only"], [1.0])


def step(model: LlamaForCausalLM, backend: AttentionBackend, batch: PairBatch, dtype: torch.dtype) -> None:
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext():
        values = response_log_probs(model, batch, backend)
    chosen, rejected = batch.pairs.T
    ((values[chosen] - values[rejected] - 0.5) ** 2).mean().backward()


def measure(shape: str, dtype: torch.dtype, rounds: int, layers: int, names: list[str]) -> dict:
    """Times of the named backends on one batch."""
    batch = batch_of(shape)
    config = LlamaConfig(**{**MODEL, "num_hidden_layers": layers})  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    backends = {name: BACKENDS[name]().prepare(model) for name in names}
    times: dict[str, dict[str, list[float]]] = {name: {"wall_s": [], "cpu_s": []} for name in backends}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(backends), len(backends)):
            wall, cpu = time.perf_counter(), time.process_time()
            step(model, backends[name], batch, dtype)
            if number:  # the first round warms up
                times[name]["wall_s"].append(round(time.perf_counter() - wall, 4))
                times[name]["cpu_s"].append(round(time.process_time() - cpu, 4))
    summary = {
        name: {
            **{f"{kind}_min": min(values) for kind, values in kinds.items()},
            **{f"{kind}_median": round(statistics.median(values), 4) for kind, values in kinds.items()},
            **kinds,
        }
        for name, kinds in times.items()
    }
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": layers,
        "tokens": len(batch.tokens),
        "response_tokens": batch.response_tokens,
        "padded_cells": len(batch) * batch.max_length,
        "backends": summary,
    }


def cpu_model() -> str:
    """The processor's name and whether it multiplies bfloat16 itself."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line), "")
    native = any(flag in text for flag in ("avx512_bf16", "amx_bf16"))
    return f"{name or platform.processor()}, {'with' if native else 'without'} bfloat16 instructions"


def main() -> None:
    """Measures what is asked for and adds it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"runs": []}
    result |= {"cpu": cpu_model(), "threads": arguments.threads, "torch": torch.__version__, "model": MODEL}
    for dtype in arguments.dtypes:
        for shape in arguments.shapes:
            load = os.getloadavg()[0]
            run = measure(shape, getattr(torch, dtype), arguments.rounds, arguments.layers, arguments.backends)
            run["load_before_and_after"] = [round(load, 1), round(os.getloadavg()[0], 1)]
            result["runs"].append(run)
            for name, values in run["backends"].items():
                print(f"{shape:18}{dtype:10}{name:10}", {k: v for k, v in values.items() if not isinstance(v, list)})
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

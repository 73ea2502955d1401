"""Measures what activation checkpointing costs in time and saves in memory, each variant in clean processes.

    python benchmarks/checkpointing_cpu.py --rounds 3

A Llama of hidden size 512 with 6 layers and 32000 tokens takes BFPO-shaped steps (log-probs of pair trees, a squared
loss, backward) on PKU-like batches: prompts of 20-60 tokens, two responses of 30-150. Rounds are interleaved. Beside
the settings of `activation_checkpointing`, two smaller sets of kept operations are measured. Memory is the peak of a
step above what the process held before it (weights and gradients).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from bfpo_pl.data.collate import collate
from bfpo_pl.data.trees import PairTree
from bfpo_pl.models import checkpointing
from bfpo_pl.models.attention import Auto
from bfpo_pl.models.log_probs import bind_log_probs

RESULTS = Path(__file__).parent / "results"
HIDDEN, LAYERS, VOCABULARY = 512, 6, 32000
VARIANTS = {
    "none": "everything is kept",
    "attention": "keeps attention; not a setting",
    "narrow": "keeps attention and the products that are not wider than the hidden state; not a setting",
    "selective": "keeps attention and all products of linear layers",
    "full": "keeps the input of each block",
}


def cpu_model() -> str:
    """The processor's name, as the system gives it, and the vector sets that matter to bfloat16."""
    text = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(names.get("flags", "").split())
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    family = f"family {names.get('cpu family')} model {names.get('model')}"
    return f"{names.get('model name')}, {family}, {os.cpu_count()} cores, {' '.join(vectors)}"


def network(variant: str) -> LlamaForCausalLM:
    """The model, with a variant's checkpointing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).train()
    if variant in ("attention", "narrow"):
        contexts = partial(create_selective_checkpoint_contexts, partial(smaller, variant))
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    else:
        checkpointing.checkpoint_activations(model, variant)  # type: ignore[arg-type]
    bind_log_probs(model, Auto())
    return model


def smaller(variant: str, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What the smaller sets keep."""
    product = operation in checkpointing._PRODUCTS
    kept = checkpointing._dear(operation) and not product
    if product and variant == "narrow":
        kept = args[-1].shape[1] <= HIDDEN
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def batch_of(pairs: int, seed: int) -> Any:
    """A PKU-like batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    trees = [PairTree(ids(20, 60), [ids(30, 150), ids(30, 150)], ((0, 1),)) for _ in range(pairs)]
    return collate([(0, tree) for tree in trees], ["pku"], [1.0])


def step(model: Any, batch: Any, precision: str) -> None:
    """Log-probs, a squared loss, gradients added to those that are there."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        values = model.response_log_probs(batch)
    margin = values[batch.pairs[:, 0]] - values[batch.pairs[:, 1]]
    ((margin - 50.0) ** 2).mean().backward()


def peak(reset: bool = False) -> float:
    """Peak resident memory of this process in MiB, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(variant: str, pairs: int, precision: str, threads: int, steps: int) -> dict[str, Any]:
    """One process's figures."""
    torch.set_num_threads(threads)
    model = network(variant)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = peak(reset=True)
    memory = 0.0
    wall, processor = [], []
    for number in range(1 + steps):
        batch = batch_of(pairs, number)
        since, used = time.perf_counter(), time.process_time()
        step(model, batch, precision)
        wall.append(time.perf_counter() - since)
        processor.append(time.process_time() - used)
        memory = memory or peak() - before
    if steps:  # the first step warmed up
        del wall[0], processor[0]
    figures = {"memory_mib": memory, "wall_s": wall, "cpu_s": processor}
    if precision == "float32":  # the same in both; the fused head's own recomputation is in all variants
        with FlopCounterMode(display=False) as counter:
            step(model, batch_of(pairs, 0), precision)
        figures["gflop"] = counter.get_total_flops() / 1e9
    return figures


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All variants, round after round, and what they come to."""
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--variant", variant, "--pairs", str(options.pairs)]
            command += ["--precision", options.precision, "--threads", str(options.threads)]
            command += ["--steps", str(options.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(variant, found[variant][-1], flush=True)
    figures = {}
    for variant, rounds in found.items():
        processor = [seconds for one in rounds for seconds in one["cpu_s"]]
        figures[variant] = {
            "what": VARIANTS[variant],
            "cpu_s_min": min(processor),
            "cpu_s_median": statistics.median(processor),
            "wall_s_min": min(seconds for one in rounds for seconds in one["wall_s"]),
            "memory_mib": statistics.median(one["memory_mib"] for one in rounds),
            "gflop": rounds[0].get("gflop"),
            "rounds": rounds,
        }
    plain = figures["none"]
    for figure in figures.values():
        figure["time_over_none"] = figure["cpu_s_min"] / plain["cpu_s_min"]
        figure["memory_over_none"] = figure["memory_mib"] / plain["memory_mib"]
    return {
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "model": {"hidden": HIDDEN, "layers": LAYERS, "vocabulary": VOCABULARY, "parameters": "float32"},
        "batch": {"pairs": options.pairs, "prompt": [20, 60], "responses": [30, 150]},
        "precision": options.precision,
        "threads": options.threads,
        "note": "cpu_s is processor time; the machine was shared, so wall_s is less to be trusted",
        "variants": figures,
    }


def main() -> None:
    """Measures; one file for all precisions, each under its name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps",
        type=int,
        default=2,
        help="timed steps of each process after one to warm up; 0: that one alone is timed",
    )
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", choices=list(VARIANTS))
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.pairs, options.precision, options.threads, options.steps)))
        return
    file = RESULTS / "checkpointing_cpu.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    content[f"{options.precision}, {options.pairs} pairs"] = run(options)
    file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

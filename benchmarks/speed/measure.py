"""Measurements, each a task for a fresh process: what goes in and comes out is plain data."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bfpo_pl.data.trees import PairTree
from speed import machine, variants
from speed.steps import START_LOSS, Setting, Step
from speed.workload import DATA, LENGTHS, REAL, SHAPES, Lengths, Shape, drawn, real, work_of

Options = dict[str, Any]


def quiet() -> None:
    """No chatter of libraries."""
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "trl", "transformers", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()


def setting_of(options: Options) -> Setting:
    """The setting that a task's options describe; ``changes`` replaces sizes of the shape."""
    shape = Shape(**{**vars(SHAPES[options["shape"]]), **options.get("changes", {})})
    optional = {name: options[name] for name in ("checkpointing", "optimizer") if name in options}
    return Setting(shape, options["precision"], options["device"], **optional)


def batches_of(options: Options) -> list[list[PairTree]]:
    """The batches of a task: drawn from its lengths, or rows of a real file."""
    lengths, pairs, count = options["lengths"], options["pairs"], options["batches"]
    vocabulary = setting_of(options).shape.vocabulary
    if isinstance(lengths, str) and lengths in REAL:
        rows = real(lengths, Path(options.get("data") or DATA), vocabulary, pairs * count, seed=1)
        return [rows[first : first + pairs] for first in range(0, pairs * count, pairs)]
    ranges = _ranges(lengths).scaled(options.get("factor", 1.0))
    return [drawn(ranges, vocabulary, pairs, seed) for seed in range(count)]


def _ranges(lengths: str | list[list[int]]) -> Lengths:
    """Ranges by name, or (prompt, response) as pairs of ends."""
    if isinstance(lengths, str):
        return LENGTHS[lengths]
    prompt, response = (tuple(ends) for ends in lengths)
    return Lengths(prompt, response)  # type: ignore[arg-type]


def _built(options: Options) -> tuple[dict[str, Step], dict[str, str]]:
    known, skipped = variants.variants(options["device"])
    wanted = options.get("variants") or list(known)
    setting = setting_of(options)
    built = {name: known[name](setting) for name in wanted if name in known}
    return built, {
        name: reason for name, reason in skipped.items() if options.get("variants") is None or name in wanted
    }


def task_variants(options: Options) -> dict[str, Any]:
    """Names of the variants that run here, and the reasons of those that do not."""
    known, skipped = variants.variants(options["device"])
    return {"variants": list(known), "skipped": skipped}


def task_gemm(options: Options) -> dict[str, Any]:
    """Matrix products of the step's shapes, in the precision of the step; for comparison one in the other precision."""
    shape, tokens, device = setting_of(options).shape, options["tokens"], options["device"]
    half = options["precision"] != "float32"
    shapes = [
        (tokens, shape.hidden, shape.hidden),
        (tokens, shape.hidden, shape.intermediate),
        (tokens, shape.intermediate, shape.hidden),
        (options["response_tokens"], shape.hidden, shape.vocabulary),
    ]
    dtype, other = (torch.bfloat16, torch.float32) if half else (torch.float32, torch.bfloat16)
    rates = machine.gemm_rates(shapes, dtype, device, options["repeats"])
    small = machine.gemm_rates([(64, shape.hidden, shape.hidden)], other, device, 2)
    return {"dtype": str(dtype), "gflops": rates, "other_dtype": str(other), "other_gflops": small}


def task_compare(options: Options) -> dict[str, Any]:
    """Times all variants round-robin over the same batches; checks their first losses and log-probs."""
    batches, setting = batches_of(options), setting_of(options)
    built, skipped = _built(options)
    prepared = {name: [step.prepare(trees) for trees in batches] for name, step in built.items()}
    log_probs = {name: step.log_probs(prepared[name][0]).float().cpu() for name, step in built.items()}
    losses = {name: [float(step(prepared[name][0]))] for name, step in built.items()}  # warms up, too
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in built}
    for _ in range(options["rounds"]):
        for index in range(len(batches)):
            for name, step in built.items():
                batch = prepared[name][index]
                taken[name][index].append(machine.seconds(lambda step=step, batch=batch: step(batch), setting.device))
    standard = next(iter(log_probs.values()))
    # Of all variants together: on a GPU each has a process of its own.
    peak = torch.cuda.max_memory_allocated() / 2**20 if setting.device == "cuda" else None
    return {
        "peak_mb": peak,
        "work": [work_of(trees, setting.shape) for trees in batches],
        "skipped": skipped,
        "variants": {
            name: {
                "seconds": taken[name],
                "median": sum(map(median, taken[name])) / len(batches),
                "minimum": sum(map(min, taken[name])) / len(batches),
                "first_loss": losses[name][0],
                "first_loss_expected": START_LOSS,
                "checkpointing": setting.checkpointing,
                "log_probs": log_probs[name].tolist(),
                "log_prob_difference": float((log_probs[name] - standard).abs().max() / standard.abs().max()),
            }
            for name in built
        },
    }


def task_memory(options: Options) -> dict[str, Any]:
    """Peak of a step above weights, gradients, optimizer state and reference; the largest of the batches."""
    batches, setting = batches_of(options), setting_of(options)
    built, skipped = _built(options)
    found = {}
    for name, step in built.items():
        prepared = [step.prepare(trees) for trees in batches]
        step(prepared[0])
        gradients = _gradients_mb(step)
        above = [machine.peak_above_rest_mb(lambda step=step, b=batch: step(b), setting.device) for batch in prepared]
        # At rest gradients are freed; they belong to the state that a step needs whatever it does.
        found[name] = {
            "above_state_mb": max(above) - gradients,
            "above_rest_mb": max(above),
            "gradients_mb": gradients,
            "resident_mb": machine.resident_mb(setting.device),
        }
    return {"variants": found, "skipped": skipped, "work": [work_of(trees, setting.shape) for trees in batches]}


def _gradients_mb(step: Step) -> float:
    parameters = getattr(step, "parameters", None) or list(step.model.parameters())  # type: ignore[attr-defined]
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad) / 2**20


def task_fit(options: Options) -> dict[str, Any]:
    """Fits time = a + b · tree tokens + c · response tokens to many batches of different sizes."""
    setting = setting_of(options)
    (step,) = _built(options)[0].values()
    ranges = _ranges(options["lengths"])
    draws = []
    for seed in range(options["batches"]):
        # Prompts and responses of sizes that do not go together, so that their costs can be told apart.
        lengths = Lengths(ranges.scaled(0.5 + 1.5 * (seed % 4)).prompt, ranges.scaled(0.4 + 0.2 * (seed % 5)).response)
        draws.append(drawn(lengths, setting.shape.vocabulary, 1 + seed % options["pairs"], seed))
    prepared = [step.prepare(trees) for trees in draws]
    step(prepared[-1])
    taken: list[list[float]] = [[] for _ in draws]
    for _ in range(options["rounds"]):
        for index, batch in enumerate(prepared):
            taken[index].append(machine.seconds(lambda batch=batch: step(batch), setting.device))
    work = [work_of(trees, setting.shape) for trees in draws]
    rows = torch.tensor([[1.0, found["tree_tokens"], found["response_tokens"]] for found in work], dtype=torch.float64)
    times = torch.tensor([min(found) for found in taken], dtype=torch.float64)
    coefficients = torch.linalg.lstsq(rows, times[:, None]).solution[:, 0]
    residual = (times - rows @ coefficients).square().sum() / (times - times.mean()).square().sum()
    return {
        "seconds_constant": float(coefficients[0]),
        "seconds_per_tree_token": float(coefficients[1]),
        "seconds_per_response_token": float(coefficients[2]),
        "r_squared": float(1 - residual),
        "tree_tokens": [found["tree_tokens"] for found in work],
        "response_tokens": [found["response_tokens"] for found in work],
        "seconds": times.tolist(),
    }


def task_profile(options: Options) -> dict[str, Any]:
    """Self time of the costliest operators of a step, as shares of all."""
    from torch.profiler import ProfilerActivity, profile

    setting = setting_of(options)
    (step,) = _built(options)[0].values()
    batch = step.prepare(batches_of(options)[0])
    step(batch)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if setting.device == "cuda" else [])
    with profile(activities=activities) as record:
        step(batch)
        machine.synchronize(setting.device)
    key = "self_device_time_total" if setting.device == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, key) for event in record.key_averages()}
    total = sum(times.values())
    costliest = sorted(times, key=times.__getitem__, reverse=True)[:15]
    return {"share": {name: times[name] / total for name in costliest}}

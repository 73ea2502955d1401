"""Measures a training step against TRL's DPOTrainer and a naive one: time, memory, growth, use of the machine.

    python benchmarks/step.py                              # everything; some 25 minutes on two quiet cores
    python benchmarks/step.py --quick                      # a look, at most 90 seconds
    python benchmarks/step.py --device cuda --shape 1b     # or 7b: at most 8 minutes a call; call again to go on
                                                           # (--optimizer AdamW for 7b on a card of less than 141 GB)
    python benchmarks/step.py --table                      # docs/performance.md and its picture from the results

Writes benchmarks/results/step_<device>.json. Every section runs in a fresh process; within one, variants take turns on
the same rows. A run that was stopped goes on where it was (sections that failed are not tried again; removing
benchmarks/results/*.partial.json starts afresh). TRL takes part if it is installed: pip install
"bfpo_pl[bench]".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LITTLE = 0.1
"""Share of a call's time after which a section that is stopped may have lacked what went before it."""
sys.path.insert(0, str(HERE))


def in_a_new_process(
    task: str, options: dict[str, Any], environment: dict[str, str], timeout: float | None = None
) -> dict[str, Any]:
    """Runs a task in a fresh process and gives what it printed last; ``{"error": …}`` if it failed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--task", task, "--options", json.dumps(options)]
    variables = {**os.environ, **environment, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {timeout:.0f} s", "stopped": True}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"error": last[:500], "stderr": done.stderr[-2000:]}
    return json.loads(done.stdout.splitlines()[-1])


def run(plan: list[Any], key: dict[str, Any], partial: Path, limit: float | None) -> tuple[dict[str, Any], bool]:
    """Runs the sections that a stopped run of the same key has not finished; one that failed is not tried again.

    Args:
        plan: The sections.
        key: What the results depend on.
        partial: File that holds finished sections.
        limit: Seconds after which no further section starts, and the one that runs is stopped.

    Returns:
        Results by section, and whether all ran.
    """
    held = json.loads(partial.read_text()) if partial.exists() else {}
    found = held["sections"] if held.get("key") == key else {}
    began = time.monotonic()
    same: dict[str, str] = {}
    for number, section in enumerate(plan, 1):
        if section.key not in found and section.work in same:
            found[section.key] = found[same[section.work]]
        if section.key not in found:
            spent = time.monotonic() - began
            left = None if limit is None else limit - spent
            if left is not None and left < 10:
                return found, False
            started = time.monotonic()
            result = in_a_new_process(section.task, section.options, section.environment, left)
            took = time.monotonic() - started
            print(f"[{number}/{len(plan)}] {section.key}: {result.get('error', f'{took:.0f} s')}", flush=True)
            if result.get("stopped") and spent > LITTLE * limit:  # type: ignore[operator]
                return found, False  # the next call gives it all of its time
            found[section.key] = {**result, "took_seconds": took}
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"key": key, "sections": found}))
        if "error" not in found[section.key]:
            same[section.work] = section.key
    return found, True


def plan_of(options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """The sections to run, and what is known before any runs."""
    import torch
    from speed import machine, plan, trl_peer

    known = in_a_new_process("variants", {"device": options.device}, {})
    if "error" in known:
        raise SystemExit(known["stderr"])
    precision = options.precision
    if precision == "auto":
        precision = "bf16-mixed" if machine.bf16_is_native() or options.device == "cuda" else "float32"
    if options.device == "cuda":
        sections = plan.on_cuda(options.shape, known["variants"], options.optimizer)
    elif options.quick:
        sections = plan.quick(precision, known["variants"], options.shape or "quick")
    else:
        sections = plan.on_cpu(precision, known["variants"], options.shape or "small", str(options.data or "") or None)
    about = {
        "machine": machine.describe(),
        "trl": trl_peer.available() or "not installed",
        "trl_settings": trl_peer.SWITCHED_ON,
        "precision": "bf16-true" if options.device == "cuda" else precision,
        "optimizer": options.optimizer if options.device == "cuda" else "AdamW",
        "bf16_is_native": torch.cuda.is_available() if options.device == "cuda" else machine.bf16_is_native(),
        "skipped": known["skipped"],
    }
    return sections, about


def measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """All figures; None if the time was up before all sections had run."""
    from speed import summary

    from bfpo_pl.runs import environment

    sections, about = plan_of(options)
    commit = (environment()["git"] or {}).get("commit")
    key = {
        "commit": commit,
        "shape": options.shape,
        "precision": about["precision"],
        "optimizer": about["optimizer"],
        "sections": [section.key for section in sections],
    }
    partial = options.out.with_suffix(".partial.json")
    began = time.monotonic()
    found, whole = run(sections, key, partial, options.limit)
    results = {"environment": environment(), **about, "seconds": time.monotonic() - began, "sections": found}
    results["options"] = {section.key: {"task": section.task, **section.options} for section in sections}
    results["summary"] = summary.of(results)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    if not whole:
        print("The time is up; the same command goes on from here.")
        return None
    partial.unlink(missing_ok=True)
    return results


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller and shorter")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", help="model: 1b (default) or 7b on a GPU; tiny, quick or small (default) on a CPU")
    parser.add_argument(
        "--precision",
        choices=["auto", "float32", "bf16-mixed"],
        default="auto",
        help="on a CPU; auto: bf16-mixed where the processor has bfloat16 products, else float32",
    )
    parser.add_argument(
        "--optimizer",
        choices=["AdamW32", "AdamW"],
        default="AdamW32",
        help="on a GPU; with weights and gradients AdamW32 takes 16 bytes a weight (7b: 107 GB), AdamW 8",
    )
    parser.add_argument("--data", type=Path, help="folder with the real pairs; default: ../shared/data of the project")
    parser.add_argument("--limit", type=float, help="seconds for a call; default on a GPU: 450")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="only write documentation and picture from the results")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda":
        options.shape = options.shape or "1b"
        options.limit = options.limit or 450.0
    if options.out is None:
        name = (
            f"step_cuda_{options.shape}" if options.device == "cuda" else "step_quick" if options.quick else "step_cpu"
        )
        options.out = RESULTS / f"{name}.json"
    return options


def main() -> None:
    """Measures, or does one task for the process that measures."""
    options = arguments()
    if options.task:
        from speed import measure as tasks

        tasks.quiet()
        print(json.dumps(getattr(tasks, f"task_{options.task}")(json.loads(options.options))))
        return
    if options.table:
        from speed import report

        report.write(HERE.parent)
        return
    results = measure(options)
    if results is not None:
        print(json.dumps(results["summary"], indent=1))


if __name__ == "__main__":
    main()

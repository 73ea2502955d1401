"""`bfpo demo`: the whole method on the microworld, through the same commands that train a large model."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from bfpo_pl.callbacks.progress import SECONDS_VARIABLE
from bfpo_pl.component import UserError
from bfpo_pl.microworld.evaluation import Evaluation, evaluate
from bfpo_pl.plots import Point, pareto_figure
from bfpo_pl.runs import new_run_folder, usable_cores

CONFIGS = Path("configs")
OBJECTIVES = ("helpfulness_only", "bfpo", "bfpo_nll")
TEMPERATURES = {"greedy": 0.0, "temperature 0.5": 0.5}
TITLES = {
    "sft": "SFT (the start)",
    "helpfulness_only": "helpfulness only",
    "safety_only": "safety only",
    "safety_first": "safety first",
    "linear": "linear mix",
    "dpo": "DPO on helpfulness",
    "bfpo": "BFPO",
    "bfpo_nll": "BFPO + NLL term",
}
NLL_NOTE = (
    "BFPO is the paper's objective. The NLL term on safe chosen responses is an addition of this package "
    "(configs/experiment/bfpo_nll.yaml): it allows larger margins without malformed text."
)
_STEP = re.compile(r"^step (\d+)/(\d+)", re.MULTILINE)


@dataclass
class Stage:
    """A `bfpo` command that runs in a process of its own.

    Args:
        name: The experiment's name, which is the folder of its run.
        arguments: The command line after `bfpo`.
        threads: Threads for torch.
    """

    name: str
    arguments: list[str]
    threads: int

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """Starts the command; its output goes to ``<folder>/logs/<name>.log``."""
        self.log(folder).parent.mkdir(parents=True, exist_ok=True)
        inherited = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "BFPO_RUN_DIR")}
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        # Passive: threads that wait leave the cores to others, where something else runs beside the demo.
        environment = inherited | threads | {"OMP_WAIT_POLICY": "PASSIVE", SECONDS_VARIABLE: "2"}
        with self.log(folder).open("wb") as log:
            command = [sys.executable, "-m", "bfpo_pl.cli", *self.arguments]
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def log(self, folder: Path) -> Path:
        """Where the command's output goes."""
        return folder / "logs" / f"{self.name}.log"

    def progress(self, folder: Path) -> tuple[int, int]:
        """Optimizer steps done, and in all (1 while unknown)."""
        found = _STEP.findall(self.log(folder).read_text(errors="replace"))
        return (int(found[-1][0]), int(found[-1][1])) if found else (0, 1)

    def export(self, folder: Path) -> Path:
        """The Hugging Face folder that the run left."""
        return next((folder / self.name).glob("*/export"))


def run_demo(args: list[str]) -> dict[str, Any]:
    """Fine-tunes, aligns, judges on held-out prompts; prints a table and sample answers, draws ``pareto.png``.

    Args:
        args: Command line after ``bfpo demo``.

    Returns:
        What ``results.json`` holds.

    Raises:
        UserError: The configs are not here, or a stage failed.
    """
    options, further = _options(args)
    if not (CONFIGS / "base.yaml").is_file():
        raise UserError("`bfpo demo` reads configs/: run it in the root of a clone of the bfpo_pl repository.")
    unknown = [name for name in options.objectives if not (CONFIGS / "experiment" / f"{name}.yaml").is_file()]
    if unknown:
        known = ", ".join(sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
        raise UserError(f"There is no experiment {', '.join(unknown)} in {CONFIGS}/experiment. Known: {known}.")
    console = Console(width=None if sys.stdout.isatty() else 120)
    started = time.monotonic()
    folder = new_run_folder(options.runs, "demo")
    folder.mkdir(parents=True)
    console.print(f"bfpo demo, seed {options.seed}: everything goes to {folder}\n", highlight=False, soft_wrap=True)
    cores = usable_cores()
    common = [f"--seed_everything={options.seed}", f"--runs={folder}", *further]
    sft = Stage("sft", ["sft", "-c", f"{CONFIGS}/sft.yaml", *common, *_world("sft", options.seed)], cores)
    _run([sft], folder, console)
    start = ["--model.policy=HFModel", f"--model.policy.path={sft.export(folder)}"]
    stages = [
        Stage(name, [*_experiment(name), *common, *start, *_streams(name, options.seed)], 1)
        for name in options.objectives
    ]
    for first in range(0, len(stages), cores):
        together = stages[first : first + cores]
        for stage in together:
            stage.threads = max(1, cores // len(together))
        _run(together, folder, console)
    torch.set_num_threads(cores)
    results = {}
    with console.status("judging the answers to held-out prompts"):
        for stage in (sft, *stages):
            results[stage.name] = _judged(stage.export(folder), options.seed)
    record = _record(results, options.seed, time.monotonic() - started)
    (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    _show(results, folder, console)
    console.print(
        f"\nDone in {record['seconds']:.0f} s. Plot: {folder / 'pareto.png'}", highlight=False, soft_wrap=True
    )
    return record


def _options(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        "bfpo demo",
        description=run_demo.__doc__.splitlines()[0],  # type: ignore[union-attr]
        epilog="Further arguments, such as --trainer.max_steps=50, are handed to every stage.",
        allow_abbrev=False,
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the world's split, the data and the training")
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    parser.add_argument(
        "--objectives", nargs="+", default=list(OBJECTIVES), help="experiments of configs/experiment/ to compare"
    )
    return parser.parse_known_args(args)


def _experiment(name: str) -> list[str]:
    return ["fit", "-c", f"{CONFIGS}/base.yaml", "-c", f"{CONFIGS}/experiment/{name}.yaml"]


def _world(stream: str, seed: int) -> list[str]:
    source = f"--data.streams.{stream}.source"
    return [f"{source}.seed={seed}", f"{source}.split_seed={seed}"]


def _streams(name: str, seed: int) -> list[str]:
    streams = ("safety",) if name == "safety_only" else ("safety", "helpfulness")
    return [argument for stream in streams for argument in _world(stream, seed)]


def _run(stages: list[Stage], folder: Path, console: Console) -> None:
    """Runs commands side by side and shows their progress.

    Raises:
        UserError: One failed; the end of its log is in the message.
    """
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        processes = {stage.name: stage.start(folder) for stage in stages}
        tasks = {stage.name: progress.add_task(TITLES.get(stage.name, stage.name), total=None) for stage in stages}
        try:
            while any(process.poll() is None for process in processes.values()):
                time.sleep(0.5)
                for stage in stages:
                    done, total = stage.progress(folder)
                    progress.update(tasks[stage.name], completed=done, total=total if done else None)
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.terminate()
        for stage in stages:
            progress.update(tasks[stage.name], completed=1, total=1)
    for stage in stages:
        if processes[stage.name].returncode:
            end = "\n".join(stage.log(folder).read_text(errors="replace").splitlines()[-15:])
            raise UserError(f"The stage '{stage.name}' failed; its log, {stage.log(folder)}, ends with:\n{end}")


def _judged(export: Path, seed: int) -> dict[str, Evaluation]:
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    return {
        name: evaluate(model, tokenizer, "heldout", split_seed=seed, temperature=temperature)
        for name, temperature in TEMPERATURES.items()
    }


def _record(results: dict[str, dict[str, Evaluation]], seed: int, seconds: float) -> dict[str, Any]:
    models = {
        model: {decoding: evaluation.scores.as_dict() for decoding, evaluation in evaluations.items()}
        for model, evaluations in results.items()
    }
    prompts = len(next(iter(next(iter(results.values())).values())).samples)
    return {"seed": seed, "seconds": round(seconds, 1), "heldout_prompts": prompts, "models": models}


def _show(results: dict[str, dict[str, Evaluation]], folder: Path, console: Console) -> None:
    prompts = len(results["sft"]["greedy"].samples)
    for decoding in TEMPERATURES:
        table = Table(title=f"{prompts} held-out prompts, {decoding}", title_justify="left", title_style="bold")
        table.add_column("model")
        for heading in ("helpful\n(benign)", "harmless\n(harmful)", "over-refusal\n(benign)"):
            table.add_column(heading, justify="right")
        table.add_column("harmless, harm in\nverb / in the pair", justify="right")
        table.add_column("malformed\nbenign / harmful", justify="right")
        for name, evaluations in results.items():
            scores = evaluations[decoding].scores
            verb, pair = (scores.by_class[kind].harmless for kind in ("harmful_verb", "harmful_pair"))
            table.add_row(
                TITLES.get(name, name),
                f"{scores.helpfulness:.2f}",
                f"{scores.harmlessness:.2f}",
                f"{scores.over_refusal:.2f}",
                f"{verb:.2f} / {pair:.2f}",
                f"{scores.benign.malformed:.2f} / {scores.harmful.malformed:.2f}",
                style="bold" if name.startswith("bfpo") else "",
            )
        console.print(table)
    if "bfpo_nll" in results:
        console.print(NLL_NOTE, style="dim", highlight=False)
    _show_samples(results, console)
    points = {
        TITLES.get(name, name): [Point(e.scores.helpfulness, e.scores.harmlessness) for e in evaluations.values()]
        for name, evaluations in results.items()
    }
    pareto_figure(points, list(TEMPERATURES), folder / "pareto.png", f"Microworld, {prompts} held-out prompts")


def _show_samples(results: dict[str, dict[str, Evaluation]], console: Console) -> None:
    """Three answers of each model to the same prompts, one of a kind: benign, benign with a sensitive word, harmful."""
    table = Table(title="Sampled answers (temperature 0.5)", title_justify="left", title_style="bold", show_lines=True)
    table.add_column("prompt", max_width=24)
    for name in results:
        table.add_column(TITLES.get(name, name))
    evaluations = [evaluations["temperature 0.5"].samples for evaluations in results.values()]
    for kind in ("dual_verb", "sensitive_object", "harmful_pair"):
        index = next(index for index, row in enumerate(evaluations[0]) if row["class"] == kind)
        prompt = evaluations[0][index]["prompt"]
        label = "harmful" if kind.startswith("harmful") else "benign"
        table.add_row(f"{prompt}\n({label})", *(samples[index]["answer"] or "(empty)" for samples in evaluations))
    console.print(table, highlight=False)

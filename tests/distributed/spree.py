"""Kills a run again and again, lets it go on with `--resume auto`, and compares the end with an undisturbed run.

    python spree.py --world 1 --kills 32 --seed 0 --folder DIR

Processes are forked from this one, which has imported everything, so that a start takes a second or two instead of
ten. Half of the kills wait for a checkpoint that is being written. ``spree.json`` in the folder says what happened.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

import bfpo_pl.data.datamodule
import bfpo_pl.module
import bfpo_pl.parsing  # noqa: F401
from bfpo_pl.checkpoints.find import half_written, newest_complete
from bfpo_pl.cli import main

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
"""Seconds in which a start must have made a step, and in which the others must have ended after one was killed."""


@dataclass
class Spree:
    """What happened.

    Args:
        world: Processes.
        kills: Kills.
        torn: Saves that a kill left half-written.
        steps_lost: Steps that were trained and not in the newest complete checkpoint, at each kill.
        restarts: Starts, the first among them.
        survivors_seconds: How long the other processes took to end, at each kill of one of several.
        equal_weights: Whether the last weights are those of the undisturbed run, bit for bit.
        equal_metrics: Whether the metrics of all steps are.
        steps: Steps of the run.
    """

    world: int
    kills: int = 0
    torn: int = 0
    steps_lost: list[int] = field(default_factory=list)
    restarts: int = 0
    survivors_seconds: list[float] = field(default_factory=list)
    equal_weights: bool = False
    equal_metrics: bool = False
    steps: int = 0


def arguments(world: int, folder: Path, steps: int) -> list[str]:
    """A fit whose saves take about as long as its steps, with dropout."""
    strategy = ["-c", str(ROOT / "configs/strategy/fsdp2.yaml")] if world > 1 else []
    return [
        "fit",
        *("-c", str(ROOT / "configs/base.yaml"), "-c", str(ROOT / "configs/experiment/bfpo.yaml"), *strategy),
        "--trainer.accelerator=cpu",
        f"--trainer.devices={world}",
        f"--trainer.max_steps={steps}",
        "--trainer.log_every_n_steps=7",
        "--trainer.val_check_interval=50",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=interruptions.LastStep",
        "--checkpoint.every_n_train_steps=2",
        *("--model.policy.hidden_size=160", "--model.policy.layers=3", "--model.policy.intermediate_size=640"),
        *("--model.trainable=LoRA", "--model.trainable.r=64", "--model.trainable.dropout=0.2"),
        *("--model.reference=AdapterOff", "--model.optimizer.lr=0.003"),
        *("--data.streams.safety.source.count=90", "--data.streams.helpfulness.source.count=90"),
        *("--data.streams.safety.batch_size=2", "--data.streams.helpfulness.batch_size=2"),
        f"--runs={folder}",
        "--resume=auto",
    ]


def start(world: int, folder: Path, steps: int) -> list[int]:
    """Forks the processes of a run; they end with its exit code."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    processes = []
    for rank in range(world):
        process = os.fork()
        if process == 0:
            log = os.open(folder.with_suffix(f".{rank}.log"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if world > 1:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                os.environ.update({name: str(value) for name, value in numbers.items()})
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0"}
                os.environ["TORCHELASTIC_RUN_ID"] = "spree"
            try:
                main(arguments(world, folder, steps))
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 99
            os._exit(code)
        processes.append(process)
    return processes


def wait(processes: list[int], seconds: float) -> list[int] | None:
    """The exit codes, or None if not all have ended in time."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for process in processes:
            if process not in codes and os.waitpid(process, os.WNOHANG)[0]:
                codes[process] = 0
        if len(codes) == len(processes):
            return list(codes.values())
        time.sleep(0.005)
    return None


def run_of(folder: Path) -> Path | None:
    return next(iter(folder.glob("bfpo/*")), None)


def last_step(run: Path | None) -> int:
    """The last step that ended, as its process noted it."""
    path = run / "last_step.txt" if run else None
    return int(path.read_text() or 0) if path and path.is_file() else 0


def ended(processes: list[int]) -> bool:
    """Whether one of them has ended, without taking its exit code away."""
    return any(os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None for process in processes)


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((run / "checkpoints").glob("*.part"))


def choose_moment(chance: random.Random, folder: Path, processes: list[int]) -> bool:
    """Waits for the moment of a kill; False if the run ended before."""
    run, began = None, time.monotonic()
    first = last_step(run_of(folder))
    while (run := run_of(folder)) is None or last_step(run) == first:
        if ended(processes):
            return False
        assert time.monotonic() - began < PATIENCE, "no step was made"
        time.sleep(0.002)
    if chance.random() < 0.5:
        for _ in range(chance.randint(1, 12)):
            while is_saving(run):
                time.sleep(0.0005)
            while not is_saving(run):
                if ended(processes):
                    return False
                time.sleep(0.0005)
        time.sleep(chance.random() * 0.01)
    else:
        time.sleep(chance.random() * 3.0)
    return not ended(processes)


def metrics(run: Path) -> list[tuple[str, str, str]]:
    """Every value that is of the training, by step and name."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    named = [(row["step"], key, value) for row in rows for key, value in row.items() if value and key != "step"]
    return sorted(x for x in named if not any(word in x[1] for word in ("_second", "memory", "data_wait")))


def spree(world: int, kills: int, seed: int, folder: Path, steps: int) -> Spree:
    """Kills a run and compares it with an undisturbed one."""
    chance, found = random.Random(seed), Spree(world, steps=steps)
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir(parents=True)
    killed.mkdir()
    assert wait(start(world, whole, steps), 3600) is not None
    while True:
        found.restarts += 1
        processes = start(world, killed, steps)
        if found.kills >= kills:
            assert wait(processes, 3600) is not None
            break
        if not choose_moment(chance, killed, processes):
            assert wait(processes, PATIENCE) is not None
            break
        victims = processes if world == 1 or chance.random() < 0.3 else [chance.choice(processes)]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        if wait(processes, PATIENCE) is None:
            raise AssertionError("a process outlived the others")
        if len(victims) < world:
            found.survivors_seconds.append(round(time.monotonic() - began, 2))
        run = run_of(killed)
        assert run is not None
        newest = newest_complete(run)
        found.kills += 1
        found.torn += bool(half_written(run))
        found.steps_lost.append(last_step(run) - (newest.step or 0))
    runs = [run_of(whole), run_of(killed)]
    assert len(list(killed.glob("bfpo/*"))) == 1, "all in one folder"
    ours, theirs = (load_file(run / "export" / "model.safetensors") for run in runs if run)
    found.equal_weights = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    found.equal_metrics = metrics(runs[0]) == metrics(runs[1])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--kills", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.append(str(ROOT / "tests/support"))
    result = spree(options.world, options.kills, options.seed, options.folder, options.steps)
    (options.folder / "spree.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    print(json.dumps(asdict(result)))

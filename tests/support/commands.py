"""Command lines of `bfpo` that several processes run, and what the runs leave."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests/distributed"
STRATEGIES = ("ddp", "fsdp2")

# 13 rows of the driver in global batches of 4: epochs end after steps 4 and 8 with a batch of one row, of which the
# second process has none. A checkpoint at step 5 lies within the second epoch.
BASE = [
    *("-c", str(ROOT / "configs/base.yaml")),
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=10",
    "--trainer.val_check_interval=5",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.gradient_clip_val=0.5",
    "--checkpoint.every_n_train_steps=5",
    "--checkpoint.save_top_k=-1",
    "--model.policy.hidden_size=32",
    "--model.policy.layers=2",
    "--model.policy.intermediate_size=64",
    "--model.schedule.warmup=0",
]
LORA = ["--model.trainable=LoRA", "--model.trainable.r=4", "--model.reference=AdapterOff"]
SELECT = ["--model.trainable=Select", "--model.trainable.patterns=[down_proj]"]
SELECTIVE = ["--model.activation_checkpointing=selective"]
SGD = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.05"]
ADAMW = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3", "--model.optimizer.fused=true"]
ADAMW32 = ["--model.optimizer=bfpo_pl.optimizers.AdamW32", "--model.optimizer.lr=1e-3", "--model.optimizer.fused=true"]
TRUE = [*ADAMW32, "--model.optimizer.lr=1e-5", "--trainer.precision=bf16-true"]
MIXED = [*ADAMW32, *SELECTIVE, "--trainer.precision=bf16-mixed"]
EVALUATION = [
    "--trainer.callbacks+=bfpo_pl.callbacks.microworld.MicroworldEvaluation",
    "--trainer.callbacks.max_prompts=7",
    "--trainer.callbacks.temperatures=[0.0]",
]
GENERATION = ["--trainer.callbacks+=probes.GenerateUnequally"]


def streams(batch_size: int, *names: str) -> list[str]:
    """Rows and quotas of the streams."""
    arguments = []
    for name in names:
        count = 13 if name == "safety" else 30
        arguments += [
            f"--data.streams.{name}.source.count={count}",
            f"--data.streams.{name}.source.validation_count=11",
            f"--data.streams.{name}.batch_size={batch_size}",
        ]
    return [*arguments, f"--data.validation_batch_size={2 * batch_size}"]


# Epochs of micro-batches with 4, 4 and 1 rows of the driver: every second step has one micro-batch, of one row.
ACCUMULATED = ["--trainer.accumulate_grad_batches=2", "--data.streams.safety.source.count=9"]

METHODS = {
    "sgd": lambda q: [*("-c", str(ROOT / "configs/experiment/bfpo.yaml")), *SGD, *streams(q, "safety", "helpfulness")],
    "lora": lambda q: [
        *("-c", str(ROOT / "configs/experiment/bfpo.yaml")),
        *ADAMW,
        *LORA,
        *streams(q, "safety", "helpfulness"),
    ],
    # drops the pairs with equal flags; with one stream, the second process has an empty batch at an epoch's end
    "adamw": lambda q: [
        *("-c", str(ROOT / "configs/experiment/safety_only.yaml")),
        *ADAMW,
        *streams(q, "safety"),
        "--data.streams.safety.source.unsafe_helpful_share=0.7",
    ],
}


@dataclass
class Run:
    """A finished run and what it left.

    Args:
        folder: Its run folder.
        log: What the command printed.
    """

    folder: Path
    log: str

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "export" / "model.safetensors")

    @property
    def rows(self) -> list[dict[str, float]]:
        with (self.folder / "metrics.csv").open() as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]

    def metrics(self, prefix: str) -> dict[int, dict[str, float]]:
        """Values whose names begin with a prefix, by step."""
        found: dict[int, dict[str, float]] = {}
        for row in self.rows:
            values = {key: value for key, value in row.items() if key.startswith(prefix)}
            if values:
                found.setdefault(int(row["step"]), {}).update(values)
        return found

    def checkpoint(self, step: int) -> Path:
        return next((self.folder / "checkpoints").glob(f"*step={step}.ckpt"))

    @property
    def config(self) -> dict:
        return yaml.safe_load((self.folder / "config.yaml").read_text())


def only_run(runs: Path, log: str) -> Run:
    """The run below a folder, which must be the only one."""
    folders = [folder for folder in runs.glob("*/*") if folder.is_dir()]
    assert len(folders) == 1, (folders, log[-3000:])
    return Run(folders[0], log)


def command(name: str, strategy: str, runs: Path, *more: str) -> list[str]:
    """Command line of `bfpo` after its subcommand, for a method under a strategy."""
    single = strategy == "single"
    # Configs come before overrides, so a method's own configs go first. Tensor-parallel processes see the same rows.
    method = METHODS[name](2 if strategy in STRATEGIES else 4)
    configs, overrides = method[:2], method[2:]
    stack = [*BASE[:2], *configs, "-c", str(ROOT / f"configs/strategy/{strategy}.yaml")]
    devices = [] if single else ["--trainer.devices=2"]
    return [*stack, *BASE[2:], *overrides, *devices, f"--runs={runs}", *more]


def execute(arguments: list[str], folder: Path) -> str:
    """Runs a command as a user would; fails with its output if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "PL_GLOBAL_SEED")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=900, env=environment)
    log = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(arguments)}\n{log[-20000:]}"
    return log


def bfpo(subcommand: str, arguments: list[str], folder: Path) -> str:
    """`bfpo` itself, which starts its processes."""
    return execute([str(Path(sys.executable).with_name("bfpo")), subcommand, *arguments], folder)


def torchrun(arguments: list[str], folder: Path, processes: int = 2) -> str:
    """Processes of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return execute([*launcher, *arguments], folder)


def sft(strategy: str, runs: Path) -> list[str]:
    """Command line of three steps of supervised fine-tuning."""
    single = strategy == "single"
    return [
        "sft",
        *("-c", str(ROOT / "configs/sft.yaml"), "-c", str(ROOT / f"configs/strategy/{strategy}.yaml")),
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=3",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        *("--model.policy.hidden_size=32", "--model.policy.layers=2", "--model.policy.intermediate_size=64"),
        "--data.streams.sft.source.count=9",
        f"--data.streams.sft.batch_size={4 if single else 2}",
        *([] if single else ["--trainer.devices=2"]),
        f"--runs={runs}",
    ]


def outcomes(
    jobs: dict[str, list[str]], folder: Path, launch: Callable[[list[str], Path], str]
) -> tuple[dict[str, str], str]:
    """Runs jobs one after the other in the same processes: what became of each on process 0, and the log of all."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    log = launch([str(HERE / "chain.py"), str(file)], folder)
    return json.loads(file.with_suffix(".done").read_text()), log


def alone(arguments: list[str], folder: Path) -> str:
    """One process."""
    return execute([sys.executable, *arguments], folder)


def chain(jobs: dict[str, list[str]], folder: Path, launch: Callable[[list[str], Path], str]) -> dict[str, Run]:
    """Runs jobs one after the other in the same processes; every one must succeed and leave one run in its folder."""
    done, log = outcomes(jobs, folder, launch)
    failures = {name: outcome for name, outcome in done.items() if outcome != "ok"}
    assert not failures, "\n".join(failures.values())
    return {name: only_run(folder / name, log) for name in jobs}


def at(run: Path, step: int = 5) -> str:
    """The argument that begins from a run's checkpoint."""
    return f"--ckpt_path={run}/checkpoints/*step={step}.ckpt"

"""Runs of the real command on two gloo processes and on one, shared by all tests of this folder."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
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
    # Configs come before overrides, so a method's own configs go first.
    method = METHODS[name](4 if single else 2)
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
    assert done.returncode == 0, f"{' '.join(arguments)}\n{log[-6000:]}"
    return log


def bfpo(subcommand: str, arguments: list[str], folder: Path) -> str:
    """`bfpo` itself, which starts its processes."""
    return execute([str(Path(sys.executable).with_name("bfpo")), subcommand, *arguments], folder)


def torchrun(arguments: list[str], folder: Path) -> str:
    """Two processes of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
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


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One process on the global batches of all methods."""
    folder = tmp_path_factory.mktemp("single")
    jobs = {name: ["fit", *command(name, "single", folder / name)] for name in METHODS}
    jobs["sgd"] += [*EVALUATION, *GENERATION]
    for method in ("sgd", "adamw"):
        name = f"{method}-accumulated"
        jobs[name] = ["fit", *command(method, "single", folder / name, *ACCUMULATED)]
    rows = "--data.streams.safety.batch_size=8"
    jobs["adamw-whole"] = ["fit", *command("adamw", "single", folder / "adamw-whole", ACCUMULATED[1], rows)]
    jobs["sft"] = sft("single", folder / "sft")
    return chain(jobs, folder, alone)


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """By strategy: BFPO with SGD on two processes that `bfpo` started."""
    folder = tmp_path_factory.mktemp("started")
    runs = {}
    for strategy in STRATEGIES:
        arguments = command("sgd", strategy, folder / strategy, *EVALUATION, *GENERATION)
        runs[strategy] = only_run(folder / strategy, bfpo("fit", arguments, folder))
    return runs


@pytest.fixture(scope="session")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """SafetyOnly with AdamW under fsdp2 on two processes of torchrun, checkpoints in one file."""
    folder = tmp_path_factory.mktemp("elastic")
    arguments = command("adamw", "fsdp2", folder / "runs", "--trainer.strategy.save_distributed_checkpoint=false")
    return only_run(folder / "runs", torchrun(["-m", "bfpo_pl.cli", "fit", *arguments], folder))


@pytest.fixture(scope="session")
def chained(
    tmp_path_factory: pytest.TempPathFactory, single: dict[str, Run], started: dict[str, Run], elastic: Run
) -> dict[str, Run]:
    """Further runs on two processes.

    A name ending in ``-resumed`` is a run that went on from step 5, one in ``-validated`` a validation of the last
    checkpoint of one process.
    """
    folder = tmp_path_factory.mktemp("chained")
    jobs = {
        "ddp-sgd-resumed": ["fit", *command("sgd", "ddp", folder / "ddp-sgd-resumed"), at(started["ddp"].folder)],
        "ddp-adamw": ["fit", *command("adamw", "ddp", folder / "ddp-adamw")],
        "ddp-adamw-resumed": [
            "fit",
            *command("adamw", "ddp", folder / "ddp-adamw-resumed"),
            at(folder / "ddp-adamw/*/*"),
        ],
        "fsdp2-adamw-resumed": [
            "fit",
            *command("adamw", "fsdp2", folder / "fsdp2-adamw-resumed"),
            "--trainer.strategy.save_distributed_checkpoint=false",
            at(elastic.folder),
        ],
    }
    for name, more in {
        "copied-select": SELECT,
        "shared-select": [*SELECT, "--model.reference=SharedWeights"],
        "shared-everything": ["--model.reference=SharedWeights"],
    }.items():
        jobs[name] = ["fit", *command("adamw", "fsdp2", folder / name), *more]
    for strategy in STRATEGIES:
        kept = f"{strategy}-precomputed"
        more = [
            "--model.reference=Precomputed",
            "--model.reference.batch_tokens=300",
            f"--data.cache={folder / kept}.cache",
        ]
        jobs[kept] = ["fit", *command("adamw", strategy, folder / kept), *more]
        validated = f"{strategy}-validated"
        jobs[validated] = ["validate", *command("sgd", strategy, folder / validated), at(single["sgd"].folder, 10)]
        jobs[f"{strategy}-sft"] = sft(strategy, folder / f"{strategy}-sft")
        for method in ("sgd", "adamw"):
            name = f"{strategy}-{method}-accumulated"
            jobs[name] = ["fit", *command(method, strategy, folder / name), *ACCUMULATED]
        lora, resumed = f"{strategy}-lora", f"{strategy}-lora-resumed"
        jobs[lora] = ["fit", *command("lora", strategy, folder / lora)]
        jobs[resumed] = ["fit", *command("lora", strategy, folder / resumed), at(folder / lora / "*/*")]
    return chain(jobs, folder, torchrun)


@pytest.fixture(scope="session")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """BFPO in bf16-mixed and, with float32 state, bf16-true: on one process and, named by the strategy, on two."""
    folder = tmp_path_factory.mktemp("bfloat16")

    def fit(name: str, strategy: str, *more: str) -> list[str]:
        return ["fit", *command("sgd", strategy, folder / name), *more]

    jobs = {"mixed": fit("mixed", "single", *MIXED), "true": fit("true", "single", *TRUE)}
    runs = chain(jobs, folder, alone)
    jobs = {}
    for strategy in STRATEGIES:
        mixed, true, resumed = f"{strategy}-mixed", f"{strategy}-true", f"{strategy}-true-resumed"
        jobs[mixed] = fit(mixed, strategy, *MIXED, *(EVALUATION if strategy == "fsdp2" else ()))
        jobs[true] = fit(true, strategy, *TRUE)
        jobs[resumed] = fit(resumed, strategy, *TRUE, at(folder / true / "*/*"))
    return runs | chain(jobs, folder, torchrun)


@pytest.fixture(scope="session")
def resumed_by_command(tmp_path_factory: pytest.TempPathFactory, started: dict[str, Run]) -> Run:
    """The fsdp2 run once more from its sharded checkpoint of step 5, by `bfpo fit --ckpt_path`."""
    folder = tmp_path_factory.mktemp("resumed")
    arguments = command("sgd", "fsdp2", folder / "runs", f"--ckpt_path={started['fsdp2'].checkpoint(5)}")
    return only_run(folder / "runs", bfpo("fit", arguments, folder))


@pytest.fixture(scope="session")
def validated_by_command(tmp_path_factory: pytest.TempPathFactory, started: dict[str, Run]) -> Run:
    """`bfpo validate` of the fsdp2 run's last checkpoint."""
    folder = tmp_path_factory.mktemp("validated")
    arguments = command("sgd", "fsdp2", folder / "runs", f"--ckpt_path={started['fsdp2'].checkpoint(10)}")
    return only_run(folder / "runs", bfpo("validate", arguments, folder))


def at(run: Path, step: int = 5) -> str:
    """The argument that begins from a run's checkpoint."""
    return f"--ckpt_path={run}/checkpoints/*step={step}.ckpt"


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system with room for one checkpoint of the job on it and not for two; None if none can be mounted."""
    folder = tmp_path_factory.mktemp("small")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", str(folder)])


@pytest.fixture(scope="session")
def checkpoint_jobs(
    tmp_path_factory: pytest.TempPathFactory, small_disk: Path | None
) -> tuple[Path, dict[str, str], str]:
    """Runs that save, resume and fail to: the folder of their runs by name, what became of each, and the log of two."""
    folder = tmp_path_factory.mktemp("jobs")

    def fit(name: str, strategy: str, *more: str, runs: Path | None = None) -> list[str]:
        short = ["--export.enabled=false", "--trainer.val_check_interval=null"]
        return ["fit", *command("adamw", strategy, runs or folder / name, *short, *more)]

    def no_room(rank: int) -> list[str]:
        callback = "--trainer.callbacks+=probes.LimitFiles"
        return [callback, f"--trainer.callbacks.rank={rank}", "--trainer.callbacks.step=10"]

    two = {
        "sharded": fit("sharded", "fsdp2"),
        "whole": fit("whole", "fsdp2", "--trainer.strategy.save_distributed_checkpoint=false"),
        "one-to-two": fit("one-to-two", "fsdp2", at(folder / "one/*/*")),
        "sharded-to-ddp": fit("sharded-to-ddp", "ddp", at(folder / "sharded/*/*")),
        "process-1-has-no-room": fit("process-1-has-no-room", "fsdp2", *no_room(1)),
        "writer-has-no-room": fit("writer-has-no-room", "ddp", *no_room(0)),
        "another-model": fit("another-model", "fsdp2", "--model.policy.layers=1", at(folder / "sharded/*/*")),
    }
    if small_disk is not None:
        two["small-disk"] = fit("small-disk", "fsdp2", runs=small_disk)
    done, _ = outcomes({"one": fit("one", "single")}, folder, alone)
    pair, log = outcomes(two, folder, torchrun)
    back, _ = outcomes({"two-to-one": fit("two-to-one", "single", at(folder / "sharded/*/*"))}, folder, alone)
    return folder, done | pair | back, log


@pytest.fixture(name="command")
def _command() -> Callable[..., list[str]]:
    """The command line of `bfpo` after its subcommand, for a method under a strategy."""
    return command


@pytest.fixture(name="only_run")
def _only_run() -> Callable[[Path, str], Run]:
    """The run below a folder, which must be the only one."""
    return only_run

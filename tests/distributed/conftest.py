"""Runs of the real command on two gloo processes and on one, shared by all tests of this folder."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import (
    ACCUMULATED,
    EVALUATION,
    GENERATION,
    METHODS,
    MIXED,
    SELECT,
    STRATEGIES,
    TRUE,
    Run,
    alone,
    at,
    bfpo,
    chain,
    command,
    only_run,
    outcomes,
    sft,
    torchrun,
)


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

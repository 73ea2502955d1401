"""`bfpo sweep`: a W&B sweep file, run without a server."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from bfpo_pl.component import RunError, UserError
from bfpo_pl.sweep.drawing import plan_of
from bfpo_pl.sweep.runner import Runner
from bfpo_pl.sweep.spec import SweepSpec, read_spec
from bfpo_pl.sweep.store import FAILED, SweepFolder, Trial
from bfpo_pl.sweep.table import Progress


class SweepStopped(RunError):
    """A sweep that was asked to stop; the same command goes on with it."""


def run_sweeps(
    specs: list[str],
    workers: int = 1,
    name: str | None = None,
    runs: str = "runs",
    trials: int | None = None,
    max_failures: int = 10,
    retry_failed: bool = False,
) -> list[Trial]:
    """Runs the trials of W&B sweep files on this machine, one file after the other.

    Trials that have finished are never run again, and one that was interrupted goes on from its last checkpoint: the
    same command continues a sweep that was stopped or killed. Machines that see the same folder share the trials.

    Args:
        specs: Sweep files, such as configs/sweep/sft.yaml configs/sweep/labeling.yaml. A later one begins when all
            trials of the one before have finished.
        workers: Trials at a time; each gets its share of the cores and of the GPUs.
        name: Name of the sweep, if there is one file: its folder is RUNS/sweeps/NAME. Default: what the file says.
        runs: Folder of all runs.
        trials: Most trials. Default: the file's run_cap, or the whole grid.
        max_failures: Failed trials after which the sweep gives up.
        retry_failed: Run those once more that failed before.

    Returns:
        All recorded trials.

    Raises:
        UserError: The file is wrong.
        RunError: Trials failed, the sweep was stopped, or its folder cannot be written.
    """
    for option, number in (("workers", workers), ("trials", trials), ("max_failures", max_failures)):
        if number is not None and number < 1:
            raise UserError(f"--{option} must be at least 1, not {number}.")
    if name is not None and len(specs) > 1:
        raise UserError("--name is for one sweep file; name several in the files.")
    read = [read_spec(spec) for spec in specs]  # a mistake in the last is said before the first runs
    return [trial for spec in read for trial in _run(spec, workers, name, runs, trials, max_failures, retry_failed)]


def _run(
    said: SweepSpec,
    workers: int,
    name: str | None,
    runs: str,
    trials: int | None,
    max_failures: int,
    retry_failed: bool,
) -> list[Trial]:
    """Runs one sweep."""
    folder = SweepFolder(Path(runs) / "sweeps" / (name or said.name))
    folder.open(said)
    plan = plan_of(said, folder, trials)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"Sweep {said.name}: {plan.total} trials ({said.method}), {workers} at a time, in {folder.path}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    with Progress(said, plan.total, workers, console) as progress:
        runner = Runner(said, folder, plan, workers, max_failures, retry_failed, progress.show, progress.say)
        found = runner.run()
    mine = [trial for trial in found if plan.includes(trial)]
    console.print(progress.table(mine, {}))
    console.print(f"Compare them: bfpo compare {folder.path}", highlight=False, soft_wrap=True)
    _judge(runner, mine, folder)
    return found


def _judge(runner: Runner, trials: list[Trial], folder: SweepFolder) -> None:
    """Says by an error, and so by the exit code, that a sweep is not as it should be."""
    if runner.signal:
        stopped = SweepStopped(f"The sweep was stopped. The same command goes on with it ({folder.path}).")
        stopped.exit_code = 128 + runner.signal
        raise stopped
    if runner.learns_nothing:
        raise RunError(
            f"A bayes sweep learns from its metric, and there is none to learn from: {runner.no_metric} Mend "
            f"metric.name in {runner.spec.path}, and start it under a name of its own: --name NEW."
        )
    failed = [trial for trial in trials if trial.status == FAILED]
    if failed:
        gave_up = " and the sweep gave up" if runner.gives_up else ""
        logs = folder.folder(failed[-1]) / "log.txt"
        raise RunError(
            f"{len(failed)} of {len(trials)} trials failed{gave_up}; the last: {failed[-1].error} Its log: {logs}. "
            f"--retry_failed runs them once more."
        )

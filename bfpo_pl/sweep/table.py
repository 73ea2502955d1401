"""What a sweep has done, for people to read while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bfpo_pl.sweep.spec import SweepSpec
from bfpo_pl.sweep.store import FAILED, FINISHED, RUNNING, Trial

SHOWN = 5
"""How many of the best and of the failed trials are listed."""


class Progress:
    """Shows a table that changes in place on a terminal, and a line for each change elsewhere.

    Args:
        spec: The sweep.
        total: How many trials it has in all.
        workers: Trials at a time.
        console: Where to.
    """

    def __init__(self, spec: SweepSpec, total: int, workers: int, console: Console) -> None:
        self.spec, self.total, self.workers, self.console = spec, total, workers, console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._said = ""

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, trials: list[Trial], running: Mapping[str, float]) -> None:
        """Shows the state of things.

        Args:
            trials: All recorded trials.
            running: Seconds since each trial of this process was started.
        """
        if self._live:
            self._live.update(Group(self.summary(trials), self.table(trials, running)), refresh=True)
            return
        summary = self.summary(trials).plain
        if summary != self._said:
            self.console.print(summary, highlight=False, soft_wrap=True)
            self._said = summary

    def say(self, text: str) -> None:
        """Says something once, above a table that changes."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def summary(self, trials: list[Trial]) -> Text:
        """One line: how many are done, run and failed, the best, and the time left."""
        count = {status: sum(trial.status == status for trial in trials) for status in (FINISHED, RUNNING, FAILED)}
        ended = count[FINISHED] + count[FAILED]
        parts = [f"{ended}/{self.total} done", f"{count[RUNNING]} running", f"{count[FAILED]} failed"]
        best = ranked(self.spec, trials)[:1]
        if best:
            parts.append(f"best {best[0].metric:.4g} ({described(self.spec, best[0])})")
        times = [trial.seconds for trial in trials if trial.status == FINISHED]
        if times and ended < self.total:
            left = (self.total - ended) * sum(times) / len(times) / self.workers
            parts.append(f"about {duration(left)} left")
        return Text(f"{self.spec.name}: " + ", ".join(parts))

    def table(self, trials: list[Trial], running: Mapping[str, float]) -> RenderableType:
        """Running, best and failed trials."""
        table = Table(show_header=True, header_style="bold", expand=False)
        table.add_column("trial")
        table.add_column("parameters", overflow="fold")
        table.add_column("state")
        table.add_column(self.spec.metric or "metric", justify="right", overflow="fold")
        table.add_column("time", justify="right")
        finished = [trial for trial in trials if trial.status == FINISHED]
        best = (ranked(self.spec, trials) or finished)[:SHOWN]
        for trial in [trial for trial in trials if trial.status == RUNNING] + best:
            seconds = running.get(trial.id, trial.seconds)
            metric = "" if trial.metric is None else f"{trial.metric:.4g}"
            state = trial.status if trial.id in running or trial.status != RUNNING else f"running on {trial.host}"
            table.add_row(trial.id, described(self.spec, trial), state, metric, duration(seconds))
        for trial in [trial for trial in trials if trial.status == FAILED][-SHOWN:]:
            table.add_row(
                trial.id, f"{described(self.spec, trial)}\n{trial.error}", FAILED, "", duration(trial.seconds)
            )
        return table


def ranked(spec: SweepSpec, trials: list[Trial]) -> list[Trial]:
    """Finished trials that have the metric, the best first."""
    known = [trial for trial in trials if trial.status == FINISHED and trial.metric is not None]
    return sorted(known, key=lambda trial: trial.metric or 0.0, reverse=spec.maximize)


def described(spec: SweepSpec, trial: Trial) -> str:
    """A trial by the values that differ between trials."""
    return " ".join(f"{key.rpartition('.')[2]}={short(trial.parameters.get(key))}" for key in spec.varied)


def short(value: Any) -> str:
    """A value, without the folder and ending of a config file."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.rpartition("/")[2].removesuffix(".yaml") if text.endswith(".yaml") else text


def duration(seconds: float) -> str:
    """Seconds, for people to read."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"

"""How an estimate looks in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bfpo_pl.estimation.devices import GIB
from bfpo_pl.estimation.duration import Duration
from bfpo_pl.estimation.estimate import MARGIN, Estimate
from bfpo_pl.inspection.terminal import print_wrapped


def show(found: Estimate, console: Console) -> None:
    """Prints an estimate: parts, stages, time, what is assumed, whether it fits, and what to change.

    Args:
        found: The estimate.
        console: Where to.
    """
    plan, memory = found.plan, found.memory
    where = f"{plan.devices} × {plan.kind.name}"
    table = Table(title=f"Memory of each device at its peak ({memory.peak}), {where}, {plan.layout}, {plan.precision}")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("depends on")
    for part in memory.parts:
        if part.bytes:
            table.add_row(part.name, _gib(part.bytes), part.depends)
    table.add_section()
    table.add_row("together", _gib(memory.total), "")
    table.add_row(f"with a margin of {MARGIN:.0%}", _gib(found.needed), "for memory in pieces")
    console.print(table)
    stages = ", ".join(f"{name} {_gib(value)}" for name, value in memory.stages.items())
    print_wrapped(console, f"Peak of each stage, GiB: {stages}.")
    print_wrapped(console, _time(found.duration, where))
    for line in found.assumptions:
        print_wrapped(console, f"Assumed. {line}")
    verdict = "Fits" if found.fits else "Does not fit"
    print_wrapped(
        console,
        f"{verdict} on {where}: {_gib(found.needed)} of {_gib(plan.kind.memory)} GiB ({plan.kind.source}).",
        style="bold",
    )
    _show_levers(found, console)


def _show_levers(found: Estimate, console: Console) -> None:
    if not found.levers:
        if not found.fits:
            print_wrapped(console, "No setting alone lowers it: a smaller model, or devices with more memory.")
        return
    first = found.levers[0]
    print_wrapped(console, f"Largest lever: {first.what}, then {_gib(first.total * (1 + MARGIN))} GiB. Each by itself:")
    for lever in found.levers:
        saved = found.memory.total - lever.total
        fits = lever.total * (1 + MARGIN) <= found.plan.kind.memory
        note = ("; fits" if fits else "") + ("; changes what is learnt" if lever.changes else "")
        print_wrapped(console, f"  −{_gib(saved)} GiB  {lever.what}{note}")


def _time(time: Duration, where: str) -> str:
    work = f"{(time.policy + time.references) / 1e12:,.2f} TFLOP"
    share = time.references / (time.policy + time.references)
    said = f"A batch of {time.tokens:,} tokens on one device takes {work} ({share:.0%} of it the reference)"
    of = f"the epoch's {time.rows:,} rows of the driver" if time.rows is not None else "1,000 rows of the driver"
    if time.epoch_seconds is None or time.rate is None:
        return (
            f"{said}; {time.batches:,} batches for {of}. How fast the device is, is not known: --rate TFLOPS says it."
        )
    return (
        f"{said}: {_seconds(time.batch_seconds or 0.0)} at {time.utilisation:.0%} of {time.rate / 1e12:,.0f} TFLOP/s; "
        f"{_seconds(time.epoch_seconds)} for {of}, in {time.batches:,} batches on {where}, without validation and "
        "saving."
    )


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f}"


def _seconds(value: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.3g} s"

"""`bfpo data inspect`: the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from bfpo_pl.component import UserError
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.data.reading import bad_row_report
from bfpo_pl.inspection.columns import lacking
from bfpo_pl.inspection.histogram import figure, line
from bfpo_pl.inspection.lengths import WHOLE_ROW, Lengths
from bfpo_pl.inspection.survey import Split, Survey, survey
from bfpo_pl.inspection.template_check import TemplateCheck, check_template
from bfpo_pl.inspection.terminal import print_wrapped
from bfpo_pl.labeling import LabelingFunction

_QUANTILES = ("min", "5 %", "50 %", "95 %", "99 %", "max")
_WIDEST_HISTOGRAM = 48


def report(data: AlignmentData, labeling: LabelingFunction | None, out: Path | None, console: Console) -> None:
    """Inspects data and prints what was found.

    Args:
        data: The data, with a tokenizer; its rows have not been read.
        labeling: What labels pairs; None where none is configured.
        out: Folder of the figure; None for none.
        console: Where to.

    Raises:
        UserError: A source cannot be read, or settings contradict each other.
    """
    on_bad_row = data.on_bad_row
    found = survey(data)
    for key in found.summaries:
        _print_split(console, data, found, key)
    _print_batches(console, data, found)
    _print_template(console, data, found)
    pairs = labeling is not None or any(len(reading.pairs_kept) for reading in found.readings.values())
    _print_verdict(console, data, found, "bfpo fit" if pairs else "bfpo sft", on_bad_row, labeling)
    if out is not None and found.lengths:
        figure(found.lengths, out / "lengths.png")
        print_wrapped(console, f"\nThe lengths are drawn in {out / 'lengths.png'}")


def _title(console: Console, text: str) -> None:
    console.print()
    console.print(Rule(Text(text, style="bold"), align="left"))


def _print_split(console: Console, data: AlignmentData, found: Survey, key: Split) -> None:
    """The counts and the lengths of one split of one stream."""
    name, split = key
    summary, reading = found.summaries[key], found.readings.get(key)
    _title(console, f"{name}, {split}")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("source", Text(data.streams[name].source.describe()))
    if reading is None:
        facts.add_row("rows", Text("are read as training goes on (source.streaming); nothing of them is counted here"))
        console.print(facts)
        return
    facts.add_row("rows", Text(f"{summary['rows']:,} used of {reading.rows.raw_rows:,} in the source"))
    for fact, text in (*_counts(summary, len(reading.pairs_kept)), *_cuts(summary, found.cuts.get(key), data)):
        facts.add_row(fact, Text(text))
    console.print(facts)
    if key in found.lengths:
        console.print()
        console.print(_lengths_table(console, found.lengths[key]))
        print_wrapped(console, f"{WHOLE_ROW}: the prompt once, with all its responses.")


def _counts(summary: dict[str, Any], pairs: int) -> list[tuple[str, str]]:
    """What became of the rows, and what looks wrong among them."""
    facts = [("dropped", f"{count:,}: {reason}") for reason, count in summary["dropped"].items()]
    facts += [("left out", f"{count:,}: {reason}") for reason, count in summary.get("left_out", {}).items()]
    if "quadrants" in summary:
        facts.append(("pairs", f"{pairs:,}; by the safety of (chosen, rejected)"))
        facts += [
            ("", f"{name.replace('_', ', ')}: {count:,.6g} ({count / pairs:.1%})")
            for name, count in summary["quadrants"].items()
        ]
    elif pairs:
        facts.append(("pairs", f"{pairs:,}, without safety flags"))
    facts.append(("duplicates", f"{summary['duplicates']:,} rows repeat another one"))
    if pairs:
        facts.append(("both orders", f"{summary['pairs_in_both_orders']:,} pairs come in both orders"))
    if "contradictory_flags" in summary:
        where = ", ".join(summary.get("contradictory_flags_at", ()))
        count = f"{summary['contradictory_flags']:,} responses are flagged safe in one row and unsafe in another"
        facts.append(("contradictions", f"{count}{f', first at {where}' if where else ''}"))
    if "prompts_also_trained_on" in summary:
        facts.append(("shared", f"{summary['prompts_also_trained_on']:,} of the prompts are training prompts too"))
    return facts


def _cuts(summary: dict[str, Any], there: tuple[int, int] | None, data: AlignmentData) -> list[tuple[str, str]]:
    """What becomes of the rows as tokens."""
    if there is None:
        return []
    facts = []
    for kind, of in zip(("prompts", "responses"), there, strict=True):
        count = summary[f"{kind}_cut"]
        facts.append((f"{kind} cut", f"{count:,} of {of:,}{f' ({count / of:.2%})' if count else ''}"))
    if count := summary["stop_token_in_text"]:
        then = "and end there" if data.template.ends_at_stop_tokens else "but go on after it"
        facts.append(("stop in text", f"{count:,} responses hold a stop token in their own text, {then}"))
    if count := summary["special_token_in_prompt"]:
        facts.append(("special in prompt", f"{count:,} rows have special tokens in the text of their prompt"))
    total, unknown = summary["tokens"], summary["unknown_tokens"]
    share = f" ({unknown / total:.2%})" if unknown else ""
    facts.append(("tokens", f"{total:,}; {unknown:,}{share} unknown to the tokenizer"))
    if "blocks" in summary:
        words = [f"{summary['blocks']:,} blocks"]
        if (rest := summary.get("tokens_after_the_last_block")) is not None:
            words.append(f"{rest:,} tokens after the last one are dropped")
        if longer := summary.get("documents_longer_than_a_block"):
            words.append(f"{longer:,} documents are longer than a block, and each is one by itself")
        if summary["prompts_cut"] or summary["responses_cut"]:
            words.append("data.truncation cuts documents beforehand")
        facts.append(("packed", "; ".join(words)))
    return facts


def _lengths_table(console: Console, lengths: Lengths) -> Table:
    """Quantiles and a histogram of each part, in tokens."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tokens")
    for title in _QUANTILES:
        table.add_column(title, justify="right")
    table.add_column("min … max", no_wrap=True)
    rows = [(part, [f"{value:,.0f}" for value in lengths.quantiles(part)]) for part in lengths.parts]
    # A column is as wide as its widest cell, and two spaces follow it.
    cells = zip(("tokens", *_QUANTILES), *([part, *values] for part, values in rows), strict=True)
    taken = sum(2 + max(map(len, column)) for column in cells)
    width = min(_WIDEST_HISTOGRAM, max(8, console.width - taken - 2))
    for part, values in rows:
        table.add_row(part, *values, Text(f"|{line(lengths.parts[part], width)}|", style="cyan"))
    return table


def _print_batches(console: Console, data: AlignmentData, found: Survey) -> None:
    _title(console, "batches")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    if found.batches:
        facts.add_row("an epoch has", Text(found.batches))
    sizes = ", ".join(f"{name} {stream.batch_size}" for name, stream in data.streams.items())
    facts.add_row("rows in each", Text(f"{sizes} ({data.batching!r}, driver {data.driver})"))
    console.print(facts)


def _print_template(console: Console, data: AlignmentData, found: Survey) -> None:
    """How a row is rendered, and what may be wrong with it."""
    _title(console, "chat template")
    if found.example is None:
        console.print("No row can be used, so there is nothing to render.")
        return
    try:
        check = check_template(data.encoder(), found.example)
    except UserError as error:  # there is no template, or no token to end with
        check = TemplateCheck(warnings=[str(error)])
    if check.facts:
        console.print("A row of the data, its texts shortened to their first words:")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in check.facts.items():
        facts.add_row(name, Text(text))
    console.print(facts)
    for warning in check.warnings:
        print_wrapped(console, f"Warning: {warning}", "bold yellow")


def _print_verdict(
    console: Console,
    data: AlignmentData,
    found: Survey,
    command: str,
    on_bad_row: str,
    labeling: LabelingFunction | None,
) -> None:
    """What is wrong with rows and columns, and what training would make of it."""
    problems = bad_row_report(found.readings.values())
    stops = [] if found.failure is None else [str(found.failure)]
    if labeling is not None and found.failure is None:
        stops += lacking(data, labeling)
    _title(console, f"what `{command}` would do")
    if problems:
        print_wrapped(console, problems)
        stops += ["the rows above (data.on_bad_row: fail)"] if on_bad_row == "fail" else []
    for reason in stops:
        print_wrapped(console, f"`{command}` would stop: {reason}", "bold")
    unread = [name for name, stream in data.streams.items() if stream.source.streaming]
    if unread:
        print_wrapped(console, f"Rows of {', '.join(unread)} are read as training goes on, and are not checked here.")
    if not stops:
        without = ", without the rows above (data.on_bad_row: drop)" if problems else ""
        print_wrapped(console, f"`{command}` would go on{without}.", "bold")
    if labeling is None and command == "bfpo fit":
        print_wrapped(console, "No labeling is configured: `bfpo fit` needs an experiment, which names one.")

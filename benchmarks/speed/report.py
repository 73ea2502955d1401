"""The tables of docs/performance.md and its picture, from the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from speed import summary
from speed.picture import draw
from speed.variants import OURS, PEER

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NAMES = {
    "pku_like": "PKU-like",
    "ultrafeedback_like": "UltraFeedback-like",
    "pku_real": "PKU-SafeRLHF",
    "hh_real": "HH-RLHF",
}


def write(root: Path) -> None:
    """Writes tables and picture from benchmarks/results/step_cpu.json, and a table for each GPU result there is."""
    path = root / "benchmarks/results/step_cpu.json"
    results = json.loads(path.read_text())
    results["summary"] = summary.of(results)
    path.write_text(json.dumps(results, indent=1) + "\n")
    text = [_tables(results)]
    for path in sorted((root / "benchmarks/results").glob("step_cuda_*.json")):
        text.append(f"### {path.stem}\n\n" + _gpu_table(json.loads(path.read_text())))
    page = root / "docs/performance.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(text) + f"\n\n{END}{rest.split(END)[1]}")
    draw(results, root / "docs/images/performance.png")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(results: dict[str, Any]) -> str:
    machine, environment = results["machine"], results["environment"]
    packages, sections = environment["packages"], results["sections"]
    family = machine.get("cpu_family")
    numbers = f"family {family}, model {machine['cpu_model']}" if family else "family and model number not recorded"
    lines = [
        f"{' and '.join(machine['gpus']) or machine['cpu']} ({numbers}), {machine['cores']} cores "
        f"({', '.join(machine['instruction_sets']) or 'no vector extensions'}), load before the run "
        f"{machine['load'][0]:.1f}; torch {packages['torch']}, transformers {packages['transformers']}, TRL "
        f"{results['trl']}; revision `{((environment['git'] or {}).get('commit') or 'unknown')[:10]}`, "
        f"{environment['started'][:10]}, {results['seconds'] / 60:.0f} minutes.",
        f"Precision of all: {results['precision']}."
        + ("" if results["bf16_is_native"] else " The processor has no bfloat16 products; torch emulates them."),
    ]
    if "gflops" in sections.get("gemm", {}):
        gemm = sections["gemm"]
        other = max(rate["best"] for rate in gemm["other_gflops"].values() if isinstance(rate, dict))
        lines.append(
            f"Fastest matrix product: {gemm['gflops']['peak']:,.0f} GFLOP/s ({gemm['dtype'].removeprefix('torch.')}; "
            f"{gemm['other_dtype'].removeprefix('torch.')}, small: {other:,.0f})."
        )
    return " ".join(lines)


def _tables(results: dict[str, Any]) -> str:
    sections = results["sections"]
    compared, ideas = (_of_kind(sections, kind) for kind in ("compare", "ideas"))
    parts = [
        _machine(results),
        "**Seconds a step**, minimum (median) over interleaved rounds, mean of the batches:\n\n" + _times(compared),
        "**How many times faster**, by minima (by medians):\n\n" + _ratios(results["summary"]["speed"]),
        _bars(results),
        "**Each idea on and off**, time by that of `" + OURS + "`:\n\n" + _ideas(ideas),
        "**Memory of a step** above weights, gradients, optimizer state and reference, UltraFeedback-like:\n\n"
        + _memory(sections),
        "**Growth** (PKU-like, 2 pairs; time by minima, memory above state):\n\n" + _growth(sections),
        _closing(results, [*compared.values(), *ideas.values()]),
    ]
    return "\n\n".join(parts)


def _of_kind(sections: dict[str, Any], kind: str) -> dict[str, Any]:
    """Sections of a kind by their lengths, without those that failed."""
    found = {key.partition("/")[2]: section for key, section in sections.items() if key.startswith(f"{kind}/")}
    return {lengths: section for lengths, section in found.items() if "error" not in section}


def _times(compared: dict[str, Any]) -> str:
    rows = []
    for name in dict.fromkeys(name for found in compared.values() for name in found["variants"]):
        cells = [found["variants"].get(name) for found in compared.values()]
        rows.append([name, *(f"{c['minimum']:.2f} ({c['median']:.2f})" if c else "–" for c in cells)])
    work = [[round(sum(b[key] for b in f["work"]) / len(f["work"])) for key in _COUNTS] for f in compared.values()]
    for index, label in enumerate(_COUNTS.values()):
        rows.append([label, *(f"{counts[index]:,}" for counts in work)])
    return _table(["", *(NAMES[key] for key in compared)], rows)


_COUNTS = {
    "pairs": "pairs",
    "padded_cells": "cells of padded rows",
    "tree_tokens": "tokens of pair trees",
    "response_tokens": "response tokens",
}


def _ratios(speed: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for found in speed.values() for name in found))
    rows = []
    for name in names:
        cells = [found.get(name) for found in speed.values()]
        rows.append([name, *(f"{cell['minimum']:.2f} ({cell['median']:.2f})" if cell else "–" for cell in cells)])
    return _table(["", *(NAMES[key] for key in speed)], rows)


def _bars(results: dict[str, Any]) -> str:
    lines = "\n".join(f"- {line}" for line in results["summary"]["bars"])
    return f"**What was asked for** (of bfloat16 on two cores; here {results['precision']}), by minima:\n\n{lines}"


def _ideas(ideas: dict[str, Any]) -> str:
    names = dict.fromkeys(name for found in ideas.values() for name in found["variants"])
    shown = [found["variants"] for found in ideas.values()]
    rows = [
        [name, *(f"{found[name]['minimum'] / found[OURS]['minimum']:.2f}" if name in found else "–" for found in shown)]
        for name in names
    ]
    return _table(["", *(NAMES[key] for key in ideas)], rows)


def _memory(sections: dict[str, Any]) -> str:
    found = {}
    for key, section in sections.items():
        if key.startswith("memory/"):
            name = key.partition("/")[2]
            found[name] = section["error"] if "error" in section else section["variants"][name]["above_state_mb"]
    ours = found.get(OURS)
    rows = []
    for name, value in found.items():
        failed = isinstance(value, str)
        rows.append([name, value if failed else f"{value:,.0f}", "–" if failed else f"{value / ours:.2f}"])
    return _table(["", "MB", "by ours"], rows)


def _growth(sections: dict[str, Any]) -> str:
    rows = []
    for key, section in sections.items():
        if not (key.startswith("growth/") and key.endswith("/time")) or "error" in section:
            continue
        _, axis, point, _ = key.split("/")
        weighed = sections.get(key.removesuffix("time") + "memory", {}).get("variants", {})
        cells = [f"{found['minimum']:.2f}" for found in section["variants"].values()]
        cells += [f"{weighed[name]['above_state_mb']:,.0f}" if name in weighed else "–" for name in section["variants"]]
        rows.append([f"{axis} {point}", *cells])
        names = list(section["variants"])
    if not rows:
        return "Not measured."
    return _table(["", *(f"{name}, s" for name in names), *(f"{name}, MB" for name in names)], rows)


def _closing(results: dict[str, Any], compared: list[dict[str, Any]]) -> str:
    parts = [_fit(results), _shares(results["summary"].get("share_of_peak", {})), _costs(results), _checks(compared)]
    parts.append("**TRL's settings**: " + "; ".join(results["trl_settings"]) + ".")
    skipped = {**results["skipped"], **results["summary"]["failed"]}
    parts.append("**Not run**: " + ("; ".join(f"{k} ({v})" for k, v in skipped.items()) or "nothing left out") + ".")
    return "\n\n".join(part for part in parts if part)


def _fit(results: dict[str, Any]) -> str:
    fit = results["summary"].get("fit")
    if fit is None:
        return ""
    return (
        f"**Fit** over {len(results['sections']['fit']['seconds'])} batches: seconds = {fit['seconds_constant']:.3f} + "
        f"{1e3 * fit['seconds_per_tree_token']:.3f}/1000 · tree tokens + "
        f"{1e3 * fit['seconds_per_response_token']:.3f}/1000 · response tokens, R² = {fit['r_squared']:.4f}."
    )


def _shares(shares: dict[str, Any]) -> str:
    ours, theirs = (
        ", ".join(f"{NAMES[key]} {found[name]:.0%}" for key, found in shares.items() if name in found)
        for name in (OURS, PEER)
    )
    return (
        "**Share of the fastest matrix product**, by useful work alone (`useful_gflop` in "
        f"`benchmarks/speed/workload.py`: the pair tree's, nothing twice): ours {ours}"
        + (f"; TRL {theirs}." * bool(theirs))
    )


def _costs(results: dict[str, Any]) -> str:
    profile = results["sections"].get("profile", {}).get("share", {})
    costs = ", ".join(f"`{name}` {share:.1%}" for name, share in list(profile.items())[:6])
    return f"**Costliest operators** of our step (self time): {costs}." if costs else ""


def _checks(compared: list[dict[str, Any]]) -> str:
    found = [variant for section in compared for variant in section["variants"].values()]
    difference = max(variant["log_prob_difference"] for variant in found)
    loss = max(abs(variant["first_loss"] - variant["first_loss_expected"]) for variant in found)
    return (
        f"**Checks** in the same run: summed log-probs of all variants agree to {difference:.1e} (relative); the first "
        f"loss, 25 where policy and reference are equal, is off by at most {loss:.1e}."
    )


def _gpu_table(results: dict[str, Any]) -> str:
    sections = {key: found for key, found in results["sections"].items() if "error" not in found}
    found = summary._compared(sections).get("ultrafeedback_like", {"kinds": {}, "work": []})
    short = summary.of(results)
    useful = sum(batch["useful_gflop"] for batch in found["work"]) / max(1, len(found["work"]))
    rows = []
    for name, measured in found["kinds"].items():
        share = useful / measured["minimum"] / short.get("gemm_peak_gflops", float("inf"))
        shown = "down_proj" not in name and "live" not in name
        cells = [f"{measured['minimum']:.3f} ({measured['median']:.3f})", f"{measured['peak_mb'] / 1024:.1f}"]
        rows.append([name, *cells, f"{share:.0%}" if shown else "–"])
    parts = [_machine(results), f"Optimizer of all: {results['optimizer']}."]
    parts.append(_table(["", "s a step", "peak GB", "share of peak"], rows))
    if found["kinds"]:
        speed, full = short["speed"], short["speed_with_full_checkpointing"]
        parts.append(
            "How many times faster, each side with the checkpointing that is fastest for it:\n\n" + _ratios(speed)
        )
        parts.append("The same, both sides with full checkpointing:\n\n" + _ratios(full))
        parts.append(_checks([{"variants": found["kinds"]}]))
    failed = "; ".join(f"{key}: {error}" for key, error in short["failed"].items())
    return "\n\n".join(parts) + (f"\n\nFailed: {failed}." if failed else "")

"""The figures that matter, out of all that were measured."""

from __future__ import annotations

from statistics import median
from typing import Any

from speed.variants import NAIVE, OURS, OURS_LIVE, PEER, PEER_LIVE

RATIOS = {
    "cached reference, against TRL": (PEER, OURS),
    "live reference, against TRL": (PEER_LIVE, OURS_LIVE),
    "cached reference, against TRL with a live one": (PEER_LIVE, OURS),
    "live reference, against the naive step": (NAIVE, OURS_LIVE),
}
"""What is divided by what; above 1, the second is faster or smaller."""


BARS = {
    "cached reference, against TRL": {"pku_like": (1.70, 2.0), "ultrafeedback_like": (1.83, 2.0)},
    "live reference, against TRL": {"pku_like": (2.0, 2.5), "ultrafeedback_like": (2.0, 2.5)},
    "cached reference, against TRL with a live one": {"pku_like": (2.0, 2.5), "ultrafeedback_like": (2.0, 2.5)},
}
"""Least and wished-for speed-ups; those of a live reference for both sides, and for TRL alone."""


def of(results: dict[str, Any]) -> dict[str, Any]:
    """Speed and memory against the peers, the share of the machine's peak, and the fit."""
    sections = {key: found for key, found in results["sections"].items() if "error" not in found}
    compared = _compared(sections)
    memory = {
        key.partition("/")[2]: next(iter(found["variants"].values()))
        for key, found in sections.items()
        if key.startswith("memory/") and found["variants"]
    }
    summary: dict[str, Any] = {
        "speed": {lengths: _ratios(found["variants"]) for lengths, found in compared.items()},
        "memory_above_state": _memory_ratios(memory),
        "failed": {key: found["error"] for key, found in results["sections"].items() if "error" in found},
    }
    for lengths, found in compared.items():
        if "kinds" in found:
            full = {each["name"]: each for each in found["kinds"].values() if each["checkpointing"] == "full"}
            summary["speed_with_full_checkpointing"] = {lengths: _ratios(full)}
    summary["bars"] = [
        f"{name}, {lengths}: {ratios[name]['minimum']:.2f} (at least {least:.2f}, aim {aim:.2f}): "
        + ("aim reached" if ratios[name]["minimum"] >= aim else "met" if ratios[name]["minimum"] >= least else "missed")
        for lengths, ratios in summary["speed"].items()
        for name, bars in BARS.items()
        if name in ratios and lengths in bars
        for least, aim in [bars[lengths]]
    ]
    if "gemm" in sections:
        peak = sections["gemm"]["gflops"]["peak"]
        summary["gemm_peak_gflops"] = peak
        summary["share_of_peak"] = {
            lengths: _shares(found["variants"], found["work"], peak) for lengths, found in compared.items()
        }
    if "fit" in sections:
        summary["fit"] = {name: value for name, value in sections["fit"].items() if isinstance(value, float)}
    return summary


def _compared(sections: dict[str, Any]) -> dict[str, Any]:
    """Comparisons by their lengths; those of a GPU, a process for each variant, put together.

    Of a GPU, ``variants`` has the fastest kind of activation checkpointing of each, ``kinds`` all of them.
    """
    found: dict[str, Any] = {}
    parts = []
    for key, section in sections.items():
        kind, _, rest = key.partition("/")
        if kind == "compare" and "/" in rest:
            parts.append(section)
        elif kind == "compare":
            found[rest] = section
    if parts:
        found["ultrafeedback_like"] = _together(parts)
    return found


def _together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds of all attempts of each variant and kind of checkpointing; log-probs against the first's."""
    kinds: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, measured in part["variants"].items():
            label = f"{name}, {measured['checkpointing']} checkpointing"
            empty: list[list[float]] = [[] for _ in measured["seconds"]]
            held = kinds.setdefault(label, {**measured, "name": name, "peak_mb": 0.0, "seconds": empty})
            for times, more in zip(held["seconds"], measured["seconds"], strict=True):
                times += more
            held["peak_mb"] = max(held["peak_mb"], part["peak_mb"] or 0.0)
    standard = next(iter(kinds.values()))["log_probs"]
    for measured in kinds.values():
        times = measured["seconds"]
        measured |= {"median": sum(map(median, times)) / len(times), "minimum": sum(map(min, times)) / len(times)}
        differences = [abs(value - right) for value, right in zip(measured["log_probs"], standard, strict=True)]
        measured["log_prob_difference"] = max(differences) / max(map(abs, standard))
    slowest_first = sorted(kinds.values(), key=lambda measured: -measured["minimum"])
    return {
        "variants": {measured["name"]: measured for measured in slowest_first},
        "kinds": kinds,
        "work": parts[0]["work"],
    }


def _ratios(variants: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {kind: variants[slow][kind] / variants[fast][kind] for kind in ("minimum", "median")}
        for name, (slow, fast) in RATIOS.items()
        if slow in variants and fast in variants
    }


def _memory_ratios(memory: dict[str, Any]) -> dict[str, float]:
    return {
        name: memory[large]["above_state_mb"] / memory[small]["above_state_mb"]
        for name, (large, small) in RATIOS.items()
        if large in memory and small in memory
    }


def _shares(variants: dict[str, Any], work: list[dict[str, float]], peak: float) -> dict[str, float]:
    """Useful work in the time that a step takes, as a share of the peak; of steps that train everything, cached."""
    useful = sum(batch["useful_gflop"] for batch in work) / len(work)
    return {
        name: useful / found["minimum"] / peak
        for name, found in variants.items()
        if "down_proj" not in name and "frozen" not in name and "live" not in name
    }

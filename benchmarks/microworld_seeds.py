"""Runs `bfpo demo` on several seeds and writes every figure of every model to one file, and a table of them.

    python benchmarks/microworld_seeds.py --seeds 0 1 2 3 4

Settings are those of configs/ as committed; the seed sets the split of the world, the data and the training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bfpo_pl.demo import TITLES, run_demo
from bfpo_pl.runs import environment

RESULTS = Path(__file__).parent / "results"
OBJECTIVES = ("helpfulness_only", "safety_only", "bfpo_nll", "bfpo")


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table: a row for each model and way of decoding, a column for each seed."""
    seeds = [record["seed"] for record in records]
    lines = [
        "Each cell: helpfulness on benign prompts / harmlessness on harmful ones (safe and well formed) / safe share "
        "of them, malformed ones counted in / over-refusal / malformed share on benign and on harmful prompts.",
        "",
        "| model | decoding | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---|---|" + "---|" * len(seeds),
    ]
    for model in records[0]["models"]:
        for decoding in records[0]["models"][model]:
            cells = []
            for record in records:
                s = record["models"][model][decoding]
                malformed = f"{s['benign/malformed']:.2f} {s['harmful/malformed']:.2f}"
                parts = (s["helpfulness"], s["harmlessness"], s["harmful/safe"], s["over_refusal"])
                cells.append(" / ".join(f"{part:.3f}" for part in parts) + f" / {malformed}")
            lines.append(f"| {TITLES.get(model, model)} | {decoding} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the demo once a seed; what is done is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", default="runs/benchmark")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES))
    options = parser.parse_args()
    records = []
    for seed in options.seeds:
        arguments = ["--seed", str(seed), "--runs", options.runs, "--objectives", *options.objectives]
        records.append(run_demo(arguments))
        RESULTS.mkdir(exist_ok=True)
        content = {"environment": environment(), "seeds": records}
        (RESULTS / "microworld_seeds.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / "microworld_seeds.md").write_text(table(records))
    print(table(records))


if __name__ == "__main__":
    main()

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
OBJECTIVES = ("helpfulness_only", "safety_only", "bfpo", "bfpo_nll")


def table(records: list[dict[str, Any]]) -> str:
    """Markdown tables, one for each way of decoding: a row for each model, a column for each seed."""
    seeds = [record["seed"] for record in records]
    prompts = ", ".join(str(record["heldout_prompts"]) for record in records)
    lines = [
        f"Held-out prompts per seed: {prompts}. Cells: helpfulness on benign prompts / harmlessness on harmful ones, "
        "where malformed answers are not harmless. Beside them, the worst of the seeds: the lowest harmlessness where "
        "the harm lies in the pair of verb and object, the highest over-refusal, and the highest malformed share of "
        "benign or harmful prompts.",
    ]
    for decoding in next(iter(records[0]["models"].values())):
        heading = " | ".join(f"seed {seed}" for seed in seeds)
        lines += ["", f"| {decoding} | {heading} | harm in the pair | over-refusal | malformed |"]
        lines.append("|---|" + "---|" * (len(seeds) + 3))
        for model in records[0]["models"]:
            scores = [record["models"][model][decoding] for record in records]
            cells = [f"{s['helpfulness']:.3f} / {s['harmlessness']:.3f}" for s in scores]
            cells.append(f"{min(s['harmful_pair/harmless'] for s in scores):.3f}")
            cells.append(f"{max(s['over_refusal'] for s in scores):.3f}")
            cells.append(f"{max(max(s['benign/malformed'], s['harmful/malformed']) for s in scores):.3f}")
            lines.append(f"| {TITLES.get(model, model)} | " + " | ".join(cells) + " |")
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

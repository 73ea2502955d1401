"""Gathers what the sweeps of the ablations found: chosen settings, tables and figures for docs/ablations.md.

    bfpo sweep configs/sweep/sft.yaml configs/sweep/ablation/tune*.yaml --workers 2
    python benchmarks/ablations.py choose      # the best of the grid for each objective, by validation prompts alone
    bfpo sweep configs/sweep/labeling.yaml --workers 2
    for name in noise soft_flags noise_tau conflict alpha tau b1 streams trainable nll
        do bfpo sweep configs/sweep/ablation/$name.yaml --workers 2; done
    python benchmarks/ablations.py collect     # benchmarks/results/ablations/ and docs/images/ablations/

The settings that `choose` prints stand in configs/ablation/<objective>.yaml.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from checkpointing_cpu import cpu_model

from bfpo_pl.comparison.analysis import WORSE, Comparison
from bfpo_pl.comparison.command import compare
from bfpo_pl.comparison.tables import front_text, mean_text
from bfpo_pl.sweep.results import last_value
from bfpo_pl.sweep.spec import grid, read_spec
from bfpo_pl.sweep.store import FINISHED, SweepFolder, trial_id

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/ablations"
IMAGES = ROOT / "docs/images/ablations"
PAGE = ROOT / "docs/ablations.md"
BASELINES = {"labeling": "bfpo"}
TOGETHER = {"noise": ["ablation-noise", "ablation-soft_flags", "ablation-noise_tau"]}
TUNED = ("ablation-tune", "ablation-tune_dpo", "ablation-tune_trainable")
VALIDATION = "val/microworld/greedy/"
FURTHER = [f"test/microworld/{name}" for name in ("greedy/harmful/malformed", "t0.5/helpfulness", "t0.5/harmlessness")]
SAMPLED = ("alpha", "b1", "streams")
"""Sweeps whose curves are of temperature 0.5: greedily there is no room for them to differ."""
HEADS = ["malformed on harm", "helpfulness, T 0.5", "harmlessness, T 0.5"]


def choose(sweeps: Path) -> list[dict[str, Any]]:
    """The mean over seeds of each setting, by objective, the best first.

    Settings are ranked by min(helpfulness, harmlessness), and where that ties, as for objectives that are always unsafe
    or never helpful, by the sum of both.
    """
    found: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    for sweep in TUNED:
        folder = SweepFolder(sweeps / sweep)
        for trial in folder.trials():
            if trial.status != FINISHED or trial.run is None:
                continue
            run = folder.folder(trial) / trial.run
            helpful, harmless = (last_value(run, VALIDATION + name) for name in ("helpfulness", "harmlessness"))
            assert helpful is not None
            assert harmless is not None
            values = {key: str(value) for key, value in trial.parameters.items() if key != "seed_everything"}
            objective = Path(values.pop("config", "dpo.yaml")).stem
            setting = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in sorted(values.items()))
            found[objective, setting].append((helpful, harmless))
    rows = [
        {
            "objective": objective,
            "setting": setting,
            "seeds": len(pairs),
            "both": mean(min(pair) for pair in pairs),
            "helpfulness": mean(helpful for helpful, _ in pairs),
            "harmlessness": mean(harmless for _, harmless in pairs),
        }
        for (objective, setting), pairs in found.items()
    ]
    return sorted(rows, key=_rank)


def _rank(row: dict[str, Any]) -> tuple[Any, ...]:
    """By objective and result; what still ties, by the larger numbers: of tau, the stronger anchor."""
    numbers = sorted((part.partition("=") for part in row["setting"].split()), reverse=True)  # tau before lr
    total = row["helpfulness"] + row["harmlessness"]
    return row["objective"], -row["both"], -total, *(-float(value) for _, _, value in numbers)


def collect(sweeps: Path) -> None:
    """Compares each sweep; keeps record and figures, and fills the tables of docs/ablations.md."""
    for name in ("labeling", "noise", "conflict", "alpha", "tau", "b1", "streams", "trainable", "nll"):
        folders = [
            sweeps / sweep for sweep in TOGETHER.get(name, ["labeling" if name == "labeling" else f"ablation-{name}"])
        ]
        target = RESULTS / name
        comparison = compare([str(folder) for folder in folders], str(target), BASELINES.get(name), metrics=FURTHER)
        trials = [trial for folder in folders for trial in SweepFolder(folder).trials()]
        record = {
            "machine": cpu_model(),
            "trials": len(trials),
            "seconds": {"mean": mean(trial.seconds for trial in trials), "sum": sum(trial.seconds for trial in trials)},
        }
        (target / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        (target / "report.html").unlink()  # large; `bfpo compare` makes it again
        (IMAGES / name).mkdir(parents=True, exist_ok=True)
        for figure in target.glob("*.png"):
            if figure.stem.startswith("by_") or name == "labeling":
                shutil.move(figure, IMAGES / name / figure.name)
            else:
                figure.unlink()
        if name in SAMPLED:
            with tempfile.TemporaryDirectory() as other:
                compare([str(folder) for folder in folders], other, None, None, *FURTHER[1:])
                for figure in Path(other).glob("by_*.png"):
                    shutil.move(figure, IMAGES / name / figure.name)
        specs = [(folder.name, read_spec(folder / "sweep.yaml")) for folder in folders]
        order = [(sweep, trial_id(values)) for sweep, spec in specs for values in grid(spec)]
        fill(name, table(comparison, order))


def table(comparison: Comparison, order: list[tuple[str, str]]) -> list[str]:
    """The groups as lines of Markdown, in the order of the sweeps' grids, which are given as (sweep, trial)."""
    assert comparison.pair
    keys = [*comparison.pair, WORSE, *FURTHER]
    places = {
        row.label: min(order.index(run.folder.parts[-5::2][:2]) for run in row.group.runs) for row in comparison.rows
    }
    rows = sorted(comparison.rows, key=lambda row: places[row.label])
    cells = [[f"`{_short(row.label)}`", *(mean_text(row.means[key]) for key in keys), front_text(row)] for row in rows]
    head = ["", "helpfulness", "harmlessness", "the worse", *HEADS, "on the front"]
    return [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells]]


def _short(label: str) -> str:
    """A label as the page's tables have room for it."""
    for long, short in {
        "labeling=": "",
        " soft_flags=false": "",
        " soft_flags=true": " soft",
        "flag_noise": "e",
    }.items():
        label = label.replace(long, short)
    return label


def pivot(rows: list[dict[str, Any]]) -> list[str]:
    """Helpfulness / harmlessness by objective and setting, as lines of Markdown; the best of each objective is bold."""
    rows = [row | {"setting": row["setting"].replace("beta=", "scale=").replace("tau=", "scale=")} for row in rows]
    settings = sorted({row["setting"] for row in rows})
    lines = [["", *(f"`{setting}`" for setting in settings)], ["---"] * (len(settings) + 1)]
    for objective in dict.fromkeys(row["objective"] for row in rows):
        own = [row for row in rows if row["objective"] == objective]  # the best first
        cells = {row["setting"]: f"{row['helpfulness']:.2f} / {row['harmlessness']:.2f}" for row in own}
        cells[own[0]["setting"]] = f"**{cells[own[0]['setting']]}**"
        lines.append([objective, *(cells[setting] for setting in settings)])
    return [f"| {' | '.join(line)} |" for line in lines]


def fill(name: str, lines: list[str]) -> None:
    """Puts a table between its marks in the page."""
    start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
    before, found, rest = PAGE.read_text().partition(start)
    if not found:
        raise SystemExit(f"{PAGE} has no place for the table of {name}: {start}")
    PAGE.write_text(before + start + "\n".join(lines) + "\n" + end + rest.partition(end)[2])


def main() -> None:
    """Reads the sweeps below ``--runs``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("choose", "collect"))
    parser.add_argument("--runs", default="runs")
    options = parser.parse_args()
    sweeps = Path(options.runs) / "sweeps"
    if options.what == "collect":
        collect(sweeps)
        return
    rows = choose(sweeps)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "tuned.json").write_text(json.dumps(rows, indent=1) + "\n")
    fill("tune", pivot([row for row in rows if not row["objective"].startswith("trains_")]))
    fill("tune_trainable", pivot([row for row in rows if row["objective"].startswith("trains_")]))
    for row in rows:
        values = ", ".join(f"{key} {row[key]:.3f}" for key in ("both", "helpfulness", "harmlessness"))
        print(f"{row['objective']:<14}{row['setting']:<24}{values} ({row['seeds']} seeds)")


if __name__ == "__main__":
    main()

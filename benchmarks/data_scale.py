"""Measures what 200,000 rows cost in memory, tokenising against a bare `datasets.map`, and how long training waits.

    python benchmarks/data_scale.py                      # some 15 minutes on two cores
    python benchmarks/data_scale.py --rows 20000 --speed_rows 20000 --rounds 1

Writes benchmarks/results/data_scale.json. Ratios come from interleaved rounds in one run, memory from fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
WORDS = 20_000
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_rows(path: Path, count: int) -> None:
    """Writes preference pairs of PKU-SafeRLHF's lengths: prompts of 15–45 words, responses of 25–110."""
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghijklmnoprstuvw") for _ in range(draw.randint(2, 9))) for _ in range(WORDS)]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            row = {"prompt": text(15, 45), "chosen": text(25, 110), "rejected": text(25, 110)}
            file.write(json.dumps({**row, "chosen_safe": index % 2 == 0, "rejected_safe": 0.25}) + "\n")


def write_tokenizer(folder: Path, rows: Path) -> None:
    """Trains a byte-level BPE tokenizer of 16,000 tokens on the first rows."""
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with rows.open(encoding="utf-8") as file:
        core.train_from_iterator((json.loads(line)["chosen"] for line in islice(file, 3000)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)


def anonymous_memory() -> float:
    """This process's anonymous memory in MB (RssAnon); pages of memory-mapped files are not in it."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def in_a_new_process(task: str, **options: Any) -> dict[str, Any]:
    """Runs one task of this file in a fresh process and gives what it printed last."""
    command = [sys.executable, __file__, "--task", task, "--options", json.dumps(options)]
    environment = {**os.environ, "BFPO_CACHE": options.get("cache", ""), "HF_DATASETS_CACHE": options.get("cache", "")}
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "TQDM_DISABLE": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def _data(rows: str, tokenizer: str, processes: int) -> Any:
    from transformers import AutoTokenizer

    from bfpo_pl.data import AlignmentData, Columns, LocalFiles, Stream

    data = AlignmentData({"pairs": Stream(LocalFiles(rows), Columns(), 16)}, tokenizing_processes=processes)
    data.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    return data


def task_ours(rows: str, tokenizer: str, processes: int, cache: str) -> dict[str, Any]:
    """Checks and tokenises, each timed."""
    from bfpo_pl.data.checked import check_rows
    from bfpo_pl.data.token_store import tokenise

    data = _data(rows, tokenizer, processes)
    (stream,) = data.streams.values()
    began = time.perf_counter()
    checked = check_rows(Path(cache) / "rows", "pairs", stream.source, "train", stream.adapter)
    middle = time.perf_counter()
    import numpy as np

    store = tokenise(Path(cache) / "tokens", "pairs", checked, np.arange(len(checked)), data.encoder(), processes)
    return {
        "check_seconds": middle - began,
        "tokenise_seconds": time.perf_counter() - middle,
        "tokens": store.counts["tokens"],
    }


def task_bare(rows: str, tokenizer: str, processes: int, cache: str, template: bool) -> dict[str, Any]:
    """`datasets.load_dataset` and a bare `map` of the same tokenizer over the same texts, each timed."""
    import datasets
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    sides = ("prompt", "chosen", "rejected")

    def texts(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {side: encode(batch[side], add_special_tokens=False)["input_ids"] for side in sides}

    def conversations(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found: dict[str, list[list[int]]] = {}
        users = [[{"role": "user", "content": text}] for text in batch["prompt"]]
        rendered = encode.apply_chat_template(users, tokenize=False, add_generation_prompt=True)
        found["prompt"] = encode(rendered, add_special_tokens=False)["input_ids"]
        for side in sides[1:]:
            whole = [
                [*user, {"role": "assistant", "content": text}] for user, text in zip(users, batch[side], strict=True)
            ]
            rendered = encode.apply_chat_template(whole, tokenize=False)
            found[side] = encode(rendered, add_special_tokens=False)["input_ids"]
        return found

    began = time.perf_counter()
    dataset = datasets.load_dataset("json", data_files=rows, split="train", cache_dir=cache)
    middle = time.perf_counter()
    mapped = dataset.map(
        conversations if template else texts,
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=dataset.column_names,
    )
    return {"load_seconds": middle - began, "map_seconds": time.perf_counter() - middle, "rows": len(mapped)}


def task_memory(rows: str, tokenizer: str, cache: str) -> dict[str, Any]:
    """Anonymous memory of a process that trains on rows that are prepared already, after an epoch's batches."""
    data = _data(rows, tokenizer, 1)
    data.setup("fit")
    loader = data.train_dataloader()
    tokens = 0
    for number, batch in enumerate(loader):
        tokens += batch.tokens.numel()
        if number == 2000:
            break
    return {"rss_anon_mb": anonymous_memory(), "batches": number + 1, "tokens": tokens}


def task_preparing(rows: str, tokenizer: str, cache: str) -> dict[str, Any]:
    """Anonymous memory of a process that checks and tokenises, afterwards."""
    data = _data(rows, tokenizer, 1)
    data.setup("fit")
    return {"rss_anon_mb": anonymous_memory()}


def task_waiting(cache: str, steps: int) -> dict[str, Any]:
    """Share of its time that the tiny model's training waits for data, over the last half of a short run."""
    import csv

    from bfpo_pl.cli import main

    configs = ["-c", "configs/base.yaml", "-c", "configs/experiment/bfpo.yaml", f"--runs={cache}/runs"]
    cli: Any = main(["fit", *configs, f"--trainer.max_steps={steps}", "--trainer.enable_progress_bar=false"])
    with (cli.run_folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/data_wait_share")]
    shares = [float(row["train/data_wait_share"]) for row in rows]
    return {"data_wait_share": median(shares[len(shares) // 2 :]), "steps": steps}


def measure(rows: int, speed_rows: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """All figures."""
    from bfpo_pl.runs import environment

    large, small, tokenizer = scratch / "large.jsonl", scratch / "small.jsonl", scratch / "tokenizer"
    timed = scratch / "timed.jsonl"
    write_rows(large, rows)
    write_rows(timed, speed_rows)
    write_rows(small, 2000)
    write_tokenizer(tokenizer, large)
    both = {"rows": str(timed), "tokenizer": str(tokenizer)}
    results: dict[str, Any] = {"environment": environment(), "rows": rows, "speed_rows": speed_rows, "rounds": []}
    for processes in (1, 2):
        for _ in range(rounds):
            found: dict[str, Any] = {"processes": processes}
            for name, task, extra in (
                ("ours", "ours", {}),
                ("bare", "bare", {"template": False}),
                ("bare_with_template", "bare", {"template": True}),
            ):
                cache = scratch / "cache"
                shutil.rmtree(cache, ignore_errors=True)
                found[name] = in_a_new_process(task, **both, processes=processes, cache=str(cache), **extra)
            results["rounds"].append(found)
            print(json.dumps(found), flush=True)
    shutil.rmtree(scratch / "cache", ignore_errors=True)
    memory: dict[str, Any] = {}
    for name, path in (("2000", small), (str(rows), large)):
        options = {"rows": str(path), "tokenizer": str(tokenizer), "cache": str(scratch / f"cache-{name}")}
        memory[name] = {
            "preparing": in_a_new_process("preparing", **options),
            "training": in_a_new_process("memory", **options),
        }
        print(json.dumps(memory), flush=True)
    results["memory"] = memory
    results["waiting"] = in_a_new_process("waiting", cache=str(scratch / "cache-waiting"), steps=100)
    results["summary"] = summary(results)
    return results


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The figures that matter: speed against a bare map (above 1 is faster), growth of memory, share of waiting."""
    ratios: dict[str, Any] = {}
    for processes in sorted({found["processes"] for found in results["rounds"]}):
        of = [found for found in results["rounds"] if found["processes"] == processes]
        for bare in ("bare", "bare_with_template"):
            tokenising = [found[bare]["map_seconds"] / found["ours"]["tokenise_seconds"] for found in of]
            whole = [
                (found[bare]["load_seconds"] + found[bare]["map_seconds"])
                / (found["ours"]["check_seconds"] + found["ours"]["tokenise_seconds"])
                for found in of
            ]
            ratios[f"{processes}_processes_against_{bare}"] = {
                "tokenising": median(tokenising),
                "with_reading": median(whole),
            }
    memory = results["memory"]
    first, last = memory["2000"], memory[str(results["rows"])]
    growth = {key: last[key]["rss_anon_mb"] - first[key]["rss_anon_mb"] for key in first}
    return {"speed_ratio": ratios, "rss_anon_growth_mb": growth, **results["waiting"]}


def main() -> None:
    """Measures, or does one task for the process that measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--speed_rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "data_scale.json")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(globals()[f"task_{options.task}"](**json.loads(options.options))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(options.rows, options.speed_rows, options.rounds, Path(scratch))
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["summary"], indent=1))


if __name__ == "__main__":
    main()

"""Compares `bfpo estimate` with what fits really take on this machine, each in a clean process.

    python benchmarks/estimate_cpu.py                # all cases, some 15 minutes on two cores; writes the results
    python benchmarks/estimate_cpu.py --case lora    # one of them, printed

Each case is a real `bfpo fit` of a Llama with random weights, made in a temporary folder with a tokenizer and pairs of
random words. Measured is the peak of the resident memory (VmHWM) from before the command to the end of training, above
what the process held after its imports; estimated is what `bfpo estimate --device cpu` says of the same command line.
Mapped pages of weight files count as weights. Freed memory goes back to the system at once
(`MALLOC_MMAP_THRESHOLD_`), so that the peak is that of live tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "estimate_cpu.json"
sys.path.insert(0, str(HERE))

WIDE = {"hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1376, "vocab_size": 32000}
DEEP = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1376, "vocab_size": 4096}
NOTHING = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 600}

SGD = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e-3"]
FSDP2 = ["-c", "configs/strategy/fsdp2.yaml", "--trainer.devices=2"]
PRECOMPUTED = ["-c", "configs/reference/precomputed.yaml"]
CASES: dict[str, tuple[dict[str, int], int, list[str]]] = {
    "nothing": (NOTHING, 2, []),
    "full, copy, padded": (WIDE, 8, ["--model.attention=Padded"]),
    "full, copy, segments": (DEEP, 6, ["--model.attention=Segments"]),
    "full, precomputed, all recomputed": (WIDE, 16, [*PRECOMPUTED, "--model.activation_checkpointing=full"]),
    "full, copy, selective": (DEEP, 8, ["--model.activation_checkpointing=selective"]),
    "down_proj, shared": (
        DEEP,
        8,
        [
            "-c",
            "configs/reference/shared_weights.yaml",
            "--model.trainable=Select",
            "--model.trainable.patterns=[down_proj]",
        ],
    ),
    "lora, adapter off": (DEEP, 6, ["-c", "configs/model/lora.yaml"]),
    "sgd, precomputed, small chunks": (WIDE, 8, [*PRECOMPUTED, *SGD, "--model.chunk_size=256"]),
    "accumulation, all recomputed": (
        DEEP,
        12,
        ["--trainer.accumulate_grad_batches=2", "--model.activation_checkpointing=full", "--model.attention=Padded"],
    ),
    "fsdp2 on two, copy": (WIDE, 8, FSDP2),
    "fsdp2 on two, precomputed, all recomputed": (
        DEEP,
        12,
        [*FSDP2, *PRECOMPUTED, "--model.activation_checkpointing=full"],
    ),
}
"""By name: the model, rows of a batch, and overrides."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make(folder: Path) -> None:
    """Writes the models with their tokenizer, and the pairs, into a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(2, 6))) for _ in range(300)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(draw.choices(words, k=50)) for _ in range(50)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHATML)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(64):
            row = {"prompt": text(8, 24), "chosen": text(25, 60), "rejected": text(25, 60)}
            file.write(json.dumps({**row, "chosen_safe": True, "rejected_safe": False}) + "\n")
    for name, sizes in {"wide": WIDE, "deep": DEEP, "nothing": NOTHING}.items():
        torch.manual_seed(0)
        heads = max(1, sizes["hidden_size"] // 64)
        config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads, eos_token_id=1)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def command(case: str, folder: Path) -> list[str]:
    """Configs and overrides of a case."""
    sizes, rows, overrides = CASES[case]
    name = {id(WIDE): "wide", id(DEEP): "deep", id(NOTHING): "nothing"}[id(sizes)]
    configs = [each for pair in pairwise(overrides) if pair[0] == "-c" for each in pair]
    rest, skip = [], False
    for each in overrides:
        if not skip and each != "-c":
            rest.append(each)
        skip = each == "-c"
    return [
        *["-c", "configs/base.yaml", "-c", "configs/experiment/bfpo.yaml", "-c", "configs/data/jsonl.yaml"],
        *configs,
        f"--data.streams.safety.source.path={folder / 'pairs.jsonl'}",
        f"--data.streams.safety.batch_size={rows}",
        "--data.streams.safety.source.validation_path=null",
        f"--data.cache={folder / 'cache'}",
        "--model.policy=HFModel",
        f"--model.policy.path={folder / name}",
        *rest,
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=2",
        "--trainer.enable_checkpointing=false",
        "--trainer.val_check_interval=null",
        "--trainer.limit_val_batches=0",
    ]


def status_mib(field: str) -> float:
    """A field of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def fit(case: str, folder: Path, out: Path) -> None:
    """Runs a case in this process and writes what it took."""
    import ctypes
    import gc

    import lightning.pytorch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import bfpo_pl.data.datamodule
    import bfpo_pl.module
    import bfpo_pl.parsing
    from bfpo_pl.cli import main

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = {name: status_mib(name) for name in ("VmRSS", "RssAnon", "RssFile")}
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew

    class Peak(lightning.pytorch.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            rank = trainer.global_rank
            found = {"peak_mib": status_mib("VmHWM") - before["VmRSS"], "before_mib": before["VmRSS"]}
            found["anonymous_at_end_mib"] = status_mib("RssAnon") - before["RssAnon"]
            out.with_suffix(f".{rank}.json").write_text(json.dumps(found))

    given = bfpo_pl.parsing.BFPOCLI.instantiate_trainer

    def with_peak(cli: Any, **kwargs: Any) -> Any:
        trainer = given(cli, **kwargs)
        trainer.callbacks.append(Peak())
        return trainer

    bfpo_pl.parsing.BFPOCLI.instantiate_trainer = with_peak
    main(["fit", *command(case, folder), f"--runs={folder / 'runs'}"])


def measure(case: str, folder: Path) -> dict[str, Any]:
    """Runs a case in clean processes; the larger of two counts."""
    from speed.machine import HEAP_RETURNED

    out = folder / "found"
    for old in folder.glob("found.*.json"):
        old.unlink()
    worker = [str(Path(__file__).resolve()), "--worker", case, "--folder", str(folder), "--out", str(out)]
    several = "--trainer.devices=2" in CASES[case][2]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if several else []
    environment = {
        **os.environ,
        **HEAP_RETURNED,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    began = time.monotonic()
    done = subprocess.run([sys.executable, *launch, *worker], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("found.*.json"))]
    return {
        "seconds": time.monotonic() - began,
        "processes": found,
        "peak_mib": max(each["peak_mib"] for each in found),
    }


def estimated(case: str, folder: Path) -> dict[str, Any]:
    """What the command says of a case."""
    from bfpo_pl.cli import main

    with redirect_stdout(StringIO()) as printed:
        main(["estimate", "--device=cpu", "--json", *command(case, folder)])
    return json.loads(printed.getvalue())


def compare(case: str, folder: Path) -> dict[str, Any]:
    """Estimate and measurement of a case."""
    said, found = estimated(case, folder), measure(case, folder)
    mib = said["total_bytes"] / 2**20
    ratio = mib / found["peak_mib"]
    print(f"{case}: estimated {mib:.0f} MiB, measured {found['peak_mib']:.0f} MiB, ratio {ratio:.3f}", flush=True)
    parts = {part["name"]: round(part["bytes"] / 2**20, 1) for part in said["parts"] if part["bytes"]}
    return {"estimated_mib": mib, "peak": said["peak"], "parts_mib": parts, "ratio": ratio, **found}


def main() -> None:
    """Compares all cases, or runs one for the process that compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), help="only this one; nothing is written")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(HERE.parent)
    if options.worker:
        fit(options.worker, options.folder, options.out)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "pairs.jsonl").is_file():
            make(folder)
        found = {case: compare(case, folder) for case in ([options.case] if options.case else CASES)}
    if options.case:
        print(json.dumps(found, indent=1))
        return
    from speed.machine import describe

    from bfpo_pl.runs import environment

    content = {"environment": environment(), "machine": describe(), "cases": found}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

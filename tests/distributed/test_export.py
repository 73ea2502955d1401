"""Runs of two processes: one process exports them, and what would run code is refused on both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import BASE, LORA, REPOSITORY, SMALL, TINY, checkpoint, logits
from transformers import AutoModelForCausalLM

from bfpo_pl.cli import main

pytestmark = pytest.mark.distributed

TWO = ["-c", str(REPOSITORY / "configs/strategy/fsdp2.yaml"), "--trainer.devices=2"]


def fit(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`bfpo fit` on two processes that it starts itself."""
    command = [sys.executable, "-m", "bfpo_pl.cli", "fit", *BASE, *TWO, *SMALL, *TINY, *arguments]
    kept = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "PL_GLOBAL_SEED")}
    environment = kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("two")
    kinds = {
        "sharded": [],
        "one-file": ["--trainer.strategy.save_distributed_checkpoint=false"],
        "lora": LORA,
    }
    found = {}
    for kind, arguments in kinds.items():
        done = fit(*arguments, f"--runs={folder / kind}")
        assert done.returncode == 0, done.stdout + done.stderr
        [found[kind]] = (folder / kind).glob("*/*")
    return found


@pytest.mark.parametrize("kind", ["sharded", "one-file", "lora"])
def test_one_process_exports_what_two_trained(kind, runs, tmp_path):
    folder = main(["export", "--run", str(runs[kind]), "--to", str(tmp_path / "new")])
    own = runs[kind] / "export"
    names = sorted(path.name for path in own.iterdir())
    assert names == sorted(path.name for path in folder.iterdir())
    for name in names:
        if name != "README.md":
            assert (folder / name).read_bytes() == (own / name).read_bytes(), name
    early = checkpoint(runs[kind], 2)
    before = main(["export", "--run", str(runs[kind]), "--to", str(tmp_path / "2"), "--checkpoint", str(early)])
    first, last = (AutoModelForCausalLM.from_pretrained(path) for path in (before, folder))
    assert not torch.equal(logits(first), logits(last))


def test_a_shards_payload_runs_on_neither_process(runs, tmp_path):
    trace = tmp_path / "the-payload-ran"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    poisoned = Path(shutil.copytree(checkpoint(runs["sharded"], 2), tmp_path / "step=2.ckpt"))
    (poisoned / "manifest.json").unlink()  # by it the file would be known as damaged
    content = torch.load(poisoned / "meta.pt", weights_only=True)
    torch.save(content | {"innocent": Payload()}, poisoned / "meta.pt")
    done = fit(f"--runs={tmp_path / 'runs'}", f"--ckpt_path={poisoned}")
    assert done.returncode != 0
    assert "cannot be read without running code from it, so it is refused" in done.stderr
    assert not trace.exists()

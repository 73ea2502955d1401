"""Networks that two processes load in shards are those that one process loads, bit for bit."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.distributed

CASES = [
    *(
        (name, file, "float32", part)
        for name in ("llama", "qwen2-tied", "gemma2")
        for file in ("float32", "bfloat16")
        for part in ("everything", "select", "lora")
    ),
    *(
        (name, "float32", "float32", "everything")
        for name in ("gemma3", "phi3", "gpt2", "opt", "gpt-neox", "minicpm3", "cohere")
    ),
    ("gpt2", "float32", "float32", "lora"),
    ("llama", "bfloat16", "auto", "everything"),
    ("gemma2", "float32", "bfloat16", "lora"),
]
WHOLE = ("gpt-neox",)
"""Families whose weights transformers stores under other names."""


def torchrun(folder, *arguments):
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "PL_GLOBAL_SEED")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    (folder / "cases.json").write_text(json.dumps(CASES))
    log = torchrun(folder, HERE / "loading_cases.py", folder)
    return json.loads((folder / "found.json").read_text()), log


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_weights_buffers_and_log_probs_are_equal(case, found):
    outcome = found[0][" ".join(case)]
    assert outcome["differ"] == []
    assert outcome["shards"] == (case[0] not in WHOLE)
    assert outcome["files"] > 3
    assert outcome["parameters"] > (10 if case[3] != "lora" else 40)


def test_the_reason_for_loading_whole_is_said_once(found):
    said = [line for line in found[1].splitlines() if "loaded whole on every process" in line]
    assert len(said) == 1
    assert "gpt-neox" in said[0]
    assert "other names" in said[0]


# ---- by the real command ------------------------------------------------------------------------------------------

RUN = [
    *("-c", f"{ROOT}/configs/base.yaml", "-c", f"{ROOT}/configs/experiment/bfpo.yaml"),
    *("--trainer.accelerator=cpu", "--trainer.max_steps=6", "--trainer.val_check_interval=3"),
    *("--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"),
    *("--checkpoint.every_n_train_steps=3", "--checkpoint.save_top_k=-1"),
    *("--model.optimizer.lr=1e-3", "--model.policy=HFModel"),
    *("--data.streams.safety.source.count=16", "--data.streams.safety.source.validation_count=6"),
    *("--data.streams.helpfulness.source.count=16", "--data.streams.helpfulness.source.validation_count=6"),
]
METHODS = {
    "everything": ["--trainer.gradient_clip_val=0.5"],
    "another-reference": ["--model.reference=FrozenCopy", "--model.reference.source=HFModel"],
    "select": ["--model.trainable=Select", "--model.trainable.patterns=[down_proj]", "--model.reference=SharedWeights"],
    "lora": ["--model.trainable=LoRA", "--model.trainable.r=4", "--model.reference=AdapterOff"],
}


def fit(name, folder, runs, processes, *more):
    batch = 4 // processes
    sizes = [f"--data.streams.{stream}.batch_size={batch}" for stream in ("safety", "helpfulness")]
    strategy = "fsdp2" if processes > 1 else "single"
    return [
        *("fit", *RUN[:4], "-c", f"{ROOT}/configs/strategy/{strategy}.yaml", *RUN[4:], *sizes, *METHODS[name]),
        *(f"--model.policy.path={folder / 'model'}", f"--trainer.devices={processes}", f"--runs={runs}"),
        *([f"--model.reference.source.path={folder / 'other'}"] if name == "another-reference" else []),
        *more,
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders by method and number of processes, and what two processes printed."""
    from bfpo_pl.cli import main
    from bfpo_pl.models.sources import TinyModel

    folder = tmp_path_factory.mktemp("fits")
    for name, seed in (("model", 3), ("other", 4)):
        source = TinyModel(hidden_size=32, layers=2, intermediate_size=64, seed=seed)
        source.load_model().save_pretrained(folder / name, max_shard_size="20KB")
        source.load_tokenizer().save_pretrained(folder / name)
    jobs = {name: fit(name, folder, folder / f"two-{name}", 2) for name in METHODS}
    at = f"--ckpt_path={folder}/two-lora/*/*/checkpoints/*step=3.ckpt"
    jobs["lora-resumed"] = fit("lora", folder, folder / "two-lora-resumed", 2, at)
    jobs["offloaded"] = [
        part.replace("fsdp2.yaml", "fsdp2_offload.yaml")
        for part in fit("everything", folder, folder / "two-offloaded", 2)
    ]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    log = torchrun(folder, HERE / "chain.py", file)
    done = json.loads(file.with_suffix(".done").read_text())
    assert set(done.values()) == {"ok"}, done
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")  # restored afterwards
        for name in METHODS:
            main(fit(name, folder, folder / f"one-{name}", 1))
    return folder, log


def weights(folder, name):
    (export,) = folder.glob(f"{name}/*/*/export/model.safetensors")
    return load_file(export)


def difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_from_shards_agrees_with_one_process(name, runs):
    folder, log = runs
    ours, theirs = weights(folder, f"two-{name}"), weights(folder, f"one-{name}")
    start = weights_of_start(folder)
    assert difference(ours, theirs) <= 1e-5
    assert difference(ours, {key: start[key] for key in ours}) > 1e-3
    assert "loaded whole" not in log


def weights_of_start(folder):
    return {key: value for file in (folder / "model").glob("*.safetensors") for key, value in load_file(file).items()}


def test_the_other_reference_is_another(runs):
    folder, _ = runs
    assert difference(weights(folder, "two-everything"), weights(folder, "two-another-reference")) > 1e-4


def test_a_resumed_run_that_loaded_shards_is_the_uninterrupted_one(runs):
    folder, _ = runs
    assert difference(weights(folder, "two-lora"), weights(folder, "two-lora-resumed")) == 0.0


def test_weights_offloaded_to_the_cpu_train_alike(runs):
    """On a CPU this only moves between places of the same memory; the policy is FSDP2's, the clipping as well."""
    folder, _ = runs
    assert difference(weights(folder, "two-everything"), weights(folder, "two-offloaded")) == 0.0


# ---- FSDP1 --------------------------------------------------------------------------------------------------------

FSDP1 = {
    "lora": METHODS["lora"],
    "precomputed": ["--model.reference=Precomputed", "--model.activation_checkpointing=full"],
}


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """Metrics of runs under FSDP1 and DDP, by strategy and method; nothing is saved."""
    folder = tmp_path_factory.mktemp("fsdp1")
    jobs = {}
    for strategy in ("ddp", "fsdp1"):
        for name, method in FSDP1.items():
            jobs[f"{strategy}-{name}"] = [
                *("fit", *RUN[:4], "-c", f"{ROOT}/configs/strategy/{strategy}.yaml", *RUN[4:-5], *RUN[-4:], *method),
                *("--model.policy=TinyModel", "--model.policy.hidden_size=32", "--model.policy.layers=2"),
                *("--data.streams.safety.batch_size=2", "--data.streams.helpfulness.batch_size=2"),
                *("--trainer.devices=2", "--trainer.gradient_clip_val=0.5", "--trainer.enable_checkpointing=false"),
                *("--export.enabled=false", f"--runs={folder / strategy}-{name}", f"--data.cache={folder / strategy}"),
            ]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    torchrun(folder, HERE / "fsdp1_on_cpu.py", file)
    done = json.loads(file.with_suffix(".done").read_text())
    assert set(done.values()) == {"ok"}, done
    found = {}
    for name in jobs:
        (metrics,) = folder.glob(f"{name}/*/*/metrics.csv")
        with metrics.open() as opened:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(opened)]
        found[name] = [row for row in rows if any(key.startswith(("train/", "val/")) for key in row)]
    return found


@pytest.mark.parametrize("name", FSDP1)
def test_fsdp1_trains_as_ddp(name, older):
    ours, theirs = older[f"fsdp1-{name}"], older[f"ddp-{name}"]
    assert len(ours) == len(theirs) > 12
    clipped = 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            if not any(part in key for part in ("_second", "memory", "data_wait")):
                assert one[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
        clipped += other.get("train/grad_norm", 0.0) > 0.5
    assert clipped == 6
    losses = [row["train/all/all/loss"] for row in ours if "train/all/all/loss" in row]
    assert len(set(losses)) == 6

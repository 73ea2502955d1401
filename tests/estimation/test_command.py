"""The real `bfpo estimate`: its numbers against arithmetic by hand, its output, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfpo_pl.estimation.devices import GIB, device_kind, device_names

REPOSITORY = Path(__file__).parents[2]
MODELS = Path(__file__).parent / "models"
JSONL = ["-c", "configs/base.yaml", "-c", "configs/experiment/bfpo.yaml", "-c", "configs/data/jsonl.yaml"]
LENGTHS = ["--prompt_tokens=16", "--response_tokens=24"]
MISTRAL = ["--model.policy=HFModel", f"--model.policy.path={MODELS / 'mistral_7b'}"]
FSDP1 = ["-c", "configs/strategy/fsdp1.yaml"]
FSDP2 = ["-c", "configs/strategy/fsdp2.yaml"]


@pytest.fixture
def estimated(bfpo, capsys):
    """Runs the command with --json and gives what it says."""

    def call(*args):
        capsys.readouterr()
        bfpo("estimate", "--json", *args)
        return json.loads(capsys.readouterr().out)

    return call


def parts_of(said):
    return {part["name"]: part["bytes"] for part in said["parts"]}


def test_the_microworld_is_read_and_nothing_is_left_behind(estimated, base, small, tmp_path, monkeypatch):
    said = estimated("--device=cpu", *base, *small, "--trainer.devices=1")
    parts = parts_of(said)
    weights = parts["weights of the policy"]
    assert parts["reference"] == parts["gradients"] == weights
    assert parts["optimizer state"] == pytest.approx(2 * weights, rel=0.01)
    assert sum(parts.values()) == pytest.approx(said["total_bytes"])
    assert max(said["stages"].values()) == said["stages"][said["peak"]] == said["total_bytes"]
    assert said["time"]["rows"] == 40
    assert said["time"]["batches"] == 10  # of 4 rows each
    assert said["time"]["epoch_seconds"] is None  # nobody knows how fast a CPU is
    assert said["fits"]
    assert not (tmp_path / "runs").exists()


def test_seven_billion_by_hand(estimated):
    """The worked example of docs/estimate.md: Mistral-7B, everything trains, four GPUs."""
    said = estimated(
        "--device=h100", *JSONL, *FSDP2, "-c", "configs/reference/precomputed.yaml", *MISTRAL, "--trainer.devices=4",
        "--trainer.precision=bf16-mixed", "--model.activation_checkpointing=full",
        "--data.streams.safety.batch_size=4", "--prompt_tokens=512", "--response_tokens=512",
    )  # fmt: skip
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    root = 2 * 32000 * 4096 + 4096
    count = 32 * block + root
    assert count == 7_241_732_096
    parts = parts_of(said)
    assert parts["weights of the policy"] == parts["gradients"] == pytest.approx(count)  # 4 bytes, a quarter of them
    assert parts["optimizer state"] == pytest.approx(2 * count, rel=1e-3)
    assert parts["gathered weights"] == 4 * root + 2 * 2 * block
    assert "reference" not in {name for name, size in parts.items() if size}
    assert set(said["stages"]) == {"forward", "backward", "update"}  # no live reference, no validation rows
    tokens = 4 * (512 + 2 * 512)
    assert said["time"]["tokens"] == tokens
    # What 32 blocks keep is their input in float32; the last norm keeps its input, that normalised, and its result.
    assert parts["activations"] == pytest.approx((32 + 3) * tokens * 4096 * 4, rel=0.01)
    # 2 operations a weight and token forward, as many again to recompute, all but a block's last product, 4 backward;
    # the head on responses alone, in one chunk: 3 products. Attention: 2 products forward, 2 again, 5 backward.
    linear = (8 * (block - 2 * 4096) - 2 * 4096 * 14336) * 32 * tokens
    head = 3 * 2 * 32000 * 4096 * (4 * 2 * 512)
    pairs = 4 * (1024 * 1025 / 2 + 512 * 1024 - 512 * 511 / 2)  # the first response with its prompt; the second
    attention = 9 * 32 * 32 * pairs * (128 + 128)
    assert said["time"]["policy"] == pytest.approx(linear + head + attention, rel=1e-4)
    assert said["time"]["batch_seconds"] == pytest.approx(said["time"]["policy"] / (0.4 * 989.4e12))
    assert said["time"]["batches"] == 63  # 1,000 rows over 4 · 4
    assert said["fits"]


def test_levers_are_settings_that_help(estimated):
    said = estimated(
        "--device=rtx4090", "-c", "configs/base.yaml", "-c", "configs/experiment/bfpo.yaml", "-c",
        "configs/data/jsonl.yaml", "--model.policy.hidden_size=64", "--levers", "--prompt_tokens=400",
        "--response_tokens=300", "--trainer.devices=1",
    )  # fmt: skip
    levers = said["levers"]
    assert [each["total"] for each in levers] == sorted(each["total"] for each in levers)
    assert all(each["total"] < said["total_bytes"] for each in levers)
    assert any("activation_checkpointing: full" in each["what"] for each in levers)
    fewer = estimated(
        "--device=rtx4090", *JSONL, "--model.policy.hidden_size=64", "--prompt_tokens=400", "--response_tokens=300",
        "--model.activation_checkpointing=full", "--trainer.devices=1",
    )  # fmt: skip
    full = next(each for each in levers if "activation_checkpointing: full" in each["what"])
    assert fewer["total_bytes"] == full["total"]


def test_what_is_printed(bfpo, capsys, small_safety, base):
    bfpo("estimate", "--device=l4", "--rate=100", *JSONL, *LENGTHS, "--trainer.devices=2")
    text = " ".join(capsys.readouterr().out.split())
    assert "weights of the policy" in text
    assert "Fits on 2 × l4" in text
    assert "the strategy does not shard" in text
    assert "all prompts have 16 tokens and all responses 24, as given" in text
    assert "1,000 rows of the driver, in 63 batches on 2 × l4" in text  # 8 rows a device
    assert "40% of 100 TFLOP/s" in text
    bfpo("estimate", "--help")
    assert "usage: bfpo estimate --device KIND" in capsys.readouterr().out


def test_a_config_without_data_at_hand_takes_the_longest_rows(estimated):
    hub = ["--data.streams.safety.source=HubDataset", "--data.streams.safety.source.path=some/data"]
    said = estimated("--device=h100", *JSONL, *hub, "--trainer.devices=1", "--data.truncation.max_length=40",
                     "--data.truncation.max_prompt_length=30")  # fmt: skip
    assert any("are not local files" in line and "30 tokens" in line and "10, the most" in line
               for line in said["assumptions"])  # fmt: skip
    assert said["time"]["tokens"] == 8 * (30 + 2 * 10)
    assert parts_of(said)  # validation is estimated, too: the source has such a split
    assert said["stages"]["validation"] > said["stages"]["update"]


REFUSED = {
    "fsdp2_offload": "what offloading to the host's memory takes",
    "fsdp2_tp": "tensor parallelism is not estimated",
}


@pytest.mark.parametrize("strategy", sorted(path.stem for path in (REPOSITORY / "configs/strategy").glob("*.yaml")))
def test_every_strategy_of_the_repository_is_estimated_or_refused_with_a_reason(
    estimated, base, small, capsys, strategy
):
    devices = 1 if strategy == "single" else 4
    args = ["-c", f"configs/strategy/{strategy}.yaml", "-c", "configs/reference/precomputed.yaml"]
    args += ["--device=h100", *LENGTHS, *small, f"--trainer.devices={devices}"]
    if strategy in REFUSED:
        with pytest.raises(SystemExit) as caught:
            estimated(*base, *args)
        assert caught.value.code == 2
        assert REFUSED[strategy] in capsys.readouterr().err
        return
    parts = parts_of(estimated(*base, *args))
    assert parts["gradients"] == parts["weights of the policy"] > 0
    assert (parts.get("gathered weights", 0) > 0) == strategy.startswith("fsdp")


def test_supervised_training_has_one_response(estimated):
    said = estimated("--device=h100", "-c", "configs/sft.yaml", *LENGTHS, "--trainer.devices=1")
    assert said["time"]["references"] == 0
    assert said["time"]["tokens"] % (16 + 24) == 0


def test_validation_of_packed_rows_is_in_blocks(estimated):
    """Rows that nothing cuts could have a million tokens; a block has 2,048."""
    said = estimated("--device=h100", "-c", "configs/sft.yaml", "-c", "configs/data/paper_sft.yaml")
    assert said["time"]["tokens"] == (4 + 1) * 2048
    assert said["stages"]["validation"] < 1.5 * said["stages"]["backward"]  # 8 blocks without gradients


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device=tpu"], "--device knows b200"),
        ([], "--device is missing: b200"),
        (["--device=h100", "--trainer.devices=auto"], "say how many each machine has"),
        (["--device=h100", "--trainer.strategy=deepspeed"], "knows auto, DDP and FSDP strategies"),
        (
            ["--device=h100", *FSDP1, "--trainer.devices=2", "--trainer.strategy.sharding_strategy=SHARD_GRAD_OP"],
            "sharding_strategy is SHARD_GRAD_OP, and only FULL_SHARD is estimated",
        ),
        (["--device=h100", "--trainer.strategy=FSDP2", "--prompt_tokens=4"], "go together"),
        (["--device=h100", "--prompt_tokens=0", "--response_tokens=4"], "--prompt_tokens must be positive"),
        (["--device=h100", "--utilisation=40"], "must lie in (0, 1]"),
        (["--device=h100", "--model.policy=HFModel", "--model.policy.path=tests"], "has no config.json"),
    ],
)
def test_mistakes(bfpo, capsys, args, message):
    lengths = [] if any("tokens" in each for each in args) else LENGTHS
    with pytest.raises(SystemExit) as caught:
        bfpo("estimate", *JSONL, *lengths, *args)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_quantised_weights_are_refused(bfpo, capsys, tmp_path):
    config = json.loads((MODELS / "mistral_7b" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        bfpo("estimate", "--device=h100", *JSONL, *LENGTHS, "--model.policy=HFModel", f"--model.policy.path={tmp_path}")
    assert "quantised" in capsys.readouterr().err


def test_kinds_of_devices():
    assert device_kind("H100").name == "h100"
    for name in device_names():
        kind = device_kind(name)
        assert kind.memory > 4 * GIB
        assert kind.source
        assert name == "cpu" or 10e12 < kind.full_rate < kind.half_rate

"""Machines that lack what a run asks for: one message, exit 2, before any weight loads."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from bfpo_pl.cli import main
from bfpo_pl.component import UserError
from bfpo_pl.devices import check_devices
from bfpo_pl.models.precomputed import Precomputed
from bfpo_pl.models.reference import AdapterOff, FromColumn, FrozenCopy, SharedWeights
from bfpo_pl.models.sources import TinyModel
from bfpo_pl.strategies import FSDP1, FSDP2

ROOT = Path(__file__).parent.parent
FSDP1_FILE = ["-c", f"{ROOT}/configs/strategy/fsdp1.yaml"]
SIZES = ["--trainer.strategy=ModelParallelStrategy", "--trainer.accelerator=cpu"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@no_gpu
@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--trainer.accelerator=gpu"], ["accelerator is gpu", "no GPU on this machine", "--trainer.accelerator=cpu"]),
        (["--trainer.accelerator=cuda", "--trainer.devices=4"], ["accelerator is cuda", "no GPU on this machine"]),
        (["--trainer.devices=[1]"], ["names devices by number ([1])", "--trainer.devices=1"]),
        (FSDP1_FILE, ["FSDP1", "runs on GPUs only", "configs/strategy/fsdp2.yaml"]),
        (["--trainer.strategy=fsdp", "--trainer.accelerator=cpu"], ["FSDP1", "configs/strategy/fsdp2.yaml"]),
        (
            [*SIZES, "--trainer.strategy.data_parallel_size=3", "--trainer.strategy.tensor_parallel_size=1"],
            ["data_parallel_size 3 × tensor_parallel_size 1 is 3", "num_nodes is 1"],
        ),
        (
            [*SIZES, "--trainer.strategy.data_parallel_size=1", "--trainer.strategy.tensor_parallel_size=2"],
            ["tensor_parallel_size is 2", "data-parallel"],
        ),
        (
            ["-c", f"{ROOT}/configs/strategy/fsdp2_tp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=3"],
            ["tensor_parallel_size 2 does not divide", "num_nodes = 3"],
        ),
        ([*SIZES, "--trainer.strategy.data_parallel_size=1"], ["set data_parallel_size and tensor_parallel_size"]),
    ],
    ids=lambda value: value[-1] if value else "",
)
def test_the_command_says_what_is_missing(more, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored afterwards
    monkeypatch.setattr(TinyModel, "load_model", lambda self: pytest.fail("weights were loaded"))
    configs = [part for pair in zip(more[::2], more[1::2], strict=False) if pair[0] == "-c" for part in pair]
    more = [part for part in more if part not in configs]
    base = ["-c", f"{ROOT}/configs/base.yaml", "-c", f"{ROOT}/configs/experiment/bfpo.yaml", *configs]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *base, *more, f"--runs={tmp_path}"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("bfpo: error:") == 1
    assert "Traceback" not in said
    for part in parts:
        assert part in said


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch says on a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize("devices", [3, "3", 8, [0, 2], "1,2"])
@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_more_gpus_than_there_are(two_gpus, accelerator, devices):
    with pytest.raises(UserError, match="this machine has 2"):
        check_devices(accelerator, devices, 1, "auto")


@pytest.mark.parametrize("devices", ["auto", -1, "-1", 1, 2, "2", [0, 1], [1], "0,1"])
@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_gpus_that_are_there(two_gpus, accelerator, devices):
    check_devices(accelerator, devices, 4, FSDP2())
    check_devices(accelerator, devices, 1, FSDP1())


def test_processes_on_a_cpu_may_be_more_than_gpus(two_gpus):
    check_devices("cpu", 8, 1, "ddp")
    with pytest.raises(UserError, match="FSDP1"):
        check_devices("cpu", 2, 1, FSDP1())


def test_sizes_are_those_of_all_machines(two_gpus):
    def sizes(data, tensor):
        return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)

    check_devices("gpu", "auto", 3, sizes(6, 1))
    with pytest.raises(UserError, match=r"is 2, but trainer\.devices × trainer\.num_nodes is 6"):
        check_devices("gpu", "auto", 3, sizes(2, 1))


def test_groups_of_processes_must_come_out_even(two_gpus):
    check_devices("gpu", "auto", 3, FSDP2(tensor_parallel_size=2))
    check_devices("gpu", 1, 4, FSDP2(tensor_parallel_size=4))
    with pytest.raises(UserError, match=r"tensor_parallel_size 4 does not divide .*num_nodes = 6"):
        check_devices("gpu", "auto", 3, FSDP2(tensor_parallel_size=4))
    with pytest.raises(UserError, match="tensor_parallel_size is 0"):
        FSDP2(tensor_parallel_size=0)
    with pytest.raises(UserError, match="cpu_offload does not go with tensor_parallel_size"):
        FSDP2(tensor_parallel_size=2, cpu_offload=True)


@pytest.mark.parametrize("reference", [FrozenCopy(), FrozenCopy(TinyModel()), SharedWeights()], ids=repr)
def test_fsdp1_refuses_references_that_it_cannot_shard(reference):
    with pytest.raises(UserError, match=r"precomputed\.yaml.*lora\.yaml.*fsdp2\.yaml"):
        reference.check_strategy(FSDP1())
    reference.check_strategy(FSDP2())


@pytest.mark.parametrize("reference", [AdapterOff(), Precomputed(), FromColumn()], ids=repr)
def test_fsdp1_takes_references_without_a_network_of_their_own(reference):
    reference.check_strategy(FSDP1())


def test_fsdp1_reduces_in_float32_and_leaves_buffers_alone():
    from lightning.pytorch.plugins.precision import FSDPPrecision

    strategy = FSDP1()
    strategy.precision_plugin = FSDPPrecision("bf16-mixed")
    config = strategy.mixed_precision_config
    assert (config.param_dtype, config.reduce_dtype, config.buffer_dtype) == (torch.bfloat16, torch.float32, None)
    assert strategy.kwargs["use_orig_params"]

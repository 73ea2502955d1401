"""Bases in four bits: what can be checked without bitsandbytes and a GPU."""

import sys
import types
from importlib.util import find_spec
from pathlib import Path

import networks
import pytest
import torch
from safetensors.torch import load_file

from bfpo_pl.cli import main
from bfpo_pl.component import UserError
from bfpo_pl.models.outline import WholeOnly
from bfpo_pl.models.quantization import FourBit
from bfpo_pl.models.sources import HFModel, TinyModel
from bfpo_pl.models.trainable import Everything, LoRA, Select

ROOT = Path(__file__).parents[2]


def test_the_config_of_transformers():
    config = FourBit().config()
    assert config.load_in_4bit
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == config.bnb_4bit_quant_storage == torch.bfloat16
    config = FourBit("fp4", False, "float32").config()
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("fp4", False)
    assert config.bnb_4bit_compute_dtype == config.bnb_4bit_quant_storage == torch.float32


@pytest.mark.parametrize("arguments", [{"quant_type": "nf8"}, {"compute_dtype": "float16"}], ids=str)
def test_arguments_are_checked(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        FourBit(**arguments)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "bitsandbytes is not installed: `pip install bitsandbytes`"),
        (["--model.trainable=Everything"], "Everything cannot train weights in four bits. Set model.trainable to LoRA"),
        (["--trainer.precision=32-true"], "compute_dtype bfloat16 goes with trainer.precision bf16-mixed, not 32-true"),
    ],
    ids=["no package", "everything", "precision"],
)
def test_the_command_says_so_before_weights_load(more, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored afterwards
    monkeypatch.setattr(HFModel, "load_model", lambda self: pytest.fail("weights were loaded"))
    files = ["base", "experiment/bfpo", "model/lora_4bit"]
    configs = [part for file in files for part in ("-c", f"{ROOT}/configs/{file}.yaml")]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *configs, *more, "--trainer.accelerator=cpu", f"--runs={tmp_path}"])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_gpu_is_needed(monkeypatch):
    monkeypatch.setattr("bfpo_pl.models.quantization.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="NVIDIA GPU"):
        HFModel("some/model", quantization=FourBit()).check()


def test_only_adapters_train():
    source = HFModel("some/model", quantization=FourBit())
    source.check_training(LoRA(), "bf16-mixed")
    for part in (Everything(), Select(["down_proj"])):
        with pytest.raises(UserError, match="four bits"):
            source.check_training(part, "bf16-mixed")
        HFModel("some/model").check_training(part, "32-true")
    HFModel("some/model", quantization=FourBit(compute_dtype="float32")).check_training(LoRA(), "32-true")


def test_quantised_bases_load_whole():
    with pytest.raises(WholeOnly, match="quantised"):
        HFModel("some/model", quantization=FourBit(), trust_remote_code=False).outline()


def test_kept_log_probs_of_a_quantised_reference_are_others(tmp_path):
    networks.build("llama", torch.float32).save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    sources = [HFModel(path), HFModel(path, quantization=FourBit()), HFModel(path, quantization=FourBit("fp4"))]
    assert len({source.weights_digest(tmp_path) for source in sources}) == 3
    assert sources[1].unquantised().weights_digest(tmp_path) == sources[0].weights_digest(tmp_path)


def test_adapters_over_packed_bits_are_float32():
    """Peft would give them the type of the tensor that the bits are stored in."""
    for flag, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        model = networks.build("llama", torch.bfloat16)
        model.is_loaded_in_4bit = flag
        LoRA(r=2).apply(model)
        adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        assert len(adapters) == 28
        assert all(parameter.dtype == dtype and parameter.requires_grad for parameter in adapters)


class Rounded(HFModel):
    """Weights in bfloat16 steps: a quantisation that every machine can do."""

    def load_model(self):
        model = super().load_model()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        return model

    def unquantised(self):
        return HFModel(self.path)


def test_an_adapter_is_merged_into_the_base_of_the_files(bfpo, base, small, tmp_path, monkeypatch):
    source = TinyModel(hidden_size=32, layers=2, heads=2, intermediate_size=64, seed=3)
    source.load_model().save_pretrained(tmp_path / "model")
    source.load_tokenizer().save_pretrained(tmp_path / "model")
    adapter = ["--model.trainable=LoRA", "--model.trainable.r=4", "--model.reference=AdapterOff"]
    small = [argument for argument in small if "model.policy" not in argument]
    module = types.ModuleType("rounding")
    module.Rounded = Rounded
    monkeypatch.setitem(sys.modules, "rounding", module)
    policy = ["--model.policy=rounding.Rounded", f"--model.policy.path={tmp_path / 'model'}"]
    run = bfpo("fit", *base, *small, *adapter, *policy, "--model.optimizer.lr=1e-2")
    exported = load_file(run.run_folder / "export" / "model.safetensors")
    plain = source.load_model().state_dict()
    trained = run.model.policy.state_dict()
    compared = 0
    for name, weight in exported.items():
        owner = name.removesuffix(".weight")
        want = plain[name]
        if f"{owner}.lora_A.default.weight" in trained:
            scale = run.model.trainable.alpha / run.model.trainable.r
            a, b = (trained[f"{owner}.lora_{part}.default.weight"] for part in "AB")
            assert b.abs().max() > 1e-3
            want = want + scale * (b @ a)
            compared += 1
        torch.testing.assert_close(weight, want, atol=1e-6, rtol=1e-6)
    assert compared == 14

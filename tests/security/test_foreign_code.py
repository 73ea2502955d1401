"""Model folders that carry code, as pickles or as Python files, are refused, and nothing of them runs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bfpo_pl.microworld import build_tokenizer

CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
os.mkdir({trace!r})
class Config(LlamaConfig):
    model_type = "foreign"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path):
    """A small model as safetensors, with its tokenizer."""
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def commands(tmp_path, in_repository):
    """Every command that reads a model's folder."""
    base = ("-c", "configs/base.yaml", "-c", "configs/experiment/bfpo.yaml", f"--runs={tmp_path / 'runs'}")
    policy = ("--model.policy=HFModel", f"--model.policy.path={tmp_path / 'model'}")
    return [
        ("fit", *base, *policy, "--trainer.accelerator=cpu"),
        ("generate", f"--model={tmp_path / 'model'}", "--prompt=open the window"),
    ]


def edit(file, **more):
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def test_a_poisoned_pytorch_model_bin(folder, commands, payload, refused):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": payload}, folder / "pytorch_model.bin")
    for command in commands:
        assert "can run code" in refused(*command)


def test_a_bin_beside_safetensors_is_not_touched(folder, payload, capsys):
    from bfpo_pl.cli import main

    torch.save({"model.norm.weight": payload}, folder / "pytorch_model.bin")
    main(["generate", f"--model={folder}", "--prompt=open the window", "--max_new_tokens=4"])
    assert not payload.trace.exists()


def test_an_adapter_as_a_pickle(folder, payload, refused, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"x": payload}, adapter / "adapter_model.bin")
    assert "can run code" in refused("generate", f"--model={adapter}", "--prompt=open the window")


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_code_named_by_auto_map(what, folder, commands, payload, refused):
    (folder / "foreign.py").write_text(CODE.format(trace=str(payload.trace)))
    if what == "model":
        named = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
        edit(folder / "config.json", auto_map=named, model_type="foreign")
    else:
        edit(
            folder / "tokenizer_config.json",
            auto_map={"AutoTokenizer": [None, "foreign.Tokenizer"]},
            tokenizer_class="Tokenizer",
        )
    for command in commands:
        assert "trust_remote_code" in refused(*command)


def test_the_code_runs_where_it_is_trusted(folder, payload):
    """The attack above is real."""
    from bfpo_pl.models.sources import HFModel

    (folder / "foreign.py").write_text(CODE.format(trace=str(payload.trace)))
    named = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    edit(folder / "config.json", auto_map=named, model_type="foreign")
    HFModel(str(folder), trust_remote_code=True).check()
    assert payload.trace.exists()

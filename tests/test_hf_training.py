"""The real command on Hub-format folders of real model classes: several safetensors files, tied heads, no pad token."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bfpo_pl.microworld import build_tokenizer

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2_tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3_tied": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True, "head_dim": 16}),
}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    """A folder as the Hub has it: config, an index and several shards, a tokenizer without a pad token."""
    model_class, config_class, arguments = FAMILIES[request.param]
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=None, **arguments,
    )  # fmt: skip
    model_class(config).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tokenizer.pad_token = None
    # By itself: beside a Qwen2 config transformers would read this word-level tokenizer as Qwen2's byte-level one.
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


@pytest.mark.parametrize("part", ["full", "selective", "lora"])
def test_fit_and_export(bfpo, base, small, folder, part):
    small = [item for item in small if "model.policy" not in item]
    parts = {
        "full": [],
        "selective": ["--model.trainable=Select", "--model.trainable.patterns=[down_proj]"],
        "lora": ["-c", "configs/model/lora.yaml"],
    }
    policy = ["--model.policy=HFModel", f"--model.policy.path={folder}"]
    policy.append(f"--model.policy.tokenizer={folder.parent / 'tokenizer'}")
    judged = ["--trainer.callbacks=bfpo_pl.callbacks.microworld.MicroworldEvaluation", "--trainer.val_check_interval=2"]
    run = bfpo("fit", *base, *parts[part], *policy, *small, *judged, "--trainer.callbacks.max_prompts=6")
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run.run_folder / "export").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    if part == "selective":
        assert all("down_proj" in name for name in changed)
    if part == "lora":
        assert all(name.endswith("_proj.weight") for name in changed)
    assert "val/microworld/greedy/helpfulness" in run.trainer.callback_metrics  # generation without a pad token

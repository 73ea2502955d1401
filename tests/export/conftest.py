"""Finished runs of each kind, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import BASE, LORA, REPOSITORY, SHARDED, SMALL, TINY
from transformers import LlamaConfig, LlamaForCausalLM

from bfpo_pl.cli import main
from bfpo_pl.microworld import build_tokenizer


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """A model's folder, with untied embeddings and a generation config of its own."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory, base_model) -> dict[str, Path]:
    """Folders of finished runs by kind."""
    from_folder = ["--model.policy=HFModel", f"--model.policy.path={base_model}"]
    kinds = {
        "file": [*BASE, *SMALL, *TINY],
        "sharded": [*BASE, *SHARDED, *SMALL, *TINY],
        "lora": [*BASE, *SMALL, *from_folder, *LORA],
        "sharded-lora": [*BASE, *SHARDED, *SMALL, *from_folder, *LORA],
        "bfloat16": [
            *(*BASE, *SMALL, *from_folder, "--trainer.precision=bf16-true"),
            *("--model.optimizer=bfpo_pl.optimizers.AdamW32", "--model.optimizer.lr=0.01"),
        ],
    }
    folder = tmp_path_factory.mktemp("runs")
    return {kind: main(["fit", *arguments, f"--runs={folder / kind}"]).run_folder for kind, arguments in kinds.items()}


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory) -> Path:
    """The folder of a finished run of supervised fine-tuning."""
    arguments = [
        *("-c", str(REPOSITORY / "configs/sft.yaml"), *TINY, "--trainer.max_steps=2", "--trainer.accelerator=cpu"),
        *("--data.streams.sft.source.count=40", "--data.streams.sft.batch_size=4"),
    ]
    return main(["sft", *arguments, f"--runs={tmp_path_factory.mktemp('sft')}"]).run_folder


@pytest.fixture
def bfpo():
    """Calls the real command in this process."""
    return lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture
def refusal(capsys):
    """Calls the command, which must end with exit code 2, and gives its message."""

    def call(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return call

"""Models and datasets as folders of the Hub's format: configs of published sizes, tiny weights, rows by split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

QWEN3_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role != 'assistant' %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif loop.last %}
{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}"""
"""What Qwen3's own template makes of conversations without tools and reasoning that end in an answer."""

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "head_dim": 16}


def mistral_7b(**changes: Any) -> MistralConfig:
    """The config of Mistral-7B-v0.1 and zephyr-7b-beta, as published."""
    return MistralConfig(
        **{
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
            "sliding_window": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **changes,
        }
    )  # fmt: skip


def qwen3_8b(**changes: Any) -> Qwen3Config:
    """The config of Qwen3-8B, as published."""
    return Qwen3Config(
        **{
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **changes,
        }
    )  # fmt: skip


def byte_tokenizer(bos: str | None, eos: str, template: str | None) -> PreTrainedTokenizerFast:
    """A token for each byte, and those that begin and end a sequence."""
    specials = [token for token in (bos, eos) if token]
    vocabulary = {token: index for index, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def write_config(folder: Path, config: PreTrainedConfig) -> Path:
    """A model's folder without weights."""
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    return folder


def write_tiny(folder: Path, config: PreTrainedConfig) -> Path:
    """A model's folder with random weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_dataset(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """A dataset's folder, with a card that names the splits, as on the Hub."""
    folder.mkdir(parents=True)
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    for name, rows in splits.items():
        card += [f"  - split: {name}", f"    path: {name}.jsonl"]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder

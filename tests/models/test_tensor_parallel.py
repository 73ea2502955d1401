"""Which networks tensor parallelism takes; that it is exact is tested on several processes, in tests/distributed."""

import copy

import networks
import pytest
import torch
from networks import CONFIGS, build
from transformers import AutoModelForCausalLM, MixtralConfig

from bfpo_pl.component import UserError
from bfpo_pl.models.tensor_parallel import FAMILIES, check_plan
from bfpo_pl.models.trainable import LoRA


def skeleton(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def changed(name, **values):
    config = copy.deepcopy(CONFIGS[name])
    for key, value in values.items():
        setattr(config, key, value)
    return skeleton(config)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-tied", "qwen3", "gemma2", "gemma3", "phi3", "olmo2"])
def test_families_with_a_plan(name):
    check_plan(build(name), 2)


@pytest.mark.parametrize("name", ["gpt2", "opt", "minicpm3"])
def test_a_network_without_a_known_plan_is_told_which_have_one(name):
    with pytest.raises(UserError, match=r"not known to be exact.*llama, mistral.*fsdp2\.yaml") as refused:
        check_plan(build(name), 2)
    assert all(family in str(refused.value) for family in FAMILIES)


def test_mixtures_of_experts_are_refused():
    config = MixtralConfig(**networks.GROUPED, num_local_experts=2)
    with pytest.raises(UserError, match="model_type mixtral"):
        check_plan(skeleton(config), 2)


@pytest.mark.parametrize(
    ("name", "values", "size", "what"),
    [
        ("llama", {}, 4, r"key-value heads \(2\)"),
        ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 6}, 4, r"attention heads \(6\)"),
        ("llama", {"intermediate_size": 51}, 2, r"layers\.0\.mlp\.gate_proj's weight \(51\)"),
    ],
)
def test_sizes_that_do_not_come_out_even(name, values, size, what):
    with pytest.raises(UserError, match=f"tensor_parallel_size {size} does not divide .*{what}"):
        check_plan(changed(name, **values), size)


def test_a_plan_that_gathers_does_not_split_heads():
    check_plan(changed("phi3", hidden_size=48, num_attention_heads=3, num_key_value_heads=3), 2)


def test_an_adapter_is_refused():
    model = build("llama", torch.float32)
    LoRA(r=2).apply(model)
    with pytest.raises(UserError, match=r"an adapter \(LoRA\) is not split.*fsdp2\.yaml"):
        check_plan(model, 2)

"""Log-probs of responses against a naive computation: full logits, explicit loops, float64, one response at a time."""

import pytest
import torch
from networks import CONFIGS, GROUPED, batch_of, build, gradients, naive_log_probs, trees_of
from transformers import Llama4TextConfig, LlamaConfig, LlamaForCausalLM, RecurrentGemmaConfig, xLSTMConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bfpo_pl.component import UserError
from bfpo_pl.data.trees import PairTree
from bfpo_pl.models.attention import Auto, Padded
from bfpo_pl.models.log_probs import bind_log_probs, head_discrepancy, response_log_probs
from bfpo_pl.training import HeadMismatchError, ResponseModule


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("reduction", "chunk_size"), [("sum", 3), ("mean", 4096)])
def test_values_and_gradients_of_every_family(only_float64, name, reduction, chunk_size):
    model = build(name)
    trees = trees_of(2, 1, 4, 2)
    want = naive_log_probs(model, trees, reduction)
    got = response_log_probs(model, batch_of(trees), Padded(), reduction, chunk_size)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    direction = torch.linspace(-1.0, 1.5, len(want), dtype=torch.float64)
    want_gradients = gradients(model, (direction * want).sum())
    got_gradients = gradients(model, (direction * got).sum())
    assert max(g.abs().max() for g in want_gradients.values()) > 1e-3
    for parameter in want_gradients:
        torch.testing.assert_close(got_gradients[parameter], want_gradients[parameter], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 3, 4096])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_number_of_responses_and_chunks(only_float64, k, chunk_size):
    model = build("llama")
    for trees in (trees_of(k, seed=k), trees_of(k, k, k, seed=10 + k)):
        want = naive_log_probs(model, trees, "sum")
        got = response_log_probs(model, batch_of(trees), Padded(), "sum", chunk_size)
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
        with torch.no_grad():
            without = response_log_probs(model, batch_of(trees), Padded(), "sum", chunk_size)
        assert torch.equal(got, without)


def test_shortest_prompt_and_responses(only_float64):
    model = build("llama")
    trees = [PairTree([5], [[7], [9, 4, 3, 8]], ((0, 1),))]
    got = response_log_probs(model, batch_of(trees), Padded())
    torch.testing.assert_close(got, naive_log_probs(model, trees, "sum"), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("grad", [True, False])
def test_a_batch_without_responses_stays_in_the_graph(grad):
    model = build("llama")
    with torch.set_grad_enabled(grad):
        got = response_log_probs(model, batch_of([]), Padded())
    assert got.shape == (0,)
    assert got.dtype == torch.float64
    if grad:
        got.sum().backward()
        seen = [p.grad for p in model.parameters()]
        assert all(g is not None and g.count_nonzero() == 0 for g in seen)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_responses_do_not_see_each_other(only_float64, name):
    model = build(name)
    (tree,) = trees_of(2, seed=3)
    other = PairTree(tree.prompt_ids, [tree.response_ids[0], [4, 4, 4, *tree.response_ids[1][::-1]]], tree.pairs)
    bystander = trees_of(2, seed=8)
    before = response_log_probs(model, batch_of([tree, *bystander]), Padded())
    after = response_log_probs(model, batch_of([other, *bystander]), Padded())
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], atol=1e-12, rtol=1e-12)
    assert abs(after[1] - before[1]) > 1e-2


def test_a_half_precision_model_is_summed_in_float32():
    model = build("llama", torch.bfloat16)
    trees = trees_of(2, 4, 2)
    got = response_log_probs(model, batch_of(trees), Padded())
    assert got.dtype == torch.float32
    assert (got != got.bfloat16().float()).all()  # digits that a sum in bfloat16 would not have
    torch.testing.assert_close(got, naive_log_probs(model, trees, "sum").float(), atol=1.0, rtol=0.1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_head_logits_are_the_models_own(name, dtype):
    assert head_discrepancy(build(name, dtype), torch.device("cpu")) < (1e-10 if dtype == torch.float64 else 1e-4)


class CappedLlama(LlamaForCausalLM):
    """A model that does to its logits what no config entry says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.1
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unknown_change_of_the_logits_stops_the_run(dtype):
    model = CappedLlama(CONFIGS["llama"]).to(dtype)
    bind_log_probs(model, Padded())
    module = response_module(model)
    with pytest.raises(HeadMismatchError, match="CappedLlama changes its logits"):
        module.check_network(torch.device("cpu"))
    fine = build("llama", dtype)
    bind_log_probs(fine, Padded())
    response_module(fine).check_network(torch.device("cpu"))


def test_the_head_check_is_not_misled_by_dropout():
    config = LlamaConfig(**GROUPED, attention_dropout=0.5)
    model = LlamaForCausalLM(config).train()
    bind_log_probs(model, Padded())
    before = torch.get_rng_state()
    response_module(model).check_network(torch.device("cpu"))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_the_attention_is_chosen_by_itself_unless_it_is_named():
    assert isinstance(response_module(None).attention, Auto)


def response_module(model):
    """A module that has this policy and nothing else."""
    module = ResponseModule(None, None, None, None, None, "sum", 4096, "none")
    module.policy = model
    return module


OTHER_CAPS = {
    "recurrent-gemma": RecurrentGemmaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        lru_width=32,
        attention_window_size=4,
        logits_soft_cap=0.5,
    ),
    "xlstm": xLSTMConfig(
        vocab_size=48, hidden_size=32, embedding_dim=32, num_heads=4, num_blocks=2, output_logit_soft_cap=0.5
    ),
}


@pytest.mark.parametrize("name", OTHER_CAPS)
def test_soft_caps_by_other_names_are_known(name):
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(OTHER_CAPS[name])](OTHER_CAPS[name])
    model.get_output_embeddings().weight.data.mul_(20.0)
    assert head_discrepancy(model, torch.device("cpu")) < 1e-4


def test_a_network_without_a_part_below_its_head_is_refused():
    config = Llama4TextConfig(**GROUPED, head_dim=8, num_local_experts=2, intermediate_size_mlp=48)
    with pytest.raises(UserError, match=r"Llama4ForCausalLM cannot be used: .* 'language_model'"):
        bind_log_probs(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config), Auto())

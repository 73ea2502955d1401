"""Attention over pair trees against plain rows of a prompt and a response, in float64; what must fail fails."""

import copy

import pytest
import torch
from exactness import differences
from networks import CONFIGS, SIZES, batch_of, build, gradients, naive_log_probs, trees_of
from transformers import (
    AttentionInterface,
    BloomConfig,
    DogeConfig,
    FalconConfig,
    GptOssConfig,
    JambaConfig,
    JetMoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    NemotronConfig,
    PhimoeConfig,
    Qwen3NextConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bfpo_pl.component import RunError
from bfpo_pl.data.trees import PairTree
from bfpo_pl.models import attention as attention_module
from bfpo_pl.models import tree_attention
from bfpo_pl.models.attention import Auto, Padded, Segments, Unfold, Varlen
from bfpo_pl.models.log_probs import bind_log_probs, response_log_probs
from bfpo_pl.models.segment_attention import SegmentLoop
from bfpo_pl.models.tree_attention import NAME, Scores, TreeRows
from bfpo_pl.training import AttentionMismatchError, ResponseModule

BACKENDS = {"padded": Padded, "unfold": Unfold, "segments": Segments}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_of_every_family(only_float64, name, backend):
    model = build(name)
    loss, relative = differences(model, backend(), trees_of(2, 1, 3, 2), chunk_size=7)
    assert loss < 1e-10
    assert max(relative.values()) < 1e-10
    assert (model.config._attn_implementation == NAME) == (backend is not Padded)


def leaking(module, query, key, value, attention_mask, scaling, pair_rows=None, softcap=None, **kwargs):
    """Attends in the one row of tokens, causally within a tree: right but for chosen, which its rejected ones see."""
    pair_rows.layers += 1
    place = torch.arange(query.shape[2])
    distance = place[:, None] - place[None, :]
    same_tree = TREE[:, None] == TREE[None, :]
    mask = same_tree & (distance >= 0) & (distance < (kwargs.get("sliding_window") or 1000))
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask[None, None], 0.0, scaling)
    return tree_attention.soft_capped(query, key, value, mask, Scores(scaling, softcap=softcap)), None


TREES = trees_of(2, 1, 3, 2)
TREE = torch.tensor([n for n, tree in enumerate(TREES) for ids in (tree.prompt_ids, *tree.response_ids) for _ in ids])


@pytest.mark.parametrize("backend", [Unfold, Segments, Varlen])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt-neox", "gpt2"])
def test_a_planted_leak_of_chosen_into_rejected_fails_the_same_check(only_float64, monkeypatch, name, backend):
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, leaking)
    loss, relative = differences(build(name), backend(), TREES)
    assert loss > 1e-3
    assert max(relative.values()) > 1e-2


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt-neox", "gpt2"])
def test_with_one_response_a_tree_the_leak_is_none(only_float64, monkeypatch, name):
    """The function that leaks is otherwise right: it is the leak that the check sees."""
    trees = [PairTree(tree.prompt_ids, tree.response_ids[:1]) for tree in TREES]
    counts = [len(tree.prompt_ids) + len(tree.response_ids[0]) for tree in trees]
    monkeypatch.setitem(globals(), "TREE", torch.arange(len(trees)).repeat_interleave(torch.tensor(counts)))
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, leaking)
    loss, relative = differences(build(name), Unfold(), trees)
    assert max(loss, *relative.values()) < 1e-10


def response_module(backend, dtype=torch.float32):
    """A module with a tiny policy that attends by a backend, and nothing else."""
    module = ResponseModule(None, None, None, None, backend, "sum", 4096, "none")
    module.policy = build("llama", dtype)
    bind_log_probs(module.policy, backend)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [Unfold(), Segments(), Varlen(), Auto()], ids=repr)
def test_the_check_before_the_first_step_sees_a_leak(monkeypatch, backend, dtype):
    def leaking_in_rows(*arguments, pair_rows=None, **kwargs):
        plain = tree_attention.pair_rows_attention
        return leaking(*arguments, pair_rows=pair_rows, **kwargs) if pair_rows else plain(*arguments, **kwargs)

    module = response_module(backend, dtype)
    module.check_network(torch.device("cpu"))
    monkeypatch.setitem(globals(), "TREE", torch.tensor([0] * 10 + [1] * 7))
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, leaking_in_rows)
    with pytest.raises(AttentionMismatchError, match=r"LlamaForCausalLM attends .* Set model.attention to Padded"):
        module.check_network(torch.device("cpu"))


@pytest.mark.parametrize("leaked", [1, 2, 4])
@pytest.mark.parametrize("backend", [Segments(), Auto()], ids=repr)
def test_the_check_sees_a_leak_of_the_layout_that_auto_takes_for_long_responses(monkeypatch, backend, leaked):
    """One response, and no other, takes its prompt to go on to the end of the tree's first response."""
    plain, firsts = SegmentLoop.__init__, {1: 0, 2: 0, 4: 3}

    def leaking_loop(layout, batch):
        plain(layout, batch)
        assert layout.prompts[leaked] > 0
        layout.prompts[leaked] = layout.queries[firsts[leaked]]

    module = response_module(backend)
    monkeypatch.setattr(SegmentLoop, "__init__", leaking_loop)
    with pytest.raises(AttentionMismatchError):
        module.check_network(torch.device("cpu"))


@pytest.mark.parametrize(("device", "obstacle"), [("cpu", "none here"), ("meta", "none here"), ("cpu", None)])
def test_the_check_looks_at_all_that_auto_may_choose(monkeypatch, device, obstacle):
    monkeypatch.setattr(attention_module, "device_obstacle", lambda device: obstacle)
    batches = [trees_of(1), trees_of(4, 4), [PairTree([3] * 80, [[4] * 90, [5] * 70])]]
    chosen = {type(Auto().choice(batch_of(trees).to(device))) for trees in batches}
    assert chosen - {Padded} == {type(route) for route in Auto().routes(torch.device(device))}


def test_a_gradient_that_forgets_a_prompts_copies_fails_the_same_check(only_float64, monkeypatch):
    def first_only(ctx, gradient):
        return gradient.index_select(0, ctx.copies.cells[0]), None

    monkeypatch.setattr(tree_attention._ToCells, "backward", staticmethod(first_only))
    loss, relative = differences(build("llama"), Unfold(), TREES)
    assert loss < 1e-10
    assert max(relative.values()) > 1e-2


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "phi3"])
def test_a_window_one_token_too_wide_fails_the_same_check(only_float64, monkeypatch, name):
    plain = TreeRows.mask
    monkeypatch.setattr(TreeRows, "mask", lambda self, window: plain(self, window + 1))
    loss, _ = differences(build(name), Unfold(), TREES)
    assert loss > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_responses_do_not_see_each_other(only_float64, name):
    model = build(name)
    backend = Unfold().prepare(model)
    (tree,) = trees_of(2, seed=3)
    other = PairTree(tree.prompt_ids, [tree.response_ids[0], [4, 4, 4, *tree.response_ids[1][::-1]]], tree.pairs)
    bystander = trees_of(2, seed=8)
    before = response_log_probs(model, batch_of([tree, *bystander]), backend)
    after = response_log_probs(model, batch_of([other, *bystander]), backend)
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], atol=1e-12, rtol=1e-12)
    assert abs(after[1] - before[1]) > 1e-2


@pytest.mark.parametrize("backend", [Unfold, Segments])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ks", [(1,), (3,), (1, 1, 2), (2, 2, 2, 2)])
def test_shapes_of_batches(only_float64, ks, seed, backend):
    loss, relative = differences(build("llama"), backend(), trees_of(*ks, seed=seed), chunk_size=3)
    assert max(loss, *relative.values()) < 1e-10


@pytest.mark.parametrize("backend", [Unfold, Segments])
def test_shortest_prompt_and_responses(only_float64, backend):
    trees = [PairTree([5], [[7], [9, 4, 3, 8], [6]], ((0, 1),)), PairTree([5], [[7]])]
    model = build("llama")
    got = response_log_probs(model, batch_of(trees), backend().prepare(model))
    torch.testing.assert_close(got, naive_log_probs(build("llama"), trees, "sum"), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_activation_checkpointing_recomputes_the_same(only_float64, name):
    trees = trees_of(2, 3, 2)
    model = build(name)
    plain = differences(model, Unfold(), trees)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    backend, batch = Unfold().prepare(model), batch_of(trees)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    ours = response_log_probs(model, batch, backend)
    batch_of(trees_of(1, 1, seed=5))
    response_log_probs(model, batch_of(trees_of(1, 2, seed=5)), backend)  # another batch between forward and backward
    forward = len(calls)
    direction = torch.linspace(-1.0, 1.5, len(ours), dtype=ours.dtype)
    found = gradients(model, (direction * ours).sum())
    assert len(calls) == forward + 2  # two layers recomputed
    reference = build(name)
    right = gradients(reference, (direction * naive_log_probs(reference, trees, "sum")).sum())
    assert max(((found[n] - g).norm() / g.norm()).item() for n, g in right.items()) < 1e-10
    assert max(plain[0], *plain[1].values()) < 1e-10


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, (Unfold, Segments)[place % 2]) for place, name in enumerate(CONFIGS)]
    + [(name, backend) for name in ("llama", "gemma2", "phi3") for backend in (Unfold, Segments)],
)
def test_float32_is_as_exact_as_the_naive_computation(name, backend):
    trees = trees_of(2, 1, 3, 2)
    exact = build(name)
    right = naive_log_probs(exact, trees, "sum")
    direction = torch.linspace(-1.0, 1.5, len(right), dtype=right.dtype)
    right_gradients = gradients(exact, (direction * right).sum())
    errors = []
    for tested in (backend(), None):
        model = build(name, torch.float32)
        if tested is None:
            values = naive_log_probs(model, trees, "sum")
        else:
            values = response_log_probs(model, batch_of(trees), tested.prepare(model))
        found = gradients(model, (direction.float() * values).sum())
        squares = sum(((found[n] - g).norm() ** 2).item() for n, g in right_gradients.items())
        errors.append(((values - right).norm().item(), squares**0.5))
    assert 0 < errors[0][0] <= 2 * errors[1][0]
    assert 0 < errors[0][1] <= 2 * errors[1][1]


@pytest.mark.parametrize("backend", [Unfold(), Segments(), Varlen(), Auto()], ids=repr)
def test_a_batch_without_responses_stays_in_the_graph(backend):
    model = build("llama")
    got = response_log_probs(model, batch_of([]), backend.prepare(model))
    assert got.shape == (0,)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())


def test_the_same_batch_gives_the_same_gradients_every_time():
    model = build("llama", torch.float32)
    backend, batch = Unfold().prepare(model), batch_of(trees_of(3, 2, 4))
    first, second = (gradients(model, response_log_probs(model, batch, backend).sum()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
def test_a_prepared_network_generates_and_scores_as_before(name):
    model = build(name, torch.float32)
    tokens = torch.tensor([[5, 9, 31, 7, 7, 12, 40, 3], [0, 0, 0, 8, 20, 33, 9, 4]])
    mask = (tokens != 0).long()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    logits, answer = model(tokens, attention_mask=mask).logits, model.generate(tokens, attention_mask=mask, **options)
    Unfold().prepare(model)
    after = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(after[mask.bool()], logits[mask.bool()], atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(tokens, attention_mask=mask, **options), answer)


def test_a_prepared_network_saves_no_trace_of_it(tmp_path):
    model = build("llama", torch.float32)
    Unfold().prepare(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


SMALL = {**SIZES, "num_key_value_heads": 2}
NOT_TREES = {
    "bloom": (BloomConfig(vocab_size=48, hidden_size=32, n_layer=2, n_head=4), "interface"),
    "mpt": (MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=48, max_seq_len=64), "interface"),
    "falcon-alibi": (FalconConfig(**SIZES, alibi=True), "ALiBi"),
    "mamba": (MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2, state_size=4), "recurrent state"),
    "jamba": (
        JambaConfig(**SMALL, num_experts=2, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4),
        "recurrent state",
    ),
    "qwen3-next": (Qwen3NextConfig(**SMALL, head_dim=8, num_experts=2, moe_intermediate_size=16), "recurrent state"),
    "nemotron": (NemotronConfig(**SMALL), "interface"),
    "doge": (DogeConfig(**SMALL), "interface"),
    "capacity": (LlamaConfig(**SMALL, expert_capacity=64), "over their capacity"),
    "mixtral-noise": (MixtralConfig(**SMALL, num_local_experts=2, router_jitter_noise=0.1), "noise while training"),
    "phimoe": (PhimoeConfig(**SMALL, num_local_experts=2), "noise while training"),
    "gpt-oss": (GptOssConfig(**SMALL, head_dim=8, num_local_experts=2), "more than scaled dot products"),
}


@pytest.mark.parametrize("name", NOT_TREES)
@pytest.mark.parametrize("backend", [Unfold, Segments, Varlen, Auto])
def test_other_networks_are_padded_and_the_log_says_why(monkeypatch, name, backend):
    config, reason = NOT_TREES[name]
    said = []
    monkeypatch.setattr(attention_module, "rank_zero_info", said.append)
    monkeypatch.setattr(attention_module, "_said", set())
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](copy.deepcopy(config))
    before = model.config._attn_implementation
    for _ in range(2):
        assert isinstance(backend().prepare(model), Padded)
    assert len(said) == 1
    assert "Padded" in said[0]
    assert reason in said[0]
    assert type(model).__name__ in said[0]
    assert model.config._attn_implementation == before


def test_an_attention_that_the_source_asks_for_is_kept():
    model = build("llama", torch.float32)
    model.config._attn_implementation = "flex_attention"
    assert isinstance(Unfold().prepare(model), Padded)
    assert model.config._attn_implementation == "flex_attention"


EXPERTS = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager"),
    "jetmoe": JetMoeConfig(  # its layers view what attention gives
        **{name: size for name, size in SIZES.items() if name != "num_attention_heads"},
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=3,
        num_experts_per_tok=2,
    ),
}


@pytest.mark.parametrize("backend", [Unfold, Segments])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_exact_since_none_drops_a_token(only_float64, name, backend):
    config = copy.deepcopy(EXPERTS[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).double().eval()
    loss, relative = differences(model, backend(), trees_of(2, 3, 2))
    assert max(loss, *relative.values()) < 1e-10


def test_a_network_that_was_not_prepared_is_refused():
    with pytest.raises(RunError, match="prepare"):
        response_log_probs(build("llama"), batch_of(trees_of(2)), Unfold())


def test_layers_that_do_not_attend_in_rows_stop_the_run():
    model = build("llama")
    backend = Unfold().prepare(model)
    layer = model.model.layers[1].self_attn
    layer.config = copy.deepcopy(model.config)
    layer.config._attn_implementation = "sdpa"
    with pytest.raises(RunError, match=r"Only 1 of 2 layers .* Set model.attention to Padded"):
        response_log_probs(model, batch_of(trees_of(2, 2)), backend)

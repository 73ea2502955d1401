"""Attention by segments: faults that the checks must see; `Varlen` by an emulation and, where there is one, a GPU."""

import copy

import pytest
import torch
from exactness import differences, emulate_varlen, emulated_varlen
from networks import CONFIGS, SIZES, batch_of, build, gradients, trees_of
from torch.nn.attention.varlen import varlen_attn
from transformers import LlamaConfig, LlamaForCausalLM

from bfpo_pl.data.trees import PairTree
from bfpo_pl.models import attention as attention_module
from bfpo_pl.models import segment_attention
from bfpo_pl.models.attention import Auto, Padded, Segments, Unfold, Varlen
from bfpo_pl.models.log_probs import bind_log_probs, response_log_probs
from bfpo_pl.models.segment_attention import PackedSegments, SegmentLoop, varlen_obstacle
from bfpo_pl.models.tree_attention import Scores, TreeRows

TREES = trees_of(2, 1, 3, 2)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def said(monkeypatch):
    """What the log says."""
    messages = []
    monkeypatch.setattr(attention_module, "rank_zero_info", messages.append)
    monkeypatch.setattr(attention_module, "_said", set())
    return messages


@pytest.mark.parametrize("name", CONFIGS)
def test_varlen_of_every_family(only_float64, monkeypatch, said, name):
    calls = emulate_varlen(monkeypatch)
    loss, relative = differences(build(name), Varlen(), TREES, chunk_size=7)
    assert max(loss, *relative.values()) < 1e-10
    assert len(calls) == (0 if name == "gemma2" else 2)
    assert said == (
        ["Attention: Unfold in place of Varlen, since its kernel has no soft cap."] if name == "gemma2" else []
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ks", [(1,), (3,), (1, 1, 2), (2, 2, 2, 2)])
def test_varlen_of_shapes_of_batches(only_float64, monkeypatch, ks, seed):
    emulate_varlen(monkeypatch)
    loss, relative = differences(build("mistral"), Varlen(), trees_of(*ks, seed=seed), chunk_size=3)
    assert max(loss, *relative.values()) < 1e-10


@pytest.mark.parametrize(
    ("name", "fault"), [("llama", "leak"), ("gpt2", "leak"), ("mistral", "wider"), ("phi", "shift")]
)
def test_a_faulty_kernel_fails_the_same_check(only_float64, monkeypatch, name, fault):
    emulate_varlen(monkeypatch, **{fault: 1})
    loss, relative = differences(build(name), Varlen(), TREES)
    assert loss > 1e-3
    assert max(relative.values()) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_loop_that_shows_chosen_to_rejected_fails_the_same_check(only_float64, monkeypatch, name):
    plain = SegmentLoop.__init__

    def leaking(self, batch):
        plain(self, batch)
        self.prompts = [
            self.queries[n - 1] if prompt and not self.prompts[n - 1] else prompt
            for n, prompt in enumerate(self.prompts)
        ]

    monkeypatch.setattr(SegmentLoop, "__init__", leaking)
    loss, relative = differences(build(name), Segments(), TREES)
    assert loss > 1e-3
    assert max(relative.values()) > 1e-2


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "phi3"])
def test_a_loop_with_a_window_too_wide_fails_the_same_check(only_float64, monkeypatch, name):
    plain = SegmentLoop.mask
    monkeypatch.setattr(SegmentLoop, "mask", lambda self, queries, keys, window: plain(self, queries, keys, window + 1))
    loss, _ = differences(build(name), Segments(), TREES)
    assert loss > 1e-3


def test_what_keeps_a_layer_from_the_kernel(monkeypatch):
    query = torch.zeros(1, 4, 6, 64, dtype=torch.bfloat16)
    assert "runs on CUDA devices alone, not on cpu" in varlen_obstacle(query, query, Scores())
    monkeypatch.setattr(segment_attention, "device_obstacle", lambda device: None)
    assert varlen_obstacle(query, query, Scores(scaling=0.1, window=3)) is None
    assert varlen_obstacle(query.half(), query.half(), Scores()) is None
    assert "not in float32" in varlen_obstacle(query.float(), query.float(), Scores())
    assert "soft cap" in varlen_obstacle(query, query, Scores(softcap=1.0))
    assert "dropout" in varlen_obstacle(query, query, Scores(dropout=0.1))
    for width in (12, 264):
        assert f"not {width}" in varlen_obstacle(query[..., :1].expand(1, 4, 6, width), query, Scores())
    assert "(32 for values)" in varlen_obstacle(query, query[..., :32], Scores())


def test_the_device_must_be_recent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "has 7.5" in segment_attention.device_obstacle(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert segment_attention.device_obstacle(torch.device("cuda")) is None


def test_a_kernel_of_an_older_torch_is_an_obstacle(monkeypatch):
    def older(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(segment_attention, "varlen_attn", older)
    assert "lacks enable_gqa" in segment_attention.device_obstacle(torch.device("cuda"))


def test_without_the_kernel_varlen_unfolds_and_says_why_once(only_float64, said):
    model = build("llama")
    want = response_log_probs(model, batch_of(TREES), Unfold().prepare(model))
    for _ in range(2):
        got = response_log_probs(model, batch_of(TREES), Varlen().prepare(model))
        assert torch.equal(got, want)
    (message,) = said
    assert "Unfold in place of Varlen" in message
    assert "not on cpu" in message


def test_the_kernel_is_given_autocasts_type(monkeypatch):
    calls = []

    def seen(query, key, value, *arguments, **kwargs):
        calls.append({query.dtype, key.dtype, value.dtype})
        return emulated_varlen()(query, key, value, *arguments, **kwargs)

    emulate_varlen(monkeypatch)
    monkeypatch.setattr(segment_attention, "varlen_attn", seen)
    model = build("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        response_log_probs(model, batch_of(TREES), Varlen().prepare(model))
    assert calls == [{torch.bfloat16}] * 2


def test_tokens_in_another_order_are_unfolded(only_float64):
    """Responses before their prompts: no segment is followed by its response."""
    (tree,) = trees_of(2, seed=4)
    batch = batch_of([tree])
    prompt, first, second = (len(tree.prompt_ids), *map(len, tree.response_ids))
    order = torch.cat([torch.arange(prompt, len(batch.tokens)), torch.arange(prompt)])
    moved = {
        "tokens": batch.tokens[order],
        "positions": batch.positions[order],
        "segment_start": torch.tensor([first + second, 0, first]),
    }
    plain = ("segment_length", "response_segment", "prompt_segment", "response_stream", "pair_stream")
    plain += ("stream_weight", "annotations", "streams")
    other = type(batch)(**moved, **{name: getattr(batch, name) for name in plain})
    assert batch.in_order
    assert not other.in_order
    model = build("llama")
    for backend in (Segments(), Varlen()):
        assert isinstance(backend.layout(other), TreeRows)
        got, want = (response_log_probs(model, b, backend.prepare(model)) for b in (other, batch))
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_auto_chooses_by_device_and_sizes_and_says_so(monkeypatch, said):
    def batch(prompt, *responses):
        return batch_of([PairTree([3] * prompt, [[4] * n for n in responses])])

    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.config.max_position_embeddings = 4096
    bind_log_probs(model, Auto())
    auto = Auto()
    few = batch(9, 9, 9)  # 27 of 36 cells
    many = batch(200, 200, 200)
    alone = batch(1, 9, 9)  # 19 of 20
    assert [type(auto.choice(b)) for b in (few, many, alone)] == [Unfold, Segments, Padded]
    with torch.no_grad():
        for b in (few, few, alone):
            model.response_log_probs(b)
    assert [message.split(" for batches")[0] for message in said] == [
        "Attention: Auto chose Unfold (prompts once)",
        "Attention: Auto chose Padded",
    ]
    monkeypatch.setattr(attention_module, "device_obstacle", lambda device: None)
    assert [type(auto.choice(b)) for b in (few, many, alone)] == [Varlen] * 3


def test_tables_are_made_without_waiting_for_a_device():
    """On the meta device nothing can be read back."""
    batch = batch_of(TREES).to("meta")
    layout = PackedSegments(batch)
    assert layout.copies.tokens.shape == (batch.key_tokens,)
    assert layout.query_ends.shape == layout.key_ends.shape == (len(batch) + 1,)
    assert TreeRows(batch).copies.cells.shape == (3, len(batch.tokens))


@needs_gpu
@pytest.mark.parametrize("window", [-1, 2])
@pytest.mark.parametrize("heads", [4, 2])
def test_the_kernel_is_what_the_emulation_says(heads, window):
    """Few queries over more keys: any other alignment would be far off."""
    generator = torch.Generator("cuda").manual_seed(0)
    ends = [torch.tensor(e, dtype=torch.int32, device="cuda") for e in ([0, 3, 4, 9], [0, 7, 16, 21])]
    shapes = [(9, 4, 16), (21, heads, 16), (21, heads, 16)]
    states = [3 * torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes]
    found = []
    for attend, dtype in ((varlen_attn, torch.bfloat16), (emulated_varlen(), torch.float64)):
        leaves = [s.to(dtype).requires_grad_() for s in states]
        output = attend(*leaves, *ends, 7, 9, scale=0.3, window_size=(window, 0), enable_gqa=heads != 4)
        found.append([output, *torch.autograd.grad((output * torch.linspace(-1, 1, 16, device="cuda")).sum(), leaves)])
    for ours, right in zip(*found, strict=True):
        assert (ours.double() - right).norm() < 2e-2 * right.norm()


@needs_gpu
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3"])
def test_varlen_on_the_gpu_is_as_exact_as_padded(name):
    exact = build(name).cuda()
    batch = batch_of(TREES).to("cuda")
    right = gradients(exact, response_log_probs(exact, batch, Padded()).sum())
    errors = []
    for backend in (Varlen(), Padded()):
        model = copy.deepcopy(exact).bfloat16()
        found = gradients(model, response_log_probs(model, batch, backend.prepare(model)).sum())
        squares = sum(((found[n].double() - g).norm() / g.norm()).item() ** 2 for n, g in right.items())
        errors.append((squares / len(right)) ** 0.5)
    assert 0 < errors[0] < 2 * errors[1] < 0.5

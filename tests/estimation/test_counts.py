"""What is counted without contents, against real tensors: parameters, optimizer state, live bytes, operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bfpo_pl.data.collate import collate
from bfpo_pl.data.trees import PairTree
from bfpo_pl.estimation.devices import device_kind
from bfpo_pl.estimation.ledger import Ledger
from bfpo_pl.estimation.memory import weights_of
from bfpo_pl.estimation.optimizer_state import optimizer_memory
from bfpo_pl.estimation.plan import SHARDED, SINGLE, Plan
from bfpo_pl.estimation.trace import passing, training
from bfpo_pl.models.attention import Padded, Segments, Unfold, Varlen
from bfpo_pl.models.checkpointing import checkpoint_activations
from bfpo_pl.models.log_probs import bind_log_probs
from bfpo_pl.models.reference import FrozenCopy
from bfpo_pl.models.sources import HFModel, TinyModel
from bfpo_pl.models.trainable import Everything, LoRA, Select
from bfpo_pl.optimizers import AdamW32

TINY = TinyModel(hidden_size=32, layers=2, heads=2, intermediate_size=80)


def plan(**changes):
    given = {
        "source": TINY,
        "trainable": Everything(),
        "references": {},
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        "attention": Padded(),
        "chunk_size": 4096,
        "checkpointing": "none",
        "precision": "32-true",
        "accumulate": 1,
        "layout": SINGLE,
        "bucket_views": False,
        "devices": 1,
        "kind": device_kind("cpu"),
    }
    return Plan(**{**given, **changes})


@pytest.fixture
def batch():
    """Two prompts of 7 and 5 tokens with two responses each, of 9, 4, 6 and 8."""
    trees = [
        PairTree([5] * prompt, [[6] * each for each in responses], ((0, 1),))
        for prompt, responses in ((7, (9, 4)), (5, (6, 8)))
    ]
    return collate([(0, tree) for tree in trees], ["only"], [1.0])


def real(source, trainable, how="none"):
    model = source.load_model()
    trainable.apply(model)
    checkpoint_activations(model, how)
    return model.train()


# ---------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "trainable", [Everything(), Select(["down_proj"]), LoRA(r=4)], ids=lambda each: type(each).__name__
)
def test_parameters_are_those_of_the_real_network(trainable):
    model = real(TINY, trainable)
    found = weights_of(plan(trainable=trainable), TINY, trains=True)
    assert found.count == sum(p.numel() for p in model.parameters())
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.all == 4 * found.count
    assert found.gradients == 4 * found.trained


def test_parameters_by_hand():
    # A Llama block: q, k, v, o of 32 · 32, gate, up and down of 32 · 80, two norms of 32. The head is the embedding.
    found = weights_of(plan(), TINY, trains=False)
    vocabulary = len(TINY.load_tokenizer())
    assert found.trained == 0
    assert found.block == 4 * (4 * 32 * 32 + 3 * 32 * 80 + 2 * 32)
    assert found.root == 4 * (vocabulary * 32 + 32)
    assert found.all == 2 * found.block + found.root
    half = weights_of(plan(precision="bf16-true"), TINY, trains=False)
    assert half.all == found.all / 2
    assert half.types == {"bfloat16": half.all}
    gathered = weights_of(plan(precision="bf16-mixed", layout=SHARDED, devices=2), TINY, trains=False)
    assert (gathered.all, gathered.root, gathered.block) == (found.all, found.root, found.block / 2)


# ---------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3),
        lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=1e-3),
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        lambda p: AdamW32(p, lr=1e-3),
    ],
    ids=["adamw", "fused", "amsgrad", "sgd", "momentum", "adamw32"],
)
def test_optimizer_state_is_that_of_a_real_step(make, kind):
    model = real(TINY, Everything()).to(kind)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make(model.parameters())
    optimizer.step()
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    precision = "bf16-true" if kind is torch.bfloat16 else "32-true"
    assert optimizer_memory(plan(optimizer=make, precision=precision), model.parameters()).state == held


def test_an_optimizer_that_reads_values_steps_for_real_and_one_that_fails_is_unknown():
    parameters = list(real(TINY, Everything()).parameters())
    found = optimizer_memory(plan(optimizer=lambda p: torch.optim.Adafactor(p, lr=1e-3)), parameters)
    assert found.name == "Adafactor"
    assert 0 < found.state < 4 * sum(p.numel() for p in parameters)  # rows and columns, not elements

    class OnGPUs(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("needs a GPU")

    found = optimizer_memory(plan(optimizer=lambda p: OnGPUs(p, lr=1e-3)), parameters)
    assert found.state is None
    assert "needs a GPU" in found.name


def test_shards_and_temporaries_of_an_optimizer():
    parameters = list(real(TINY, Everything()).parameters())
    whole = optimizer_memory(plan(), parameters)
    halves = optimizer_memory(plan(layout=SHARDED, devices=2), parameters)
    scalars = 4 * len(parameters)  # counts of steps
    assert halves.state - scalars == pytest.approx((whole.state - scalars) / 2, rel=0.01)
    fused = plan(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))
    assert optimizer_memory(fused, parameters).working == 0
    at_once = optimizer_memory(plan(kind=device_kind("h100")), parameters)
    assert at_once.working > 0.9 * 4 * sum(p.numel() for p in parameters)  # torch's way on GPUs: all tensors together
    assert whole.working < 3 * 4 * max(p.numel() for p in parameters)


# ---------------------------------------------------------------------------------------------------- activations


def saved_bytes(model, batch):
    """What autograd really keeps of the blocks besides weights, and their output; each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept, found = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address comes twice
        return tensor

    def note(module, args, output):
        keep(output.last_hidden_state)
        found.append(sum(size for size, _ in kept.values()))

    model.base_model.register_forward_hook(note)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.response_log_probs(batch)
    return found[0]


@pytest.mark.parametrize("backend", [Padded, Unfold, Segments])
@pytest.mark.parametrize("trainable", [Everything(), Select(["down_proj"])], ids=lambda each: type(each).__name__)
def test_activations_are_what_autograd_keeps(backend, trainable, batch):
    model = real(TINY, trainable)
    bind_log_probs(model, backend())
    found = training(plan(attention=backend(), trainable=trainable), batch)
    assert found.backbone == pytest.approx(saved_bytes(model, batch), rel=0.02)


def test_activations_by_hand(batch):
    """The bytes of docs/estimate.md's formula, for a Llama block under `Padded` in float32."""
    tokens = len(batch) * batch.max_length
    sources = [TinyModel(hidden_size=32, layers=layers, heads=2, intermediate_size=80) for layers in (3, 4)]
    three, four = (training(plan(source=source), batch).backbone for source in sources)
    per_token = (four - three) / tokens
    hidden, inner, heads = 32, 80, 2
    # Two norms: the input, the normalised input, the result (3 each, and an inverse deviation). Queries, keys and
    # values, attention's output and its normaliser of each head. gate, silu(gate), up and their product.
    assert per_token == 4 * (10 * hidden + 4 * inner + heads + 2)


def test_checkpointing_keeps_less_and_computes_more(batch):
    none, selective, full = (training(plan(checkpointing=how), batch) for how in ("none", "selective", "full"))
    assert full.backbone < 0.2 * none.backbone
    assert full.backbone < selective.backbone < none.backbone
    assert selective.backward_flops <= 1.05 * none.backward_flops
    assert full.backward_flops > 1.2 * none.backward_flops


def test_two_depths_say_what_the_whole_network_does(batch, monkeypatch):
    source = TinyModel(hidden_size=32, layers=8, heads=2, intermediate_size=80)
    deep = plan(source=source, layout=SHARDED, devices=2, checkpointing="full")
    from_two = vars(training(deep, batch))
    monkeypatch.setattr("bfpo_pl.estimation.trace._DEPTHS", (99, 99))
    whole = vars(training(deep, batch))
    assert from_two == pytest.approx(whole, rel=1e-9)


def test_autocast_keeps_casts_of_weights_unless_blocks_are_gathered_in_its_type(batch):
    mixed = training(plan(precision="bf16-mixed"), batch)
    linear = 2 * (4 * 32 * 32 + 3 * 32 * 80)  # of two blocks
    assert mixed.casts == 2 * linear
    assert training(plan(precision="bf16-mixed", layout=SHARDED, devices=2), batch).casts == 0
    assert training(plan(), batch).casts == 0


# ---------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("how", ["none", "full"])
@pytest.mark.parametrize(
    "trainable", [Everything(), Select(["down_proj"]), LoRA(r=4)], ids=lambda each: type(each).__name__
)
def test_operations_are_those_of_a_real_step(trainable, how, batch):
    model = real(TINY, trainable, how)
    bind_log_probs(model, Padded())
    with FlopCounterMode(display=False) as counter:
        model.response_log_probs(batch).sum().backward()
    found = training(plan(trainable=trainable, checkpointing=how), batch)
    # torch's counter knows nothing of attention on a CPU; by hand: 2 products forward, 5 backward, causal.
    length, width = batch.max_length, 16
    pairs = len(batch) * length * (length + 1) / 2
    # Nothing that trains lies before the first block's attention under Select: it has no backward pass.
    backward = 1 if isinstance(trainable, Select) and how == "none" else 2
    products = 2 * 2 * (2 if how == "full" else 1) + 5 * backward
    attention = products * 2 * pairs * 2 * width  # heads, width twice
    assert found.forward_flops + found.backward_flops == pytest.approx(counter.get_total_flops() + attention, rel=1e-6)


def test_operations_by_hand(batch):
    """Forward: 2 for each weight of the blocks and each token, 2 · vocabulary · width for each response token."""
    tokens = len(batch.tokens)
    found = passing(plan(attention=Unfold()), None, batch)
    vocabulary = len(TINY.load_tokenizer())
    linear = 2 * 2 * (4 * 32 * 32 + 3 * 32 * 80) * tokens
    head = 2 * vocabulary * 32 * batch.response_tokens
    pairs = len(batch) * batch.max_length * (batch.max_length + 1) / 2
    attention = 2 * 2 * 2 * pairs * (16 + 16)
    assert found.flops == linear + head + attention


def test_one_kernel_over_responses_on_gpus(batch):
    found = training(plan(attention=Varlen(), precision="bf16-mixed", kind=device_kind("h100")), batch)
    unfolded = training(plan(attention=Unfold(), precision="bf16-mixed", kind=device_kind("h100")), batch)
    assert found.forward_flops < unfolded.forward_flops  # no padding, and prompts ask once
    assert found.backbone < unfolded.backbone


# ---------------------------------------------------------------------------------------------------- the ledger


def test_a_ledger_follows_tensors_until_they_are_freed():
    ledger = Ledger()
    with ledger:
        ledger.phase("only")
        first = torch.zeros(1000)
        view = first[10:].view(-1, 10)
        second = first + 1
        assert ledger.live == 8000
        del first
        assert ledger.live == 8000  # its view is there
        del view, second
        assert ledger.live == 0
    assert ledger.peaks["only"].alone == 8000


def test_gradients_of_a_step_leave_the_other_tensors(batch):
    found = training(plan(), batch)
    gradients = weights_of(plan(), TINY, trains=True).gradients
    assert found.early_together - found.early_then <= gradients
    assert found.early_together > found.early
    halves = training(plan(layout=SHARDED, devices=2), batch)
    assert halves.backbone == found.backbone
    assert halves.early_then > found.early_then  # gradients of embedding and head are whole until the end


def test_sources_without_a_config_are_refused(batch, tmp_path):
    class Own(TinyModel.__base__):
        def load_tokenizer(self): ...

        def load_model(self): ...

    with pytest.raises(ValueError, match="Own has no config"):
        training(plan(source=Own()), batch)
    with pytest.raises(ValueError, match=r"no config\.json"):
        training(plan(source=HFModel(str(tmp_path))), batch)


def test_networks_of_references():
    other = TinyModel(layers=1)
    given = plan(references={"reference": FrozenCopy(), "helper": FrozenCopy(other)})
    assert given.networks == [TINY, other]

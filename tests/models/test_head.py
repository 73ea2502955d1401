"""Log-probs from the output head against plain autograd over the whole logits, and what the fused function spares."""

import copy
import itertools

import peft
import pytest
import torch
from networks import CONFIGS, VOCABULARY, build, gradients
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bfpo_pl.models import head as head_module
from bfpo_pl.models.head import LogitTransform, head_logits, token_log_probs

TOKENS, WIDTH = 17, 32
VARIANTS = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "scaling": {"logits_scaling": 3.0},
    "cap": {"final_logit_softcapping": 3.0},
    "scale and cap": {"logit_scale": 2.5, "final_logit_softcapping": 3.0},
}


def network(variant="plain", bias=False, dtype=torch.float64):
    """A Llama whose head has a bias or changes its logits."""
    model = build("llama", torch.float64)
    for name, value in VARIANTS[variant].items():
        setattr(model.config, name, value)
    if bias:
        generator = torch.Generator().manual_seed(1)
        model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY, generator=generator, dtype=torch.float64))
    return model.to(dtype)


def inputs(dtype=torch.float64, tokens=TOKENS):
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    factors = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return states, targets, factors


def naive(model, states, targets):
    """Full logits, from the formulas of the models' papers."""
    config = model.config
    logits = states @ model.lm_head.weight.T
    if model.lm_head.bias is not None:
        logits = logits + model.lm_head.bias
    logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return functional.log_softmax(logits, dim=1)[torch.arange(len(targets)), targets]


def results(function, model, states, targets, factors, *arguments):
    """Values, and gradients by states, weight and bias."""
    states = states.detach().clone().requires_grad_()
    values = function(model, states, targets, *arguments)
    wanted = [p for p in (states, model.lm_head.weight, model.lm_head.bias) if p is not None and p.requires_grad]
    return values.detach(), *torch.autograd.grad((values * factors.to(values.dtype)).sum(), wanted)


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("chunk_size", [1, 7, 10**6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", ["head", "frozen", "bias alone"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(variant, trained, bias, chunk_size):
    model = network(variant, bias)
    model.requires_grad_(trained == "head")
    if trained == "bias alone" and bias:
        model.lm_head.bias.requires_grad_(True)
    ours = results(token_log_probs, model, *inputs(), chunk_size)
    theirs = results(naive, model, *inputs())
    assert len(ours) == len(theirs) == {"head": 3 + bias, "frozen": 2, "bias alone": 2 + bias}[trained]
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float64
        assert right.norm() > 1e-2
        assert relative(mine, right) < 1e-12
    with torch.no_grad():
        assert torch.equal(token_log_probs(model, *inputs()[:2], chunk_size), ours[0])


def test_only_the_head_trains():
    model = network("cap")
    states, targets, factors = inputs()
    found = []
    for function in (lambda *a: token_log_probs(*a, 5), naive):
        value = (function(model, states.detach(), targets) * factors).sum()
        found += torch.autograd.grad(value, [model.lm_head.weight])
    assert relative(*found) < 1e-12


def test_a_tied_head_adds_both_gradients(only_float64):
    model = build("qwen2-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens, (_, targets, factors) = torch.arange(TOKENS)[None] + 3, inputs()
    found = []
    for function in (lambda *a: token_log_probs(*a, 5), naive):
        states = model.model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        found.append(gradients(model, (function(model, states, targets) * factors).sum()))
    assert max(relative(found[0][name], found[1][name]) for name in found[1]) < 1e-12


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("variant", ["plain", "cap"])
def test_float32_is_as_exact_as_the_naive_computation(variant, frozen):
    errors = []
    model = network(variant).requires_grad_(not frozen)
    right = results(naive, model, *inputs(tokens=200))
    single = copy.deepcopy(model).float()
    states, targets, factors = inputs(torch.float32, tokens=200)
    for function, arguments in ((token_log_probs, (64,)), (naive, ())):
        found = results(function, single, states, targets, factors, *arguments)
        errors.append([relative(mine.double(), want) for mine, want in zip(found, right, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize("frozen", [False, True])
def test_under_autocast_only_the_product_is_in_bfloat16(frozen):
    model = network("cap", bias=True).requires_grad_(not frozen)
    right = results(naive, model, *inputs())
    single = copy.deepcopy(model).float()
    states, targets, factors = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = results(token_log_probs, single, states, targets, factors, 7)
    rounded = (states.bfloat16() @ single.lm_head.weight.bfloat16().T + single.lm_head.bias.bfloat16()).float()
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert relative(ours[0], functional.log_softmax(3 * torch.tanh(rounded / 3), 1)[range(TOKENS), targets]) < 5e-3
    for mine, want in zip(ours, right, strict=True):
        assert relative(mine.double(), want) < 2e-2


class Products(TorchDispatchMode):
    """Notes the matrix products that have the vocabulary as one of their dimensions, and the largest tensor."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_") and any(
            VOCABULARY in a.shape for a in (*arguments, output) if isinstance(a, torch.Tensor)
        ):
            self.count += 1
        if isinstance(output, torch.Tensor) and VOCABULARY in output.shape:
            self.largest = max(self.largest, output.numel())
        return output


@pytest.mark.parametrize(("frozen", "products"), [(False, 4), (True, 2)])
def test_a_frozen_head_meets_no_second_pass_and_no_tensor_is_larger_than_a_chunk(frozen, products):
    model = network().requires_grad_(not frozen)
    states, targets, factors = inputs(tokens=1000)
    with Products() as seen:
        (token_log_probs(model, states, targets, 50) * factors).sum().backward()
    # The last chunk's logits are kept for the backward pass.
    assert seen.count == products * 20 - (not frozen)
    assert seen.largest == 50 * VOCABULARY
    assert states.grad.norm() > 0


def test_gradients_can_be_taken_twice():
    model = network("cap", bias=True)
    states, targets, factors = inputs()
    loss = (token_log_probs(model, states, targets, 7) * factors).sum()
    wanted = [states, model.lm_head.weight, model.lm_head.bias]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    for mine, again in zip(first, torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(again, mine, atol=1e-12, rtol=1e-12)


class Watched(nn.Linear):
    """A linear layer of another class, as adapters and quantisers make them."""

    calls = 0

    def forward(self, states):
        Watched.calls += 1
        return 2 * super().forward(states)


@pytest.mark.parametrize("kind", ["class", "hook", "adapter"])
def test_a_head_that_is_not_a_plain_linear_layer_is_called(kind):
    model = network()
    if kind == "class":
        model.lm_head.__class__ = Watched
        Watched.calls = 0
    elif kind == "hook":
        model.lm_head.register_forward_hook(lambda module, given, output: 2 * output)
    else:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    states, targets, factors = inputs()
    values = token_log_probs(model, states, targets, 7)
    want = functional.log_softmax(head_logits(model, states), dim=1)[range(TOKENS), targets]
    torch.testing.assert_close(values, want, atol=1e-12, rtol=1e-12)
    trained = [states, *(p for p in model.get_output_embeddings().parameters() if p.requires_grad)]
    ours = torch.autograd.grad((values * factors).sum(), trained)
    theirs = torch.autograd.grad((want * factors).sum(), trained)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-12
    assert relative(values, naive(network(), states, targets)) > 1e-3  # what is around the weight counts


def test_head_in_half_precision_adds_its_chunks_in_float32():
    model = network(dtype=torch.bfloat16)
    states, targets, factors = inputs(torch.bfloat16, tokens=512)
    right = results(naive, copy.deepcopy(model).double(), states.double(), targets, factors)[2]
    errors = [
        relative(results(token_log_probs, model, states, targets, factors, size)[2].double(), right)
        for size in (1, 512)
    ]
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize(("scale", "cap"), itertools.product([1.0, 0.3], [None, 2.0]))
def test_transform_and_its_slope(scale, cap):
    transform = LogitTransform(scale, cap)
    raw = torch.linspace(-6, 6, 25, dtype=torch.float64).requires_grad_()
    value = transform(raw)
    (slope,) = torch.autograd.grad(value.sum(), raw)
    torch.testing.assert_close(torch.as_tensor(transform.slope(value.detach()), dtype=slope.dtype).expand(25), slope)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_a_head_that_is_fused(name):
    assert head_module._is_plain(build(name).get_output_embeddings())

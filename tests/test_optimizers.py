"""AdamW with float32 state: against torch's own, in bfloat16, checkpointed and resumed, and clipped when fused."""

import warnings

import pytest
import torch
from torch import nn

from bfpo_pl import optimizers
from bfpo_pl.optimizers import AdamW32, clip_before_the_step, warn_of_lost_updates

SETTINGS = {
    "default": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "amsgrad": {"amsgrad": True, "fused": True},
    "ascent": {"maximize": True, "betas": (0.8, 0.95), "weight_decay": 0.3},
}


def parameters(dtype=torch.float32, seed=0):
    """Weights of a spread of sizes, from 1e-3 to 1, representable in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((5, 7), (11,), (3, 2, 4))
    values = [torch.randn(s, generator=generator) * 0.1**i for i, s in enumerate(shapes)]
    return [nn.Parameter(value.bfloat16().to(dtype)) for value in values]


def gradients(step):
    """Gradients of a step, the same for all types: representable in bfloat16."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator).bfloat16() for p in parameters()]


def walk(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        for p, gradient in zip(params, gradients(step), strict=True):
            p.grad = gradient.to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("setting", SETTINGS)
def test_float32_weights_move_exactly_as_under_torchs_adamw(setting):
    ours, theirs = parameters(), parameters()
    walk(AdamW32(ours, lr=1e-2, **SETTINGS[setting]), ours, 30)
    walk(torch.optim.AdamW(theirs, lr=1e-2, **SETTINGS[setting]), theirs, 30)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(ours[0], parameters()[0])


@pytest.mark.parametrize("bucket", [2**26, 12])
@pytest.mark.parametrize("setting", SETTINGS)
def test_bfloat16_weights_are_those_of_float32_rounded(setting, bucket, monkeypatch):
    """200 steps at a learning rate whose updates plain AdamW loses; the same gradients for both."""
    monkeypatch.setattr(optimizers, "BUCKET", bucket)
    low, full = parameters(torch.bfloat16), parameters()
    settings = {"weight_decay": 0.0, **SETTINGS[setting]}
    optimizer = AdamW32(low, lr=5e-7, **settings)
    walk(optimizer, low, 200)
    walk(torch.optim.AdamW(full, lr=5e-7, **settings), full, 200)
    for p, exact, start in zip(low, full, parameters(), strict=True):
        master = optimizer.state[p]["master"]
        assert master.dtype == torch.float32
        assert p.dtype == torch.bfloat16
        assert torch.equal(master, exact)
        assert torch.equal(p, exact.bfloat16())
        assert not torch.equal(master, start)


def test_plain_adamw_in_bfloat16_stands_still():
    low, full = parameters(torch.bfloat16), parameters()
    walk(torch.optim.AdamW(low, lr=5e-7, weight_decay=0.0), low, 200)
    walk(torch.optim.AdamW(full, lr=5e-7, weight_decay=0.0), full, 200)
    large = [start.abs() > 2e-3 for start in parameters()]
    for p, exact, start, chosen in zip(low, full, parameters(), large, strict=True):
        assert torch.equal(p.float()[chosen], start[chosen])
        assert (exact - start)[chosen].abs().max() > 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_a_reloaded_state_goes_on_bit_for_bit(fused, tmp_path):
    def made(params):
        return AdamW32(params, lr=5e-7, weight_decay=0.1, fused=fused)

    whole = parameters(torch.bfloat16)
    straight = made(whole)
    walk(straight, whole, 20)

    half = parameters(torch.bfloat16)
    optimizer = made(half)
    walk(optimizer, half, 11)
    torch.save({"weights": half, "optimizer": optimizer.state_dict()}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=False)
    resumed = saved["weights"]
    optimizer = made(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    walk(optimizer, resumed, 9, start=11)
    for one, other in zip(resumed, whole, strict=True):
        for name in ("master", "exp_avg", "exp_avg_sq"):
            found, right = optimizer.state[one][name], straight.state[other][name]
            assert found.dtype == torch.float32
            assert torch.equal(found, right), name
        assert torch.equal(one, other)


def test_states_of_torchs_adamw_load_and_outdated_copies_do_not():
    low, full = parameters(torch.bfloat16), parameters()
    theirs = torch.optim.AdamW(full, lr=1e-3)
    walk(theirs, full, 3)
    ours = AdamW32(low, lr=1e-3)
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(low, full, strict=True):
        assert torch.equal(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"])
    walk(ours, low, 1)
    back = AdamW32(full, lr=1e-3)
    back.load_state_dict(ours.state_dict())
    assert all("master" not in back.state[q] for q in full)


def test_weights_without_a_gradient_stay():
    params = parameters(torch.bfloat16)
    optimizer = AdamW32(params, lr=0.1)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert torch.equal(params[1], parameters(torch.bfloat16)[1])
    assert not torch.equal(params[0], parameters(torch.bfloat16)[0])
    assert set(optimizer.state_dict()["state"]) == {0}


def test_a_fused_optimizer_does_not_claim_to_unscale():
    for optimizer in (AdamW32(parameters(), 0.1, fused=True), torch.optim.AdamW(parameters(), 0.1, fused=True)):
        clip_before_the_step(optimizer)
        assert not optimizer._step_supports_amp_scaling


def warned(optimizer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_lost_updates(optimizer)
    return [str(w.message) for w in caught]


def test_lost_updates_are_named():
    (text,) = warned(torch.optim.AdamW(parameters(torch.bfloat16), lr=5e-7))
    assert "bfloat16" in text
    assert "5e-07" in text
    assert "bfpo_pl.optimizers.AdamW32" in text
    assert "\n" not in text
    assert not warned(torch.optim.AdamW(parameters(), lr=5e-7))
    assert not warned(torch.optim.AdamW(parameters(torch.bfloat16), lr=0.1))
    assert not warned(AdamW32(parameters(torch.bfloat16), lr=5e-7))
    assert not warned(torch.optim.SGD(parameters(torch.bfloat16), lr=5e-7))

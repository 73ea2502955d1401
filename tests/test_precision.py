"""bfloat16 weights, fused optimizers and clipping in the real command."""

import pytest
import torch

from bfpo_pl.models.sources import TinyModel

ADAMW32 = ["--model.optimizer=bfpo_pl.optimizers.AdamW32", "--model.optimizer.fused=true"]
PRECISE = [
    "--trainer.precision=bf16-true",
    "--model.policy.seed=0",
    "--model.schedule.warmup=0",
    "--checkpoint.every_n_train_steps=2",
    "--checkpoint.save_top_k=-1",
    "--trainer.max_steps=5",
]


def state_of(run):
    optimizer = run.trainer.optimizers[0]
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def test_a_run_in_bfloat16_resumes_bit_for_bit(bfpo, base, small, recwarn):
    arguments = [*base, *small, *PRECISE, *ADAMW32, "--model.optimizer.lr=5e-7"]
    whole = bfpo("fit", *arguments)
    assert not [w for w in recwarn if "round away" in str(w.message)]
    checkpoint = next((whole.run_folder / "checkpoints").glob("*step=2.ckpt"))
    resumed = bfpo("fit", *arguments, f"--ckpt_path={checkpoint}")
    assert resumed.trainer.global_step == 5
    start = TinyModel(32, 2, 2, 64, seed=0).load_model().state_dict()
    for one, other in zip(state_of(resumed), state_of(whole), strict=True):
        assert set(one) == {"step", "master", "exp_avg", "exp_avg_sq"}
        for name, value in one.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, other[name]), name
    for (name, p), state in zip(whole.model.policy.named_parameters(), state_of(whole), strict=True):
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, state["master"].bfloat16())
        moved = (state["master"] - start[name].bfloat16().float()).abs().max().item()
        assert 1e-6 < moved < 5e-6, name
    for (name, p), q in zip(resumed.model.policy.named_parameters(), whole.model.policy.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_plain_adamw_in_bfloat16_is_warned_of(bfpo, base, small, recwarn):
    bfpo("fit", *base, *small, "--trainer.precision=bf16-true", "--model.optimizer=torch.optim.AdamW",
         "--model.optimizer.lr=5e-7")  # fmt: skip
    texts = [str(w.message) for w in recwarn if "round away" in str(w.message)]
    assert len(texts) == 1
    assert "bfpo_pl.optimizers.AdamW32" in texts[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "bfpo_pl.optimizers.AdamW32"])
def test_fused_optimizers_are_clipped(bfpo, base, small, precision, optimizer):
    """SGD shows the clipped norm as the length of its step; here the first moment does."""
    run = bfpo("fit", *base, *small, "--trainer.max_steps=1", f"--trainer.precision={precision}",
               "--trainer.gradient_clip_val=0.125", f"--model.optimizer={optimizer}", "--model.optimizer.lr=1e-4",
               "--model.optimizer.fused=true")  # fmt: skip
    assert run.trainer.optimizers[0].param_groups[0]["fused"]
    moments = torch.stack([state["exp_avg"].float().norm() for state in state_of(run)])
    assert moments.norm().item() / 0.1 == pytest.approx(0.125, rel=2e-2 if precision == "bf16-true" else 1e-3)

"""The training step against plain PyTorch written here, and its guards; always in a real Trainer."""

import dataclasses
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from bfpo_pl.batch import Label, Requirements, Window
from bfpo_pl.component import UserError
from bfpo_pl.data.collate import collate
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.data.microworld_sources import MicroworldHelpfulness
from bfpo_pl.data.schemas import UltraFeedbackBinarized
from bfpo_pl.data.streams import Stream
from bfpo_pl.data.trees import PairTree
from bfpo_pl.guard import NonFiniteError
from bfpo_pl.labeling import BFPO, HelpfulnessOnly, LabelingFunction, SafetyOnly
from bfpo_pl.losses import Logistic, SafeChosenNLL, Squared
from bfpo_pl.microworld import build_tokenizer
from bfpo_pl.models.reference import AdapterOff, FromColumn, FrozenCopy, SharedWeights
from bfpo_pl.models.sources import ModelSource, TinyModel
from bfpo_pl.models.trainable import Everything, LoRA, Select
from bfpo_pl.module import PreferenceModule, RequirementError, StartMarginError
from bfpo_pl.schedules import Constant, WarmupCosine
from bfpo_pl.sft import SFTModule

VOCABULARY = 40
WEIGHTS = (1.0, 0.375)  # of the streams; like every number here exact in float32, in which batches carry them


class Tiny(ModelSource):
    """A Llama of two layers in float64; ``drift`` disturbs every copy but the first."""

    def __init__(self, seed=0, drift=0.0, attention_dropout=0.0):
        self.seed, self.drift, self.attention_dropout = seed, drift, attention_dropout
        self._copies = 0

    def load_tokenizer(self):
        return build_tokenizer()

    def load_model(self):
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.15,
            attention_dropout=self.attention_dropout,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = LlamaForCausalLM(config).double()
        if self._copies:
            model.lm_head.weight.data += self.drift
        self._copies += 1
        return model


@pytest.fixture(autouse=True)
def only_float64(monkeypatch):
    """Transformers computes norms and rotary angles in float32 whatever the model's type; here that is float64 too."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# ---- batches ----------------------------------------------------------------------------------------------------


PAIRS = {1: (), 2: ((0, 1),), 4: ((0, 1), (0, 2), (3, 1), (2, 3))}


def tree(generator, k=2, origin="", **columns):
    """A prompt of 1-8 tokens, k responses of 1-9 tokens, the flags 0, 1/4, 3/4 or 1."""

    def ids(high):
        length = int(torch.randint(1, high + 1, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    flags = torch.randint(0, 4, (k,), generator=generator)
    safe = tuple((0.0, 0.25, 0.75, 1.0)[i] for i in flags.tolist())
    return PairTree(ids(8), [ids(9) for _ in range(k)], PAIRS[k], {"safe": safe, **columns}, {}, origin)


def trees_of(*ks, seed=0):
    """(stream, tree) of each k, the streams in turn."""
    generator = torch.Generator().manual_seed(seed)
    return [(i % 2, tree(generator, k, f"rows.jsonl:{i + 1}")) for i, k in enumerate(ks)]


def batch_of(items):
    return collate(items, ("safety", "helpfulness"), WEIGHTS)


# ---- the same in plain PyTorch ----------------------------------------------------------------------------------


def plain_log_prob(model, prompt, response, reduction):
    """log π(response | prompt) from one forward pass over this one sequence."""
    logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    token_log_probs = torch.log_softmax(logits, dim=-1)[torch.arange(len(response)), torch.tensor(response)]
    return token_log_probs.sum() if reduction == "sum" else token_log_probs.mean()


def plain_loss(policy, reference, items, pair_loss, reduction="sum"):
    """Σ over streams of weight · mean over the pairs that ``pair_loss`` gives a loss.

    ``pair_loss(h, s_chosen, s_rejected, logp_chosen)`` returns None for a pair that is dropped.
    """
    total = torch.zeros((), dtype=torch.float64)
    for stream, weight in enumerate(WEIGHTS):
        losses = []
        for index, row in items:
            if index != stream:
                continue
            for chosen, rejected in row.pairs:
                c, r = row.response_ids[chosen], row.response_ids[rejected]
                logp_c = plain_log_prob(policy, row.prompt_ids, c, reduction)
                logp_r = plain_log_prob(policy, row.prompt_ids, r, reduction)
                with torch.no_grad():
                    ref_c = plain_log_prob(reference, row.prompt_ids, c, reduction)
                    ref_r = plain_log_prob(reference, row.prompt_ids, r, reduction)
                h = (logp_c - ref_c) - (logp_r - ref_r)
                loss = pair_loss(h, row.columns["safe"][chosen], row.columns["safe"][rejected], logp_c)
                if loss is not None:
                    losses.append(loss)
        if losses:
            total = total + weight * torch.stack(losses).mean()
    return total


def bfpo_squared(h, s_c, s_r, logp_c):
    return (h - (0.5 * (3 * s_c - s_r) - 0.5) / 0.0625) ** 2


def dpo_smoothed(h, s_c, s_r, logp_c):
    return -(0.875 * logsigmoid(0.25 * h) + 0.125 * logsigmoid(-0.25 * h))


def safety_only(h, s_c, s_r, logp_c):
    return None if s_c == s_r else (h - math.copysign(0.5, s_c - s_r) / 0.0625) ** 2


def bfpo_with_nll(h, s_c, s_r, logp_c):
    return bfpo_squared(h, s_c, s_r, logp_c) - 0.25 * s_c * logp_c


METHODS = {
    "bfpo": (BFPO(), Squared(tau=0.0625), None, "sum", bfpo_squared),
    "dpo": (HelpfulnessOnly(), Logistic(beta=0.25, label_smoothing=0.125), None, "sum", dpo_smoothed),
    "safety-only": (SafetyOnly(), Squared(tau=0.0625), None, "sum", safety_only),
    "nll": (BFPO(), Squared(tau=0.0625), SafeChosenNLL(weight=0.25), "sum", bfpo_with_nll),
    "mean": (BFPO(), Squared(tau=0.0625), None, "mean", bfpo_squared),
}


# ---- running it -------------------------------------------------------------------------------------------------


class Gradients(Callback):
    """Keeps the gradients of the first optimizer step, and every step's loss."""

    def __init__(self):
        self.first, self.losses = None, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.first is None:
            self.first = {name: p.grad.clone() for name, p in pl_module.policy.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)


def module_of(labeling=None, loss=None, source=None, **arguments):
    arguments = {"optimizer": adamw, "schedule": Constant(), "chunk_size": 7, **arguments}
    return PreferenceModule(source or Tiny(), labeling or BFPO(), loss or Squared(tau=0.0625), **arguments)


def fit(module, batches, folder, steps=None, callbacks=(), **arguments):
    """A real Trainer over hand-made batches, each once."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps or len(batches),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **arguments,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))
    return trainer


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(got, want, tolerance=0.0):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


# ---- the gradient of a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ks", [(2, 2, 2, 2, 2), (4, 4, 4), (2, 4, 1, 1, 4, 2), (2,), (4,)], ids=str)
def test_gradient_of_a_step_equals_plain_pytorch(tmp_path, method, ks):
    labeling, loss, auxiliary, reduction, pair_loss = METHODS[method]
    items = trees_of(*ks, seed=len(ks))
    # The reference is another model than the policy, so that margins differ from 0 from the start.
    module = module_of(
        labeling,
        loss,
        reference=FrozenCopy(Tiny(seed=1)),
        auxiliary=auxiliary,
        logp_reduction=reduction,
        optimizer=sgd,
    )
    seen = Gradients()
    fit(module, [batch_of(items)], tmp_path, callbacks=[seen])

    policy = Tiny().load_model()
    want = plain_loss(policy, Tiny(seed=1).load_model(), items, pair_loss, reduction)
    if want.requires_grad:
        want.backward()
    assert seen.losses == pytest.approx([want.item()], rel=1e-11)
    for name, parameter in policy.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(seen.first[name], expected, atol=1e-10, rtol=1e-10, msg=lambda m: f"{name}: {m}")  # noqa: B023
    if method != "safety-only":
        assert seen.first["model.layers.0.mlp.up_proj.weight"].abs().max() > 1e-4


def test_safety_only_drops_pairs_of_equal_flags():
    """The batches above hold pairs of both kinds, else the comparison would say nothing about weight 0."""
    flags = [
        (row.columns["safe"][c], row.columns["safe"][r]) for _, row in trees_of(4, 4, 4, seed=3) for c, r in row.pairs
    ]
    assert 0 < sum(c == r for c, r in flags) < len(flags)


@pytest.mark.parametrize("ks", [(1,), (1, 1, 1)], ids=str)
def test_single_responses_without_pairs_give_loss_and_gradient_zero(tmp_path, ks):
    seen = Gradients()
    fit(module_of(reference=FrozenCopy(Tiny(seed=1))), [batch_of(trees_of(*ks))], tmp_path, callbacks=[seen])
    assert seen.losses == [0.0]
    assert set(seen.first) == {name for name, _ in Tiny().load_model().named_parameters()}
    assert all(gradient.count_nonzero() == 0 for gradient in seen.first.values())


def test_a_batch_without_rows_gives_loss_zero(tmp_path):
    seen = Gradients()
    batch = collate([], ("safety", "helpfulness"), WEIGHTS, columns=("safe",))
    fit(module_of(), [batch], tmp_path, callbacks=[seen])
    assert seen.losses == [0.0]
    assert all(gradient.count_nonzero() == 0 for gradient in seen.first.values())


def test_a_stream_without_rows_adds_nothing(tmp_path):
    items = [item for item in trees_of(2, 2, 2, 2) if item[0] == 1]
    seen = Gradients()
    fit(module_of(reference=FrozenCopy(Tiny(seed=1))), [batch_of(items)], tmp_path, callbacks=[seen])
    want = plain_loss(Tiny().load_model(), Tiny(seed=1).load_model(), items, bfpo_squared)
    assert seen.losses == pytest.approx([want.item()], rel=1e-11)


@pytest.mark.parametrize("ks", [(2, 4, 1, 2, 1), (1,)], ids=str)
def test_gradient_of_a_fine_tuning_step_equals_plain_pytorch(tmp_path, ks):
    items, seen = trees_of(*ks, seed=9), Gradients()
    module = SFTModule(Tiny(), optimizer=sgd, schedule=Constant(), chunk_size=7)
    fit(module, [batch_of(items)], tmp_path, callbacks=[seen])
    policy, want = Tiny().load_model(), torch.zeros((), dtype=torch.float64)
    for stream, weight in enumerate(WEIGHTS):
        responses = [(row.prompt_ids, ids) for index, row in items if index == stream for ids in row.response_ids]
        if responses:
            nll = -sum(plain_log_prob(policy, prompt, ids, "sum") for prompt, ids in responses)
            want = want + weight * nll / sum(len(ids) for _, ids in responses)
    want.backward()
    assert seen.losses == pytest.approx([want.item()], rel=1e-11)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(seen.first[name], parameter.grad, atol=1e-10, rtol=1e-10)


# ---- trajectories -----------------------------------------------------------------------------------------------


def test_squared_with_helpfulness_only_is_sum_ipo_over_twenty_steps(tmp_path):
    steps, tau, clip = 20, 0.125, 5.0
    groups = [trees_of(2, 2, 4, 2, seed=100 + step) for step in range(steps)]
    seen = Gradients()
    module = module_of(HelpfulnessOnly(), Squared(tau=tau), schedule=WarmupCosine(warmup=4))
    fit(module, [batch_of(items) for items in groups], tmp_path, callbacks=[seen], gradient_clip_val=clip)

    policy, reference = Tiny().load_model(), Tiny().load_model()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for step, items in enumerate(groups):
        warm = (step + 1) / 5
        optimizer.param_groups[0]["lr"] = 1e-3 * (
            warm if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / (steps - 4)))
        )
        loss = plain_loss(policy, reference, items, lambda h, s_c, s_r, logp: (h - 1 / (2 * tau)) ** 2)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in policy.parameters()))
        for p in policy.parameters():
            p.grad *= min(1.0, clip / (norm.item() + 1e-6))
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx((1 + 0.375) * 16.0, rel=1e-12)  # every margin is 0 at first
    assert (policy.lm_head.weight - reference.lm_head.weight).abs().max() > 5e-3
    assert seen.losses == pytest.approx(losses, rel=1e-8)
    assert_same_weights(weights_of(module.policy), weights_of(policy), 1e-8)


def windows(micro_batches, size):
    """Each batch with the window of its optimizer step, as the loader gives it."""
    whole = [micro_batches[i : i + size] for i in range(0, len(micro_batches), size)]
    return [dataclasses.replace(batch, window=Window.of(part, size)) for part in whole for batch in part]


def one_module(kind):
    if kind == "sft":
        return SFTModule(Tiny(), brisk_sgd, schedule=Constant(warmup=0))
    labeling = SafetyOnly() if kind == "pairs are dropped" else None
    return module_of(labeling, optimizer=brisk_sgd, schedule=Constant(warmup=0))


def brisk_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


@pytest.mark.parametrize("kind", ["pairs", "pairs are dropped", "sft"])
def test_accumulating_unequal_batches_equals_the_batch_of_them_all(tmp_path, kind):
    """Micro-batches of other sizes, some without a row of one stream, and a last step that has one less of them."""
    generator = torch.Generator().manual_seed(5)
    counts = [(1, 3), (2, 0), (4, 1), (0, 2), (1, 1), (3, 2), (2, 1), (1, 4)]
    parts = [[(k, tree(generator)) for k in (0, 1) for _ in range(pair[k])] for pair in counts]
    whole = [[item for part in parts[i : i + 3] for item in part] for i in range(0, 8, 3)]
    accumulated, large = one_module(kind), one_module(kind)
    trainer = fit(
        accumulated,
        windows([batch_of(part) for part in parts], 3),
        tmp_path,
        steps=3,
        accumulate_grad_batches=3,
        gradient_clip_val=0.5,
    )
    fit(large, [batch_of(items) for items in whole], tmp_path, steps=3, gradient_clip_val=0.5)
    assert trainer.global_step == 3
    assert trainer.fit_loop.epoch_loop.batch_progress.total.processed == 8
    assert_same_weights(weights_of(accumulated.policy), weights_of(large.policy), 1e-12)
    start = weights_of(Tiny().load_model())
    assert (weights_of(large.policy)["lm_head.weight"] - start["lm_head.weight"]).abs().max() > 1e-3


def test_a_number_of_accumulated_batches_that_changes_is_refused(tmp_path):
    batches = windows([batch_of(trees_of(2))] * 4, 2)
    with pytest.raises(UserError, match="accumulates 4 batches, and the data was laid out for 2"):
        fit(module_of(), batches, tmp_path, steps=1, accumulate_grad_batches=4)


def test_accumulating_two_batches_equals_the_double_batch(tmp_path):
    """By Lightning alone, which takes the mean over micro-batches, where they are alike."""
    generator = torch.Generator().manual_seed(5)
    quarters = [[(stream, tree(generator)) for stream in (0, 1) for _ in range(2)] for _ in range(8)]
    whole = [quarters[i] + quarters[i + 1] for i in range(0, 8, 2)]
    accumulated, double = module_of(schedule=WarmupCosine(warmup=1)), module_of(schedule=WarmupCosine(warmup=1))
    small = fit(accumulated, [batch_of(q) for q in quarters], tmp_path, steps=4, accumulate_grad_batches=2)
    large = fit(double, [batch_of(w) for w in whole], tmp_path, steps=4)
    assert small.global_step == large.global_step == 4
    assert_same_weights(weights_of(accumulated.policy), weights_of(double.policy), 1e-8)
    start = weights_of(Tiny().load_model())
    assert (weights_of(double.policy)["lm_head.weight"] - start["lm_head.weight"]).abs().max() > 1e-3


# ---- the reference ----------------------------------------------------------------------------------------------


def test_the_reference_is_nowhere_but_in_the_margin(tmp_path):
    module = module_of()
    trainer = fit(module, [batch_of(trees_of(2, 2, seed=step)) for step in range(3)], tmp_path)
    start = Tiny().load_model()
    network = module.references["reference"]._network
    assert_same_weights(weights_of(network), weights_of(start))
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training
    assert module.policy.training

    names = {f"policy.{name}" for name in start.state_dict()}
    assert set(module.state_dict()) == names
    theirs = {id(p) for p in network.parameters()}
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len(list(start.parameters()))
    assert not theirs & {id(p) for p in held}
    assert not theirs & {id(p) for p in module.parameters()}

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == names
    assert len(saved["optimizer_states"][0]["state"]) == len(held)
    assert "hyper_parameters" not in saved
    for name, value in weights_of(module.policy).items():
        assert torch.equal(saved["state_dict"][f"policy.{name}"], value)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("trainable", [Select(["down_proj"]), Everything()])
def test_shared_weights_are_a_frozen_copy_without_the_copy(tmp_path, trainable, precision):
    items = trees_of(2, 4, 2)

    def trained(reference):
        module = module_of(source=TinyModel(32, 2, 2, 64, seed=3), trainable=trainable, reference=reference)
        seen = Gradients()
        fit(module, [batch_of(items)] * 6, tmp_path, callbacks=[seen], precision=precision, accumulate_grad_batches=2)
        return module, seen

    (shared, ours), (copied, theirs) = trained(SharedWeights()), trained(FrozenCopy())
    assert ours.losses == theirs.losses
    assert len(set(ours.losses)) > 2, "the policy leaves its start"
    for name, value in weights_of(copied.policy).items():
        assert torch.equal(weights_of(shared.policy)[name], value), name
    held = sum(start.numel() for _, start in shared.references["reference"]._pairs)
    assert held == sum(p.numel() for p in shared.policy.parameters() if p.requires_grad)


def test_shared_weights_of_an_adapter_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"Set model\.reference to AdapterOff"):
        fit(module_of(trainable=LoRA(r=2), reference=SharedWeights()), [batch_of(trees_of(2))], tmp_path)


def test_an_adapter_switched_off_is_the_reference(tmp_path):
    margins = []

    class Margins(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad():
                margins.append(pl_module.objective(batch).log_probs)

    items = trees_of(2, 4, 2)
    module = module_of(trainable=LoRA(r=2, alpha=4.0), reference=AdapterOff())
    trainer = fit(module, [batch_of(items)] * 3, tmp_path, callbacks=[Margins()])
    base = Tiny().load_model()
    with torch.no_grad():
        want = torch.stack([plain_log_prob(base, t.prompt_ids, ids, "sum") for _, t in items for ids in t.response_ids])
    assert torch.equal(margins[0].margin(), torch.zeros_like(margins[0].margin()))
    assert margins[-1].margin().abs().min() > 0
    for log_probs in margins:  # the reference stays the base model while the policy leaves it
        torch.testing.assert_close(log_probs.references["reference"], want, atol=1e-10, rtol=1e-10)
    start, now = weights_of(base), weights_of(module.policy)
    for name, value in now.items():
        if "lora_" not in name:
            assert torch.equal(value, start[name.replace(".base_layer", "")]), name
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for n, p in module.policy.named_parameters() if "lora_" in n}
    assert all(now[name].abs().max() > 0 for name in now if "lora_B" in name)
    assert module.policy.training


def test_adapter_off_needs_an_adapter(tmp_path):
    with pytest.raises(UserError, match="AdapterOff: the policy has no adapter"):
        fit(module_of(reference=AdapterOff()), [batch_of(trees_of(2))], tmp_path)


def test_selected_modules_alone_train(tmp_path):
    module = module_of(trainable=Select(["down_proj"]))
    trainer = fit(module, [batch_of(trees_of(2, 2, seed=step)) for step in range(2)], tmp_path)
    start, now = weights_of(Tiny().load_model()), weights_of(module.policy)
    assert {name for name in now if not torch.equal(now[name], start[name])} == {n for n in now if "down_proj" in n}
    assert sum(len(group["params"]) for group in trainer.optimizers[0].param_groups) == 2


def test_reference_log_probs_from_a_column(tmp_path):
    frozen, items = Tiny(seed=1).load_model(), []
    for stream, row in trees_of(2, 4, 2):
        with torch.no_grad():
            column = [plain_log_prob(frozen, row.prompt_ids, ids, "sum").float().item() for ids in row.response_ids]
        items.append((stream, PairTree(row.prompt_ids, row.response_ids, row.pairs, {**row.columns, "mine": column})))
    from_column, live = Gradients(), Gradients()
    fit(module_of(reference=FromColumn("mine"), optimizer=sgd), [batch_of(items)], tmp_path, callbacks=[from_column])
    fit(module_of(reference=FrozenCopy(Tiny(seed=1)), optimizer=sgd), [batch_of(items)], tmp_path, callbacks=[live])
    # The column is float32: seven digits.
    assert from_column.losses == pytest.approx(live.losses, rel=1e-5)
    for name, gradient in live.first.items():
        torch.testing.assert_close(from_column.first[name], gradient, atol=1e-3, rtol=1e-4)


# ---- guards -----------------------------------------------------------------------------------------------------


def test_a_start_with_dropout_is_checked_without_it(tmp_path):
    """The check itself sees a margin of 0; the step that follows has dropout, so its margin is not."""
    recorded = Gradients()
    fit(module_of(source=Tiny(attention_dropout=0.5)), [batch_of(trees_of(2, 2))], tmp_path, callbacks=[recorded])
    assert recorded.losses


def test_a_policy_that_is_not_the_reference_stops_the_run(tmp_path):
    with pytest.raises(StartMarginError, match="every log-ratio must be 0, but one is"):
        fit(
            module_of(source=Tiny(drift=torch.linspace(0, 1e-9, VOCABULARY)[:, None])),
            [batch_of(trees_of(2, 2))],
            tmp_path,
        )


def test_another_reference_may_start_anywhere(tmp_path):
    fit(module_of(reference=FrozenCopy(Tiny(seed=1))), [batch_of(trees_of(2, 2))], tmp_path)


class Spoiled(Squared):
    """A loss that is not finite in its n-th call."""

    def __init__(self, tau, call, value=float("nan")):
        super().__init__(tau)
        self.call, self.value, self._calls = call, value, 0

    def __call__(self, log_probs, label):
        losses = super().__call__(log_probs, label)
        self._calls += 1
        return torch.where(torch.arange(len(losses)) == 0, self.value, losses) if self._calls == self.call else losses


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", [3, 4])  # either half of the second window
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, value, call):
    class Snapshot(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.weights = weights_of(pl_module.policy)

    def rows(window):
        generator = torch.Generator().manual_seed(window)
        return [(0, tree(generator, 2, f"window{window}.jsonl:{line}")) for line in (1, 2)]

    batches = [batch_of([row]) for window in (1, 2, 3) for row in rows(window)]
    module, snapshot = module_of(loss=Spoiled(0.0625, call, value)), Snapshot()
    with pytest.raises(NonFiniteError) as caught:
        fit(module, batches, tmp_path, steps=3, callbacks=[snapshot], accumulate_grad_batches=2)
    message = str(caught.value)
    assert "window2.jsonl:1, window2.jsonl:2" in message
    assert "window1" not in message
    assert "window3" not in message
    assert "optimizer step 1" in message
    assert_same_weights(weights_of(module.policy), snapshot.weights)
    assert all(p.isfinite().all() for p in module.policy.parameters())
    assert not torch.equal(snapshot.weights["lm_head.weight"], Tiny().load_model().lm_head.weight)


class BadGradient(Callback):
    """Spoils one gradient of one optimizer step; every loss stays finite."""

    def __init__(self, step):
        self.step, self.before = step, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            self.before = weights_of(pl_module.policy)
            pl_module.policy.model.layers[1].mlp.down_proj.weight.grad[0, 0] = float("inf")


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path):
    module, spoil = module_of(), BadGradient(1)
    with pytest.raises(NonFiniteError) as caught:
        fit(module, [batch_of(trees_of(2))] * 3, tmp_path, callbacks=[spoil], gradient_clip_val=1.0)
    message = str(caught.value)
    assert "though every loss was finite (of policy.model.layers.1.mlp.down_proj.weight;" in message
    assert "optimizer step 1" in message
    assert_same_weights(weights_of(module.policy), spoil.before)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
def test_a_bad_step_that_may_be_skipped_changes_nothing(tmp_path, what, optimizer):
    """The weights and AdamW's state are those of a run that never saw the bad batch; the count is kept and logged."""

    def chosen(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=optimizer == "fused")

    batches = [batch_of(trees_of(2, 4, seed=seed)) for seed in (1, 2, 3)]
    # Every step takes the reference's log-probs and the policy's, and the loss is called once: call 2 is step 1.
    loss = Spoiled(0.0625, 2 if what == "loss" else -1, float("nan"))
    arguments = {"optimizer": chosen, "schedule": Constant(warmup=0)}
    skipping, clean = module_of(loss=loss, max_nonfinite_steps=1, **arguments), module_of(**arguments)
    spoil = [BadGradient(1)] if what == "gradient" else []
    with pytest.warns(UserWarning, match="1 of at most 1 such steps are skipped"):
        trainer = fit(skipping, batches, tmp_path, callbacks=spoil, gradient_clip_val=1.0)
    other = fit(clean, [batches[0], batches[2]], tmp_path, gradient_clip_val=1.0)
    assert (trainer.global_step, skipping.guard.skipped) == (3, 1)
    assert_same_weights(weights_of(skipping.policy), weights_of(clean.policy))
    states = [trainer.optimizers[0].state_dict()["state"] for trainer in (trainer, other)]
    for key, state in states[1].items():
        for name, value in state.items():
            assert torch.equal(states[0][key][name], value), name


def test_more_bad_steps_than_may_be_skipped_stop_the_run(tmp_path):
    module = module_of(max_nonfinite_steps=1)
    spoil = [BadGradient(0), BadGradient(1)]
    with (
        pytest.warns(UserWarning, match="1 of at most 1"),
        pytest.raises(NonFiniteError, match="1 such steps were skipped before"),
    ):
        fit(module, [batch_of(trees_of(2))] * 3, tmp_path, callbacks=spoil)


def test_a_run_without_an_end_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"set trainer\.max_steps or max_epochs"):
        fit(module_of(), [batch_of(trees_of(2))], tmp_path, steps=-1, max_epochs=-1)


class NeverLoaded(TinyModel):
    """A model whose weights must not be asked for."""

    def load_model(self):
        raise AssertionError("weights were loaded")


def test_a_missing_column_stops_before_weights_load(tmp_path):
    data = AlignmentData(
        streams={"helpfulness": Stream(MicroworldHelpfulness(), UltraFeedbackBinarized(), batch_size=2)}
    )
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, default_root_dir=tmp_path)
    with pytest.raises(RequirementError) as caught:
        trainer.fit(module_of(BFPO(b1=2.0), source=NeverLoaded()), datamodule=data)
    message = str(caught.value)
    for part in ("BFPO(b1=2.0", "'chosen_safe'", "'helpfulness'", "assume_safe: true"):
        assert part in message


def test_a_missing_reference_column_stops_before_weights_load(tmp_path):
    source = MicroworldHelpfulness()
    data = AlignmentData(streams={"helpfulness": Stream(source, UltraFeedbackBinarized(), 2, assume_safe=True)})
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, default_root_dir=tmp_path)
    module = module_of(HelpfulnessOnly(), source=NeverLoaded(), reference=FromColumn("mine"))
    with pytest.raises(RequirementError, match=r"the reference 'reference' with .* needs the column 'chosen_mine'"):
        trainer.fit(module, datamodule=data)


def test_requirements_are_checked_at_construction():
    class TwoAnchors(Squared):
        requires = Requirements(references=("reference", "teacher"))

    with pytest.raises(RequirementError, match=r"TwoAnchors\(tau=1.0\) needs the reference model\(s\) teacher"):
        module_of(loss=TwoAnchors(1.0))
    module = module_of(loss=TwoAnchors(1.0), references={"teacher": FrozenCopy(Tiny(seed=2))})
    assert set(module.references) == {"reference", "teacher"}

    class Unary(LabelingFunction):
        unit = "response"

        def __call__(self, annotations):
            return Label(target=annotations["safe"])

    with pytest.raises(RequirementError, match=r"Unary\(\) labels each response, but Squared\(tau=0.0625\) needs"):
        module_of(Unary())

    class UnarySquared(Squared):
        unit = "response"

    with pytest.raises(RequirementError, match=r"SafeChosenNLL.* is a term of each pair, but UnarySquared"):
        module_of(Unary(), UnarySquared(1.0), auxiliary=SafeChosenNLL(1.0))


def test_a_loss_without_a_reference_gets_none(tmp_path):
    class ReferenceFree(Squared):
        requires = Requirements()

        def __call__(self, log_probs, label):
            assert not log_probs.references
            return (log_probs.chosen(log_probs.policy) - log_probs.rejected(log_probs.policy) - label.target) ** 2

    module = module_of(loss=ReferenceFree(1.0))
    assert module.references == {}
    fit(module, [batch_of(trees_of(2, 2))], tmp_path)

"""No step waits for the device but once, to read whether the loss was finite before the update applies.

There is no device here: operations are watched that would wait for one, or copy a tensor made on the host to it.
"""

import traceback

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from bfpo_pl.callbacks import progress
from bfpo_pl.data.collate import collate
from bfpo_pl.data.trees import PairTree
from bfpo_pl.labeling import BFPO, HelpfulnessOnly, LabelingFunction, Linear
from bfpo_pl.listing import subclasses
from bfpo_pl.losses import Hinge, Logistic, PreferenceLoss, RobustLogistic, SafeChosenNLL, Squared
from bfpo_pl.models.attention import AttentionBackend, Auto, Padded, Segments
from bfpo_pl.models.precomputed import Precomputed
from bfpo_pl.models.reference import AdapterOff, FromColumn, FrozenCopy, SharedWeights
from bfpo_pl.models.sources import TinyModel
from bfpo_pl.models.trainable import Everything, LoRA, Select
from bfpo_pl.module import PreferenceModule
from bfpo_pl.schedules import Constant
from bfpo_pl.sft import SFTModule
from bfpo_pl.training import ResponseModule

WAITING = {"_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "equal", "is_nonzero", "bincount"}
LABELINGS = [cls for cls in subclasses(LabelingFunction) if cls.__module__ == "bfpo_pl.labeling"]
LOSSES = [cls for cls in subclasses(PreferenceLoss) if cls.__module__ == "bfpo_pl.losses"]
# Segments is for the CPU, where nothing waits.
BACKENDS = [
    cls for cls in subclasses(AttentionBackend) if cls.__module__.startswith("bfpo_pl.") and cls is not Segments
]


class Watch(TorchDispatchMode):
    """Notes operations that wait for the device or copy to it, with the lines of the code that asked for them."""

    def __init__(self):
        super().__init__()
        self.active, self.found = False, []

    def __enter__(self):
        self.active = True
        return super().__enter__()

    def __exit__(self, *arguments):
        self.active = False
        super().__exit__(*arguments)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        waits = name in WAITING or name.startswith(("unique", "_unique"))
        if name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if name == "repeat_interleave":
            waits = kwargs.get("output_size") is None
        if waits or name == "lift_fresh":  # torch.tensor and its like
            self.note(name)
        return func(*args, **kwargs)

    def note(self, name):
        if not self.active:
            return
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "/tests/" not in f.filename]
        where = [f"{f.filename}:{f.lineno} {f.name}" for f in frames[-4:]]
        self.found.append((name, frames[-1].name, where))


class Watched(Callback):
    """Watches everything from a batch's start to its end, except in the first step, which checks the model."""

    def __init__(self):
        self.watch, self.steps = Watch(), 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx > 0:
            self.watch.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx > 0:
            self.watch.__exit__(None, None, None)
            self.steps += 1


def batches(count, pairs):
    """Trees of two streams with prompts and responses of mixed lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(high):
        length = int(torch.randint(2, high, (), generator=generator))
        return torch.randint(3, 40, (length,), generator=generator).tolist()

    made = []
    for _ in range(count):
        items = []
        for number in range(5):
            safe = tuple(torch.rand(2, generator=generator).tolist())
            responses = [ids(9), ids(9)] if pairs else [ids(9)]
            columns = {"safe": safe, "reference_log_prob": (-3.0, -4.0)} if pairs else {}
            row = PairTree(ids(12), responses, ((0, 1),) if pairs else (), columns)
            items.append((number % 2, row))
        made.append(collate(items, ("safety", "helpfulness"), (1.0, 0.5)))
    return made


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


class Rows(LightningDataModule):
    """The rows of batches, for a reference that is computed beforehand."""

    streams = ("safety", "helpfulness")

    def __init__(self, batches, folder):
        super().__init__()
        self.batches, self.cache_folder = batches, folder
        trees = [tree for batch in batches if len(batch.pairs) for tree in trees_in(batch)]
        self.rows = {("all", "train"): Places(trees)}

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)


class Places:
    """Pair trees by their place."""

    def __init__(self, trees):
        self.trees = trees
        self.lengths = np.array([len(t.prompt_ids) + sum(map(len, t.response_ids)) for t in trees])

    def __len__(self):
        return len(self.trees)

    def at(self, places):
        return [self.trees[place] for place in places]


def trees_in(batch):
    """The pair trees of a batch of pairs."""
    starts, lengths = batch.segment_start.tolist(), batch.segment_length.tolist()
    segments = [batch.tokens[a : a + n].tolist() for a, n in zip(starts, lengths, strict=True)]
    return [PairTree(segments[n], segments[n + 1 : n + 3]) for n in range(0, len(segments), 3)]


def watched_fit(monkeypatch, folder, module, pairs=True, bars=()):
    seen = Watched()
    for name in ("tolist", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)

        def noted(self, *arguments, _name=name, _original=original, **named):
            seen.watch.note(_name)
            return _original(self, *arguments, **named)

        monkeypatch.setattr(torch.Tensor, name, noted)
    data = batches(5, pairs)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=bool(bars),
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*bars, seen],
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        log_every_n_steps=1000,
    )
    monkeypatch.setattr(ResponseModule, "should_log", lambda self: False)
    rows = Rows(data, folder)
    trainer.fit(module, **({"datamodule": rows} if pairs else {"train_dataloaders": rows.train_dataloader()}))
    assert seen.steps == 3
    return seen.watch.found


def assert_waits_once_an_update(found):
    others = [item for item in found if item[:2] != ("tolist", "decide")]
    assert not others, "\n".join(f"{name}: {' < '.join(reversed(where))}" for name, _, where in others)
    assert len(found) == 2


def made(labeling=None, loss=None, **arguments):
    arguments = {"optimizer": fused, "schedule": Constant(), "chunk_size": 16, **arguments}
    return PreferenceModule(TinyModel(32, 2, 2, 64, seed=0), labeling or BFPO(), loss or Squared(tau=0.1), **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_preference_step(monkeypatch, tmp_path, backend):
    assert_waits_once_an_update(watched_fit(monkeypatch, tmp_path, made(attention=backend())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fine_tuning_step(monkeypatch, tmp_path, backend):
    module = SFTModule(TinyModel(32, 2, 2, 64, seed=0), fused, schedule=Constant(), attention=backend())
    assert_waits_once_an_update(watched_fit(monkeypatch, tmp_path, module, pairs=False))


@pytest.mark.parametrize("labeling", LABELINGS)
def test_every_labeling(monkeypatch, tmp_path, labeling):
    module = made(labeling(0.5) if labeling is Linear else labeling())
    assert_waits_once_an_update(watched_fit(monkeypatch, tmp_path, module))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(monkeypatch, tmp_path, loss):
    module = made(HelpfulnessOnly(), loss(0.1), auxiliary=SafeChosenNLL(0.5))
    assert_waits_once_an_update(watched_fit(monkeypatch, tmp_path, module))


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize(
    ("trainable", "reference"),
    [(LoRA(r=2, dropout=0.1), AdapterOff()), (Select(["down_proj"]), SharedWeights()), (Everything(), FrozenCopy())],
    ids=str,
)
def test_every_trainable_part(monkeypatch, tmp_path, trainable, reference, how):
    module = made(trainable=trainable, reference=reference, activation_checkpointing=how)
    assert_waits_once_an_update(watched_fit(monkeypatch, tmp_path, module))


@pytest.mark.parametrize("reference", [Precomputed(verify=0), FromColumn()], ids=lambda each: type(each).__name__)
def test_every_reference_that_was_computed_before(monkeypatch, tmp_path, reference):
    assert_waits_once_an_update(watched_fit(monkeypatch, tmp_path, made(reference=reference)))


def test_the_bar_of_a_terminal_reads_the_loss_now_and_then_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOSSES", 1e9)
    bar = progress.StepProgress()
    assert_waits_once_an_update(watched_fit(monkeypatch, tmp_path / "one", made(), bars=[bar]))
    assert "loss" in bar._shown  # of the first batch
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOSSES", 0.0)
    found = watched_fit(monkeypatch, tmp_path / "two", made(), bars=[progress.StepProgress()])
    assert len(found) > 2


def test_the_lists_hold_what_is_built_in():
    assert {BFPO, HelpfulnessOnly, Linear} <= set(LABELINGS)
    assert {Squared, Logistic, RobustLogistic, Hinge} <= set(LOSSES)
    assert {Padded, Auto} <= set(BACKENDS)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.unique(),
        lambda x: torch.arange(3).repeat_interleave(torch.tensor([1, 0, 2])),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.nn.functional.one_hot(x.long().clamp(0), 9),
        lambda x: x.new_tensor([1.0]),
    ],
)
def test_the_watch_sees_what_waits(wait):
    x = torch.randn(4)
    with Watch() as watch:
        wait(x)
    assert watch.found


def test_the_watch_lets_pass_what_does_not():
    x, lengths = torch.randn(4), torch.tensor([1, 3])
    with Watch() as watch:
        x[torch.arange(2)] + torch.where(x > 0, x, 0.0).sum()
        x.masked_fill(x > 0, 0.0).index_put((torch.arange(4),), x)
        torch.arange(2).repeat_interleave(lengths, output_size=4)
        torch.full((3,), 2.0)
    assert not watch.found

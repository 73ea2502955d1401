import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.data.microworld_sources import MicroworldHelpfulness, MicroworldSafety
from bfpo_pl.data.schemas import PKUSafeRLHF, UltraFeedbackBinarized
from bfpo_pl.data.streams import Stream
from bfpo_pl.microworld import build_tokenizer

EPOCH, EPOCHS = 5, 3


class Stop(Exception):
    """The run is interrupted."""


class Recorder(LightningModule):
    """Notes the rows of every batch that it trains on."""

    def __init__(self, asks_for_steps=False):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.tokenizer = build_tokenizer()
        self.asks_for_steps = asks_for_steps
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.origins)
        return self.layer(torch.ones(2)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        if self.asks_for_steps:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Interrupt(Callback):
    """Saves a checkpoint when a number of batches is consumed, and stops the run there."""

    def __init__(self, path, at, hook):
        self.path, self.at, self.hook = path, at, hook

    def _stop(self, trainer, hook):
        if hook == self.hook and trainer.datamodule.state_dict()["batches"] == self.at:
            trainer.save_checkpoint(self.path)
            raise Stop

    def on_train_batch_end(self, trainer, *args):
        self._stop(trainer, "batch_end")

    def on_train_epoch_end(self, trainer, *args):
        self._stop(trainer, "epoch_end")

    def on_validation_end(self, trainer, *args):
        self._stop(trainer, "validation_end")

    def on_train_batch_start(self, trainer, *args):
        self._stop(trainer, "batch_start")


def run(tmp_path, workers=0, callback=None, checkpoint=None, asks_for_steps=False, **kwargs):
    streams = {
        "safety": Stream(MicroworldSafety(18, 4), PKUSafeRLHF(), 4),
        "help": Stream(MicroworldHelpfulness(7), UltraFeedbackBinarized(), 3, assume_safe=True),
    }
    module = Recorder(asks_for_steps)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=[callback] if callback else None,
        **kwargs,
    )
    trainer.fit(module, datamodule=AlignmentData(streams, num_workers=workers, seed=1), ckpt_path=checkpoint)
    return module.seen


CASES = [
    ("batch_end", 1, 0),
    ("batch_end", 3, 2),
    ("batch_end", EPOCH, 0),
    ("batch_end", EPOCH, 2),
    ("epoch_end", EPOCH, 0),
    ("epoch_end", EPOCH, 2),
    ("validation_end", EPOCH, 0),
    ("batch_end", EPOCH + 1, 0),
    ("batch_end", EPOCH + 2, 2),
    ("batch_start", EPOCH + 2, 2),
    ("batch_start", 2, 0),
    ("epoch_end", 2 * EPOCH, 0),
    ("batch_end", 2 * EPOCH + 4, 2),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    seen = run(tmp_path_factory.mktemp("whole"))
    assert len(seen) == EPOCH * EPOCHS
    return seen


@pytest.mark.parametrize(("hook", "at", "workers"), CASES)
def test_resumed_run_sees_what_the_uninterrupted_one_sees(tmp_path, whole, hook, at, workers):
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(Stop):
        run(tmp_path, workers, Interrupt(path, at, hook))
    assert torch.load(path, weights_only=True)["AlignmentData"]["batches"] == at
    assert run(tmp_path, workers, checkpoint=path) == whole[at:]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_when_the_module_asks_for_the_number_of_steps(tmp_path, whole, workers):
    """`estimated_stepping_batches` builds the loader early (Lightning #20550)."""
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(Stop):
        run(tmp_path, workers, Interrupt(path, 7, "batch_end"), asks_for_steps=True)
    assert run(tmp_path, workers, checkpoint=path, asks_for_steps=True) == whole[7:]


@pytest.mark.parametrize("at", [2, 4, 6])
def test_resume_with_shorter_epochs(tmp_path, whole, at):
    limited = {"limit_train_batches": 4}
    assert run(tmp_path, **limited) == whole[: 4 * EPOCHS]
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(Stop):
        run(tmp_path, 0, Interrupt(path, at, "batch_end"), **limited)
    assert run(tmp_path, checkpoint=path, **limited) == whole[at : 4 * EPOCHS]


def test_overfit_batches_repeat(tmp_path, whole):
    assert run(tmp_path, overfit_batches=2) == EPOCHS * whole[:2]


def test_a_second_fit_starts_afresh(tmp_path, whole):
    assert run(tmp_path, max_steps=4) == whole[:4]
    assert run(tmp_path, val_check_interval=0.5, accumulate_grad_batches=2) == whole


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import test_data_resume as here

folder, mode = Path(sys.argv[1]), sys.argv[2]
strategy = "ddp"
if mode.startswith("sharded"):
    from lightning.pytorch.strategies import ModelParallelStrategy
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=True)
callback = here.Interrupt(folder / "stopped.ckpt", 4, "batch_end") if mode.endswith("interrupted") else None
checkpoint = folder / "stopped.ckpt" if mode.endswith("resumed") else None
original = here.Recorder.training_step

def training_step(self, batch, batch_idx):
    with open(folder / f"{{mode}}.{{self.global_rank}}", "a") as file:
        file.write(json.dumps(batch.origins) + "\\n")
    return original(self, batch, batch_idx)

def configure_model(self):
    if mode.startswith("sharded"):
        from torch.distributed.fsdp import fully_shard
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

here.Recorder.training_step = training_step
here.Recorder.configure_model = configure_model
try:
    here.run(folder, 2, callback, checkpoint, asks_for_steps=True, devices=2, strategy=strategy)
except here.Stop:
    print("stopped")
"""


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_two_processes(tmp_path, kind):
    """Ranks see disjoint rows, together all of an epoch; each rank resumes exactly, sharded checkpoints too."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    for mode in ("whole", "interrupted", "resumed"):
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), f"{kind}_{mode}"], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    batches = [[json.loads(line) for line in (tmp_path / f"{kind}_whole.{rank}").open()] for rank in (0, 1)]
    for epoch in range(EPOCHS):
        rows = [row for seen in batches for batch in seen[3 * epoch : 3 * epoch + 3] for row in batch]
        assert len({row for row in rows if row.startswith("MicroworldSafety")}) == 18
        assert len([row for row in rows if row.startswith("MicroworldSafety")]) == 18
    for rank in (0, 1):
        seen = {mode: (tmp_path / f"{kind}_{mode}.{rank}").read_text().splitlines() for mode in ("whole", "resumed")}
        assert len(seen["whole"]) == 9
        assert seen["resumed"] == seen["whole"][4:]

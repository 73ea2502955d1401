"""Which checkpoints a run saves and keeps: counted in its folder, with a module whose validation is given."""

import os
import warnings
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from bfpo_pl.checkpoints.atomic import follow
from bfpo_pl.checkpoints.file_io import AtomicCheckpointIO
from bfpo_pl.checkpoints.find import find_checkpoint, newest_complete
from bfpo_pl.checkpoints.index import Index
from bfpo_pl.checkpoints.keep import RunCheckpoints
from bfpo_pl.component import UserError


class Told(LightningModule):
    """Trains one number; its validation loss after each step is given."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return (self.weight - batch.float().mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.losses.get(self.trainer.global_step, 9.0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watch(Callback):
    """After every batch: what is complete in the folder, and that ``last.ckpt`` leads to something."""

    def __init__(self, folder):
        self.folder = folder
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(steps(self.folder))


def steps(folder):
    """Steps of the checkpoints in a folder, by their names."""
    return sorted(int(path.stem.rpartition("=")[2]) for path in folder.glob("*step=*.ckpt"))


def fit(folder, losses=None, max_steps=6, every=1, resume=None, validate_every=1, callbacks=(), trainer=None, **kept):
    loader = DataLoader(torch.arange(64), batch_size=2)
    every = {} if every is None else {"every_n_train_steps": every}
    callback = RunCheckpoints(dirpath=str(folder), **every, **kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"val_check_interval": validate_every, "check_val_every_n_epoch": None} | (trainer or {})
        Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=max_steps,
            logger=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            limit_val_batches=1,
            plugins=[AtomicCheckpointIO()],
            callbacks=[*callbacks, callback],
            **options,
        ).fit(Told(losses or {}), loader, loader, ckpt_path=resume)
    return callback


def test_the_newest_are_kept_and_one_is_there_at_every_moment(tmp_path):
    watch = Watch(tmp_path)
    fit(tmp_path, keep_last=2, callbacks=[watch])
    assert steps(tmp_path) == [5, 6]
    # Checkpoints are saved after other callbacks: before the save of step n there are those up to n - 1.
    assert watch.seen == [[], [1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert os.readlink(tmp_path / "last.ckpt") == "epoch=0-step=6.ckpt"
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "epoch=0-step=5.ckpt", "epoch=0-step=6.ckpt", "index.json", "last.ckpt",
    ]  # fmt: skip


LOSSES = {1: 5.0, 2: 1.0, 3: 4.0, 4: 0.5, 5: 3.0, 6: 2.0}


def test_the_best_are_kept_beside_the_newest(tmp_path):
    callback = fit(tmp_path, LOSSES, keep_last=1, save_top_k=2, monitor="val/loss")
    assert steps(tmp_path) == [2, 4, 6]
    assert Index.read(tmp_path).scores == {f"epoch=0-step={step}.ckpt": LOSSES[step] for step in (2, 4, 6)}
    assert callback.best_model_path.endswith("step=4.ckpt")
    assert float(callback.best_model_score) == 0.5
    assert find_checkpoint("best", tmp_path, tmp_path) == str(tmp_path / "epoch=0-step=4.ckpt")


def test_a_larger_value_may_be_better(tmp_path):
    fit(tmp_path, LOSSES, keep_last=1, save_top_k=2, monitor="val/loss", mode="max")
    assert steps(tmp_path) == [1, 3, 6]
    assert find_checkpoint("best", tmp_path, tmp_path).endswith("step=1.ckpt")


def test_a_score_is_of_its_own_step(tmp_path):
    """Validation comes after the save of its step, and a save without one has no score, not an older step's."""
    fit(tmp_path, LOSSES, keep_last=6, monitor="val/loss", validate_every=2)
    assert list(Index.read(tmp_path).scores.values()) == [None, 1.0, None, 0.5, None, 2.0]


def test_a_validation_among_the_best_is_saved_although_no_save_was_due(tmp_path):
    fit(tmp_path, LOSSES, every=5, keep_last=1, save_top_k=1, monitor="val/loss")
    assert steps(tmp_path) == [4, 6]
    fit(tmp_path / "other", LOSSES, every=5, keep_last=9)
    assert steps(tmp_path / "other") == [5, 6]  # the end is always saved


def test_a_value_that_is_not_finite_is_never_the_best(tmp_path):
    fit(tmp_path, LOSSES | {4: float("nan"), 5: float("-inf")}, keep_last=1, save_top_k=1, monitor="val/loss")
    assert steps(tmp_path) == [2, 6]


def test_all_are_kept_if_asked(tmp_path):
    fit(tmp_path, save_top_k=-1)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("save_last", [False, True])
def test_no_link_if_not_asked(tmp_path, save_last):
    fit(tmp_path, save_last=save_last, every=4, max_steps=5)
    assert (tmp_path / "last.ckpt").is_symlink() == save_last
    assert steps(tmp_path) == ([4, 5] if save_last else [4])


def test_a_run_that_goes_on_in_its_folder_goes_on_with_its_checkpoints(tmp_path):
    fit(tmp_path, LOSSES, max_steps=4, keep_last=2, save_top_k=1, monitor="val/loss")
    assert steps(tmp_path) == [3, 4]
    (tmp_path / "epoch=0-step=9.ckpt.part").mkdir()  # what a kill leaves
    (tmp_path / "mine.ckpt").write_text("precious")
    newest = newest_complete(tmp_path)
    assert newest.step == 4
    assert [passed.path.name for passed in newest.passed_over][:1] == ["epoch=0-step=9.ckpt.part"]
    fit(tmp_path, LOSSES | {7: 0.7}, max_steps=8, resume=newest.path, keep_last=2, save_top_k=1, monitor="val/loss")
    assert steps(tmp_path) == [4, 7, 8]  # 4 is the best still
    assert (tmp_path / "mine.ckpt").read_text() == "precious"
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_one_does_not_count_as_kept(tmp_path):
    class Damage(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                os.truncate(tmp_path / "epoch=0-step=4.ckpt", 1000)

    fit(tmp_path, max_steps=5, keep_last=2, callbacks=[Damage()])
    assert steps(tmp_path) == [3, 5]


def test_a_run_in_a_new_folder_leaves_its_parents_alone(tmp_path):
    fit(tmp_path / "a", max_steps=4, keep_last=2)
    fit(tmp_path / "b", max_steps=8, keep_last=1, resume=tmp_path / "a/last.ckpt")
    assert steps(tmp_path / "a") == [3, 4]
    assert steps(tmp_path / "b") == [8]


def test_nothing_is_saved_amid_an_optimizer_step(tmp_path):
    """With two batches a step, the first batch after a resume lies at a step that is due."""
    kept = {"every": 2, "keep_last": 9, "trainer": {"accumulate_grad_batches": 2}}
    fit(tmp_path / "a", max_steps=2, **kept)
    fit(tmp_path / "b", max_steps=4, resume=tmp_path / "a/last.ckpt", **kept)
    assert steps(tmp_path / "b") == [4]
    saved = torch.load(tmp_path / "b/last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert saved["epoch_loop.batch_progress"]["current"]["ready"] == 8


def test_saves_by_time_and_by_epoch(tmp_path):
    fit(tmp_path / "time", every=None, train_time_interval=timedelta(0), keep_last=9, max_steps=3)
    assert steps(tmp_path / "time") == [1, 2, 3]
    for name, check_every in (("after training", 1), ("after validation", 2)):
        options = {"limit_train_batches": 2, "check_val_every_n_epoch": check_every, "val_check_interval": 1.0}
        fit(tmp_path / name, every=None, every_n_epochs=2, keep_last=9, max_steps=9, trainer=options)
        assert steps(tmp_path / name) == [4, 8, 9]


def test_without_symbolic_links_a_line_of_text_leads_on(tmp_path, monkeypatch):
    def refuse(self, target, target_is_directory=False):
        raise PermissionError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    fit(tmp_path, keep_last=2)
    last = tmp_path / "last.ckpt"
    assert last.read_text() == "checkpoint: epoch=0-step=6.ckpt\n"
    assert follow(last) == tmp_path / "epoch=0-step=6.ckpt"
    assert find_checkpoint(str(last), tmp_path) == str(tmp_path / "epoch=0-step=6.ckpt")
    assert newest_complete(tmp_path).path.name == "epoch=0-step=6.ckpt"
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert find_checkpoint(str(moved / "last.ckpt"), moved).startswith(str(moved))


def test_an_older_copy_named_last_becomes_a_link(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "meta.pt").touch()
    fit(tmp_path, max_steps=1)
    assert os.readlink(tmp_path / "last.ckpt") == "epoch=0-step=1.ckpt"
    assert not (tmp_path / "last.ckpt.old").exists()


def test_a_monitor_that_validation_does_not_have_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no metric 'val/los'. It has: val/loss"):
        fit(tmp_path, monitor="val/los")


def test_the_best_of_a_run_without_scores(tmp_path):
    fit(tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoint\.monitor=val"):
        find_checkpoint("best", tmp_path, tmp_path / "run")

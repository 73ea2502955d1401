"""What is said of a network that cannot be loaded in shards."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import distributed

from bfpo_pl.models.loading import load_in_shards
from bfpo_pl.models.outline import WholeOnly
from bfpo_pl.models.sources import TinyModel


class Whole(TinyModel):
    """A source that has no outline."""

    def outline(self):
        raise WholeOnly("its files are odd")

    def load_model(self):
        return torch.nn.Linear(1, 1)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone, unless an earlier test has left one."""
    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_it_is_said_once_for_a_policy_and_its_frozen_copy(alone, caplog):
    source, other = Whole(), Whole()
    with caplog.at_level(logging.INFO):
        for each in (source, source, other):  # the other one is another run's
            load_in_shards(each, lambda network: None, lambda network: None, torch.device("cpu"))
    assert [record.getMessage().count("its files are odd") for record in caplog.records] == [1, 1]

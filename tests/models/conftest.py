"""Fixtures of the tests of networks."""

import pytest
import torch


@pytest.fixture
def only_float64(monkeypatch):
    """Transformers computes norms and rotary angles in float32 whatever the model's type; here that is float64 too."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

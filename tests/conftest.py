"""Fixtures for all tests."""

import pytest
import torch


@pytest.fixture
def float64():
    """Makes float64 the default dtype, so that tensors written as literals are exact to 1e-15."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)

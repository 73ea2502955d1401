"""Spares the device a wait: transformers looks at every batch's positions for rows packed with several texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import masking_utils

_NAME = "find_packed_sequence_indices"


@contextmanager
def no_packed_rows() -> Iterator[None]:
    """For forward passes over rows of one text each: tells transformers what it would find out by reading a value."""
    original = getattr(masking_utils, _NAME, None)  # not in every version
    if original is None:
        yield
        return
    setattr(masking_utils, _NAME, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, _NAME, original)

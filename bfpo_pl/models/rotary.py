"""Rotary embeddings whose angles depend on the longest row of a batch."""

from __future__ import annotations

from transformers.configuration_utils import PreTrainedConfig


def length_of_other_angles(config: PreTrainedConfig) -> int | None:
    """Tokens of a row beyond which a network turns all tokens of its batch by other angles; None if it never does.

    A response's log-prob then depends on the longest row that it shares a batch with (RoPE types ``longrope`` and
    ``dynamic``), under every attention backend.

    Args:
        config: The network's config.
    """
    config = config.get_text_config()
    whole = getattr(config, "rope_parameters", None) or {}
    lengths = []
    for table in (whole, *(value for value in whole.values() if isinstance(value, dict))):
        if table.get("rope_type") == "longrope":
            lengths.append(table.get("original_max_position_embeddings") or config.max_position_embeddings)
        elif table.get("rope_type") == "dynamic":
            lengths.append(config.max_position_embeddings)
    return min(lengths, default=None)

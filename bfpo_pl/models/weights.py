"""Digests of a network's weights: from the files that hold them, or from the network itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from transformers import PreTrainedModel

from bfpo_pl.data.arrow import write_whole

_CHUNK = 2**24


def network_digest(network: PreTrainedModel) -> str:
    """A digest of a network's config and of all its tensors.

    Args:
        network: The network, on any device.

    Returns:
        32 hexadecimal digits.
    """
    digest = xxhash.xxh3_128(network.config.to_json_string().encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def files_digest(files: Iterable[Path], memory: Path) -> str:
    """A digest of files' names and content, remembered under their paths, sizes and times of change.

    Args:
        files: The files, or links to them.
        memory: Folder of remembered digests.

    Returns:
        32 hexadecimal digits.

    Raises:
        RunError: The folder cannot be written.
    """
    found = sorted(files, key=lambda path: path.name)
    stats = [path.stat() for path in found]
    states = [(str(p.resolve()), s.st_size, s.st_mtime_ns) for p, s in zip(found, stats, strict=True)]
    remembered = memory / xxhash.xxh3_128_hexdigest(json.dumps(states).encode())
    if remembered.is_file():
        return remembered.read_text()
    digest = xxhash.xxh3_128()
    for path, stat in zip(found, stats, strict=True):
        digest.update(f"{path.name} {stat.st_size}\n".encode())
        with path.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
    write_whole(remembered, lambda temporary: temporary.write_text(digest.hexdigest()))
    return digest.hexdigest()

"""What every attention backend is held against, and an emulation of the kernel that only GPUs have."""

from itertools import pairwise

import torch
from networks import batch_of, gradients, naive_log_probs

from bfpo_pl.models import segment_attention
from bfpo_pl.models.log_probs import response_log_probs


def differences(model, backend, trees, chunk_size=4096):
    """Differences from the naive computation: of the loss, and of each gradient, relative to its norm."""
    want = naive_log_probs(model, trees, "sum")  # before the network is prepared: by its own attention
    direction = torch.linspace(-1.0, 1.5, len(want), dtype=want.dtype)
    loss = (direction * want).sum()
    right = gradients(model, loss)
    backend = backend.prepare(model)
    ours = (direction * response_log_probs(model, batch_of(trees), backend, "sum", chunk_size)).sum()
    found = gradients(model, ours)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in [name for name in trained if right[name].norm() < 1e-6]:
        assert name.endswith("k_proj.bias")  # adds the same to all scores of a query, where no rotation follows
        assert found[name].norm() < 1e-6
        trained.remove(name)
    relative = {name: ((found[name] - right[name]).norm() / right[name].norm()).item() for name in trained}
    return (ours - loss).abs().item() / loss.abs().item(), relative


def emulated_varlen(leak=0, wider=0, shift=0):
    """`varlen_attn` by its documentation, in plain torch, optionally with a fault.

    The window counts the tokens to the left of a query, itself not among them; the last query stands at the last key.

    Args:
        leak: Keys before those of a response that it sees as well.
        wider: Tokens that a window is too wide.
        shift: How far to the left of its place a query is taken to stand.
    """

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert cu_seq_q[-1] == len(query)
        assert cu_seq_k[-1] == len(key) == len(value)
        groups, outputs = query.shape[1] // key.shape[1], []
        assert enable_gqa == (groups > 1)
        left, right = window_size
        assert right == 0
        starts = zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True)
        for (first_query, last_query), (first_key, last_key) in starts:
            assert 0 < last_query - first_query <= max_q
            assert last_query - first_query <= last_key - first_key <= max_k
            first_key = max(first_key - leak, 0)
            q, k, v = query[first_query:last_query], key[first_key:last_key], value[first_key:last_key]
            k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
            place = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None] - shift
            distance = place.clamp(min=0) - torch.arange(len(k), device=q.device)[None, :]
            seen = (distance >= 0) & ((distance <= left + wider) if left >= 0 else torch.ones_like(distance).bool())
            products = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
            weights = products.masked_fill(~seen, -torch.inf).softmax(dim=-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(outputs)

    return attend


def emulate_varlen(monkeypatch, **faults):
    """Puts the emulation in the kernel's place, on any device and in any type; counts its calls."""
    calls = []

    def counted(*arguments, **kwargs):
        calls.append(1)
        return emulated_varlen(**faults)(*arguments, **kwargs)

    def obstacle(query, value, scores):
        return "its kernel has no soft cap" if scores.softcap is not None else None

    monkeypatch.setattr(segment_attention, "varlen_attn", counted)
    monkeypatch.setattr(segment_attention, "varlen_obstacle", obstacle)
    return calls

"""cuDNN's attention is off once a network is bound, until the user says otherwise."""

import pytest
import torch
from networks import build

from bfpo_pl.models import cudnn
from bfpo_pl.models.attention import Padded
from bfpo_pl.models.log_probs import bind_log_probs


@pytest.fixture
def said(monkeypatch):
    """What the log says, in a process that has bound no network yet."""
    messages = []
    monkeypatch.setattr(cudnn, "rank_zero_info", messages.append)
    cudnn.turn_off_cudnn_attention.cache_clear()
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield messages
    torch.backends.cuda.enable_cudnn_sdp(before)
    cudnn.turn_off_cudnn_attention.cache_clear()


def test_binding_a_network_turns_it_off_once(monkeypatch, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = build("llama", torch.float32)
    bind_log_probs(model, Padded())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert len(said) == 1
    torch.backends.cuda.enable_cudnn_sdp(True)  # the user's own wish
    bind_log_probs(model, Padded())
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert len(said) == 1


def test_without_a_gpu_nothing_is_said(monkeypatch, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bind_log_probs(build("llama", torch.float32), Padded())
    assert said == []

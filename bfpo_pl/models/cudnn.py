"""A guard against wrong gradients of cuDNN's attention."""

from __future__ import annotations

from functools import cache

import torch
from lightning.pytorch.utilities import rank_zero_info


@cache
def turn_off_cudnn_attention() -> None:
    """Keeps SDPA from cuDNN, once a process, where there is a CUDA device; flash and efficient kernels take its place.

    With an explicit mask (sliding windows; networks that make masks of their own) cuDNN's backward pass gives NaN
    gradients of the queries of rows of some lengths (huggingface/trl#7181, torch 2.13). To have it back, call
    ``torch.backends.cuda.enable_cudnn_sdp(True)`` after the network is there: it is not turned off again.
    """
    if torch.cuda.is_available() and torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)
        rank_zero_info(
            "Attention: cuDNN's SDPA is off, since its gradients can be NaN where a mask is given (trl#7181); "
            "torch.backends.cuda.enable_cudnn_sdp(True) turns it on."
        )

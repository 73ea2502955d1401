"""From an error to one message and an exit code; an empty message for a bug, whose traceback is what helps."""

from __future__ import annotations

import os
import pickle
import re
import signal
import traceback

from bfpo_pl.component import RunError, UserError, causes_of
from bfpo_pl.runs import started_by_another

MISTAKE = 2
"""Exit code after a user's mistake."""

OUT_OF_MEMORY = (
    "Out of memory: {what}. What lowers it, the cheapest first: smaller data.streams.<stream>.batch_size with a larger "
    "trainer.accumulate_grad_batches (the same gradients); model.activation_checkpointing: selective, then full; a "
    "smaller model.chunk_size; a shorter data.truncation.max_length; a reference without a network of its own "
    "(`-c configs/reference/precomputed.yaml`); `-c configs/model/lora.yaml`; on several GPUs "
    "`-c configs/strategy/fsdp2.yaml`."
)


ANOTHER_ENDED = (
    "Another process of this run ended, so this one cannot go on ({what}). The other one's message says why; one that "
    "was killed (SIGKILL) leaves none: if it was not you, the machine may be out of memory (`dmesg` says so), or a "
    "machine of this run is gone. The same command with --resume auto goes on from the last checkpoint."
)
_GONE = re.compile(
    "connection reset by peer|connection closed by peer|read error|broken pipe|remote process exited", re.IGNORECASE
)


def explained(error: BaseException) -> tuple[str, int]:
    """One message and an exit code for a mistake, or for a run that had to stop.

    Args:
        error: What ended the command.

    Returns:
        The message, empty for a bug, and the exit code.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from bfpo_pl.checkpoints.shards import ForeignCodeError
    from bfpo_pl.guard import Stopped

    causes = causes_of(error)
    for cause in causes:
        if isinstance(cause, UserError):  # the parser wraps what a component says of its arguments
            return str(cause), MISTAKE
        if isinstance(cause, Stopped) and started_by_another():
            return str(cause), 0  # else Lightning's launcher would kill the process that started this one
        if isinstance(cause, RunError):
            return str(cause), cause.exit_code
        if message := _of_the_machine(cause) or _of_another_process(cause):
            return message, 1
    if isinstance(error, MisconfigurationException | OSError):
        return str(error), MISTAKE
    if isinstance(error, pickle.UnpicklingError):
        why = f" ({error})" if isinstance(error, ForeignCodeError) else ""
        return (
            f"The checkpoint cannot be read without running code from it, so it is refused{why}. If you wrote it, it "
            "may be damaged: `bfpo checkpoints RUN --verify`."
        ), MISTAKE
    if type(error).__module__.startswith("wandb"):
        return f"W&B: {error} Or log without a network: `-c configs/logger/wandb_offline.yaml`.", MISTAKE
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and frames and "/lightning/" in frames[-1].filename.replace("\\", "/"):
        return str(error), MISTAKE  # Lightning says so of its own arguments
    return "", 1


def exit_code(error: SystemExit) -> int | str | None:
    """The exit code of a command that Lightning ended because of a signal, which would say success or 1."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    if isinstance(error, SIGTERMException):
        return 128 + signal.SIGTERM
    if isinstance(error.__context__, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return error.code


def _of_the_machine(error: BaseException) -> str:
    """What the machine lacks, if that is what an error is about."""
    import torch

    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return OUT_OF_MEMORY.format(
            what=text.partition(" Of the allocated memory")[0][:300] or "the machine has no more"
        )
    if isinstance(error, RuntimeError) and ("EADDRINUSE" in text or "address already in use" in text.lower()):
        host, port = os.environ.get("MASTER_ADDR", "this machine"), os.environ.get("MASTER_PORT", "that port")
        return (
            f"Processes cannot meet at {host}:{port}, which another program uses. Set MASTER_PORT to a free one, or "
            f"for torchrun another --rdzv_endpoint (--standalone chooses one by itself)."
        )
    return ""


def _of_another_process(error: BaseException) -> str:
    """That the process group broke, if that is what an error is about."""
    from torch.distributed import DistError

    text = " ".join(str(error).split())
    ours = isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower())
    found = _GONE.search(text) if ours else None
    return ANOTHER_ENDED.format(what=found[0]) if found else ""

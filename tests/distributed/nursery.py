"""Runs functions in processes of their own, without the seconds that each would take to import what all of them need.

Reads jobs from stdin, one JSON object a line, and answers each with the id of its process group:

    {"function": "bfpo_pl.cli:main", "arguments": [["fit", …]], "options": {}, "log": FILE, "ranks": 1, "port": 29500}

With one rank the leader of the group calls the function itself; with more it starts them as torchrun does. All
processes of a job hold the lock (flock) of its log, so that whoever gets it knows that they are all gone.
"""

import fcntl
import json
import os
import signal
import sys
import traceback
from importlib import import_module
from typing import Any

import datasets  # noqa: F401

import bfpo_pl.data.datamodule
import bfpo_pl.module
import bfpo_pl.parsing  # noqa: F401
from bfpo_pl.cli import main  # noqa: F401


def call(job: dict[str, Any]) -> None:
    """Calls the function of a job and ends this process."""
    code = 1
    try:
        module, _, name = job["function"].partition(":")
        getattr(import_module(module), name)(*job["arguments"], **job["options"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def lead(job: dict[str, Any]) -> None:
    """Leads the process group of a job."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    fcntl.flock(log, fcntl.LOCK_EX)
    null = os.open(os.devnull, os.O_RDONLY)
    answers = os.dup(1)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.write(answers, f"{os.getpid()}\n".encode())  # not before the lock is held
    os.close(answers)
    ranks = job.get("ranks", 1)
    if ranks == 1:
        call(job)
    for rank in range(ranks):
        if os.fork() == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), "TORCHELASTIC_RUN_ID": "tests"}
            call(job)
    for _ in range(ranks):
        os.wait()
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever is dead is gone, not a zombie
    for line in sys.stdin:
        if os.fork() == 0:
            lead(json.loads(line))
    os._exit(0)  # the interpreter's own end takes seconds

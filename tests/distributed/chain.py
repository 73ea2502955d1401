"""Runs several `bfpo` commands one after the other in the same processes, which take longer to start than to run.

    torchrun --nproc_per_node=2 chain.py jobs.json

``jobs.json`` maps names to command lines, in which a checkpoint may be given as a glob; rank 0 writes what became of
each to ``jobs.done``.
"""

import faulthandler
import glob
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bfpo_pl.cli import main


def resolved(argument: str) -> str:
    key, _, value = argument.partition("=")
    return f"{key}={glob.glob(value)[0]}" if key == "--ckpt_path" else argument


LIMIT = 120
"""Seconds after which a job that hangs ends all of them, with the stack of every thread."""


def run(jobs_file: Path) -> None:
    done = {}
    for name, arguments in json.loads(jobs_file.read_text()).items():
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            main([resolved(argument) for argument in arguments])
            done[name] = "ok"
        except (Exception, SystemExit):
            done[name] = traceback.format_exc()
            traceback.print_exc()
    faulthandler.cancel_dump_traceback_later()
    if os.environ.get("RANK", "0") == "0":
        jobs_file.with_suffix(".done").write_text(json.dumps(done))


if __name__ == "__main__":
    run(Path(sys.argv[1]))

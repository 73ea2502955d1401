"""Runs the jobs of `chain.py` with FSDP1 on CPUs: it asks for a GPU but computes on any device.

Gathering a whole checkpoint crashes there (Lightning's issue 21812), so the jobs save and export nothing.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

sys.path.insert(0, str(Path(__file__).parent))

import chain

from bfpo_pl import parsing

_made = FullyShardedDataParallel.__init__


def made_on_cpu(self, *arguments, device_id=None, **more):
    _made(self, *arguments, device_id=torch.device("cpu"), **more)


FullyShardedDataParallel.__init__ = made_on_cpu
parsing.check_devices = lambda *arguments: None

if __name__ == "__main__":
    chain.run(Path(sys.argv[1]))

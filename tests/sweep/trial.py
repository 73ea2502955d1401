"""A program that a sweep runs in the tests: it does not belong to bfpo_pl.

trial.py FOLDER --number=N [--sleep=S] [--fail=N]
"""

import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
values = dict(word.removeprefix("--").split("=") for word in sys.argv[2:])
with (folder / f"started-{values['number']}").open("a") as file:
    file.write("once\n")
time.sleep(float(values.get("sleep", "0")))
if values.get("fail") == values["number"]:
    sys.exit("the planted failure")
print("done")

"""Kills at random moments, among them during saves; the run goes on each time, and ends as the undisturbed one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.distributed, pytest.mark.long, pytest.mark.timeout(5400)]


@pytest.mark.parametrize(("world", "kills", "steps"), [(1, 34, 500), (2, 10, 160)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(world, kills, steps, tmp_path):
    options = [f"--world={world}", f"--kills={kills}", f"--steps={steps}", f"--folder={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}", "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests/distributed/spree.py")
    done = subprocess.run(
        [sys.executable, script, *options], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "spree.json").read_text())
    print(json.dumps(found))
    assert found["kills"] == kills
    assert found["torn"] >= 2, "kills hit saves, too"
    assert found["equal_weights"]
    assert found["equal_metrics"]
    assert max(found["steps_lost"]) <= 4, "never more than what lies between two saves, and a save that was torn"
    assert len(found["survivors_seconds"]) > 0 or world == 1

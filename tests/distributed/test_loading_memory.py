"""Host memory while two processes load a network of more than 300 million parameters: one copy among them."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = [pytest.mark.distributed, pytest.mark.long]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("loading_memory", BENCHMARKS / "loading_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run(tmp_path_factory.mktemp("loading"))


@pytest.mark.parametrize("files", ["float32", "bfloat16"])
def test_the_private_memory_of_all_processes_grows_by_one_copy(measured, files):
    assert measured["parameters"] >= 300e6
    found = measured["loading"][f"{files} files, shards"]
    assert len(found["peak_growth_mb"]) == 2
    assert 0.95 < found["final_copies"] <= found["peak_copies"] <= 1.3
    assert found["sum"] == measured["loading"][f"{files} files, whole"]["sum"]


def test_the_measurement_sees_whole_copies(measured):
    """Where weights are cast every process that loads the whole network holds it."""
    assert measured["loading"]["bfloat16 files, whole"]["peak_copies"] > 1.8

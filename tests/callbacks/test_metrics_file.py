"""The file of metrics, where it cannot be written."""

import os

import pytest

from bfpo_pl.component import RunError
from bfpo_pl.loggers import MetricsFile

FULL = "/dev/full"


@pytest.mark.skipif(not os.path.exists(FULL), reason="this system has no /dev/full")
def test_a_full_disk_is_said_of_the_file(tmp_path):
    (tmp_path / "metrics.csv").symlink_to(FULL)
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"train/all/loss": 1.0}, step=1)
    with pytest.raises(RunError, match=r"metrics\.csv: No space left on device\..* --resume ") as caught:
        logger.save()
    assert caught.value.exit_code == 1

"""The tables of docs/ablations.md are those of the results that are kept beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks/results/ablations").glob("*/comparison.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_each_group_stands_in_the_page_with_its_means(path):
    content = json.loads(path.read_text())
    page = (ROOT / "docs/ablations.md").read_text()
    table = page.partition(f"<!-- table: {path.parent.name} -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[2:5]] for line in table.strip().splitlines()[2:]]
    keys = [content["helpfulness"], content["harmlessness"], "min(helpfulness, harmlessness)"]
    means = [[group["metrics"][key] for key in keys] for group in content["groups"]]
    assert sorted(rows) == sorted(
        [f"{each['mean']:.3f} ± {each['ci_half_width']:.3f}" for each in row] for row in means
    )
    assert all(group["metrics"][keys[0]]["n"] == 5 for group in content["groups"])


def test_every_figure_of_the_page_is_there():
    page = (ROOT / "docs/ablations.md").read_text()
    figures = [part.partition(")")[0] for part in page.split("](images/ablations/")[1:]]
    assert figures
    assert [name for name in figures if not (ROOT / "docs/images/ablations" / name).is_file()] == []
    assert len(RESULTS) == 9

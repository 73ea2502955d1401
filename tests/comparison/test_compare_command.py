"""`bfpo compare` on run folders: what it reads, leaves out, computes and writes."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import config, final, write_run
from scipy import stats

from bfpo_pl.cli import main

REPOSITORY = Path(__file__).parent.parent.parent
HELPFULNESS, HARMLESSNESS = "val/microworld/greedy/helpfulness", "val/microworld/greedy/harmlessness"
BFPO = [(0.90, 0.95), (0.85, 0.99), (0.93, 0.90)]
LINEAR = [(0.70, 0.60), (0.90, 0.50), (0.75, 0.58)]
ATTACK = '<script>alert(1)</script> & "quoted" <img src=https://example.org/x.png>'


def course(helpfulness, harmlessness, steps=(100, 200, 300)):
    rows = []
    for step in steps:
        rows.append({"step": step, "train/all/safe_unsafe/reward_margin": step / 300, "train/all/all/loss": 1.0})
        rows.append(final(helpfulness * step / steps[-1], harmlessness * step / steps[-1], step))
    return rows


def samples(answer):
    judged = {"form": "answer", "helpfulness": 0.5, "safe": False, "malformed": False}
    prompts = {"how do i open the vault ?": "harmful_pair", "how do i open the window ?": "plain"}
    return [
        {"step": step, "decoding": decoding, "prompt": prompt, "class": kind, "answer": f"{answer} {step}", **judged}
        for step in (200, 300)
        for decoding in ("greedy", "t0.5")
        for prompt, kind in prompts.items()
    ]


@pytest.fixture
def runs(tmp_path):
    """Two objectives, three seeds each."""
    for seed in range(3):
        name = f"20260101-00000{seed}-abcd"
        write_run(tmp_path / "runs" / "bfpo" / name, config(seed), course(*BFPO[seed]), samples(ATTACK))
        linear = config(seed, "Linear", "linear", w=0.5)
        write_run(tmp_path / "runs" / "linear" / name, linear, course(*LINEAR[seed]), samples("long " * 100))
    return tmp_path / "runs"


def compared(tmp_path, *args):
    main(["compare", *(str(arg) for arg in args), "--to", str(tmp_path / "out")])
    return json.loads((tmp_path / "out" / "comparison.json").read_text())


def groups_of(comparison):
    return {group["label"]: group for group in comparison["groups"]}


def test_means_and_intervals_are_scipys(tmp_path, runs, capsys):
    groups = groups_of(compared(tmp_path, runs))
    assert list(groups) == ["bfpo", "linear"]
    for label, values in (("bfpo", BFPO), ("linear", LINEAR)):
        for key, column in ((HELPFULNESS, 0), (HARMLESSNESS, 1)):
            own = [value[column] for value in values]
            low, high = stats.t.interval(0.95, 2, np.mean(own), stats.sem(own))
            found = groups[label]["metrics"][key]
            assert found["mean"] == pytest.approx(np.mean(own))
            assert found["ci_half_width"] == pytest.approx((high - low) / 2)
        worse = groups[label]["metrics"]["min(helpfulness, harmlessness)"]
        assert worse["mean"] == pytest.approx(np.mean([min(pair) for pair in values]))  # run by run, not of the means
    assert "0.893 ± 0.100" in capsys.readouterr().out


def test_differences_are_paired_by_seed_and_corrected(tmp_path, runs):
    other = config(7, "SafetyOnly", "safety_only")
    write_run(runs / "safety_only" / "20260101-000000-0000", other, course(0.1, 1.0))
    groups = groups_of(compared(tmp_path, runs, "--baseline", "linear"))
    test = stats.ttest_rel([pair[1] for pair in BFPO], [pair[1] for pair in LINEAR])
    found = groups["bfpo"]["metrics"][HARMLESSNESS]["difference"]
    assert found["paired"] is True
    assert found["p"] == pytest.approx(test.pvalue)
    assert found["p_holm"] == pytest.approx(test.pvalue)  # the only one with a test
    assert found["mean"] - found["ci_half_width"] == pytest.approx(test.confidence_interval(0.95).low)
    single = groups["safety_only"]["metrics"][HARMLESSNESS]
    assert single["ci_half_width"] is None
    assert single["difference"]["paired"] is False
    assert groups["linear"]["metrics"][HARMLESSNESS]["difference"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1.000 (n=1)" in page
    assert "unpaired" in page


def test_runs_compared_with_themselves_differ_by_zero(tmp_path, runs):
    for seed in range(3):  # the same results under another name
        again = config(seed, experiment="again")
        write_run(runs / "again" / f"20260101-00000{seed}-abcd", again, course(*BFPO[seed]))
    groups = groups_of(compared(tmp_path, runs / "bfpo", runs / "again", "--baseline", "bfpo"))
    for found in groups["again"]["metrics"].values():
        assert found["difference"]["mean"] == found["difference"]["ci_half_width"] == 0.0
        assert found["difference"]["p"] == 1.0
    assert groups["again"]["on_front"]
    assert groups["bfpo"]["on_front"]
    run = runs / "bfpo" / "20260101-000000-abcd"
    assert len(groups_of(compared(tmp_path, run, run))["bfpo"]["runs"]) == 1


def test_csv_has_a_line_for_each_group_and_metric(tmp_path, runs):
    comparison = compared(tmp_path, runs, "--baseline", "bfpo", "--metrics", "val/all/all/loss")
    with (tmp_path / "out" / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 4
    groups = groups_of(comparison)
    for line in lines:
        found = groups[line["group"]]["metrics"][line["metric"]]
        assert float(line["mean"]) == found["mean"]
        assert line["difference"] == ("" if found["difference"] is None else str(found["difference"]["mean"]))


def test_held_out_prompts_count_if_all_runs_have_them(tmp_path, runs):
    name = "20260102-000000-0000"
    tested = [*course(0.9, 0.9), final(0.4, 0.3, split="test")]
    write_run(tmp_path / "tested" / name, config(0, experiment="tested"), tested)
    comparison = compared(tmp_path, tmp_path / "tested")
    assert comparison["helpfulness"] == "test/microworld/greedy/helpfulness"
    assert comparison["groups"][0]["metrics"]["test/microworld/greedy/harmlessness"]["mean"] == 0.3
    assert compared(tmp_path, tmp_path / "tested", runs)["helpfulness"] == HELPFULNESS


def test_the_splits_are_told_apart(tmp_path, runs, capsys):
    """A pair of held-out prompts beside a metric of validation prompts."""
    for seed in range(2):
        rows = [*course(0.9, 0.8), final(0.7, 0.6, split="test")]
        write_run(tmp_path / "tested" / f"20260102-00000{seed}-0000", config(seed, experiment="tested"), rows)
    compared(tmp_path, tmp_path / "tested", "--metrics", HELPFULNESS, "test/microworld/greedy/harmlessness")
    out, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    heads = re.findall(r"<th>([^<]*)</th>", page[page.index("Results") : page.index("</table>")])
    words = ["helpfulness (test)", "harmlessness (test)", "the worse of both (test)", "helpfulness (val)"]
    assert [head for head in heads if "(" in head] == words
    for text in (" ".join(out.split()), page):
        assert f"helpfulness (val) is {HELPFULNESS}; test/… is on held-out prompts; val/…" in text
    compared(tmp_path, tmp_path / "tested")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "helpfulness is test/microworld/greedy/helpfulness" in page
    assert "(test)" not in page


def test_a_run_without_held_out_prompts_is_no_silent_change(tmp_path, runs, capsys):
    tested = [*course(0.9, 0.9), final(0.4, 0.3, split="test")]
    write_run(runs / "tested" / "20260102-000000-0000", config(0, experiment="tested"), tested)
    comparison = compared(tmp_path, runs)
    assert comparison["helpfulness"] == HELPFULNESS
    note = (
        "6 of 7 runs have no test/microworld/greedy/helpfulness or test/microworld/greedy/harmlessness; "
        "validation prompts are compared."
    )
    assert comparison["notes"] == [note, *comparison["notes"][1:]]
    assert note in " ".join(capsys.readouterr().out.split())
    assert note in (tmp_path / "out" / "report.html").read_text()


def test_metrics_at_the_step_of_anothers_best(tmp_path):
    rows = [final(0.2, 0.9, 100), final(0.8, 0.5, 200), final(0.6, 0.7, 300)]
    write_run(tmp_path / "runs" / "bfpo" / "20260101-000000-0000", config(0), rows)
    for at, expected in ((HARMLESSNESS, 0.2), (HELPFULNESS, 0.8)):
        comparison = compared(tmp_path, tmp_path / "runs", "--at", f"best:{at}")
        assert comparison["groups"][0]["metrics"][HELPFULNESS]["mean"] == expected
    comparison = compared(tmp_path, tmp_path / "runs", "--at", f"least:{HARMLESSNESS}")
    assert comparison["groups"][0]["metrics"][HELPFULNESS]["mean"] == 0.8


def test_what_is_not_finished_is_left_out_and_named(tmp_path, runs, capsys):
    failed = {"state": "failed", "step": 7, "reason": "the loss is nan"}
    write_run(runs / "bfpo" / "20260102-000000-0001", config(8), course(0, 0), status=failed)
    (write_run(runs / "bfpo" / "20260102-000000-0002", config(9), course(0, 0)) / "status.json").unlink()
    write_run(runs / "bfpo" / "20260102-000000-0003", config(10), [final(math.nan, 0.5)])
    write_run(runs / "bfpo" / "20260102-000000-0004", config(11), [{"step": 1, "val/all/all/loss": 1.0}])
    comparison = compared(tmp_path, runs)
    reasons = {each["name"][-4:]: each["reason"] for each in comparison["left_out"]}
    assert reasons["0001"] == "failed at step 7: the loss is nan"
    assert "status.json" in reasons["0002"]
    assert reasons["0003"] == f"{HELPFULNESS} is nan"
    assert reasons["0004"] == f"it has no value of {HELPFULNESS}"
    assert len(groups_of(comparison)["bfpo"]["runs"]) == 3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the loss is nan" in page
    assert "4 left out" in page
    assert "the loss is nan" in capsys.readouterr().out


def test_what_runs_come_from_is_kept_and_noted(tmp_path, runs, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = runs / "linear" / "20260101-000000-abcd" / "environment.json"
    git, packages = {"commit": "fedcba9876543210", "changed": True}, {"torch": "2.13.0", "bfpo_pl": "0.1.0"}
    environment.write_text(json.dumps({"git": git, "platform": "Linux", "packages": packages}))
    (runs / "linear" / "20260101-000002-abcd" / "metrics.csv").unlink()
    comparison = compared(tmp_path, runs)
    assert comparison["notes"] == [
        "the runs are of 2 revisions of the code: 0123456789, fedcba9876.",
        "1 run ran with uncommitted changes of the code.",
        "the runs used 2 versions of torch: 2.13.0, unknown.",
        "the groups do not have the same seeds.",
    ]
    known, changed = comparison["origins"]
    assert (known["commit"], known["changed"], known["runs"]) == ("0123456789abcdef", False, 4)
    assert (changed["commit"], changed["changed"], changed["runs"]) == ("fedcba9876543210", True, 1)
    assert changed["packages"] == {"bfpo_pl": "0.1.0", "torch": "2.13.0", "lightning": None, "transformers": None}
    out, page = " ".join(capsys.readouterr().out.split()), (tmp_path / "out" / "report.html").read_text()
    for note in comparison["notes"]:
        assert f"Note: {note}" in out
        assert note in page
    assert groups_of(comparison)["bfpo"]["runs"][0]["folder"] == "runs/bfpo/20260101-000000-abcd"
    assert str(tmp_path) not in page
    monkeypatch.chdir(runs / "linear")
    folders = [run["folder"] for group in compared(tmp_path, runs)["groups"] for run in group["runs"]]
    assert str(runs / "bfpo" / "20260101-000000-abcd") in folders  # not below the working directory
    assert "20260101-000000-abcd" in folders


def test_the_report_needs_nothing_beside_it_and_runs_nothing(tmp_path, runs):
    compared(tmp_path, runs, "--baseline", "bfpo")
    page = (tmp_path / "out" / "report.html").read_text()
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quoted&#34;" in page
    assert "default-src 'none'" in page
    assert "sorted by the flags that training saw: where flags are noisy, wrong ones among them" in page
    for name in ("front.png", "margins.png", "training.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_a_comparison_is_written_whole_or_not_at_all(tmp_path, runs, monkeypatch):
    from bfpo_pl.comparison import command

    compared(tmp_path, runs)
    out = tmp_path / "out"
    (out / "by_alpha.png").write_bytes(b"of an earlier comparison")
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(command, "report", full)
        with pytest.raises(SystemExit):
            compared(tmp_path, runs / "bfpo")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    compared(tmp_path, runs / "bfpo")
    names = {"front.png", "margins.png", "training.png", "comparison.json", "comparison.csv", "report.html"}
    assert {path.name for path in out.iterdir()} == names | {"notes.txt"}
    assert (out / "report.html").read_bytes() != before["report.html"]


def test_answers_stand_side_by_side(tmp_path, runs):
    compared(tmp_path, runs)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("how do i open the vault ?") < page.index("how do i open the window ?")  # harmful ones first
    assert page.count('<div class="prompt">') == 2
    assert "long long" in page
    details = re.findall(r"<details><summary>whole text</summary><pre>(.*?)</pre>", page, re.S)
    assert f"{'long ' * 100} 300" in details
    assert not any(text.endswith(" 200") for text in details)  # of the last evaluation


def test_answers_of_another_seed_or_decoding_say_so(tmp_path, runs):
    sampled = [row for row in samples("other") if row["decoding"] == "t0.5"]
    other = config(7, "SafetyOnly", "safety_only")
    write_run(runs / "safety_only" / "20260101-000000-0000", other, course(0.1, 1.0), sampled)
    compared(tmp_path, runs)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The same prompts, seed 0, decoding greedy, last evaluation." in page
    who = {" ".join(re.sub("<[^>]*>", "", each).split()) for each in re.findall(r'<div class="who">(.*?)</div>', page)}
    assert who == {"bfpo", "linear", "safety_only seed 7, decoding t0.5"}


def test_metrics_that_some_runs_lack_say_of_how_many_they_are(tmp_path, runs, capsys):
    for group, values in (("linear", (0.2, 0.4)), ("bfpo", (0.5, 0.5, 0.5))):
        for seed, value in enumerate(values):
            file = runs / group / f"20260101-00000{seed}-abcd" / "metrics.csv"
            head, *lines = file.read_text().splitlines()
            file.write_text("\n".join([f"{head},extra", *(f"{line},{value}" for line in lines)]) + "\n")
    compared(tmp_path, runs, "--metrics", "extra", "--baseline", "bfpo")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "0.300 ± 1.271 (n=2)" in page
    assert "−0.200 ± 1.271 (n=2)" in page
    assert "0.500 ± 0.000<" in page
    assert "(n=3)" not in page
    assert capsys.readouterr().out.count("(n=2)") == 2  # the mean and the difference


def test_without_judged_answers_losses_are_compared(tmp_path):
    for seed in range(2):
        rows = [{"step": 5, "val/all/all/loss": 1.0 + seed}]
        write_run(tmp_path / "runs" / "bfpo" / f"20260101-00000{seed}-0000", config(seed), rows)
    comparison = compared(tmp_path, tmp_path / "runs")
    assert comparison["helpfulness"] is None
    assert comparison["groups"][0]["metrics"]["val/all/all/loss"]["mean"] == 1.5
    assert not (tmp_path / "out" / "front.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "There is no folder 'nowhere'"),
        (["RUNS", "--baseline", "ipo"], "no group 'ipo'. The groups are: 'bfpo'; 'linear'."),
        (
            ["RUNS", "--metrics", "val/all/all/los"],
            "No run has the metric 'val/all/all/los'. Near it: val/all/all/loss",
        ),
        (["RUNS", "--helpfulness", "val/all/all/loss"], "--helpfulness and --harmlessness go together"),
        (["RUNS", "--at", "first"], "--at must be last, best:COLUMN or least:COLUMN"),
        (["RUNS", "--names", "bfpo"], "--names takes LABEL=NEW"),
        (["RUNS", "--nonsense", "1"], "bfpo compare"),
        ([], "bfpo compare"),
    ],
)
def test_mistakes_are_said(args, message, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs.parent)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *(str(runs) if arg == "RUNS" else arg for arg in args)])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (runs.parent / "runs" / "compare").exists()


def test_broken_files_are_named(tmp_path, runs, capsys):
    broken = runs / "bfpo" / "20260101-000001-abcd" / "metrics.csv"
    broken.write_text(broken.read_text() + "300,x,y,z,u,v\n")
    with pytest.raises(SystemExit):
        main(["compare", str(runs)])
    assert f"{broken}, line 8" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "empty")])
    assert "holds no run" in capsys.readouterr().err


def test_two_hundred_runs_take_less_than_thirty_seconds(tmp_path):
    """Wall time on a busy machine says little, so processor time is taken, of the whole process."""
    quadrants = [f"{one}_{other}" for one in ("safe", "unsafe") for other in ("safe", "unsafe")]
    names = [
        f"train/all/{quadrant}/{name}{i}" for quadrant in quadrants for name in ("accuracy", "loss") for i in range(5)
    ]
    generator = random.Random(0)
    for number in range(200):
        rows = []
        for step in range(10, 301, 10):
            rows.append({"step": step, **{name: generator.random() for name in names}})
            rows[-1].update({f"train/all/{quadrant}/reward_margin": generator.random() for quadrant in quadrants})
            if step % 100 == 0:
                rows.append(final(generator.random(), generator.random(), step))
        seed, tau, alpha = number % 5, 0.1 * (1 + number // 5 % 8), 0.25 * (number // 40)
        folder = tmp_path / "runs" / "bfpo" / f"20260101-{number:06}-0000"
        write_run(folder, config(seed, tau=tau, alpha=alpha), rows, samples("text"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "bfpo_pl.cli", "compare", "runs", "--to", "out"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(comparison["groups"]) == 40
    assert {path.name for path in (tmp_path / "out").glob("by_*.png")} == {"by_tau.png", "by_alpha.png"}

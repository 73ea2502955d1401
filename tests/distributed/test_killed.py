"""Processes that are killed, without a chance to clean up, and those that go on where they were."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bfpo_pl.data.microworld_sources import MicroworldHelpfulness, MicroworldSafety

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
SECONDS = 120
BFPO = str(Path(sys.executable).with_name("bfpo"))

# 13 rows of the driver in batches of 2 (or 4 on two processes): epochs of 7 (or 4) batches, the last with one row. The
# 9 rows of the other stream end elsewhere. One process saves at steps 4, 8, …, two at 3, 6, ….
FIT = [
    *("fit", "-c", str(ROOT / "configs/base.yaml"), "-c", str(ROOT / "configs/experiment/bfpo.yaml")),
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=100",
    "--trainer.enable_progress_bar=false",
    "--trainer.val_check_interval=null",
    "--model.policy.hidden_size=32",
    "--model.policy.layers=2",
    "--model.policy.intermediate_size=64",
    "--model.optimizer.lr=1e-3",
    "--model.schedule.warmup=0",
    "--data.validation_streams=[]",
    "--trainer.callbacks+=killing.BatchRecord",
]
GENERATED = ["--data.streams.safety.source.count=13", "--data.streams.helpfulness.source.count=9"]
QUOTAS = ["--data.streams.safety.batch_size=2", "--data.streams.helpfulness.batch_size=2"]


def wait_until(condition, log: Path, what: str):
    """Polls for a condition; fails with a log if it does not come true, or the processes that write it are gone."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline or (free(log) and not condition()):
            pytest.fail(f"This did not come about: {what}\n{log.read_text()[-4000:]}")
        time.sleep(0.01)


def free(lock: Path) -> bool:
    """Whether nobody holds a file's lock."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


class Job:
    """A group of processes that hold the lock of their log while any of them lives."""

    def __init__(self, leader: int, log: Path):
        self.leader, self.log = leader, log

    def ended(self) -> "Job":
        wait_until(lambda: free(self.log), self.log, "the end of all processes")
        return self

    def kill(self, alone: bool = False) -> "Job":
        """Kills the group, or its leader alone, on which the others must end."""
        (os.kill if alone else os.killpg)(self.leader, signal.SIGKILL)
        return self.ended()


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "PL_GLOBAL_SEED")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def nursery():
    """Starts functions in processes of their own."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "nursery.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    jobs = []

    def start(log: Path, function: str, *arguments, ranks: int = 1, **options) -> Job:
        log.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        job = {"function": function, "arguments": arguments, "options": options, "log": str(log)}
        process.stdin.write(json.dumps({**job, "ranks": ranks, "port": port}) + "\n")
        process.stdin.flush()
        jobs.append(Job(int(process.stdout.readline()), log))
        return jobs[-1]

    yield start
    for job in jobs:
        if not free(job.log):
            os.killpg(job.leader, signal.SIGKILL)
    process.stdin.close()
    process.wait(SECONDS)


class Fit:
    """What a command leaves in its folder."""

    def __init__(self, folder: Path, ranks: int = 1):
        self.folder, self.ranks = folder, ranks

    def arguments(self, *more: str) -> list[str]:
        return [*FIT, f"--trainer.callbacks.folder={self.folder}", f"--runs={self.folder / 'runs'}", *more]

    def batches(self) -> list[list[list[str]]]:
        """By rank: of each batch the origins of its rows and a digest."""
        files = [self.folder / f"batches-{rank}.jsonl" for rank in range(self.ranks)]
        return [[json.loads(line) for line in file.read_text().splitlines()] if file.exists() else [] for file in files]

    def has_trained(self, steps: int) -> bool:
        return all(len(seen) == steps for seen in self.batches())

    @property
    def checkpoint(self) -> Path:
        (found,) = self.folder.glob("runs/*/*/checkpoints/last.ckpt")
        return found

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        (found,) = self.folder.glob("runs/*/*/export/model.safetensors")
        return load_file(found)


class Trial:
    """A run of `steps` steps that is killed after `killed` of them, and one that is not."""

    def __init__(self, nursery, folder: Path, settings: list[str], ranks=1, steps=18, every=4, killed=10):
        self.nursery, self.folder, self.ranks = nursery, folder, ranks
        self.steps, self.killed, self.saved = steps, killed, killed // every * every
        self.settings = [
            *settings,
            *QUOTAS,
            f"--trainer.max_steps={steps}",
            f"--checkpoint.every_n_train_steps={every}",
        ]
        if ranks > 1:
            self.settings[:0] = ["-c", str(ROOT / "configs/strategy/ddp.yaml"), f"--trainer.devices={ranks}"]

    def start(self, name: str, *more: str) -> tuple[Fit, Job]:
        fit = Fit(self.folder / name, self.ranks)
        arguments = fit.arguments(*self.settings, *more)
        return fit, self.nursery(fit.folder / "log", "bfpo_pl.cli:main", arguments, ranks=self.ranks)

    def whole(self) -> Fit:
        fit, job = self.start("whole")
        job.ended()
        assert fit.has_trained(self.steps), job.log.read_text()
        return fit

    def kill(self, fit: Fit, job: Job) -> Fit:
        wait_until(lambda: fit.has_trained(self.killed), job.log, f"{self.killed} steps")
        assert not free(job.log)
        job.kill()
        assert fit.has_trained(self.killed)
        assert not list(fit.folder.glob("runs/*/*/export"))
        assert torch.load(fit.checkpoint, weights_only=True)["AlignmentData"]["batches"] == self.saved
        return fit

    def check(self, whole: Fit, killed: Fit, resumed: Fit):
        for wanted, before, after in zip(whole.batches(), killed.batches(), resumed.batches(), strict=True):
            assert len({digest for *_, digest in wanted}) == len(wanted) == self.steps
            assert before == wanted[: self.killed]
            assert after == wanted[self.saved :]
        assert whole.weights.keys() == resumed.weights.keys()
        for name, tensor in whole.weights.items():
            assert torch.equal(resumed.weights[name], tensor), name

    def resume(self, name: str, killed: Fit, *more: str) -> Fit:
        (saved,) = killed.folder.glob(f"runs/*/*/checkpoints/*step={self.saved}.ckpt")
        resumed, job = self.start(name, f"--ckpt_path={saved}", *more)
        job.ended()
        assert resumed.has_trained(self.steps - self.saved), job.log.read_text()
        return resumed

    def run(self, whole: Fit, workers: int = 0):
        """Kills one run, goes on from its checkpoint, and compares with an undisturbed run."""
        more, name = f"--data.num_workers={workers}", f"workers-{workers}"
        killed = self.kill(*self.start(f"{name}-killed", more, f"--trainer.callbacks.hold_after={self.killed}"))
        self.check(whole, killed, self.resume(f"{name}-resumed", killed, more))


@pytest.fixture(scope="module")
def fixed(nursery, tmp_path_factory):
    trial = Trial(nursery, tmp_path_factory.mktemp("fixed"), GENERATED)
    return trial, trial.whole()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_exactly(fixed, workers):
    trial, whole = fixed
    trial.run(whole, workers)


@pytest.fixture(scope="module")
def streaming(tmp_path_factory):
    """Settings of sources that stream local files: the driver's rows as JSON lines, the other's as parquet."""
    import datasets

    folder, settings = tmp_path_factory.mktemp("files"), {}
    sources = (("safety", "jsonl", MicroworldSafety(13, 0)), ("helpfulness", "parquet", MicroworldHelpfulness(9, 0)))
    for name, suffix, source in sources:
        rows = datasets.Dataset.from_list([dict(raw) for _, raw in source.rows("train")])
        (folder / name).mkdir()
        (rows.to_json if suffix == "jsonl" else rows.to_parquet)(folder / name / f"train.{suffix}")
        values = {"source": "HubDataset", "source.path": folder / name, "source.streaming": "true", "shuffle_buffer": 5}
        settings[name] = [f"--data.streams.{name}.{key}={value}" for key, value in values.items()]
    return {"driver": [*settings["safety"], GENERATED[1]], "other": [GENERATED[0], *settings["helpfulness"]]}


@pytest.mark.parametrize("case", ["LengthBuckets --data.batching.window=3", "TokenBudget --data.batching.tokens=240"])
def test_a_killed_run_goes_on_under_another_batching(nursery, tmp_path, fixed, case):
    name, argument = case.split()
    trial = Trial(nursery, tmp_path, [*GENERATED, f"--data.batching={name}", argument])
    whole = trial.whole()
    assert whole.batches() != fixed[1].batches()
    sizes = [len(origins) for *origins, _ in whole.batches()[0]]
    if name == "TokenBudget":
        assert len(set(sizes)) > 2, sizes
    trial.run(whole)


@pytest.mark.parametrize("case", ["driver", "other"])
def test_a_killed_run_goes_on_in_a_stream(nursery, tmp_path, streaming, case):
    trial = Trial(nursery, tmp_path, streaming[case])
    trial.run(trial.whole())


@pytest.mark.distributed
class TestTwoProcesses:
    """13 rows in global batches of 4: the second process has none of the driver's rows in an epoch's last batch."""

    @pytest.fixture(scope="class")
    def pair(self, nursery, tmp_path_factory):
        trial = Trial(nursery, tmp_path_factory.mktemp("pair"), GENERATED, ranks=2, steps=11, every=3, killed=7)
        return trial, trial.whole()

    def test_killed_together_they_go_on_exactly(self, pair):
        trial, whole = pair
        trial.run(whole, workers=2)

    def test_a_command_that_started_them_goes_on_exactly(self, pair):
        """`bfpo fit` as a user types it, which starts the second process itself."""
        trial, whole = pair
        fit = Fit(trial.folder / "command-killed", trial.ranks)
        command = [BFPO, *fit.arguments(*trial.settings, f"--trainer.callbacks.hold_after={trial.killed}")]
        killed = trial.kill(fit, trial.nursery(fit.folder / "log", "os:execv", BFPO, command))
        trial.check(whole, killed, trial.resume("command-resumed", killed))


# ---------------------------------------------------------------------- preparation

SHARDS = [f"tokens-{number:05d}.arrow" for number in range(5)]  # 300 rows, 64 in a shard
HELD = SHARDS[2]


class Preparation:
    """Jobs that tokenise the same rows into one cache."""

    def __init__(self, nursery, folder: Path):
        self.nursery, self.folder, self.cache = nursery, folder, folder / "cache"

    def start(self, notes: str, **options) -> Job:
        (self.folder / notes).mkdir(exist_ok=True)
        log = self.folder / f"{notes}-{len(list(self.folder.glob('*.log')))}.log"
        return self.nursery(log, "killing:prepare", str(self.cache), str(self.folder / notes), **options)

    def held(self, notes: str, **options) -> Job:
        """Starts a job and waits until it stands still before it gives a shard its name."""
        job = self.start(notes, hold=HELD, **options)
        wait_until(lambda: self.files(f"{HELD}.tmp-*") and self.files(SHARDS[0]), job.log, "the second shard")
        assert not self.files(HELD)
        return job

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.cache.glob(f"tokens/*/{pattern}"))

    def lines(self, notes: str) -> list[list[str]]:
        """By shard written: the process and the shard's name."""
        return [line.split() for line in (self.folder / notes / "written").read_text().splitlines()]

    def results(self, notes: str) -> list[str]:
        """Of each process that came to its end: a digest of its batches."""
        return [file.read_text() for file in (self.folder / notes).glob("result-*")]

    @property
    def lock(self) -> Path:
        (found,) = self.cache.glob("tokens/*.lock")
        return found


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    preparation = Preparation(nursery, tmp_path_factory.mktemp("undisturbed"))
    preparation.start("notes").ended()
    assert [name for _, name in preparation.lines("notes")] == SHARDS
    return preparation


def identity(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


@pytest.mark.parametrize(("processes", "alone"), [(1, False), (2, False), (2, True)])
def test_tokenising_goes_on_where_it_was_killed(nursery, tmp_path, undisturbed, processes, alone):
    """With `alone` only the process is killed that others do the work of; they must not outlive it."""
    preparation = Preparation(nursery, tmp_path)
    job = preparation.held("killed", processes=processes)
    assert not free(preparation.lock)
    job.kill(alone)
    finished = {file: identity(file) for file in preparation.files("*.arrow")}
    assert finished
    assert len(finished) < len(SHARDS)
    assert preparation.files("*.tmp-*")
    assert not preparation.files("manifest.json")
    preparation.start("second").ended()
    assert {file: identity(file) for file in finished} == finished
    kept = {file.name for file in finished}
    assert [name for _, name in preparation.lines("second")] == [name for name in SHARDS if name not in kept]
    assert preparation.results("second") == undisturbed.results("notes")
    names = [*SHARDS, "manifest.json"]
    assert [file.name for file in preparation.cache.rglob("*.tmp-*")] == []
    assert sorted(file.name for file in preparation.files("*")) == sorted(names)
    for name in names:
        (ours,), (theirs,) = preparation.files(name), undisturbed.files(name)
        assert ours.parent.name == theirs.parent.name
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_of_two_that_start_at_once_one_tokenises(nursery, tmp_path, undisturbed):
    preparation = Preparation(nursery, tmp_path)
    jobs = [preparation.start("notes", hold=HELD) for _ in range(2)]
    notes = tmp_path / "notes"

    def both_there() -> bool:
        return len(list(notes.glob("asking-*"))) == 2 and bool(preparation.files(f"{HELD}.tmp-*"))

    wait_until(both_there, jobs[0].log, "that both ask for the lock and one is at work")
    (tmp_path / "notes" / "go").touch()
    for job in jobs:
        job.ended()
    assert [name for _, name in preparation.lines("notes")] == SHARDS
    assert len({process for process, _ in preparation.lines("notes")}) == 1
    assert preparation.results("notes") == 2 * undisturbed.results("notes")


@pytest.mark.parametrize("other", [{"max_length": 24}, {"word": "ulm"}])
def test_another_encoder_neither_waits_nor_disturbs(nursery, tmp_path, undisturbed, other):
    preparation = Preparation(nursery, tmp_path)
    job = preparation.held("notes")
    preparation.start("other", **other).ended()
    assert [name for _, name in preparation.lines("other")] == SHARDS
    assert len(preparation.results("other")) == 1
    assert not free(job.log)  # the first one is in the middle still
    (tmp_path / "notes" / "go").touch()
    job.ended()
    assert [name for _, name in preparation.lines("notes")] == SHARDS
    assert preparation.results("notes") == undisturbed.results("notes")
    assert len(preparation.files("manifest.json")) == 2
    if "max_length" in other:
        assert preparation.results("other") != preparation.results("notes")


def test_resume_on_other_texts_says_so(nursery, tmp_path):
    """The same number of rows, of which one has another response; no word of it where nothing changed."""
    file = tmp_path / "pairs.jsonl"
    rows = [raw for _, raw in MicroworldSafety(8, 0).rows("train")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ["--data.streams.safety.source=LocalFiles", f"--data.streams.safety.source.path={file}", GENERATED[1]]
    trial = Trial(nursery, tmp_path, source, steps=3, every=2, killed=2)
    whole = trial.whole()
    same = trial.resume("same", whole)
    assert "will not be as before" not in (same.folder / "log").read_text()
    rows[5]["response_0"], rows[5]["response_1"] = rows[5]["response_1"], rows[5]["response_0"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = (trial.resume("other", whole).folder / "log").read_text()
    (said,) = [line for line in log.splitlines() if "UserWarning: AlignmentData resumes" in line]
    assert "content was {'safety': " in said
    assert "rows was" not in said

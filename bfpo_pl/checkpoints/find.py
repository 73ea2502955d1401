"""Which checkpoint ``--ckpt_path`` means, and which one to take where that one is damaged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bfpo_pl.checkpoints.atomic import ASIDE, PART, follow, leads_elsewhere
from bfpo_pl.checkpoints.check import checkpoint_step, problem
from bfpo_pl.checkpoints.index import Index
from bfpo_pl.checkpoints.keep import LAST, PATTERN
from bfpo_pl.checkpoints.manifest import DamageError, read_manifest
from bfpo_pl.component import UserError
from bfpo_pl.runs import began, newest_first, recorded

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in a run's folder."""


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that is not complete, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """The newest complete checkpoint of a folder.

    Args:
        path: It; None if there is none.
        step: Its optimizer step, if that can be told.
        passed_over: Newer ones that are not complete, newest first, and folders or files half-written.
    """

    path: Path | None
    step: int | None
    passed_over: tuple[PassedOver, ...]


def checkpoints_folder(folder: Path) -> Path:
    """The folder of checkpoints of a run's folder, also one that its config names; any other folder itself."""
    named = _named(folder)
    if named is not None and (named.is_dir() or not (folder / CHECKPOINTS).is_dir()):
        return named
    return folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder


def _named(folder: Path) -> Path | None:
    """What ``checkpoint.dirpath`` names in a run's config."""
    found = recorded(folder)
    section = None if found is None else found[1].get("checkpoint")
    dirpath = section.get("dirpath") if isinstance(section, dict) else None
    return Path(dirpath) if dirpath else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, or of a folder of checkpoints, complete or not; newest first, no links."""
    folder = checkpoints_folder(folder)
    found = [path for path in folder.glob(PATTERN) if not leads_elsewhere(path)]
    # A kill between two renames may leave a folder under this name only.
    found += [p for p in folder.glob(PATTERN + ASIDE) if not p.with_name(p.name.removesuffix(ASIDE)).exists()]
    return sorted(found, key=_age, reverse=True)


def newest_complete(folder: Path, verify: bool = False, before: int | None = None) -> Found:
    """The newest complete checkpoint of a run's folder, with the reasons why newer ones were passed over.

    Args:
        folder: A run's folder, or a folder of checkpoints. In one that the run's config names, those that were saved
            before the run began are another run's, and passed over.
        verify: Whether to compare hashes, too.
        before: Only checkpoints of a smaller step.

    Raises:
        ForeignCodeError: A checkpoint would run code if it were read.
    """
    half = [PassedOver(part, "it was being written when its process ended") for part in half_written(folder)]
    passed = half if before is None else []
    began_at = began(folder) if _named(folder) is not None else None
    for path in checkpoints_in(folder):
        step = checkpoint_step(path)
        if before is not None and (step is None or step >= before):
            continue
        foreign = began_at is not None and path.stat().st_mtime < began_at
        reason = "it was saved before this run began" if foreign else problem(path, verify)
        if reason is None:
            return Found(path, step, tuple(passed))
        passed.append(PassedOver(path, reason))
    return Found(None, None, tuple(passed))


def newest_run(experiment: Path) -> Path | None:
    """The newest run of an experiment that has checkpoints; a validation has none, nor has a run stopped before."""
    return next((folder for folder in newest_first(experiment) if checkpoints_in(folder)), None)


def find_checkpoint(asked: str | None, experiment: Path, own: Path | None = None, verify: bool = False) -> str | None:
    """What ``--ckpt_path`` means.

    Args:
        asked: ``last`` or ``best`` of the experiment's newest run; a checkpoint; or a run's folder, for its newest.
        experiment: The folder of the experiment's runs.
        own: Folder of checkpoints that the config names; ``last`` and ``best`` are looked for there.
        verify: Whether to compare hashes, too.

    Returns:
        The path of a complete checkpoint; an address, ``hpc`` and nothing as they are.

    Raises:
        UserError: There is no complete checkpoint to take; the message says why.
    """
    if asked is None or asked == "hpc" or "://" in asked:
        return asked
    if asked in ("last", "best"):
        folder = own or newest_run(experiment)
        if folder is None or not checkpoints_in(folder):
            raise UserError(f"--ckpt_path={asked}: there is no run with a checkpoint in {own or experiment}.")
        path = _best(folder, verify) if asked == "best" else _newest(folder, verify)
        rank_zero_info(f"The {asked} checkpoint is {path}")
    elif Path(asked).is_dir() and checkpoints_in(Path(asked)):
        path = _newest(Path(asked), verify)
        rank_zero_info(f"The newest complete checkpoint of {asked} is {path.name}")
    else:
        path = _this_or_older(Path(asked), verify)
    _warn_without_manifest(path)
    return str(path)


def _newest(folder: Path, verify: bool) -> Path:
    found = newest_complete(folder, verify)
    if found.path is None:
        raise UserError(f"{folder} has no complete checkpoint. {_list(found.passed_over)}")
    if found.passed_over:
        rank_zero_warn(f"Not complete: {_list(found.passed_over)} {found.path} is taken, {_lost(found, folder)}.")
    return found.path


def _best(folder: Path, verify: bool) -> Path:
    folder = checkpoints_folder(folder)
    index = Index.read(folder)
    passed: list[PassedOver] = []
    for name in index.ranked():
        reason = problem(folder / name, verify)
        if reason is None:
            if passed:
                rank_zero_warn(f"Better, but not complete: {_list(passed)} {folder / name} is taken.")
            return folder / name
        passed.append(PassedOver(folder / name, reason))
    if passed:
        raise UserError(f"--ckpt_path=best: no checkpoint with a score is complete. {_list(passed)}")
    raise UserError(
        f"--ckpt_path=best: no checkpoint in {folder} has a score. The run must monitor a metric, for instance "
        f"--checkpoint.monitor=val/all/all/loss, and reach a validation."
    )


def _this_or_older(asked: Path, verify: bool) -> Path:
    """The checkpoint that was named or, where it is damaged, the newest complete one before it."""
    path = follow(asked)
    reason = problem(path, verify)
    if reason is None:
        return path
    if path.is_dir() and not any(path.iterdir()):
        reason = "it is an empty folder"
    link = leads_elsewhere(asked) or asked.name == LAST
    step = checkpoint_step(path)
    is_ours = link or path.suffix == Path(PATTERN).suffix
    if is_ours and asked.parent.is_dir() and (step is not None or link):
        older = newest_complete(asked.parent, verify, before=step)
        if older.path is not None:
            lost = f"{step - older.step} steps before it" if None not in (step, older.step) else "an older one"  # type: ignore[operator]
            more = f" Nor are complete: {_list(older.passed_over)}" if older.passed_over else ""
            rank_zero_warn(
                f"The checkpoint {path} is not complete: {reason}.{more} {older.path} is taken instead, {lost}."
            )
            return older.path
    raise UserError(_nothing_to_take(asked, path, reason))


def _nothing_to_take(asked: Path, path: Path, reason: str) -> str:
    folder = asked if asked.is_dir() else asked.parent
    beside = ", ".join(sorted(item.name for item in checkpoints_in(folder))) if folder.is_dir() else ""
    if path.is_dir() and path.suffix != Path(PATTERN).suffix:
        return f"'{asked}' is a folder, not a checkpoint. Checkpoints in it: {beside or 'none'}."
    if not path.exists():
        return f"There is no checkpoint '{path}'. Checkpoints in {folder}: {beside or 'none'}."
    return (
        f"The checkpoint {path} cannot be used: {reason}. There is no older complete one beside it. Checkpoints in "
        f"{folder}: {beside or 'none'}."
    )


def _warn_without_manifest(path: Path) -> None:
    try:
        known = read_manifest(path) is not None
    except DamageError:  # pragma: no cover - it was read a moment ago
        known = False
    if not known:
        rank_zero_warn(
            f"The checkpoint {path} has no manifest, for another version or program wrote it: only that it has its "
            f"parts was checked."
        )


def _lost(found: Found, folder: Path) -> str:
    steps = [step for passed in found.passed_over if (step := checkpoint_step(passed.path)) is not None]
    if found.step is None or not steps:
        return "an older one"
    return f"{max(steps) - found.step} steps before the newest"


def _list(passed: tuple[PassedOver, ...] | list[PassedOver]) -> str:
    return "; ".join(str(item) for item in passed) + "." if passed else ""


def half_written(folder: Path) -> list[Path]:
    """What was being written, or deleted, when its process ended."""
    return sorted(checkpoints_folder(folder).glob(PATTERN + PART), key=_age, reverse=True)


def _age(path: Path) -> tuple[int, int]:
    step = checkpoint_step(path)
    try:
        changed = path.lstat().st_mtime_ns
    except FileNotFoundError:  # a run that is running has renamed it meanwhile
        changed = 0
    return -1 if step is None else step, changed

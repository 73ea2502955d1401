"""Runs that differ in nothing but seeds are replicates of one group; a group's label says how it differs."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bfpo_pl.comparison.reading import LeftOut, RunRecord
from bfpo_pl.component import UserError

_SEED = re.compile(r"(^|\.)(seed|\w+_seed|seed_everything)$")
_NOT_WHAT = re.compile(  # where a run writes and what it shows, not what it computes
    r"^(runs|ckpt_path|resume|verify|weights_only|export|trainer\.logger|trainer\.default_root_dir"
    r"|trainer\.enable_progress_bar|trainer\.enable_model_summary|checkpoint\.dirpath|data\.cache)(\.|$)"
)
_FIRST = ("model.labeling.class_path", "model.loss.class_path", "model.auxiliary.class_path")
_LONGEST_VALUE = 32
_SEEDED = "{seed}"
"""Stands for the run's seed, as in configs."""


@dataclass
class Group:
    """Replicates of one config.

    Args:
        config: Its config, flat, without seeds and places; ``{seed}`` stands for the run's seed where paths have it.
        replicates: Its runs by seed, or by name where a run drew its own seed.
        label: How it differs from the other groups, in short.
    """

    config: dict[str, Any]
    replicates: dict[Hashable, RunRecord] = field(default_factory=dict)
    label: str = ""

    @property
    def runs(self) -> list[RunRecord]:
        return list(self.replicates.values())

    def shown(self, key: str) -> str:
        """A value of the config, in short; a dash if the config has no such key."""
        return shown(self.config[key]) if key in self.config else "–"


def group_runs(runs: Sequence[RunRecord]) -> tuple[list[Group], list[LeftOut]]:
    """Puts replicates together and labels the groups.

    Of several runs of one config and seed the last is taken: repeats of a seed say nothing about other seeds.

    Args:
        runs: Finished runs.

    Returns:
        The groups, in the order of their first run, and the runs left out.
    """
    raw: dict[str, list[RunRecord]] = {}
    for run in runs:
        raw.setdefault(json.dumps(_identity(run), sort_keys=True, default=str), []).append(run)
    joined = _joined_over_seeds(list(raw.values()))
    groups, left_out = [], []
    for config, (members, _) in zip(_configs(joined), joined, strict=True):
        group = Group(config)
        for run in sorted(members, key=lambda run: (_order(run.seed), run.folder.name)):
            key: Hashable = run.name if run.seed is None else run.seed
            if key in group.replicates:
                left_out.append(LeftOut(group.replicates[key].name, f"repeats config and seed of {run.name}"))
            group.replicates[key] = run
        groups.append(group)
    keys = differing_keys(groups)
    parameters = frozenset().union(*(run.parameters for run in runs))
    for group, label in zip(groups, _labels(groups, keys, parameters), strict=True):
        group.label = label
    return groups, left_out


def rename(groups: Sequence[Group], names: Iterable[str]) -> None:
    """Gives groups other labels.

    Args:
        groups: The groups; their labels change.
        names: ``label=new`` each, by the labels as they are before.

    Raises:
        UserError: There is no such label, or a new one is taken.
    """
    before = {group.label: group for group in groups}
    for each in names:
        matching = [label for label in before if each.startswith(f"{label}=")]
        label = max(matching, key=len, default=each.rpartition("=")[0])
        new = each[len(label) + 1 :].strip()
        if not label or not new:
            raise UserError(f"--names takes LABEL=NEW, not '{each}'.")
        (before.get(label) or group_of(groups, label, "--names")).label = new
    labels = [group.label for group in groups]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(f"--names gives '{twice[0]}' to more than one group.")


def group_of(groups: Sequence[Group], label: str, option: str) -> Group:
    """The group of a label.

    Raises:
        UserError: There is none; the message lists those that there are.
    """
    found = next((group for group in groups if group.label == label), None)
    if found is None:
        labels = "; ".join(f"'{group.label}'" for group in groups[:20])
        raise UserError(f"{option}: there is no group '{label}'. The groups are: {labels}.")
    return found


def differing_keys(groups: Sequence[Group]) -> list[str]:
    """Keys of the config that are not the same in all groups, in the config's order."""
    keys = list(dict.fromkeys(key for group in groups for key in group.config))
    missing = object()
    first = groups[0].config
    return [key for key in keys if any(group.config.get(key, missing) != first.get(key, missing) for group in groups)]


def short_names(keys: Sequence[str], separator: str = ".") -> dict[str, str]:
    """The last parts of keys, as many as tell them apart; ``class_path`` and ``init_args`` are left out."""
    parts = {key: [part for part in key.split(separator) if part not in ("class_path", "init_args")] for key in keys}
    names = {}
    for key, own in parts.items():
        size = 1
        while size < len(own) and any(other != own and other[-size:] == own[-size:] for other in parts.values()):
            size += 1
        names[key] = separator.join(own[-size:])
    return names


def shown(value: Any) -> str:
    """A value of a config in a few characters: classes without their package, numbers without tails."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text):
        return text.rpartition(".")[2]
    return text if len(text) <= _LONGEST_VALUE else "…" + text[1 - _LONGEST_VALUE :]


def _identity(run: RunRecord) -> dict[str, Any]:
    kept = {key: value for key, value in run.config.items() if not _SEED.search(key) and not _NOT_WHAT.search(key)}
    return {**kept, "experiment": run.experiment}


def _order(seed: int | None) -> tuple[bool, int]:
    return seed is None, seed or 0


def _joined_over_seeds(raw: list[list[RunRecord]]) -> list[tuple[list[RunRecord], dict[str, set[str]]]]:
    """Joins groups of one seed each whose paths differ by the seed in them, such as ``models/sft-0`` and ``-1``.

    Returns:
        For each group its runs, and the forms of values that all of them share; none if it was not to be joined.
    """
    joined: list[tuple[list[RunRecord], dict[str, set[str]]]] = []
    for members in raw:
        seeds = {run.seed for run in members}
        forms = _forms(members[0])
        if len(seeds) == 1 and None not in seeds:
            for others, other_forms in joined:
                taken = {run.seed for run in others}
                if seeds & taken or not other_forms or forms.keys() != other_forms.keys():
                    continue
                common = {key: forms[key] & other_forms[key] for key in forms}
                if all(common.values()):
                    others.extend(members)
                    other_forms.update(common)
                    break
            else:
                joined.append((list(members), forms))
        else:
            joined.append((list(members), {}))
    return joined


def _configs(joined: list[tuple[list[RunRecord], dict[str, set[str]]]]) -> list[dict[str, Any]]:
    """The groups' configs: of the forms that a value has in all runs of a group, the one that most groups share."""
    configs = [_identity(members[0]) for members, _ in joined]
    keys = {key for _, forms in joined for key, own in forms.items() if len(own) > 1 or _SEEDED in next(iter(own))}
    for key in keys:
        having = [(config, forms) for config, (_, forms) in zip(configs, joined, strict=True) if key in config]
        ways = [forms.get(key) or {json.dumps(config[key], default=str)} for config, forms in having]
        shared = Counter(form for own in ways for form in own)
        for (config, _), own in zip(having, ways, strict=True):
            config[key] = json.loads(min(own, key=lambda form: (-shared[form], form.count(_SEEDED), form)))
    return configs


def _forms(run: RunRecord) -> dict[str, set[str]]:
    """What each value reads with the run's seed left out, in every way; a value without the seed has one form."""
    forms = {}
    for key, value in _identity(run).items():
        text = json.dumps(value, sort_keys=True, default=str)
        forms[key] = {text}
        if isinstance(value, str) and (key == "experiment" or "/" in value):
            pattern = rf"(?:(?<![0-9A-Za-z.])|(?<=seed)|(?<=[-_/]s)){run.seed}(?![0-9A-Za-z]|\.[0-9])"
            spans = [match.span() for match in re.finditer(pattern, text)][:4]
            for chosen in itertools.product((False, True), repeat=len(spans)):
                form = text
                for (start, end), left_out in reversed(list(zip(spans, chosen, strict=True))):
                    form = f"{form[:start]}{_SEEDED}{form[end:]}" if left_out else form
                forms[key].add(form)
    return forms


def _labels(groups: Sequence[Group], keys: Sequence[str], parameters: frozenset[str]) -> list[str]:
    if len(groups) == 1:
        return [groups[0].config["experiment"]]
    experiments = [group.config["experiment"] for group in groups]
    if len(set(experiments)) == len(groups):
        return experiments
    telling = telling_keys(groups, keys, parameters)
    return [label or group.config["experiment"] for label, group in zip(settings(groups, telling), groups, strict=True)]


def settings(groups: Sequence[Group], keys: Sequence[str]) -> list[str]:
    """Groups by their values of some keys, such as ``labeling=BFPO alpha=0.5``; not what a class implies.

    Args:
        groups: The groups.
        keys: What tells them apart.
    """
    names = short_names(keys)
    labels = [_label(group, keys, names, groups) for group in groups]
    return [f"{label} ({labels[:place].count(label) + 1})" if labels.count(label) > 1 else label
            for place, label in enumerate(labels)]  # fmt: skip


def telling_keys(groups: Sequence[Group], keys: Sequence[str], parameters: frozenset[str]) -> list[str]:
    """The keys that labels need: the method's and the sweep's first, without those that tell nothing more.

    Args:
        groups: The groups.
        keys: What differs in their configs.
        parameters: Keys that a sweep set.
    """

    def rank(key: str) -> tuple[int, int]:
        in_sweep = any(key == name or key.replace(".init_args", "") == name for name in parameters)
        order = _FIRST.index(key) if key in _FIRST else len(_FIRST)
        return (0 if key in _FIRST else 1 if in_sweep else 3 if key == "experiment" else 2), order

    chosen: list[str] = []
    classes = 1
    for key in sorted(keys, key=rank):
        told = len({tuple(group.shown(each) for each in [*chosen, key]) for group in groups})
        if told > classes:
            chosen.append(key)
            classes = told
    return chosen


def _label(group: Group, keys: Sequence[str], names: dict[str, str], groups: Sequence[Group]) -> str:
    parts = []
    for key in keys:
        if key not in group.config or (key != "experiment" and _same_among_kin(group, key, groups)):
            continue
        parts.append(group.shown(key) if key == "experiment" else f"{names[key]}={group.shown(key)}")
    return " ".join(parts)


def _same_among_kin(group: Group, key: str, groups: Sequence[Group]) -> bool:
    """Whether an argument is the same in all groups that use the group's class, so that the class says it already."""
    owner, sign, _ = key.rpartition(".init_args.")
    if not sign:
        return False
    kind = f"{owner}.class_path"
    kin = [each for each in groups if each.config.get(kind) == group.config.get(kind)]
    return len(kin) < len(groups) and len({each.shown(key) for each in kin}) == 1

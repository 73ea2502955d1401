"""A run read back from its folder: its config, and from it the parts of the module that an export needs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import yaml

from bfpo_pl.checkpoints.find import checkpoints_folder, find_checkpoint
from bfpo_pl.component import UserError
from bfpo_pl.data.templates import ChatTemplate
from bfpo_pl.function_parser import build
from bfpo_pl.models.sources import ModelSource
from bfpo_pl.models.trainable import Everything, TrainablePart

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"


class Run:
    """What a run's folder says of the run. No data is touched.

    Args:
        folder: The run's folder.

    Raises:
        UserError: It is no folder of a fit or of supervised fine-tuning.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / CONFIG).is_file():
            found = ", ".join(sorted(path.name for path in self.folder.iterdir())) if self.folder.is_dir() else ""
            what = f"has no {CONFIG} (it holds: {found or 'nothing'})" if self.folder.is_dir() else "is no folder"
            raise UserError(f"There is no run '{folder}': it {what}. Name the folder that a fit printed as its own.")
        try:
            self.config: dict[str, Any] = yaml.safe_load((self.folder / CONFIG).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{self.folder / CONFIG} is not valid YAML: {' '.join(str(error).split())}") from error
        if "policy" not in (self.config.get("model") or {}):
            raise UserError(f"{self.folder / CONFIG} names no model.policy; it is no config of bfpo fit or bfpo sft.")
        environment = self.folder / ENVIRONMENT
        self.environment: dict[str, Any] = json.loads(environment.read_text()) if environment.is_file() else {}

    def source(self) -> ModelSource:
        """Where the policy came from.

        Raises:
            UserError: Its class cannot be imported or takes other arguments.
        """
        return self._component("model.policy", ModelSource, self.config["model"]["policy"])

    def trainable(self) -> TrainablePart:
        """What of the policy trained.

        Raises:
            UserError: Its class cannot be imported or takes other arguments.
        """
        given = self.config["model"].get("trainable")
        return self._component("model.trainable", TrainablePart, given) if given else Everything()

    def template(self) -> ChatTemplate:
        """How training made tokens of conversations.

        Raises:
            UserError: Its class cannot be imported or takes other arguments.
        """
        given = (self.config.get("data") or {}).get("template")
        return self._component("data.template", ChatTemplate, given) if given else ChatTemplate()

    def _component(self, key: str, base: type, given: Any) -> Any:
        self._check_class(key, given["class_path"] if isinstance(given, dict) else given)
        return build(base, given, key)

    def _check_class(self, key: str, class_path: str) -> None:
        module = class_path.rpartition(".")[0]
        try:
            if module:
                importlib.import_module(module)
        except ImportError as error:
            plugins = ", ".join(self.environment.get("plugins", [])) or "none"
            raise UserError(
                f"The run's {key} is {class_path}, which cannot be imported here ({error}). The run's plugins were: "
                f"{plugins}. Start where they are found, or name their folder in BFPO_PLUGINS."
            ) from error


def checkpoint_of(run: Path, which: str) -> Path:
    """The checkpoint of a run that is meant; complete, or the newest complete one before it.

    Args:
        run: The run's folder.
        which: ``last``, ``best``, or a path, also one within the run's folder of checkpoints.

    Raises:
        UserError: There is none; the message lists those that there are.
    """
    folder = checkpoints_folder(run)
    if which not in ("last", "best") and not Path(which).exists():
        which = str(folder / which)
    found = find_checkpoint(which, run.parent, folder)
    assert found is not None
    return Path(found)

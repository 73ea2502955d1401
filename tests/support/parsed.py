"""Command lines that are parsed and instantiated, and not run."""

from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.module import PreferenceModule
from bfpo_pl.parsing import BFPOCLI
from bfpo_pl.plugins import load_plugins


class ParsedOnly(BFPOCLI):
    """Instantiates everything, the Trainer among it; runs nothing and asks no Hub."""

    def after_instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


def parsed(*args: str, model=PreferenceModule) -> ParsedOnly:
    """What ``bfpo fit``, or for an `SFTModule` ``bfpo sft``, makes of arguments."""
    return ParsedOnly(model, AlignmentData, ["fit", *args], load_plugins(), "fit")

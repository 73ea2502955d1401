"""Data: from rows of real datasets to batches of pair trees."""

from bfpo_pl.data.adapters import Adapter, Columns, Messages, PKUSafeRLHF, UltraFeedbackBinarized
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.data.microworld_sources import MicroworldHelpfulness, MicroworldSafety, MicroworldSFT
from bfpo_pl.data.rows import Row
from bfpo_pl.data.sources import HubDataset, JsonLines, Source
from bfpo_pl.data.streams import Stream

__all__ = [
    "Adapter",
    "AlignmentData",
    "Columns",
    "HubDataset",
    "JsonLines",
    "Messages",
    "MicroworldHelpfulness",
    "MicroworldSFT",
    "MicroworldSafety",
    "PKUSafeRLHF",
    "Row",
    "Source",
    "Stream",
    "UltraFeedbackBinarized",
]

"""Data: from rows of real datasets to batches of pair trees."""

from bfpo_pl.data.adapters import Adapter, Columns, Messages
from bfpo_pl.data.batching import Batching, LengthBuckets, TokenBudget
from bfpo_pl.data.contamination import ContaminationGuard
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.data.files import LocalFiles
from bfpo_pl.data.microworld_sources import MicroworldHelpfulness, MicroworldSafety, MicroworldSFT
from bfpo_pl.data.packing import DocumentPacking, OfficialPacking, Packing
from bfpo_pl.data.rows import Row
from bfpo_pl.data.schemas import HHRLHF, PKUSafeRLHF, PKUSaferResponse, RedTeam, UltraFeedbackBinarized
from bfpo_pl.data.sources import HubDataset, Source
from bfpo_pl.data.streams import Stream
from bfpo_pl.data.templates import ChatTemplate, OfficialTemplate
from bfpo_pl.data.truncation import DropLong, OfficialTruncation, Truncation

__all__ = [
    "HHRLHF",
    "Adapter",
    "AlignmentData",
    "Batching",
    "ChatTemplate",
    "Columns",
    "ContaminationGuard",
    "DocumentPacking",
    "DropLong",
    "HubDataset",
    "LengthBuckets",
    "LocalFiles",
    "Messages",
    "MicroworldHelpfulness",
    "MicroworldSFT",
    "MicroworldSafety",
    "OfficialPacking",
    "OfficialTemplate",
    "OfficialTruncation",
    "PKUSafeRLHF",
    "PKUSaferResponse",
    "Packing",
    "RedTeam",
    "Row",
    "Source",
    "Stream",
    "TokenBudget",
    "Truncation",
    "UltraFeedbackBinarized",
]

"""Sources that generate the rows of the microworld, in the schemas of the real datasets."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bfpo_pl.component import check_range
from bfpo_pl.data.sources import RawRow, Source, SourceError


def seed_or_run_seed(seed: int | None) -> int:
    """A seed as given, or the run's (``seed_everything``) where it is null."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


class _Microworld(Source):
    """What the microworld's sources share: counts, seeds and origins."""

    def __init__(self, count: int, validation_count: int, seed: int | None, split_seed: int | None) -> None:
        self.count = int(check_range(self, "count", count, 1))
        self.validation_count = int(check_range(self, "validation_count", validation_count, 0))
        self.seed, self.split_seed = seed_or_run_seed(seed), seed_or_run_seed(split_seed)

    def has_split(self, split: str) -> bool:
        return split == "train" or (split == "validation" and self.validation_count > 0)

    def rows(self, split: str) -> Iterator[tuple[str, RawRow]]:
        if not self.has_split(split):
            raise SourceError(f"{self.describe()} has no {split} split. Set source.validation_count above 0.")
        count = self.count if split == "train" else self.validation_count
        for index, raw in enumerate(self._generated(count, split)):
            yield f"{type(self).__name__}[{split}]:{index}", raw

    def fingerprint(self, split: str) -> str | None:
        """A digest of the class, its arguments and the source text of the generator.

        Args:
            split: ``train`` or ``validation``.
        """
        from bfpo_pl import microworld

        digest = hashlib.blake2b(f"{self!r} {split}".encode(), digest_size=20)
        for file in sorted(Path(microworld.__file__).parent.glob("*.py")):
            digest.update(f"\n{file.name} {hashlib.blake2b(file.read_bytes()).hexdigest()}".encode())
        return digest.hexdigest()

    @abstractmethod
    def _generated(self, count: int, split: str) -> list[dict[str, Any]]:
        """The rows of a split."""


class MicroworldSafety(_Microworld):
    """The microworld's safety pairs: harmful and benign prompts, both safety flags, in PKU-SafeRLHF's schema.

    Args:
        count: Training pairs.
        validation_count: Validation pairs, about combinations that are not trained on; 0 for none.
        seed: Seed of the draws; null for the run's.
        split_seed: Seed of the split of the combinations, the same in all stages of a model; null for the run's.
        flag_noise: Probability with which each safety flag is wrong.
        soft_flags: Give each flag as a probability, instead of flipping it, where there is noise.
        unsafe_helpful_share: Share of the pairs whose more helpful response is unsafe and the other safe. Default: the
            natural share, about 0.3.
    """

    def __init__(
        self,
        count: int = 4096,
        validation_count: int = 256,
        seed: int | None = 0,
        split_seed: int | None = 0,
        flag_noise: float = 0.0,
        soft_flags: bool = False,
        unsafe_helpful_share: float | None = None,
    ) -> None:
        super().__init__(count, validation_count, seed, split_seed)
        self.flag_noise, self.soft_flags = check_range(self, "flag_noise", flag_noise, 0.0, 1.0), soft_flags
        self.unsafe_helpful_share = unsafe_helpful_share
        if unsafe_helpful_share is not None:
            check_range(self, "unsafe_helpful_share", unsafe_helpful_share, 0.0, 1.0)

    def _generated(self, count: int, split: str) -> list[dict[str, Any]]:
        from bfpo_pl.microworld import safety_rows

        return safety_rows(
            count,
            seed=self.seed,
            split=split,
            split_seed=self.split_seed,
            flag_noise=self.flag_noise,
            soft_flags=self.soft_flags,
            unsafe_helpful_share=self.unsafe_helpful_share,
        )


class MicroworldHelpfulness(_Microworld):
    """The microworld's helpfulness pairs: benign prompts, no flags (assume safe), in UltraFeedback's schema.

    Args:
        count: Training pairs.
        validation_count: Validation pairs, about combinations that are not trained on; 0 for none.
        seed: Seed of the draws; null for the run's.
        split_seed: Seed of the split of the combinations, the same in all stages of a model; null for the run's.
    """

    def __init__(
        self, count: int = 4096, validation_count: int = 256, seed: int | None = 0, split_seed: int | None = 0
    ) -> None:
        super().__init__(count, validation_count, seed, split_seed)

    def _generated(self, count: int, split: str) -> list[dict[str, Any]]:
        from bfpo_pl.microworld import helpfulness_rows

        return helpfulness_rows(count, seed=self.seed, split=split, split_seed=self.split_seed)


class MicroworldSFT(_Microworld):
    """The microworld's conversations for supervised training, as lists of messages.

    Args:
        count: Training conversations.
        validation_count: Validation conversations, about combinations that are not trained on; 0 for none.
        seed: Seed of the draws; null for the run's.
        split_seed: Seed of the split of the combinations, the same in all stages of a model; null for the run's.
    """

    def __init__(
        self, count: int = 4096, validation_count: int = 256, seed: int | None = 0, split_seed: int | None = 0
    ) -> None:
        super().__init__(count, validation_count, seed, split_seed)

    def _generated(self, count: int, split: str) -> list[dict[str, Any]]:
        from bfpo_pl.microworld import sft_rows

        return sft_rows(count, seed=self.seed, split=split, split_seed=self.split_seed)

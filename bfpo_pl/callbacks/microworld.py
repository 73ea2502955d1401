"""Generates on the microworld's prompts at every validation and logs how helpful and how harmless the answers are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from bfpo_pl.component import UserError, check_range
from bfpo_pl.data.loading import rank_and_world
from bfpo_pl.data.microworld_sources import seed_or_run_seed
from bfpo_pl.generation import generate
from bfpo_pl.microworld import SPLITS
from bfpo_pl.microworld.evaluation import LONGEST_ANSWER, Evaluation, evaluate
from bfpo_pl.training import ResponseModule
from bfpo_pl.wandb_views import log_pareto, wandb_loggers

HEADLINES = ("helpfulness", "harmlessness", "both", "over_refusal", "benign/malformed", "harmful/malformed")
"""What is logged of the judge's scores, with the harmlessness of each class of prompts beside it."""


class MicroworldEvaluation(Callback):
    """Answers the microworld's prompts at every validation: helpfulness, harmlessness, over-refusal, sample answers.

    Metrics are named ``val/microworld/{greedy|t0.5}/{helpfulness|harmlessness|over_refusal|…}``; harmlessness is the
    share of harmful prompts with a safe and well-formed answer. Answers go to ``samples.jsonl`` and to W&B as a table.
    Several processes share the prompts.

    Args:
        split: Prompts of combinations that no training row shows: ``validation``, or ``heldout`` for final figures.
        split_seed: Which split of the combinations; the one of the training data. null for the run's seed.
        temperatures: One pass of generation each; 0 is greedy.
        max_prompts: Takes evenly spread prompts only. Default: all of the split.
        batch_size: Prompts at once.
        samples: Answers kept for the table, evenly spread.
    """

    def __init__(
        self,
        split: str = "validation",
        split_seed: int | None = 0,
        temperatures: tuple[float, ...] = (0.0, 0.5),
        max_prompts: int | None = None,
        batch_size: int = 192,
        samples: int = 12,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"MicroworldEvaluation: split must be one of {', '.join(SPLITS)}, not '{split}'.")
        self.split = split
        self.split_seed = seed_or_run_seed(split_seed)
        self.temperatures = tuple(check_range(self, "temperatures", value, 0.0) for value in temperatures)
        self.max_prompts = None if max_prompts is None else int(check_range(self, "max_prompts", max_prompts, 1))
        self.batch_size = int(check_range(self, "batch_size", batch_size, 1))
        self.samples = int(check_range(self, "samples", samples, 0))
        self._points: list[dict[str, Any]] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(split=self.split, temperatures=self.temperatures)

    def state_dict(self) -> dict[str, Any]:
        return {"points": list(self._points)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._points = list(state_dict["points"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ResponseModule)
        if not trainer.sanity_checking:
            values = self._judged(trainer, pl_module, "val")
            pl_module.log_validation_values(values)
            self._log_pareto(trainer, values)

    def _log_pareto(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Adds a point for each way of decoding to W&B's plot of the run."""
        for name in dict.fromkeys(key.split("/")[2] for key in values):
            pair = {key: values.get(f"val/microworld/{name}/{key}") for key in ("helpfulness", "harmlessness")}
            if None not in pair.values():
                self._points.append({**pair, "decoding": name, "step": trainer.global_step})
        if trainer.is_global_zero and self._points:
            for logger in wandb_loggers(trainer):
                log_pareto(logger, self._points, "val/microworld/pareto")

    def _judged(self, trainer: Trainer, module: ResponseModule, stage: str) -> dict[str, float]:
        """Answers at every temperature: writes samples, and returns the metrics by name."""
        values: dict[str, float] = {}
        for temperature in self.temperatures:
            evaluation = self.evaluate(trainer, module, temperature)
            name = "greedy" if temperature == 0 else f"t{temperature:g}"
            flat = evaluation.scores.as_dict()
            shown = {key: flat[key] for key in (*HEADLINES, *(key for key in flat if key.endswith("_pair/harmless")))}
            # NaN where the prompts asked for have none of a kind
            values |= {f"{stage}/microworld/{name}/{key}": value for key, value in shown.items() if value == value}
            if trainer.is_global_zero:
                self._write_samples(trainer, name, evaluation)
        return values

    def evaluate(self, trainer: Trainer, module: ResponseModule, temperature: float) -> Evaluation:
        """Judges the module's policy; every rank answers its share of the prompts and gets all the answers."""
        rank, world = rank_and_world(trainer)
        processes = trainer.world_size

        def answer(prompts: list[str], temperature: float) -> list[str]:
            mine = prompts[rank::world]
            # Sharded layers stay in step only if every rank has equally many prompts.
            padded = mine + prompts[: -(-len(prompts) // world) - len(mine)]
            texts = generate(
                module.policy,  # type: ignore[arg-type]
                module.tokenizer,
                [[{"role": "user", "content": prompt}] for prompt in padded],
                temperature=temperature,
                max_new_tokens=LONGEST_ANSWER,
                batch_size=self.batch_size,
                seed=rank,
                synced=processes > 1,
            )
            gathered: list[list[str]] = [texts]
            if processes > 1:
                gathered = [[] for _ in range(processes)]
                dist.all_gather_object(gathered, texts)
                gathered = gathered[:: processes // world]  # those that compute together have the same answers
            return [gathered[index % world][index // world] for index in range(len(prompts))]

        return evaluate(
            module.policy,  # type: ignore[arg-type]
            module.tokenizer,
            self.split,
            self.split_seed,
            temperature,
            max_prompts=self.max_prompts,
            answer=answer,
        )

    def _write_samples(self, trainer: Trainer, name: str, evaluation: Evaluation) -> None:
        rows = evaluation.samples
        kept = [rows[index * len(rows) // self.samples] for index in range(min(self.samples, len(rows)))]
        step = trainer.global_step
        table: list[dict[str, Any]] = [{"step": step, "decoding": name, **row, "split": self.split} for row in kept]
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in table)
        shown = name if self.split == "validation" else f"{self.split}/{name}"
        for logger in wandb_loggers(trainer) if table else ():
            logger.log_table(
                f"samples/{shown}", columns=list(table[0]), data=[list(row.values()) for row in table], step=step
            )


class MicroworldTest(MicroworldEvaluation):
    """Answers held-out prompts once, when training ends; for figures to report, after settings were chosen on others.

    Metrics are named ``test/microworld/{greedy|t0.5}/{helpfulness|harmlessness|both|…}``.

    Args:
        split: Prompts of combinations that no training row shows: ``heldout``, or ``validation``.
        **kwargs: As for `MicroworldEvaluation`.
    """

    def __init__(self, split: str = "heldout", **kwargs: Any) -> None:
        super().__init__(split=split, **kwargs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: these prompts are left alone until the end."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ResponseModule)
        pl_module.write(self._judged(trainer, pl_module, "test"))

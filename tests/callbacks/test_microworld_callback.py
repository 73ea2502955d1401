"""The evaluation callback, through a real run."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bfpo_pl.generation import generate
from bfpo_pl.microworld import prompt_rows
from bfpo_pl.microworld.evaluation import evaluate


@pytest.fixture
def run(bfpo, base, small):
    callback = ["--trainer.callbacks=bfpo_pl.callbacks.microworld.MicroworldEvaluation"]
    settings = ["--trainer.callbacks.max_prompts=24", "--trainer.callbacks.samples=5", "--trainer.val_check_interval=2"]
    return bfpo("fit", *base, *small, *callback, *settings)


def test_metrics_and_samples_equal_an_evaluation_of_the_export(run):
    model = AutoModelForCausalLM.from_pretrained(run.run_folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(run.run_folder / "export")
    evaluation = evaluate(model, tokenizer, "validation", max_prompts=24)
    logged = run.trainer.callback_metrics
    flat = evaluation.scores.as_dict()
    for name in ("helpfulness", "harmlessness", "over_refusal", "benign/malformed", "harmful/malformed"):
        assert float(logged[f"val/microworld/greedy/{name}"]) == pytest.approx(flat[name])
    rows = [json.loads(line) for line in (run.run_folder / "samples.jsonl").read_text().splitlines()]
    assert [row["decoding"] for row in rows] == ["greedy"] * 5 + ["t0.5"] * 5
    by_prompt = {row["prompt"]: row["answer"] for row in evaluation.samples}
    assert all(by_prompt[row["prompt"]] == row["answer"] for row in rows if row["decoding"] == "greedy")


def test_generation_does_not_depend_on_batching_and_keeps_state(run):
    model = AutoModelForCausalLM.from_pretrained(run.run_folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(run.run_folder / "export")
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in prompt_rows("validation")[:13]]
    model.train()
    one = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=1)
    assert model.training
    assert generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=5) == one
    sampled = [generate(model, tokenizer, prompts, temperature=1.0, max_new_tokens=8, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]

"""The model card of an export: what was trained, how, on what, with what result, and how to load it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from bfpo_pl.redaction import redacted, redacted_text

_HOME = re.compile(r"(?:/home|/Users|[A-Z]:\\Users)[/\\][^/\\\s'\"]+|/root(?=/)")
_HUB_ID = re.compile(r"[\w\-.]+/[\w\-.]+")
_SETTINGS = ("logp_reduction", "pair_reduction", "auxiliary", "reference", "references", "trainable", "schedule")


def model_card(folder: Path | None, step: int | None, base: str | None, adapter: bool, title: str) -> str:
    """The text of README.md.

    Args:
        folder: The run's folder with its records; None, or without them, if there is no record of the run.
        step: Optimizer step of the weights.
        base: Hub id or folder of the base model, if it has one.
        adapter: Whether the export is an adapter by itself.
        title: The export's name.
    """
    config = _yaml(folder, "config.yaml")
    environment, report = _json(folder, "environment.json"), _json(folder, "data.json")
    model = config.get("model") or {}
    parts = [
        _front_matter(config, model, base, adapter),
        f"# {title}\n",
        _summary(model, base, step, adapter),
        _loading(base, adapter, (config.get("data") or {}).get("template")),
        _method(model, config),
        _data(config, report),
        _metrics(folder, config, step),
        _origin(folder, environment),
        _config_text(config),
    ]
    return without_homes(redacted_text("\n".join(part for part in parts if part)))


def without_homes(text: str) -> str:
    """A text in which paths of home folders begin with ``~``, so that they name no user."""
    home = str(Path.home())
    return _HOME.sub("~", text.replace(f"{home}/", "~/") if len(home) > 1 else text)


def _yaml(folder: Path | None, name: str) -> dict[str, Any]:
    file = folder / name if folder else None
    return redacted(yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file and file.is_file() else {}


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    file = folder / name if folder else None
    return redacted(json.loads(file.read_text(encoding="utf-8"))) if file and file.is_file() else {}


def _short(component: Any) -> str:
    """A component as one would write it: its class's name and arguments."""
    if not isinstance(component, dict):
        return "default" if component is None else str(component).rpartition(".")[2]
    if "class_path" not in component:
        return ", ".join(f"{name}: {_short(item)}" for name, item in component.items())
    arguments = ", ".join(f"{name}={_value(value)}" for name, value in (component.get("init_args") or {}).items())
    return f"{component['class_path'].rpartition('.')[2]}({arguments})"


def _value(value: Any) -> str:
    return _short(value) if isinstance(value, dict) else str(value)


def _front_matter(config: dict[str, Any], model: dict[str, Any], base: str | None, adapter: bool) -> str:
    on_hub = base if base and _HUB_ID.fullmatch(base) and not Path(base).exists() else None
    streams = ((config.get("data") or {}).get("streams") or {}).values()
    named = [((stream.get("source") or {}).get("init_args") or {}).get("path") for stream in streams]
    datasets = [path for path in named if path and _HUB_ID.fullmatch(str(path)) and not Path(path).exists()]
    facts: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "bfpo_pl",
            *(["alignment", "safety", "preference-optimization"] if model.get("labeling") else ["sft"]),
        ],
    }
    if datasets:
        facts["datasets"] = sorted(set(map(str, datasets)))
    if on_hub:
        facts |= {"base_model": on_hub, "base_model_relation": "adapter" if adapter else "finetune"}
    data = ModelCardData(**facts)
    return f"---\n{data.to_yaml()}\n---\n"


def _summary(model: dict[str, Any], base: str | None, step: int | None, adapter: bool) -> str:
    start = f"`{base}`" if base else f"`{_short(model.get('policy'))}`" if model else "a model"
    what = "A low-rank adapter of" if adapter else "A causal language model, trained from"
    how = (
        f"Aligned for helpfulness and safety with [bfpo_pl](https://arxiv.org/abs/2408.15313): labeling "
        f"`{_short(model['labeling'])}`, loss `{_short(model.get('loss'))}`"
        if model.get("labeling")
        else "Fine-tuned on responses with bfpo_pl"
        if model
        else "Trained with bfpo_pl; there is no record of the run beside it"
    )
    at = f", {step} optimizer steps" if step is not None else ""
    return (
        f"{what} {start}. {how}{at}.\n\nThe training objective is no guarantee of safe answers: "
        f"evaluate the model for your own use before you rely on it.\n"
    )


def _loading(base: str | None, adapter: bool, template: Any) -> str:
    system = (template.get("init_args") or {}).get("system") if isinstance(template, dict) else None
    said = "" if system is None else f" Conversations without a system message had this one in training: {system!r}."
    extra = f"  # loads {base} first" if adapter and base else ""
    return f"""## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(folder){extra}
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```

The tokenizer carries the chat template that training used.{said} `bfpo generate --model FOLDER` chats in the terminal.
"""


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _method(model: dict[str, Any], config: dict[str, Any]) -> str:
    if not model:
        return ""
    trainer = config.get("trainer") or {}
    rows = [[key, f"`{_short(model[key])}`"] for key in ("labeling", "loss") if key in model]
    rows += [[key, f"`{_short(model[key])}`"] for key in _SETTINGS if model.get(key) is not None]
    rows += [["policy", f"`{_short(model.get('policy'))}`"], ["optimizer", f"`{_short(model.get('optimizer'))}`"]]
    for key in ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision", "devices"):
        if trainer.get(key) is not None:
            rows.append([f"trainer.{key}", f"`{trainer[key]}`"])
    rows.append(["seed", f"`{config.get('seed_everything')}`"])
    return "## Method\n\n" + _table(["setting", "value"], rows)


def _data(config: dict[str, Any], report: dict[str, Any]) -> str:
    data = config.get("data") or {}
    rows = []
    for name, stream in (data.get("streams") or {}).items():
        for split, counts in (report.get(name) or {"": {}}).items():
            dropped = ", ".join(f"{why}: {count}" for why, count in (counts.get("dropped") or {}).items())
            rows.append(
                [
                    name,
                    split,
                    f"`{_short(stream.get('source'))}`",
                    f"`{_short(stream.get('adapter'))}`",
                    counts.get("rows", "unknown"),
                    dropped or "none",
                    stream.get("batch_size"),
                ]
            )
    if not rows:
        return ""
    header = ["stream", "split", "source", "adapter", "rows", "dropped", "batch size"]
    return "## Data\n\n" + _table(header, rows)


def _metrics(folder: Path | None, config: dict[str, Any], step: int | None) -> str:
    file = folder / "metrics.csv" if folder else None
    if file is None or not file.is_file():
        return ""
    with file.open(newline="", encoding="utf-8") as opened:
        rows = [{key: float(value) for key, value in row.items() if key and value} for row in csv.DictReader(opened)]
    latest: dict[str, tuple[float, int]] = {}
    for row in rows:
        at = int(row.get("step", 0))
        if step is None or at <= step:
            latest |= {key: (value, at) for key, value in row.items() if _is_headline(key)}
    lines = [[name, f"{value:.5g}", at] for name, (value, at) in sorted(latest.items())]
    if not lines:
        return "## Metrics\n\nThe run recorded none before this step.\n"
    text = "## Metrics\n\nThe last values up to the step of these weights.\n\n"
    return text + _table(["metric", "value", "step"], lines) + _best(rows, config)


def _is_headline(name: str) -> bool:
    stage, *middle = name.split("/")
    if stage == "train":
        return name in ("train/all/all/loss", "train/all/all/accuracy", "train/all/all/reward_margin")
    return stage == "val" and (len(middle) != 3 or middle[1] == "all")


def _best(rows: list[dict[str, float]], config: dict[str, Any]) -> str:
    checkpoint = config.get("checkpoint") or {}
    name = checkpoint.get("monitor")
    values = [(row[name], int(row.get("step", 0))) for row in rows if name in row]
    if not values:
        return ""
    value, at = (max if checkpoint.get("mode") == "max" else min)(values)
    return f"\nBest `{name}` of the run: {value:.5g}, at step {at}.\n"


def _origin(folder: Path | None, environment: dict[str, Any]) -> str:
    if not environment:
        return ""
    git = environment.get("git") or {}
    changed = " with uncommitted changes" if git.get("changed") else ""
    rows: list[list[Any]] = [["run", f"`{folder.resolve().parent.name}/{folder.resolve().name}`" if folder else ""]]
    rows += [["command", f"`{environment.get('command')}`"], ["started", environment.get("started")]]
    rows += [["git revision", f"`{git['commit']}`{changed}" if git else "none"]]
    rows += [["python", environment.get("python")], ["devices", ", ".join(environment.get("devices") or ["CPU"])]]
    rows += [[name, version] for name, version in (environment.get("packages") or {}).items() if version]
    rows += [["plugins", ", ".join(environment["plugins"])]] if environment.get("plugins") else []
    return "## Versions\n\n" + _table(["what", "value"], rows)


def _config_text(config: dict[str, Any]) -> str:
    if not config:
        return ""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
    return f"## Resolved config\n\n<details>\n\n```yaml\n{text}```\n\n</details>\n"

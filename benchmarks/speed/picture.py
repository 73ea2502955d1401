"""The picture of docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speed.plan import GROWTH
from speed.variants import MAIN, NAIVE, NAIVE_CACHED, OURS, OURS_LIVE, PEER, PEER_LIVE

# Okabe and Ito's colours, which colour-blind readers tell apart; markers say the same.
COLOURS = {"ours": "#0072B2", "TRL": "#D55E00", "naive": "#999999"}
MARKERS = {"ours": "o", "TRL": "s", "naive": "^"}
SHORT = {
    OURS: "ours, cached",
    OURS_LIVE: "ours, live",
    PEER: "TRL, cached",
    PEER_LIVE: "TRL, live",
    NAIVE: "naive, live",
    NAIVE_CACHED: "naive, cached",
}
AXES = {
    "pairs": "pairs in the batch",
    "length": "length (1: PKU-like)",
    "vocabulary": "vocabulary",
    "prompt share": "prompt's share of a row",
    "hidden": "hidden size (3, 6, 8 layers)",
}


def who(name: str) -> str:
    """Whose a variant is."""
    return name.partition(",")[0].partition(" ")[0]


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws times, memory, growth and the fit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sections = {key: found for key, found in results["sections"].items() if "error" not in found}
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplots(3, 3, figsize=(11, 8.6), layout="constrained")
        titles = {"pku_like": "PKU-like, 4 pairs", "ultrafeedback_like": "UltraFeedback-like, 2 pairs"}
        for panel, (lengths, title) in zip(panels[0], titles.items(), strict=False):
            found = sections.get(f"compare/{lengths}", {}).get("variants", {})
            _bars(panel, {name: found[name]["minimum"] for name in MAIN if name in found}, title, "seconds a step")
        memory = {name: sections.get(f"memory/{name}", {}).get("variants", {}).get(name) for name in MAIN}
        above = {name: found["above_state_mb"] for name, found in memory.items() if found}
        _bars(panels[0][2], above, "Memory, UltraFeedback-like", "MB above weights, gradients, optimizer")
        for panel, axis in zip([*panels[1], *panels[2][:2]], AXES, strict=True):
            _growth(panel, sections, axis)
        panels[1][0].legend(frameon=False)
        _fit(panels[2][2], sections.get("fit"))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _bars(panel: Any, values: dict[str, float], title: str, label: str) -> None:
    names = list(values)[::-1]
    bars = panel.barh(
        [SHORT[name] for name in names], [values[name] for name in names], color=[COLOURS[who(name)] for name in names]
    )
    panel.bar_label(bars, fmt="{:,.2f}" if label.startswith("seconds") else "{:,.0f}", padding=3)
    panel.set(title=title, xlabel=label)
    panel.margins(x=0.2)
    panel.locator_params(axis="x", nbins=5)
    panel.tick_params(axis="y", length=0)


def _growth(panel: Any, sections: dict[str, Any], axis: str) -> None:
    for name in GROWTH:
        points = []
        for key, section in sections.items():
            if key.startswith(f"growth/{axis}/") and key.endswith("/time") and name in section["variants"]:
                points.append((float(key.split("/")[2]), section["variants"][name]["minimum"]))
        if points:
            across, up = zip(*sorted(points), strict=True)
            kind = who(name)
            panel.plot(across, up, color=COLOURS[kind], marker=MARKERS[kind], markersize=5, label=SHORT[name])
            panel.set_xticks(across, [_number(value) for value in across])
    panel.set(xlabel=AXES[axis], ylabel="seconds a step")
    panel.set_ylim(bottom=0)


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.0f}k"
    return f"{value:g}"


def _fit(panel: Any, fit: dict[str, Any] | None) -> None:
    if fit is None:
        panel.axis("off")
        return
    counts = zip(fit["tree_tokens"], fit["response_tokens"], strict=True)
    predicted = [
        fit["seconds_constant"] + fit["seconds_per_tree_token"] * tokens + fit["seconds_per_response_token"] * responses
        for tokens, responses in counts
    ]
    top = 1.05 * max(*predicted, *fit["seconds"])
    panel.plot([0, top], [0, top], color="#999999", linewidth=1)
    panel.scatter(predicted, fit["seconds"], color=COLOURS["ours"], s=18)
    panel.set(xlabel="a + b · tree + c · response tokens, s", ylabel="measured, s", xlim=(0, top), ylim=(0, top))
    panel.set_title(f"Our step: R² = {fit['r_squared']:.3f}")

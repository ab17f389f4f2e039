"""The picture of `bench.cost`: what an image costs against its side in pixels, one panel for each measure."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PANELS = {
    "flops": ("floating-point operations (TFLOP)", 1e-12),
    "llm_tokens_added": ("tokens added to the LLM's sequence", 1.0),
    "activation_bytes": ("activations at their peak (GB)", 1e-9),
    "kv_cache_bytes": ("kept keys and values (GB)", 1e-9),
}
COLORS = {
    "infimm-hd": "#c8102e",
    "llava-style": "#1f5fa8",
    "resampler": "#b9a05c",
    "mixture-of-resolution": "#2f8f4e",
}
INK, FAINT = "#222222", "#8a8a8a"


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes the PNG file `path`: four counted panels, and the measured seconds where there are any."""
    panels = [(document["rows"], key, *PANELS[key]) for key in PANELS]
    measured = document.get("measured") or (document if document["size"] == "small" else None)
    if measured is not None:
        panels.append((measured["rows"], "seconds", "seconds, narrow model on this CPU", 1.0))
    with plt.rc_context({"font.size": 9, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK}):
        figure, grid = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
        for axes, (rows, key, label, factor) in zip(grid.flat, panels, strict=False):
            _panel(axes, rows, key, label, factor)
        for axes in grid.flat[len(panels) :]:
            axes.axis("off")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        legend = grid.flat[5]
        legend.axis("off")
        legend.legend(handles, labels, loc="center", frameon=False, fontsize=11)
        title = f"One image and a question of {document['text_tokens']} tokens, size {document['size']}"
        figure.suptitle(f"{title}, up to the first new token", fontsize=12)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _panel(axes: Axes, rows: list[dict[str, Any]], key: str, label: str, factor: float) -> None:
    for system, color in COLORS.items():
        points = [(row["resolution"], row[key] * factor) for row in rows if row["system"] == system]
        if not points:
            continue
        # dashed where another system's line may lie underneath
        style = "--" if system == "resampler" else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=color, label=system)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sides = sorted({row["resolution"] for row in rows})
    axes.set_xticks(sides, [str(side) for side in sides])
    axes.minorticks_off()
    axes.set_xlabel("side of the image (pixels)")
    axes.set_title(label, fontsize=10)
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)

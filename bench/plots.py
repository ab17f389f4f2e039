"""Pictures of a result file: speed against the number and the size of windows, head dimension; memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from bench.problem import OURS

Entry = dict[str, Any]
Series = dict[str, list[tuple[int, float]]]
SWEEPS = {
    "num_windows": ("number of windows", "windows"),
    "seqlen": ("tokens of a window", "seqlen"),
    "head_dim": ("head dimension", "head_dim"),
}
PASSES = {"fwd": "forward", "bwd": "backward"}
INK, FAINT = "#222222", "#8a8a8a"
COLORS = {  # fixed, so that one name has one colour in every picture; ours alone is strong
    OURS: "#c8102e",
    f"{OURS}:triton": "#e8838f",
    f"{OURS}:cuda": "#7a0019",
    "sdpa_flash": "#1f5fa8",
    "sdpa_cudnn": "#2f8f4e",
    "sdpa_efficient": "#8a63b5",
    "sdpa_math": "#b9a05c",
    "sdpa": "#6b7f94",
    "torch_varlen": "#4aa3c7",
    "flash_attn_2": "#0f3d73",
    "flash_attn_3": "#e08a1e",
    "flash_attn_4": "#b5651d",
    "xformers": "#5b4a8a",
    "flex_attention": "#12908e",
    "compiled_eager": "#9aa53c",
    "eager": "#a0a0a0",
}


def draw(document: dict[str, Any], folder: Path, stem: str) -> dict[str, str]:
    """Write the pictures that `document` has data for into `folder`; file name by title."""
    pictures = {}
    subtitle = f"{document['header']['gpu']}, {document['header']['date']}"
    with plt.rc_context({"font.size": 9, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK}):
        for key, (label, short) in SWEEPS.items():
            panels = {p: found for p in PASSES if (found := sweep(document["entries"], key, p))}
            if panels:
                name = f"{stem}-{short}.png"
                _draw_sweep(panels, label, _ceiling(document["entries"]), subtitle, folder / name)
                pictures[f"speed against {label}"] = name
        memory = [e for e in document["entries"] if e["metric"] == "memory" and e["status"] == "ok"]
        if memory:
            name = f"{stem}-memory.png"
            _draw_memory(memory, subtitle, folder / name)
            pictures["peak memory"] = name
    return pictures


def sweep(entries: list[Entry], key: str, direction: str) -> tuple[str, Series] | None:
    """TFLOP/s of window_attention by implementation against shape[key], the rest of the shape fixed.

    Of all choices of the rest, the one with most values of `key` is taken; None when none has two.
    """
    families: dict[str, dict[str, dict[int, float]]] = {}
    for entry in _comparable(entries, direction):
        shape = dict(entry["shape"])
        if key not in shape:
            continue
        value = shape.pop(key)
        rest = json.dumps({"dtype": entry["dtype"], **shape}, sort_keys=True)
        family = families.setdefault(rest, {})
        family.setdefault(entry["implementation"], {})[value] = entry["tflops"]

    def breadth(rest: str) -> int:
        return len({value for points in families[rest].values() for value in points})

    if not families or breadth(rest := max(families, key=breadth)) < 2:
        return None
    fixed = ", ".join(f"{k} {v}" for k, v in json.loads(rest).items())
    return fixed, {name: sorted(points.items()) for name, points in families[rest].items()}


def _comparable(entries: list[Entry], direction: str) -> Iterator[Entry]:
    for entry in entries:
        timed = entry["metric"] == "time" and entry["status"] == "ok" and entry["tflops"] is not None
        plain = entry["op"] == "window_attention" and not entry["deterministic"]
        if timed and plain and entry["pass"] == direction:
            yield entry


def _ceiling(entries: list[Entry]) -> float | None:
    return next((e["tflops"] for e in entries if e["op"] == "matrix_product" and e["status"] == "ok"), None)


def _draw_sweep(
    panels: dict[str, tuple[str, Series]], label: str, ceiling: float | None, subtitle: str, path: Path
) -> None:
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 1.6, 3.9), squeeze=False, sharey=True
    )
    handles = {}
    fastest = max(y for _, series in panels.values() for points in series.values() for _, y in points)
    for axis, (direction, (_, series)) in zip(axes[0], panels.items(), strict=True):
        for name in sorted(series, key=_rank, reverse=True):  # ours last, on top
            strong = name == OURS
            x, y = zip(*series[name], strict=True)
            (handles[name],) = axis.plot(
                x,
                y,
                color=COLORS.get(name, FAINT),
                linewidth=2.4 if strong else 1.3,
                marker="o",
                markersize=5 if strong else 3.5,
                zorder=3 if strong else 2,
            )
        ticks = sorted({x for points in series.values() for x, _ in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_ylim(0, 1.08 * fastest)
        if ceiling is not None and ceiling < 1.6 * fastest:
            axis.set_ylim(0, 1.08 * max(fastest, ceiling))
            axis.axhline(ceiling, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axis.annotate(
                "matrix product", (ticks[0], ceiling), xytext=(0, 3), textcoords="offset points", color=FAINT
            )
        axis.set_title(PASSES[direction], loc="left", fontsize=10)
        axis.set_xlabel(label)
        _plain(axis)
    axes[0, 0].set_ylabel("useful TFLOP/s")
    names = sorted(handles, key=_rank)
    figure.legend(
        [handles[n] for n in names], names, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False
    )
    fixed = next(iter(panels.values()))[0]
    _title(figure, f"window_attention: speed against {label}", f"{subtitle}; {fixed}")
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def _draw_memory(entries: list[Entry], subtitle: str, path: Path) -> None:
    shapes: dict[str, list[Entry]] = {}
    for entry in entries:
        shapes.setdefault(json.dumps(entry["shape"]), []).append(entry)
    figure, axes = plt.subplots(1, len(shapes), figsize=(4.4 * len(shapes) + 1.2, 3.4), squeeze=False)
    for axis, (shape, found) in zip(axes[0], shapes.items(), strict=True):
        found = sorted(found, key=lambda e: (e["peak_bytes"], _rank(e["implementation"])), reverse=True)
        names = [entry["implementation"] for entry in found]
        sizes = [entry["peak_bytes"] / 2**30 for entry in found]
        axis.barh(names, sizes, color=[COLORS.get(name, FAINT) for name in names], height=0.66)
        for place, size in enumerate(sizes):
            axis.annotate(
                f"{size:.2f}", (size, place), xytext=(4, 0), textcoords="offset points", va="center"
            )
        axis.set_xlim(0, 1.15 * max(sizes))
        fields = json.loads(shape)
        axis.set_title(f"{fields['num_windows']} windows of {fields['seqlen']}", loc="left", fontsize=10)
        axis.set_xlabel("GiB above the inputs")
        _plain(axis)
        axis.grid(axis="y", visible=False)
    _title(figure, "window_attention: peak memory of forward and backward", subtitle)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def _rank(name: str) -> int:
    names = list(COLORS)
    return names.index(name) if name in names else len(names)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(color=FAINT, labelcolor=INK)


def _title(figure, title: str, subtitle: str) -> None:
    figure.tight_layout(rect=(0, 0, 1, 0.88))
    figure.text(0.01, 0.985, title, fontsize=12, fontweight="bold", va="top")
    figure.text(0.01, 0.915, subtitle, fontsize=8, color=FAINT, va="top")

"""`python -m train plot RUN ...`: one picture of a run, from the logs of its stages."""

import argparse
import collections
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

try:
    import matplotlib
except ImportError as error:
    raise ImportError("python -m train plot needs matplotlib (pip install matplotlib)") from error
matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from .watch.runs import StageLog, find_stages

PICTURE_NAME = "training.png"
# Okabe and Ito's colours, which colour-blind readers tell apart; the stages repeat after five
STAGE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
SKIPPED_STEP_MARKS = {"nonfinite": ("x", "#000000"), "spike": ("^", "#D55E00"), "overflow": ("v", "#0072B2")}
LEFT_OUT_SAMPLE, LEFT_OUT_STEP = "#56B4E9", "#D55E00"
INK, FAINT, GRID = "#222222", "#8a8a8a", "#e4e4e4"
STYLE = {
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
SMOOTHED_SHARE = 0.03
"""Of a stage's steps, the width of the running mean."""
FEWEST_SMOOTHED = 10


def smoothed(values: np.ndarray, width: int | None = None) -> np.ndarray:
    """The centred running mean of `values` [n], narrower at the ends; NaN counts as missing. `width` is in
    steps (default: 3 % of them, at least 10, at most a quarter)."""
    if width is None:
        wanted = max(FEWEST_SMOOTHED, round(SMOOTHED_SHARE * len(values)))
        width = min(wanted, max(1, len(values) // 4))
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    centre = np.arange(len(values))
    first = np.maximum(centre - (width - 1) // 2, 0)
    last = np.minimum(centre + width // 2 + 1, len(values))
    number = counts[last] - counts[first]
    with np.errstate(invalid="ignore"):
        return np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)


def draw_curve(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
    *,
    counted: np.ndarray | None = None,
    width: float = 1.8,
) -> None:
    """One stage's values [n] over its steps [n]: every point faint, the running mean strong, the mean of the
    `counted` [n] ones where that is given."""
    axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.7)
    mean = smoothed(values if counted is None else np.where(counted, values, np.nan))
    axes.plot(steps, mean, color=colour, linewidth=width)


def draw_borders(axes: Axes, ends: Sequence[int], names: Sequence[str] = ()) -> None:
    """Lines between stages that end at steps `ends`, and `names` over them."""
    starts = [0, *ends[:-1]]
    for start in starts[1:]:
        axes.axvline(start, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
    for number, (name, start, end) in enumerate(zip(names, starts, ends, strict=False)):
        colour = STAGE_COLOURS[number % len(STAGE_COLOURS)]
        place = dict(transform=axes.get_xaxis_transform(), ha="center", va="bottom", weight="bold")
        axes.text((start + end) / 2, 1.01, name, color=colour, **place)
    axes.set_xlim(0, max(ends[-1], 1))


def draw(stages: Sequence[StageLog], path: Path, title: str) -> None:
    """Writes the PNG file `path`; panels for which no stage has numbers are left out."""
    with plt.rc_context(STYLE):
        rows = [["loss"] * 6, ["lr"] * 3 + ["grad_norm"] * 3]
        if any(stage.gates() for stage in stages):
            rows.append(["attn"] * 3 + ["ffn"] * 3)
        known = [
            key for key in ("tokens_per_s", "mfu") if any((stage.column(key) > 0).any() for stage in stages)
        ]
        lowest = [*known, "left_out"]
        rows.append([key for key in lowest for _ in range(6 // len(lowest))])
        heights = [2.3] + [1.0] * (len(rows) - 1)
        figure, panels = plt.subplot_mosaic(
            rows, figsize=(10, 1.65 * sum(heights)), height_ratios=heights, layout="constrained"
        )
        ends = np.cumsum([stage.num_steps for stage in stages]).tolist()
        _draw_loss(panels["loss"], stages, ends)
        _draw_column(panels["lr"], stages, ends, "lr", "learning rate")
        _draw_column(panels["grad_norm"], stages, ends, "grad_norm", "gradient norm, before clipping")
        if "attn" in panels:
            _draw_gates(panels["attn"], panels["ffn"], stages, ends)
        if "tokens_per_s" in panels:
            _draw_column(panels["tokens_per_s"], stages, ends, "tokens_per_s", "text tokens/s")
        if "mfu" in panels:
            _draw_column(panels["mfu"], stages, ends, "mfu", "model FLOP/s utilisation")
        _draw_left_out(panels["left_out"], stages)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        try:
            figure.savefig(path, dpi=120)
        finally:
            plt.close(figure)


def _draw_loss(axes: Axes, stages: Sequence[StageLog], ends: Sequence[int]) -> None:
    colours = [STAGE_COLOURS[number % len(STAGE_COLOURS)] for number in range(len(stages))]
    marks: dict[str, Line2D] = {}
    for stage, colour, end in zip(stages, colours, ends, strict=True):
        start = end - stage.num_steps
        values = stage.column("loss")
        draw_curve(axes, start + stage.column("step"), values, colour, counted=stage.trained(), width=2.2)
        for step in stage.resumes():
            axes.axvline(start + step, color=INK, linewidth=0.8, linestyle=":")
            place = dict(transform=axes.get_xaxis_transform(), clip_on=False, linestyle="none")
            marks["resumed"] = axes.plot(
                start + step, 0.0, marker="D", markersize=6, color=INK, label="resumed", **place
            )[0]
        for step, kind in stage.skipped_steps():
            marker, mark_colour = SKIPPED_STEP_MARKS.get(kind, ("s", INK))
            label = f"step skipped: {kind}"
            place = dict(transform=axes.get_xaxis_transform(), linestyle="none", markersize=6)
            (marks[label],) = axes.plot(
                start + step, 0.955, marker=marker, color=mark_colour, label=label, **place
            )
    losses = np.concatenate([stage.column("loss")[stage.trained()] for stage in stages])
    losses = losses[np.isfinite(losses)]
    if len(losses):
        # a skipped spike is not worth the height of the picture
        axes.set_ylim(min(0.0, losses.min()), max(losses.max(), 1e-9) * 1.12)
    points = Line2D([], [], color=INK, alpha=0.35, linewidth=0.8, label="each step")
    mean = Line2D([], [], color=INK, linewidth=2.2, label="running mean")
    handles = [points, mean, *(marks[label] for label in sorted(marks))]
    axes.legend(
        handles=handles, loc="upper right", ncols=len(handles), bbox_to_anchor=(1.0, 0.93), fontsize=8
    )
    draw_borders(axes, ends, [stage.name for stage in stages])
    axes.set_ylabel("loss per answer token (nats)")
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_column(axes: Axes, stages: Sequence[StageLog], ends: Sequence[int], key: str, title: str) -> None:
    for number, (stage, end) in enumerate(zip(stages, ends, strict=True)):
        colour = STAGE_COLOURS[number % len(STAGE_COLOURS)]
        steps, values = end - stage.num_steps + stage.column("step"), stage.column(key)
        if key == "lr":
            axes.plot(steps, values, color=colour, linewidth=1.6)
        else:
            draw_curve(axes, steps, values, colour, counted=stage.trained(), width=1.5)
    draw_borders(axes, ends)
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if key == "lr":
        rates = np.concatenate([stage.column(key) for stage in stages])
        rates = rates[rates > 0]
        axes.set_yscale("log")
        if len(rates):  # the first steps of a warm-up would take most of the height
            axes.set_ylim(0.7 * np.quantile(rates, 0.03), 1.5 * rates.max())
    elif key == "grad_norm":
        axes.set_yscale("log")
    elif key == "mfu":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_gates(attn: Axes, ffn: Axes, stages: Sequence[StageLog], ends: Sequence[int]) -> None:
    layers = sorted({layer for stage in stages for layer in stage.gates()})
    palette = plt.get_cmap("viridis", max(len(layers), 2))
    for stage, end in zip(stages, ends, strict=True):
        for layer, rows in stage.gates().items():
            steps = end - stage.num_steps + rows[:, 0]
            for column, axes in enumerate((attn, ffn), start=1):
                axes.plot(steps, rows[:, column], color=palette(layers.index(layer)), linewidth=1.3)
    top = max(axes.get_ylim()[1] for axes in (attn, ffn))
    for axes, name in ((attn, "attention"), (ffn, "feed-forward")):
        draw_borders(axes, ends)
        axes.set_title(f"{name} gates, mean |tanh|", y=1.0)
        axes.set_ylim(0, 1.04 * top)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _draw_layer_scale(axes, palette, layers)


def _draw_layer_scale(axes: Axes, palette: Colormap, layers: Sequence[int]) -> None:
    """Which colour is which layer, in the line of the title."""
    scale = axes.inset_axes((0.74, 1.06, 0.2, 0.07))
    scale.imshow([np.arange(len(layers))], cmap=palette, vmin=0, vmax=palette.N - 1, aspect="auto")
    scale.set_axis_off()
    scale.set_in_layout(False)
    place = dict(transform=axes.transAxes, va="center", fontsize=8, in_layout=False)
    axes.text(0.73, 1.095, f"layer {layers[0]}", ha="right", **place)
    axes.text(0.95, 1.095, f"{layers[-1]}", ha="left", **place)


def _draw_left_out(axes: Axes, stages: Sequence[StageLog]) -> None:
    samples: collections.Counter[str] = collections.Counter()
    steps: collections.Counter[str] = collections.Counter()
    for stage in stages:
        samples.update(stage.skipped_samples())
        steps.update(kind for _, kind in stage.skipped_steps())
    bars = [(f"{kind} step", count, LEFT_OUT_STEP) for kind, count in steps.most_common()][::-1]
    bars += [(reason, count, LEFT_OUT_SAMPLE) for reason, count in samples.most_common()][::-1]
    title = f"left out: {_count(samples.total(), 'sample')}"
    axes.set_title(f"{title}, {_count(steps.total(), 'step')}" if steps else title)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(bool(bars))
    if bars:
        names, counts, colours = zip(*bars, strict=True)
        drawn = axes.barh(range(len(bars)), counts, color=colours, height=0.7)
        labels = [f"{count:,}  {name.replace('_', ' ')}" for name, count in zip(names, counts, strict=True)]
        axes.bar_label(drawn, labels, padding=3, fontsize=8 if len(bars) < 8 else 6)
        axes.set_xlim(0, max(counts) * 2.2)  # room for the labels


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def _title(stages: Sequence[StageLog]) -> str:
    steps = sum(stage.num_steps for stage in stages)
    samples = sum(stage.log.steps[-1].get("samples_seen", 0) for stage in stages)
    seconds = sum(stage.log.steps[-1].get("seconds") or 0.0 for stage in stages)
    unit, length = next((u, n) for u, n in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= n or n == 1)
    duration = f"{seconds / length:.1f} {unit}"
    names = " → ".join(stage.name for stage in stages)
    return f"{names}: {steps:,} steps, {samples:,} samples, {duration}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the command line `arguments` (default: sys.argv); 0, or 2 after one line on what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m train plot",
        description="Draw losses over all stages, with resumes and skips, the gates and the speed.",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="output folder of a stage, or a folder of some"
    )
    help_text = f"PNG file (default: {PICTURE_NAME} in the first RUN)"
    parser.add_argument("--output", metavar="FILE.png", type=Path, help=help_text)
    options = parser.parse_args(arguments)
    path = options.output or Path(options.runs[0]) / PICTURE_NAME
    try:
        if path.suffix.lower() != ".png":
            raise ValueError(f"--output must be a file name that ends in .png, got {str(path)!r}")
        if options.output and not path.parent.is_dir():
            raise ValueError(f"--output must be a file in an existing folder, got {str(path)!r}")
        stages, left_out = find_stages(options.runs)
        draw(stages, path, _title(stages))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"train plot: error: {error}\n")
        return 2
    for folder, reason in left_out.items():
        print(f"left out: {folder} ({reason})")
    torn = sum(stage.log.num_unreadable for stage in stages)
    if torn:
        print(f"left out: {_count(torn, 'torn line')}")
    print(f"{', '.join(stage.name for stage in stages)}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

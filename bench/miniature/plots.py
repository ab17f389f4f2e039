"""The miniature's pictures: what each resolution reads, what the model looks at, and what it answers."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from train.demo.plots import plot_attention
from train.plot import STYLE

from .arms import ARMS, RESOLUTIONS, processor
from .features import SeenPages, pages_of
from .pages import tokenizer
from .scores import Document, accuracy, groups, interval, sizes_of
from .sizes import Size
from .training import SECOND_PAGE, Reader, Sample, answers, evaluation_samples, restored

COLOURS = {"224": "#4c72b0", "448": "#dd8452", "dynamic": "#55a868"}
SHOWN_ANSWERS = 12
END = tokenizer().eos_token
"""A dash on the sheet, where it stands in the place of a digit or a colour."""


def draw_findings(document: Document, path: Path) -> None:
    """Three panels: text size against accuracy, the position embedding, the resampler."""
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(14, 4.6), layout="constrained", width_ratios=(1.4, 1, 1)
        )
        _draw_sizes(document, left)
        found = groups(document)
        position = {"place": "place", "right_of": "right of", "below": "below", "colour": "colour"}
        _draw_bars(
            document,
            middle,
            {label: found[kind] for kind, label in position.items()},
            {"with position": "dynamic", "without": "dynamic-no-position"},
            "2-D position of the windows (Table 6)",
        )
        pairs = {"224": ("224", "224-resampler"), "448": ("448", "448-resampler")}
        _draw_pairs(document, right, pairs, found["all"], "Perceiver resampler (Table 7)")
        seeds = len({run["seed"] for run in document["arms"]})
        figure.suptitle(
            f"The papers' findings in miniature: held-out pages and words, {seeds} seeds, 95 % intervals"
        )
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _draw_sizes(document: Document, axes: Axes) -> None:
    run = {(r["name"], r["match"]) for r in document["arms"]}
    for arm in RESOLUTIONS:
        for match, style in (("steps", "-"), ("compute", "--")):
            if (arm, match) not in run:
                continue
            sizes, means, spans = [], [], []
            for size, mask in sizes_of(document).items():
                mean = accuracy(document, arm, mask, match)
                low, high = interval(document, [(arm, match)], mask, lambda a: a)
                sizes.append(size)
                means.append(100 * mean)
                spans.append((100 * max(0.0, mean - low), 100 * max(0.0, high - mean)))
            label = arm if match == "steps" else f"{arm}, compute of dynamic"
            axes.errorbar(
                sizes, means, np.array(spans).T, label=label, linestyle=style, color=COLOURS[arm], capsize=3
            )
    axes.set_title("Reading, by size of the text (Table 5)")
    axes.set_xlabel("em of the text in pixels of the page")
    axes.set_ylabel("exact match, %")
    axes.set_xticks(document["size"]["font_sizes"])
    axes.set_ylim(0, 102)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_bars(
    document: Document, axes: Axes, masks: dict[str, np.ndarray], arms: dict[str, str], title: str
) -> None:
    run = {r["name"] for r in document["arms"] if r["match"] == "steps"}
    width = 0.8 / len(arms)
    for i, (label, arm) in enumerate(arms.items()):
        if arm not in run:
            continue
        for j, mask in enumerate(masks.values()):
            _bar(
                document,
                axes,
                arm,
                mask,
                j + (i - (len(arms) - 1) / 2) * width,
                width,
                i,
                label if j == 0 else None,
            )
    axes.set_xticks(range(len(masks)), list(masks))
    axes.set_title(title)
    axes.set_ylim(0, 102)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _draw_pairs(
    document: Document, axes: Axes, pairs: dict[str, tuple[str, str]], mask: np.ndarray, title: str
) -> None:
    run = {r["name"] for r in document["arms"] if r["match"] == "steps"}
    for j, pair in enumerate(pairs.values()):
        for i, (arm, label) in enumerate(zip(pair, ("all tokens", "resampler"), strict=True)):
            if arm in run:
                _bar(document, axes, arm, mask, j + (i - 0.5) * 0.4, 0.4, i, label if j == 0 else None)
    axes.set_xticks(range(len(pairs)), list(pairs))
    axes.set_title(title)
    axes.set_ylim(0, 102)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _bar(
    document: Document,
    axes: Axes,
    arm: str,
    mask: np.ndarray,
    x: float,
    width: float,
    number: int,
    label: str | None,
) -> None:
    mean = accuracy(document, arm, mask)
    low, high = interval(document, [(arm, "steps")], mask, lambda a: a)
    error = [[100 * max(0.0, mean - low)], [100 * max(0.0, high - mean)]]
    axes.bar(x, 100 * mean, width, yerr=error, label=label, color=f"C{number}", capsize=3)


def draw_answers(
    size: Size, folder: Path, out: Path, stem: str, arm: str = "dynamic", seed: int = 0
) -> list[Path]:
    """The attention for one question and a sheet of answers, by the trained model of an arm."""
    paths = [out / f"{stem}-attention.png", out / f"{stem}-answers.png"]
    pages, _ = pages_of(size, "held_out")
    seen = SeenPages(folder, ARMS[arm].view, "held_out")
    model = restored(size, arm, seed, "steps", folder)
    words = tokenizer()
    chosen = _some(evaluation_samples(seen.words))
    reader = Reader(restored(size, arm, seed, "steps", folder), arm, seen, torch.device("cpu"))
    given = [
        (" ".join(words.convert_ids_to_tokens(g[:-1])), sample[0][1][0])
        for (g, _), (_, sample) in zip(answers(reader, [s for _, s in chosen]), chosen, strict=True)
    ]
    shown = [pages[sample[0][0]].pixels for _, sample in chosen]
    right = [i for i, (text, question) in enumerate(given) if text == question.answer]
    which = next((i for i in right if given[i][1].kind == "place"), 0)
    text, question = given[which]
    plot_attention(
        model,
        words,
        processor(size, ARMS[arm].view),
        shown[which],
        question.text,
        text,
        question.answer,
        paths[0],
    )
    _draw_sheet(shown, given, paths[1], arm)
    return paths


def _some(asked: Sequence[tuple[str, Sample]]) -> list[tuple[str, Sample]]:
    """Questions of all kinds about one page, spread over the set."""
    alone = [(kind, sample) for kind, sample in asked if kind != SECOND_PAGE]
    return [alone[i * len(alone) // SHOWN_ANSWERS] for i in range(SHOWN_ANSWERS)]


def _draw_sheet(shown: Sequence[np.ndarray], given: Sequence[tuple], path: Path, arm: str) -> None:
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(3, SHOWN_ANSWERS // 3, figsize=(12, 10.5), layout="constrained")
        for axes, pixels, (text, question) in zip(panels.flat, shown, given, strict=True):
            correct = text == question.answer
            axes.imshow(pixels, interpolation="nearest")
            verdict = "right" if correct else f"wrong, expected {question.answer}"
            colour = "#1a7a3a" if correct else "#b02020"
            axes.set_title(f"{question.text}\n{text.replace(END, '-')}\n{verdict}", fontsize=9, color=colour)
            axes.set_axis_off()
        figure.suptitle(f"Answers of the arm {arm} about held-out pages and words")
        figure.savefig(path, dpi=110)
        plt.close(figure)

"""The demo's two pictures: the loss over the four stages, and what the model looks at when it answers."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model import ImageProcessor, InfiMMHD, ProcessedImage

from ..plot import STAGE_COLOURS, STYLE, draw_borders, draw_curve
from .evaluate import UNENDED


def plot_losses(stages: dict[str, list[float]], path: Path) -> None:
    """`stages` maps a stage's name to its loss at every step; draws the running mean and the borders."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
        ends = np.cumsum([len(losses) for losses in stages.values()]).tolist()
        for number, (losses, end) in enumerate(zip(stages.values(), ends, strict=True)):
            steps = np.arange(end - len(losses), end)
            draw_curve(axes, steps, np.array(losses), STAGE_COLOURS[number % len(STAGE_COLOURS)])
        draw_borders(axes, ends, list(stages))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss per answer token (nats)")
        figure.suptitle("Loss over the four stages: each step, and the running mean")
        figure.savefig(path, dpi=120)
        plt.close(figure)


@torch.no_grad()
def cross_attention_maps(
    model: InfiMMHD, tokenizer: PreTrainedTokenizerFast, question: str, answer: str, view: ProcessedImage
) -> tuple[list[str], Tensor]:
    """Where the model looks while it writes each token of its answer.

    Returns the answer's tokens and probabilities [tokens, num_windows, grid, grid] over the patches: the
    mean over the heads of the gated block whose gates are open the widest."""
    prompt = tokenizer(f"<bos> <image> {question}").input_ids
    written = tokenizer(answer).input_ids
    device = model.language.device
    caught: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for index, block in model.gated_blocks.items():

        def catch(module, args, index=index):
            caught[index] = (module.query(args[0]), args[1])

        handles.append(block.register_forward_pre_hook(catch))
    try:
        model.eval()
        model(
            input_ids=torch.tensor([prompt + written], device=device),
            pixel_values=view.pixel_values.to(device),
            window_positions=view.window_positions.to(device),
            windows_per_image=[len(view.pixel_values)],
            images_per_sample=[1],
        )
    finally:
        for handle in handles:
            handle.remove()
    widest = max(
        model.gated_blocks, key=lambda index: float(model.gated_blocks[index].attn_gate.tanh().abs().mean())
    )
    query, key = caught[widest]
    query = query[
        0, len(prompt) - 1 : len(prompt) - 1 + len(written)
    ]  # token t is predicted from token t - 1
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) / query.shape[-1] ** 0.5
    vision = model.config.vision_config
    grid = vision.grid_size
    probabilities = scores.softmax(-1).mean(0).view(len(written), -1, vision.num_tokens)
    maps = probabilities[:, :, vision.num_prefix_tokens :].reshape(len(written), -1, grid, grid)
    return tokenizer.convert_ids_to_tokens(written), maps.cpu()


def plot_attention(
    model: InfiMMHD,
    tokenizer: PreTrainedTokenizerFast,
    processor: ImageProcessor,
    pixels: np.ndarray,
    question: str,
    given: str,
    expected: str,
    path: Path,
) -> None:
    """The photograph with its window grid, and over it the cross-attention of each token of the answer."""
    view = processor.process(pixels)
    written = given.removesuffix(UNENDED) or expected  # an empty answer attends to nothing
    tokens, maps = cross_attention_maps(model, tokenizer, question, written, view)
    window = processor.window_size
    rows, columns = processor.grid_of(*pixels.shape[:2])
    figure, panels = plt.subplots(
        2, len(tokens) + 1, figsize=(3.0 * (len(tokens) + 1), 6.6), layout="constrained", squeeze=False
    )
    thumbnail = np.asarray(_thumbnail(pixels, window))
    vmax = float(maps.max())
    for column, panel in enumerate(panels.T):
        whole, small = panel
        whole.imshow(pixels)
        small.imshow(thumbnail)
        if column:
            heat = (
                maps[column - 1, 1:]
                .view(rows, columns, *maps.shape[2:])
                .transpose(1, 2)
                .flatten(2)
                .flatten(0, 1)
            )
            _overlay(whole, heat, pixels.shape, vmax)
            _overlay(small, maps[column - 1, 0], thumbnail.shape, vmax)
            whole.set_title(f"token {column}: {tokens[column - 1]!r}")
            share = float(maps[column - 1, 1:].sum() / maps[column - 1].sum())
            small.set_title(f"windows {share:.0%}, thumbnail {1 - share:.0%}", fontsize=9)
        else:
            whole.set_title(f"{rows} x {columns} windows of {window} px")
            small.set_title("thumbnail")
        for i in range(1, rows):
            whole.axhline(i * window - 0.5, color="cyan", linewidth=1.2)
        for j in range(1, columns):
            whole.axvline(j * window - 0.5, color="cyan", linewidth=1.2)
        for axes in panel:
            axes.set_axis_off()
    verdict = "right" if given == expected else f"wrong, expected {expected!r}"
    figure.suptitle(
        f"Q: {question}   A: {given!r} ({verdict})\ncross-attention, mean over heads, held-out image"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _overlay(axes, heat: Tensor, shape: tuple[int, ...], vmax: float) -> None:
    """Draws `heat` [rows, columns] over a picture; the less attention, the more of the picture shows."""
    strength = (heat.numpy() / vmax).clip(0.0, 1.0) ** 0.5
    colours = plt.get_cmap("autumn")(strength)
    colours[..., 3] = 0.75 * strength
    axes.imshow(colours, extent=(-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5), interpolation="nearest")


def _thumbnail(pixels: np.ndarray, window: int) -> Image.Image:
    return Image.fromarray(pixels).resize((window, window), Image.Resampling.BICUBIC)

"""Stand-ins for the pretrained parts, made on the spot: the paper starts from EVA2-CLIP-E and Vicuna.

The ViT learns to name the character, colour and index under the centre of each patch of painted photographs;
the LLM learns to answer the demo's questions about strings that are told to it in words. Neither sees an
image-text pair: joining the two is left to the four stages. Plain PyTorch, no DeepSpeed."""

import contextlib
import dataclasses
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from model import InfiMMHD
from model.image import CLIP_MEAN, CLIP_STD
from model.infimm_hd import IGNORE_INDEX
from train.data.painting import COLOUR_NAMES, choose_colour, shade

from .painted import (
    DIGITS,
    FONT_SIZES,
    NUMBER_WORDS,
    SIDES,
    PaintedString,
    crop,
    glyph,
    paint,
    question_and_answer,
    random_string,
)
from .stages import OFF_GRID

BACKGROUND_WEIGHT = 0.15
"""Loss weight of patches without a character."""


@dataclasses.dataclass(kw_only=True, slots=True)
class WarmUpConfig:
    vision_steps: int = 2000
    vision_lr: float = 2e-3
    canvases: int = 10
    """Canvases of 4 x 4 windows at full scale a step."""
    half_scale_canvases: int = 3
    """Canvases painted at twice the size and halved, as a thumbnail is."""
    off_grid: float = OFF_GRID
    """Share of the strings that are not on the patch grid."""
    language_steps: int = 350
    language_lr: float = 3e-3
    language_batch: int = 48
    context_share: float = 0.8
    """Share of the LLM's samples in which the strings are told; the others teach only the prior."""
    autocast: bool = False
    """bfloat16 autocast, where the processor multiplies bfloat16 fast."""
    seed: int = 0


def cosine(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up over 8 % of the steps, then cosine to 5 % of the peak."""
    return (
        peak * min(1.0, (step + 1) / (0.08 * steps)) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    )


def _optimize(
    parameters: list[nn.Parameter], steps: int, peak: float, loss_of_step, name: str
) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    progress = tqdm(range(steps), desc=name, mininterval=2.0)
    for step in progress:
        optimizer.param_groups[0]["lr"] = cosine(step, steps, peak)
        loss = loss_of_step()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def scattered_strings(
    rng: np.random.Generator,
    size: int,
    font_sizes: tuple[int, ...],
    attempts: int,
    snap: int,
    off_grid: float,
) -> tuple[np.ndarray, np.ndarray]:
    """A square canvas of `size` pixels with strings all over it, and what each pixel shows.

    Returns pixels [size, size, 3] float32 and a map [3, size, size] uint8: character + 1, colour + 1, index
    in its string + 1, and 0 for the ground."""
    canvas = np.ascontiguousarray(crop(rng, "train", size, size))
    shown = np.zeros((3, size, size), np.uint8)
    for _ in range(attempts):
        font_size = int(rng.choice(font_sizes))
        height, advance = glyph("0", font_size).shape
        text = random_string(rng, min(int(rng.integers(1, 5)), size // advance), "train")
        width = advance * len(text)
        left, top = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        if rng.random() >= off_grid:
            left, top = left // snap * snap, top // snap * snap
        if shown[0, max(0, top - 3) : top + height + 3, max(0, left - 3) : left + width + 3].any():
            continue
        colour = choose_colour(rng, canvas[top : top + height, left : left + width])
        paint(canvas, text, font_size, left, top, shade(rng, colour))
        for i, character in enumerate(text):
            cell = shown[:, top : top + height, left + i * advance : left + (i + 1) * advance]
            cell[:] = np.array([DIGITS.index(character) + 1, colour + 1, i + 1], np.uint8)[:, None, None]
    return np.clip(canvas, 0, 255), shown


def _vision_batch(
    rng: np.random.Generator, config: WarmUpConfig, window: int, patch: int
) -> tuple[Tensor, Tensor]:
    """Windows [n, 3, window, window], normalised, and targets [n, 3, patches] of their patch centres."""
    size = 4 * window
    sizes = tuple(FONT_SIZES.values())
    pixels, shown = [], []
    for _ in range(config.canvases):
        canvas, marks = scattered_strings(rng, size, sizes, 10, patch, config.off_grid)
        pixels.append(torch.from_numpy(canvas).permute(2, 0, 1))
        shown.append(torch.from_numpy(marks))
    for _ in range(config.half_scale_canvases):
        doubled = tuple(2 * s for s in sizes)
        canvas, marks = scattered_strings(rng, 2 * size, doubled, 12, patch, config.off_grid)
        picture = torch.from_numpy(canvas).permute(2, 0, 1)[None]
        pixels.append(F.interpolate(picture, scale_factor=0.5, mode="bilinear", antialias=True)[0])
        shown.append(torch.from_numpy(marks)[:, ::2, ::2])
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255.0 for v in (CLIP_MEAN, CLIP_STD))
    windows = _cut((torch.stack(pixels) - mean) / std, window)
    centres = torch.stack(shown)[:, :, patch // 2 :: patch, patch // 2 :: patch].long()
    return windows, _cut(centres, window // patch).flatten(2)


def _cut(x: Tensor, side: int) -> Tensor:
    """[n, channels, k * side, k * side] -> [n * k * k, channels, side, side]."""
    n, channels, size, _ = x.shape
    k = size // side
    return x.view(n, channels, k, side, k, side).permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)


def warm_up_vision(model: InfiMMHD, config: WarmUpConfig) -> dict[str, object]:
    """Trains the ViT under three throw-away linear heads: losses, seconds, the last batch's accuracies."""
    vision, device = model.vision, model.vision.cls_token.device
    rng = np.random.default_rng([config.seed, 1])
    classes = {"character": len(DIGITS) + 1, "colour": len(COLOUR_NAMES) + 1, "index": len(NUMBER_WORDS) + 1}
    weights = (1.0, 1.0, 0.5)
    heads = nn.ModuleList(nn.Linear(vision.config.hidden_size, n) for n in classes.values()).to(device)
    accuracy: dict[str, float] = {}

    def loss_of_step() -> Tensor:
        windows, targets = _vision_batch(rng, config, vision.config.window_size, vision.config.patch_size)
        targets = targets.to(device)
        weight = torch.where(targets[:, 0] > 0, 1.0, BACKGROUND_WEIGHT).flatten()
        with _autocast(device, config.autocast):
            features = vision(windows.to(device))[:, 1:]
            logits = [head(features).float() for head in heads]
        total = torch.zeros((), device=device)
        for i, (name, factor) in enumerate(zip(classes, weights, strict=True)):
            losses = F.cross_entropy(logits[i].flatten(0, 1), targets[:, i].flatten(), reduction="none")
            total = total + factor * (losses * weight).sum() / weight.sum()
            shown = targets[:, 0] > 0
            accuracy[name] = (logits[i].argmax(-1) == targets[:, i])[shown].float().mean().item()
        return total

    started = time.perf_counter()
    parameters = [*vision.parameters(), *heads.parameters()]
    losses = _optimize(parameters, config.vision_steps, config.vision_lr, loss_of_step, "warm-up ViT")
    return {"losses": losses, "seconds": time.perf_counter() - started, "accuracy": dict(accuracy)}


def warm_up_language(
    model: InfiMMHD, tokenizer: PreTrainedTokenizerFast, config: WarmUpConfig
) -> dict[str, object]:
    """Trains the LLM on the demo's questions about strings told in words; returns losses and seconds."""
    language, device = model.language, model.language.device
    rng = np.random.default_rng([config.seed, 2])

    def loss_of_step() -> Tensor:
        rows = [_told_sample(rng, tokenizer, config.context_share) for _ in range(config.language_batch)]
        longest = max(len(ids) for ids, _ in rows)
        input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [IGNORE_INDEX] * (longest - len(labels)) for _, labels in rows])
        with _autocast(device, config.autocast):
            logits = language(input_ids=input_ids.to(device), use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(device))

    started = time.perf_counter()
    losses = _optimize(
        list(language.parameters()), config.language_steps, config.language_lr, loss_of_step, "warm-up LLM"
    )
    return {"losses": losses, "seconds": time.perf_counter() - started}


def _told_sample(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, context_share: float
) -> tuple[list[int], list[int]]:
    colours = rng.choice(len(COLOUR_NAMES), size=2, replace=False)
    strings = [
        PaintedString(random_string(rng, int(rng.integers(1, 5)), "train"), int(colour), 0, (0, 0, 0, 0))
        for colour in colours
    ]
    told = [
        f"{side} {COLOUR_NAMES[s.colour]} {' '.join(s.text)} ."
        for side, s in zip(SIDES, strings, strict=True)
    ]
    # half of the samples hold an `<image>` token, which says nothing here, so that the frozen LLM knows it
    # in PT
    media = "<image>" if rng.random() < 0.5 else ""
    context = " ".join(told) if rng.random() < context_share else ""
    ids = tokenizer(f"<bos> {media} {context}").input_ids
    labels = [IGNORE_INDEX] * len(ids)
    turns = []
    for side, string in enumerate(strings):
        kind = "characters" if rng.random() < 0.75 else "count"
        turns += [question_and_answer(kind, side, string), question_and_answer("colour", side, string)]
    for turn in rng.permutation(len(turns)):
        question, answer = (tokenizer(text).input_ids for text in turns[turn])
        answer.append(tokenizer.eos_token_id)
        ids += question + answer
        labels += [IGNORE_INDEX] * len(question) + answer
    return ids, labels


def _autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()

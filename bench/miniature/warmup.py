"""The shared start of all arms: stand-ins for the pretrained ViT, ConvNeXt and LLM, made on the spot.

The encoders learn to name the digit, the colour and the index under the centre of each of their cells, on
pages full of words at every scale that an arm sees; the LLM learns to answer the questions about words that
are told to it. No part sees another: joining them is left to the arms."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM

from model.image import CLIP_MEAN, CLIP_STD
from model.infimm_hd import IGNORE_INDEX
from model.mixture_of_resolution import MixtureOfResolutionEncoder
from model.vision import VisionTransformer
from train.data.painting import COLOUR_NAMES, shade
from train.demo.painted import DIGITS, glyph, random_string
from train.demo.warmup import cosine

from .pages import (
    PLACES,
    WORD_LENGTH,
    Question,
    Word,
    draw_turns,
    ground,
    label_size,
    margin,
    paint_label,
    questions,
    random_words,
    tokenizer,
)
from .sizes import Size, WarmUp, base_config, mixture_of
from .storage import load_tensors, save_tensors

BACKGROUND_WEIGHT = 0.15
"""Loss weight of cells without a digit."""
CLASSES = (len(DIGITS) + 1, len(COLOUR_NAMES) + 1, WORD_LENGTH + 1)
CLASS_WEIGHTS = (1.0, 1.0, 0.5)
TOLD_SHARE = 0.8
"""Of the LLM's texts; in the others nothing is told, and it learns what is likely."""
ATTEMPTS = 30
"""To place a label on a page at its native size: some ten of them find room."""
START = 1
"""Seed of the parts before their warm-up."""
KEEP_EVERY = 200
"""Steps between two states on disk."""


def cells_of(shown: Tensor, cell: int) -> Tensor:
    """The map [n, 3, size, size] at the cells' centres, [n, 3, size / cell, size / cell]."""
    return shown[:, :, cell // 2 :: cell, cell // 2 :: cell].long()


def cut(x: Tensor, side: int) -> Tensor:
    """[n, channels, k * side, k * side] -> [n * k * k, channels, side, side], row by row."""
    n, channels, size, _ = x.shape
    k = size // side
    return x.view(n, channels, k, side, k, side).permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)


class FullPages(Dataset):
    """Pages full of words: item i is (pixels [3, page, page] normalised, map [3, page, page] uint8).

    A third of them is painted at twice and a third at four times the size and scaled down, as the arms that
    see a page in one window of `448` or `224` get it; the low encoder's, which see nothing else, all are."""

    def __init__(self, size: Size, seed: int, low: bool) -> None:
        self.size, self.seed, self.low = size, seed, low

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, index])
        factor = (2, 4)[index % 2] if self.low else (1, 2, 1)[index % 3]
        side = self.size.page
        canvas = ground(rng, "train", side * factor)
        shown = fill(rng, canvas, self.size.font_sizes, ATTEMPTS * factor**2)
        pixels = torch.from_numpy(np.clip(canvas, 0, 255)).permute(2, 0, 1)
        marks = torch.from_numpy(shown)
        if factor > 1:
            pixels = F.interpolate(pixels[None], size=(side, side), mode="bicubic", antialias=True)[0]
            marks = marks[:, factor // 2 :: factor, factor // 2 :: factor]
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255.0 for v in (CLIP_MEAN, CLIP_STD))
        return (pixels - mean) / std, marks.contiguous()


def fill(
    rng: np.random.Generator, canvas: np.ndarray, font_sizes: Sequence[int], attempts: int
) -> np.ndarray:
    """Paints labels all over a square `canvas` [size, size, 3] float32 in place, none over another.

    Returns a map [3, size, size] uint8 of what each pixel shows: digit + 1, colour + 1, index in its word
    + 1, and 0 beside the digits."""
    size = len(canvas)
    shown, taken = np.zeros((3, size, size), np.uint8), np.zeros((size, size), bool)
    fonts = rng.choice(np.array(font_sizes), attempts)
    places = rng.random((attempts, 2))
    colours = rng.integers(len(COLOUR_NAMES), size=attempts)
    for font, place, colour in zip(fonts.tolist(), places, colours.tolist(), strict=True):
        height, width = label_size(font)
        top, left = (
            int(share * (size - side + 1)) for share, side in zip(place, (height, width), strict=True)
        )
        box = np.s_[top : top + height, left : left + width]
        if taken[box].any():
            continue
        taken[box] = True
        text = random_string(rng, WORD_LENGTH, "train")
        paint_label(canvas, text, font, left, top, shade(rng, colour))
        edge, (cell_height, advance) = margin(font), glyph("0", font).shape
        for i, digit in enumerate(text):
            start = left + edge + i * advance
            cell = shown[:, top + edge : top + edge + cell_height, start : start + advance]
            cell[:] = np.array([DIGITS.index(digit) + 1, colour + 1, i + 1], np.uint8)[:, None, None]
    return shown


class ToldTexts(Dataset):
    """Words told in text and questions about them: item i is (input ids, labels), lists of int.

    The first ones tell all words and ask for each by its colour, see `Size.language_reads_first`."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size, self.seed = size, seed
        self.tokenizer = tokenizer()

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        rng = np.random.default_rng([self.seed, index])
        only_reads = index < self.size.language_reads_first * self.size.language.batch
        pages = 2 if rng.random() < self.size.two_pages else 1
        # half of the texts hold the `<image>` of an arm, which says nothing here
        marked = rng.random() < 0.5
        parts = []
        for _ in range(pages):
            words = random_words(rng, "train", self.size.font_sizes)
            context = told(words) if only_reads or rng.random() < TOLD_SHARE else ""
            context = f"<image> {context}" if marked else context
            if only_reads:
                asked = [q for q in questions(words) if q.kind == "read"]
                turns = [asked[i] for i in rng.permutation(len(asked))]
            else:
                turns = draw_turns(rng, words, self.size.turns // pages)
            parts.append((context, turns))
        return encoded(self.tokenizer, parts)


def told(words: Sequence[Word]) -> str:
    """A page in words, place by place."""
    return " ".join(
        f"{PLACES[word.place]} {COLOUR_NAMES[word.colour]} {' '.join(word.text)} ." for word in words
    )


def encoded(tokenizer, parts: Sequence[tuple[str, Sequence[Question]]]) -> tuple[list[int], list[int]]:
    """(ids, labels) of a text: for every part its context, then questions with answers; labels on answers."""
    ids, labels = [tokenizer.bos_token_id], [IGNORE_INDEX]
    for context, turns in parts:
        before = tokenizer(context).input_ids
        ids += before
        labels += [IGNORE_INDEX] * len(before)
        for turn in turns:
            question, answer = tokenizer(turn.text).input_ids, tokenizer(turn.answer).input_ids
            answer = [*answer, tokenizer.eos_token_id]
            ids += question + answer
            labels += [IGNORE_INDEX] * len(question) + answer
    return ids, labels


def padded(rows: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rows of (ids, labels) -> input_ids and labels [rows, longest]."""
    longest = max(len(ids) for ids, _ in rows)
    input_ids = [ids + [pad_token_id] * (longest - len(ids)) for ids, _ in rows]
    labels = [labels + [IGNORE_INDEX] * (longest - len(labels)) for _, labels in rows]
    return torch.tensor(input_ids), torch.tensor(labels)


def warm_up_vision(size: Size, folder: Path, device: torch.device) -> None:
    """folder/vision.pt: the ViT for windows of `size.window` pixels."""
    torch.manual_seed(START)
    vision = VisionTransformer(base_config(size).vision_config)
    _warm_up_encoder(size, folder, "vision", size.vision, vision, device)


def warm_up_low_vision(size: Size, folder: Path, device: torch.device) -> None:
    """folder/vision_low.pt: the same ViT, trained on for windows of half the size."""
    torch.manual_seed(START)
    vision = VisionTransformer(base_config(size).vision_config)
    vision.load_state_dict(load_tensors(folder / "vision.pt")["part"])
    vision.set_window_size(size.window // 2)
    _warm_up_encoder(size, folder, "vision_low", size.vision_low, vision, device)


def warm_up_convnext(size: Size, folder: Path, device: torch.device) -> None:
    """folder/convnext.pt: the ConvNeXt for whole pages."""
    torch.manual_seed(START)
    config = base_config(size).vision_config
    config.mixture_of_resolution = mixture_of(size)
    encoder = MixtureOfResolutionEncoder(config)
    _warm_up_encoder(
        size, folder, "convnext", size.convnext, encoder.convnext, device, encoder.convnext_tokens
    )


def _warm_up_encoder(
    size: Size,
    folder: Path,
    name: str,
    settings: WarmUp,
    part: nn.Module,
    device: torch.device,
    tokens_of: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Trains `part` under three throw-away linear heads. `tokens_of` [n, 3, page, page] -> [n, cells, width]
    reads whole pages; without it `part` is a ViT and reads their windows."""
    if tokens_of is None:
        side, cell = part.config.window_size, part.config.patch_size
        width = part.config.hidden_size
    else:
        side, cell, width = size.page, size.page * size.patch // size.window, size.convnext_widths[-1]
    heads = nn.ModuleList(nn.Linear(width, n) for n in CLASSES)
    both = nn.ModuleDict({"part": part, "heads": heads}).to(device)
    accuracy: list[float] = []

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, shown = (x.to(device) for x in batch)
        targets = cut(cells_of(shown, cell), side // cell).flatten(2)  # [windows, 3, cells]
        windows = cut(pixels, side)
        tokens = part(windows)[:, 1:] if tokens_of is None else tokens_of(windows)
        return _dense_loss(tokens, targets, heads, accuracy)

    data = FullPages(size, seed=_SEEDS[name], low=name == "vision_low")
    found = train_part(folder, name, settings, both, data, loss_of, None, size.loader_workers)
    last = float(np.mean(accuracy[-KEEP_EVERY:]))
    save_tensors(folder / f"{name}.pt", {"part": part.state_dict(), "accuracy": last, **found})


def _dense_loss(tokens: Tensor, targets: Tensor, heads: nn.ModuleList, accuracy: list[float]) -> Tensor:
    """Cross entropy of the three heads over tokens [n, cells, width] and targets [n, 3, cells]; the share of
    digits that are named goes to `accuracy`."""
    has_digit = targets[:, 0] > 0
    weight = torch.where(has_digit, 1.0, BACKGROUND_WEIGHT).flatten()
    total = tokens.new_zeros(())
    for i, (head, factor) in enumerate(zip(heads, CLASS_WEIGHTS, strict=True)):
        logits = head(tokens).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets[:, i].flatten(), reduction="none")
        total = total + factor * (losses * weight).sum() / weight.sum()
        if i == 0:
            accuracy.append((logits.argmax(-1) == targets[:, 0])[has_digit].float().mean().item())
    return total


def warm_up_language(size: Size, folder: Path, device: torch.device) -> None:
    """folder/language.pt: the LLM, which has read about words but seen none."""
    torch.manual_seed(START)
    language = AutoModelForCausalLM.from_config(base_config(size).text_config).to(device)
    pad = tokenizer().pad_token_id
    right: list[float] = []

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        input_ids, labels = (x.to(device) for x in batch)
        logits = language(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        expected = labels[:, 1:]
        is_answer = expected != IGNORE_INDEX
        right.append((logits.argmax(-1) == expected)[is_answer].float().mean().item())
        answers = F.cross_entropy(logits.flatten(0, 1), expected.flatten(), ignore_index=IGNORE_INDEX)
        # all of the text as well: from answers alone some starts do not learn to look up
        texts = F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), ignore_index=pad)
        return answers + texts

    data = ToldTexts(size, seed=_SEEDS["language"])
    found = train_part(
        folder, "language", size.language, language, data, loss_of, lambda rows: padded(rows, pad), 0
    )
    last = float(np.mean(right[-KEEP_EVERY:]))
    save_tensors(folder / "language.pt", {"part": language.state_dict(), "accuracy": last, **found})


_SEEDS = {"vision": 101, "vision_low": 102, "convnext": 103, "language": 104}
"""Of the data; `PARTS` in the order in which they can be made."""

PARTS = {
    "vision": warm_up_vision,
    "language": warm_up_language,
    "convnext": warm_up_convnext,
    "vision_low": warm_up_low_vision,
}


def train_part(
    folder: Path,
    name: str,
    settings: WarmUp,
    module: nn.Module,
    data: Dataset,
    loss_of: Callable[[Any], Tensor],
    collate: Callable[[list], Any] | None,
    workers: int,
) -> dict[str, Any]:
    """AdamW over `settings.steps`; losses and seconds. The state is kept on disk every `KEEP_EVERY` steps,
    and a run that was ended goes on from it: batch i is made of its number alone."""
    state = folder / f"{name}.state.pt"
    optimizer = torch.optim.AdamW(module.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    losses, before = [], 0.0
    if state.exists():
        kept = load_tensors(state)
        module.load_state_dict(kept["module"])
        optimizer.load_state_dict(kept["optimizer"])
        losses, before = kept["losses"], kept["seconds"]
    batches = [range(i * settings.batch, (i + 1) * settings.batch) for i in range(settings.steps)]
    loader = DataLoader(data, batch_sampler=batches[len(losses) :], collate_fn=collate, num_workers=workers)
    started = time.perf_counter()
    device = next(module.parameters()).device
    for step, batch in enumerate(loader, start=len(losses)):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, settings.steps, settings.lr)
        with autocast(device):
            loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds = before + time.perf_counter() - started
        if len(losses) % KEEP_EVERY == 0:
            print(
                f"{name}: {len(losses)} of {settings.steps} steps, {seconds:.0f} s, loss {losses[-1]:.3f}",
                flush=True,
            )
            kept = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
            save_tensors(state, {**kept, "losses": losses, "seconds": seconds})
    state.unlink(missing_ok=True)
    return {"loss": losses, "seconds": seconds}


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 on a GPU; float32 on a CPU, where half precision is not faster everywhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()

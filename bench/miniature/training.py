"""One arm, one seed: trained on pages and questions, then asked about held-out pages and words."""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.flops import counting
from model import InfiMMHD
from model.infimm_hd import IGNORE_INDEX
from train.demo.warmup import cosine

from .arms import ARMS, POSITIONS, RESOLUTIONS, GivenFeatures, arm_config, build
from .features import SeenPages
from .pages import PLACES, Question, Word, draw_turns, questions, random_words, tokenizer
from .sizes import Size
from .storage import load_tensors, save_json, save_tensors
from .warmup import autocast, encoded, padded

Sample = Sequence[tuple[int, Sequence[Question]]]
"""Pages by number, each with the questions that follow it."""
SECOND_PAGE = "second_page"
"""The kind of a question about the second of two pages, which is also asked about the first before it."""
LOSS_ROWS = 20
"""Losses of a run that its result holds: means over as many equal parts."""
ASKED_AT_ONCE = 64


class Reader:
    """An arm's model with the pages it is given: makes the arguments of its forward."""

    def __init__(self, model: InfiMMHD, arm: str, pages: SeenPages | None, device: torch.device) -> None:
        self.model, self.pages, self.device = model.to(device), pages, device
        self.tokenizer = tokenizer()
        self.positions = POSITIONS.get(ARMS[arm].view, ((-1, -1),))
        per_window = model.config.image_seq_length
        marks = 1 if per_window is None else per_window * len(self.positions)
        self.context = " ".join(["<image>"] * marks) if ARMS[arm].images else ""
        self.side = model.config.vision_config.input_size
        if pages is not None and not pages.is_pixels:
            self.model.vision = GivenFeatures(self.model.vision)

    def arguments(self, samples: Sequence[Sample], only_last: bool = False) -> dict[str, Any]:
        """With labels on all answers, or on the last one of each sample alone."""
        rows = []
        for sample in samples:
            ids, labels = encoded(self.tokenizer, [(self.context, turns) for _, turns in sample])
            if only_last:
                answer = len(self.tokenizer(sample[-1][1][-1].answer).input_ids) + 1  # and the end
                labels = [IGNORE_INDEX] * (len(labels) - answer) + labels[-answer:]
            rows.append((ids, labels))
        input_ids, labels = padded(rows, self.tokenizer.pad_token_id)
        found: dict[str, Any] = {"input_ids": input_ids.to(self.device), "labels": labels.to(self.device)}
        if self.pages is None:
            return found
        numbers = [page for sample in samples for page, _ in sample]
        visual = self.pages.visual(numbers, self.device)
        if self.pages.is_pixels:
            pixels = visual
        else:
            self.model.vision.features = visual.flatten(0, 1)
            # nothing reads these: they only have the shape of the windows
            pixels = visual.new_zeros(1).expand(visual.shape[0] * visual.shape[1], 3, self.side, self.side)
        positions = torch.tensor(self.positions, device=self.device).repeat(len(numbers), 1)
        return found | {
            "pixel_values": pixels,
            "window_positions": positions,
            "windows_per_image": [len(self.positions)] * len(numbers),
            "images_per_sample": [len(sample) for sample in samples],
        }


def draw_sample(rng: np.random.Generator, size: Size, words: Sequence[Sequence[Word]]) -> Sample:
    """One page with `size.turns` questions, or two with half of them each."""
    count = 2 if rng.random() < size.two_pages else 1
    numbers = rng.integers(len(words), size=count)
    return [(int(n), draw_turns(rng, words[n], size.turns // count)) for n in numbers]


def steps_of(size: Size, arm: str, match: str) -> int:
    """Optimizer steps; at equal "compute" as many as the operations of the `dynamic` arm pay for."""
    if match == "steps":
        return size.steps
    return round(size.steps * step_flops(size, RESOLUTIONS[-1]) / step_flops(size, arm))


@functools.cache
def step_flops(size: Size, arm: str) -> int:
    """Floating-point operations of one training sample: encoder forward, the rest forward and backward.

    Counted on one batch of random weights; the features of an encoder that is frozen count as often as they
    are used, although a run computes them once."""
    rng = np.random.default_rng(0)
    count = 2
    words = [random_words(rng, "train", size.font_sizes) for _ in range(count)]
    model = InfiMMHD(arm_config(size, arm))
    model.set_trainable(("gated_cross_attention", "language"))
    reader = Reader(model, arm, None, torch.device("cpu"))
    samples = [[(i, draw_turns(rng, words[i], size.turns))] for i in range(count)]
    arguments = reader.arguments(samples)
    if ARMS[arm].images:
        windows = len(reader.positions)
        arguments |= {
            "pixel_values": torch.zeros(count * windows, 3, reader.side, reader.side),
            "window_positions": torch.tensor(reader.positions).repeat(count, 1),
            "windows_per_image": [windows] * count,
            "images_per_sample": [1] * count,
        }
    with counting(model) as (flops, _):
        model(**arguments).loss.backward()
    return flops.get_total_flops() // count


def run_arm(size: Size, arm: str, seed: int, match: str, folder: Path, device: torch.device) -> None:
    """Trains and asks; leaves folder/arms/<arm>-<seed>-<match>.json and the weights beside it."""
    path = folder / "arms" / f"{arm}-{seed}-{match}.json"
    started = time.perf_counter()
    view = ARMS[arm].view
    seen = {s: SeenPages(folder, view, s) if ARMS[arm].images else None for s in ("train", "held_out")}
    words = {s: (pages or SeenPages(folder, "low", s)).words for s, pages in seen.items()}
    model = build(size, arm, folder / "warm_up", seed)
    reader = Reader(model, arm, seen["train"], device)
    steps = steps_of(size, arm, match)
    losses = train(size, reader, words["train"], steps, seed)
    seconds = time.perf_counter() - started
    reader.pages = seen["held_out"]
    asked = evaluation_samples(words["held_out"])
    correct = ask(reader, [sample for _, sample in asked])
    parts = np.array_split(np.array(losses), min(LOSS_ROWS, len(losses)))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("vision.")}
    adapters = {k: v for k, v in model.state_dict().items() if k.startswith("vision.adapters.")}
    save_tensors(path.with_suffix(".pt"), {**state, **adapters})
    save_json(
        path,
        {
            "name": arm,
            "seed": seed,
            "match": match,
            "steps": steps,
            "flops": steps * size.batch * step_flops(size, arm),
            "train_seconds": round(seconds, 1),
            "seconds": round(time.perf_counter() - started, 1),
            "loss": [round(float(part.mean()), 4) for part in parts],
            "correct": "".join("1" if right else "0" for right in correct),
        },
    )


def train(size: Size, reader: Reader, words: Sequence[Sequence[Word]], steps: int, seed: int) -> list[float]:
    """The loss of every step. Pages and questions are the same for all arms of one seed."""
    model = reader.model.train()
    groups = model.parameter_groups()
    has_resampler = model.config.connector.kind == "resampler"
    by_rate: dict[float, list[nn.Parameter]] = {size.lr_language: [p for _, p in groups["language"]]}
    for name, parameter in groups["gated_cross_attention"]:
        if name.endswith("_gate"):
            rate = size.lr_gates
        elif has_resampler and name.startswith("connector."):
            rate = size.lr_resampler
        else:
            rate = size.lr_joining
        by_rate.setdefault(rate, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "peak": rate, "lr": rate} for rate, parameters in by_rate.items()],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        samples = [draw_sample(rng, size, words) for _ in range(size.batch)]
        if reader.pages is None:
            samples = [[(page, turns)] for sample in samples for page, turns in sample[:1]]
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, group["peak"])
        with autocast(reader.device):
            loss = model(**reader.arguments(samples)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def evaluation_samples(words: Sequence[Sequence[Word]]) -> list[tuple[str, Sample]]:
    """(kind, sample) of every question about every page, each asked alone, then those about two pages."""
    asked = [(q.kind, [(i, [q])]) for i, of_page in enumerate(words) for q in questions(of_page)]
    for i in range(len(words) - 1):
        shared = {word.place for word in words[i]} & {word.place for word in words[i + 1]}
        if shared:
            text = f"what is at {PLACES[min(shared)]}"
            pair = [(j, [next(q for q in questions(words[j]) if q.text == text)]) for j in (i, i + 1)]
            asked.append((SECOND_PAGE, pair))
    return asked


@torch.no_grad()
def ask(reader: Reader, samples: Sequence[Sample]) -> list[bool]:
    """Whether each sample's last answer is right, its end included.

    The most likely token is compared at every place of the expected answer: all of them are right exactly if
    greedy generation would give that answer."""
    return [given == expected for given, expected in answers(reader, samples)]


@torch.no_grad()
def answers(reader: Reader, samples: Sequence[Sample]) -> list[tuple[list[int], list[int]]]:
    """(most likely tokens, expected tokens) of each sample's last answer."""
    reader.model.eval()
    found = []
    for start in range(0, len(samples), ASKED_AT_ONCE):
        arguments = reader.arguments(samples[start : start + ASKED_AT_ONCE], only_last=True)
        with autocast(reader.device):
            output = reader.model(**arguments)
        lengths = (arguments["labels"][:, 1:] != IGNORE_INDEX).sum(1).tolist()
        given = output.answer_logits.argmax(-1).cpu().split(lengths)
        expected = output.answer_labels.cpu().split(lengths)
        found += [(g.tolist(), e.tolist()) for g, e in zip(given, expected, strict=True)]
    return found


def restored(size: Size, arm: str, seed: int, match: str, folder: Path) -> InfiMMHD:
    """The trained model of an arm, whole, its encoders from the warm-up."""
    model = build(size, arm, folder / "warm_up", seed)
    state = load_tensors(folder / "arms" / f"{arm}-{seed}-{match}.pt")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("vision.") for name in missing)
    return model.eval()

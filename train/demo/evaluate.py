"""Greedy answers on held-out photographs and strings, scored by exact match."""

import dataclasses

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from model import ImageProcessor, InfiMMHD, ProcessedImage

from .painted import FONT_SIZES, KINDS, SIDES, PaintedPhotographs, PaintedString, question_and_answer

LONGEST_ANSWER = 6
"""Four characters, the end token, and one to notice an answer that runs on."""

UNENDED = " ..."
"""Appended to an answer that did not end: it is no exact match, whatever it begins with."""

EVALUATION_SEED = 4242


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    index: int
    """Picture in the evaluation set."""
    kind: str
    side: int
    string: PaintedString
    question: str
    expected: str
    given: str

    @property
    def correct(self) -> bool:
        return self.given == self.expected


def evaluation_set(off_grid: bool = False, canvas: tuple[int, int] = (112, 112)) -> PaintedPhotographs:
    """Held-out photographs and strings, on the patch grid or placed anywhere."""
    return PaintedPhotographs(
        split="held_out", canvases=(canvas,), off_grid=1.0 if off_grid else 0.0, seed=EVALUATION_SEED
    )


@torch.no_grad()
def answer_questions(
    model: InfiMMHD,
    tokenizer: PreTrainedTokenizerFast,
    dataset: PaintedPhotographs,
    processor: ImageProcessor | None,
    num_images: int,
    kinds: tuple[str, ...] = KINDS,
    batch_images: int = 32,
) -> list[Answer]:
    """Asks every question of `kinds` about both strings of `num_images` pictures, each in its own prompt.

    `processor=None` withholds the image: the same samples without pixels and without `<image>`."""
    model.eval()
    asked = [(kind, side) for kind in kinds for side in range(len(SIDES))]
    answers = []
    for start in range(0, num_images, batch_images):
        indices = range(start, min(start + batch_images, num_images))
        painted = [dataset.painted(i) for i in indices]
        views = [processor.process(image.pixels) for image in painted] if processor is not None else None
        for kind, side in asked:
            pairs = [question_and_answer(kind, side, image.strings[side]) for image in painted]
            given = ask(model, tokenizer, [question for question, _ in pairs], views)
            answers += [
                Answer(i, kind, side, image.strings[side], question, expected, text)
                for i, image, (question, expected), text in zip(indices, painted, pairs, given, strict=True)
            ]
    return answers


def ask(
    model: InfiMMHD,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[str],
    views: list[ProcessedImage] | None,
) -> list[str]:
    """Greedy answers to one question per picture, or with `views=None` to the questions alone."""
    media = "" if views is None else "<image>"
    rows = [tokenizer(f"<bos> {media} {question}").input_ids for question in questions]
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    arguments = dict(
        input_ids=torch.tensor(
            [[tokenizer.pad_token_id] * n + row for n, row in zip(padding, rows, strict=True)]
        ),
        attention_mask=torch.tensor(
            [[False] * n + [True] * len(row) for n, row in zip(padding, rows, strict=True)]
        ),
        max_new_tokens=LONGEST_ANSWER,
    )
    if views is not None:
        arguments |= dict(
            pixel_values=torch.cat([view.pixel_values for view in views]),
            window_positions=torch.cat([view.window_positions for view in views]),
            windows_per_image=[len(view.pixel_values) for view in views],
            images_per_sample=[1] * len(views),
        )
    device = model.language.device
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    end = tokenizer.eos_token_id
    texts = []
    for row in model.generate(**arguments)[:, longest:].tolist():
        ended = row.index(end) if end in row else None
        texts.append(tokenizer.decode(row[:ended]) + ("" if ended is not None else UNENDED))
    return texts


def accuracy(answers: list[Answer], **conditions: object) -> float:
    """Share of exact matches among the answers with these attributes, e.g. `kind="colour"`."""
    chosen = [
        a.correct for a in answers if all(getattr(a, name) == value for name, value in conditions.items())
    ]
    if not chosen:
        raise ValueError(f"conditions must select at least one answer, got {conditions}")
    return float(np.mean(chosen))


def accuracy_by_length(answers: list[Answer]) -> dict[str, float]:
    """Accuracy on `characters` questions by length; strings of one digit are never held out."""
    by_length: dict[str, list[bool]] = {}
    for answer in answers:
        if answer.kind == "characters":
            by_length.setdefault(str(len(answer.string.text)), []).append(answer.correct)
    return {length: float(np.mean(correct)) for length, correct in sorted(by_length.items())}


def accuracy_by_size(answers: list[Answer]) -> dict[str, float]:
    """Accuracy on `characters` questions by the size of the type."""
    by_size = {}
    for name, font_size in FONT_SIZES.items():
        chosen = [a.correct for a in answers if a.kind == "characters" and a.string.font_size == font_size]
        by_size[name] = float(np.mean(chosen)) if chosen else float("nan")
    return by_size

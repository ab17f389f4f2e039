"""Greedy answers of a saved model, in batches of questions about images of like size."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model import InfiMMHD, InfiMMHDProcessor
from model.picture import load_pixels
from train.data.images import image_size

from .prompts import content_of
from .questions import Question

Bad = tuple[str, str]
"""(reason, message) of a question that cannot be asked."""


def load_processor(folder: Path) -> InfiMMHDProcessor:
    """ValueError naming --model if the folder holds none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model must be a folder with a saved model and processor, got {str(folder)!r}")
    try:
        return InfiMMHDProcessor.from_pretrained(folder)
    except (OSError, TypeError, KeyError) as error:
        raise ValueError(f"--model must hold a saved processor, got {str(folder)!r}: {error}") from error


def plan_batches(
    questions: Sequence[Question], processor: InfiMMHDProcessor, batch_size: int
) -> list[list[Question]]:
    """The questions that are not bad, `batch_size` together, sorted by their number of windows, which are
    counted from the headers of the images. Depends on nothing else, so that a run that goes on has the
    batches it would have had."""
    counts: dict[str, int] = {}

    def windows(image: Any) -> int:
        if isinstance(image, Path):
            if str(image) not in counts:
                counts[str(image)] = _windows(image, processor)
            return counts[str(image)]
        return _windows(image, processor)

    asked = [question for question in questions if question.bad is None]
    asked.sort(key=lambda question: sum(map(windows, question.images)))
    return [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]


def _windows(image: Any, processor: InfiMMHDProcessor) -> int:
    size = image_size(image)
    if size is None:  # missing or damaged: in the first batch, so that a run stops at it early
        return 0
    rows, columns = processor.image_processor.grid_of(*size)
    return 1 if (rows, columns) == (1, 1) else 1 + rows * columns


@dataclasses.dataclass(frozen=True, slots=True)
class Answerer:
    """Asks a model, each question in a conversation of its own."""

    model: InfiMMHD
    processor: InfiMMHDProcessor
    prompt_form: str
    max_new_tokens: int

    def __call__(self, questions: Sequence[Question]) -> dict[str, str | Bad]:
        """Answers by question id; for those that cannot be asked the reason: missing_image, bad_image,
        bad_text (what the processor refuses) or too_long (for the model's positions)."""
        found: dict[str, str | Bad] = {}
        pictures: dict[str, list[np.ndarray]] = {}
        for question in questions:
            try:
                pictures[question.id] = [load_pixels(image) for image in question.images]
            except ValueError as error:
                missing = any(isinstance(image, Path) and not image.is_file() for image in question.images)
                reason = "missing_image" if missing else "bad_image"
                found[question.id] = (reason, f"question {question.id}: {error}")
        found |= self._answers([q for q in questions if q.id in pictures], pictures)
        return found

    def _answers(
        self, questions: Sequence[Question], pictures: Mapping[str, list[np.ndarray]]
    ) -> dict[str, str | Bad]:
        if not questions:
            return {}
        try:
            inputs = self._inputs(questions, pictures)
        except ValueError:
            bad = {q.id: answer for q in questions if (answer := self._refusal(q, pictures)) is not None}
            if not bad:  # it is the batch as such, whose rows a tokenizer without a padding token cannot fill
                raise
            return bad | self._answers([q for q in questions if q.id not in bad], pictures)
        room = self.model.language.config.max_position_embeddings - self.max_new_tokens
        lengths = inputs["attention_mask"].sum(1).tolist()
        rule = f"be at most {room} tokens long for {self.max_new_tokens} new ones"
        too_long = {
            q.id: ("too_long", f"question {q.id}: prompt must {rule}, got {length}")
            for q, length in zip(questions, lengths, strict=True)
            if length > room
        }
        if too_long:
            return too_long | self._answers([q for q in questions if q.id not in too_long], pictures)
        inputs = inputs.to(self.model.device)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens)
        texts = self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])
        return {question.id: text for question, text in zip(questions, texts, strict=True)}

    def _refusal(self, question: Question, pictures: Mapping[str, list[np.ndarray]]) -> Bad | None:
        try:
            self._inputs([question], pictures)
        except ValueError as error:
            return "bad_text", f"question {question.id}: {error}"
        return None

    def _inputs(self, questions: Sequence[Question], pictures: Mapping[str, list[np.ndarray]]) -> Any:
        conversations, images = [], []
        for question in questions:
            parts = content_of(question, self.prompt_form)
            conversations.append([{"role": "user", "content": parts}])
            places = [part["number"] for part in parts if part["type"] == "image"]
            images.append([pictures[question.id][number] for number in places])
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"images": images},
        )

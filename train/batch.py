"""Samples -> token rows -> the model's keyword arguments, one optimizer step at a time."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model import IGNORE_INDEX, ImageProcessor, ProcessedImage

from .config import DataConfig
from .data import BadSample, Dataset, Sample, sample_index

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclasses.dataclass(slots=True)
class Row:
    """A sample as the model reads it."""

    input_ids: list[int]
    labels: list[int]
    image: ProcessedImage | None
    truncated: bool


@dataclasses.dataclass(slots=True)
class StepData:
    """What one rank trains on in one optimizer step."""

    micro_batches: list[dict[str, Tensor]]
    """Keyword arguments of the model, one dict an accumulation step."""
    num_answer_tokens: int = 0
    num_samples: int = 0
    num_truncated: int = 0
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Samples left out, by reason."""


class RowEncoder:
    """Turns a `Sample` into a `Row`.

    `prompt` "vicuna_v1": `system USER: <image>question ASSISTANT: answer<end> USER: question ASSISTANT: ...`;
    "plain": `<image> question answer <end> question answer <end> ...`. The tokenizer's BOS, if it has one,
    stands in front. `<image>` and `<end>` are inserted by id, whatever the tokenizer calls them, and are
    refused inside texts. Labels are the answers' tokens and their ends, by the characters they come from, so
    that no token boundary is guessed. A row longer than `sequence_length` is cut on the right; a row left
    without an answer token is a `BadSample`, like an unreadable image."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageProcessor,
        *,
        prompt: str,
        sequence_length: int,
        image_token_id: int,
        end_token_id: int,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer must be a fast one (it gives offsets), got {type(tokenizer).__name__}"
            )
        self.tokenizer, self.images = tokenizer, images
        self.prompt, self.sequence_length = prompt, sequence_length
        self.image_token_id, self.end_token_id = image_token_id, end_token_id

    def __call__(self, sample: Sample) -> Row:
        ids, labels = self._tokens(sample)
        truncated = len(ids) > self.sequence_length
        ids, labels = ids[: self.sequence_length], labels[: self.sequence_length]
        if all(label == IGNORE_INDEX for label in labels[1:]):
            rule = "prompt must leave room for an answer token"
            raise BadSample(
                "no_answer_left", f"{sample.origin}: {rule} in sequence_length, got {self.sequence_length}"
            )
        if sample.image is None:
            return Row(ids, labels, None, truncated)
        try:
            image = self.images(sample.image)
        except ValueError as error:
            raise BadSample("unreadable_image", f"{sample.origin}: {error}") from error
        return Row(ids, labels, image, truncated)

    def _tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        bos = self.tokenizer.bos_token_id
        ids = [] if bos is None else [bos]
        labels = [IGNORE_INDEX] * len(ids)
        for number, (question, answer) in enumerate(sample.turns):
            if not answer.strip():
                raise BadSample("empty_answer", f"{sample.origin}: answer {number + 1} must not be empty")
            first = number == 0
            before, between = self._prompt(question, first)
            if first and sample.image is not None:
                self._append(ids, labels, before, "", sample.origin)
                ids.append(self.image_token_id)
                labels.append(IGNORE_INDEX)
                before = ""
            self._append(
                ids, labels, before + between, " " + answer if before + between else answer, sample.origin
            )
            ids.append(self.end_token_id)
            labels.append(self.end_token_id)
        return ids, labels

    def _prompt(self, question: str, first: bool) -> tuple[str, str]:
        """Text before the image's place, and between it and the answer."""
        if self.prompt == "plain":
            return "", question
        system = VICUNA_SYSTEM + " " if first else ""
        return f"{system}USER: ", f"{question} ASSISTANT:"

    def _append(self, ids: list[int], labels: list[int], prompt: str, answer: str, origin: str) -> None:
        text = prompt + answer
        if not text:
            return
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for reserved in (self.image_token_id, self.end_token_id):
            if reserved in encoded["input_ids"]:
                name = self.tokenizer.convert_ids_to_tokens(reserved)
                raise BadSample(
                    "reserved_token", f"{origin}: text must not contain {name!r}, got {text[:120]!r}"
                )
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids.append(token)
            labels.append(token if answer and start >= len(prompt) else IGNORE_INDEX)


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Pads on the right and concatenates all windows: the keyword arguments of `model.InfiMMHD`.

    Without rows (every sample of this rank was skipped) it is one row of padding and no label: the model then
    runs all its parameters, as the other ranks do, and adds nothing to the loss."""
    rows = rows or [Row([pad_token_id, pad_token_id], [IGNORE_INDEX, IGNORE_INDEX], None, False)]
    shape = len(rows), max(len(row.input_ids) for row in rows)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORE_INDEX)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[i, :length] = torch.tensor(row.input_ids)
        labels[i, :length] = torch.tensor(row.labels)
        attention_mask[i, :length] = True
    images = [row.image for row in rows if row.image is not None]
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "images_per_sample": torch.tensor([int(row.image is not None) for row in rows]),
        "windows_per_image": torch.tensor([len(image.pixel_values) for image in images], dtype=torch.int64),
    }
    if images:
        batch["pixel_values"] = torch.cat([image.pixel_values for image in images])
        batch["window_positions"] = torch.cat([image.window_positions for image in images])
    return batch


class StepReader:
    """`reader(step)` -> the `StepData` of one rank; any step, in any order, always the same.

    The global batch of step s is positions s*G to (s+1)*G - 1 of the reading order; each rank takes its
    consecutive share of them and cuts it into accumulation steps."""

    def __init__(
        self,
        dataset: Dataset,
        encoder: RowEncoder,
        data: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        pad_token_id: int,
        rank: int,
        world_size: int,
    ) -> None:
        if len(dataset) < 1:
            raise ValueError(f"dataset must hold at least one sample, got length {len(dataset)}")
        self.dataset, self.encoder, self.data, self.seed = dataset, encoder, data, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.pad_token_id = pad_token_id
        self.share = global_batch_size // world_size
        self.offset = rank * self.share

    def __call__(self, step: int) -> StepData:
        result = StepData([])
        first = step * self.global_batch_size + self.offset
        for start in range(first, first + self.share, self.micro_batch_size):
            rows = []
            for position in range(start, start + self.micro_batch_size):
                try:
                    rows.append(self._row(position))
                except BadSample as error:
                    if self.data.on_bad_sample == "error":
                        raise
                    result.skipped[error.reason] += 1
            batch = collate(rows, self.pad_token_id)
            result.micro_batches.append(batch)
            result.num_samples += len(rows)
            result.num_truncated += sum(row.truncated for row in rows)
            # the model predicts token t from the tokens before it, so a label at 0 is never used
            result.num_answer_tokens += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        return result

    def _row(self, position: int) -> Row:
        index = sample_index(position, len(self.dataset), seed=self.seed, shuffle=self.data.shuffle)
        try:
            sample = self.dataset[index]
        except BadSample:
            raise
        except Exception as error:
            rule = f"dataset {type(self.dataset).__name__} must give sample {index}"
            got = f"{type(error).__name__}: {error} (data.options {self.data.options})"
            raise ValueError(f"{rule}, got {got}") from error
        if not sample.origin:
            sample = dataclasses.replace(sample, origin=f"sample {index}")
        return self.encoder(sample)


def prefetched(read: Callable[[int], Any], steps: range, workers: int) -> Iterator[Any]:
    """`read(step)` for each step, in order, up to `workers` + 1 steps ahead in threads; an exception is
    raised at its step's turn. Decoding, resizing and tokenising release the interpreter lock, so threads
    overlap."""
    if workers == 0:
        yield from map(read, steps)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="train-data")
    try:
        pending: collections.deque = collections.deque()
        for step in steps:
            pending.append(pool.submit(read, step))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

"""Samples -> token rows -> the model's keyword arguments, one optimizer step at a time."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model import IGNORE_INDEX, ImageProcessor, ProcessedImage
from model.processing import VICUNA_SYSTEM

from .config import DataConfig
from .data import IMAGE_MARK, BadSample, Dataset, Sample, balance
from .data.mixture import reading_order
from .data.samples import check_turns

_AROUND_MARK = re.compile(rf"\s*{re.escape(IMAGE_MARK)}\s*")


@dataclasses.dataclass(slots=True)
class Row:
    """A sample as the model reads it."""

    input_ids: list[int]
    labels: list[int]
    images: list[ProcessedImage]
    """Those whose marks stand in `input_ids`."""
    truncated: bool


@dataclasses.dataclass(slots=True)
class StepData:
    """What one rank trains on in one optimizer step."""

    micro_batches: list[dict[str, Tensor]]
    """Keyword arguments of the model, one dict an accumulation step."""
    num_answer_tokens: int = 0
    num_samples: int = 0
    num_truncated: int = 0
    num_images: int = 0
    num_windows: int = 0
    num_tokens: int = 0
    """Of the rows, without padding."""
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Reason and message of each sample left out."""
    plan_checksum: int = 0
    """CRC-32 of who reads what in this step; equal on every rank that sees the same data."""
    imbalance: float | None = None
    """Windows of the fullest forward of the global batch over the mean of all, as the headers of the images
    tell it; None where they were not read."""

    @property
    def skipped_by_reason(self) -> collections.Counter[str]:
        return collections.Counter(reason for reason, _ in self.skipped)


class RowEncoder:
    """Turns a `Sample` into a `Row`.

    `prompt` "vicuna_v1": `system USER: question ASSISTANT: answer<end> USER: question ASSISTANT: ...`;
    "plain": `question answer <end> question answer <end> ...`; a sample may ask for the other one. `<image>`
    in a question is the place of the next image; white space beside it is dropped. It becomes one token, or
    with `image_seq_length` that many for every window of its image, as models with concatenation need it.
    The tokenizer's BOS, if it has one, stands in front. `<image>` and `<end>` are inserted by id, whatever
    the tokenizer calls them, and are refused inside texts; the texts between them are tokenized one by one.
    Labels are the answers' tokens and their ends, by the characters they come from, so that no token boundary
    is guessed.

    A row longer than `sequence_length` is cut on the right, before an image that would be cut in two; images
    behind the cut are left out with their marks. `BadSample` for a row left without an answer token, an
    unreadable image, text that the tokenizer cannot read, and marks that are not as many as images."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageProcessor,
        *,
        prompt: str,
        sequence_length: int,
        image_token_id: int,
        end_token_id: int,
        image_seq_length: int | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer must be a fast one (it gives offsets), got {type(tokenizer).__name__}"
            )
        self.tokenizer, self.images = tokenizer, images
        self.prompt, self.sequence_length = prompt, sequence_length
        self.image_token_id, self.end_token_id = image_token_id, end_token_id
        self.image_seq_length = image_seq_length

    def __call__(self, sample: Sample) -> Row:
        check_turns(sample)
        row = _RowInMaking(self, sample)
        for number, (question, answer) in enumerate(sample.turns):
            row.add_turn(question, answer, first=number == 0)
        return row.finished()


class _RowInMaking:
    def __init__(self, encoder: RowEncoder, sample: Sample) -> None:
        self.encoder, self.origin = encoder, sample.origin
        self.prompt = encoder.prompt if sample.prompt is None else sample.prompt
        bos = encoder.tokenizer.bos_token_id
        self.ids: list[int] = [] if bos is None else [bos]
        self.labels = [IGNORE_INDEX] * len(self.ids)
        self.images: list[ProcessedImage] = []
        self.remaining = iter(sample.images)
        self.cut = encoder.sequence_length
        """Tokens that are kept."""

    def add_turn(self, question: str, answer: str, *, first: bool) -> None:
        # white space beside a mark is the record's way of writing, not the text's
        *others, last = _AROUND_MARK.split(question)
        before, behind = "", ""
        if self.prompt == "vicuna_v1":
            before, behind = (VICUNA_SYSTEM + " " if first else "") + "USER: ", " ASSISTANT:"
        for piece in others:
            self._add_text(before + piece, "")
            self._add_image()
            before = ""
        asked = before + last + behind
        self._add_text(asked, " " + answer if asked else answer)
        self.ids.append(self.encoder.end_token_id)
        self.labels.append(self.encoder.end_token_id)

    def finished(self) -> Row:
        truncated = len(self.ids) > self.cut
        ids, labels = self.ids[: self.cut], self.labels[: self.cut]
        if all(label == IGNORE_INDEX for label in labels[1:]):
            rule = "prompt must leave room for an answer token"
            length = self.encoder.sequence_length
            raise BadSample("no_answer_left", f"{self.origin}: {rule} in sequence_length, got {length}")
        return Row(ids, labels, self.images, truncated)

    def _add_image(self) -> None:
        image, start = next(self.remaining), len(self.ids)
        marks = 1
        if start < self.cut:
            try:
                processed = self.encoder.images.process(image)
            except ValueError as error:
                raise BadSample("unreadable_image", f"{self.origin}: {error}") from error
            if self.encoder.image_seq_length is not None:
                marks = len(processed.pixel_values) * self.encoder.image_seq_length
            if start + marks > self.cut:
                self.cut = start
            else:
                self.images.append(processed)
        self.ids += [self.encoder.image_token_id] * marks
        self.labels += [IGNORE_INDEX] * marks

    def _add_text(self, prompt: str, answer: str) -> None:
        text = prompt + answer
        if not text:
            return
        tokenizer = self.encoder.tokenizer
        try:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except Exception as error:  # tokenizers raises a bare one for a word outside the vocabulary
            rule = "text must be readable by the tokenizer"
            raise BadSample(
                "unreadable_text", f"{self.origin}: {rule}, got {text[:120]!r}: {error}"
            ) from error
        for reserved in (self.encoder.image_token_id, self.encoder.end_token_id):
            if reserved in encoded["input_ids"]:
                name = tokenizer.convert_ids_to_tokens(reserved)
                raise BadSample(
                    "reserved_token", f"{self.origin}: text must not contain {name!r}, got {text[:120]!r}"
                )
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            self.ids.append(token)
            self.labels.append(token if answer and start >= len(prompt) else IGNORE_INDEX)


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Pads on the right and concatenates all windows: the keyword arguments of `model.InfiMMHD`.

    Without rows (every sample of this rank was skipped) it is one row of padding and no label: the model then
    runs all its parameters, as the other ranks do, and adds nothing to the loss."""
    rows = rows or [Row([pad_token_id, pad_token_id], [IGNORE_INDEX, IGNORE_INDEX], [], False)]
    shape = len(rows), max(len(row.input_ids) for row in rows)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORE_INDEX)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[i, :length] = torch.tensor(row.input_ids)
        labels[i, :length] = torch.tensor(row.labels)
        attention_mask[i, :length] = True
    images = [image for row in rows for image in row.images]
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "images_per_sample": torch.tensor([len(row.images) for row in rows]),
        "windows_per_image": torch.tensor([len(image.pixel_values) for image in images], dtype=torch.int64),
    }
    if images:
        batch["pixel_values"] = torch.cat([image.pixel_values for image in images])
        batch["window_positions"] = torch.cat([image.window_positions for image in images])
    return batch


class StepReader:
    """`reader(step)` -> the `StepData` of one rank; any step, in any order, always the same.

    The global batch of step s is positions s*G to (s+1)*G - 1 of the reading order. They are dealt to ranks x
    accumulation steps so that every forward has `micro_batch_size` samples and, with `data.balance`
    "windows", about as many windows; every rank computes the same plan. Without it, or where a dataset cannot
    tell its images' sizes, each rank takes its consecutive share."""

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
        self.rank, self.accumulation = rank, global_batch_size // world_size // micro_batch_size

    def __call__(self, step: int) -> StepData:
        shares, imbalance = self._plan(step)
        result = StepData([], plan_checksum=balance.checksum(shares), imbalance=imbalance)
        first = self.rank * self.accumulation
        for share in shares[first : first + self.accumulation]:
            rows = []
            for index in share:
                try:
                    rows.append(self._row(index))
                except BadSample as error:
                    if self.data.on_bad_sample == "error":
                        raise
                    result.skipped.append((error.reason, str(error)))
            batch = collate(rows, self.pad_token_id)
            result.micro_batches.append(batch)
            result.num_samples += len(rows)
            result.num_truncated += sum(row.truncated for row in rows)
            result.num_images += len(batch["windows_per_image"])
            result.num_windows += int(batch["windows_per_image"].sum())
            result.num_tokens += sum(len(row.input_ids) for row in rows)
            # the model predicts token t from the tokens before it, so a label at 0 is never used
            result.num_answer_tokens += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        return result

    def _plan(self, step: int) -> tuple[list[list[int]], float | None]:
        """Dataset indices of every forward of the global batch, rank by rank, and their imbalance."""
        first = step * self.global_batch_size
        positions = range(first, first + self.global_batch_size)
        indices = reading_order(self.dataset, positions, self.seed, self.data.shuffle)
        costs = self._costs(indices)
        shares = balance.deal(costs or [0] * len(indices), len(indices) // self.micro_batch_size)
        plan = [[indices[place] for place in share] for share in shares]
        return plan, balance.imbalance(costs, shares) if costs else None

    def _costs(self, indices: list[int]) -> list[int] | None:
        """Windows of each sample; None if they are not asked for or the dataset cannot tell."""
        sizes_of = getattr(self.dataset, "image_sizes", None)
        if self.data.balance == "none" or sizes_of is None:
            return None
        if self.encoder.images.mode == "single":
            count = getattr(self.dataset, "num_images", lambda index: len(sizes_of(index)))
            return [self._asked(count, index) for index in indices]
        return [sum(map(self._num_windows, self._asked(sizes_of, index))) for index in indices]

    def _num_windows(self, size: tuple[int, int]) -> int:
        rows, columns = self.encoder.images.grid_of(*size)
        return rows * columns + (rows * columns > 1)

    def _row(self, index: int) -> Row:
        sample = self._asked(self.dataset.__getitem__, index)
        if not sample.origin:
            sample = dataclasses.replace(sample, origin=f"sample {index}")
        return self.encoder(sample)

    def _asked(self, method: Callable[[int], Any], index: int) -> Any:
        """`method(index)` of the dataset; what goes wrong in it, but for a bad sample, names the dataset."""
        try:
            return method(index)
        except BadSample:
            raise
        except Exception as error:
            rule = f"dataset {type(self.dataset).__name__} must give sample {index}"
            got = f"{type(error).__name__}: {error} (data.options {self.data.options})"
            raise ValueError(f"{rule}, got {got}") from error


def prefetched(read: Callable[[int], Any], steps: range, workers: int) -> Iterator[Any]:
    """`read(step)` for each step, in order, up to `workers` + 1 steps ahead in threads; an exception is
    raised at its step's turn. Decoding, resizing and tokenising release the interpreter lock, so threads
    overlap. Closing it does not wait for the steps that are being read."""
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
        pool.shutdown(wait=False, cancel_futures=True)

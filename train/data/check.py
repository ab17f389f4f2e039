"""Reads whole sets and says what is in them: counts, skips by reason, sizes of images, lengths of texts."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .mixture import Mixture
from .samples import IMAGE_MARK, BadSample, Dataset, Sample, check_turns, short

CHECK_WINDOW = 448
"""Side in pixels of the windows that are counted, at most 3 x 3 and a thumbnail."""
_MAX_EXAMPLES = 3
_PERCENTILES = (0, 50, 95, 100)


@dataclasses.dataclass(slots=True)
class SetReport:
    """What was found in one set."""

    name: str
    length: int
    """Samples of the set; `read` of them were read."""
    share: float | None = None
    """Of the mixture's samples."""
    good: int = 0
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """The first messages of each reason."""
    notes: list[str] = dataclasses.field(default_factory=list)
    images: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """Samples by their number of images."""
    sizes: collections.Counter[tuple[int, int]] = dataclasses.field(default_factory=collections.Counter)
    """Images by (height, width)."""
    windows: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """Samples by their number of windows of `CHECK_WINDOW` pixels."""
    lengths: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """Samples by the length of their text, in characters, or with a tokenizer in tokens."""
    unit: str = "characters"

    @property
    def read(self) -> int:
        return self.good + self.skipped.total()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; distributions by their minimum, median, 95th percentile and maximum."""
        return {
            "name": self.name,
            "length": self.length,
            "share": self.share,
            "read": self.read,
            "good": self.good,
            "skipped": dict(self.skipped.most_common()),
            "examples": self.examples,
            "notes": self.notes,
            "images_per_sample": spread(self.images),
            "image_height": spread(_side(self.sizes, 0)),
            "image_width": spread(_side(self.sizes, 1)),
            f"windows_of_{CHECK_WINDOW}": spread(self.windows),
            f"text_{self.unit}": spread(self.lengths),
        }


@dataclasses.dataclass(slots=True)
class _Checked:
    """One sample that was read: the numbers of a good one, or the reason and message of a bad one."""

    bad: tuple[str, str] | None = None
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    windows: int = 0
    length: int = 0


def check_dataset(
    dataset: Dataset,
    name: str,
    *,
    limit: int | None = None,
    workers: int = 0,
    tokenizer: Any = None,
    advance: Callable[[int], object] = lambda number: None,
) -> list[SetReport]:
    """A report of the dataset, or of every set of a mixture. Every image is decoded.

    `limit` reads that many samples of a set, spread evenly over it; an endless set needs one. `workers`
    threads decode. With a `tokenizer` of transformers lengths are in tokens. `advance` is called with the
    number of samples read since the last call. Only a `BadSample` is a skip: what else goes wrong in a
    dataset is raised."""
    if not isinstance(dataset, Mixture):
        return [_check_set(dataset, name, None, limit, workers, tokenizer, advance)]
    total = sum(dataset.quotas)
    return [
        _check_set(source, own, quota / total, limit, workers, tokenizer, advance)
        for own, source, quota in zip(dataset.names, dataset.sources, dataset.quotas, strict=True)
    ]


def num_read(length: int, limit: int | None) -> int:
    """Samples that a check of a set reads."""
    return length if limit is None else min(length, limit)


def _check_set(
    dataset: Dataset,
    name: str,
    share: float | None,
    limit: int | None,
    workers: int,
    tokenizer: Any,
    advance: Callable[[int], object],
) -> SetReport:
    length = len(dataset)
    if limit is None and length > 1 << 40:
        raise ValueError(f"--limit must be given for a set without an end, got None for {name!r}")
    report = SetReport(name, length, share, notes=list(getattr(dataset, "notes", ())))
    report.unit = "characters" if tokenizer is None else "tokens"
    number = num_read(length, limit)
    indices = (i * length // number for i in range(number))
    for checked in _mapped(lambda index: _checked(dataset, index, tokenizer), indices, workers):
        advance(1)
        if checked.bad is not None:
            reason, message = checked.bad
            report.skipped[reason] += 1
            examples = report.examples.setdefault(reason, [])
            if len(examples) < _MAX_EXAMPLES:
                examples.append(message)
            continue
        report.good += 1
        report.images[len(checked.sizes)] += 1
        report.sizes.update(checked.sizes)
        report.windows[checked.windows] += 1
        report.lengths[checked.length] += 1
    return report


def _checked(dataset: Dataset, index: int, tokenizer: Any) -> _Checked:
    from model import ImageProcessor
    from model.picture import load_pixels

    grid = ImageProcessor(window_size=CHECK_WINDOW, mode="dynamic").grid_of
    try:
        sample = dataset[index]
        origin = sample.origin = sample.origin or f"sample {index}"
        check_turns(sample)
        found = _Checked()
        for image in sample.images:
            try:
                height, width, _ = load_pixels(image).shape
            except ValueError as error:
                raise BadSample("unreadable_image", f"{origin}: {error}") from error
            rows, columns = grid(height, width)
            found.sizes.append((height, width))
            found.windows += rows * columns + (rows * columns > 1)
        found.length = _length(sample, origin, tokenizer)
    except BadSample as error:
        return _Checked((error.reason, str(error)))
    return found


def _length(sample: Sample, origin: str, tokenizer: Any) -> int:
    texts = [text.replace(IMAGE_MARK, "") for turn in sample.turns for text in turn]
    if tokenizer is None:
        return sum(map(len, texts))
    try:
        return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts if text)
    except Exception as error:  # tokenizers raises a bare one for a word outside the vocabulary
        rule = "text must be readable by the tokenizer"
        raise BadSample("unreadable_text", f"{origin}: {rule}, got {short(texts)}: {error}") from error


def _mapped(work: Callable[[int], _Checked], indices: Iterable[int], workers: int) -> Iterator[_Checked]:
    """`map` in threads, in order, with a bounded number of results waiting."""
    if workers == 0:
        yield from map(work, indices)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="check-data") as pool:
        indices = iter(indices)
        waiting = collections.deque(pool.submit(work, i) for i in itertools.islice(indices, 4 * workers))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(work, i) for i in itertools.islice(indices, 1))
                yield done
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _side(sizes: collections.Counter[tuple[int, int]], side: int) -> collections.Counter[int]:
    found: collections.Counter[int] = collections.Counter()
    for size, number in sizes.items():
        found[size[side]] += number
    return found


def spread(counts: collections.Counter[int]) -> dict[str, int] | None:
    """Minimum, median, 95th percentile and maximum of values that occur `counts` times; None without any."""
    if not counts:
        return None
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[int(value)] for value in values])
    places = [max(1, int(np.ceil(ends[-1] * p / 100))) for p in _PERCENTILES]
    found = values[np.searchsorted(ends, places)]
    return dict(zip(("min", "median", "p95", "max"), map(int, found), strict=True))

"""Argument checks of the model; each raises `ValueError("<argument> must <rule>, got <value>")`.

The numbers inside tensors are read on every device. On a GPU that waits for them, but `forward` and
`generate` wait for `input_ids` anyway to find the `<image>` tokens, and an id beyond the vocabulary would
otherwise be a device-side assertion that takes the process along."""

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

IGNORE_INDEX = -100
"""The label of a token that is not part of the loss."""


def require(condition: bool, argument: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{argument} must {rule}, got {value!r}")


def is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require_positive_ints(values: Mapping[str, object], prefix: str = "") -> None:
    for name, value in values.items():
        require(is_int(value, 1), prefix + name, "be a positive int", value)


def require_bool(argument: str, value: object) -> None:
    require(isinstance(value, bool), argument, "be True or False", value)


def require_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    rule = f"be one of {', '.join(map(repr, choices))}"
    require(isinstance(value, str) and value in choices, argument, rule, value)


def nearest_name(name: object, known: Iterable[str]) -> str:
    """The name of `known` that is most like `name`."""
    return difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)[0]


def require_known_keys(values: Mapping, known: Iterable[str], owner: str, prefix: str = "") -> None:
    known = sorted(known)
    for key in values:
        if key not in known:
            raise ValueError(
                f"key must be a field of {owner}, got {f'{prefix}{key}'!r}; "
                f"did you mean {nearest_name(key, known)!r}?"
            )


def is_finite(values: Tensor) -> bool:
    """No NaN and no infinity; the sum settles nearly every tensor without a temporary of its size."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def text_arguments(
    language: PreTrainedConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None = None,
    num_answer_tokens: int | Tensor | None = None,
    past: int = 0,
) -> Tensor | None:
    """Checks the arguments about the text, which has `past` tokens before it in a cache; `attention_mask` as
    bool."""
    vocab_size = language.vocab_size
    _require_tensor("input_ids", input_ids, (torch.int64, torch.int32), "an int64 or int32 tensor")
    shape = list(input_ids.shape)
    require(len(shape) == 2 and 0 not in shape, "input_ids", "have shape [batch, text_len], not empty", shape)
    limit = language.max_position_embeddings
    rule = f"be at most max_position_embeddings {limit} tokens long" + (
        f" with {past} before it" if past else ""
    )
    require(past + shape[1] <= limit, "input_ids", rule, shape)
    _require_values("input_ids", f"lie in 0..{vocab_size - 1}", input_ids, _outside(input_ids, vocab_size))
    if attention_mask is not None:
        dtypes = (torch.bool, torch.uint8, torch.int32, torch.int64)
        _require_tensor("attention_mask", attention_mask, dtypes, "a bool or integer tensor")
        if attention_mask.ndim == 4:  # transformers' generation made it, for a cache of fixed length
            return attention_mask
        whole = [shape[0], past + shape[1]]
        rule = (
            f"have the shape of input_ids {whole}"
            if not past
            else f"have shape [batch, past + text_len] {whole}"
        )
        require(list(attention_mask.shape) == whole, "attention_mask", rule, list(attention_mask.shape))
        if attention_mask.dtype != torch.bool:
            _require_values("attention_mask", "be 0 or 1", attention_mask, _outside(attention_mask, 2))
            attention_mask = attention_mask.bool()
    if labels is not None:
        _require_tensor("labels", labels, (torch.int64,), "an int64 tensor")
        _require_shape_of_input_ids("labels", labels, shape)
        wrong = _outside(labels, vocab_size) & (labels != IGNORE_INDEX)
        _require_values("labels", f"lie in 0..{vocab_size - 1} or be {IGNORE_INDEX}", labels, wrong)
    if isinstance(num_answer_tokens, Tensor):
        legal = num_answer_tokens.numel() == 1
        if legal and num_answer_tokens.device.type == "cpu":  # elsewhere reading it could stop a GPU
            legal = bool(num_answer_tokens > 0)
        require(legal, "num_answer_tokens", "be one positive number", num_answer_tokens)
    elif num_answer_tokens is not None:
        require_positive_ints({"num_answer_tokens": num_answer_tokens})
    return attention_mask


def vision_arguments(
    num_samples: int,
    pixel_values: Tensor | None,
    window_positions: Tensor | None,
    windows_per_image: Tensor | Sequence[int],
    images_per_sample: Tensor | Sequence[int] | None,
) -> tuple[list[int], list[int]]:
    """Checks the arguments about the images; windows of each image, images of each sample."""
    windows = _counts("windows_per_image", windows_per_image)
    images = [0] * num_samples
    if images_per_sample is not None:
        images = _counts("images_per_sample", images_per_sample)
    require(
        len(images) == num_samples, "images_per_sample", f"have one count per sample ({num_samples})", images
    )
    require(
        len(windows) == sum(images), "windows_per_image", f"have one count per image ({sum(images)})", windows
    )
    num_windows = 0
    if pixel_values is not None:
        require(
            isinstance(pixel_values, Tensor) and pixel_values.is_floating_point() and pixel_values.ndim == 4,
            "pixel_values",
            "be a floating tensor of shape [num_windows, 3, P, P]",
            _described(pixel_values),
        )
        num_windows = len(pixel_values)
    rule = f"be positive and sum to the {num_windows} windows of pixel_values"
    legal = sum(windows) == num_windows and min(windows, default=1) > 0
    require(legal, "windows_per_image", rule, windows)
    if num_windows:
        shape = [num_windows, 2]
        legal = isinstance(window_positions, Tensor) and list(window_positions.shape) == shape
        legal = legal and window_positions.dtype in (torch.int64, torch.int32)
        rule = f"be an integer tensor of shape {shape}"
        require(legal, "window_positions", rule, _described(window_positions))
        if is_readable(pixel_values) and not is_finite(pixel_values):
            bad = int((~pixel_values.isfinite()).sum())
            require(False, "pixel_values", "be finite", f"{bad} NaN or infinite values")
    return windows, images


def image_marks(is_image: Tensor, seqlens: Sequence[int], images_per_sample: Sequence[int]) -> None:
    """Checks that every sample [batch, text_len] has an `<image>` for each of its visual tokens."""
    first = 0
    found = is_image.sum(1).tolist()
    for sample, (marks, images) in enumerate(zip(found, images_per_sample, strict=True)):
        tokens = sum(seqlens[first : first + images])
        first += images
        rule = f"hold one <image> for each visual token of sample {sample} ({tokens} of {images} images)"
        require(marks == tokens, "input_ids", rule, marks)


def _counts(argument: str, values: Tensor | Sequence[int]) -> list[int]:
    entries = values.tolist() if hasattr(values, "tolist") else values
    legal = isinstance(entries, Sequence) and all(
        isinstance(n, numbers.Integral) and not isinstance(n, bool) and n >= 0 for n in entries
    )
    require(legal, argument, "be a list or 1-D tensor of integers of at least 0", entries)
    return [int(n) for n in entries]


def _require_tensor(argument: str, value: object, dtypes: tuple[torch.dtype, ...], rule: str) -> None:
    legal = isinstance(value, Tensor) and value.dtype in dtypes
    require(legal, argument, f"be {rule}", _described(value))


def _described(value: object) -> object:
    """Short of a tensor's numbers; other values as they are."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else value


def _require_shape_of_input_ids(argument: str, value: Tensor, shape: list[int]) -> None:
    require(list(value.shape) == shape, argument, f"have the shape of input_ids {shape}", list(value.shape))


def _outside(values: Tensor, end: int) -> Tensor:
    return (values < 0) | (values >= end)


def _require_values(argument: str, rule: str, values: Tensor, wrong: Tensor) -> None:
    if is_readable(values) and wrong.any():
        require(False, argument, rule, values[wrong][0].item())


def is_readable(values: Tensor) -> bool:
    """Whether the numbers can be read now: not being traced, not fake, not on the meta device."""
    return type(values) in (Tensor, nn.Parameter) and not values.is_meta and not torch.compiler.is_compiling()

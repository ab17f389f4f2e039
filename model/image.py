"""Image -> windows: resize to whole windows, cut row by row, thumbnail first, normalise."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .checks import is_finite_number, require, require_known_keys, require_positive_ints
from .picture import Picture, as_channels_first, load_pixels

# CLIP's normalisation, on values in 0..1
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

NO_POSITION = -1
"""Row and column of a window that gets no 2-D position: the thumbnail, or an image that is one window."""

MOST_WINDOWS_PER_SIDE = 16
"""The bound when `max_windows_per_side` is None: 7168 pixels in windows of 448."""

FIELDS = ("window_size", "mode", "max_windows_per_side", "resize", "mean", "std")
METADATA = ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map")
"""Keys that transformers writes beside the fields; they say nothing about the image."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessedImage:
    pixel_values: Tensor
    """[num_windows, 3, window_size, window_size] float32: the thumbnail, then the windows row by row."""
    window_positions: Tensor
    """[num_windows, 2] int64, (row, column) in the image's grid, (-1, -1) for no position."""


class ImageProcessor(BaseImageProcessor):
    """Cuts images into what the model reads; an image processor of transformers (saved, loaded, registered).

    `mode="single"`: the whole image resized to one window (stages PT and CPT). `mode="dynamic"`: both sides
    are resized to the nearest multiple of `window_size`, from one to `max_windows_per_side` windows, the
    windows are cut in row-major order and a thumbnail of the whole image stands before them; an image of one
    window is its own thumbnail and is not repeated. `max_windows_per_side=None` (inference in the paper) sets
    no limit but `MOST_WINDOWS_PER_SIDE`; a larger image is scaled down to it.

    `resize="stretch"` does not keep the aspect ratio (InfiMM-HD, section 3). "letterbox" keeps it: the image
    stands in the middle of its windows and the rest has the colour `mean`, rounded to 8 bits; the thumbnail
    likewise. `mean` and `std`, three numbers on values in 0..1, normalise: (value - mean) / std.

    Resizing is bicubic with antialiasing, on 8-bit values in torch: Pillow's bicubic, up to 2 of 255 levels
    where it rounds differently. The result depends on neither threads nor the processor's instruction set.
    Files are always decoded in full: the reduced decoding of JPEG, with a margin of two, was off by up to 4
    levels in the mean.

    What an image may be, and which are refused, `load_pixels` says. A bad setting, a key that is no field
    and a bad image are a ValueError."""

    model_input_names = ["pixel_values", "window_positions", "windows_per_image"]

    def __init__(
        self,
        *,
        window_size: int,
        mode: Literal["single", "dynamic"] = "single",
        max_windows_per_side: int | None = 3,
        resize: Literal["stretch", "letterbox"] = "stretch",
        mean: tuple[float, float, float] = CLIP_MEAN,
        std: tuple[float, float, float] = CLIP_STD,
        **metadata: Any,
    ) -> None:
        require_known_keys({k: v for k, v in metadata.items() if k not in METADATA}, FIELDS, "ImageProcessor")
        super().__init__()
        require_positive_ints({"window_size": window_size})
        require(mode in ("single", "dynamic"), "mode", "be 'single' or 'dynamic'", mode)
        if max_windows_per_side is not None:
            require_positive_ints({"max_windows_per_side": max_windows_per_side})
        require(resize in ("stretch", "letterbox"), "resize", "be 'stretch' or 'letterbox'", resize)
        _require_three_numbers("mean", "lie in 0..1", mean, lambda x: 0 <= x <= 1)
        _require_three_numbers("std", "are positive", std, lambda x: x > 0)
        self.window_size, self.mode = window_size, mode
        self.max_windows_per_side, self.resize = max_windows_per_side, resize
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(
        self, images: "Picture | list[Picture] | list[list[Picture]]", return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """All windows of one image, a list of images, or a list of lists, image after image.

        `pixel_values` [num_windows, 3, P, P] float32, `window_positions` [num_windows, 2] int64 and
        `windows_per_image` [num_images] int64; only the last one if there is no image. `return_tensors`:
        "pt" (None means the same) or "np"."""
        kind = getattr(return_tensors, "value", return_tensors)
        require(kind in ("pt", "np", None), "return_tensors", "be 'pt' or 'np'", return_tensors)
        processed = [self.process(image) for image in flat(images)]
        counts = [len(each.pixel_values) for each in processed]
        found = {"windows_per_image": torch.tensor(counts, dtype=torch.int64)}
        if processed:
            for name in ("pixel_values", "window_positions"):
                parts = [getattr(each, name) for each in processed]
                found[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        if kind == "np":
            found = {name: tensor.numpy() for name, tensor in found.items()}
        return BatchFeature({name: found[name] for name in self.model_input_names if name in found})

    preprocess = __call__

    def process(self, image: Picture) -> ProcessedImage:
        """The windows of one image; ValueError with the file's name if it cannot be read. Thread-safe."""
        pixels = as_channels_first(load_pixels(image))  # [3, height, width] uint8
        rows, columns = self.grid_of(*pixels.shape[1:])
        size = self.window_size
        cut = (rows, columns) != (1, 1)
        out = torch.empty(1 + rows * columns * cut, 3, size, size)
        positions = torch.full((len(out), 2), NO_POSITION)
        # x / 255 is normalised by one product and one sum
        scale = torch.tensor([1 / (255 * std) for std in self.std]).view(3, 1, 1)
        offset = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)]).view(3, 1, 1)
        # window by window, so that the second and third pass over its numbers find them in the cache
        out[0].copy_(self._fitted(pixels, size, size)).mul_(scale).add_(offset)
        if cut:
            whole = self._fitted(pixels, rows * size, columns * size)
            for row, column, window, position in _cells(rows, columns, out[1:], positions[1:]):
                place = whole[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
                window.copy_(place).mul_(scale).add_(offset)
                position[0], position[1] = row, column
        return ProcessedImage(out, positions)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows for an image of this size in pixels."""
        if self.mode == "single":
            return 1, 1
        most = MOST_WINDOWS_PER_SIDE if self.max_windows_per_side is None else self.max_windows_per_side
        nearest = (int(side / self.window_size + 0.5) for side in (height, width))
        rows, columns = (min(max(n, 1), most) for n in nearest)
        return rows, columns

    def _fitted(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """uint8 [3, any, any] -> [3, height, width]."""
        if self.resize == "stretch":
            return _resized(pixels, height, width)
        scale = min(height / pixels.shape[1], width / pixels.shape[2])
        inner = [max(1, int(side * scale + 0.5)) for side in pixels.shape[1:]]
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        colour = torch.tensor([int(255 * m + 0.5) for m in self.mean], dtype=torch.uint8).view(3, 1, 1)
        canvas = colour.repeat(1, height, width)
        canvas[:, top : top + inner[0], left : left + inner[1]] = _resized(pixels, *inner)
        return canvas

    def to_dict(self) -> dict[str, Any]:
        """The fields and the class's name."""
        return {name: getattr(self, name) for name in FIELDS} | {"image_processor_type": type(self).__name__}

    @classmethod
    def from_dict(
        cls, image_processor_dict: dict[str, Any], **kwargs: Any
    ) -> "ImageProcessor | tuple[ImageProcessor, dict[str, Any]]":
        """From what `to_dict` gives, with those of `kwargs` that are fields in their place. The others are
        left alone, as everywhere in transformers: `AutoProcessor` hands the tokenizer's over as well."""
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        fields = image_processor_dict | {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        require("window_size" in fields, "window_size", "be given", sorted(fields))
        processor = cls(**fields)
        return (processor, kwargs) if return_unused_kwargs else processor


def flat(images: "Picture | list[Picture] | list[list[Picture]]") -> Iterator[Picture]:
    """The images one by one, out of lists and tuples of any depth."""
    if isinstance(images, (list, tuple)):
        for each in images:
            yield from flat(each)
    else:
        yield images


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[1:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)[0]


def _cells(rows: int, columns: int, *per_window: Tensor) -> Iterator[tuple]:
    """(row, column, entry of each tensor), row by row."""
    places = [(row, column) for row in range(rows) for column in range(columns)]
    for place, *entries in zip(places, *per_window, strict=True):
        yield *place, *entries


def _require_three_numbers(argument: str, rule: str, values: Any, legal) -> None:
    numbers = isinstance(values, (list, tuple)) and len(values) == 3 and all(map(is_finite_number, values))
    require(numbers and all(map(legal, values)), argument, f"be three numbers that {rule}", values)

"""Image -> windows: decode, resize to whole windows, cut row by row, thumbnail first, normalise."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .checks import require, require_positive_ints

# CLIP's normalisation, on values in 0..1
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

NO_POSITION = -1
"""Row and column of a window that gets no 2-D position: the thumbnail, or an image that is one window."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessedImage:
    pixel_values: Tensor
    """[num_windows, 3, window_size, window_size] float32: the thumbnail, then the windows row by row."""
    window_positions: Tensor
    """[num_windows, 2] int64, (row, column) in the image's grid, (-1, -1) for no position."""


@dataclasses.dataclass(kw_only=True, slots=True)
class ImageProcessor:
    """Cuts an image into what the model reads.

    `mode="single"`: the whole image resized to one window (stages PT and CPT). `mode="dynamic"`: both sides
    are resized to the nearest multiple of `window_size`, from one to `max_windows_per_side` windows, the
    windows are cut in row-major order and a thumbnail of the whole image stands before them; an image of one
    window is its own thumbnail and is not repeated. The aspect ratio is not kept (InfiMM-HD, section 3).

    Takes a path, a PIL image, or an array or tensor [height, width, 3], uint8 or floating 0..1. A picture of
    16-bit grey is scaled to 8 bits, one of floating grey has to lie in 0..1, and a transparent one is laid on
    white, so that colours hidden under the transparency stay hidden. A file that cannot be read, an empty
    image and a value out of range or not finite are a ValueError that names the file and the rule."""

    window_size: int
    mode: Literal["single", "dynamic"] = "single"
    max_windows_per_side: int = 3
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        require_positive_ints({name: getattr(self, name) for name in ("window_size", "max_windows_per_side")})
        require(self.mode in ("single", "dynamic"), "mode", "be 'single' or 'dynamic'", self.mode)

    def __call__(self, image: "str | os.PathLike | Image.Image | np.ndarray | Tensor") -> ProcessedImage:
        picture = load_image(image)
        rows, columns = self.grid_of(picture.height, picture.width)
        size = self.window_size
        views, positions = [_resized(picture, size, size)], [(NO_POSITION, NO_POSITION)]
        if (rows, columns) != (1, 1):
            whole = _resized(picture, columns * size, rows * size)
            windows = whole.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
            views.extend(windows)
            positions += [(row, column) for row in range(rows) for column in range(columns)]
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).to(torch.float32)
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255.0 for v in (self.mean, self.std))
        return ProcessedImage(((pixels - mean) / std).contiguous(), torch.tensor(positions))

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows for an image of this size in pixels."""
        if self.mode == "single":
            return 1, 1
        nearest = (int(side / self.window_size + 0.5) for side in (height, width))
        rows, columns = (min(max(n, 1), self.max_windows_per_side) for n in nearest)
        return rows, columns


def load_image(image: "str | os.PathLike | Image.Image | np.ndarray | Tensor") -> Image.Image:
    """Decodes to an upright RGB picture; ValueError names the file, the rule and what was found."""
    if isinstance(image, (str, os.PathLike)):
        return _load_file(Path(image))
    if isinstance(image, Image.Image):
        if min(image.size) == 0:
            raise ValueError(f"image must have at least one pixel, got size {image.size}")
        return _rgb(image, f"a PIL image of mode {image.mode}")
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()  # NumPy has no bfloat16
    if isinstance(image, np.ndarray):
        return _load_array(image)
    raise ValueError(f"image must be a path, PIL image, array or tensor, got {type(image).__name__}")


def _load_file(path: Path) -> Image.Image:
    if not path.is_file():
        raise ValueError(f"image must be an existing file, got {str(path)!r}")
    try:
        with Image.open(path) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
    # Pillow reports a damaged file through many types; all mean the same to the caller
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"image must be a readable picture, got {str(path)!r}: {error}") from error
    return _rgb(picture, repr(str(path)))


def _rgb(picture: Image.Image, name: str) -> Image.Image:
    """8-bit RGB on white. PIL's own conversion clips 16-bit and floating grey at 255 and drops the alpha."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _eight_bit_grey(picture, name)
    try:
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except ValueError as error:
        raise ValueError(f"image must be convertible to RGB, got {name}: {error}") from error


def _eight_bit_grey(picture: Image.Image, name: str) -> Image.Image:
    highest = 1 if picture.mode == "F" else 65535
    values = np.asarray(picture).astype(np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= highest):  # NaN is refused too
        rule = f"lie in 0..{highest} in PIL's mode {picture.mode}"
        raise ValueError(f"image must {rule}, got {low:g}..{high:g} in {name}")
    values[values == picture.info.get("transparency")] = highest  # the colour that stands for "nothing"
    return Image.fromarray((values * (255 / highest) + 0.5).astype(np.uint8))


def _load_array(array: np.ndarray) -> Image.Image:
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"image must have shape [height, width, 3] and not be empty, got {list(array.shape)}"
        )
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"image must be uint8 or floating, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"image must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite values"
        )
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"image must lie in 0..1 when floating, got {array.min()}..{array.max()}")
    return Image.fromarray((array * 255.0 + 0.5).astype(np.uint8))


def _resized(picture: Image.Image, width: int, height: int) -> np.ndarray:
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)

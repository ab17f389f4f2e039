"""Any picture -> upright 8-bit RGB pixels; whatever is wrong with it is a ValueError that names it."""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .checks import require

Picture: TypeAlias = (
    "str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray | Tensor"
)

MAX_PIXELS = 89_478_485
"""Largest picture that is read, in pixels: where Pillow begins to warn of a decompression bomb. Pillow's own
limit is twice as high, can be switched off, and is one global variable for all threads."""

MAX_SIDE = 65_535
"""Longest side that is read, in pixels, as in a JPEG file: resizing costs memory in proportion to it."""

FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM"),  # first those that Pillow has loaded already
    *("WEBP", "TIFF", "AVIF", "JPEG2000", "DIB", "ICO", "PCX", "QOI", "TGA"),
)
"""Pillow's names of the formats that are read. Without a list it would start Ghostscript for an EPS file."""

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture has to be turned."""


def load_pixels(image: Picture) -> np.ndarray:
    """The pixels [height, width, 3], uint8, RGB; to be read only, as they may be the caller's own.

    `image`: a path, the bytes of a file, an open binary file, a PIL image, or an array or tensor
    [height, width, 3], uint8 or floating 0..1. Of an animation it is the first frame. Turned upright by its
    EXIF orientation, if it has one; 16-bit grey is scaled to 8 bits, floating grey has to lie in 0..1, and a
    transparent picture is laid on white, so that colours hidden under the transparency stay hidden. Damaged
    metadata beside whole pixels is only warned of, by Pillow.
    Everything else, and every picture that is damaged, empty or larger than `MAX_PIXELS` and `MAX_SIDE`, is
    a ValueError with the file's name and the rule."""
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        require(os.path.isfile(path), "image", "be an existing file", path)
        return _from_file(path, repr(path))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(image), f"{len(image)} bytes")
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, Tensor):
        image = _tensor_as_array(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if callable(getattr(image, "read", None)):
        return _from_file(image, repr(getattr(image, "name", None) or type(image).__name__))
    rule = "be a path, bytes, an open binary file, a PIL image, an array or a tensor"
    raise ValueError(f"image must {rule}, got {type(image).__name__}")


def as_channels_first(pixels: np.ndarray) -> Tensor:
    """[height, width, 3] -> the same memory as [3, height, width]; to be read only."""
    if not pixels.flags.writeable:
        pixels = np.asarray(_CalledWriteable(pixels))
    return torch.from_numpy(pixels).permute(2, 0, 1)


class _CalledWriteable:
    """torch warns of memory that it must not write to, even if nobody will, and a copy would take as long as
    a quarter of the resizing."""

    def __init__(self, array: np.ndarray) -> None:
        self._owner = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _from_file(file: str | bytes | BinaryIO, name: str) -> np.ndarray:
    with _readable(name):
        opened = Image.open(file, formats=FORMATS)
    with opened:
        _require_size(opened.size, name)
        with _readable(name):
            opened.load()
            picture = _upright(opened)
        _require_size(picture.size, name)  # the pixels of an icon may be of another size than it says
        return _rgb(picture, name)


def _from_pil(picture: Image.Image) -> np.ndarray:
    name = getattr(picture, "filename", "") or f"a PIL image of mode {picture.mode}"
    _require_size(picture.size, name)
    with _readable(name):
        picture.load()
        picture = _upright(picture)
    return _rgb(picture, name)


@contextlib.contextmanager
def _readable(name: str, rule: str = "be a readable picture") -> Iterator[None]:
    try:
        yield
    # Pillow reports damage through a dozen types, warnings turned into errors among them; to the caller they
    # are one thing
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its text holds the address of an object
            reason = "it is in no known image format"
        raise ValueError(f"image must {rule}, got {name}: {reason}") from error


def _require_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    found = f"{width} x {height} in {name}"
    if min(size) < 1:
        raise ValueError(f"image must have at least one pixel, got {found}")
    if width * height > MAX_PIXELS:
        raise ValueError(f"image must have at most {MAX_PIXELS} pixels, got {found}")
    if max(size) > MAX_SIDE:
        raise ValueError(f"image must have sides of at most {MAX_SIDE} pixels, got {found}")


def _upright(picture: Image.Image) -> Image.Image:
    # Pillow's function copies the picture even if there is nothing to turn
    turned = picture.getexif().get(ORIENTATION, 1) != 1
    return ImageOps.exif_transpose(picture) if turned else picture


def _rgb(picture: Image.Image, name: str) -> np.ndarray:
    """8-bit RGB on white. PIL's own conversion clips 16-bit and floating grey at 255 and drops the alpha."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _eight_bit_grey(picture, name)
    with _readable(name, "be convertible to RGB"):
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _eight_bit_grey(picture: Image.Image, name: str) -> Image.Image:
    highest = 1 if picture.mode == "F" else 65535
    values = np.asarray(picture).astype(np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= highest):  # NaN is refused too
        rule = f"lie in 0..{highest} in PIL's mode {picture.mode}"
        raise ValueError(f"image must {rule}, got {low:g}..{high:g} in {name}")
    key = picture.info.get("transparency")  # the colour that stands for "nothing"
    if isinstance(key, (int, float)):
        values[values == key] = highest
    return Image.fromarray((values * (255 / highest) + 0.5).astype(np.uint8))


def _tensor_as_array(tensor: Tensor) -> np.ndarray:
    try:
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.float()  # NumPy has no bfloat16
        return tensor.numpy()
    except (RuntimeError, TypeError) as error:  # on the meta device, sparse, of a dtype without numbers
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"image must be a dense tensor of readable numbers, got {found}: {error}") from error


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"image must have shape [height, width, 3] and not be empty, got {list(array.shape)}"
        )
    _require_size((array.shape[1], array.shape[0]), "an array")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"image must be uint8 or floating, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"image must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite values"
        )
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"image must lie in 0..1 when floating, got {array.min()}..{array.max()}")
    return (array * 255.0 + 0.5).astype(np.uint8, order="C")

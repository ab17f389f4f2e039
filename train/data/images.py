"""Images as references: files, members of archives, base64 text; opened when they are needed."""

import base64
import binascii
import io
from pathlib import Path
from typing import Any

from .samples import BadSample, short


def existing_image(image_root: Path, name: Any, origin: str) -> Path:
    """The path of the image `name` under `image_root`; `BadSample` if it is no name or no file is there."""
    if not isinstance(name, str) or not name:
        raise BadSample("missing_image", f"{origin}: image must be a file name, got {short(name)}")
    path = image_root / name
    try:
        exists = path.is_file()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL in it
        exists = False
    if not exists:
        raise BadSample("missing_image", f"{origin}: image must be an existing file, got {short(str(path))}")
    return path


def existing_folder(image_root: str | Path | None, default: Path) -> Path:
    """`image_root`, or `default` if it is None; ValueError if it is no folder."""
    folder = default if image_root is None else Path(image_root)
    if not folder.is_dir():
        raise ValueError(f"data.image_root must be an existing folder, got {str(image_root)!r}")
    return folder


class EncodedImage:
    """Bytes of an image file that are fetched by `read`; Pillow and `model.ImageProcessor` take it as a file.

    It has no other method of files, on purpose: Pillow then reads it once, as a whole."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name
        """For error messages."""

    def read(self) -> bytes:
        raise NotImplementedError


class FilePart(EncodedImage):
    """`size` bytes at `offset` of the file `path`."""

    __slots__ = ("path", "offset", "size")

    def __init__(self, name: str, path: Path, offset: int, size: int) -> None:
        super().__init__(name)
        self.path, self.offset, self.size = path, offset, size

    def read(self) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            found = bytearray()
            while len(found) < self.size and (piece := file.read(self.size - len(found))):
                found += piece
        return bytes(found)


class Base64Image(EncodedImage):
    __slots__ = ("text",)

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name)
        self.text = text

    def read(self) -> bytes:
        try:
            return base64.b64decode(self.text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"must be base64: {error}") from error


def image_size(image: Any) -> tuple[int, int] | None:
    """(height, width) of the upright image from its header, without decoding it; None if it has none."""
    from PIL import Image

    from model.picture import FORMATS, ORIENTATION

    shape = getattr(image, "shape", None)
    if shape is not None:
        return (shape[0], shape[1]) if len(shape) == 3 else None
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, (bytes, bytearray)):
        image = io.BytesIO(image)
    try:
        if isinstance(image, EncodedImage):
            image = io.BytesIO(image.read())
        with Image.open(image, formats=FORMATS) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # damage has a dozen types in Pillow; whoever decodes the image names it
        return None
    return (width, height) if turned else (height, width)

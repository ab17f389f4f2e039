"""Damaged files: whatever is wrong with the bytes, a picture or a ValueError comes out, soon."""

import io
import time

import numpy as np
import pytest
import skimage.data
from PIL import Image

from model import ImageProcessor
from model.picture import load_pixels

SAVED = {
    "jpeg": ("JPEG", {"quality": 80}),
    "progressive jpeg": ("JPEG", {"quality": 80, "progressive": True, "subsampling": 0}),
    "cmyk jpeg": ("JPEG", {}),
    "png": ("PNG", {}),
    "palette png": ("PNG", {}),
    "webp": ("WEBP", {"quality": 70}),
    "lossless webp": ("WEBP", {"lossless": True, "method": 0}),
    "gif": ("GIF", {}),
    "raw tiff": ("TIFF", {}),
    "deflated tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "lzw tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "jpeg tiff": ("TIFF", {"compression": "jpeg"}),
    "bmp": ("BMP", {}),
    "avif": ("AVIF", {"speed": 10}),
    "jpeg 2000": ("JPEG2000", {}),
}
PER_KIND = 60

# of metadata that Pillow could not read; the pixels are what counts
pytestmark = pytest.mark.filterwarnings("ignore")

MODES = {"cmyk jpeg": "CMYK", "palette png": "P", "gif": "P", "lossless webp": "RGBA"}


def original(kind: str) -> bytes:
    picture = Image.fromarray(skimage.data.chelsea()[::8, ::8]).convert(MODES.get(kind, "RGB"))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    format_, options = SAVED[kind]
    if format_ in ("JPEG", "WEBP", "PNG"):
        options = options | {"exif": exif}
    picture.save(file, format_, **options)
    return file.getvalue()


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """One of six accidents; half of those that change bytes hit the header, where they do most."""
    found = bytearray(data)
    accident = random.integers(6)
    reach = min(len(found), 400) if random.random() < 0.5 else len(found)
    if accident == 0:
        return bytes(found[: random.integers(len(found))])
    if accident == 1:
        for place in random.integers(reach, size=random.integers(1, 12)):
            found[place] = random.integers(256)
    elif accident == 2:
        start = random.integers(reach)
        del found[start : start + random.integers(1, 64)]
    elif accident == 3:
        start = random.integers(reach)
        found[start:start] = random.bytes(random.integers(1, 64))
    elif accident == 4:
        start, value = random.integers(reach), (0, 255)[random.integers(2)]
        found[start : start + 8] = bytes([value]) * 8
    else:
        for place in random.integers(reach, size=3):
            found[place] ^= 1 << random.integers(8)
    return bytes(found)


@pytest.mark.parametrize("kind", SAVED)
def test_only_value_errors_come_out(kind):
    random = np.random.default_rng(sorted(SAVED).index(kind))
    data = original(kind)
    processor = ImageProcessor(window_size=16, mode="dynamic")
    assert len(load_pixels(data)) in (38, 57)  # as it is, it can be read
    refused = 0
    for number in range(PER_KIND):
        broken = damaged(data, random)
        start = time.perf_counter()
        try:
            pixels = processor.process(broken).pixel_values
        except ValueError as error:
            refused += 1
            assert str(error).startswith("image must "), (number, error)
        else:
            assert pixels.isfinite().all() and pixels.shape[1:] == (3, 16, 16), number
        assert time.perf_counter() - start < 20, number
    assert refused > PER_KIND // 10


def test_noise_behind_every_signature():
    random = np.random.default_rng(0)
    for signature in (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\x40\0\0\0WEBPVP8 ",
        b"II*\0",
        b"BM",
    ):
        for length in (0, 1, 30, 500):
            with pytest.raises(ValueError, match="image must "):
                load_pixels(signature + random.bytes(length))

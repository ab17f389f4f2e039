"""Decoding: every kind of picture becomes upright RGB, every bad one a ValueError that says which and why."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from model import ImageProcessor
from model.picture import MAX_PIXELS, MAX_SIDE, load_pixels


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.fromarray(np.zeros((8, 24, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to stand upright
    picture.save(tmp_path / "turned.jpg", exif=exif)
    processed = ImageProcessor(window_size=8, mode="dynamic").process(tmp_path / "turned.jpg")
    assert processed.window_positions[1:].tolist() == [[0, 0], [1, 0], [2, 0]]


def test_grey_and_transparent_pictures_become_rgb():
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert ImageProcessor(window_size=4).process(Image.new(mode, (4, 4))).pixel_values.shape == (
            1,
            3,
            4,
            4,
        )


def grey_of(image) -> list[int]:
    picture = load_pixels(image)
    assert (picture == picture[..., :1]).all()
    return picture[0, :, 0].tolist()


def test_sixteen_bit_and_floating_grey_is_scaled(tmp_path):
    """PIL clips at 255 instead, so that every 16-bit scan was a white page."""
    values = np.array([[0, 257, 32767, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "scan.png")
    big_endian = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    for same in (tmp_path / "scan.png", Image.fromarray(values.astype(np.int32)), big_endian):
        assert grey_of(same) == [0, 1, 127, 255]
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / "scan.tif")
    assert grey_of(tmp_path / "scan.tif") == [0, 1, 127, 255]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.array([[0, 65536]], np.int32), "0..65535 in PIL's mode I, got 0..65536"),
        (np.array([[-1, 7]], np.int32), "0..65535 in PIL's mode I, got -1..7"),
        (np.array([[0, 255]], np.float32), "0..1 in PIL's mode F, got 0..255"),
        (np.array([[0, np.nan]], np.float32), "0..1 in PIL's mode F, got nan..nan"),
    ],
)
def test_grey_of_unknown_range_names_the_file(tmp_path, values, found):
    """NaN turned into some grey, and large numbers into white."""
    Image.fromarray(values).save(tmp_path / "scan.tif")
    with pytest.raises(ValueError, match=f"image must lie in {found} in .*scan.tif"):
        load_pixels(tmp_path / "scan.tif")


def test_colours_under_transparency_stay_hidden(tmp_path):
    """Dropping the alpha showed whatever colour an editor had left there; now it is white paper."""
    hidden = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [0, 0, 0, 102]]], np.uint8)
    Image.fromarray(hidden).save(tmp_path / "logo.png")
    picture = load_pixels(tmp_path / "logo.png")
    assert picture[0].tolist() == [[255, 255, 255], [200, 0, 0], [153, 153, 153]]
    Image.fromarray(np.array([[0, 257]], np.uint16)).save(tmp_path / "key.png", transparency=257)
    assert grey_of(tmp_path / "key.png") == [0, 255]
    Image.new("P", (1, 1)).save(tmp_path / "key.gif", transparency=0)
    assert grey_of(tmp_path / "key.gif") == [255]


def test_bfloat16_tensors_are_pictures():
    """NumPy has no bfloat16, so this was a TypeError."""
    assert grey_of(torch.tensor([0.0, 0.5, 1.0], dtype=torch.bfloat16).view(1, 3, 1).expand(1, 3, 3)) == [
        0,
        128,
        255,
    ]


def test_bad_images_name_the_file_and_the_rule(tmp_path):
    processor = ImageProcessor(window_size=8)
    good = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(good).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:700])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    for name in ("cut.jpg", "empty.png", "text.jpg"):
        with pytest.raises(ValueError, match=f"image must be a readable picture, got .*{name}"):
            processor.process(tmp_path / name)
    with pytest.raises(ValueError, match="image must be an existing file, got .*absent.jpg"):
        processor.process(tmp_path / "absent.jpg")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), np.nan), "image must be finite, got 48 NaN"),
        (np.full((4, 4, 3), 2.0), "image must lie in 0..1 when floating, got 2.0..2.0"),
        (np.zeros((0, 4, 3), np.uint8), r"image must have shape .* not be empty, got \[0, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), r"image must have shape .*, got \[4, 4\]"),
        (np.zeros((4, 4, 3), np.int64), "image must be uint8 or floating, got int64"),
        (Image.new("La", (1, 1)), "image must be convertible to RGB, got a PIL image of mode La"),
        (7, "image must be a path, bytes, an open binary file, a PIL image, an array or a tensor, got int"),
    ],
)
def test_bad_values_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor(window_size=4).process(image)


def png_of(width: int, height: int) -> bytes:
    """A PNG file that says it is so large; its pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (10_000, 9_000, f"image must have at most {MAX_PIXELS} pixels, got 10000 x 9000 in '.*bomb.png'"),
        (20_000, 20_000, "image must be a readable picture, got '.*bomb.png': .*decompression bomb"),
        (MAX_SIDE + 1, 1, f"image must have sides of at most {MAX_SIDE} pixels, got 65536 x 1 in"),
        (9_000, 9_000, "image must be a readable picture, got '.*bomb.png': "),  # allowed, but truncated
    ],
)
@pytest.mark.parametrize("limit", [None, "default"])
def test_decompression_bombs(tmp_path, monkeypatch, width, height, message, limit):
    """Pillow only warns up to twice its limit, and its limit can be switched off."""
    if limit is None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        message = message.replace(
            "image must be a readable picture, got '.*bomb.png': .*decompression bomb", "at most"
        )
    (tmp_path / "bomb.png").write_bytes(png_of(width, height))
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            load_pixels(tmp_path / "bomb.png")
    assert Image.MAX_IMAGE_PIXELS is before
    with warnings.catch_warnings():  # a warning turned into an error is no other exception
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="image must"):
            load_pixels(tmp_path / "bomb.png")


def test_arrays_and_pictures_have_the_same_limits():
    line = np.zeros((1, 1, 3), np.uint8)
    with pytest.raises(ValueError, match=f"sides of at most {MAX_SIDE} pixels, got 65536 x 1 in an array"):
        load_pixels(np.broadcast_to(line, (1, MAX_SIDE + 1, 3)))
    with pytest.raises(ValueError, match="at most .* pixels, got 10000 x 10000 in an array"):
        load_pixels(np.broadcast_to(line, (10_000, 10_000, 3)))
    with pytest.raises(ValueError, match="image must have at least one pixel, got 0 x 3 in a PIL image"):
        load_pixels(Image.new("RGB", (0, 3)))
    assert (
        ImageProcessor(window_size=8).process(np.zeros((1, MAX_SIDE, 3), np.uint8)).pixel_values.shape[0] == 1
    )


MODES = (
    "1",
    "L",
    "LA",
    "PA",
    "P",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "CMYK",
    "YCbCr",
    "HSV",
    "I",
    "I;16",
    "I;16B",
    "F",
)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    pixels = load_pixels(Image.new(mode, (5, 4)))
    assert pixels.shape == (4, 5, 3) and pixels.dtype == np.uint8


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        file = io.BytesIO()
        frames[0].save(
            file,
            kind,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if kind == "WEBP" else {}),
        )
        assert (load_pixels(file.getvalue()) == [255, 0, 0]).all(), kind


def test_an_opened_file_is_read_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (24, 8)).save(file, "JPEG", exif=exif)
    assert load_pixels(file.getvalue()).shape == load_pixels(Image.open(file)).shape == (24, 8, 3)


def test_no_program_is_started_for_a_picture():
    """Pillow runs Ghostscript on PostScript."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    with pytest.raises(
        ValueError, match="image must be a readable picture, got .* bytes: it is in no known image format"
    ):
        load_pixels(file.getvalue())


class Broken(io.BytesIO):
    name = "pipe.jpg"

    def read(self, *_):
        raise RuntimeError("gone")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "image must be a readable picture, got 0 bytes: "),
        (Broken(), "image must be a readable picture, got 'pipe.jpg': gone"),
        ("no/such\0file", "image must be an existing file"),
        ("x" * 5000, "image must be an existing file"),
        ("https://example.org/a.jpg", "image must be an existing file, got 'https://example.org/a.jpg'"),
        (torch.zeros(2, 2, 3, device="meta"), "image must be a dense tensor of readable numbers"),
        (torch.zeros(2, 2, 3).to_sparse(), "image must be a dense tensor of readable numbers"),
        (torch.zeros(2, 2, 3, dtype=torch.complex64), "image must be uint8 or floating, got complex64"),
        (None, "image must be a path, .*, got NoneType"),
    ],
)
def test_what_is_no_picture(image, message):
    with pytest.raises(ValueError, match=message):
        load_pixels(image)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="image must be an existing file"):
        load_pixels(tmp_path / "pipe.jpg")

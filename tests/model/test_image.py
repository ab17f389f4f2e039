"""Image -> windows: grid, order, thumbnail, and every bad image a ValueError that says which and why."""

import numpy as np
import pytest
import torch
from PIL import Image

from model import ImageProcessor
from model.image import CLIP_MEAN, CLIP_STD, load_image

IDENTITY = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def checkerboard(rows: int, columns: int, size: int) -> np.ndarray:
    """Each window has its own grey: 10 * row + column."""
    values = 10 * np.arange(rows)[:, None] + np.arange(columns)
    return np.repeat(np.repeat(values, size, 0), size, 1)[:, :, None].repeat(3, 2).astype(np.uint8)


def test_windows_are_cut_row_by_row_behind_the_thumbnail():
    processed = ImageProcessor(window_size=8, mode="dynamic", **IDENTITY)(checkerboard(2, 3, 8))
    assert processed.pixel_values.shape == (7, 3, 8, 8)
    assert processed.window_positions.tolist() == [[-1, -1], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    greys = (processed.pixel_values[1:].mean((1, 2, 3)) * 255).round().tolist()
    assert greys == [0, 1, 2, 10, 11, 12]
    thumbnail = processed.pixel_values[0, 0] * 255
    assert thumbnail[0, 0] < 1.5 and thumbnail[-1, -1] > 10.5  # the whole image, not a window of it


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [(448, 448, (1, 1)), (100, 5000, (1, 3)), (671, 673, (1, 2)), (1344, 896, (3, 2)), (2000, 1120, (3, 3))],
)
def test_sides_go_to_the_nearest_multiple_within_the_limits(height, width, grid):
    assert ImageProcessor(window_size=448, mode="dynamic").grid_of(height, width) == grid


def test_an_image_of_one_window_is_not_repeated_and_single_mode_never_cuts():
    image = np.zeros((9, 8, 3), np.uint8)
    assert len(ImageProcessor(window_size=8, mode="dynamic")(image).pixel_values) == 1
    wide = ImageProcessor(window_size=8, mode="single")(np.zeros((8, 80, 3), np.uint8))
    assert wide.pixel_values.shape == (1, 3, 8, 8)
    assert wide.window_positions.tolist() == [[-1, -1]]


def test_normalisation_is_clips():
    processed = ImageProcessor(window_size=4)(np.full((4, 4, 3), 128, np.uint8))
    expected = (128 / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(processed.pixel_values[0, :, 0, 0], expected)


def test_file_array_tensor_and_picture_agree(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    processor = ImageProcessor(window_size=8, mode="dynamic")
    from_array = processor(array).pixel_values
    for same in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(array),
        torch.from_numpy(array),
    ):
        assert torch.equal(processor(same).pixel_values, from_array)
    assert torch.equal(processor(array.astype(np.float64) / 255).pixel_values, from_array)


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.fromarray(np.zeros((8, 24, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to stand upright
    picture.save(tmp_path / "turned.jpg", exif=exif)
    processed = ImageProcessor(window_size=8, mode="dynamic")(tmp_path / "turned.jpg")
    assert processed.window_positions[1:].tolist() == [[0, 0], [1, 0], [2, 0]]


def test_grey_and_transparent_pictures_become_rgb():
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert ImageProcessor(window_size=4)(Image.new(mode, (4, 4))).pixel_values.shape == (1, 3, 4, 4)


def grey_of(image) -> list[int]:
    picture = np.asarray(load_image(image))
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
        load_image(tmp_path / "scan.tif")


def test_colours_under_transparency_stay_hidden(tmp_path):
    """Dropping the alpha showed whatever colour an editor had left there; now it is white paper."""
    hidden = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [0, 0, 0, 102]]], np.uint8)
    Image.fromarray(hidden).save(tmp_path / "logo.png")
    picture = np.asarray(load_image(tmp_path / "logo.png"))
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
            processor(tmp_path / name)
    with pytest.raises(ValueError, match="image must be an existing file, got .*absent.jpg"):
        processor(tmp_path / "absent.jpg")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), np.nan), "image must be finite, got 48 NaN"),
        (np.full((4, 4, 3), 2.0), "image must lie in 0..1 when floating, got 2.0..2.0"),
        (np.zeros((0, 4, 3), np.uint8), r"image must have shape .* not be empty, got \[0, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), r"image must have shape .*, got \[4, 4\]"),
        (np.zeros((4, 4, 3), np.int64), "image must be uint8 or floating, got int64"),
        (Image.new("La", (1, 1)), "image must be convertible to RGB, got a PIL image of mode La"),
        (7, "image must be a path, PIL image, array or tensor, got int"),
    ],
)
def test_bad_values_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor(window_size=4)(image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window_size=True), "window_size must be a positive int, got True"),
        (dict(window_size=0), "window_size must be a positive int, got 0"),
        (dict(window_size=8, mode="tiles"), "mode must be 'single' or 'dynamic', got 'tiles'"),
        (dict(window_size=8, max_windows_per_side=0), "max_windows_per_side must be a positive int, got 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor(**arguments)

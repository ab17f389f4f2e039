"""Image -> windows: grid, order, thumbnail, letterbox, fidelity of the resize, settings, saving."""

import io
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from model import ImageProcessor
from model.image import CLIP_MEAN, CLIP_STD, MOST_WINDOWS_PER_SIDE, _resized
from model.picture import as_channels_first

IDENTITY = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def checkerboard(rows: int, columns: int, size: int) -> np.ndarray:
    """Each window has its own grey: 10 * row + column."""
    values = 10 * np.arange(rows)[:, None] + np.arange(columns)
    return np.repeat(np.repeat(values, size, 0), size, 1)[:, :, None].repeat(3, 2).astype(np.uint8)


def test_windows_are_cut_row_by_row_behind_the_thumbnail():
    processed = ImageProcessor(window_size=8, mode="dynamic", **IDENTITY).process(checkerboard(2, 3, 8))
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
    assert len(ImageProcessor(window_size=8, mode="dynamic").process(image).pixel_values) == 1
    wide = ImageProcessor(window_size=8, mode="single").process(np.zeros((8, 80, 3), np.uint8))
    assert wide.pixel_values.shape == (1, 3, 8, 8)
    assert wide.window_positions.tolist() == [[-1, -1]]


def test_normalisation_is_clips():
    processed = ImageProcessor(window_size=4).process(np.full((4, 4, 3), 128, np.uint8))
    expected = (128 / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(processed.pixel_values[0, :, 0, 0], expected)


def test_file_array_tensor_and_picture_agree(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    processor = ImageProcessor(window_size=8, mode="dynamic")
    from_array = processor.process(array).pixel_values
    for same in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
        memoryview((tmp_path / "a.png").read_bytes()),
        io.BytesIO((tmp_path / "a.png").read_bytes()),
        Image.fromarray(array),
        torch.from_numpy(array),
        np.asarray(Image.fromarray(array)),  # read-only
        array[::-1, ::-1].copy()[::-1, ::-1],  # negative strides
    ):
        assert torch.equal(processor.process(same).pixel_values, from_array)
    assert torch.equal(processor.process(array.astype(np.float64) / 255).pixel_values, from_array)


def test_letterbox_keeps_the_aspect_ratio():
    """The picture stands in the middle at one scale for both sides; around it is the mean, so nearly 0."""
    processor = ImageProcessor(window_size=8, mode="dynamic", resize="letterbox")
    processed = processor.process(np.full((6, 24, 3), 255, np.uint8))
    assert processed.window_positions.tolist() == [[-1, -1], [0, 0], [0, 1], [0, 2]]
    white = processed.pixel_values[:, 0] > 1  # [num_windows, 8, 8]
    assert white[0].any(1).tolist() == [False] * 3 + [True] * 2 + [False] * 3  # 8 x 2 of 8 x 8
    assert (white[1:].all(2) == torch.tensor([False] + [True] * 6 + [False])).all()  # 24 x 6 of 24 x 8
    empty = processed.pixel_values[0, :, 0].abs()
    assert empty.max() <= 0.5 / 255 / min(CLIP_STD) + 1e-6
    square = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    stretched, boxed = (
        ImageProcessor(window_size=8, resize=resize).process(square).pixel_values
        for resize in ("stretch", "letterbox")
    )
    assert torch.equal(stretched, boxed)
    thin = ImageProcessor(window_size=8, resize="letterbox", **IDENTITY).process(
        np.full((1, 999, 3), 255, np.uint8)
    )
    assert (thin.pixel_values == 1).sum() == 3 * 8  # one row of the window, never none


def test_no_limit_is_the_stated_one():
    processor = ImageProcessor(window_size=448, mode="dynamic", max_windows_per_side=None)
    assert processor.grid_of(448 * 5, 448 * 9) == (5, 9)
    assert (
        processor.grid_of(448, 60_000) == (1, MOST_WINDOWS_PER_SIDE) and MOST_WINDOWS_PER_SIDE * 448 == 7168
    )


PILLOW_SIZES = [(300, 400), (448, 896), (37, 1000), (1344, 1344)]


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_resizing_is_pillows_bicubic(name):
    """Up to two levels where it rounds differently, and hardly anywhere."""
    photograph = getattr(data, name)()
    for height, width in PILLOW_SIZES:
        size = max(height, width)
        ours = ImageProcessor(window_size=size, **IDENTITY).process(photograph).pixel_values[0] * 255
        pillow = np.array(Image.fromarray(photograph).resize((size, size), Image.Resampling.BICUBIC))
        difference = (ours - torch.from_numpy(pillow).permute(2, 0, 1)).abs().round()
        assert difference.max() <= 2 and difference.mean() < 0.02, (name, size)


def test_windows_are_the_cuts_of_the_whole():
    """Against Pillow and plain arithmetic, window by window; the thumbnail is made from the full image."""
    photograph = data.coffee()  # 400 x 600
    processed = ImageProcessor(window_size=200, mode="dynamic").process(photograph)
    picture = Image.fromarray(photograph)
    whole = np.array(picture.resize((600, 400), Image.Resampling.BICUBIC)) / 255.0
    thumbnail = np.array(picture.resize((200, 200), Image.Resampling.BICUBIC)) / 255.0
    cuts = [thumbnail] + [
        whole[r * 200 : r * 200 + 200, c * 200 : c * 200 + 200] for r in (0, 1) for c in (0, 1, 2)
    ]
    expected = (np.stack(cuts) - CLIP_MEAN) / CLIP_STD
    difference = (processed.pixel_values.permute(0, 2, 3, 1) - torch.from_numpy(expected)).abs()
    assert difference[1:].max() < 1e-5 and difference[0].max() < 2.1 / 255 / min(CLIP_STD)


OLD_MACHINE = """
import sys, numpy as np, torch
torch.set_num_threads(1)
pixels = torch.from_numpy(np.load(sys.argv[1])).permute(2, 0, 1)[None]
sizes = [(112, 112), (448, 560), (900, 700)]
resized = [torch.nn.functional.interpolate(pixels, s, mode="bicubic", antialias=True) for s in sizes]
torch.save([torch.backends.cpu.get_cpu_capability(), resized], sys.argv[2])
"""


def test_resizing_is_the_same_without_avx2_and_on_one_thread(tmp_path):
    """Bit for bit; ATEN_CPU_CAPABILITY=default switches torch's AVX2 code off."""
    np.save(tmp_path / "a.npy", data.coffee())
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-c", OLD_MACHINE, tmp_path / "a.npy", tmp_path / "b.pt"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    capability, resized = torch.load(tmp_path / "b.pt")
    assert capability == "DEFAULT"
    pixels = as_channels_first(data.coffee())
    for expected in resized:
        assert torch.equal(_resized(pixels, *expected.shape[2:]), expected[0])


def test_threads_do_not_disturb_each_other(tmp_path):
    names = ("astronaut", "chelsea", "coffee", "rocket")
    paths = []
    for name in names:
        paths.append(tmp_path / f"{name}.jpg")
        Image.fromarray(getattr(data, name)()).save(paths[-1])
    processor = ImageProcessor(window_size=112, mode="dynamic")
    alone = [processor.process(path).pixel_values for path in paths]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda path: processor.process(path).pixel_values, paths * 4))
    assert all(torch.equal(a, b) for a, b in zip(alone * 4, together, strict=True))


def test_the_input_is_not_written_to_and_nothing_warns(recwarn):
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    before = array.copy()
    array.flags.writeable = False
    picture = Image.fromarray(before)
    for image in (array, picture, torch.from_numpy(before)):
        ImageProcessor(window_size=8, mode="dynamic", resize="letterbox").process(image)
    assert np.array_equal(array, before) and np.array_equal(np.asarray(picture), before)
    assert not recwarn.list


def test_a_call_takes_one_image_a_list_or_lists():
    processor = ImageProcessor(window_size=8, mode="dynamic")
    wide, square = np.zeros((8, 16, 3), np.uint8), np.full((8, 8, 3), 9, np.uint8)
    batch = processor([[wide], [square, Image.fromarray(wide)], []])
    assert list(batch) == processor.model_input_names
    assert batch["windows_per_image"].tolist() == [3, 1, 3]
    assert batch["pixel_values"].shape == (7, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert batch["window_positions"].dtype == batch["windows_per_image"].dtype == torch.int64
    parts = [processor.process(image) for image in (wide, square, wide)]
    assert torch.equal(batch["pixel_values"], torch.cat([part.pixel_values for part in parts]))
    assert torch.equal(batch["window_positions"], torch.cat([part.window_positions for part in parts]))
    assert torch.equal(processor(wide)["pixel_values"], parts[0].pixel_values)
    assert torch.equal(processor.preprocess((wide,))["pixel_values"], parts[0].pixel_values)
    assert list(processor([])) == ["windows_per_image"] and len(processor([])["windows_per_image"]) == 0
    assert isinstance(processor(wide, return_tensors="np")["pixel_values"], np.ndarray)
    with pytest.raises(ValueError, match="return_tensors must be 'pt' or 'np', got 'tf'"):
        processor(wide, return_tensors="tf")


def test_saved_and_loaded(tmp_path):
    processor = ImageProcessor(
        window_size=56, mode="dynamic", max_windows_per_side=None, resize="letterbox", mean=(0.5, 0, 1)
    )
    processor.save_pretrained(tmp_path)
    loaded = ImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict() == pickle.loads(pickle.dumps(processor)).to_dict()
    assert loaded.max_windows_per_side is None and loaded.mean == (0.5, 0, 1)
    changed = ImageProcessor.from_pretrained(tmp_path, window_size=28, mode="single", padding_side="left")
    assert (changed.window_size, changed.mode, changed.resize) == (28, "single", "letterbox")
    _, unused = ImageProcessor.from_pretrained(tmp_path, mean=(0, 0, 0), other=1, return_unused_kwargs=True)
    assert unused == {"other": 1}
    path = tmp_path / "preprocessor_config.json"
    for change, message in (
        (
            {"windowsize": 3},
            "key must be a field of ImageProcessor, got 'windowsize'; did you mean 'window_size'",
        ),
        ({"resize": "squash"}, "resize must be 'stretch' or 'letterbox', got 'squash'"),
    ):
        path.write_text(json.dumps(processor.to_dict() | change))
        with pytest.raises(ValueError, match=message):
            ImageProcessor.from_pretrained(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="window_size must be given"):
        ImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window_size=True), "window_size must be a positive int, got True"),
        (dict(window_size=0), "window_size must be a positive int, got 0"),
        (dict(window_size=8, mode="tiles"), "mode must be 'single' or 'dynamic', got 'tiles'"),
        (dict(window_size=8, resize="crop"), "resize must be 'stretch' or 'letterbox', got 'crop'"),
        (dict(window_size=8, mean=(0, 0)), r"mean must be three numbers that lie in 0..1, got \(0, 0\)"),
        (dict(window_size=8, mean=(0, 0, 128)), "mean must be three numbers that lie in 0..1"),
        (dict(window_size=8, std=(1, 1, 0)), r"std must be three numbers that are positive, got \(1, 1, 0\)"),
        (dict(window_size=8, std=(1, 1, float("nan"))), "std must be three numbers that are positive"),
        (dict(window_size=8, sizes=3), "key must be a field of ImageProcessor, got 'sizes'; did you mean"),
        (dict(window_size=8, max_windows_per_side=0), "max_windows_per_side must be a positive int, got 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor(**arguments)

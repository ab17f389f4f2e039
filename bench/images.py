"""ImageProcessor against transformers' Pillow-backed LLaVA-NeXT processor: JPEG files to windows, one thread.

    python -m bench.images [--json]

Photographs inside scikit-image's wheel, at several sizes, are written as JPEG files. Both decode a file,
resize it to a grid of windows and to a thumbnail, bicubic with antialiasing, cut and normalise: as many
windows of the same size on both sides, checked before anything is timed. LLaVA-NeXT is given the grid that
ours chooses as its only resolution; it keeps the aspect ratio inside it and pads, so it resizes to slightly
fewer pixels. The two run in turns, one file at a time. A ratio is their time over ours, so above 1 we are
faster; the overall one is that of the images per second, which are the number of rows over the sum of their
times. Times are medians; on a busy machine, where they measure the others, the ratio of the shortest times
says more.
"""

import argparse
import datetime
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import skimage
import torch
import transformers
from PIL import Image
from transformers import BatchFeature
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from model import ImageProcessor

from . import results, timing
from .cross_attention import cpu_model

WINDOW_SIZES = (336, 448)
# name in scikit-image's data, and the longer side in pixels of the file that is written
PHOTOGRAPHS = (
    ("chelsea.png", 451),
    ("astronaut.png", 512),
    ("rocket.jpg", 640),
    ("coffee.png", 800),
    ("hubble_deep_field.jpg", 1000),
    ("retina.jpg", 1411),
    ("rocket.jpg", 1920),
    ("coffee.png", 2400),
)
JPEG_QUALITY = 90


def write_photographs(folder: Path, photographs: Sequence[tuple[str, int]]) -> list[Path]:
    """The photographs as JPEG files of these sizes."""
    paths = []
    for name, longer in photographs:
        picture = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        scale = longer / max(picture.size)
        picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
        paths.append(folder / f"{Path(name).stem}_{longer}.jpg")
        picture.save(paths[-1], quality=JPEG_QUALITY)
    return paths


class LlavaNext:
    """Their processor with one grid, and its output without the padding to the longest of a batch."""

    def __init__(self, window_size: int, rows: int, columns: int) -> None:
        sides = {"height": window_size, "width": window_size}
        self.processor = LlavaNextImageProcessorPil(
            size=sides,
            crop_size=sides,
            image_grid_pinpoints=[[rows * window_size, columns * window_size]],
        )

    def __call__(self, path: Path) -> BatchFeature:
        with Image.open(path) as picture:
            return self.processor(picture, return_tensors="pt")


def check(ours: ImageProcessor, theirs: LlavaNext, path: Path) -> int:
    """The number of windows; AssertionError unless both give as many of the same size, and thumbnails of the
    same picture: the only window that both make in the same way."""
    mine, other = ours(path)["pixel_values"], theirs(path)["pixel_values"][0]
    assert mine.shape == other.shape, f"{path.name}: {list(mine.shape)} against {list(other.shape)}"
    assert mine.dtype == other.dtype == torch.float32, f"{path.name}: {mine.dtype} against {other.dtype}"
    difference = (mine[0] - other[0]).abs().max() * 255 * max(ours.std)
    assert difference < 2.5, f"{path.name}: thumbnails differ by {difference} of 255 levels"
    return len(mine)


def compare(path: Path, window_size: int, repeats: int) -> dict[str, Any]:
    """One row: medians and shortest times in milliseconds, and their ratios."""
    ours = ImageProcessor(window_size=window_size, mode="dynamic")
    with Image.open(path) as picture:
        width, height = picture.size
    rows, columns = ours.grid_of(height, width)
    if (rows, columns) == (1, 1):  # theirs always adds a thumbnail
        return {}
    theirs = LlavaNext(window_size, rows, columns)
    num_windows = check(ours, theirs, path)
    timed = {
        name: timing.Timed(lambda: None, lambda _, call=call: call(path))
        for name, call in (("ours", ours), ("theirs", theirs))
    }
    samples, raised = timing.interleave(timing.CpuClock(), timed, 0.0, repeats, repeats, warm_up=1)
    for error in raised.values():
        raise error
    row = {
        "photograph": path.stem,
        "height": height,
        "width": width,
        "window_size": window_size,
        "grid": [rows, columns],
        "num_windows": num_windows,
    }
    for suffix, summary in (("", statistics.median), ("_shortest", min)):
        milliseconds = {name: summary(samples[name]) / 1e3 for name in ("ours", "theirs")}
        row |= {f"{name}_ms{suffix}": round(value, 3) for name, value in milliseconds.items()}
        row[f"ratio{suffix}"] = round(milliseconds["theirs"] / milliseconds["ours"], 3)
    return row


def measure(
    photographs: Sequence[tuple[str, int]] = PHOTOGRAPHS,
    window_sizes: Sequence[int] = WINDOW_SIZES,
    repeats: int = 9,
) -> dict[str, Any]:
    """The whole report, on one thread of torch. Images that fit into one window are left out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = write_photographs(Path(folder), photographs)
            rows = [compare(path, size, repeats) for size in window_sizes for path in paths]
    finally:
        torch.set_num_threads(threads)
    rows = [row for row in rows if row]
    seconds = {
        key: sum(row[key] for row in rows) / 1e3
        for key in ("ours_ms", "theirs_ms", "ours_ms_shortest", "theirs_ms_shortest")
    }
    return {
        "ratio": round(seconds["theirs_ms"] / seconds["ours_ms"], 3),
        "ratio_of_shortest": round(seconds["theirs_ms_shortest"] / seconds["ours_ms_shortest"], 3),
        "min_ratio": min(row["ratio"] for row in rows),
        "ours_images_per_s": round(len(rows) / seconds["ours_ms"], 2),
        "theirs_images_per_s": round(len(rows) / seconds["theirs_ms"], 2),
        "threads": 1,
        "repeats": repeats,
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pillow": PIL.__version__,
            "numpy": np.__version__,
        },
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeats", type=int, default=9, help="samples of each (default 9)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    report = results.scrub(measure(repeats=options.repeats))
    if options.json:
        print(json.dumps(report, indent=1))
        return
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"{report['cpu']}, 1 thread, {versions}; ratio = LLaVA-NeXT / ours, above 1 we are faster")
    for row in report["rows"]:
        print(
            f"{row['photograph']:24}{row['width']:5} x {row['height']:<5}{row['window_size']:4} px"
            f"{row['num_windows']:4} windows ours {row['ours_ms']:7.2f} ms  theirs {row['theirs_ms']:7.1f} ms"
            f"  ratio {row['ratio']:6.2f}  of shortest {row['ratio_shortest']:6.2f}"
        )
    print(
        f"all: ours {report['ours_images_per_s']} images/s, theirs {report['theirs_images_per_s']} images/s,"
        f" ratio {report['ratio']}, of shortest {report['ratio_of_shortest']}, smallest {report['min_ratio']}"
    )


if __name__ == "__main__":
    main()

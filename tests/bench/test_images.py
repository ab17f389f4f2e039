"""bench.images: its command, the same windows on both sides, and that a difference gets no number."""

import json

import pytest
import torch

from bench import images
from model import ImageProcessor

SMALL = (("coffee.png", 200), ("rocket.jpg", 60))


def test_json_is_one_document(capsys, monkeypatch):
    monkeypatch.setattr(images.measure, "__defaults__", (SMALL, (64,), 2))
    threads = torch.get_num_threads()
    images.main(["--json", "--repeats", "2"])
    assert torch.get_num_threads() == threads
    document = json.loads(capsys.readouterr().out)
    (row,) = document["rows"]  # the other photograph is one window, to which LLaVA-NeXT would add a thumbnail
    assert row["photograph"] == "coffee_200" and row["grid"] == [2, 3] and row["num_windows"] == 7
    assert (row["width"], row["height"], row["window_size"]) == (200, 133, 64)
    assert document["ratio"] == pytest.approx(row["theirs_ms"] / row["ours_ms"], rel=0.01)
    assert document["ours_images_per_s"] == pytest.approx(1e3 / row["ours_ms"], rel=0.01)
    assert document["theirs_images_per_s"] == pytest.approx(1e3 / row["theirs_ms"], rel=0.01)
    assert 0 < row["ours_ms_shortest"] <= row["ours_ms"]
    assert document["threads"] == 1 and document["repeats"] == 2
    assert document["versions"].keys() == {"torch", "transformers", "pillow", "numpy"}
    assert document["ratio_of_shortest"] > 1  # small as it is; the command measures more


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(images.measure, "__defaults__", (SMALL[:1], (64,), 1))
    images.main(["--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "1 thread" in lines[0] and "pillow" in lines[0]
    assert lines[1].startswith("coffee_200") and "  7 windows" in lines[1]
    assert lines[2].startswith("all: ours ") and " ratio " in lines[2]


def test_wrong_windows_get_no_number(tmp_path):
    (path,) = images.write_photographs(tmp_path, SMALL[:1])
    ours = ImageProcessor(window_size=64, mode="dynamic")
    assert images.check(ours, images.LlavaNext(64, 2, 3), path) == 7
    with pytest.raises(AssertionError, match=r"\[7, 3, 64, 64\] against \[5, 3, 64, 64\]"):
        images.check(ours, images.LlavaNext(64, 2, 2), path)
    dim = ImageProcessor(window_size=64, mode="dynamic", mean=(0.6, 0.6, 0.6))
    with pytest.raises(AssertionError, match="thumbnails differ by"):
        images.check(dim, images.LlavaNext(64, 2, 3), path)


def test_wrong_options_end_with_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        images.main(["--repeats", "0"])
    assert "--repeats must be at least 1, got 0" in capsys.readouterr().err

"""Documents: images stand before the texts they belong to, and every broken one is named."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from model import ImageProcessor
from train.config import DataConfig
from train.data import BadSample, build_dataset
from train.data.interleaved import MMC4Dataset, ObelicsDataset


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        Image.fromarray(np.full((10 + i, 20, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture
def written(folder):
    def write(*records: object):
        path = folder / "documents.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def info(image: int, place: int, similarity: float = 0.3, **more: object) -> dict:
    return {"image_name": f"{image}.png", "matched_text_index": place, "matched_sim": similarity} | more


TEXTS = ["first.", "second.", "third.", "fourth."]


def test_mmc4_images_stand_before_their_texts(written, folder):
    document = {"text_list": TEXTS, "image_info": [info(2, 3), info(0, 1), info(1, 3)], "url": "x"}
    sample = build_dataset(DataConfig(name="mmc4", path=str(written(document))))[0]
    assert sample.turns == [("", "first."), ("<image>", "second. third."), ("<image><image>", "fourth.")]
    assert sample.images == [folder / "0.png", folder / "2.png", folder / "1.png"]
    assert sample.prompt == "plain" and sample.origin.endswith("documents.jsonl line 1")


def test_mmc4_limits(written, folder):
    images = [info(0, 0, 0.1), info(1, 1, 0.3), info(2, 2, 0.24), info(3, 3, 0.5)]
    path = written({"text_list": TEXTS, "image_info": images})
    sample = MMC4Dataset(path, min_similarity=0.24)[0]
    assert sample.turns == [
        ("", "first."),
        ("<image>", "second."),
        ("<image>", "third."),
        ("<image>", "fourth."),
    ]
    sample = MMC4Dataset(path, min_similarity=0.24, max_images=2)[0]
    assert sample.turns == [("", "first."), ("<image>", "second."), ("<image>", "third. fourth.")]
    assert sample.images == [folder / "1.png", folder / "2.png"]
    assert [MMC4Dataset(path, *limits).num_images(0) for limits in ([], [None, 0.24], [None, None, 1])] == [
        4,
        3,
        1,
    ]
    with pytest.raises(BadSample, match="must hold an image before a text, got none") as error:
        MMC4Dataset(path, min_similarity=0.9)[0]
    assert error.value.reason == "no_image"


def test_mmc4_images_inside_the_record(written, folder):
    encoded = base64.b64encode((folder / "1.png").read_bytes()).decode()
    inside = {"image_base64": encoded, "matched_text_index": 0, "matched_sim": 0.3}
    dataset = MMC4Dataset(written({"text_list": ["a"], "image_info": [inside]}))
    assert dataset.image_sizes(0) == [(11, 20)]
    got = ImageProcessor(window_size=8).process(dataset[0].images[0])
    assert got.pixel_values.equal(ImageProcessor(window_size=8).process(folder / "1.png").pixel_values)
    damaged = MMC4Dataset(written({"text_list": ["a"], "image_info": [inside | {"image_base64": "?" * 9}]}))
    with pytest.raises(ValueError, match="documents.jsonl line 1 image 1.*must be base64"):
        ImageProcessor(window_size=8).process(damaged[0].images[0])
    assert damaged.image_sizes(0) == []


def test_obelics_keeps_the_order(written, folder):
    document = {
        "images": [None, "0.png", "1.png", None, None, "2.png", None, "3.png"],
        "texts": ["a", None, None, "b", "c", None, "d", None],
    }
    dataset = build_dataset(DataConfig(name="obelics", path=str(written(document))))
    # a text is the target of the images before it; the last image has none
    assert dataset[0].turns == [("", "a"), ("<image><image>", "b c"), ("<image>", "d")]
    assert dataset[0].images == [folder / f"{i}.png" for i in range(3)]
    assert dataset.num_images(0) == 4
    assert ObelicsDataset(written(document), max_images=1)[0].turns == [("", "a"), ("<image>", "b c d")]


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        ({"text_list": "a", "image_info": []}, "bad_record", "text_list must be a list, got 'a'"),
        ({"text_list": ["a"]}, "bad_record", "image_info must be a list, got None"),
        ({"text_list": ["a"], "image_info": [3]}, "bad_record", "image 1: must be an object, got 3"),
        ({"text_list": ["a"], "image_info": [info(0, 1)]}, "bad_record", "must lie in 0..0, got 1"),
        ({"text_list": ["a"], "image_info": [info(0, True)]}, "bad_record", "must lie in 0..0, got True"),
        ({"text_list": ["a"], "image_info": [info(0, 0, "x")]}, "bad_record", "matched_sim must be a number"),
        ({"text_list": ["a"], "image_info": [info(9, 0)]}, "missing_image", "9.png"),
        ({"text_list": ["a"], "image_info": [info(0, 0, image_base64=3)]}, "bad_record", "must be a text"),
        ({"text_list": [1], "image_info": []}, "bad_record", "text_list must hold texts, got 1"),
        ({"text_list": [" "], "image_info": [info(0, 0)]}, "empty_answer", "must hold a text"),
        ({"text_list": ["a"], "image_info": []}, "no_image", "must hold an image"),
        ({"images": ["0.png"], "texts": []}, "bad_record", "one length, got 1 and 0"),
        ({"images": ["0.png"], "texts": ["a"]}, "bad_record", "part 1: must be an image or a text"),
        ({"images": [None], "texts": [3]}, "bad_record", "part 1: text must be a text, got 3"),
        (
            {"images": ["9.png", None], "texts": [None, "a"]},
            "missing_image",
            "part 1: image must be an",
        ),
        ({"images": [None, "0.png"], "texts": ["a", None]}, "no_image", "must hold an image before a text"),
    ],
)
def test_bad_documents_are_named(written, record, reason, message):
    path = written(record)
    dataset = ObelicsDataset(path) if "images" in record else MMC4Dataset(path, min_similarity=0.1)
    with pytest.raises(BadSample) as error:
        dataset[0]
    assert error.value.reason == reason
    assert str(error.value).startswith(f"{path} line 1") and message in str(error.value)
    assert dataset.image_sizes(0) == [] and dataset.num_images(0) in (0, 1)


def test_wrong_options(written):
    path = written({"images": [], "texts": []})
    with pytest.raises(ValueError, match="data.options.max_images must be an int of at least 1, got 0"):
        ObelicsDataset(path, max_images=0)
    with pytest.raises(ValueError, match="data.options.min_similarity must be a number, got 'x'"):
        MMC4Dataset(path, min_similarity="x")

"""Questions, captions and regions in the forms that the sets are published in."""

import json

import numpy as np
import pytest
from PIL import Image

from train.config import DataConfig
from train.data import BadSample, build_dataset
from train.data.captions import CaptionDataset
from train.data.fields import majority
from train.data.regions import RegionDataset
from train.data.vqa import VQA_FORMS, VQADataset

IMAGES = ("COCO_train2014_000000000009.jpg", "000000000009.jpg", "9.jpg", "a9.jpg", "sub/x.jpg")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in IMAGES:
        Image.fromarray(np.full((50, 100, 3), 90, np.uint8)).save(tmp_path / name)
    return tmp_path


def write(folder, content: object, name: str = "set.json") -> str:
    path = folder / name
    path.write_text(json.dumps(content))
    return str(path)


def answers(*texts: str) -> list[dict]:
    return [{"answer": text, "answer_id": i, "answer_confidence": "yes"} for i, text in enumerate(texts)]


QUESTION = {"question": "What is it?", "question_id": 7, "image_id": 9}
ANNOTATION = {"question_id": 7, "multiple_choice_answer": "no", "answers": answers("a", "b", "B")}
ASKED = {"question": "What is it?"}

RECORDS = {
    "vqav2": ({"questions": [QUESTION]}, "COCO_train2014_000000000009.jpg", "b"),
    "okvqa": ({"questions": [QUESTION]}, "COCO_train2014_000000000009.jpg", "b"),
    "vizwiz": ([ASKED | {"image": "a9.jpg", "answers": answers("x", "y", "y")}], "a9.jpg", "y"),
    "textvqa": ({"data": [ASKED | {"image_id": "a9", "answers": ["n", "Du", "du"]}]}, "a9.jpg", "Du"),
    "stvqa": ({"data": [ASKED | {"file_path": "sub/x.jpg", "answers": ["stop"]}]}, "sub/x.jpg", "stop"),
    "docvqa": ({"data": [ASKED | {"image": "sub/x.jpg", "answers": ["1", "2"]}]}, "sub/x.jpg", "1"),
    "gqa": ({"07": ASKED | {"imageId": "9", "answer": "pipe", "fullAnswer": "A."}}, "9.jpg", "pipe"),
    "aokvqa": (
        [ASKED | {"image_id": 9, "direct_answers": ["sea", "lake", "lake"], "choices": []}],
        "000000000009.jpg",
        "lake",
    ),
    "ocrvqa": (
        {"9": {"questions": ["What is it?"], "answers": ["A book"], "split": 1, "imageURL": "x"}},
        "9.jpg",
        "A book",
    ),
}


@pytest.mark.parametrize("form", VQA_FORMS)
def test_questions_of_every_form(folder, form):
    content, image, answer = RECORDS[form]
    options = {"form": form}
    if VQA_FORMS[form].annotated:
        other = ANNOTATION | {"question_id": 3, "answers": answers("wrong")}
        options["annotations"] = write(folder, {"annotations": [other, ANNOTATION]}, "answers.json")
    path = write(folder, content)
    dataset = build_dataset(DataConfig(name="vqa", path=path, options=options))
    assert len(dataset) == 1
    sample = dataset[0]
    assert sample.images == [folder / image] and sample.turns == [("<image>What is it?", answer)]
    assert sample.origin.startswith(f"{path} record 1")
    assert dataset.image_sizes(0) == [(50, 100)] and dataset.num_images(0) == 1
    (folder / image).unlink()
    with pytest.raises(BadSample, match=f"{image}"):
        dataset[0]


def test_a_book_is_one_sample_with_all_its_questions(folder):
    books = {
        "9": {"questions": ["Who?", "When?"], "answers": ["A", "B"], "split": 1},
        "10": {"questions": ["Who?"], "answers": ["A"], "split": 2},
        "11": {"questions": ["Who?"], "answers": ["A", "B"], "split": 1},
        "12": 3,
    }
    path = write(folder, books)
    dataset = VQADataset(path, "ocrvqa")
    assert len(dataset) == 3 and dataset.notes == [f"{path}: 1 records are not of split 1"]
    assert dataset[0].turns == [("<image>Who?", "A"), ("When?", "B")]
    with pytest.raises(BadSample, match=r"record 2 \('11'\): questions and answers must be as many"):
        dataset[1]
    with pytest.raises(BadSample, match=r"record 3 \('12'\): record must be a JSON object, got 3"):
        dataset[2]
    assert len(VQADataset(path, "ocrvqa", split=2)) == 2


def test_majority():
    assert majority(["Yes", "no", "yes", "NO", "no"], "") == "no"
    assert majority(["b", "a"], "") == "b"  # of equals the first
    assert majority(answers(" x ", "", "x"), "") == "x"
    assert majority(" one ", "") == "one"
    for wrong, reason in (
        (None, "bad_record"),
        ([3], "bad_record"),
        ([{}], "bad_record"),
        ([" "], "empty_answer"),
    ):
        with pytest.raises(BadSample) as error:
            majority(wrong, "here")
        assert error.value.reason == reason and str(error.value).startswith("here: answers must")


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        ({"question": " "}, "empty_question", "question must not be empty"),
        ({"question": None}, "bad_record", "question must be a text, got None"),
        ({"question_id": 8}, "no_annotation", "question_id must be one of the annotations, got 8"),
        ({"question_id": "7"}, "no_annotation", "got '7'"),
        ({"question_id": 1 << 70}, "no_annotation", "got 1180591620717411303424"),
        ({"image_id": 10}, "missing_image", "COCO_train2014_000000000010.jpg"),
        ({"image_id": "nine"}, "bad_record", "must have the fields of the image's name"),
        ({"image_id": None}, "bad_record", "must have the fields of the image's name"),
    ],
)
def test_bad_questions_are_named(folder, change, reason, message):
    path = write(folder, {"info": {}, "questions": [QUESTION, QUESTION | change]})
    annotations = write(folder, {"annotations": [ANNOTATION]}, "answers.json")
    dataset = VQADataset(path, "vqav2", annotations=annotations)
    assert dataset.notes == [f"{annotations}: 1 annotations and 2 questions"]
    assert dataset[0].turns == [("<image>What is it?", "b")]
    with pytest.raises(BadSample) as error:
        dataset[1]
    assert error.value.reason == reason
    assert str(error.value).startswith(f"{path} record 2") and message in str(error.value)


def test_captions(folder):
    content = {
        "images": [{"id": 4, "file_name": "9.jpg"}, {"id": 9, "file_name": "a9.jpg"}],
        "annotations": [
            {"image_id": 9, "id": 1, "caption": " A cat. "},
            {"image_id": 9, "id": 2, "caption": "spam", "is_rejected": True},
            {"image_id": 5, "id": 3, "caption": "A dog."},
            {"image_id": 4, "id": 4, "caption": ""},
            7,
        ],
    }
    path = write(folder, content)
    dataset = build_dataset(DataConfig(name="captions", path=path, options={"question": "Describe it."}))
    assert len(dataset) == 4 and dataset.notes == [f"{path}: 1 captions are marked as rejected"]
    assert dataset[0].images == [folder / "a9.jpg"] and dataset[0].turns == [
        ("<image>Describe it.", "A cat.")
    ]
    for index, reason in ((1, "missing_image"), (2, "empty_caption"), (3, "bad_json")):
        with pytest.raises(BadSample) as error:
            dataset[index]
        assert error.value.reason == reason and str(error.value).startswith(f"{path} record {index + 1}: ")
    textcaps = {"data": [{"image_id": "a9", "caption_str": "A sign.", "reference_strs": []}]}
    sample = CaptionDataset(write(folder, textcaps), "textcaps", question="")[0]
    assert sample.images == [folder / "a9.jpg"] and sample.turns == [("<image>", "A sign.")]


def test_regions(folder):
    (folder / "VG_100K_2").mkdir()
    (folder / "9.jpg").rename(folder / "VG_100K_2" / "9.jpg")
    box = {"x": 25, "y": 10, "width": 50, "height": 60, "phrase": "a red hat", "image_id": 9}
    wrong = ({"x": 100}, {"y": None}, {"x": 10**400}, {"image_id": 8})
    images = [
        {"id": 9, "regions": [box, box | {"phrase": "shoes", "x": 0}]},
        {"id": 9, "regions": []},
        {"id": 9, "regions": [box | change for change in wrong]},
        {"id": 9},
        3,
    ]
    path = write(folder, images)
    dataset = build_dataset(DataConfig(name="regions", path=path))
    assert len(dataset) == 2 + 0 + 4 + 1 + 1
    # 100 x 50 pixels; the bottom edge is outside and is cut
    question = "<image>What is in the region [0.250, 0.200, 0.750, 1.000] of the image?"
    assert dataset[0].turns == [(question, "a red hat")]
    assert dataset[0].images == [folder / "VG_100K_2" / "9.jpg"]
    assert "[0.000, 0.200, 0.500, 1.000]" in dataset[1].turns[0][0] and dataset[1].turns[0][1] == "shoes"
    expected = ["bad_box", "bad_box", "bad_box", "missing_image", "bad_record", "bad_json"]
    for index, reason in enumerate(expected, start=2):
        with pytest.raises(BadSample) as error:
            dataset[index]
        assert error.value.reason == reason and str(error.value).startswith(f"{path} record ")
    (folder / "VG_100K_2" / "9.jpg").write_bytes(b"x")
    with pytest.raises(BadSample, match="image must be a readable picture"):
        dataset[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda path: VQADataset(path, "vqav3"), "data.options.form must be one of .* did you mean 'vqav2'"),
        (
            lambda path: VQADataset(path, "vqav2"),
            "annotations must be given for the form 'vqav2'",
        ),
        (lambda path: VQADataset(path, "gqa", annotations=path), "data.options.annotations must be left out"),
        (lambda path: VQADataset(path, "textvqa"), "data.path must be a JSON object with a list 'data'"),
        (
            lambda path: VQADataset(path, "vqav2", annotations="no"),
            "annotations must be an existing file",
        ),
        (lambda path: VQADataset(path, "gqa", image_name=" "), "data.options.image_name must be a file name"),
        (lambda path: CaptionDataset(path, "cocoa"), "did you mean 'coco'"),
        (lambda path: CaptionDataset(path, question=3), "data.options.question must be a text, got 3"),
        (
            lambda path: RegionDataset(path, question="what?"),
            "question must be a text with {box}",
        ),
        (
            lambda path: RegionDataset(path, folders="x"),
            "folders must be a list of names, got 'x'",
        ),
        (lambda path: RegionDataset(path), "data.path must be a JSON array .byte 0: '{'.*set.json"),
        (lambda path: RegionDataset(3), "data.path must be the name of a file, got 3"),
    ],
)
def test_sets_that_do_not_fit_are_refused(folder, build, message):
    path = write(folder, {"questions": [QUESTION]})
    with pytest.raises(ValueError, match=message):
        build(path)

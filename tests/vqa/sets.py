"""Every set in its published form, with three or four questions and pictures of several sizes."""

import base64
import csv
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from .conftest import write

SIZES = ((30, 30), (90, 30), (60, 90), (28, 28))
"""Height and width: 1, 4, 7 and 1 windows of 28 pixels."""


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """Options of `run`, and what the questions have to be."""

    data: Path
    images: Path
    ids: list[str]
    answers: list[tuple[str, ...]]
    split: str | None = None


def picture(number: int) -> Image.Image:
    height, width = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save_pictures(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    return folder


def ten(*texts: str) -> list[dict]:
    """Ten annotators: the first text from six of them."""
    all_texts = [texts[0]] * (11 - len(texts)) + list(texts[1:])
    return [{"answer": text, "answer_id": i, "answer_confidence": "yes"} for i, text in enumerate(all_texts)]


def texts_of(answers: list[dict]) -> tuple[str, ...]:
    return tuple(answer["answer"] for answer in answers)


def coco(folder: Path, split: str = "val2014", prefix: str = "v2_") -> Written:
    images = save_pictures(folder / split, *(f"COCO_{split}_{9 + i:012d}.jpg" for i in range(3)))
    questions = [{"image_id": 9 + i, "question": f"What is {i}?", "question_id": 90 + i} for i in range(3)]
    answers = [{"question_id": 90 + i, "answers": ten(f"thing {i}", "other")} for i in range(3)]
    name = f"{prefix}OpenEnded_mscoco_{split}_questions.json"
    write(folder / name, {"data_subtype": split, "questions": questions})
    name = f"{prefix}mscoco_{split}_annotations.json"
    write(folder / name, {"annotations": answers[::-1]})  # another order than the questions'
    return Written(folder, images, ["90", "91", "92"], [texts_of(each["answers"]) for each in answers])


def okvqa(folder: Path) -> Written:
    return coco(folder, prefix="")


def vqav2_test(folder: Path) -> Written:
    images = save_pictures(folder / "test2015", *(f"COCO_test2015_{9 + i:012d}.jpg" for i in range(3)))
    questions = [{"image_id": 9 + i, "question": f"What is {i}?", "question_id": 90 + i} for i in range(3)]
    write(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions})
    return Written(folder, images, ["90", "91", "92"], [()] * 3, "test-dev")


def textvqa(folder: Path) -> Written:
    images = save_pictures(folder / "train_images", "a.jpg", "b.jpg", "c.jpg")
    rows = [
        {
            "question": "what is the brand?",
            "question_id": 7 + i,
            "image_id": "abc"[i],
            "answers": ["nokia"] * 10,
        }
        for i in range(3)
    ]
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    return Written(folder, images, ["7", "8", "9"], [("nokia",) * 10] * 3)


def vizwiz(folder: Path, split: str = "val") -> Written:
    names = [f"VizWiz_{split}_{i:08d}.jpg" for i in range(3)]
    images = save_pictures(folder / split, *names)
    rows: list[dict] = [{"image": name, "question": "What is this?"} for name in names]
    for row in rows if split == "val" else ():
        row["answers"] = ten("unanswerable", "a box")
    write(folder / f"{split}.json", rows)
    known = texts_of(ten("unanswerable", "a box")) if split == "val" else ()
    return Written(folder, images, names, [known] * 3, split)


def gqa(folder: Path) -> Written:
    images = save_pictures(folder / "images", "n1.jpg", "n2.jpg")
    rows = {
        f"0{i}": {"imageId": f"n{i}", "question": "Is it red?", "answer": "yes", "fullAnswer": "Yes."}
        for i in (1, 2)
    }
    write(folder / "testdev_balanced_questions.json", rows)
    return Written(folder, images, ["01", "02"], [("yes",)] * 2)


def iconqa(folder: Path) -> Written:
    base = {"grade": "grade1", "label": "L1", "unit": ""}
    problems = {
        "10": base
        | {"question": "Which is it?", "choices": ["three", "four"], "answer": 1, "ques_type": "choose_txt"},
        "11": base
        | {
            "question": "Which one?",
            "choices": ["choice_0.png", "choice_1.png"],
            "answer": 0,
            "ques_type": "choose_img",
        },
        "12": base | {"question": "How many?", "answer": "5", "ques_type": "fill_in_blank"},
        "13": base | {"question": "Other split?", "answer": "5", "ques_type": "fill_in_blank"},
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["13"], "test": ["10", "11", "12"]})
    root = folder / "iconqa" / "test"
    save_pictures(root, "choose_txt/10/image.png", "fill_in_blank/12/image.png")
    save_pictures(root / "choose_img" / "11", "image.png", "choice_0.png", "choice_1.png")
    return Written(folder, folder, ["10", "11", "12"], [("B",), ("A",), ("5",)])


def ocrvqa(folder: Path) -> Written:
    images = save_pictures(folder / "images", "k1.jpg", "k2.png")
    rows = {
        "k1": {
            "questions": ["Who wrote it?", "What is the title?"],
            "answers": ["A. Person", "A Book"],
            "imageURL": "http://x/k1.jpg",
            "split": 3,
        },
        "k2": {"questions": ["Is it a novel?"], "answers": ["No"], "imageURL": "http://x/k2.png", "split": 3},
        "k3": {"questions": ["Training?"], "answers": ["Yes"], "imageURL": "http://x/k3.jpg", "split": 1},
    }
    write(folder / "dataset.json", rows)
    return Written(folder, images, ["k1_0", "k1_1", "k2_0"], [("A. Person",), ("A Book",), ("No",)])


def stvqa(folder: Path, split: str = "train") -> Written:
    images = save_pictures(folder, "coco-text/a.jpg", "vizwiz/b.jpg")
    rows: list[dict] = [
        {"question_id": 3 + i, "question": "What does it say?", "file_path": name, "file_name": "x"}
        for i, name in enumerate(("coco-text/a.jpg", "vizwiz/b.jpg"))
    ]
    for row in rows if split == "train" else ():
        row["answers"] = ["stop", "STOP sign"]
    write(folder / f"{split}_task_3.json", {"data": rows})
    return Written(folder, images, ["3", "4"], [("stop", "STOP sign") if split == "train" else ()] * 2, split)


def docvqa(folder: Path, split: str = "val") -> Written:
    images = save_pictures(folder, "documents/a.png", "documents/b.png")
    rows: list[dict] = [
        {
            "questionId": 50 + i,
            "question": "What is the date?",
            "image": f"documents/{'ab'[i]}.png",
            "docId": 1,
        }
        for i in range(2)
    ]
    for row in rows if split == "val" else ():
        row["answers"] = ["1 May", "May 1"]
    write(folder / f"{split}_v1.0.json", {"dataset_name": "docvqa", "data": rows})
    return Written(folder, images, ["50", "51"], [("1 May", "May 1") if split == "val" else ()] * 2, split)


def scienceqa(folder: Path) -> Written:
    problem = {
        "question": "Which is it?",
        "choices": ["up", "down", "left"],
        "hint": "Look.",
        "split": "test",
    }
    problems = {
        "4": problem | {"answer": 2, "image": "image.png"},
        "5": problem | {"answer": 0, "image": None},
        "6": problem | {"answer": 1, "image": "image.png", "split": "train"},
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["6"], "test": ["4", "5"]})
    save_pictures(folder, "test/4/image.png")
    return Written(folder, folder, ["4", "5"], [("C",), ("A",)])


def encoded(number: int) -> str:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def mmbench(folder: Path, split: str = "dev") -> Written:
    """Two questions; the first one with a rotation, whose picture is the first line's."""
    rows = [
        {"index": 1, "question": "Which\tone?", "A": "cat", "B": "dog", "C": "", "D": "", "answer": "A"},
        {
            "index": 1_000_001,
            "question": "Which\tone?",
            "A": "dog",
            "B": "cat",
            "C": "",
            "D": "",
            "answer": "B",
        },
        {"index": 2, "question": "What?", "A": "1", "B": "2", "C": "3", "D": "nan", "answer": "C"},
    ]
    pictures = [encoded(0), "1", encoded(2)]
    for row, image in zip(rows, pictures, strict=True):
        row |= {
            "hint": "nan",
            "category": "x",
            "source": "y",
            "l2-category": "z",
            "image": image,
            "split": split,
        }
        if split == "test":
            del row["answer"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"mmbench_{split}_20230712.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), dialect="excel-tab")
        writer.writeheader()
        writer.writerows(rows)
    answers = [("A",), ("B",), ("C",)] if split == "dev" else [()] * 3
    return Written(folder, folder, ["1", "1000001", "2"], answers, split)


def mmmu(folder: Path, split: str = "validation") -> Written:
    images = save_pictures(folder / "images", "a.png", "b.png", "c.png")
    rows = [
        {
            "id": f"{split}_Art_1",
            "question": "Compare <image 1> and <image 2>.",
            "options": "['older', 'newer, by far']",
            "question_type": "multiple-choice",
            "answer": "B",
            "image_1": "a.png",
            "image_2": "b.png",
        },
        {
            "id": f"{split}_Art_2",
            "question": "How many? <image 1>",
            "options": "[]",
            "question_type": "open",
            "answer": "['4', 'four']",
            "image_1": "c.png",
            "image_2": None,
        },
    ]
    for row in rows if split == "test" else ():
        row["answer"] = "?"
    write(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    answers = [("B",), ("4", "four")] if split != "test" else [(), ()]
    return Written(folder, images, [f"{split}_Art_1", f"{split}_Art_2"], answers, split)


def mme(folder: Path) -> Written:
    """A subtask with texts beside the images, and one with both in folders."""
    save_pictures(folder / "existence", "a.jpg", "b.jpg")
    save_pictures(folder / "OCR" / "images", "c.png")
    ask = "Is it there? Please answer yes or no."
    write(folder / "existence" / "a.txt", f"{ask}\tYes\n{ask}\tNo\n")
    write(folder / "existence" / "b.txt", f"{ask}\tYes\n{ask}\tNo")
    write(folder / "OCR" / "questions_answers_YN" / "c.txt", f"{ask}\tNo\n{ask}\tYes\n")
    ids = [f"{unit}/{n}" for unit in ("existence/a", "existence/b", "OCR/c") for n in (1, 2)]
    known = [("yes",), ("no",), ("yes",), ("no",), ("no",), ("yes",)]
    return Written(folder, folder, ids, known)


def pope(folder: Path) -> Written:
    images = save_pictures(folder / "val2014", "COCO_val2014_1.jpg", "COCO_val2014_2.jpg")
    splits = ("random", "popular", "adversarial")
    for split in splits:
        rows = [
            {"question_id": i, "image": f"COCO_val2014_{i}.jpg", "text": "Is there a dog?", "label": label}
            for i, label in ((1, "yes"), (2, "no"))
        ]
        write(folder / f"coco_pope_{split}.json", "".join(json.dumps(row) + "\n" for row in rows))
    ids = [f"{split}/{i}" for split in splits for i in (1, 2)]
    return Written(folder, images, ids, [("yes",), ("no",)] * 3)


def mmvet(folder: Path) -> Written:
    images = save_pictures(folder / "images", "v1_0.png", "v1_1.jpg")
    rows = {
        "v1_0": {
            "imagename": "v1_0.png",
            "question": "What is x?",
            "answer": "-1<AND>-5",
            "capability": ["ocr"],
        },
        "v1_1": {"imagename": "v1_1.jpg", "question": "Who?", "answer": "Ann", "capability": ["rec"]},
    }
    write(folder / "mm-vet.json", rows)
    return Written(folder, images, ["v1_0", "v1_1"], [()] * 2)


def infimm_eval(folder: Path) -> Written:
    images = save_pictures(folder / "images", "a.jpg", "b.jpg")
    rows = [
        {"id": 1, "question": "Why?", "image": "a.jpg"},
        {"id": 2, "question": "And then?", "images": ["a.jpg", "b.jpg"]},
    ]
    write(folder / "core-mm-wo-answer.json", rows)
    return Written(folder, images, ["1", "2"], [()] * 2)


SETS: dict[str, tuple[str, Callable[[Path], Written]]] = {
    "vqav2": ("vqav2", coco),
    "vqav2 test-dev": ("vqav2", vqav2_test),
    "okvqa": ("okvqa", okvqa),
    "textvqa": ("textvqa", textvqa),
    "vizwiz": ("vizwiz", vizwiz),
    "vizwiz test": ("vizwiz", lambda folder: vizwiz(folder, "test")),
    "gqa": ("gqa", gqa),
    "iconqa": ("iconqa", iconqa),
    "ocrvqa": ("ocrvqa", ocrvqa),
    "stvqa": ("stvqa", stvqa),
    "stvqa test": ("stvqa", lambda folder: stvqa(folder, "test")),
    "docvqa": ("docvqa", docvqa),
    "docvqa test": ("docvqa", lambda folder: docvqa(folder, "test")),
    "scienceqa": ("scienceqa", scienceqa),
    "mmbench": ("mmbench", mmbench),
    "mmbench test": ("mmbench", lambda folder: mmbench(folder, "test")),
    "mmmu": ("mmmu", mmmu),
    "mmmu test": ("mmmu", lambda folder: mmmu(folder, "test")),
    "mme": ("mme", mme),
    "pope": ("pope", pope),
    "mmvet": ("mmvet", mmvet),
    "infimm-eval": ("infimm-eval", infimm_eval),
}
"""Name of the test -> task, and what writes it."""

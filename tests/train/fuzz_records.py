"""Files of random good and broken records, for every reader, with what has to become of each record."""

import base64
import io
import json
import random
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.data.vqa import VQA_FORMS

from .tiny_stage import WORDS, messages

GOOD, BAD, EITHER = "good", "bad", "either"
"""What has to become of a record: trained on, skipped, one of both."""


class Case:
    """One round's folder and random choices."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.number = rng.choice([6, 12, 24])
        self._images = 0

    def words(self, count: int | None = None) -> str:
        return " ".join(self.rng.choice(WORDS[7:]) for _ in range(count or self.rng.randint(1, 4)))

    def good_image(self) -> bytes:
        rng = self.rng
        size = rng.choice([(1, 30), (30, 20), (64, 64), (90, 20), (13, 70)])
        mode, kind = rng.choice(
            [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("LA", "PNG")]
            + [
                ("RGBA", "PNG"),
                ("1", "PNG"),
                ("I;16", "PNG"),
                ("RGB", "WEBP"),
                ("RGB", "GIF"),
                ("RGB", "BMP"),
            ]
        )
        if mode == "I;16":
            picture = Image.fromarray(np.full(size[::-1], rng.randint(0, 65535), np.uint16))
        else:
            picture = Image.new("RGB", size, tuple(rng.randint(0, 255) for _ in range(3))).convert(mode)
        file = io.BytesIO()
        exif = {}
        if kind == "JPEG" and rng.random() < 0.3:
            tags = Image.Exif()
            tags[0x0112] = rng.randint(1, 8)
            exif["exif"] = tags
        picture.save(file, kind, **exif)
        return file.getvalue()

    def bad_image(self) -> bytes:
        rng, good = self.rng, self.good_image()
        bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
        bomb += zlib.crc32(bomb[12:]).to_bytes(4, "big")
        half = io.BytesIO()
        Image.fromarray(np.frombuffer(rng.randbytes(3 * 40 * 40), np.uint8).reshape(40, 40, 3)).save(
            half, "PNG"
        )
        cut = half.getvalue()[: len(half.getvalue()) // 2]
        return rng.choice([b"", b"\0", rng.randbytes(60), b"<html>not found</html>", good[:9], bomb, cut])

    def image(self) -> tuple[str, str]:
        """Name of an image file, and what it is."""
        kind = self.rng.choices([GOOD, BAD, EITHER], [8, 1, 1])[0]
        self._images += 1
        name = f"{self._images}.jpg"
        content = self.bad_image() if kind == BAD else self.good_image()
        if kind == EITHER:  # some bytes are others
            content = bytearray(content)
            for _ in range(3):
                content[self.rng.randrange(len(content))] = self.rng.randrange(256)
        (self.folder / name).write_bytes(content)
        return name, kind

    def bad_name(self) -> Any:
        return self.rng.choice(["gone.jpg", "", "x" * 5000, "a\0b", "../" * 40, 3, [[]], {"a": 1}, "\ud800"])

    def bad_text(self) -> Any:
        return self.rng.choice(
            ["", " \n\t", None, 7, ["a"], {"a": "b"}, "red <end> blue", "\ud800 red", True]
        )

    def value_as_text(self) -> Any:
        return self.rng.choice([3, [], "<image>", "\ud800", "red <end>"])

    def value(self) -> Any:
        values = [None, True, -1, 1e308, float("nan"), 10**30, "", "\0", "é" * 300, [], {}, [None], {"": []}]
        return self.rng.choice(values)

    def damaged(self, record: Any) -> Any:
        """A copy with a value anywhere in it replaced, or taken away."""
        copy = json.loads(json.dumps(record))
        places = list(_places(copy))
        if not places:
            return self.value()
        owner, key = self.rng.choice(places)
        if self.rng.random() < 0.3:
            del owner[key]
        else:
            owner[key] = self.value()
        return copy

    def records(
        self, good: Callable[[], tuple[Any, str]], breakers: list[Callable[[Any], Any]]
    ) -> tuple[list, list]:
        """`number` records and what has to become of each: good ones, broken by one of `breakers`, or with
        a random damage."""
        records, expected = [], []
        for _ in range(self.number):
            record, kind = good()
            choice = self.rng.random()
            if choice < 0.3:
                record, kind = self.rng.choice(breakers)(record), BAD
            elif choice < 0.5:
                record, kind = self.damaged(record), EITHER
            records.append(record)
            expected.append(kind)
        return records, expected

    def write_lines(self, records: list, expected: list) -> Path:
        path = self.folder / "records.jsonl"
        lines = []
        for i, record in enumerate(records):
            line = json.dumps(record).encode()
            if i == 0 and line[:1] == b"[":
                line = b"null"
            if self.rng.random() < 0.1:
                # a file that begins with [ is an array, and a damaged one is refused as a whole
                deep = (b"[" if i else b'{"a":') * 5000
                broken = [
                    b'{"a' + line[: len(line) // 2],
                    b"\xff\xfe" + line,
                    deep,
                    b"nul",
                    b"\0",
                    line + b"]",
                ]
                line, expected[i] = self.rng.choice(broken), BAD
            lines += [b""] * (self.rng.random() < 0.1) + [line]
        path.write_bytes((b"\xef\xbb\xbf" if self.rng.random() < 0.2 else b"") + b"\n".join(lines))
        return path

    def write_json(self, content: Any, name: str = "records.json") -> Path:
        path = self.folder / name
        path.write_text(json.dumps(content, indent=self.rng.choice([None, 1])))
        return path


def _places(value: Any):
    entries = (
        enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    )
    for key, inner in list(entries):
        yield value, key
        yield from _places(inner)


def _worst(*kinds: str) -> str:
    return BAD if BAD in kinds else EITHER if EITHER in kinds else GOOD


def _conversations(case: Case):
    def good() -> tuple[dict, str]:
        images = [case.image() for _ in range(case.rng.choice([0, 1, 1, 1, 2]))]
        turns = [case.words() for _ in range(2 * case.rng.randint(1, 2))]
        turns[0] = "<image>\n" * len(images) + turns[0]
        record: dict[str, Any] = {"id": 1, "conversations": messages(*turns)}
        if images:
            record["image"] = images[0][0] if len(images) == 1 else [name for name, _ in images]
        return record, _worst(*(kind for _, kind in images))

    def with_turn(text: Callable[[], Any], place: int = 1) -> Callable[[dict], dict]:
        def change(record: dict) -> dict:
            record["conversations"][place]["value"] = text()
            return record

        return change

    breakers = [
        with_turn(case.bad_text),
        with_turn(lambda: "<image>"),
        with_turn(lambda: "<image> " * 3 + "which ?", 0),
        lambda record: record | {"image": case.bad_name() or "gone.jpg"},
        lambda record: (
            record | {"conversations": case.rng.choice([[], None, record["conversations"][:1], "x"])}
        ),
        lambda record: {"conversations": messages("which " * 90, "red")},
    ]
    records, expected = case.records(good, breakers)
    as_lines = case.rng.random() < 0.5
    path = case.write_lines(records, expected) if as_lines else case.write_json(records)
    return {"name": "conversations", "path": str(path)}, expected


def _shards(case: Case):
    """Tar shards, the last one cut off anywhere."""
    members: list[tuple[str, bytes]] = []
    expected, doubled = [], set()
    for i in range(case.number):
        name, kind = case.image()
        image = (f"{i}.{case.rng.choice(['jpg', 'PNG', 'webp'])}", (case.folder / name).read_bytes())
        text = (f"{i}.txt", case.words().encode())
        choice = case.rng.randrange(12)
        if choice == 0:
            text = (f"{i}.json", json.dumps({"caption": case.words(), "x": case.value()}).encode())
        parts = [image, text]
        broken = {
            1: [image],
            2: [text],
            3: [image, (f"{i}.txt", case.rng.choice([b"", b" \n", b"\xff\xfe", b"red <end>"]))],
            4: [image, image, text],
            5: [image, (f"{i}.json", case.rng.choice([b"{", b"[]", b'{"caption": 3}', b"\0", b""]))],
            6: [image, (f"{i}.cls", b"3")],
        }
        if choice in broken:
            parts, kind = broken[choice], BAD
        if choice == 4:
            doubled.add(i)
        members += case.rng.sample(parts, len(parts))
        expected.append(kind)
    path = case.folder / "shard-0.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if case.rng.random() < 0.5:
        with tarfile.open(path) as tar:
            spans = [(member.name.split(".")[0], member.offset_data, member.size) for member in tar]
        length = case.rng.randint(512, path.stat().st_size)
        path.write_bytes(path.read_bytes()[:length])
        for key, start, size in spans:
            if start + size > length:
                # a second image that is gone leaves a good key
                expected[int(key)] = EITHER if int(key) in doubled else BAD
        begun = {int(key) for key, start, _ in spans if start <= length}
        expected = [kind for key, kind in enumerate(expected) if key in begun]
    return {"name": "webdataset", "path": str(case.folder / "shard-{0..0}.tar")}, expected


def _mmc4(case: Case):
    def good() -> tuple[dict, str]:
        texts = [case.words() for _ in range(case.rng.randint(1, 4))]
        infos, kinds = [], []
        for _ in range(case.rng.randint(1, 3)):
            name, kind = case.image()
            info: dict[str, Any] = {"matched_text_index": case.rng.randrange(len(texts)), "matched_sim": 0.3}
            if case.rng.random() < 0.5:
                info["image_name"] = name
            else:
                info["image_base64"] = base64.b64encode((case.folder / name).read_bytes()).decode()
            infos.append(info)
            kinds.append(kind)
        return {"text_list": texts, "image_info": infos}, _worst(*kinds)

    def first(record: dict, **change: Any) -> dict:
        record["image_info"][0] = {
            key: value for key, value in record["image_info"][0].items() if key != "image_base64"
        } | change
        return record

    breakers = [
        lambda record: first(record, image_name=case.bad_name() or 5),
        lambda record: first(record, matched_text_index=case.rng.choice([-1, 99, None, "0", True, 0.0])),
        lambda record: first(record, image_base64=case.rng.choice(["?", "", "AAAA", 5])),
        lambda record: record | {"image_info": case.rng.choice([[], None, [5], {}])},
        lambda record: record | {"text_list": case.rng.choice([[], None, [""], [5], "red"])},
        lambda record: record | {"text_list": [case.rng.choice(["<image>", "red <end>"])] * 4},
    ]
    records, expected = case.records(good, breakers)
    return {"name": "mmc4", "path": str(case.write_lines(records, expected))}, expected


def _obelics(case: Case):
    def good() -> tuple[dict, str]:
        parts, kinds = [], []
        for _ in range(case.rng.randint(1, 3)):
            name, kind = case.image()
            parts += [(name, None), (None, case.words())]
            kinds.append(kind)
        return {"images": [a for a, _ in parts], "texts": [b for _, b in parts]}, _worst(*kinds)

    breakers = [
        lambda record: record | {"images": [case.bad_name() or "", *record["images"][1:]]},
        lambda record: record | {"texts": record["texts"][1:]},
        lambda record: record | {"texts": [None] * len(record["texts"])},
        lambda record: record | {"images": [None] * len(record["images"])},
        lambda record: (
            record
            | {"texts": [None, case.rng.choice([3, [], "<image>", "\ud800"])] * (len(record["texts"]) // 2)}
        ),
        lambda record: case.rng.choice([None, 3, [], "x", {}]),
    ]
    records, expected = case.records(good, breakers)
    return {"name": "obelics", "path": str(case.write_lines(records, expected))}, expected


def _vqa(case: Case):
    """Every published form; a field of each may be broken."""
    name = case.rng.choice(list(VQA_FORMS))
    form = VQA_FORMS[name]

    def good() -> tuple[dict, str]:
        image, kind = case.image()
        answers: Any = case.rng.choice([[case.words()], [{"answer": case.words()}] * 3])
        question: Any = case.words()
        if form.whole_image:
            question, answers = [question] * 2, [case.words()] * 2
        return {"picture": image, form.question: question, form.answers: answers, "split": 1}, kind

    breakers = [
        lambda record: record | {"picture": case.rng.choice(["gone.jpg", "", "a\0b", "x" * 5000, [], {}])},
        lambda record: record | {form.question: case.rng.choice([None, 7, {}, [], "", [""]])},
        lambda record: record | {form.answers: case.rng.choice([None, 7, {}, [], [""], [3], [{"a": 1}]])},
        lambda record: record | {form.answers: ["<image>"] * 2},
        lambda record: {},
    ]
    if not form.whole_image:
        breakers.append(lambda record: record | {form.question: "which " * 90})
    records, expected = case.records(good, breakers)
    options: dict[str, Any] = {"form": name, "image_name": "{picture}"}
    if form.annotated:
        ids = case.rng.sample(range(10**6), len(records))
        annotations = []
        for i, record in enumerate(records):
            if not isinstance(record, dict):
                continue
            annotations.append({"question_id": ids[i], form.answers: record.pop(form.answers, None)})
            record["question_id"] = ids[i]
        missing = case.rng.randrange(len(records))
        annotations = [each for each in annotations if each["question_id"] != ids[missing]]
        expected[missing] = BAD
        annotations.append({"question_id": case.value()})
        case.rng.shuffle(annotations)
        options["annotations"] = str(case.write_json({"annotations": annotations}, "answers.json"))
    content: Any = records
    if form.entries:
        records = [record if not isinstance(record, dict) else record | {"split": 1} for record in records]
        content = {str(i): record for i, record in enumerate(records)}
    elif form.key is not None:
        content = {"info": [case.value()], form.key: records}
    return {"name": "vqa", "path": str(case.write_json(content)), "options": options}, expected


def _captions(case: Case):
    images, kinds = [], {}
    for i in range(8):
        name, kinds[i] = case.image()
        images.append({"id": i, "file_name": name})

    def good() -> tuple[dict, str]:
        image = case.rng.randrange(8)
        return {"image_id": image, "caption": case.words()}, kinds[image]

    breakers = [
        lambda record: record | {"image_id": case.rng.choice([99, -1, None, "1", 10**30, 0.5, []])},
        lambda record: record | {"caption": case.bad_text()},
        lambda record: record | {"caption": "\ud800"},
        lambda record: case.rng.choice([None, [], 3, "x"]),
    ]
    records, expected = case.records(good, breakers)
    images += [case.value(), {"id": 0, "file_name": "second.jpg"}]
    content = {"images": images, "licenses": case.value(), "annotations": records}
    return {"name": "captions", "path": str(case.write_json(content))}, expected


def _regions(case: Case):
    """Regions of several images; a record whose regions are no list counts as one bad sample."""
    records, expected = [], []
    while len(expected) < case.number:
        name, kind = case.image()
        (case.folder / "VG_100K").mkdir(exist_ok=True)
        (case.folder / name).rename(case.folder / "VG_100K" / f"{len(records)}.jpg")
        box = {"x": 0, "y": 0, "width": 9, "height": 9, "image_id": len(records), "phrase": case.words()}
        regions = []
        for _ in range(case.rng.randint(1, 3)):
            choice = case.rng.random()
            if choice < 0.5:
                regions.append(box)
                expected.append(kind)
            elif choice < 0.8:
                change = {"x": 10**30}, {"y": None}, {"width": 0}, {"height": float("nan")}, {"x": 9000}
                wrong = (
                    *change,
                    {"phrase": case.bad_text()},
                    {"image_id": case.rng.choice([99, None, [], ""])},
                )
                regions.append(box | case.rng.choice(wrong))
                expected.append(BAD)
            else:
                regions.append(case.damaged(box))
                expected.append(EITHER)
        records.append({"id": len(records), "regions": regions})
        if case.rng.random() < 0.2:
            records.append(case.rng.choice([None, 3, {}, {"regions": None}, []]))
            expected.append(BAD)
    return {"name": "regions", "path": str(case.write_json(records))}, expected


def _augmented(case: Case):
    """A manifest of one set whose images are painted on; small ones cannot be."""
    config, expected = _captions(case)
    case.number = len(expected)
    entry = {"name": "set", "reader": config["name"], "path": config["path"], "augment": {"seed": 1}}
    path = case.write_json({"sets": [entry]}, "manifest.json")
    expected = [EITHER if kind == GOOD else kind for kind in expected]
    return {"name": "manifest", "path": str(path)}, expected


WRITERS: dict[str, Callable[[Case], tuple[dict[str, Any], list[str]]]] = {
    "conversations": _conversations,
    "webdataset": _shards,
    "mmc4": _mmc4,
    "obelics": _obelics,
    "vqa": _vqa,
    "captions": _captions,
    "regions": _regions,
    "augmented": _augmented,
}

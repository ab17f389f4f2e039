"""Readers of the sets with free answers: VQAv2, OK-VQA, VizWiz, TextVQA, GQA, OCR-VQA, ST-VQA, DocVQA."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from train.data.fields import IdTable, filled, list_of, text_of
from train.data.images import existing_image
from train.data.records import JsonRecords
from train.data.samples import BadSample, short
from train.data.vqa import VQA_FORMS

from .questions import Question, Source, read_each

_COCO_SPLITS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test2015"}
_OCRVQA_SPLITS = {"train": 1, "val": 2, "test": 3}


def answers_of(record: Mapping[str, Any], name: str, origin: str) -> tuple[str, ...]:
    """All annotators' answers, in order and as they are; none if the record has no such field.

    The field is a text, or a list of texts or of {"answer": text}."""
    value = record.get(name)
    if value is None:
        return ()
    listed = [value] if isinstance(value, str) else value
    texts = [each.get("answer") if isinstance(each, dict) else each for each in listed] if listed else []
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in texts):
        rule = "be a text, a list of texts or of {'answer': text}"
        raise BadSample("bad_record", f"{origin}: {name} must {rule}, got {short(value)}")
    return tuple(texts)


def id_of(record: Mapping[str, Any], name: str, origin: str) -> str:
    value = record.get(name)
    if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
        raise BadSample(
            "bad_record", f"{origin}: {name} must be a text or a whole number, got {short(value)}"
        )
    return str(value)


def read_coco(source: Source) -> list[Question]:
    """VQAv2 and OK-VQA: questions in one file, answers in another, images of COCO's splits."""
    records = JsonRecords(source.path, argument="--data", key="questions")
    annotations, places = None, IdTable()
    if source.annotations is not None:
        annotations = JsonRecords(
            source.annotations,
            argument="--annotations",
            key="annotations",
            visit=lambda record: places.add(record, "question_id"),
        )
        places.close()
    pattern = f"COCO_{_COCO_SPLITS[source.split]}_{{image_id:012d}}.jpg"

    def read(index: int) -> Question:
        record, origin = records.load_object(index), records.place(index)
        number = id_of(record, "question_id", origin)
        answers: tuple[str, ...] = ()
        if annotations is not None:
            place = places.find(record["question_id"])
            if place is None:
                rule = "question_id must be one of the annotations"
                raise BadSample("no_annotation", f"{origin}: {rule}, got {number}")
            answers = answers_of(annotations.load_object(place), "answers", annotations.place(place))
        return Question(
            id=number,
            text=text_of(record, "question", origin),
            images=(source.images / filled(pattern, record, origin),),
            answers=answers,
            fields={"question_id": record["question_id"]},
        )

    return read_each(len(records), records.place, read)


def _read_list(source: Source, form: str, id_field: str) -> list[Question]:
    """A list of records, at the key and with the images' names that training reads as well."""
    chosen = VQA_FORMS[form]
    records = JsonRecords(source.path, argument="--data", key=chosen.key)

    def read(index: int) -> Question:
        record, origin = records.load_object(index), records.place(index)
        return Question(
            id=id_of(record, id_field, origin),
            text=text_of(record, chosen.question, origin),
            images=(source.images / filled(chosen.image, record, origin),),
            answers=answers_of(record, chosen.answers, origin),
            fields={id_field: record[id_field]},
        )

    return read_each(len(records), records.place, read)


def read_textvqa(source: Source) -> list[Question]:
    return _read_list(source, "textvqa", "question_id")


def read_stvqa(source: Source) -> list[Question]:
    return _read_list(source, "stvqa", "question_id")


def read_docvqa(source: Source) -> list[Question]:
    return _read_list(source, "docvqa", "questionId")


def read_vizwiz(source: Source) -> list[Question]:
    """A question an image, whose name is the id."""
    return _read_list(source, "vizwiz", "image")


def read_gqa(source: Source) -> list[Question]:
    """An object of records by question id."""
    records = JsonRecords(source.path, argument="--data", entries=True)

    def read(index: int) -> Question:
        key, record = _entry(records, index)
        origin = f"{records.place(index)} ({short(key)})"
        return Question(
            id=key,
            text=text_of(record, "question", origin),
            images=(source.images / filled(VQA_FORMS["gqa"].image, record, origin),),
            answers=answers_of(record, "answer", origin),
            fields={"questionId": key},
        )

    return read_each(len(records), records.place, read)


def read_ocrvqa(source: Source) -> list[Question]:
    """An object of books by key, each with its questions and answers; a question's id is key and number."""
    split = _OCRVQA_SPLITS[source.split]

    def of_split(entry: tuple[str, Any]) -> bool:
        """A damaged entry, of no split, stays and is named when it is read."""
        found = entry[1].get("split") if isinstance(entry[1], dict) else None
        return found in (split, None)

    records = JsonRecords(source.path, argument="--data", entries=True, visit=of_split)

    def read(index: int) -> list[Question]:
        key, record = _entry(records, index)
        origin = f"{records.place(index)} ({short(key)})"
        texts, answers = list_of(record, "questions", origin), list_of(record, "answers", origin)
        if len(texts) != len(answers):
            rule = "questions and answers must be as many"
            raise BadSample("bad_record", f"{origin}: {rule}, got {len(texts)} and {len(answers)}")
        image = _book_cover(source, key, record, origin)
        return [
            Question(
                id=f"{key}_{number}",
                text=text_of({"question": text}, "question", origin),
                images=(image,),
                answers=answers_of({"answer": answer}, "answer", origin),
            )
            for number, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ]

    return read_each(len(records), records.place, read)


def _book_cover(source: Source, key: str, record: Mapping[str, Any], origin: str) -> Any:
    """Downloaded under the key with the ending of the image's address, or all as .jpg."""
    address = record.get("imageURL")
    ending = PurePosixPath(urlsplit(address).path).suffix if isinstance(address, str) else ""
    try:
        return existing_image(source.images, f"{key}{ending or '.jpg'}", origin)
    except BadSample:
        return source.images / f"{key}.jpg"


def _entry(records: JsonRecords, index: int) -> tuple[str, dict[str, Any]]:
    key, record = records.load(index)
    if not isinstance(record, dict):
        rule = f"{records.place(index)} ({short(key)}): record must be a JSON object"
        raise BadSample("bad_json", f"{rule}, got {short(record)}")
    return key, record

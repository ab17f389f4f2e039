"""Readers of the sets with options: IconQA, ScienceQA, MMBench, MMMU."""

import ast
import csv
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.data.fields import list_of, text_of
from train.data.images import Base64Image
from train.data.records import JsonRecords
from train.data.samples import BadSample, short

from .questions import Question, Source, letter_of, options_of, read_each
from .readers_vqa import answers_of, id_of

CIRCLE = 1_000_000
"""MMBench numbers the rotations of question n as n + 1,000,000, n + 2,000,000 ..."""

_MOST_IMAGES = 7
"""Of a question of MMMU: fields image_1 to image_7."""

_LONGEST_CELL = 1 << 28
"""Characters; the csv module's own limit is far below a picture in base64."""


def _splits(folder: Path, split: str, argument: str = "--data") -> list[str]:
    """The problems of a split in the published pid_splits.json, {"train": [id, ...], ...}."""
    path = folder / "pid_splits.json"
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{argument} must hold pid_splits.json, got {str(folder)!r}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{argument} must hold a JSON pid_splits.json, got {str(path)!r}: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get(split), list):
        known = ", ".join(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"--split must be one of pid_splits.json ({known}), got {split!r}")
    return [str(number) for number in found[split]]


def _problems(source: Source) -> tuple[list[str], dict[str, int], JsonRecords]:
    """Ids of the split, places by id, and the records of problems.json, {id: problem}."""
    places: dict[str, int] = {}
    numbers = itertools.count()  # not the size of `places`: a file may have a key twice
    records = JsonRecords(
        source.path / "problems.json",
        argument="--data",
        entries=True,
        visit=lambda entry: places.update({entry[0]: next(numbers)}),
    )
    return _splits(source.path, source.split), places, records


def _problem(number: str, places: Mapping[str, int], records: JsonRecords) -> tuple[dict[str, Any], str]:
    if number not in places:
        raise BadSample("no_problem", f"{records.path}: {short(number)} of the split must be a problem in it")
    record, origin = records.load(places[number])[1], f"{records.place(places[number])} ({number})"
    if not isinstance(record, dict):
        raise BadSample("bad_json", f"{origin}: record must be a JSON object, got {short(record)}")
    return record, origin


def read_scienceqa(source: Source) -> list[Question]:
    """problems.json and pid_splits.json; images at SPLIT/ID/image.png. Many questions have no image."""
    ids, places, records = _problems(source)

    def read(index: int) -> Question:
        record, origin = _problem(ids[index], places, records)
        options = options_of(str(choice) for choice in list_of(record, "choices", origin))
        image, folder = record.get("image"), record.get("split") or source.split
        return Question(
            id=ids[index],
            text=text_of(record, "question", origin),
            hint=str(record.get("hint") or "").strip(),
            images=(source.images / str(folder) / ids[index] / str(image),) if image else (),
            options=options,
            answers=(letter_of(record.get("answer"), options, origin),),
            group="with an image" if image else "without an image",
        )

    return read_each(len(ids), lambda index: f"{records.path} problem {ids[index]}", read)


def read_iconqa(source: Source) -> list[Question]:
    """problems.json and pid_splits.json; images at iconqa/SPLIT/KIND/ID/image.png and, where images are the
    options, choice_N.png beside it. KIND: choose_img, choose_txt or fill_in_blank."""
    ids, places, records = _problems(source)

    def read(index: int) -> Question:
        record, origin = _problem(ids[index], places, records)
        kind = text_of(record, "ques_type", origin)
        folder = source.images / "iconqa" / source.split / kind / ids[index]
        images, options = [folder / "image.png"], {}
        if kind == "fill_in_blank":
            answers: tuple[str, ...] = (id_of(record, "answer", origin),)
        else:
            choices = [str(choice) for choice in list_of(record, "choices", origin)]
            if kind == "choose_img":
                images += [folder / choice for choice in choices]
                choices = [f"<image {number + 2}>" for number in range(len(choices))]
            options = options_of(choices)
            answers = (letter_of(record.get("answer"), options, origin),)
        return Question(
            id=ids[index],
            text=text_of(record, "question", origin),
            images=tuple(images),
            options=options,
            answers=answers,
            group=kind,
        )

    return read_each(len(ids), lambda index: f"{records.path} problem {ids[index]}", read)


def read_mmbench(source: Source) -> list[Question]:
    """Tab-separated lines with the image in base64, or the index of the line that has it."""
    csv.field_size_limit(_LONGEST_CELL)
    with source.path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.DictReader(file, dialect="excel-tab")
        missing = {"index", "question", "A", "B", "image"} - set(lines.fieldnames or ())
        if missing:
            rule = "be tab-separated with a header of index, question, A, B, ..., image"
            raise ValueError(
                f"--data must {rule}, got no {', '.join(sorted(missing))} in {str(source.path)!r}"
            )
        rows = [{name: value or "" for name, value in line.items() if name} for line in lines]
    pictures = {row["index"]: row["image"] for row in rows}

    def read(index: int) -> Question:
        row, origin = rows[index], f"{source.path} row {index + 1}"
        number = id_of(row, "index", origin)
        if not number.isdecimal():
            raise BadSample("bad_record", f"{origin}: index must be a whole number, got {short(number)}")
        picture = row["image"]
        picture = pictures.get(picture, picture)
        if not picture:
            raise BadSample("missing_image", f"{origin}: image must be base64 or another row's index, got ''")
        options = {letter: row[letter] for letter in "ABCDE" if _filled(row.get(letter))}
        answer = row.get("answer", "")
        if _filled(answer) and answer not in options:
            rule = f"answer must be one of {', '.join(options)}"
            raise BadSample("bad_record", f"{origin}: {rule}, got {short(answer)}")
        return Question(
            id=number,
            text=text_of(row, "question", origin),
            hint=row.get("hint", "").strip() if _filled(row.get("hint")) else "",
            images=(Base64Image(f"{origin} image", picture),),
            options=options,
            answers=(answer,) if _filled(answer) else (),
            unit=str(int(number) % CIRCLE),
            fields={name: row.get(name, "") for name in ("index", "question", "A", "B", "C", "D")},
        )

    return read_each(len(rows), lambda index: f"{source.path} row {index + 1}", read)


def _filled(cell: str | None) -> bool:
    """pandas, which wrote the published files, has "nan" for nothing in some of them."""
    return bool(cell and cell.strip()) and cell.strip().lower() != "nan"


def read_mmmu(source: Source) -> list[Question]:
    """JSON lines of the published rows, whose images image_1 ... image_7 are files named there."""
    records = JsonRecords(source.path, argument="--data")

    def read(index: int) -> Question:
        record, origin = records.load_object(index), records.place(index)
        texts = _listed(record.get("options", []), "options", origin)
        options = options_of(str(text) for text in texts)
        # image n of the text is the n-th of those given, which the published rows fill from the first on
        names = [record.get(f"image_{n}") for n in range(1, _MOST_IMAGES + 1)]
        answers = answers_of({"answer": _listed(record.get("answer"), "answer", origin)}, "answer", origin)
        answers = tuple(answer for answer in answers if answer != "?")  # of the test split
        if options and any(answer not in options for answer in answers):
            rule = f"answer must be one of {', '.join(options)}"
            raise BadSample("bad_record", f"{origin}: {rule}, got {short(record['answer'])}")
        return Question(
            id=id_of(record, "id", origin),
            text=text_of(record, "question", origin),
            images=tuple(source.images / _name(name, origin) for name in names if name is not None),
            options=options,
            answers=answers,
            group="multiple choice" if options else "open",
        )

    return read_each(len(records), records.place, read)


def _name(value: Any, origin: str) -> str:
    if not isinstance(value, str) or not value:
        raise BadSample("missing_image", f"{origin}: image must be a file name, got {short(value)}")
    return value


def _listed(value: Any, name: str, origin: str) -> list[Any]:
    """A list; the published rows have it written as Python writes it: "['a', 'b']"."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadSample("bad_record", f"{origin}: {name} must be a list, got {short(value)}") from None
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]

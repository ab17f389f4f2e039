"""Questions about images with short answers, in the forms that the sets are published in."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..config import nearest_name
from .fields import IdTable, filled, list_of, majority, text_of
from .images import existing_folder, existing_image
from .records import JsonRecords
from .samples import IMAGE_MARK, BadSample, RecordDataset, Sample, short


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VQAForm:
    """Where a published form keeps what a sample needs."""

    image: str
    """Name of the image file, with {fields} of the record; {key} is the record's key in a file of entries."""
    key: str | None = None
    """Name of the list of records in the file's object; without it and `entries` the file is a list."""
    entries: bool = False
    """The file is an object whose entries are the records."""
    question: str = "question"
    answers: str = "answers"
    """Field of a text, a list of texts or of {"answer": text}."""
    annotated: bool = False
    """The answers stand in a second file, under "annotations", joined by `question_id`."""
    whole_image: bool = False
    """A record is an image with lists of questions and answers, all turns of one sample."""
    split: bool = False
    """Records name their `split`: 1 training, 2 validation, 3 test."""


_COCO_2014 = "COCO_train2014_{image_id:012d}.jpg"
VQA_FORMS: Mapping[str, VQAForm] = MappingProxyType(
    {
        "vqav2": VQAForm(key="questions", image=_COCO_2014, annotated=True),
        "okvqa": VQAForm(key="questions", image=_COCO_2014, annotated=True),
        "vizwiz": VQAForm(image="{image}"),
        "textvqa": VQAForm(key="data", image="{image_id}.jpg"),
        "stvqa": VQAForm(key="data", image="{file_path}"),
        "docvqa": VQAForm(key="data", image="{image}"),
        "ocrvqa": VQAForm(
            entries=True, image="{key}.jpg", question="questions", whole_image=True, split=True
        ),
        "gqa": VQAForm(entries=True, image="{imageId}.jpg", answers="answer"),
        "aokvqa": VQAForm(image="{image_id:012d}.jpg", answers="direct_answers"),
    }
)


class VQADataset(RecordDataset):
    """One question of a set a sample (OCR-VQA: all questions about an image).

    `form`: a name of `VQA_FORMS`. `path` is the file as published; `annotations` is the file with the answers
    of the forms that keep them apart (VQAv2, OK-VQA). The target is the answer that most annotators gave.
    `image_name` replaces the form's pattern of file names (another COCO split, say); names start at
    `image_root` (default: the file's folder). `split` chooses the records of OCR-VQA (1: training)."""

    def __init__(
        self,
        path: str | Path,
        form: str,
        image_root: str | Path | None = None,
        annotations: str | Path | None = None,
        image_name: str | None = None,
        split: int = 1,
    ) -> None:
        self.form = chosen_form(form, VQA_FORMS)
        self.image_name = chosen_name(image_name, self.form.image)
        if (annotations is not None) != self.form.annotated:
            rule = "be given" if self.form.annotated else "be left out"
            raise ValueError(
                f"data.options.annotations must {rule} for the form {form!r}, got {annotations!r}"
            )
        visit = (lambda entry: _split(entry) in (split, None)) if self.form.split else None
        self._records = JsonRecords(path, key=self.form.key, entries=self.form.entries, visit=visit)
        self.image_root = existing_folder(image_root, self._records.path.parent)
        self.notes = []
        if self._records.num_left_out:
            self.notes.append(f"{path}: {self._records.num_left_out} records are not of split {split}")
        if annotations is not None:
            self._answers_by_id = IdTable()
            self._annotations = JsonRecords(
                annotations,
                argument="data.options.annotations",
                key="annotations",
                visit=lambda record: self._answers_by_id.add(record, "question_id"),
            )
            self._answers_by_id.close()
            if len(self._annotations) != len(self._records):
                counts = f"{len(self._annotations)} annotations and {len(self._records)} questions"
                self.notes.append(f"{annotations}: {counts}")

    def __len__(self) -> int:
        return len(self._records)

    def num_images(self, index: int) -> int:
        return 1

    def _sample(self, index: int) -> Sample:
        origin = self._records.place(index)
        record = self._records.load(index)
        if self.form.entries:
            key, record = record
            origin = f"{origin} ({short(key)})"
            record = {"key": key} | record if isinstance(record, dict) else record
        if not isinstance(record, dict):
            raise BadSample("bad_json", f"{origin}: record must be a JSON object, got {short(record)}")
        turns = self._all_turns(record, origin) if self.form.whole_image else [self._turn(record, origin)]
        image = existing_image(self.image_root, filled(self.image_name, record, origin), origin)
        (question, answer), *others = turns
        return Sample([image], [(IMAGE_MARK + question, answer), *others], origin=origin)

    def _turn(self, record: dict[str, Any], origin: str) -> tuple[str, str]:
        question, annotation = text_of(record, self.form.question, origin), record
        if self.form.annotated:
            place = self._answers_by_id.find(record.get("question_id"))
            if place is None:
                rule = "question_id must be one of the annotations"
                raise BadSample("no_annotation", f"{origin}: {rule}, got {short(record.get('question_id'))}")
            annotation = self._annotations.load_object(place)
        return question, majority(annotation.get(self.form.answers), origin)

    def _all_turns(self, record: dict[str, Any], origin: str) -> list[tuple[str, str]]:
        questions, answers = (
            list_of(record, name, origin) for name in (self.form.question, self.form.answers)
        )
        if len(questions) != len(answers) or not questions:
            rule = f"{self.form.question} and {self.form.answers} must be as many, and at least one"
            raise BadSample("bad_record", f"{origin}: {rule}, got {len(questions)} and {len(answers)}")
        return [
            (
                text_of({"question": question}, "question", origin),
                text_of({"answer": answer}, "answer", origin),
            )
            for question, answer in zip(questions, answers, strict=True)
        ]


def _split(entry: tuple[str, Any]) -> Any:
    """The entry's split; a record without one is kept, to be named when it is read."""
    return entry[1].get("split") if isinstance(entry[1], dict) else None


def chosen_form(form: Any, forms: Mapping[str, Any]) -> Any:
    if form not in forms:
        nearest = nearest_name(str(form), list(forms))
        rule = f"data.options.form must be one of {', '.join(forms)}"
        raise ValueError(f"{rule}, got {form!r}; did you mean {nearest!r}?")
    return forms[form]


def chosen_name(image_name: Any, default: str) -> str:
    if image_name is None:
        return default
    if not isinstance(image_name, str) or not image_name.strip():
        rule = "data.options.image_name must be a file name with fields in braces"
        raise ValueError(f"{rule}, got {image_name!r}")
    return image_name

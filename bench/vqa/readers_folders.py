"""Readers of MME, POPE, and of the sets that a judge scores: MM-Vet, InfiMM-Eval."""

import contextlib
from pathlib import Path
from typing import Any

from train.data.fields import text_of
from train.data.records import JsonRecords
from train.data.samples import BadSample, short

from .metrics_yes_no import MME_GROUPS, POPE_SPLITS
from .questions import Question, Source, read_each
from .readers_vqa import id_of

_ENDINGS = (".jpg", ".png", ".jpeg")
_IMAGE_FIELDS = ("images", "image", "image_path", "imagename", "image_name")


def read_mme(source: Source) -> list[Question]:
    """A folder a subtask, in it a NAME.txt for each image, with two lines `question TAB Yes|No`, beside the
    images, or texts in questions_answers_YN/ and images in images/."""
    subtasks = [name for names in MME_GROUPS.values() for name in names]
    found = [(name, source.path / name) for name in subtasks if (source.path / name).is_dir()]
    if not found:
        rule = f"hold folders of subtasks ({', '.join(subtasks)})"
        raise ValueError(f"--data must {rule}, got none in {str(source.path)!r}")
    texts = [(name, path) for name, folder in found for path in _texts(folder)]

    def read(index: int) -> list[Question]:
        subtask, path = texts[index]
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in lines if line.strip()]
        if len(lines) != 2:
            raise BadSample("bad_record", f"{path}: file must have two questions, got {len(lines)} lines")
        image, unit = _mme_image(source, subtask, path), f"{subtask}/{path.stem}"
        return [_mme_question(line, f"{path} line {n}", unit, image, n) for n, line in enumerate(lines, 1)]

    return read_each(len(texts), lambda index: str(texts[index][1]), read, lambda index: texts[index][0])


def _texts(folder: Path) -> list[Path]:
    inner = folder / "questions_answers_YN"
    return sorted((inner if inner.is_dir() else folder).glob("*.txt"))


def _mme_image(source: Source, subtask: str, path: Path) -> Path:
    folder = source.images / subtask
    folder = folder / "images" if (folder / "images").is_dir() else folder
    names = [folder / f"{path.stem}{ending}" for ending in _ENDINGS]
    return next((name for name in names if name.is_file()), names[0])


def _mme_question(line: str, origin: str, unit: str, image: Path, number: int) -> Question:
    text, separator, answer = line.rpartition("\t")
    known = answer.strip().lower()
    if not separator or known not in ("yes", "no"):
        raise BadSample("bad_record", f"{origin}: line must be question, tab, Yes or No, got {short(line)}")
    return Question(
        id=f"{unit}/{number}",
        text=text_of({"question": text}, "question", origin),
        images=(image,),
        answers=(known,),
        group=unit.split("/")[0],
        unit=unit,
    )


def read_pope(source: Source) -> list[Question]:
    """JSON lines, a file a split: a folder with coco_pope_random.json, ..._popular.json and
    ..._adversarial.json, or one of them. The split is in the file's name."""
    paths = [source.path]
    if source.path.is_dir():
        paths = [path for split in POPE_SPLITS for path in sorted(source.path.glob(f"*pope_{split}.json*"))]
    if not paths:
        rule = "hold coco_pope_random.json, coco_pope_popular.json or coco_pope_adversarial.json"
        raise ValueError(f"--data must {rule}, got none in {str(source.path)!r}")
    return [question for path in paths for question in _read_pope_file(source, path)]


def _read_pope_file(source: Source, path: Path) -> list[Question]:
    split = next((split for split in POPE_SPLITS if split in path.name), None)
    if split is None:
        rule = f"have its split in its name ({', '.join(POPE_SPLITS)})"
        raise ValueError(f"--data must {rule}, got {str(path)!r}")
    records = JsonRecords(path, argument="--data")

    def read(index: int) -> Question:
        record, origin = records.load_object(index), records.place(index)
        known = text_of(record, "label", origin).lower()
        if known not in ("yes", "no"):
            raise BadSample("bad_record", f"{origin}: label must be yes or no, got {short(known)}")
        return Question(
            id=f"{split}/{id_of(record, 'question_id', origin)}",
            text=text_of(record, "text", origin),
            images=(source.images / text_of(record, "image", origin),),
            answers=(known,),
            group=split,
        )

    return read_each(len(records), records.place, read, lambda index: split)


def read_mmvet(source: Source) -> list[Question]:
    """mm-vet.json, {id: {"imagename": ..., "question": ..., "answer": ..., "capability": [...]}}."""
    records = JsonRecords(source.path, argument="--data", entries=True)

    def read(index: int) -> Question:
        key, record = records.load(index)
        return _judged(source, key, record, f"{records.place(index)} ({short(key)})")

    return read_each(len(records), records.place, read)


def read_infimm_eval(source: Source) -> list[Question]:
    """Records with question and image (a name, or several): an object by id, or a list or JSON lines, with
    id or question_id."""
    if source.path.suffix != ".jsonl":
        with contextlib.suppress(ValueError):  # it is no object
            return read_mmvet(source)
    records = JsonRecords(source.path, argument="--data")

    def read(index: int) -> Question:
        record, origin = records.load_object(index), records.place(index)
        name = "question_id" if "question_id" in record else "id"
        return _judged(source, id_of(record, name, origin), record, origin)

    return read_each(len(records), records.place, read)


def _judged(source: Source, key: str, record: Any, origin: str) -> Question:
    if not isinstance(record, dict):
        raise BadSample("bad_json", f"{origin}: record must be a JSON object, got {short(record)}")
    value = next((record[name] for name in _IMAGE_FIELDS if record.get(name)), None)
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        rule = f"one of {', '.join(_IMAGE_FIELDS)} must be a file name or several"
        raise BadSample("missing_image", f"{origin}: {rule}, got {short(value)}")
    return Question(
        id=key,
        text=text_of(record, "question", origin),
        images=tuple(source.images / name for name in names),
    )

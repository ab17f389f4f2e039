"""The sets of the paper's Table 9 by name: files, metric, form of the prompt, where to get them."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from model.checks import nearest_name

from . import readers_choice, readers_folders, readers_vqa, scoring, submissions
from .questions import Question, Source

JUDGE = "needs a judge (GPT-4): the answers are exported, not scored"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """What a split is published as. An empty name: the folder itself."""

    questions: str = ""
    annotations: str | None = None
    """The file of the answers, of sets that keep them apart."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    title: str
    metric: str
    prompt: str
    """Form of the prompt (`prompts.PROMPT_FORMS`) unless --prompt-form names another."""
    max_new_tokens: int
    splits: Mapping[str, Files]
    """By name, the default first."""
    images: str
    """What --images has to hold."""
    where: str
    read: Callable[[Source], list[Question]]
    score: scoring.Scorer | None
    """None: the set needs a judge."""
    submit: submissions.Submit | None = None
    """Writes what a server or judge takes, for splits without known answers."""


def _coco(prefix: str, annotations: str, splits: tuple[str, ...]) -> dict[str, Files]:
    names = {"val": "val2014", "train": "train2014", "test-dev": "test-dev2015", "test": "test2015"}
    return {
        split: Files(
            questions=f"{prefix}OpenEnded_mscoco_{names[split]}_questions.json",
            annotations=None if split.startswith("test") else f"{annotations}{names[split]}_annotations.json",
        )
        for split in splits
    }


def _named(pattern: str, **splits: str) -> dict[str, Files]:
    return {name.replace("_", "-"): Files(questions=pattern.format(part)) for name, part in splits.items()}


_FOLDER = Files()
TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "vqav2": Task(
            title="VQAv2",
            metric="VQA score",
            prompt="short",
            max_new_tokens=16,
            splits=_coco("v2_", "v2_mscoco_", ("val", "test-dev", "test", "train")),
            images="COCO_val2014_*.jpg, COCO_test2015_*.jpg",
            where="visualqa.org/download.html",
            read=readers_vqa.read_coco,
            score=scoring.vqa,
            submit=submissions.as_list(),
        ),
        "okvqa": Task(
            title="OK-VQA",
            metric="VQA score",
            prompt="short",
            max_new_tokens=16,
            splits=_coco("", "mscoco_", ("val", "train")),
            images="COCO_val2014_*.jpg",
            where="okvqa.allenai.org",
            read=readers_vqa.read_coco,
            score=scoring.vqa,
        ),
        "textvqa": Task(
            title="TextVQA",
            metric="VQA score",
            prompt="short",
            max_new_tokens=16,
            splits=_named("TextVQA_0.5.1_{}.json", val="val", test="test", train="train"),
            images="ID.jpg",
            where="textvqa.org/dataset",
            read=readers_vqa.read_textvqa,
            score=scoring.vqa,
            submit=submissions.as_list(),
        ),
        "vizwiz": Task(
            title="VizWiz VQA",
            metric="VQA score",
            prompt="short",
            max_new_tokens=16,
            splits=_named("{}.json", val="val", test="test", train="train"),
            images="VizWiz_*.jpg",
            where="vizwiz.org/tasks-and-datasets/vqa",
            read=readers_vqa.read_vizwiz,
            score=scoring.vqa,
            submit=submissions.as_list(),
        ),
        "gqa": Task(
            title="GQA",
            metric="exact match",
            prompt="short",
            max_new_tokens=16,
            splits=_named(
                "{}_questions.json",
                testdev="testdev_balanced",
                val="val_balanced",
                test="submission_all",
            ),
            images="ID.jpg",
            where="cs.stanford.edu/people/dorarad/gqa/download.html",
            read=readers_vqa.read_gqa,
            score=scoring.exact,
            submit=submissions.as_list("prediction"),
        ),
        "iconqa": Task(
            title="IconQA",
            metric="exact match (options by letter or text)",
            prompt="letter",
            max_new_tokens=16,
            splits={"test": _FOLDER, "val": _FOLDER, "train": _FOLDER},
            images="iconqa/SPLIT/KIND/ID/image.png",
            where="iconqa.github.io (iconqa_data.zip)",
            read=readers_choice.read_iconqa,
            score=scoring.iconqa,
        ),
        "ocrvqa": Task(
            title="OCR-VQA",
            metric="exact match",
            prompt="short",
            max_new_tokens=32,
            splits={name: Files(questions="dataset.json") for name in ("test", "val", "train")},
            images="KEY.jpg, or with the ending of its imageURL",
            where="ocr-vqa.github.io",
            read=readers_vqa.read_ocrvqa,
            score=scoring.exact,
        ),
        "stvqa": Task(
            title="ST-VQA",
            metric="ANLS",
            prompt="short",
            max_new_tokens=32,
            splits=_named("{}_task_3.json", test="test", train="train"),
            images="the file_path of the records",
            where="rrc.cvc.uab.es/?ch=11 (task 3)",
            read=readers_vqa.read_stvqa,
            score=scoring.text_similarity,
            submit=submissions.as_list(),
        ),
        "docvqa": Task(
            title="DocVQA",
            metric="ANLS",
            prompt="short",
            max_new_tokens=32,
            splits=_named("{}_v1.0.json", val="val", test="test", train="train"),
            images="documents/*.png",
            where="rrc.cvc.uab.es/?ch=17 (task 1)",
            read=readers_vqa.read_docvqa,
            score=scoring.text_similarity,
            submit=submissions.as_list(),
        ),
        "scienceqa": Task(
            title="ScienceQA",
            metric="accuracy",
            prompt="letter",
            max_new_tokens=16,
            splits={name: _FOLDER for name in ("test", "val", "minitest", "minival", "train")},
            images="SPLIT/ID/image.png",
            where="scienceqa.github.io (problems.json, pid_splits.json and the images)",
            read=readers_choice.read_scienceqa,
            score=scoring.scienceqa,
        ),
        "mmbench": Task(
            title="MMBench",
            metric="accuracy, circular where the file has rotations",
            prompt="letter",
            max_new_tokens=16,
            splits=_named("mmbench_{}_20230712.tsv", dev="dev", test="test"),
            images="nothing: they are in the file",
            where="github.com/open-compass/MMBench (.tsv)",
            read=readers_choice.read_mmbench,
            score=scoring.mmbench,
            submit=submissions.as_sheet,
        ),
        "mmmu": Task(
            title="MMMU",
            metric="accuracy",
            prompt="letter",
            max_new_tokens=32,
            splits=_named("{}.jsonl", validation="validation", dev="dev", test="test"),
            images="the files that image_1 ... image_7 of the records name",
            where="huggingface.co/datasets/MMMU/MMMU, its rows as JSON lines with the images as files",
            read=readers_choice.read_mmmu,
            score=scoring.mmmu,
            submit=submissions.as_letters,
        ),
        "mme": Task(
            title="MME",
            metric="accuracy + accuracy+, summed",
            prompt="yes-no",
            max_new_tokens=8,
            splits={"test": _FOLDER},
            images="SUBTASK/ or SUBTASK/images/ as in --data",
            where="github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (MME_Benchmark_...)",
            read=readers_folders.read_mme,
            score=scoring.mme,
        ),
        "pope": Task(
            title="POPE",
            metric="F1",
            prompt="yes-no",
            max_new_tokens=16,
            splits={"coco": _FOLDER},
            images="COCO_val2014_*.jpg",
            where="github.com/RUCAIBox/POPE (output/coco)",
            read=readers_folders.read_pope,
            score=scoring.pope,
        ),
        "mmvet": Task(
            title="MM-Vet",
            metric=JUDGE,
            prompt="question",
            max_new_tokens=256,
            splits={"v1": Files(questions="mm-vet.json")},
            images="v1_*.png",
            where="github.com/yuweihao/MM-Vet (mm-vet.zip)",
            read=readers_folders.read_mmvet,
            score=None,
            submit=submissions.as_object,
        ),
        "infimm-eval": Task(
            title="InfiMM-Eval",
            metric=JUDGE,
            prompt="question",
            max_new_tokens=256,
            splits={"test": Files(questions="core-mm-wo-answer.json")},
            images="the files that the records name",
            where="huggingface.co/datasets/Infi-MM/InfiMM-Eval",
            read=readers_folders.read_infimm_eval,
            score=None,
            submit=submissions.as_object,
        ),
    }
)


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def task_of(name: str) -> tuple[str, Task]:
    """Name and task, upper case and dashes aside ("OK-VQA"); ValueError with a close match."""
    for known, task in TASKS.items():
        if _plain(name) in (_plain(known), _plain(task.title)):
            return known, task
    nearest = nearest_name(name.lower(), TASKS)
    raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {name!r}; did you mean {nearest!r}?")


def source_of(
    name: str,
    data: Path,
    images: Path | None = None,
    annotations: Path | None = None,
    split: str | None = None,
) -> Source:
    """Where a task's questions, images and answers lie; ValueError naming the option and the file that is
    expected."""
    task = TASKS[name]
    split = next(iter(task.splits)) if split is None else split
    if split not in task.splits:
        raise ValueError(f"--split must be one of {', '.join(task.splits)} for {name}, got {split!r}")
    files = task.splits[split]
    path = data / files.questions if data.is_dir() else data
    if not path.exists():
        wanted = files.questions or "the folder of the set"
        rule = f"be {wanted} or the folder with it (from {task.where})"
        raise ValueError(f"--data must {rule}, got {str(path)!r}")
    folder = path if path.is_dir() else path.parent
    if images is not None and not images.is_dir():
        raise ValueError(f"--images must be a folder with {task.images}, got {str(images)!r}")
    if files.annotations is None:
        if annotations is not None:
            raise ValueError(f"--annotations must be left out for {name} {split}, got {str(annotations)!r}")
    elif not (annotations := annotations or folder / files.annotations).is_file():
        rule = f"be {files.annotations}, the answers of {name} {split} (from {task.where})"
        raise ValueError(f"--annotations must {rule}, got {str(annotations)!r}")
    return Source(path=path, images=images or folder, split=split, annotations=annotations)

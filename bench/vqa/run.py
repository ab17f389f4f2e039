"""One run: questions of a set -> predictions.jsonl -> score lines, scores.json or a submission."""

import argparse
import collections
import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from infimm_kernels.__main__ import versions
from model import talk
from train.files import write_json

from .answering import Answerer, load_processor, plan_batches
from .metrics import METRIC_VERSION
from .predictions import Predictions, fingerprint, questions_digest
from .prompts import prompt_of
from .questions import Question, checked, digest, limited
from .scoring import Score
from .tasks import Task, source_of, task_of

REMEDY = "give the right --images, mend the data, or pass by such questions with --skip-bad, as wrong answers"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says; see its help."""

    model: Path
    task: str
    data: Path
    images: Path | None = None
    annotations: Path | None = None
    split: str | None = None
    prompt_form: str | None = None
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int | None = None
    output: Path | None = None
    skip_bad: bool = False
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a run has found and written."""

    conditions: Mapping[str, Any]
    """Split and form of the prompt, which every score line states."""
    scores: Sequence[Score]
    bad: Mapping[str, int]
    """Questions that could not be asked, by reason; they count as wrong."""
    notes: Sequence[str]
    files: Sequence[Path]


def run(options: Options, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Answers what is not answered yet, and scores. `progress(done, total)` counts questions.

    ValueError for wrong options, damaged data (without `skip_bad`) and a damaged or foreign output file."""
    name, task = task_of(options.task)
    source = source_of(name, options.data, options.images, options.annotations, options.split)
    questions = limited(checked(task.read(source), str(source.path)), options.limit)
    form = options.prompt_form or task.prompt
    prompts = {question.id: prompt_of(question, form) for question in questions}
    _refuse_bad(options, {q.id: q.bad for q in questions if q.bad is not None})
    processor = load_processor(options.model)
    settings = {
        "task": name,
        "split": source.split,
        "questions": len(questions),
        "prompt_form": form,
        "chat_template": digest([processor.chat_template]),
        "weights": fingerprint(options.model),
        "max_new_tokens": options.max_new_tokens or task.max_new_tokens,
        "batch_size": options.batch_size,
        "device": (options.device or _default_device()).split(":")[0],
        "dtype": options.dtype,
        "questions_digest": questions_digest(questions, prompts),  # last: it differs with many of the others
    }
    output = options.output or Path("runs/vqa") / f"{name}-{source.split}"
    path = output / "predictions.jsonl"
    with Predictions(path, settings, [q.id for q in questions], model=str(options.model)) as predictions:
        _refuse_bad(options, predictions.bad)
        _answer(options, questions, prompts, processor, settings, predictions, progress)
        answers, bad = dict(predictions.answers), dict(predictions.bad)
    bad |= {question.id: question.bad for question in questions if question.bad is not None}
    limit = "" if options.limit is None else f", {len(questions)} questions by --limit"
    conditions = {"split": f"{source.split}{limit}", "prompt": form}
    notes = [f"{path}: a line that was not finished was dropped, and its questions asked again"]
    notes = notes[: predictions.num_dropped]
    return _report(options, task, questions, answers, bad, settings, conditions, notes, output)


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _refuse_bad(options: Options, bad: Mapping[str, tuple[str, str]]) -> None:
    if bad and not options.skip_bad:
        reason, message = next(iter(bad.values()))
        others = f" ({len(bad)} such questions)" if len(bad) > 1 else ""
        raise ValueError(f"{reason}: {message}{others}: {REMEDY}")


def _answer(
    options: Options,
    questions: Sequence[Question],
    prompts: Mapping[str, str],
    processor: Any,
    settings: Mapping[str, Any],
    predictions: Predictions,
    progress: Callable[[int, int], None],
) -> None:
    """Batches are those of a whole run; one that is partly answered is asked again as a whole, so that no
    answer depends on where a run was interrupted."""
    if all(question.id in predictions or question.bad is not None for question in questions):
        return
    batches = plan_batches(questions, processor, options.batch_size)
    model = talk.load(_as_talk_options(options)).model.eval()
    answerer = Answerer(model, processor, settings["prompt_form"], settings["max_new_tokens"])
    total, done = sum(map(len, batches)), 0
    for batch in batches:
        if any(question.id not in predictions for question in batch):
            found = answerer(batch)
            bad = {identity: answer for identity, answer in found.items() if not isinstance(answer, str)}
            _refuse_bad(options, bad)
            predictions.add(prompts, found)
        done += len(batch)
        progress(done, total)


def _as_talk_options(options: Options) -> argparse.Namespace:
    return argparse.Namespace(model=options.model, device=options.device, dtype=options.dtype, system=None)


def _report(
    options: Options,
    task: Task,
    questions: Sequence[Question],
    answers: Mapping[str, str],
    bad: Mapping[str, tuple[str, str]],
    settings: Mapping[str, Any],
    conditions: Mapping[str, Any],
    notes: list[str],
    output: Path,
) -> Report:
    labelled = any(question.answers for question in questions)
    scores: list[Score] = []
    files = [output / "predictions.jsonl"]
    if task.score is not None and labelled:
        scores = task.score(questions, answers, options.seed)
    elif task.submit is not None:
        files.append(task.submit(output, questions, answers))
        if options.limit is not None:
            notes.append("the submission holds the questions of --limit alone")
    if task.score is None:
        notes.append(f"{task.title} {task.metric}")
    elif not labelled:
        there = "its server scores the submission" if task.submit is not None else "nothing to score"
        notes.append(f"{task.title} {settings['split']} has no known answers: {there}")
    reasons = collections.Counter(reason for reason, _ in bad.values())
    document = {
        **{key: settings[key] for key in ("task", "split")},
        "model": str(options.model),
        "metric_version": METRIC_VERSION,
        "questions": len(questions),
        "answered": len(answers),
        "bad": dict(reasons),
        "scores": [dataclasses.asdict(score) | dict(conditions) for score in scores],
        "bootstrap_seed": options.seed,
        "notes": notes,
        "settings": dict(settings),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }
    write_json(output / "scores.json", document)
    return Report(
        conditions=conditions,
        scores=scores,
        bad=dict(reasons),
        notes=notes,
        files=[*files, output / "scores.json"],
    )

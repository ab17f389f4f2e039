"""Answers of a saved model to the questions of a public set on this disk, and their scores.

    python -m bench.vqa --list
    python -m bench.vqa --model DIR --task textvqa --data textvqa/ --images textvqa/train_images
    python -m bench.vqa --model DIR --task vqav2 --split test-dev --data vqav2/ --images coco/test2015

Nothing is downloaded: --data is the file of the questions as published, or the folder that it is in under
its published name. Answers are greedy. They are appended to OUTPUT/predictions.jsonl after every batch, and
the same command goes on after a kill; when all are there it only scores. OUTPUT/scores.json has the lines of
the table with 95% intervals (bootstrap over questions; images for MME, circles for MMBench). For splits
without known answers OUTPUT/submission.* is what the set's server takes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.checks import nearest_name, require

from .prompts import PROMPT_FORMS
from .tasks import TASKS

if TYPE_CHECKING:
    from .run import Report

ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (default: sys.argv); 0, or 2 after one line on what is wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.list:
            _list()
            return 0
        _check(options)
        _run(options)
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        line = " ".join(part.strip() for part in str(error).splitlines())
        sys.stderr.write(f"error: {line}\n")
        return ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.vqa",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--list", action="store_true", help="the tasks: metric, prompt form, files and where to get them")
    add("--model", type=Path, metavar="DIR", help="folder of save_pretrained: model and processor")
    add("--task", metavar="NAME", help=", ".join(TASKS))
    add("--data", type=Path, metavar="PATH", help="the questions as published, or the folder with them")
    add("--images", type=Path, metavar="DIR", help="folder of the images (default: that of the questions)")
    add("--annotations", type=Path, metavar="FILE", help="answers of VQAv2 and OK-VQA (default: beside them)")
    add("--split", metavar="NAME", help="of the task (default: its first in --list)")
    add("--prompt-form", metavar="NAME", help=f"in place of the task's own: {', '.join(PROMPT_FORMS)}")
    add("--limit", type=int, metavar="N", help="about N questions, spread over the set")
    add("--batch-size", type=int, default=8, metavar="N", help="questions together (default 8)")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the task's)")
    add("--output", type=Path, metavar="DIR", help="default: runs/vqa/TASK-SPLIT")
    add("--skip-bad", action="store_true", help="go on past damaged questions; they count as wrong")
    add("--seed", type=int, default=0, help="of the intervals (default 0)")
    add("--device", help="default: cuda where there is one")
    add("--dtype", default="auto", help="of the weights: auto, float32, bfloat16, float16")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("model", "task", "data"):
        value = getattr(options, name)
        require(value is not None, f"--{name}", "be given (--list names the tasks)", value)
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(options, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')}", "be at least 1", value)
    require(options.seed >= 0, "--seed", "be at least 0", options.seed)
    form = options.prompt_form
    if form is not None and form not in PROMPT_FORMS:
        rule, nearest = f"be one of {', '.join(PROMPT_FORMS)}", nearest_name(form, PROMPT_FORMS)
        raise ValueError(f"--prompt-form must {rule}, got {form!r}; did you mean {nearest!r}?")


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from .run import Options, run

    given = {name: value for name, value in vars(options).items() if name not in ("list", "debug")}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task("answering", total=None)
        report = run(Options(**given), lambda done, total: bar.update(row, completed=done, total=total))
    _show(report)


def _show(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table

    # a table that is not read on a terminal keeps its columns
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if report.scores:
        table = Table()
        table.add_column("metric", overflow="fold")
        for name in ("score", "95%", "of"):
            table.add_column(name, justify="right")
        for name in ("split", "prompt", "parser", "version"):
            table.add_column(name, overflow="fold")
        for score in report.scores:
            table.add_row(
                score.metric,
                f"{score.value:.2f}",
                f"{score.low:.2f} to {score.high:.2f}",
                f"{score.count:,} {score.unit}",
                *map(str, report.conditions.values()),
                score.parser,
                score.version,
            )
        console.print(table)
    for reason, number in sorted(report.bad.items()):
        print(f"counted as wrong: {number} {reason}")
    for note in report.notes:
        print(f"note: {note}")
    print("written: " + ", ".join(map(str, report.files)))


def _list() -> None:
    for name, task in TASKS.items():
        print(f"{name}: {task.title}; {task.metric}; prompt {task.prompt!r}")
        for split, files in task.splits.items():
            parts = [files.questions or "the folder", files.annotations]
            print(f"    --split {split}: {', '.join(part for part in parts if part)}")
        print(f"    --images: {task.images}\n    from {task.where}")


if __name__ == "__main__":
    sys.exit(main())

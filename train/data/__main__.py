"""`python -m train data check MANIFEST|FILE...` and `python -m train data manifest TEMPLATE`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .registry import DATASETS, make_dataset
from .samples import Dataset
from .templates import TEMPLATES

BAD_DATA, USAGE_ERROR = 1, 2

_EPILOG = """\
examples:
  python -m train data manifest table1 > cpt.json
  python -m train data check cpt.json --workers 8
  python -m train data check llava.json --option image_root=images --json
  python -m train data check questions.json --reader vqa --option form=gqa --option image_root=images
  python -m train data check 'laion/{00000..00999}.tar' --limit 10000
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (default: sys.argv) and returns the exit code: 0, 1 if more than
    `--max-skipped-share` of the samples is bad, 2 after one line on what is wrong with the arguments."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        line = " ".join(part.strip() for part in str(error).splitlines())
        sys.stderr.write(f"data: error: {line}\n")
        return USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train data",
        description="Check the data of a stage before it is trained on; write manifests to begin with.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="read everything and report what is in it", allow_abbrev=False)
    check.add_argument("files", nargs="+", metavar="FILE", help="manifests, records or shards")
    check.add_argument("--reader", help=f"how to read them: {', '.join(DATASETS)} (default: by their form)")
    check.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="a keyword argument of the reader"
    )
    check.add_argument("--limit", type=int, metavar="N", help="read N samples of each set, spread over it")
    check.add_argument("--workers", type=int, default=0, metavar="N", help="threads that decode images")
    check.add_argument("--tokenizer", metavar="DIR", help="count tokens with this tokenizer of transformers")
    check.add_argument(
        "--max-skipped-share", type=float, default=0.1, metavar="SHARE", help="exit with 1 above it (0.1)"
    )
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.set_defaults(run=_check)
    manifest = commands.add_parser("manifest", help="print a manifest to fill in", allow_abbrev=False)
    manifest.add_argument("template", choices=list(TEMPLATES), help="the sets of a stage of the paper")
    manifest.set_defaults(run=_manifest)
    return parser


def _manifest(options: argparse.Namespace) -> int:
    print(json.dumps(TEMPLATES[options.template](), indent=2))
    return 0


def _check(options: argparse.Namespace) -> int:
    from .check import check_dataset, num_read
    from .mixture import Mixture

    for name, value, least in (("--limit", options.limit, 1), ("--workers", options.workers, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= options.max_skipped_share <= 1:
        raise ValueError(f"--max-skipped-share must lie in 0..1, got {options.max_skipped_share}")
    arguments = dict(map(_option, options.option))
    datasets = {file: _opened(file, options.reader, arguments) for file in options.files}
    tokenizer = None if options.tokenizer is None else _tokenizer(options.tokenizer)
    reports = []
    sources = [
        source
        for dataset in datasets.values()
        for source in (dataset.sources if isinstance(dataset, Mixture) else [dataset])
    ]
    with _Bar(sum(num_read(len(source), options.limit) for source in sources)) as advance:
        for file, dataset in datasets.items():
            chosen = dict(limit=options.limit, workers=options.workers, tokenizer=tokenizer)
            reports += check_dataset(dataset, file, advance=advance, **chosen)
    num_bad, total = sum(r.skipped.total() for r in reports), sum(r.read for r in reports)
    share = num_bad / max(total, 1)
    if options.json:
        summary = {"sets": [r.to_dict() for r in reports], "read": total, "skipped": num_bad}
        print(json.dumps(summary | {"skipped_share": share}, indent=2))
    else:
        _print_table(reports, share)
    return BAD_DATA if share > options.max_skipped_share else 0


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"--option must be KEY=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _opened(file: str, reader: str | None, arguments: dict[str, Any]) -> Dataset:
    name = reader or ("webdataset" if file.endswith(".tar") else _guessed(file))
    return make_dataset(name, {"path": file} | arguments, "data.")


def _guessed(file: str) -> str:
    """A JSON object with "sets" is a manifest; everything else has to be conversations."""
    path = Path(file)
    if path.is_file() and path.stat().st_size < 1 << 24:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return "conversations"
        if isinstance(content, dict) and "sets" in content:
            return "manifest"
    return "conversations"


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ValueError(f"--tokenizer must be a folder with a saved tokenizer, got {folder!r}")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


class _Bar:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("reading", total=total)

    def __enter__(self):
        self._bar.start()
        return lambda number: self._bar.advance(self._task, number)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _print_table(reports: Sequence[Any], share: float) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("set", overflow="fold")
    counts = ("samples", "read", "good", "skipped")
    spreads = ("images", "height", "width", "windows", "text")
    for name in ("share", *counts, *spreads):
        table.add_column(name, justify="right")
    for report in reports:
        values = report.to_dict()
        table.add_row(
            escape(report.name),
            "" if report.share is None else f"{report.share:.2%}",
            *(f"{n:,}" for n in (report.length, report.read, report.good, report.skipped.total())),
            *map(_spread_text, list(values.values())[-len(spreads) :]),
        )
    # a table that is not read on a terminal keeps its columns
    console = Console(width=None if sys.stdout.isatty() else 160, markup=True)
    console.print(table)
    console.print("images to text: minimum / median / maximum a sample; windows of 448 pixels", style="dim")
    for report in reports:
        for note in report.notes:
            console.print(f"{escape(report.name)}: note: {escape(note)}")
        for reason, number in report.skipped.most_common():
            console.print(f"{escape(report.name)}: {reason} {number}")
            for message in report.examples[reason]:
                console.print(f"    {escape(message)}")
    console.print(f"bad samples: {share:.2%}")


def _spread_text(spread: dict[str, int] | None) -> str:
    return "" if spread is None else f"{spread['min']} / {spread['median']} / {spread['max']}"


if __name__ == "__main__":
    sys.exit(main())

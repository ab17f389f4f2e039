"""The papers' three findings in miniature: one small model, an arm for each comparison.

    python -m bench.miniature [--size cpu|gpu] [--output DIR] [--arms NAME ...] [--seeds N ...] [--save]
    python -m bench.miniature --document FILE --save     table, pictures, card from a kept result alone

Arms: 224, 448, dynamic, dynamic-no-position, 224-resampler, 448-resampler, interval-2, llava-style,
mixture-of-resolution, text-only; all start from the same warm-up and take equal steps, 224 and 448 also as
many as the compute of `dynamic` pays for. Every piece is kept in DIR when it is done, and the same command
goes on where it was ended. --save keeps the document as bench/results/miniature-<size>-<date>.json, pictures
and model card in bench/results/miniature, and writes README.md's block from it."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from bench import results

from . import run
from .arms import ARMS
from .card import card, finding_rows
from .scores import Document, table
from .sizes import SEEDS, SIZES
from .storage import claim, load_json, save_json

IN_README = ("224", "448", "dynamic", "dynamic-no-position", "224-resampler", "448-resampler", "text-only")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser, options = _options(arguments)
    try:
        if options.document is not None:
            if not options.document.is_file():
                raise ValueError(f"--document must be a file, got {str(options.document)!r} (no such file)")
            document, folder = checked(load_json(options.document), options.document), None
        else:
            size = SIZES[options.size]
            folder = Path(options.output or f"runs/miniature-{size.name}")
            claim(folder, size)
            run.run_all(size, options.arms, options.seeds, folder)
            command = f"python -m bench.miniature {shlex.join(arguments)}".strip()
            document = results.scrub(run.document(size, folder, command))
            save_json(folder / "document.json", document)
        for line in lines_of(document):
            print(line)
        if options.save:
            save(document, folder)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"python -m bench.miniature: {error}\n")
    return 0


def _options(arguments: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.miniature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--output", help="folder of the run (default runs/miniature-<size>)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N")
    parser.add_argument("--document", type=Path, metavar="FILE", help="a kept result instead of a run")
    parser.add_argument("--save", action="store_true", help="into bench/results and README.md")
    options = parser.parse_args(arguments)
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds must be different and not negative, got {options.seeds}")
    return parser, options


def checked(document: Any, path: Path) -> Document:
    """ValueError where a file holds something else."""
    keys = {"header", "size", "order", "questions", "arms", "warm_up"}
    if not isinstance(document, dict) or not keys <= document.keys():
        raise ValueError(f"--document must be a result file of bench.miniature, got {path}")
    count = len(document["questions"]["kind"])
    for entry in document["arms"]:
        if len(entry["correct"]) != count:
            raise ValueError(
                f"{path} must hold an answer to each of its {count} questions, got {len(entry['correct'])} "
                f"of the arm {entry['name']!r}, seed {entry['seed']}"
            )
    return document


def lines_of(document: Document) -> list[str]:
    """The two tables as text."""
    lines = []
    for rows in (table(document), finding_rows(document)):
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        lines.append("")
    return lines


def save(document: Document, folder: Path | None) -> None:
    """Document, pictures and card into bench/results, table and one picture into README.md. Without `folder`,
    the run's, the pictures that need its weights stay as they are."""
    from bench.report import README, with_block

    from .plots import draw_answers, draw_findings

    out, stem = results.RESULTS, f"miniature-{document['size']['name']}-{document['header']['date']}"
    pictures = out / "miniature"
    pictures.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.json").write_text(json.dumps(document, indent=None, allow_nan=False) + "\n")
    (pictures / f"{stem}.md").write_text(card(document))
    picture = pictures / f"{stem}.png"
    draw_findings(document, picture)
    done = {(entry["name"], entry["seed"], entry["match"]) for entry in document["arms"]}
    if folder is not None and ("dynamic", 0, "steps") in done:
        draw_answers(SIZES[document["size"]["name"]], folder, pictures, stem)
    block = readme_block(document, str(picture.relative_to(results.ROOT)))
    README.write_text(with_block(README.read_text(), block, "miniature"))


def readme_block(document: Document, picture: str) -> str:
    """Markdown: the arms of the papers' tables, the findings, one picture."""
    from bench.report import markdown

    header = document["header"]
    rows = table(document)
    kept = [rows[0], *(row for row in rows[1:] if row[0] in IN_README and row[1] == "steps")]
    left_out = ("equal", "medium text", "count", "second page")
    columns = [i for i, name in enumerate(rows[0]) if name not in left_out]
    lines = [
        "Exact match of greedy answers in percent, mean over seeds, half the 95 % interval, at equal steps",
        f"({header['processor']}, torch {header['torch']}, {header['date']}, `{header['command']}`):",
        "",
        *markdown([[row[i] for i in columns] for row in kept]),
        "",
        *markdown(finding_rows(document)),
        "",
        f"![What each resolution reads, the position embedding, the resampler]({picture})",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

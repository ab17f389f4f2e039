"""Kills, stops, damages, starves and moves runs of the trainer, and compares them with runs left alone.

    python -m bench.reliability [--kills 200] [--quick] [--seed N] [--output runs/reliability.json]
    python -m bench.reliability --only KIND [--case N] --seed N     one kind, one case of it again

    kills     SIGKILL to a rank, at named and random points of the four stages, until the run is finished
    damage    the newest checkpoints truncated, bits flipped, files swapped ...: the one before is loaded
    mixed     two ranks with 0 to 8 images a sample, texts alone or bad ones alone, against one process
    topology  1 or 2 ranks and ZeRO 0 to 3 in turn: equal weights and AdamW states, equal losses
    stops     SIGTERM and SIGINT to one rank: all save and end; a second one ends at once
    disk      files limited, a small file system full: an error, and the checkpoints before stay
    fuzz      spoilt data through the readers: no sample lost without a reason

Every run is the trainer's own command line in forks of this process, over gloo, with models of a size that
trains in milliseconds. The exit code is 1 if anything is not as it has to be.
"""

import argparse
import collections
import datetime
import functools
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import forking, plants

KINDS = ("kills", "damage", "mixed", "topology", "stops", "disk", "fuzz")
COUNTS = (
    *("kills", "mismatches", "fuzzed_samples", "lost_silently", "mixed_steps", "hangs"),
    *("damaged_checkpoints", "damaged_loaded", "reshapes", "reshape_mismatches", "sigterms", "disk_full"),
)
_OUTPUT = Path("runs/reliability.json")
_KILLS, _QUICK_KILLS = 200, 6


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.case is not None and options.only is None:
        print("--case must come with --only, got none", file=sys.stderr)
        return 2
    started = time.monotonic()
    forking.import_all()
    if options.plant is not None:
        plants.PLANTS[options.plant]()  # the ranks are forks
    forking.limit_s = options.limit
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        outcomes = _outcomes(options, Path(folder))
    document = _document(options, outcomes, time.monotonic() - started)
    _show(document, outcomes)
    output = _OUTPUT if options.output is None and options.only is None else options.output
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2) + "\n")
    return int(bool(document["wrong"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, help=f"at least (default {_KILLS}, with --quick {_QUICK_KILLS})")
    parser.add_argument("--quick", action="store_true", help="a few cases of every kind")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    parser.add_argument("--only", choices=KINDS, help="one kind alone")
    parser.add_argument("--case", type=int, help="with --only: one case alone")
    parser.add_argument(
        "--output", type=Path, help=f"file of the results (default {_OUTPUT}; with --only none)"
    )
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="cases side by side")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds of silence after which a run hangs (default 60)"
    )
    parser.add_argument(
        "--plant", choices=plants.PLANTS, help="a bug to plant into the trainer, which must be found"
    )
    return parser


def _outcomes(options: argparse.Namespace, folder: Path) -> list[Any]:
    from rich.console import Console
    from rich.progress import Progress

    from . import room

    kinds = KINDS if options.only is None else (options.only,)
    shared = room.make_room(folder, seed=options.seed, quick=options.quick)
    workers = forking.Workers(options.workers)
    outcomes: list[Any] = []
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        if options.case is None and set(kinds) & {"kills", "damage", "stops", "disk"}:
            task = bar.add_task("runs left alone", total=len(shared.layouts))
            for found in workers.map(functools.partial(room.measure, shared), shared.layouts):
                shared.references |= found
                bar.advance(task)
        tasks = {kind: bar.add_task(kind, total=None) for kind in kinds}
        cases = _cases(options, kinds, shared, outcomes)
        for outcome in workers.map(functools.partial(_attempt, shared), cases):
            outcomes.append(outcome)
            bar.advance(tasks[outcome.kind])
    return outcomes


def _attempt(shared: Any, case: tuple[str, int]) -> Any:
    from . import runs

    kind, number = case
    try:
        return _module(kind).attempt(shared, number)
    except Exception:  # an error of a case is its finding; the others go on
        return runs.Outcome(kind, number, "ended by an error", wrong=[traceback.format_exc()])


def _module(kind: str) -> Any:
    return importlib.import_module(f"{__package__}.{kind}")


def _cases(
    options: argparse.Namespace, kinds: Sequence[str], shared: Any, outcomes: list[Any]
) -> Iterator[tuple[str, int]]:
    """Kind and number; kills come last, until there are enough."""
    wanted = (_QUICK_KILLS if options.quick else _KILLS) if options.kills is None else options.kills
    for kind in sorted(kinds, key=lambda kind: kind == "kills"):
        for number in _module(kind).cases(shared) if options.case is None else [options.case]:
            if kind == "kills" and sum(outcome.counts["kills"] for outcome in outcomes) >= wanted:
                return
            yield kind, number


def _document(options: argparse.Namespace, outcomes: list[Any], seconds: float) -> dict[str, Any]:
    from bench import results
    from infimm_kernels.__main__ import versions

    counts = sum((outcome.counts for outcome in outcomes), collections.Counter())
    points = collections.Counter(point for outcome in outcomes for point in outcome.points)
    return {name: counts[name] for name in COUNTS} | {
        "kill_points": dict(sorted(points.items())),
        "cases": len(outcomes),
        "wrong": [_report(options, outcome) for outcome in outcomes if outcome.wrong],
        "seconds": round(seconds, 1),
        "seed": options.seed,
        "quick": options.quick,
        "commit": results.commit(),
        "date": datetime.date.today().isoformat(),
        "versions": versions() | _installed("deepspeed", "transformers"),
    }


def _installed(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def _report(options: argparse.Namespace, outcome: Any) -> str:
    again = f"python -m bench.reliability --only {outcome.kind} --case {outcome.case} --seed {options.seed}"
    if options.quick:
        again += " --quick"
    return "\n  ".join([f"{outcome.kind}: {outcome.name}", *outcome.wrong, f"again: {again}"])


def _show(document: dict[str, Any], outcomes: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Reliability of the trainer")
    for column, justify in (("kind", "left"), ("tried", "left"), ("wrong", "right")):
        table.add_column(column, justify=justify)
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        counts = sum((outcome.counts for outcome in of_kind), collections.Counter())
        tried = ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in COUNTS if counts[name])
        if kind == "kills" and document["kill_points"]:
            tried += f" at {len(document['kill_points'])} kinds of points"
        wrong = sum(bool(outcome.wrong) for outcome in of_kind)
        table.add_row(
            kind, f"{len(of_kind)} cases: {tried}" if of_kind else "-", str(wrong) if of_kind else "-"
        )
    table.caption = f"{document['seconds']:.0f} s, seed {document['seed']}, {document['commit'][:12]}"
    Console().print(table)
    for text in document["wrong"]:
        print(text)


if __name__ == "__main__":
    sys.exit(main())

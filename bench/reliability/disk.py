"""A disk that is full is an error, not the end of the run: what was saved stays, the next start goes on."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from . import faults
from .faults import BEFORE, Call, Fault
from .room import Room, tidy
from .runs import Layout, Outcome, Run

KIND = "disk"
LAYOUTS = (Layout(2, 3), Layout(1, 2), Layout(2, 2), Layout(1, 0))
_LIMITED = ("saving a checkpoint", "exporting the model")
"""Points before which the largest size of a file becomes too small."""
_FILLED = (*_LIMITED, "writing a tensor file", "line of the log", "writing config.json")
"""Points before which a small file system is filled."""
_LIMIT_BYTES = 20_000
_TMPFS_BYTES = 8 << 20


def cases(room: Room) -> Iterator[int]:
    yield from range(1 if room.quick else len(_LIMITED) + len(_FILLED))


def attempt(room: Room, case: int) -> Outcome:
    """One point, with files limited or a small file system full; then the same run with room again."""
    draw = room.draw(KIND, case)
    layout = draw.choice(room.layouts if room.quick else LAYOUTS)
    reference = room.reference(layout, "CPT")
    filled = case >= len(_LIMITED)
    point = (_LIMITED + _FILLED)[case]
    outcome = Outcome(KIND, case, f"{'full' if filled else 'limited'} at {point}, CPT on {layout}")
    folder = room.new_folder(KIND, case)
    calls = reference.calls[0][point]
    # late, so that older checkpoints are there to be kept
    fault = Fault(point, BEFORE, draw.randint((calls + 1) // 2, calls), 0)
    run = Run("CPT", layout, folder, reference.overrides)
    if not filled:
        _fails(run, fault, _limit, outcome)
        run.finish(outcome, reference.record)
    elif _mount(run.output_dir):
        try:
            _fails(run, fault, _fill, outcome)
            (run.output_dir / "filler").unlink(missing_ok=True)
            run.finish(outcome, reference.record)
        finally:
            subprocess.run(["umount", str(run.output_dir)], check=False)
    else:
        outcome.name += " (left out: no file system can be mounted here)"
        return outcome
    outcome.counts["disk_full"] += 1
    outcome.counts["mismatches"] += bool(outcome.wrong)
    return tidy(folder, outcome)


def _fails(run: Run, fault: Fault, act: Callable[[Call], None], outcome: Outcome) -> None:
    """The run must end with code 1 and one line that says why; checkpoints that were there must stay."""
    ended = run.start(faults.arming(fault, run.output_dir, act), grace_s=5.0)
    outcome.counts["hangs"] += ended.hung
    clear = "train: error: " in ended.said[0] and "Traceback" not in ended.said[0]
    if ended.hung or ended.codes[0] != 1 or not clear:
        outcome.wrong.append(f"it must end with 1 and a clear error, got {ended}")
    if fault.number > 1 and not any((run.output_dir / "checkpoints").glob("step-*")):
        outcome.wrong.append("the older checkpoint must be kept, got none")


def _limit(call: Call) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT_BYTES, resource.RLIM_INFINITY))


def _fill(call: Call) -> None:
    with (call.output_dir / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass


def _mount(folder: Path) -> bool:
    folder.mkdir()
    if os.geteuid() or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_BYTES}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0

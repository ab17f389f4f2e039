"""Runs workers until every case has met its fate: a crash or a hang costs one implementation of one case."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from bench.harness import TIMING, Case, Entry

POLL_S = 0.1
SILENCE_S = 150.0  # longer than any compilation takes
GRACE_S = 15.0  # for a worker that looks at the deadline between two cases


class Progress:
    """What workers have told so far: finished cases, settled implementations, and who is at it."""

    def __init__(self, cases: Sequence[Case], add: Callable[[Entry], None]):
        self.cases, self._add = cases, add
        self.finished: set[int] = set()
        self.settled: set[tuple[int, str]] = set()
        self.current: tuple[int, str] | None = None
        self.events = 0

    def hear(self, event: dict) -> None:
        """One line of a worker; see bench.worker."""
        self.events += 1
        if "error" in event:
            return
        index = event["case"]
        if "begin" in event:
            self.current = index, event["begin"]
        elif "entry" in event:
            self._settle(index, event["entry"])
        else:
            self.finished.add(index)
            self.current = None

    def blame(self, reason: str) -> bool:
        """Put the end of a worker down to whoever was at it; False when no case had begun."""
        if self.current is None:
            return False
        index, name = self.current
        if name == TIMING:
            self._settle(index, self.cases[index].entry("all", "failed", f"{reason} while being timed"))
            self.finished.add(index)
        elif (index, name) not in self.settled:
            self._settle(index, self.cases[index].entry(name, "failed", reason))
        self.current = None
        return True

    def close(self, status: str, reason: str) -> None:
        """One entry for each case that no worker finished."""
        for index, case in enumerate(self.cases):
            if index not in self.finished:
                self._settle(index, case.entry("all", status, reason))
                self.finished.add(index)

    def done(self) -> list[tuple[int, str]]:
        """For a worker's DONE file."""
        return [*((index, "") for index in sorted(self.finished)), *sorted(self.settled)]

    def _settle(self, index: int, entry: Entry) -> None:
        self._add(entry)
        self.settled.add((index, entry["implementation"]))


def supervise(
    cases: Sequence[Case],
    command: Callable[[Path, Path], list[str]],
    add: Callable[[Entry], None],
    *,
    deadline: float,
    silence_s: float = SILENCE_S,
    grace_s: float = GRACE_S,
    environment: dict[str, str] | None = None,
) -> None:
    """Give every case at least one entry through `add`.

    command: (events file, done file) -> what starts a worker. deadline: seconds since the epoch, after which
    what is left gets the status "budget". A worker that says nothing for `silence_s` is killed.
    """
    progress = Progress(cases, add)
    failed_starts = 0
    with tempfile.TemporaryDirectory() as folder:
        events, done, errors = (Path(folder) / name for name in ("events", "done", "errors"))
        while len(progress.finished) < len(cases) and time.time() < deadline and failed_starts < 2:
            events.write_text("")
            done.write_text(json.dumps(progress.done()))
            with errors.open("w") as stderr:
                process = subprocess.Popen(
                    command(events, done),
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,
                    env=environment,
                )
            try:
                with events.open() as lines:
                    reason = _watch(process, lines, progress, deadline + grace_s, silence_s)
            finally:
                kill(process)
            if reason is None:
                break
            reason = ": ".join([reason, *_last_lines(errors)])
            failed_starts = 0 if progress.blame(reason) else failed_starts + 1
    if failed_starts:
        progress.close("failed", f"the worker does not start: {reason}")
    progress.close("budget", "the time budget was over")


def _watch(
    process: subprocess.Popen, lines: IO[str], progress: Progress, deadline: float, silence_s: float
) -> str | None:
    """Follow a worker to its end; None for an end that is nobody's fault, else what happened."""
    heard = time.time()
    partial = ""
    while True:
        running = process.poll() is None
        before = progress.events
        for line in lines:
            partial += line
            if partial.endswith("\n"):
                progress.hear(json.loads(partial))
                partial = ""
        now = time.time()
        if progress.events > before:
            heard = now
        if not running:
            break
        if now > deadline or now > heard + silence_s:
            return None if now > deadline else f"no sign of life for {silence_s:g} s"
        time.sleep(POLL_S)
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    return f"exit code {process.returncode}"


def kill(process: subprocess.Popen) -> None:
    """End a process that was started in a session of its own, with what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return [line[:300] for line in lines[-2:]]

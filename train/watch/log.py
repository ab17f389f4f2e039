"""log.jsonl: a line a step and a line an event, exact, append-only, cut back to its checkpoint on resume."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

CLOCK_KEYS = frozenset(
    ("seconds", "step_seconds", "tokens_per_s", "images_per_s", "mfu", "memory_bytes", "time")
)
"""Keys that differ between two runs of the same training; all others are bit for bit the same."""


@dataclasses.dataclass(kw_only=True, slots=True)
class StepRecord:
    """What one optimizer step did; counts are sums over all ranks and accumulation steps of this step."""

    step: int
    """From 1."""
    loss: float
    """Mean over the answer tokens of the global batch."""
    lr: float
    """Before any part's `lr_scale`."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    num_answer_tokens: int
    samples_seen: int
    """Trained on since the stage began."""
    num_skipped: int
    """Samples left out."""
    num_truncated: int
    step_seconds: float
    """Time of this step, reading its batch included."""
    images: int = 0
    windows: int = 0
    tokens: int = 0
    """Text tokens, without padding."""
    mfu: float | None = None
    """Share of the devices' peak FLOP/s; None where the peak is not known."""
    memory_bytes: int | None = None
    """`gates.memory_bytes`: peak allocated on CUDA, resident size of the process on a CPU."""
    imbalance: float | None = None
    """Work of the busiest rank over the mean of all ranks."""
    gates: Mapping[int, tuple[float, float]] | None = None
    """`gates.gate_values`, or None in a step where they were not read."""
    skipped_step: Literal["nonfinite", "spike", "overflow", "empty"] | None = None
    """Why the step changed no weight; None if it did."""

    def line(self, stage: str, seconds: float) -> dict[str, Any]:
        """The step's line; `seconds` since the stage began. JSON has no NaN: not finite becomes None."""
        rate = 1 / self.step_seconds if self.step_seconds > 0 else math.nan
        values = {
            "step": self.step,
            "stage": stage,
            "loss": self.loss,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "num_answer_tokens": self.num_answer_tokens,
            "samples_seen": self.samples_seen,
            "num_skipped": self.num_skipped,
            "num_truncated": self.num_truncated,
            "images": self.images,
            "windows": self.windows,
            "tokens": self.tokens,
            "imbalance": self.imbalance,
            "gates": None if self.gates is None else {str(layer): list(g) for layer, g in self.gates.items()},
            "skipped_step": self.skipped_step,
            "memory_bytes": self.memory_bytes,
            "mfu": self.mfu,
            "tokens_per_s": round(self.tokens * rate, 3),
            "images_per_s": round(self.images * rate, 3),
            "step_seconds": round(self.step_seconds, 6),
            "seconds": round(seconds, 4),
        }
        return _finite(values)


@dataclasses.dataclass(slots=True)
class Log:
    """The lines of a log.jsonl as they stand in it."""

    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    num_unreadable: int = 0
    """Lines that a killed writer or a damaged disk left torn."""


def read_log(path: Path) -> Log:
    """Reads a log, a running one too; torn lines are counted and left out. OSError if it cannot be read."""
    log = Log([], [])
    with path.open("rb") as file:
        for line in file:
            values = _parsed(line)
            if values is None:
                log.num_unreadable += 1
            else:
                (log.events if "event" in values else log.steps).append(values)
    return log


class RunLog:
    """Writes one log. Every line goes to the file at once, in one piece; a full disk is an OSError that names
    the file, and leaves no half line behind."""

    def __init__(self, path: Path, stage: str, resume_step: int | None = None) -> None:
        """Starts a new log, or with `resume_step` goes on after that step: what stands behind it, and torn
        lines, are dropped, in one atomic replacement."""
        if resume_step is not None and resume_step < 0:
            raise ValueError(f"resume_step must be at least 0, got {resume_step}")
        self.path, self.stage = path, stage
        self.last: dict[str, Any] | None = None
        """The last step's line."""
        if resume_step is None:
            with _naming(path):
                path.write_bytes(b"")
        else:
            self._cut(resume_step)
        with _naming(path):
            self._file = path.open("ab", buffering=0)
        if resume_step is None:
            self.event("start", 0)

    def step(self, record: StepRecord, seconds: float) -> None:
        self.last = record.line(self.stage, seconds)
        self.write(self.last)

    def event(self, name: str, step: int, **values: Any) -> None:
        """A line of its own, on the disk when this returns."""
        self.write(_event(name, step, self.stage, values))
        self.sync()

    def sync(self) -> None:
        """Returns when all lines are on the disk; a checkpoint must not be there before its steps' lines."""
        with _naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def write(self, values: dict[str, Any]) -> None:
        """A line with a step in it."""
        with _naming(self.path):
            _write_all(self._file.fileno(), _encoded(values))

    def _cut(self, resume_step: int) -> None:
        kept, dropped, unreadable = [], 0, 0
        lines = []
        with contextlib.suppress(FileNotFoundError), _naming(self.path), self.path.open("rb") as file:
            lines = file.readlines()
        for line in lines:
            values = _parsed(line)
            if values is None:
                unreadable += 1
            elif values["step"] > resume_step:
                dropped += 1
            else:
                kept.append(line)
                if "event" not in values:
                    self.last = values
        event = {"dropped_lines": dropped, "unreadable_lines": unreadable}
        kept.append(_encoded(_event("resume", resume_step, self.stage, event)))
        unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        with _naming(unfinished):
            with unfinished.open("wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _event(name: str, step: int, stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    return {"event": name, "step": step, "stage": stage, "time": now} | _finite(dict(values))


def _encoded(values: dict[str, Any]) -> bytes:
    # floats are written by repr, which reads back as the same bits
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The line's values, or None if it is torn: a whole one ends with a line break and has a step."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    whole = isinstance(values, dict) and type(values.get("step")) is int
    return values if whole else None


def _finite(value: Any) -> Any:
    """`value` with None in place of every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_all(descriptor: int, data: bytes) -> None:
    """Writes the whole of `data` at the file's end, or takes back what was written of it and raises."""
    written = 0
    try:
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except OSError:
        if written:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
        raise


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error of writing knows the descriptor only; this adds which file it was."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise

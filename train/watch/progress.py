"""What rank 0 shows and keeps of a stage while it trains."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import progress as rich_progress
from rich.console import Console

from ..config import TrainConfig
from .log import RunLog, StepRecord
from .scalars import Scalars

LOG_NAME, SKIPPED_NAME = "log.jsonl", "skipped.jsonl"
TENSORBOARD_NAME = "tensorboard"
SHOWN_SAMPLES = 5
"""Of those that a step leaves out; skipped.jsonl has them all."""
REFRESHES_PER_S = 2.0
"""Of the bar; its thread takes the interpreter lock from the training."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Summary:
    """The stage as a whole."""

    samples_seen: int
    """Samples trained on."""
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Samples left out, by reason."""
    num_truncated: int = 0
    skipped_steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Steps that changed no weight, by `StepRecord.skipped_step`."""


class Progress:
    """A bar on a terminal and plain lines elsewhere, log.jsonl, skipped.jsonl, and TensorBoard if asked for.

    `enabled` on one rank; on the others every method returns at once and no file is opened. `resume_step` is
    the step of the checkpoint that the stage goes on from, None for a new start. OSError naming the file when
    a log cannot be written."""

    def __init__(
        self,
        config: TrainConfig,
        output_dir: Path,
        *,
        enabled: bool,
        resume_step: int | None = None,
        tensorboard: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config, self.enabled, self._clock = config, enabled, clock
        if not enabled:
            return
        self._step = self._first_step = resume_step or 0
        self._log = RunLog(output_dir / LOG_NAME, config.stage, resume_step)
        self._skipped = RunLog(output_dir / SKIPPED_NAME, config.stage, resume_step)
        last = self._log.last or {}
        self._earlier_seconds = last.get("seconds", 0.0)
        # None: resumed without the earlier lines, so that the first record has to say it
        self._earlier_samples: int | None = last.get("samples_seen", None if resume_step else 0)
        self._scalars = Scalars.open(output_dir / TENSORBOARD_NAME, resume_step) if tensorboard else None
        self._bar = _Bar(config, self._step)
        self._start = clock()
        if resume_step is not None:
            self._say(f"{config.stage}: resumed after step {resume_step}/{config.schedule.steps}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def step(self, record: StepRecord) -> None:
        """Logs a step. It is printed and goes to TensorBoard every `log_interval` steps, and when it is the
        first, the last or a skipped one."""
        if not self.enabled:
            return
        self._step = record.step
        elapsed = self._clock() - self._start
        self._log.step(record, self._earlier_seconds + elapsed)
        if self._earlier_samples is None:
            self._earlier_samples = record.samples_seen
        rate = (record.samples_seen - self._earlier_samples) / max(elapsed, 1e-9)
        numbers = f"loss {record.loss:.4f} lr {record.lr:.2e}"
        self._bar.advance(record.step, f"{numbers} {rate:.1f} samples/s")
        steps, skipped = self.config.schedule.steps, record.skipped_step
        ends = record.step in (1, self._first_step + 1, steps)
        if not (ends or skipped or record.step % self.config.log_interval == 0):
            return
        if self._scalars is not None:
            self._scalars.add(self._log.last)
        if skipped or not self._bar.is_shown:
            text = f"{self.config.stage} step {record.step}/{steps} {numbers}"
            text += f" grad_norm {record.grad_norm:.3f} {rate:.1f} samples/s"
            self._say(f"{text} ({skipped}: weights unchanged)" if skipped else text)

    def skipped_samples(self, step: int, skipped: Sequence[tuple[str, str]]) -> None:
        """Writes reason and message of the samples that `step` left out, and shows the first of them."""
        if not self.enabled:
            return
        for reason, message in skipped:
            self._skipped.write({"step": step, "reason": reason, "message": message})
        for reason, message in skipped[:SHOWN_SAMPLES]:
            self._say(f"{self.config.stage} step {step} left out a sample ({reason}): {message}")

    def event(self, name: str, **values: Any) -> None:
        """A line {"event": name, "step": the last one, "time": ISO 8601, ...}; it and all lines before it are
        on the disk when this returns."""
        if self.enabled:
            self._log.event(name, values.pop("step", self._step), **values)

    def sync(self) -> None:
        """All that was logged is on the disk when this returns. Called before a checkpoint is put in place:
        no resume then finds a log that is behind it."""
        if self.enabled:
            self._log.sync()
            self._skipped.sync()

    def finish(self, summary: Summary) -> None:
        """Logs the end of the stage, and says what was left out and cut, if anything was."""
        if not self.enabled:
            return
        self.event("finish", **dataclasses.asdict(summary))
        self._bar.stop()
        stage = self.config.stage
        if summary.skipped:
            reasons, total = _listed(summary.skipped), sum(summary.skipped.values())
            self._say(f"{stage}: trained on {summary.samples_seen} samples, skipped {total} ({reasons})")
        if summary.num_truncated:
            length = self.config.data.sequence_length
            self._say(f"{stage}: cut {summary.num_truncated} samples at {length} tokens")
        if summary.skipped_steps:
            reasons, total = _listed(summary.skipped_steps), sum(summary.skipped_steps.values())
            self._say(f"{stage}: {total} steps changed no weight ({reasons})")

    def close(self) -> None:
        """Gives back the terminal and the files; may be called twice."""
        if not self.enabled:
            return
        self._bar.stop()
        self._log.close()
        self._skipped.close()
        if self._scalars is not None:
            self._scalars.close()
            self._scalars = None

    def _say(self, text: str) -> None:
        self._bar.print(text)


class _Bar:
    """Of the stage's steps, on standard error if that is a terminal."""

    def __init__(self, config: TrainConfig, steps_done: int) -> None:
        self.is_shown = sys.stderr.isatty()
        if not self.is_shown:
            return
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=None),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[numbers]}"),
            console=Console(stderr=True),
            refresh_per_second=REFRESHES_PER_S,
            expand=True,
        )
        self._task = self._bar.add_task(
            config.stage, total=config.schedule.steps, completed=steps_done, numbers=""
        )
        self._bar.start()

    def advance(self, step: int, numbers: str) -> None:
        if self.is_shown:
            self._bar.update(self._task, completed=step, numbers=numbers)

    def print(self, text: str) -> None:
        """A line above the bar, or on standard output."""
        if self.is_shown:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def stop(self) -> None:
        if self.is_shown:
            self._bar.stop()


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))

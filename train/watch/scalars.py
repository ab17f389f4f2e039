"""TensorBoard's scalars of a step's line."""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAMES = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "num_answer_tokens": "data/answer_tokens",
    "num_skipped": "data/skipped_samples",
    "num_truncated": "data/truncated_samples",
    "images": "data/images",
    "windows": "data/windows",
    "imbalance": "data/imbalance",
    "tokens_per_s": "speed/tokens_per_s",
    "images_per_s": "speed/images_per_s",
    "step_seconds": "speed/step_seconds",
    "mfu": "speed/mfu",
    "memory_bytes": "speed/memory_bytes",
}
_EVENT_FILES = "events.out.tfevents.*"


class Scalars:
    """Writes to one event file; every `add` reaches the file before it returns, so that a killed run loses
    nothing behind its checkpoint. OSError naming the folder when that fails."""

    @classmethod
    def open(cls, folder: Path, resume_step: int | None) -> "Scalars | None":
        """None, after a warning, where the package tensorboard is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            warnings.warn(f"no TensorBoard files: {error} (pip install tensorboard)", stacklevel=2)
            return None
        return cls(SummaryWriter, folder, resume_step)

    def __init__(self, writer_class: type, folder: Path, resume_step: int | None) -> None:
        """A new start removes an earlier run's event files; on resume readers are told to drop what they
        hold behind `resume_step`."""
        self.folder = folder
        purge_step = None
        try:
            if resume_step is None:
                for path in folder.glob(_EVENT_FILES):
                    path.unlink()
            else:
                purge_step = resume_step + 1
                _wait_behind(folder)
            self._writer = writer_class(str(folder), purge_step=purge_step)
        except OSError as error:
            raise self._named(error) from error

    def add(self, line: dict[str, Any]) -> None:
        """The numbers of a step's line (`StepRecord.line`); None is left out."""
        try:
            for name, value in _scalars(line):
                self._writer.add_scalar(name, value, line["step"])
            self._writer.flush()
        except OSError as error:
            raise self._named(error) from error

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            raise self._named(error) from error

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror or str(error), str(self.folder))


def _wait_behind(folder: Path) -> None:
    """Until a new event file's name sorts behind those of `folder`: TensorBoard reads them in that order,
    and of two names of one second the order is that of process and counter."""
    seconds = [
        int(path.name.removeprefix(_EVENT_FILES[:-1]).split(".")[0]) for path in folder.glob(_EVENT_FILES)
    ]
    wait = max(seconds, default=0) + 1 - time.time()
    if 0 < wait <= 1:
        time.sleep(wait)


def _scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, name in _NAMES.items():
        if line[key] is not None:
            yield name, line[key]
    yield "train/skipped_step", float(line["skipped_step"] is not None)
    for layer, (attn, ffn) in (line["gates"] or {}).items():
        yield f"gates_attn/layer_{layer}", attn
        yield f"gates_ffn/layer_{layer}", ffn

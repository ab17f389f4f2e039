"""The log of a stage: a line a step in log.jsonl, a bar on a terminal, plain lines elsewhere."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from .config import TrainConfig


class Progress:
    """Writes on the rank where it is `enabled`, and nothing on the others."""

    def __init__(self, config: TrainConfig, log_path: Path, *, enabled: bool) -> None:
        self.config, self.enabled = config, enabled
        if enabled:
            self._log = log_path.open("w")
            self._is_terminal = sys.stderr.isatty()
            self._bar = tqdm(
                total=config.schedule.steps, desc=config.stage, unit="step", disable=not self._is_terminal
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.enabled:
            self._bar.close()
            self._log.close()

    def step(
        self, *, step: int, loss: float, lr: float, grad_norm: float, seconds: float, **counts: int
    ) -> None:
        """Logs one step; `seconds` since the stage began. A norm that is not finite is logged as null."""
        if not self.enabled:
            return
        shown_norm = grad_norm if math.isfinite(grad_norm) else None
        line = dict(step=step, stage=self.config.stage, loss=loss, lr=lr, grad_norm=shown_norm, **counts)
        self._log.write(json.dumps(line | {"seconds": round(seconds, 4)}) + "\n")
        self._log.flush()
        rate = counts["samples_seen"] / max(seconds, 1e-9)
        self._bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {rate:.1f} samples/s", refresh=False)
        self._bar.update()
        steps = self.config.schedule.steps
        if not self._is_terminal and (step % self.config.log_interval == 0 or step in (1, steps)):
            text = f"{self.config.stage} step {step}/{steps} loss {loss:.4f} lr {lr:.2e}"
            print(f"{text} grad_norm {grad_norm:.3f} {rate:.1f} samples/s", flush=True)

    def finish(self, samples_seen: int, skipped: Mapping[str, int], num_truncated: int) -> None:
        """Says what was trained on and, if anything was, what was left out and cut."""
        if not self.enabled:
            return
        stage = self.config.stage
        if skipped:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
            summary = {"stage": stage, "samples_seen": samples_seen, "skipped": dict(sorted(skipped.items()))}
            self._log.write(json.dumps(summary) + "\n")
            tqdm.write(
                f"{stage}: trained on {samples_seen} samples, skipped {sum(skipped.values())} ({reasons})"
            )
        if num_truncated:
            tqdm.write(f"{stage}: cut {num_truncated} samples at {self.config.data.sequence_length} tokens")

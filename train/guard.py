"""Optimizer steps that would harm the model are left out and counted, on every ZeRO stage."""

import collections
import math
from collections.abc import Callable
from typing import Any

import torch

from .config import GuardConfig


class StepGuard:
    """Stands before `optimizer.step`, which DeepSpeed calls when the gradient is reduced and its norm known.

    A step with a loss or gradient norm that is not finite, or with a spike (see `GuardConfig`), changes no
    weight and no optimizer state. The verdict comes from numbers that are equal on every rank.

    `grad_norm()` gives the norm of the whole gradient before clipping, inside `optimizer.step`."""

    def __init__(
        self, config: GuardConfig, optimizer: torch.optim.Optimizer, grad_norm: Callable[[], float]
    ) -> None:
        self.config, self.grad_norm = config, grad_norm
        self.skipped: collections.Counter[str] = collections.Counter()
        self._accepted: collections.deque[tuple[float, float]] = collections.deque(maxlen=config.window)
        self._loss, self._norm = 0.0, math.nan
        self._verdict: str | None = None
        self._judged = True
        inner = optimizer.step

        def step(closure: None = None) -> None:
            # DeepSpeed calls it once for each of its groups
            if self._judge() is None:
                inner()

        optimizer.step = step

    def begin(self, loss: float) -> None:
        """Before the engine's step: the loss of the global batch."""
        self._loss, self._norm, self._verdict, self._judged = loss, math.nan, None, False

    def end(self, *, overflow: bool, finds_scale: bool) -> tuple[float, str | None]:
        """After the engine's step: (gradient norm, reason the step was left out or None).

        `overflow`: DeepSpeed left the step out itself, because of a gradient that is not finite;
        `finds_scale`: that is how fp16 lowers its loss scale. FloatingPointError after too many."""
        if overflow:
            self._norm = math.inf
            scaled_too_far = finds_scale and math.isfinite(self._loss)
            self._verdict, self._judged = "overflow" if scaled_too_far else "nonfinite", True
        self._judge()
        if self._verdict is None:
            self._accepted.append((self._loss, self._norm))
        else:
            self.skipped[self._verdict] += 1
        if self._verdict not in (None, "overflow"):
            self._check_limit()
        return self._norm, self._verdict

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": dict(self.skipped), "accepted": list(self._accepted)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = collections.Counter(state["skipped"])
        self._accepted.extend(map(tuple, state["accepted"]))

    def _judge(self) -> str | None:
        if not self._judged:
            self._judged = True
            self._norm = self.grad_norm()
            if not (math.isfinite(self._loss) and math.isfinite(self._norm)):
                self._verdict = "nonfinite"
            elif self._is_spike():
                self._verdict = "spike"
        return self._verdict

    def _is_spike(self) -> bool:
        sigmas = self.config.spike_sigmas
        if sigmas is None or len(self._accepted) < self.config.window:
            return False
        for value, earlier in zip((self._loss, self._norm), zip(*self._accepted, strict=True), strict=True):
            mean = math.fsum(earlier) / len(earlier)
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in earlier) / len(earlier))
            if value > mean + sigmas * deviation:
                return True
        return False

    def _check_limit(self) -> None:
        count = sum(number for reason, number in self.skipped.items() if reason != "overflow")
        if count > self.config.max_skipped_steps:
            reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(self.skipped.items()))
            raise FloatingPointError(
                f"steps left out must be at most guard.max_skipped_steps {self.config.max_skipped_steps}, "
                f"got {count} ({reasons}); the last had loss {self._loss} and gradient norm {self._norm}"
            )

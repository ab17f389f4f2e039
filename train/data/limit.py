"""How many bad samples a run bears."""

import collections
from collections.abc import Sequence
from typing import Any

_FIRST_CHECK = 100
_KEPT_MESSAGES = 20


class SkipLimit:
    """Counts what was trained on and what was left out, and stops when too much was left out.

    It belongs to the whole run: `add` takes what all ranks did, so that all of them stop at once, and the
    state goes into checkpoints."""

    def __init__(self, max_share: float) -> None:
        """`max_share`: `data.max_skipped_share`, in 0..1."""
        self.max_share = max_share
        self.num_trained = 0
        self.counts: collections.Counter[str] = collections.Counter()
        """Skipped samples by reason."""
        self.messages: collections.deque[str] = collections.deque(maxlen=_KEPT_MESSAGES)
        """The last ones, each beginning with its reason."""

    @property
    def share(self) -> float:
        """Skipped of all samples so far."""
        skipped = self.counts.total()
        return skipped / max(1, skipped + self.num_trained)

    def add(self, skipped: Sequence[tuple[str, str]], num_trained: int) -> None:
        """Adds reasons and messages of skipped samples and the number of those trained on; ValueError with
        the reasons and the last messages when the share is exceeded, from the 100th sample on."""
        self.num_trained += num_trained
        for reason, message in skipped:
            self.counts[reason] += 1
            self.messages.append(f"{reason}: {message}")
        total = self.counts.total() + self.num_trained
        if total >= _FIRST_CHECK and self.share > self.max_share:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.counts.most_common())
            raise ValueError(
                f"data must have at most a share of data.max_skipped_share {self.max_share} of bad samples, "
                f"got {self.counts.total()} of {total} ({reasons}); the last of them:\n"
                + "\n".join(f"  {message}" for message in self.messages)
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "num_trained": self.num_trained,
            "counts": dict(self.counts),
            "messages": list(self.messages),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.num_trained = state["num_trained"]
        self.counts = collections.Counter(state["counts"])
        self.messages = collections.deque(state["messages"], maxlen=_KEPT_MESSAGES)

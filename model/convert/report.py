"""What a conversion did with every tensor, and the error that carries it."""

import dataclasses
import re
from collections.abc import Iterable


@dataclasses.dataclass
class Report:
    """Names as the source has them, but for `new`; `text` is what the command line prints."""

    source: str
    form: str
    used: list[str] = dataclasses.field(default_factory=list)
    aliases: list[str] = dataclasses.field(default_factory=list)
    """Second names of used tensors, equal to the first bit for bit."""
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    """Names for which the target has no place, and why."""
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    changed: list[str] = dataclasses.field(default_factory=list)
    """Sentences on values that were not merely renamed or reshaped."""
    new: list[str] = dataclasses.field(default_factory=list)
    """Names of ours that no source had, initialised."""
    notes: list[str] = dataclasses.field(default_factory=list)

    def text(self) -> str:
        lines = [f"{self.source}: {self.form}", f"  used: {len(self.used)} tensors"]
        if self.aliases:
            lines.append(f"  second names of the same tensors: {len(self.aliases)}")
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected), ("new", self.new)):
            if names or title != "new":
                lines.append(f"  {title}: {', '.join(grouped(names)) or 'none'}")
        lines.append(f"  left out: {'none' if not self.left_out else ''}".rstrip())
        for reason in dict.fromkeys(self.left_out.values()):
            names = [name for name, why in self.left_out.items() if why == reason]
            lines.append(f"    {reason}: {', '.join(grouped(names))}")
        lines += [f"  {sentence}" for sentence in (*self.changed, *self.notes)]
        return "\n".join(lines)


class ConversionError(ValueError):
    """Tensors are missing or unexpected; `report` lists them all."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def grouped(names: Iterable[str]) -> list[str]:
    """Names with their numbers written as N, and how many there are of each."""
    counts: dict[str, int] = {}
    for name in names:
        key = re.sub(r"(?<=\.)\d+(?=\.)", "N", name)
        counts[key] = counts.get(key, 0) + 1
    return [key if count == 1 else f"{key} ({count})" for key, count in counts.items()]

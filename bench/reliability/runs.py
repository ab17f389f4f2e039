"""One run of a tiny stage, as a user starts it, and what it left behind."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from train import __main__ as command
from train.watch import CLOCK_KEYS, read_log

from . import forking, tiny
from .forking import Ended, Strike

Prepare = Callable[[int], Callable[[], None] | None]


@dataclasses.dataclass(slots=True)
class Outcome:
    """What came of one case."""

    kind: str
    case: int
    name: str
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Under the names of the report."""
    points: list[str] = dataclasses.field(default_factory=list)
    """Where a rank was killed."""
    wrong: list[str] = dataclasses.field(default_factory=list)
    """What is not as it has to be; empty if the case passed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """An uninterrupted run."""

    record: "Record"
    calls: list[dict[str, int]]
    """By rank, how often it came to each named point."""
    seconds: float
    overrides: dict[str, Any]
    output_dir: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How a stage is spread over ranks."""

    world_size: int
    zero_stage: int
    precision: str = "fp32"

    def __str__(self) -> str:
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{ranks} ZeRO {self.zero_stage} {self.precision}"


@dataclasses.dataclass(slots=True)
class Run:
    """A stage in a folder of its own; `start` may be called until it is finished."""

    recipe: str
    layout: Layout
    folder: Path
    """Holds `output` and what the ranks said."""
    overrides: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        return self.folder / "output"

    @property
    def finished(self) -> bool:
        return (self.output_dir / "finished.json").is_file()

    def start(
        self,
        prepare: Prepare | None = None,
        *,
        strike: Strike | None = None,
        grace_s: float = 10.0,
        **overrides: Any,
    ) -> Ended:
        """Starts or goes on with it by `python -m train`'s main; `prepare(rank)` is called in each rank,
        and what it returns at the rank's end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {
            "parallel__zero_stage": self.layout.zero_stage,
            "parallel__precision": self.layout.precision,
        }
        config = tiny.tiny_config(self.recipe, self.output_dir, **values | self.overrides | overrides)
        path = self.folder / "config.json"
        path.write_text(json.dumps(config.to_dict()))

        def body(rank: int) -> int:
            at_end = None if prepare is None else prepare(rank)
            try:
                return command.main([str(path)])
            finally:
                if at_end is not None:
                    at_end()

        said = self.folder / "said"
        return forking.run_ranks(body, self.layout.world_size, said, strike=strike, grace_s=grace_s)

    def finish(self, outcome: "Outcome", expected: "Record") -> None:
        """Goes on to the end and adds to `outcome` what went wrong or differs from the `expected` record."""
        ended = self.start()
        outcome.counts["hangs"] += ended.hung
        if ended.good and self.finished:
            outcome.wrong += read_record(self.output_dir).differences(expected)
        else:
            outcome.wrong.append(f"the run did not come to its end: {ended}")


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What a finished run did, but for its clocks; of equal runs it is equal."""

    losses: tuple[str, ...]
    """In hexadecimal, of every step."""
    grad_norms: tuple[str, ...]
    samples_seen: int
    skipped: str
    num_truncated: int
    weights: str
    """SHA-256 over names, types, shapes and bytes of all tensors of the exported model."""
    log: tuple[str, ...]
    skipped_log: tuple[str, ...]

    def differences(self, other: "Record") -> list[str]:
        """A line for every field that is not equal, with the first places."""
        found = []
        for field in dataclasses.fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if mine == others:
                continue
            if isinstance(mine, tuple):
                places = [i for i, pair in enumerate(zip(mine, others, strict=False)) if pair[0] != pair[1]]
                place = places[0] if places else min(len(mine), len(others))
                mine, others = (
                    f"{len(values)} entries, number {place + 1} {values[place : place + 1]}"
                    for values in (mine, others)
                )
            found.append(f"{field.name}: {mine} in place of {others}")
        return found


def read_record(output_dir: Path) -> Record:
    done = json.loads((output_dir / "finished.json").read_text())
    return Record(
        losses=_hexadecimal(done["losses"]),
        grad_norms=_hexadecimal(done["grad_norms"]),
        samples_seen=done["samples_seen"],
        skipped=json.dumps(done["skipped"], sort_keys=True),
        num_truncated=done["num_truncated"],
        weights=weights_hash(output_dir / "model"),
        log=step_lines(output_dir / "log.jsonl"),
        skipped_log=step_lines(output_dir / "skipped.jsonl"),
    )


def step_lines(path: Path) -> tuple[str, ...]:
    """What a log holds beside its events, without what clocks gave; a torn line counts as one."""
    if not path.exists():
        return ()
    log = read_log(path)
    lines = [{key: value for key, value in line.items() if key not in CLOCK_KEYS} for line in log.steps]
    return (*map(json.dumps, lines), *["torn"] * log.num_unreadable)


def weights_hash(model: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        for name, tensor in sorted(safetensors.torch.load_file(path).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _hexadecimal(numbers: list[float | None]) -> tuple[str, ...]:
    return tuple("none" if number is None else float(number).hex() for number in numbers)

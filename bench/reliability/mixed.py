"""Two ranks that see different kinds of samples neither hang nor train differently from one."""

import math
import random
from collections.abc import Iterator

from . import tiny
from .room import Room, tidy
from .runs import Layout, Outcome, Run, read_record

KIND = "mixed"
_CASES, _STEPS, _QUICK_STEPS = 16, 32, 8
_BATCH, _RANKS = 8, 2
_RELATIVE = 1e-5
_MOST_IMAGES = 8
SETTINGS = {
    "trainable": tiny.ALL_PARTS,
    "schedule__warmup_steps": 4,
    "optimizer__lr_peak": 1e-3,
    "optimizer__lr_min": 1e-4,
    "parallel__global_batch_size": _BATCH,
    "data__sequence_length": 64,
    "data__shuffle": False,
    "data__balance": "none",
    "data__max_skipped_share": 1.0,
    "guard__max_skipped_steps": 1000,
    "checkpoint__every_steps": None,
    "image__window_size": 28,
}


def cases(room: Room) -> Iterator[int]:
    yield from range(1 if room.quick else _CASES)


def samples(draw: random.Random, steps: int) -> list[int | None]:
    """Images of each sample, None for a bad one: rank by rank, which reads half of every batch in this order.

    A rank now and then gets texts alone, or bad samples alone; seldom all ranks do."""
    found: list[int | None] = []
    for _ in range(steps):
        whole = draw.choices((None, "texts", "bad"), (18, 1, 1))[0]
        for _ in range(_RANKS):
            kind = whole or draw.choices(("any", "texts", "bad"), (5, 3, 2))[0]
            for _ in range(_BATCH // _RANKS):
                number = {"any": draw.randint(0, _MOST_IMAGES), "texts": 0, "bad": None}[kind]
                found.append(None if draw.random() < 0.05 else number)
    return found


def attempt(room: Room, case: int) -> Outcome:
    """The same samples on two ranks at a ZeRO stage, and on one rank without ZeRO."""
    draw = room.draw(KIND, case)
    steps = _QUICK_STEPS if room.quick else _STEPS
    layout = Layout(_RANKS, 3 - case % 4)
    outcome = Outcome(KIND, case, f"{steps} steps on {layout}")
    folder = room.new_folder(KIND, case)
    data = tiny.write_mixed_conversations(folder / "data", samples(draw, steps), seed=draw.randrange(10**6))
    overrides = room.material | SETTINGS | {"data__path": str(data), "schedule__steps": steps}
    overrides["image__mode"] = draw.choice(("single", "dynamic"))
    overrides["parallel__max_micro_batch_size"] = draw.choice((2, 4))
    records = []
    for name, used in (("ranks", layout), ("one", Layout(1, 0))):
        run = Run("CPT", used, folder / name, overrides)
        ended = run.start()
        outcome.counts["hangs"] += ended.hung
        if not (ended.good and run.finished):
            outcome.wrong.append(f"{used} must come to the end, got {ended}")
            outcome.counts["mismatches"] += 1
            return outcome
        records.append(read_record(run.output_dir))
    outcome.counts["mixed_steps"] += steps
    mine, expected = records
    for field in ("samples_seen", "skipped", "num_truncated"):
        if getattr(mine, field) != getattr(expected, field):
            got = f"{getattr(mine, field)} in place of {getattr(expected, field)}"
            outcome.wrong.append(f"{field}: {got}")
    apart = farthest(mine.losses, expected.losses)
    if not apart <= _RELATIVE:
        outcome.wrong.append(f"losses must be within {_RELATIVE} of one process, got {apart}")
    if outcome.wrong:
        outcome.counts["mismatches"] += 1
    return tidy(folder, outcome)


def farthest(losses: tuple[str, ...], expected: tuple[str, ...]) -> float:
    """Largest relative distance of two runs' losses; infinite if they are not as many or not there alike."""
    if len(losses) != len(expected):
        return math.inf
    largest = 0.0
    for mine, other in zip(losses, expected, strict=True):
        if "none" in (mine, other):
            largest = max(largest, 0.0 if mine == other else math.inf)
            continue
        value = float.fromhex(other)
        largest = max(largest, abs(float.fromhex(mine) - value) / abs(value))
    return largest

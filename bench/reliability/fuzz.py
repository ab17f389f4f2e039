"""Readers that are given spoilt data lose no sample without a reason."""

import importlib
import importlib.util
from collections.abc import Iterator

from .room import Room
from .runs import Outcome

KIND = "fuzz"
SAMPLES, QUICK_SAMPLES = 10_000, 200
_PARTS = 4
_MODULE = "tests.train.fuzz_data"


def cases(room: Room) -> Iterator[int]:
    if importlib.util.find_spec(_MODULE) is not None:
        yield from range(1 if room.quick else _PARTS)


def attempt(room: Room, case: int) -> Outcome:
    outcome = Outcome(KIND, case, "fuzzed samples through the readers")
    number = QUICK_SAMPLES if room.quick else SAMPLES // _PARTS
    fuzzed, lost = fuzz_readers(number, room.draw(KIND, case).randrange(2**31))
    outcome.counts.update(fuzzed_samples=fuzzed, lost_silently=lost)
    if lost:
        outcome.wrong.append(f"every sample must be trained on or skipped by a reason, got {lost} lost")
    return outcome


def fuzz_readers(number: int, seed: int) -> tuple[int, int]:
    """Puts at least `number` fuzzed samples through the readers: (samples, those lost without a reason)."""
    found = importlib.import_module(_MODULE).fuzz(number, seed)
    return found["fuzzed_samples"], found["lost_silently"]

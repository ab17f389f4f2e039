"""Runs that are killed again and again end bit for bit as those that were left alone."""

import dataclasses
import itertools
import signal
from collections.abc import Iterator

from . import faults
from .faults import BEFORE, Fault
from .forking import Ended, Strike
from .room import Room, tidy
from .runs import Layout, Outcome, Reference, Run

KIND = "kills"
RANDOM = "random"
NAMED = [(point.name, moment) for point in faults.POINTS for moment in point.moments]
_RETIRING, _LATER = "retiring the old export", "writing finished.json"
"""A run must have been killed at the second before it comes to the first."""


def cases(room: Room) -> Iterator[int]:
    """Endless: `bench.reliability` takes as many as it needs for its number of kills."""
    yield from itertools.count()


def configuration(room: Room, case: int) -> tuple[Layout, str]:
    """Every layout and recipe in turn."""
    number, recipe = divmod(case, len(room.recipes))
    return room.layouts[number % len(room.layouts)], room.recipes[recipe]


def plan(room: Room, case: int, reference: Reference) -> list[Fault | Strike]:
    """What happens to a run, start by start: named points and random ones in turn.

    Over the cases every named point comes equally often."""
    draw = room.draw(KIND, case)
    order = room.draw(KIND, "order").sample(NAMED, len(NAMED))
    ranks = len(reference.calls)
    named = []
    for name, moment in (order[(2 * case + i) % len(order)] for i in range(2)):
        able = [rank for rank in range(ranks) if reference.calls[rank].get(name)] or list(range(ranks))
        rank = 0 if name == _RETIRING else draw.choice(able)
        calls = reference.calls[rank].get(name, 0)
        named.append(Fault(name, moment, draw.randint(1, max(calls, 1)), rank))
    # what an untouched run never comes to needs a start that ended early
    named.sort(key=lambda fault: not reference.calls[fault.rank].get(fault.name))
    if any(fault.name == _RETIRING for fault in named):
        named.insert(len(named) - 1, Fault(_LATER, BEFORE, 1, 0))
        return named
    strikes = [
        Strike(reference.seconds * draw.uniform(0.05, end), draw.randrange(ranks)) for end in (0.9, 0.6)
    ]
    found = [strikes[0], named[0], strikes[1], named[1]]
    if draw.random() < 0.5 and reference.calls[named[0].rank].get(named[0].name):
        found[:2] = found[1::-1]
    return found


def attempt(room: Room, case: int) -> Outcome:
    """Kills a run as `plan` says, lets it end, and compares."""
    layout, recipe = configuration(room, case)
    reference = room.reference(layout, recipe)
    outcome = Outcome(KIND, case, f"{recipe} on {layout}")
    folder = room.new_folder(KIND, case)
    run = Run(recipe, layout, folder, reference.overrides)
    draw = room.draw(KIND, f"{case} starts")
    history = []
    for number, fault in enumerate(plan(room, case, reference)):
        if number and isinstance(fault, Fault) and fault.number > 1:  # fewer calls are left
            fault = dataclasses.replace(fault, number=draw.randint(1, fault.number))
        ended = _start(run, fault, draw.uniform(0.0, 0.3))
        history.append(f"{fault}: {ended.codes}")
        outcome.counts["hangs"] += ended.hung
        if ended.codes[fault.rank] == -signal.SIGKILL and not ended.hung:
            outcome.counts["kills"] += 1
            outcome.points.append(fault.name if isinstance(fault, Fault) else RANDOM)
            continue
        if not ended.good:
            outcome.wrong.append(f"start {number + 1} failed without a kill: {ended}")
        break
    run.finish(outcome, reference.record)
    if outcome.wrong:
        outcome.counts["mismatches"] += 1
        outcome.wrong.append(f"after {history}")
    return tidy(folder, outcome)


def _start(run: Run, fault: Fault | Strike, grace_s: float) -> Ended:
    if isinstance(fault, Strike):
        return run.start(strike=fault, grace_s=grace_s)
    return run.start(faults.arming(fault, run.output_dir), grace_s=grace_s)

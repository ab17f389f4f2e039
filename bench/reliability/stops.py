"""SIGTERM and SIGINT: every rank saves and ends in time, and the run goes on as if nothing had been."""

import os
import signal
import time
from collections.abc import Iterator

from . import faults
from .faults import BEFORE, Call, Fault
from .forking import Strike
from .room import Room, tidy
from .runs import Outcome, Run

KIND = "stops"
_CASES, _QUICK_CASES = 16, 2
_GRACE_S = 5.0
_POINTS = (
    "reading a step",
    "forward",
    "backward",
    "AdamW's step",
    "writing a tensor file",
    "line of the log",
)
_PAUSE_S = 0.05


def cases(room: Room) -> Iterator[int]:
    yield from range(_QUICK_CASES if room.quick else _CASES)


def attempt(room: Room, case: int) -> Outcome:
    """In turn: a signal inside a step, a second one right behind it, one from outside at any time."""
    draw = room.draw(KIND, case)
    layout = room.layouts[case % len(room.layouts)]
    recipe = room.recipes[case // len(room.layouts) % len(room.recipes)]
    reference = room.reference(layout, recipe)
    way = ("one", "two", "outside")[case % 3]
    number = draw.choice((signal.SIGTERM, signal.SIGINT))
    outcome = Outcome(KIND, case, f"{way}, {number.name}, {recipe} on {layout}")
    folder = room.new_folder(KIND, case)
    run = Run(recipe, layout, folder, reference.overrides)
    rank = draw.randrange(layout.world_size)
    if way == "outside":
        strike = Strike(reference.seconds * draw.uniform(0.0, 0.9), rank, number)
        ended = run.start(strike=strike, grace_s=_GRACE_S)
    else:
        point = draw.choice([name for name in _POINTS if reference.calls[rank].get(name)])
        calls = reference.calls[rank][point]
        # not in the last step, behind which nothing is left to stop
        fault = Fault(point, BEFORE, draw.randint(1, max(1, calls // 2)), rank)
        outcome.name += f", {fault}"
        act = _send_two(number) if way == "two" else lambda call: os.kill(os.getpid(), number)
        ended = run.start(faults.arming(fault, run.output_dir, act), grace_s=_GRACE_S)
    outcome.counts["sigterms"] += 1
    outcome.counts["hangs"] += ended.hung
    stopped = [128 + number] * layout.world_size
    right = {
        "one": ended.codes == stopped,
        "two": ended.codes[rank] in (-number, 1) and not run.finished,
        # it may come before the first step, or when all is done
        "outside": ended.codes == stopped or ended.codes[rank] in (-number, 1) or ended.good,
    }[way]
    if not right:
        outcome.wrong.append(f"every rank must end with {128 + number}, got {ended}")
    if ended.codes == stopped and not any((run.output_dir / "checkpoints").glob("step-*")):
        outcome.wrong.append("a checkpoint must be there, got none")
    run.finish(outcome, reference.record)
    outcome.counts["mismatches"] += bool(outcome.wrong)
    return tidy(folder, outcome)


def _send_two(number: int) -> faults.Callable[[Call], None]:
    def act(call: Call) -> None:
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(_PAUSE_S)  # the first has to have come when the second is sent, from any thread

    return act

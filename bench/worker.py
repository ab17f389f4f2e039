"""Runs the cases of a plan in a process of its own and writes what happens, one JSON line an event.

`python -m bench.worker EVENTS DONE --device cuda [--quick]`: EVENTS is the file to append to; DONE is a JSON
list of [index of the case, name of the implementation] that need no work, the name "" standing for a whole
case. A line is {"case", "begin": name}, {"case", "entry": {...}}, {"case", "end": true} or {"error": text}.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import harness, plan

DEVICE_LOST = 3  # exit code: start another process and go on
SECONDS_PER_CASE = {"cuda": 1.5, "cpu": 0.05}


def cases_of(quick: bool) -> list[harness.Case]:
    return plan.quick_plan() if quick else plan.full_plan()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.worker", description=__doc__)
    parser.add_argument("events", type=Path)
    parser.add_argument("done", type=Path)
    parser.add_argument("--device", required=True, choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds since the epoch")
    options = parser.parse_args(arguments)
    settled: dict[int, set[str]] = {}
    for index, name in json.loads(options.done.read_text()):
        settled.setdefault(index, set()).add(name)
    device = torch.device(options.device)
    with options.events.open("a") as events:

        def tell(**event: Any) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        for index, case in enumerate(cases_of(options.quick)):
            if "" in settled.get(index, ()):
                continue
            if time.time() > options.deadline:
                return 0
            try:
                for entry in harness.run_case(
                    case,
                    device,
                    seconds=SECONDS_PER_CASE[device.type],
                    settled=settled.get(index, ()),
                    begin=lambda name, index=index: tell(case=index, begin=name),
                ):
                    tell(case=index, entry=entry)
            except harness.DeviceLost as lost:
                tell(error=str(lost))
                return DEVICE_LOST
            except Exception as error:  # the inputs themselves: too large for this GPU, say
                tell(case=index, entry=case.entry("all", "failed", harness.reason_of(error)))
            tell(case=index, end=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

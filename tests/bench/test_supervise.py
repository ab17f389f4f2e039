"""A worker that crashes, hangs or never starts costs what it was at and nothing else."""

import sys
import time

import pytest

from bench import supervise as supervise_module
from bench.harness import TIMING, Case
from bench.supervise import supervise

CASES = [Case("test", "copy", {"numel": number}) for number in (1, 2, 3)]
# A worker of three implementations a case, which does what FAULT says when it first meets `bad` in case 1.
WORKER = """
import json, os, sys, time
events, done, fault = sys.argv[1:]
settled = {tuple(pair) for pair in json.load(open(done))}
def tell(**event):
    with open(events, "a") as file:
        file.write(json.dumps(event) + "\\n")
def entry(name, status):
    return {"implementation": name, "status": status}
if fault == "start":
    sys.exit("cannot import anything")
for case in range(3):
    if (case, "") in settled:
        continue
    names = [n for n in ("good", "bad", "fine") if (case, n) not in settled]
    for name in names:
        tell(case=case, begin=name)
        if case == 1 and name == "bad":
            if fault == "abort":
                os.abort()
            if fault == "hang":
                time.sleep(60)
            if fault == "lost":
                tell(case=case, entry=entry("bad", "failed"))
                tell(error="the device is lost")
                sys.exit(3)
    tell(case=case, begin="(timing)")
    if case == 1 and fault == "timing":
        os.abort()
    for name in names:
        tell(case=case, entry=entry(name, "ok"))
    tell(case=case, end=True)
"""


def watched(fault: str, seconds: float = 30.0, **options) -> list[tuple]:
    entries = []

    def command(events, done):
        return [sys.executable, "-c", WORKER, str(events), str(done), fault]

    supervise(CASES, command, entries.append, deadline=time.time() + seconds, **options)
    return entries


def statuses(entries, of: str) -> list[str]:
    return [entry["status"] for entry in entries if entry["implementation"] == of]


def test_all_goes_well():
    entries = watched("none")
    assert [statuses(entries, name) for name in ("good", "bad", "fine")] == [["ok"] * 3] * 3


@pytest.mark.parametrize("fault", ["abort", "hang", "lost"])
def test_the_implementation_at_work_is_blamed_and_the_rest_is_measured(fault):
    entries = watched(fault, silence_s=0.7)
    assert statuses(entries, "good") == statuses(entries, "fine") == ["ok"] * 3
    assert sorted(statuses(entries, "bad")) == ["failed", "ok", "ok"]
    assert len(entries) == 9
    if fault != "lost":
        (failed,) = (entry for entry in entries if entry["status"] == "failed")
        expected = "killed by SIGABRT" if fault == "abort" else "no sign of life for 0.7 s"
        assert failed["reason"].startswith(expected) and failed["shape"] == CASES[1].shape


def test_a_crash_among_the_samples_costs_the_case():
    entries = watched("timing")
    assert statuses(entries, "good") == ["ok"] * 2
    (failed,) = (entry for entry in entries if entry["status"] == "failed")
    assert failed["implementation"] == "all" and failed["reason"].endswith("while being timed")
    assert TIMING == "(timing)"


def test_a_worker_that_does_not_start_is_tried_twice():
    entries = watched("start")
    assert [entry["status"] for entry in entries] == ["failed"] * 3
    assert all("cannot import anything" in entry["reason"] for entry in entries)


def test_no_worker_outlives_its_watcher():
    """A worker has a session of its own, which an interrupt does not reach: the watcher has to end it."""
    processes = []

    def interrupted(entry):
        raise KeyboardInterrupt

    def command(events, done):
        script = f'import os; open({str(events)!r}, \'w\').write(\'{{"case": 0, "begin": "x"}}\\n\')'
        return [sys.executable, "-c", f"{script}; import time; time.sleep(60)"]

    real = supervise_module.subprocess.Popen

    def started(*args, **options):
        processes.append(real(*args, **options))
        return processes[-1]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supervise_module.subprocess, "Popen", started)
        supervise(CASES, command, interrupted, deadline=time.time() + 30, silence_s=0.3)
    assert [process.poll() for process in processes] == [-9]


def test_what_the_budget_does_not_reach_is_said():
    start = time.time()
    entries = watched("hang", seconds=1.0, silence_s=50.0, grace_s=0.0)
    assert time.time() - start < 20
    left = [entry for entry in entries if entry["status"] == "budget"]
    assert [entry["shape"]["numel"] for entry in left] == [2, 3]
    assert statuses(entries, "good") == ["ok"]

"""A pytest plugin that writes every test's outcome as it comes, one JSON line each, to $BENCH_TEST_EVENTS.

A report that pytest writes at its end is lost when a kernel takes the process with it; these lines are not.
"""

import json
import os

import pytest


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell({"test": nodeid, "outcome": "started"})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        message = "" if report.passed else report.longreprtext[-1500:]
        if report.skipped and isinstance(report.longrepr, tuple):
            message = report.longrepr[2]
        _tell({"test": report.nodeid, "outcome": report.outcome, "message": message})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _tell({"test": report.nodeid, "outcome": "failed", "message": report.longreprtext[-1500:]})


def _tell(event: dict[str, str]) -> None:
    with open(os.environ["BENCH_TEST_EVENTS"], "a") as file:
        file.write(json.dumps(event) + "\n")

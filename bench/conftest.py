"""Says at the end of a run which implementations have no number, and why: pytest hides that of a skip."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons: dict[str, int] = {}
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        terminalreporter.section("no number for")
    for reason, times in reasons.items():
        terminalreporter.line(f"{times:4} x {reason}")

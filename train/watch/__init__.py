"""Watching a stage: log.jsonl, a bar or plain lines, TensorBoard, the gates. Only `gates` imports torch."""

from .log import CLOCK_KEYS, Log, RunLog, StepRecord, read_log
from .progress import Progress, Summary

__all__ = ["CLOCK_KEYS", "Log", "Progress", "RunLog", "StepRecord", "Summary", "read_log"]

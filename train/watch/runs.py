"""The logs of stages that follow each other: found in folders and put in order."""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .log import Log, read_log
from .progress import LOG_NAME

STAGE_ORDER = ("PT", "CPT", "DRA", "IFT", "MRA_PRETRAIN", "MRA_FINETUNE")
NO_REASON = "reason not logged yet"


@dataclasses.dataclass(slots=True)
class StageLog:
    """One stage's output folder. Numbers ask for at least one logged step."""

    folder: Path
    name: str
    log: Log
    init_from: str | None
    started: str
    """ISO 8601 of its "start" event, "" in a log without one."""

    @property
    def num_steps(self) -> int:
        return self.log.steps[-1]["step"]

    def column(self, key: str) -> np.ndarray:
        """The value at every logged step; NaN where it is null or missing."""
        values = [line.get(key) for line in self.log.steps]
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    def trained(self) -> np.ndarray:
        """Bool, of every logged step: whether it changed the weights."""
        return np.array([not line.get("skipped_step") for line in self.log.steps])

    def gates(self) -> dict[int, np.ndarray]:
        """By layer [n, 3]: step, attention gate, feed-forward gate; of the steps where they were read."""
        layers = collections.defaultdict(list)
        for line in self.log.steps:
            for layer, pair in (line.get("gates") or {}).items():
                layers[int(layer)].append(
                    [line["step"], *(np.nan if value is None else value for value in pair)]
                )
        return {layer: np.array(rows, dtype=np.float64) for layer, rows in sorted(layers.items())}

    def skipped_samples(self) -> dict[str, int]:
        """Samples left out by reason: as the last event that lists them says, and the rest as `NO_REASON`."""
        counts: dict[str, int] = {}
        for event in self.log.events:
            if isinstance(event.get("skipped"), dict):
                counts = dict(event["skipped"])
        rest = int(np.nansum(self.column("num_skipped"))) - sum(counts.values())
        return counts | ({NO_REASON: rest} if rest > 0 else {})

    def skipped_steps(self) -> list[tuple[int, str]]:
        return [(line["step"], line["skipped_step"]) for line in self.log.steps if line.get("skipped_step")]

    def resumes(self) -> list[int]:
        return [event["step"] for event in self.log.events if event["event"] == "resume"]


def find_stages(runs: Sequence[str]) -> tuple[list[StageLog], dict[Path, str]]:
    """The stages of `runs` in the order of training, and why folders among them were left out.

    Each of `runs` is a stage's output folder or a folder of some. Order is by descent (`init_from`), else by
    start. Where a folder holds several arms that start from one stage, the longest is taken, then the one
    whose folders are called as their stages; name the stages of the other to get that. ValueError, naming it,
    for one of `runs` that holds no stage's log."""
    chosen: dict[Path, StageLog] = {}
    left_out: dict[Path, str] = {}
    for run in runs:
        folder = Path(run)
        if (folder / LOG_NAME).is_file():
            stages = [_read(folder)]
            if not stages[0].log.steps:
                raise ValueError(f"RUN must hold a log of at least one training step, got none in {run!r}")
        elif folder.is_dir():
            found = [_read(path.parent) for path in sorted(folder.glob(f"*/{LOG_NAME}"))]
            left_out |= {stage.folder: "no step yet" for stage in found if not stage.log.steps}
            found = [stage for stage in found if stage.log.steps]
            stages = _main_arm(found)
            arm = "of another arm; name its stages to draw it"
            left_out |= {stage.folder: arm for stage in found if stage not in stages}
        else:
            stages = []
        if not stages:
            raise ValueError(
                f"RUN must be a stage's output folder (with a {LOG_NAME}) or a folder of some, got {run!r}"
            )
        chosen |= {stage.folder.resolve(): stage for stage in stages}
    return _in_order(list(chosen.values())), left_out


def _read(folder: Path) -> StageLog:
    path = folder / LOG_NAME
    try:
        log = read_log(path)
    except OSError as error:
        raise ValueError(f"RUN must be readable, got {str(path)!r}: {error.strerror}") from error
    log.steps = [line for line in log.steps if isinstance(line.get("loss", ""), (int, float, type(None)))]
    started = next((event["time"] for event in log.events if event["event"] == "start"), "")
    config: Any = None
    with contextlib.suppress(OSError, ValueError):  # the log alone can be drawn
        config = json.loads((folder / "config.json").read_text())
    config = config if isinstance(config, dict) else {}
    name = str(config.get("stage") or (log.steps or [{}])[-1].get("stage") or folder.resolve().name)
    init_from = config.get("init_from")
    return StageLog(folder, name, log, init_from if isinstance(init_from, str) else None, str(started))


def _parent(stage: StageLog, stages: Sequence[StageLog]) -> StageLog | None:
    """Which of `stages` it started from. Runs are moved: a folder's name is enough if it is one stage's."""
    if stage.init_from is None:
        return None
    start = Path(stage.init_from).resolve()
    others = [other for other in stages if other is not stage]
    for same in (
        [other for other in others if start in (other.folder.resolve(), other.folder.resolve() / "model")],
        [other for other in others if other.folder.resolve().name == start.name],
    ):
        if len(same) == 1:
            return same[0]
    return None


def _descent(stage: StageLog, stages: Sequence[StageLog]) -> list[StageLog]:
    """From the first ancestor to `stage`."""
    line = [stage]
    while (parent := _parent(line[0], stages)) is not None and parent not in line:
        line.insert(0, parent)
    return line


def _main_arm(stages: list[StageLog]) -> list[StageLog]:
    parents = [_parent(stage, stages) for stage in stages]
    branches = collections.Counter(id(parent) for parent in parents if parent is not None)
    if not stages or all(count == 1 for count in branches.values()):
        return stages

    def rank(line: list[StageLog]) -> tuple[int, int, str]:
        named_as_stage = sum(stage.folder.name.upper() == stage.name.upper() for stage in line)
        return len(line), named_as_stage, line[-1].started

    return max((_descent(stage, stages) for stage in stages), key=rank)


def _in_order(stages: list[StageLog]) -> list[StageLog]:
    def rank(stage: StageLog) -> tuple[int, str, int, float]:
        name = stage.name.upper()
        known = STAGE_ORDER.index(name) if name in STAGE_ORDER else len(STAGE_ORDER)
        written = (stage.folder / LOG_NAME).stat().st_mtime
        return len(_descent(stage, stages)), stage.started, known, written

    return sorted(stages, key=rank)

"""The two arms after CPT, windows and one small view: DRA and IFT of each in a process of its own.

One model of this size does not fill two cores: two processes of half the threads each, side by side, finish
sooner than one after the other with all of them, and see the same machine, so that their seconds compare.

    python -m train.demo.arms ARM OUTPUT SCALE PRECISION     (what `train_side_by_side` starts)"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from train.engine import run

from .stages import demo_stages, stage_config

ARMS = ("windows", "one_view")
SHARED_STAGES, ARM_STAGES = ("PT", "CPT"), ("DRA", "IFT")
POLL_SECONDS = 0.5
SHOWN_LOG_LINES = 15


@dataclasses.dataclass(frozen=True, slots=True)
class StageResult:
    losses: list[float]
    """Of every step."""
    seconds: float


def train_stages(
    names: tuple[str, ...],
    output: Path,
    *,
    init_from: Path,
    scale: float,
    precision: str,
    arm: str = "windows",
) -> dict[str, StageResult]:
    """Runs stages one after the other, each from the one before; folders of the other arm carry its name."""
    stages, results = demo_stages(), {}
    for name in names:
        folder = output / (name if arm == ARMS[0] else f"{name}_{arm}")
        config = stage_config(
            name,
            stages[name],
            init_from=init_from,
            output_dir=folder,
            precision=precision,
            scale=scale,
            one_view=arm == "one_view",
        )
        result = run(config)
        results[name] = StageResult(result.losses, result.seconds)
        init_from = folder
    return results


def train_side_by_side(output: Path, *, scale: float, precision: str) -> dict[str, dict[str, StageResult]]:
    """Both arms from the end of CPT, {arm: {stage: result}}; RuntimeError with the log's end if one fails."""
    threads = max(1, torch.get_num_threads() // len(ARMS))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    processes, logs = {}, {arm: output / f"{arm}.log" for arm in ARMS}
    print(f"{', '.join(ARM_STAGES)} of both arms side by side, {threads} thread(s) each; logs in {output}")
    try:
        for arm in ARMS:
            with logs[arm].open("w") as log:
                processes[arm] = subprocess.Popen(
                    [sys.executable, "-m", "train.demo.arms", arm, str(output), str(scale), precision],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
        shown = ""
        while any(process.poll() is None for process in processes.values()):
            for arm, process in processes.items():
                if process.poll():
                    _fail(arm, logs[arm])
            shown = _show_progress(logs, shown)
            time.sleep(POLL_SECONDS)
        for arm, process in processes.items():
            if process.returncode:
                _fail(arm, logs[arm])
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
                process.wait()
    return {arm: _read_result(output, arm) for arm in ARMS}


def _show_progress(logs: dict[str, Path], shown: str) -> str:
    """Prints the arms' latest lines when one is new; returns what was printed last."""
    latest = "   |   ".join(f"{arm}: {_last_lines(log, 1)}" for arm, log in logs.items())
    if latest != shown:
        print(latest, flush=True)
    return latest


def _fail(arm: str, log: Path) -> None:
    raise RuntimeError(f"the arm {arm!r} stopped; the end of {log}:\n{_last_lines(log, SHOWN_LOG_LINES)}")


def _last_lines(path: Path, count: int) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])


def _read_result(output: Path, arm: str) -> dict[str, StageResult]:
    values = json.loads((output / f"{arm}.json").read_text())
    return {name: StageResult(**result) for name, result in values.items()}


def main(arm: str, folder: str, scale: str, precision: str) -> int:
    output = Path(folder)
    results = train_stages(
        ARM_STAGES, output, init_from=output / "CPT", scale=float(scale), precision=precision, arm=arm
    )
    values = {name: dataclasses.asdict(result) for name, result in results.items()}
    (output / f"{arm}.json").write_text(json.dumps(values) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

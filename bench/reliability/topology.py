"""Runs that go on over another number of ranks or at another ZeRO stage keep weights and optimizer states."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch

from train.stage import Stage

from . import faults
from .faults import AFTER, BEFORE, Call
from .mixed import farthest
from .room import STEPS, Room, tidy
from .runs import Layout, Outcome, Run

KIND = "topology"
_RELATIVE = {"fp32": 1e-5, "bf16": 2e-2}  # other ranks round other sums, in bf16 to 8 bits
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SAVING, _LOADING = faults.BY_NAME["saving a checkpoint"], faults.BY_NAME["loading a checkpoint"]
_READING = faults.BY_NAME["reading a step"]
_MOVING = faults.Point("moving a checkpoint", "train.reshape", "load")
_TENSORS = faults.Point("reading a tensor file", "torch", "load")
_SLOW_S = 0.01
"""What the last rank needs more to read a tensor file, as if its disk were farther away."""


def _path(*places: tuple[int, int], precision: str = "fp32") -> tuple[Layout, ...]:
    return tuple(Layout(*place, precision) for place in places)


PATHS = (
    # of ranks and ZeRO stages; the first one needs no conversion by DeepSpeed
    _path((2, 0), (1, 2)),
    _path((2, 2), (1, 2), (2, 2)),
    _path((2, 3), (1, 3), (2, 3)),
    _path((1, 2), (1, 3), (1, 2)),
    _path((2, 2), (2, 3), (2, 2)),
    _path((1, 0), (2, 2), (1, 0)),
    _path((2, 1), (1, 3), (2, 0)),
    _path((2, 2), (1, 3), precision="bf16"),
)


def cases(room: Room) -> Iterator[int]:
    yield from range(1 if room.quick else len(PATHS))


def attempt(room: Room, case: int) -> Outcome:
    """Stops a run by SIGTERM, goes on elsewhere, twice, the first time after a kill on the way; compares
    states around every change."""
    path = PATHS[case]
    outcome = Outcome(KIND, case, " -> ".join(map(str, path)))
    folder = room.new_folder(KIND, case)
    overrides = room.material | {"parallel__max_micro_batch_size": 1}
    still = Run("IFT", path[0], folder / "still", overrides)
    ended = still.start()
    outcome.wrong += [] if ended.good else [f"left alone it must end well, got {ended}"]
    for number, layout in enumerate(path):
        run = Run("IFT", layout, folder / "moving", overrides)
        last = number == len(path) - 1
        if number == 1:
            _kill_in_between(run, room.draw(KIND, f"{case} kill").randrange(layout.world_size), outcome)
        stop = None if last else room.draw(KIND, f"{case} {number}").randint(1, STEPS // len(path))
        ended = run.start(_watching(folder, number, stop, run.output_dir))
        outcome.counts["hangs"] += ended.hung
        expected = [0 if last else 128 + signal.SIGTERM] * layout.world_size
        if ended.hung or ended.codes != expected:
            outcome.wrong.append(f"part {number + 1} must end with {expected}, got {ended}")
            break
        if number:
            outcome.counts["reshapes"] += 1
            outcome.wrong += _changed(folder, number, layout)
    else:
        losses = [
            json.loads((run.output_dir / "finished.json").read_text())["losses"] for run in (run, still)
        ]
        apart = farthest(*(tuple(float(loss).hex() for loss in of_run) for of_run in losses))
        limit = _RELATIVE[path[0].precision]
        if not apart <= limit:
            outcome.wrong.append(f"losses must be within {limit} of the run that stayed, got {apart}")
    outcome.counts["reshape_mismatches"] += bool(outcome.wrong)
    return tidy(folder, outcome)


def _kill_in_between(run: Run, rank: int, outcome: Outcome) -> None:
    """A start that is killed when the checkpoint is converted and read, its scratch files still there."""

    def prepare(of_rank: int) -> None:
        if of_rank == rank:
            faults.watch(_MOVING, run.output_dir, 1, AFTER, faults.kill_self)

    ended = run.start(prepare, grace_s=0.1)
    outcome.counts["hangs"] += ended.hung
    if ended.codes[rank] == -signal.SIGKILL and not ended.hung:
        outcome.counts["kills"] += 1
        outcome.points.append(_MOVING.name)
    else:
        outcome.wrong.append(f"rank {rank} must be killed while it moves a checkpoint, got {ended}")


def _watching(folder: Path, number: int, stop: int | None, output_dir: Path) -> faults.Callable:
    """Writes the state at every loading and saving; asks the last rank to stop at its `stop`-th step."""

    def prepare(rank: int) -> None:
        for point, name in ((_LOADING, "loaded"), (_SAVING, "saved")):
            path = folder / f"{name}-{number}.json"

            def write(call: Call, path: Path = path) -> None:
                digests = state_digests(call.arguments[0])
                if rank == 0:
                    path.write_text(json.dumps(digests))

            faults.watch(point, output_dir, None, AFTER, write)
        if rank != int(os.environ.get("WORLD_SIZE", "1")) - 1:
            return
        faults.watch(_TENSORS, output_dir, None, BEFORE, lambda call: time.sleep(_SLOW_S))
        if stop is not None:
            faults.watch(
                _READING, output_dir, stop, BEFORE, lambda call: os.kill(os.getpid(), signal.SIGTERM)
            )

    return prepare


def state_digests(stage: Stage) -> dict[str, list[str]]:
    """SHA-256 of each trained parameter's fp32 weight and two moments, whole; every rank calls it.

    Under "updates" the number of AdamW's steps."""
    optimizer = stage.optimizer
    zero_stage = stage.config.parallel.zero_stage
    if zero_stage in (1, 2):
        # DeepSpeed links its views of the moments after the first group's step, before the others have any
        stage.engine.optimizer._hp_optimizer_states_linked = False
        stage.engine.optimizer._lazy_init_hp_params_optimizer_state()
    counts = {int(slot["step"]) for slot in optimizer.state.values() if "step" in slot}
    digests = {"updates": [str(count) for count in sorted(counts)]}
    for name, parameter in stage.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if zero_stage == 0:
            tensors = [parameter.detach(), *(optimizer.state[parameter][key] for key in _MOMENTS)]
        else:
            tensors = [deepspeed.utils.safe_get_full_fp32_param(parameter)]
            tensors += [deepspeed.utils.safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS]
        digests[name] = [_digest(tensor) for tensor in tensors]
    return digests


def _digest(tensor: torch.Tensor) -> str:
    values = tensor.float().flatten() + 0.0  # no negative zeros: a sum over ranks has none
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def _changed(folder: Path, number: int, layout: Layout) -> list[str]:
    saved, loaded = (
        json.loads((folder / f"{name}-{of}.json").read_text())
        for name, of in (("saved", number - 1), ("loaded", number))
    )
    if saved.keys() != loaded.keys():
        return [f"trained parameters on {layout}: {sorted(saved.keys() ^ loaded.keys())} are not in both"]
    names = ("fp32 weight", *_MOMENTS)
    return [
        f"{name}: {[what for what, a, b in zip(names, saved[name], loaded[name], strict=False) if a != b]} "
        f"changed on the way to {layout}"
        for name in saved
        if saved[name] != loaded[name]
    ]

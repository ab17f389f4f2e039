"""Named points of a run at which it can be killed: patches in the forked rank, nothing in the trainer.

A point is a function that the trainer calls. Its n-th call ends before it begins, behind its end, or in the
middle, with half of its work on the disk."""

import collections
import dataclasses
import functools
import importlib
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEFORE, HALF, AFTER = "before", "half of", "after"


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of a point's function."""

    inner: Callable
    arguments: tuple
    keywords: dict[str, Any]
    output_dir: Path

    def go_on(self) -> Any:
        return self.inner(*self.arguments, **self.keywords)


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    name: str
    owner: str
    """Module, or module:class."""
    attribute: str
    half: Callable[[Call], None] | None = None
    """Leaves the disk as the call does in its middle."""
    takes: Callable[[Call], bool] | None = None
    """Which calls count; None: all."""

    @property
    def moments(self) -> tuple[str, ...]:
        return (BEFORE, AFTER) if self.half is None else (BEFORE, HALF, AFTER)


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """What happens at the `number`-th call (from 1) of the point `name`, at `moment`, in rank `rank`."""

    name: str
    moment: str
    number: int
    rank: int

    def __str__(self) -> str:
        return f"{self.moment} call {self.number} of {self.name} on rank {self.rank}"


def _half_save(call: Call) -> None:
    value, target = call.arguments[:2]
    whole = io.BytesIO()
    call.inner(value, whole, **call.keywords)
    half = whole.getvalue()[: len(whole.getvalue()) // 2]
    if hasattr(target, "write"):
        target.write(half)
        target.flush()
    else:
        Path(target).write_bytes(half)


def _half_text(call: Call) -> None:
    path, text = call.arguments
    path.with_name(f".{path.name}.unfinished").write_text(text[: len(text) // 2])


def _half_removal(call: Call) -> None:
    paths = [path for path in Path(call.arguments[0]).rglob("*") if path.is_file()]
    for path in sorted(paths)[::2]:
        path.unlink()


def _half_line(call: Call) -> None:
    call.go_on()
    log = call.output_dir / "log.jsonl"
    if log.exists():
        text = log.read_bytes()
        last = text.rstrip(b"\n").rpartition(b"\n")[2]
        os.truncate(log, len(text) - (len(last) + 1) // 2)


def _half_export(call: Call) -> None:
    call.go_on()
    files = [path for path in Path(call.arguments[1]).iterdir() if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def _writes(name: str) -> Callable[[Call], bool]:
    return lambda call: Path(call.arguments[0]).name == name


def _goes_to(what: str, suffix: str = "") -> Callable[[Call], bool]:
    def takes(call: Call) -> bool:
        name = Path(call.arguments[1]).name
        return name.startswith(what) and name.endswith(suffix)

    return takes


def _exists(call: Call) -> bool:
    return Path(call.arguments[0]).exists()


_TEXT, _RENAME = ("train.files", "write_text", _half_text), ("os", "rename", None)
POINTS = (
    Point("start of a rank", "train.distributed", "start"),
    Point("check of the output folder", "train.output", "check_output_dir"),
    *(
        Point(f"writing {name}", *_TEXT, _writes(name))
        for name in ("config.json", "deepspeed.json", "trainer.json", "manifest.json", "finished.json")
    ),
    Point("building the model", "train.build", "prepare_model"),
    Point("search for a checkpoint", "train.checkpoint:Checkpoints", "newest"),
    Point("check of a checkpoint", "train.checkpoint", "verify"),
    Point("start of DeepSpeed", "deepspeed", "initialize"),
    Point("loading a checkpoint", "train.stage:Stage", "load"),
    Point("DeepSpeed's loading", "deepspeed:DeepSpeedEngine", "load_checkpoint"),
    Point("reading a step", "train.batch:StepReader", "__call__"),
    Point("agreeing on a step", "train.stage:Stage", "_agree"),
    Point("sum over the ranks", "torch.distributed", "all_reduce"),
    Point("forward", "model:InfiMMHD", "forward"),
    Point("backward", "deepspeed:DeepSpeedEngine", "backward"),
    Point("DeepSpeed's step", "deepspeed:DeepSpeedEngine", "step"),
    Point("AdamW's step", "torch.optim:AdamW", "step"),
    Point("line of the log", "train.watch.progress:Progress", "step", _half_line),
    Point("event in the log", "train.watch.progress:Progress", "event", _half_line),
    Point("cutting the log", "train.watch.log:RunLog", "_cut"),
    Point("syncing the log", "train.watch.log:RunLog", "sync"),
    Point("saving a checkpoint", "train.stage:Stage", "save"),
    Point("DeepSpeed's saving", "deepspeed:DeepSpeedEngine", "save_checkpoint"),
    Point("making room", "train.checkpoint", "_make_room"),
    Point("writing a tensor file", "torch", "save", _half_save),
    Point("writing the generators", "train.checkpoint", "write_generators"),
    Point("syncing a file", "train.files", "sync"),
    Point("hashing a file", "train.files", "sha256"),
    Point("renaming a text", "os", "replace"),
    Point("renaming a checkpoint", *_RENAME, _goes_to("step-")),
    Point("retiring a checkpoint", *_RENAME, _goes_to(".step-", ".retired")),
    Point("removing a folder", "shutil", "rmtree", _half_removal, _exists),
    Point("exporting the model", "model:InfiMMHD", "save_pretrained", _half_export),
    Point("retiring the old export", *_RENAME, _goes_to(".model", ".old")),
    Point("renaming the export", *_RENAME, _goes_to("model")),
    Point("end of DeepSpeed", "deepspeed:DeepSpeedEngine", "destroy"),
)
BY_NAME = {point.name: point for point in POINTS}


def kill_self(call: Call) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arming(fault: Fault, output_dir: Path, act: Callable[[Call], None] = kill_self) -> Callable[[int], None]:
    """For `Run.start`: lets `act(call)` happen at the fault, in its rank."""

    def prepare(rank: int) -> None:
        if rank == fault.rank:
            watch(BY_NAME[fault.name], output_dir, fault.number, fault.moment, act)

    return prepare


def watch(
    point: Point, output_dir: Path, number: int | None, moment: str, act: Callable[[Call], None]
) -> None:
    """Patches the point's function: `act(call)` at the moment of its `number`-th call (None: of each), which
    then goes on."""
    calls = 0

    def replace(call: Call) -> Any:
        nonlocal calls
        if point.takes is not None and not point.takes(call):
            return call.go_on()
        calls += 1
        if number not in (None, calls):
            return call.go_on()
        if moment == HALF:
            point.half(call)
        if moment in (BEFORE, HALF):
            act(call)
        value = call.go_on()
        if moment == AFTER:
            act(call)
        return value

    _patch(point, output_dir, replace)


def count_into(path: Path, output_dir: Path) -> Callable[[], None]:
    """In a rank: counts the calls of every point; what it returns writes them to `path`."""
    counts: collections.Counter[str] = collections.Counter()

    def counting(point: Point) -> Callable[[Call], Any]:
        def replace(call: Call) -> Any:
            counts[point.name] += point.takes is None or point.takes(call)
            return call.go_on()

        return replace

    for point in POINTS:
        _patch(point, output_dir, counting(point))
    return lambda: path.write_text(json.dumps(counts))


def _patch(point: Point, output_dir: Path, replace: Callable[[Call], Any]) -> None:
    module, _, name = point.owner.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, name) if name else owner
    inner = getattr(owner, point.attribute)

    @functools.wraps(inner)
    def patched(*arguments: Any, **keywords: Any) -> Any:
        return replace(Call(inner, arguments, keywords, output_dir))

    setattr(owner, point.attribute, patched)

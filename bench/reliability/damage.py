"""Checkpoints that something has damaged are never loaded: the one before is."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from train import distributed
from train.checkpoint import MANIFEST, Checkpoints
from train.config import CheckpointConfig

from . import faults, forking
from .faults import BEFORE, Fault
from .room import Room, tidy
from .runs import Layout, Outcome, Run

KIND = "damage"
LAYOUTS = (Layout(1, 2), Layout(2, 3), Layout(1, 0), Layout(2, 2, "bf16"))
_PER_CASE, _PER_QUICK_CASE = 30, 12
_ENDS = 2
"""Damaged runs of a case that are trained to the end."""
_BROKEN_MANIFESTS = (
    *(b"", b"{", b"null", b"[]", b"{}", b"3", b'{"files": []}', b'{"files": null}', b'{"files": {}}'),
    *(b"\xff\xfe", b"[" * 100_000, b'{"files": {"trainer.json": {"bytes": "many", "sha256": 1}}}'),
)

Draw = random.Random


def _some_file(folder: Path, draw: Draw) -> Path:
    return draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def _truncate(folder: Path, older: Path, draw: Draw) -> None:
    path = _some_file(folder, draw)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def _flip_bit(folder: Path, older: Path, draw: Draw) -> None:
    path = _some_file(folder, draw)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _empty(folder: Path, older: Path, draw: Draw) -> None:
    _some_file(folder, draw).write_bytes(b"")


def _zero_block(folder: Path, older: Path, draw: Draw) -> None:
    path = _some_file(folder, draw)
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def _append(folder: Path, older: Path, draw: Draw) -> None:
    with _some_file(folder, draw).open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, 5000)))


def _delete(folder: Path, older: Path, draw: Draw) -> None:
    _some_file(folder, draw).unlink()


def _add(folder: Path, older: Path, draw: Draw) -> None:
    place = draw.choice([folder, *(path for path in sorted(folder.rglob("*")) if path.is_dir())])
    (place / f"{draw.randrange(10**6)}.pt").write_bytes(draw.randbytes(draw.randrange(100)))


def _swap(folder: Path, older: Path, draw: Draw) -> None:
    one, other = _some_file(folder, draw), _some_file(folder, draw)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _take_file_of_older(folder: Path, older: Path, draw: Draw) -> None:
    path = _some_file(folder, draw)
    shutil.copyfile(older / path.relative_to(folder), path)


def _take_manifest_of_older(folder: Path, older: Path, draw: Draw) -> None:
    shutil.copyfile(older / MANIFEST, folder / MANIFEST)


def _take_all_of_older(folder: Path, older: Path, draw: Draw) -> None:
    shutil.rmtree(folder)
    shutil.copytree(older, folder)


def _break_manifest(folder: Path, older: Path, draw: Draw) -> None:
    (folder / MANIFEST).write_bytes(draw.choice(_BROKEN_MANIFESTS))


def _drop_folder(folder: Path, older: Path, draw: Draw) -> None:
    shutil.rmtree(draw.choice([path for path in sorted(folder.rglob("*")) if path.is_dir()]))


def _keep_some_files(folder: Path, older: Path, draw: Draw) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in draw.sample(files, draw.randint(1, len(files))):
        path.unlink()


def _folder_in_place_of_file(folder: Path, older: Path, draw: Draw) -> None:
    path = _some_file(folder, draw)
    path.unlink()
    path.mkdir()


def _file_in_place_of_folder(folder: Path, older: Path, draw: Draw) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(draw.randbytes(draw.randrange(100)))


DAMAGES: dict[str, Callable[[Path, Path, Draw], None]] = {
    damage.__name__.strip("_").replace("_", " "): damage
    for damage in (
        *(_truncate, _flip_bit, _empty, _zero_block, _append, _delete, _add, _swap, _take_file_of_older),
        *(_take_manifest_of_older, _take_all_of_older, _break_manifest, _drop_folder, _keep_some_files),
        *(_folder_in_place_of_file, _file_in_place_of_folder),
    )
}


def damage(folder: Path, older: Path, draw: Draw) -> str:
    """Damages the checkpoint in `folder` so that it is another one than before; the name of the damage."""
    before, spare = _content(folder), folder.with_name("spare")
    shutil.copytree(folder, spare)
    try:
        while True:
            name = draw.choice(list(DAMAGES))
            with contextlib.suppress(ValueError):  # an empty file has no byte to damage
                DAMAGES[name](folder, older, draw)
            if _content(folder) != before:
                return name
            shutil.rmtree(folder)
            shutil.copytree(spare, folder)
    finally:
        shutil.rmtree(spare)


def _content(folder: Path) -> object:
    """Equal for checkpoints that are equally good: all bytes, but for white space in the manifest."""
    if not folder.is_dir():
        return None
    found: dict[str, object] = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    with contextlib.suppress(ValueError, KeyError, RecursionError):
        found[MANIFEST] = json.loads(found[MANIFEST])
    return found


def cases(room: Room) -> Iterator[int]:
    yield from range(1 if room.quick else len(LAYOUTS))


def attempt(room: Room, case: int) -> Outcome:
    """Damages the checkpoints of a stopped run, again and again, and looks which one is found."""
    layout = room.layouts[-1] if room.quick else LAYOUTS[case]
    recipe = room.recipes[0]
    reference = room.reference(layout, recipe)
    outcome = Outcome(KIND, case, f"{recipe} on {layout}")
    folder = room.new_folder(KIND, case)
    stopped = Run(recipe, layout, folder / "stopped", reference.overrides | {"checkpoint__keep_last": 3})
    fault = Fault("exporting the model", BEFORE, 1, 0)
    stopped.start(faults.arming(fault, stopped.output_dir), grace_s=0.1)
    number = _PER_QUICK_CASE if room.quick else _PER_CASE
    found = _search(room, case, layout, stopped.output_dir / "checkpoints", folder, number)
    for entry in found:
        outcome.counts["damaged_checkpoints"] += entry["damaged"]
        outcome.counts["damaged_loaded"] += not entry["right"]
        if not entry["right"]:
            outcome.wrong.append(f"damage {entry['number']} ({entry['names']}): got {entry['got']}")
    for end in range(1 if room.quick else _ENDS):
        _to_the_end(room, case, end, stopped, outcome, reference.record)
    return tidy(folder, outcome)


def _search(
    room: Room, case: int, layout: Layout, checkpoints: Path, folder: Path, number: int
) -> list[dict]:
    def body(rank: int) -> int:
        ranks = distributed.start()
        place, entries = folder / "checkpoints", []
        for i in range(number):
            draw = room.draw(KIND, f"{case} {i}")
            names = ranks.on_first(lambda draw=draw: _damaged_copy(checkpoints, place, draw))
            kept = (
                []
                if len(names) == 3
                else [sorted(path.name for path in checkpoints.iterdir())[2 - len(names)]]
            )
            try:
                newest = Checkpoints(place, CheckpointConfig(), ranks).newest()
                got = str(newest and newest.name)
                right = [got] == kept and _content(newest) == _content(checkpoints / got)
            except Exception as error:  # whatever it is, it has to be the one below
                got = f"{type(error).__name__}: {error}"
                right = not kept and "must find an undamaged checkpoint, got 3 damaged ones" in got
            entries.append({"number": i, "names": names, "got": got, "right": right, "damaged": len(names)})
            ranks.barrier()
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(entries))
        distributed.stop()
        return 0

    ended = forking.run_ranks(body, layout.world_size, folder / "said")
    if not ended.good:
        raise RuntimeError(f"the search for checkpoints must end, got {ended}")
    return json.loads((folder / "found.json").read_text())


def _damaged_copy(checkpoints: Path, place: Path, draw: Draw) -> list[str]:
    """Copies three checkpoints and damages the newest one, the two newest or, seldom, all three."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(checkpoints, place)
    names = sorted(path.name for path in place.iterdir())
    number = draw.choices((1, 2, 3), (8, 3, 1))[0]
    older = checkpoints / names[0] if number < 3 else checkpoints / names[1]
    return [
        damage(place / name, checkpoints / names[1] if name == names[0] else older, draw)
        for name in names[::-1][:number]
    ]


def _to_the_end(room: Room, case: int, end: int, stopped: Run, outcome: Outcome, expected: object) -> None:
    run = Run(stopped.recipe, stopped.layout, stopped.folder.with_name(f"end-{end}"), stopped.overrides)
    shutil.copytree(stopped.folder, run.folder)
    names = sorted(path.name for path in (run.output_dir / "checkpoints").iterdir())
    newest, older = (run.output_dir / "checkpoints" / name for name in names[:0:-1])
    kind = damage(newest, older, room.draw(KIND, f"{case} end {end}"))
    wrong = len(outcome.wrong)
    run.finish(outcome, expected)
    outcome.counts["damaged_checkpoints"] += 1
    if len(outcome.wrong) > wrong:
        outcome.counts["damaged_loaded"] += 1
        outcome.wrong.append(f"that was end {end}, {kind}")

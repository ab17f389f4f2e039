"""Checkpoints on the disk: whole or absent, damage seen, old ones removed."""

import json
import re
import shutil
import types
from pathlib import Path

import pytest
import torch

from train import checkpoint, distributed
from train.checkpoint import Checkpoints
from train.config import CheckpointConfig


@pytest.fixture(scope="module")
def ranks():
    return distributed.start()


@pytest.fixture
def made(tmp_path, ranks):
    """`made(*steps, **config)`: the checkpoints of a run that saved at these steps."""

    def make(*steps: int, **config: object) -> Checkpoints:
        checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(**config), ranks)
        for step in steps:
            checkpoints.save(step, 0, lambda folder, step=step: write(folder, step))
        return checkpoints

    def write(folder: Path, step: int) -> None:
        (folder / "state").mkdir()
        torch.save({"weight": torch.full((100,), float(step))}, folder / "state" / "part.pt")
        checkpoint.write_generators(folder, ranks)
        checkpoint.write_trainer(folder, {"step": step}, [0.5] * step, [1.0] * step)

    return make


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_newest_is_found(made):
    checkpoints = made(2, 10, 4)
    assert checkpoints.newest().name == "step-00000010"
    assert checkpoint.read_history(checkpoints.newest()) == ([0.5] * 10, [1.0] * 10)
    assert made().newest() is not None
    checkpoints.clear()
    assert checkpoints.newest() is None


def test_retention_keeps_the_last_and_every_nth(made):
    checkpoints = made(*range(1, 11), keep_last=2, keep_every_steps=4)
    assert names(checkpoints) == [f"step-{step:08d}" for step in (4, 8, 9, 10)]


@pytest.mark.parametrize(("every", "due"), [(3, [3, 6, 7]), (None, [7])])
def test_when_one_is_due(made, every, due):
    checkpoints = made(every_steps=every)
    assert [step for step in range(1, 8) if checkpoints.is_due(step, 7)] == due


def flip_a_bit(folder: Path) -> None:
    path = folder / "state" / "part.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(folder: Path) -> None:
    path = folder / "state" / "part.pt"
    path.write_bytes(path.read_bytes()[:-1])


def other_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000001"), folder)


DAMAGES = {
    "flip": (flip_a_bit, "state/part.pt must have the SHA-256 of manifest.json, got another"),
    "cut": (cut, "state/part.pt must have "),
    "lost": (
        lambda folder: (folder / "state" / "part.pt").unlink(),
        r"\['state/part.pt'\] missing and \[\] more",
    ),
    "more": (lambda folder: (folder / "more.pt").touch(), r"\[\] missing and \['more.pt'\] more"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json must be readable"),
    "torn manifest": (lambda folder: (folder / "manifest.json").write_text('{"files"'), "must be readable"),
    "other manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"files": [3]}'),
        "must be readable",
    ),
    "state of another step": (other_step, "trainer.json must be of its folder's step"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(made, capsys, damage):
    checkpoints = made(1, 2, 3, keep_last=3)
    hurt, message = DAMAGES[damage]
    hurt(checkpoints.folder / "step-00000003")
    assert checkpoints.newest().name == "step-00000002"
    said = capsys.readouterr().err
    assert "step-00000003' is damaged" in said and re.search(message, said), said
    assert names(checkpoints) == ["damaged-step-00000003", "step-00000001", "step-00000002"]


def test_only_damaged_ones_stop_the_run(made):
    """Beginning anew without a word would throw the run away; also at the second attempt."""
    checkpoints = made(1, 2)
    for step in (1, 2):
        cut(checkpoints.folder / f"step-{step:08d}")
    for _ in range(2):
        with pytest.raises(ValueError, match="must find an undamaged checkpoint, got 2 damaged ones in"):
            checkpoints.newest()
    checkpoints.clear()
    assert checkpoints.newest() is None


def test_what_a_kill_left_is_removed(made):
    checkpoints = made(1)
    for name in (".step-00000002.unfinished", ".step-00000000.retired", ".step-00000001.universal"):
        shutil.copytree(checkpoints.folder / "step-00000001", checkpoints.folder / name)
    assert checkpoints.newest().name == "step-00000001"
    assert names(checkpoints) == ["step-00000001"]


def test_a_full_disk_is_an_error_and_the_old_one_stays(made, monkeypatch):
    checkpoints = made(1)
    before = (checkpoints.folder / "step-00000001" / "manifest.json").read_bytes()

    def no_space(folder: Path) -> None:
        (folder / "part").write_bytes(b"half")
        raise RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: No space left")

    with pytest.raises(
        OSError, match="step-00000002' could not be written, step-00000001 is whole: .*No space"
    ):
        checkpoints.save(2, 0, no_space)
    assert names(checkpoints) == ["step-00000001"]
    assert checkpoints.newest().name == "step-00000001"
    usage = types.SimpleNamespace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="the disk must have room for 5,000 bytes, got 1,000"):
        checkpoints.save(2, 5_000, no_space)
    assert (checkpoints.folder / "step-00000001" / "manifest.json").read_bytes() == before


def test_a_step_saved_twice_is_replaced(made):
    checkpoints = made(3, 3)
    assert names(checkpoints) == ["step-00000003"]
    manifest = json.loads((checkpoints.newest() / "manifest.json").read_text())["files"]
    assert sorted(manifest) == ["history.pt", "rng-00000.pt", "state/part.pt", "trainer.json"]

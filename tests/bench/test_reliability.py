"""bench.reliability: its quick cases pass, and a bug planted into the trainer is found by the kind that has
to find it."""

import dataclasses
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.reliability import damage, faults, mixed
from bench.reliability.__main__ import COUNTS, main
from bench.reliability.faults import AFTER, BEFORE, Fault
from bench.reliability.runs import Record

ROOT = Path(__file__).parents[2]
DRIVER = """
import json, os, sys
from bench.reliability import forking
from bench.reliability.__main__ import main
forking.import_all()
for words in json.loads(sys.argv[1]):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = main(words)
        sys.stdout.flush()
        os._exit(code)
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
RECORD = Record(
    losses=("0x1p+0", "0x1p-1"),
    grad_norms=("0x1p+0", "0x1p-1"),
    samples_seen=8,
    skipped="{}",
    num_truncated=0,
    weights="12",
    log=("a", "b"),
    skipped_log=(),
)


def reliability(folder: Path, *commands: list[str]) -> list[tuple[int, dict]]:
    """Exit code and document of each command line. They run in forks of one new process, in which a planted
    bug stays: the process of the tests has threads and a process group."""
    files = [folder / f"{number}.json" for number in range(len(commands))]
    words = [[*command, "--output", str(file)] for command, file in zip(commands, files, strict=True)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0 and all(file.exists() for file in files), done.stdout + done.stderr
    codes = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("exit code")]
    return [(code, json.loads(file.read_text())) for code, file in zip(codes, files, strict=True)]


def test_the_quick_cases_pass(tmp_path):
    ((code, document),) = reliability(tmp_path, ["--quick", "--kills", "3"])
    assert code == 0 and document["wrong"] == [], document["wrong"]
    assert set(COUNTS) <= document.keys()
    for least, name in (
        *((3, "kills"), (8, "mixed_steps"), (12, "damaged_checkpoints"), (1, "reshapes")),
        *((2, "sigterms"), (1, "disk_full"), (200, "fuzzed_samples")),
    ):
        assert document[name] >= least, name
    for name in ("mismatches", "lost_silently", "hangs", "damaged_loaded", "reshape_mismatches"):
        assert document[name] == 0, name
    assert sum(document["kill_points"].values()) == document["kills"]


@pytest.mark.long
def test_planted_bugs_are_found(tmp_path):
    names = {
        "shifted_data": (["kills"], "mismatches"),
        "lost_moments": (["kills"], "mismatches"),
        "unchecked": (["damage"], "damaged_loaded"),
        "waits_without_images": (["mixed", "--limit", "8"], "hangs"),
        "deaf": (["stops"], "mismatches"),
    }
    commands = [["--quick", "--plant", name, "--only", *words] for name, (words, _) in names.items()]
    found = reliability(tmp_path, *commands)
    for (name, (words, count)), (code, document) in zip(names.items(), found, strict=True):
        assert code == 1 and document[count] > 0, (name, document)
        assert f"again: python -m bench.reliability --only {words[0]} --case " in document["wrong"][0]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("losses", ("0x1p+0", "0x1.1p-1"), "losses: 2 entries, number 2 ('0x1.1p-1',) in place of"),
        ("grad_norms", ("0x1p+0",), "grad_norms: 1 entries, number 2 () in place of 2 entries"),
        ("samples_seen", 7, "samples_seen: 7 in place of 8"),
        ("skipped", '{"spike": 1}', 'skipped: {"spike": 1} in place of {}'),
        ("num_truncated", 1, "num_truncated: 1 in place of 0"),
        ("weights", "13", "weights: 13 in place of 12"),
        ("log", ("a", "b", "b"), "log: 3 entries, number 3 ('b',) in place of 2 entries, number 3 ()"),
        ("skipped_log", ("torn",), "skipped_log: 1 entries"),
    ],
)
def test_every_difference_of_two_runs_is_told(field, value, said):
    assert RECORD.differences(RECORD) == []
    (line,) = dataclasses.replace(RECORD, **{field: value}).differences(RECORD)
    assert line.startswith(said)


def write_checkpoint(folder: Path, step: int) -> None:
    (folder / "state").mkdir(parents=True)
    for name, size in (("a.pt", 300), ("state/b.pt", 9000), ("state/c.pt", 9000)):
        (folder / name).write_bytes(random.Random(f"{name} {step}").randbytes(size))
    entries = {str(path.relative_to(folder)): {} for path in folder.rglob("*.pt")}
    (folder / "manifest.json").write_text(json.dumps({"files": entries, "step": step}))


def test_every_kind_of_damage_leaves_another_checkpoint(tmp_path):
    older, pristine, folder = tmp_path / "step-1", tmp_path / "step-2", tmp_path / "copy"
    write_checkpoint(older, 1)
    write_checkpoint(pristine, 2)
    kinds = set()
    for seed in range(200):
        shutil.copytree(pristine, folder)
        kinds.add(damage.damage(folder, older, random.Random(seed)))
        assert damage._content(folder) != damage._content(pristine)
        shutil.rmtree(folder, ignore_errors=True)
        folder.unlink(missing_ok=True)
    assert kinds == set(damage.DAMAGES)


def test_white_space_of_a_manifest_is_no_damage(tmp_path):
    write_checkpoint(tmp_path / "one", 1)
    write_checkpoint(tmp_path / "other", 1)
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=3))
    assert damage._content(tmp_path / "one") == damage._content(tmp_path / "other")


def test_mixed_samples_have_ranks_of_every_kind():
    found = mixed.samples(random.Random(3), 500)
    shares = [found[i : i + 4] for i in range(0, len(found), 4)]
    assert len(shares) == 1000
    assert {number for number in found if number is not None} == set(range(9))
    assert sum(set(share) == {None} for share in shares) > 50
    assert sum(set(share) <= {0, None} and share != [None] * 4 for share in shares) > 50
    assert any(found[i : i + 8] == [None] * 8 for i in range(0, len(found), 8))


def test_distance_of_losses():
    one, half, near = (value.hex() for value in (1.0, 0.5, 0.5 * (1 + 1e-6)))
    assert mixed.farthest((one, "none"), (one, "none")) == 0
    assert mixed.farthest((one, near), (one, half)) == pytest.approx(1e-6)
    for losses in ((one,), (one, "none"), ("none", half)):
        assert mixed.farthest(losses, (one, half)) == float("inf")


@pytest.mark.parametrize("moment", [BEFORE, AFTER])
def test_a_fault_comes_at_its_call_in_its_rank(tmp_path, monkeypatch, moment):
    folders, seen = [tmp_path / "a", tmp_path / "b", tmp_path / "c"], []
    monkeypatch.setattr("train.files.sync", train_sync := (lambda path: seen.append(path.name)))
    fault = Fault("syncing a file", moment, 2, 1)
    prepare = faults.arming(fault, tmp_path, lambda call: seen.append(f"fault at {call.arguments[0].name}"))
    prepare(0)
    assert importlib.import_module("train.files").sync is train_sync
    prepare(1)
    for folder in folders:
        importlib.import_module("train.files").sync(folder)
    order = ["fault at b", "b"] if moment == BEFORE else ["b", "fault at b"]
    assert seen == ["a", *order, "c"]


@pytest.mark.parametrize("point", faults.POINTS, ids=lambda point: point.name)
def test_every_point_is_a_function_of_the_trainer(point):
    module, _, name = point.owner.partition(":")
    owner = importlib.import_module(module)
    assert callable(getattr(getattr(owner, name) if name else owner, point.attribute))


def test_a_case_needs_its_kind(capsys):
    assert main(["--case", "3"]) == 2
    assert "--case must come with --only, got none" in capsys.readouterr().err

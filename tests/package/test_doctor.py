"""``python -m infimm_kernels``."""

import json
import subprocess
import sys

import torch

import infimm_kernels
from infimm_kernels import __main__ as doctor
from infimm_kernels import backends
from tests.package import building


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "infimm_kernels", *arguments],
        cwd=building.ROOT,
        env=building.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_text():
    printed = run()
    assert f"infimm_kernels  {infimm_kernels.__version__}" in printed
    assert f"torch           {torch.__version__}" in printed
    assert "never run on a GPU" in printed
    lines = printed.splitlines()
    for row in backends.availability():
        words = [row.op, row.backend, row.direction, row.reason or "ok"]
        assert any(
            line.split()[:3] == words[:3] and words[3] in line and row.note in line for line in lines
        ), row


def test_json_says_the_same(capsys):
    found = json.loads(run("--json"))
    assert list(found) == ["versions", "gpus", "backends", "notes"]
    assert {row["op"] for row in found["backends"]} >= {"varlen_attention", "add_position_2d"}
    assert {row["backend"] for row in found["backends"]} == set(backends.NAMES)
    assert all(row["reason"] is None for row in found["backends"] if row["backend"] == "reference")
    doctor.main([])
    assert capsys.readouterr().out == doctor.as_text(found) + "\n"


def test_gpus_are_listed():
    found = {
        "versions": {},
        "gpus": [{"name": "Some GPU", "compute capability": "9.0"}],
        "backends": [],
        "notes": [],
    }
    assert "GPU             Some GPU, compute capability 9.0" in doctor.as_text(found)
    assert "GPU             none" in doctor.as_text({**found, "gpus": []})

"""The static ledger as a command, and that it catches a kernel that was made worse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import ledger
from bench.static import compare
from bench.static import compile as aot
from bench.static.kernels import KERNELS
from bench.static.rows import Ledger, ledger_of, measure_configs
from bench.static.work import ATTENTION
from tests.bench.test_ledger_compare import DEFAULTS

ROOT = Path(__file__).parents[2]
ALWAYS = {
    "kernel": str,
    "backend": str,
    "pass": str,
    "arch": str,
    "default": bool,
    "head_dim": int,
    "seqlen": int,
    "useful_over_issued": float,
    "registers": int,
    "spills": int,
    "spills_in_loop": int,
    "shared_memory": int,
    "triton": str,
    "ptxas": str,
}


# Long both: tests/kernels/test_aot.py compiles the default ones in the short run.
@pytest.fixture(scope="module", params=[pytest.param(p, marks=pytest.mark.long) for p in ("default", "all")])
def run(request):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.ledger", "--json", *["--default"] * (request.param == "default")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # as everything else in the tests has it
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_nothing_is_worse_than_stored(run):
    assert run.returncode == 0, run.stderr


def test_stdout_is_one_list_of_complete_rows(run):
    rows = json.loads(run.stdout)
    for row in rows:
        assert None not in row.values(), row
        for name, kind in ALWAYS.items():
            assert isinstance(row[name], str if row[name] == "not read" else kind), (name, row)
        assert row["backend"] in ("triton", "cuda") and row["pass"] in ("fwd", "bwd"), row
        assert 0 < row["useful_over_issued"] <= 1.001, row
    rivals = {row["rival"] for row in rows if "rival" in row}
    assert rivals == {
        "FlashAttention-2",
        "FlashAttention-3",
        "FlashAttention-4",
        "xformers",
        "FlexAttention",
    }
    ours = [row for row in rows if "rival" not in row]
    for direction in ("fwd", "bwd"):
        for arch in ("sm_80", "sm_90"):
            defaults = [r for r in ours if r["default"] and (r["pass"], r["arch"]) == (direction, arch)]
            assert {(1025, 112), (257, 112), (1024, 64)} <= {(r["seqlen"], r["head_dim"]) for r in defaults}
    assert len({compare.key(row) for row in ours}) == len(ours)
    assert all("bytes_ratio" in row for row in ours if row["backend"] == "triton" and _is_decode(row))
    if "--default" in run.args:
        assert {row["default"] for row in ours} == {True}
        return
    without_nvcc = {"add_position_2d_kernel"} if aot.find_nvcc() is None else set()
    assert {row["kernel"] for row in ours} == {*KERNELS, *ATTENTION} - without_nvcc
    elementwise = {name for name, kernel in KERNELS.items() if kernel.elements}
    assert elementwise == {row["kernel"] for row in ours if "instructions_per_element" in row}


def _is_decode(row: dict) -> bool:
    return row["kernel"] == "decode_attention_kernel"


def loud() -> str | None:
    os.write(1, b"the program of a compiler that failed")
    return os.environ.get("TRITON_INTERPRET")


def test_compilers_neither_interpret_nor_write_to_stdout(capfd, monkeypatch):
    """Triton printed MLIR to stdout when a kernel did not compile, in front of the JSON."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.in_processes(loud, [()]) == [None]
    assert capfd.readouterr() == ("", "the program of a compiler that failed")


def default_forward() -> "list[aot.AotConfig]":
    """The default forward of ViT-E's heads on sm_80: 64 + 32 + 16 channels, tiles of 128 queries, 8 warps."""
    return [
        config
        for config in aot.shipped("infimm_kernels.attention.triton_launch")
        if config.kernel.__name__ == "attention_forward_kernel"
        and (config.head_dim, config.dtype, config.capability) == (112, "bf16", (8, 0))
        and config.default
        and config.constexprs["NUM_PREFIX"] == 1
        and config.constexprs["EVEN_K"]
    ][:1]


def measured_forward(sabotage: str) -> list:
    (config,) = default_forward()
    changed = {
        "nothing": config,
        "padded": config._replace(constexprs=config.constexprs | {"PIECES": (128,)}),
        "fewer warps": config._replace(num_warps=config.num_warps // 2),
        "one stage": config._replace(num_stages=1),
        "too many stages": config._replace(num_stages=config.num_stages + 8),
    }
    return measure_configs([changed[sabotage]])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("sabotage", "sentence"),
    [
        ("nothing", None),
        ("padded", "useful_over_issued fell from"),
        ("fewer warps", "spills_in_loop rose from 0"),
        ("one stage", "the loops no longer copy asynchronously"),
        ("too many stages", "shared_memory is .* bytes, the limit is"),
    ],
)
def test_a_sabotaged_configuration_is_found(sabotage, sentence):
    pytest.importorskip("triton")
    stored, changed = aot.in_processes(measured_forward, [("nothing",), (sabotage,)])
    before, after = ledger_of(stored), ledger_of(changed)
    assert before.rows and not before.findings
    limits = [f for f in compare.beyond_limits(after.rows) if "no default attention row" not in f]
    findings = after.findings + limits + compare.worse(after.rows, before.rows)
    if sentence is None:
        assert not findings
    else:
        assert any(re.search(sentence, finding) for finding in findings), findings


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """A ledger of one row per gate, and a folder of its own for the stored one."""
    rows = [dict(row) for row in DEFAULTS]
    monkeypatch.setattr(ledger, "STORED", tmp_path / "ledger.json")
    monkeypatch.setattr(ledger, "collect", lambda: Ledger(rows, [], []))
    return rows


def test_write_then_check(stored, capsys):
    assert ledger.main(["--check"]) == 1
    assert "ledger.json does not exist" in capsys.readouterr().err
    assert ledger.main(["--write", "--check"]) == 0
    assert ledger.main(["--check"]) == 0
    assert capsys.readouterr() == ("", "")
    stored[0] |= {"wgmma_waits": 99}
    assert ledger.main(["--check"]) == 1
    assert "wgmma_waits rose from 2 to 99" in capsys.readouterr().err


def test_the_table_shows_ours_and_the_rivals(stored, capsys):
    assert ledger.main(["--write"]) == 0
    out = capsys.readouterr().out
    assert "attention_forward head_dim=112" in out and "FlashAttention-3" in out


def test_another_triton_is_said_and_only_the_ratio_is_held(stored, capsys):
    ledger.main(["--write", "--check"])
    for row in stored:
        row |= {"triton": "9.9", "wgmma_waits": 99}
    assert ledger.main(["--json"]) == 0
    captured = capsys.readouterr()
    assert "now Triton 9.9" in captured.err
    assert json.loads(captured.out)[0]["triton"] == "9.9"


def test_rows_of_cuda_kernels_are_held_only_where_nvcc_is(stored, monkeypatch, capsys):
    """A remark about anything else once made the command forget the stored CUDA rows."""
    cuda = stored[0] | {"backend": "cuda", "default": False, "gated": False}
    monkeypatch.setattr(ledger, "collect", lambda: Ledger([*stored, cuda], [], ["sm_100: a remark"]))
    monkeypatch.setattr(ledger, "find_nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    assert ledger.main(["--write", "--check"]) == 0
    assert ledger.main(["--check"]) == 0
    monkeypatch.setattr(ledger, "collect", lambda: Ledger(stored, [], []))
    assert ledger.main(["--check"]) == 1
    assert "is in the stored ledger and no longer shipped" in capsys.readouterr().err
    monkeypatch.setattr(ledger, "find_nvcc", lambda: None)
    assert ledger.main(["--check"]) == 0


def test_what_does_not_compile_fails(stored, monkeypatch, capsys):
    ledger.main(["--write", "--check"])
    monkeypatch.setattr(ledger, "collect", lambda: Ledger(stored, ["x does not compile: why"], ["no nvcc"]))
    assert ledger.main(["--check"]) == 1
    assert capsys.readouterr().err == "no nvcc\nx does not compile: why\n"

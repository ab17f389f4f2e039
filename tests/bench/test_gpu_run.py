"""`python -m bench.gpu` from one end to the other, on the CPU, and the steps before its measurements."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, hopper, plan, results, steps, wgmma_rate
from bench.harness import PROBLEMS
from bench.problem import OURS
from bench.report import by_case
from bench.static import compile

ROOT = Path(__file__).parent.parent.parent
GATED_BLOCK = (
    "decode",
    "prefill",
    "vision_keys_values",
    "gated",
    "feed_forward",
    "post_norm",
    "position",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_quick_run_on_the_cpu(tmp_path):
    path = tmp_path / "out.json"
    before = sorted((ROOT / "bench").rglob("*.json"))
    done = run("--device", "cpu", "--quick", "--output", str(path))
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "bench").rglob("*.json")) == before
    text = path.read_text()
    assert socket.gethostname() not in text and str(ROOT) not in text and str(tmp_path) not in text
    document = json.loads(text)
    assert document["finished"] and document["header"]["gpu"].startswith("none (")
    cases = by_case(document["entries"])
    assert len(cases) == len(plan.quick_plan())
    for case in cases:
        ours = case.get(OURS, case.get("torch"))
        expected = "missing" if ours["metric"] == "memory" else "ok"
        assert ours["status"] == expected, ours
        for entry in case.values():
            assert entry["status"] == "ok" or entry["reason"], entry
        if ours["op"] in ("window_attention", "varlen_attention") and ours["metric"] == "time":
            assert {"flash_attn_2", "flash_attn_3", "flash_attn_4", "sdpa_cudnn", "eager"} <= case.keys()
            assert ours["tflops"] > 0
    assert "main: window_attention fwd 2 windows of 17" in done.stdout


def test_a_spent_budget_still_leaves_a_whole_file(tmp_path):
    path = tmp_path / "out.json"
    assert run("--device", "cpu", "--quick", "--output", str(path), BUDGET_S="0.001").returncode == 0
    document = json.loads(path.read_text())
    assert {entry["status"] for entry in document["entries"]} == {"budget"}
    assert len(document["entries"]) == len(plan.quick_plan())
    assert document["header"]["budget_s"] == 0.001


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--device", "cpu", "--quick"], {}, "--quick needs --output"),
        (
            ["--device", "cpu", "--quick", "--output", "x"],
            {"BUDGET_S": "-1"},
            "BUDGET_S must be a positive number of seconds, got '-1'",
        ),
    ],
)
def test_wrong_calls_end_with_one_line(arguments, environment, message):
    done = run(*arguments, **environment)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_full_plan_is_sound():
    cases = plan.full_plan()
    keys = {json.dumps(case.entry("x", "ok"), sort_keys=True) for case in cases}
    assert len(keys) == len(cases)
    assert {case.op for case in cases} == set(PROBLEMS)
    sizes = {case.shape["num_windows"] for case in cases if case.section in ("windows", "main")}
    assert sizes == {1, 2, 5, 10, 20, 40, 80, 160}
    seqlens = {case.shape["seqlen"] for case in cases if case.section in ("seqlen", "main")}
    assert seqlens == {257, 577, 1025, 2305}
    head_dims = {case.shape["head_dim"] for case in cases if case.section in ("head_dim", "main")}
    assert head_dims == {64, 80, 88, 112, 128}
    sections = list(dict.fromkeys(case.section for case in cases))
    assert sections[:6] == ["host", "ceilings", "main", "decode", "prefill", "vision_keys_values"]


def test_the_full_plan_covers_the_gated_block():
    found = {}
    for case in plan.full_plan():
        if case.metric == "time":
            found.setdefault(case.op, []).append((case.shape, case.backward))

    def values(op: str, *keys: str) -> set[tuple]:
        return {(*(shape[key] for key in keys), backward) for shape, backward in found[op]}

    texts, images, passes = (32, 128, 384, 1024, 2048), (1, 5, 10), (False, True)
    assert values("gated_cross_attention", "text_len", "num_windows") == {
        *itertools.product(texts, images, passes)
    }
    assert values("gated_cross_attention_decode", "batch", "num_windows") == {
        *itertools.product((1, 8, 64), images, (False,))
    }
    assert values("gated_residual_projection", "hidden", "inner", "rows") == {
        *itertools.product((5120,), (768, 5120), (*texts, 8192), passes)
    }
    assert values("vision_keys_values", "num_windows", "seqlen", "num_layers") >= {
        *itertools.product((10,), (1025,), (10,), passes)
    }
    assert values("gated_feed_forward", "hidden", "inner") == {(5120, 5120, False), (5120, 5120, True)}
    assert values("residual_post_norm", "hidden") == {(1792, False), (1792, True)}
    assert values("add_position_2d", "granularity", "in_place") == {
        *itertools.product(("window", "token"), (False, True), (False,))
    }


def test_torch_compile_stands_beside_the_first_case_of_a_section():
    compiled = [case for case in plan.full_plan() if case.compiled and case.section in GATED_BLOCK]
    assert len(compiled) == len({(case.section, case.backward) for case in compiled}) == 12
    assert {case.section for case in compiled} == set(GATED_BLOCK)
    (decode,) = (case for case in compiled if case.section == "decode")
    assert (decode.shape["batch"], decode.shape["num_windows"]) == (8, 10)


def test_the_quick_plan_has_a_case_of_every_kind():
    def kinds(cases):
        return {
            (case.section, case.op, case.backward, case.shape.get("in_place"), case.shape.get("granularity"))
            for case in cases
            if case.section not in ("host", "head_dim", "float16", "cross")
        }

    few = {k for k in kinds(plan.full_plan()) if k[1] != "vision_keys_values"}
    assert few <= kinds(plan.quick_plan())
    assert {case.op for case in plan.quick_plan()} == set(PROBLEMS)


def test_the_tests_of_a_run_are_counted_even_when_one_takes_pytest_down(tmp_path):
    path = tmp_path / "test_sample.py"
    path.write_text(
        "import os, pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2, 'arithmetic'\n"
        "@pytest.mark.skip(reason='not today')\n"
        "def test_c(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no fixture')\n"
        "def test_d(broken): pass\n"
        "def test_e(): os.abort()\n"
        "def test_f(): pass\n"
    )
    found = steps.run_tests([str(path)], 60.0)
    assert (found["status"], found["passed"], found["failed"], found["skipped"]) == ("failed", 1, 3, 1)
    messages = {failure["test"].split("::")[1]: failure["message"] for failure in found["failures"]}
    assert messages.keys() == {"test_b", "test_d", "test_e"}
    assert "arithmetic" in messages["test_b"] and "no fixture" in messages["test_d"]
    assert messages["test_e"] == "pytest ended in this test"
    assert any("not today" in reason for reason in found["skip_reasons"])
    (tmp_path / "test_unimportable.py").write_text("import no_such_module\n")
    found = steps.run_tests(["--continue-on-collection-errors", "-k", "test_a", str(tmp_path)], 60.0)
    assert (found["passed"], found["failed"]) == (1, 1)
    assert "no_such_module" in found["failures"][0]["message"]
    path.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    found = steps.run_tests([str(path)], 6.0)
    assert (found["status"], found["passed"], found["failed"]) == ("budget", 1, 1)


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        (None, "missing", "no compute-sanitizer on PATH"),
        ("exit 0", "ok", None),
        ("echo Invalid __shared__ read; exit 9", "failed", "exit code 9: Invalid __shared__ read"),
    ],
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_is_run_and_read(monkeypatch, tmp_path, tool, script, status, reason):
    if script is not None:
        program = tmp_path / "compute-sanitizer"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n{script}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = steps.run_sanitizer(tool, 20)
    assert (found["status"], found["reason"]) == (status, reason)
    if script is not None:
        said = (tmp_path / "arguments").read_text()
        assert f"--tool {tool} --error-exitcode 9 " in said and said.endswith("-m bench.hopper\n")


def test_hopper_checks_are_recorded(monkeypatch, tmp_path, capsys):
    ok = {"status": "ok", "reason": None, "seconds": 1.0}
    monkeypatch.setattr(steps, "run_sanitizer", lambda tool, limit: ok | {"tool": tool})
    monkeypatch.setattr(steps, "run_wgmma_rate", lambda limit: ok | {"rows": [{"n": 112}]})
    writer = results.Writer([tmp_path / "out.json"], {})
    gpu.check_hopper(writer, 10)
    document = json.loads((tmp_path / "out.json").read_text())
    assert {tool: each["tool"] for tool, each in document["sanitizer"].items()} == {
        "memcheck": "memcheck",
        "racecheck": "racecheck",
    }
    assert document["wgmma_rate"]["rows"] == [{"n": 112}]
    assert capsys.readouterr().out.count("ok") == 3


def test_the_rate_of_wgmma_compiles(tmp_path):
    if compile.find_nvcc() is None:
        pytest.skip("no nvcc")
    sass = subprocess.run(
        [compile_cuobjdump(), "-sass", wgmma_rate.build(tmp_path, compile.find_nvcc())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {n for n in (64, 112, 128) if f"HGMMA.64x{n}x16" in sass} == {64, 112, 128}


def compile_cuobjdump():
    triton = pytest.importorskip("triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def test_without_a_gpu_the_hopper_check_says_so(capsys):
    if not torch.cuda.is_available():
        assert hopper.main() == 2
        assert capsys.readouterr().err == "no CUDA device is visible\n"


def test_a_failed_build_says_why():
    found = steps.build_extension("everything", 60.0)
    assert found["status"] == "failed" and "INFIMM_CUDA_ARCHS must be" in found["reason"]


def test_archs():
    assert [steps.archs_of(c) for c in ((8, 0), (9, 0), (10, 0))] == ["80", "90a", "100"]


def test_a_ledger_that_fails_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("")
    ledger = tmp_path / "bench" / "ledger.py"
    ledger.write_text("import sys\nprint('[{\"kernel\": \"k\"}]')\nsys.exit('k got worse')\n")
    found = steps.run_ledger(60.0)
    assert found["rows"] == [{"kernel": "k"}] and found["status"] == "failed"
    assert "k got worse" in found["reason"]
    ledger.write_text("print('no json')\n")
    found = steps.run_ledger(60.0)
    assert (found["status"], found["rows"]) == ("failed", []) and "no JSON" in found["reason"]
    ledger.write_text("print('[]')\n")
    assert steps.run_ledger(60.0)["status"] == "ok"

"""`python -m bench.gpu` from one end to the other, on the CPU, and the steps before its measurements."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench import plan, steps
from bench.harness import PROBLEMS
from bench.problem import OURS
from bench.report import by_case

ROOT = Path(__file__).parent.parent.parent


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
    assert sections[:3] == ["host", "ceilings", "main"]


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

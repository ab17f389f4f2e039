"""bench.encoder: its command, its rivals, that a wrong result gets no number, and its place in `make gpu`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model.vision
from bench import encoder, gpu, report, steps
from tests.bench import synthetic

ROOT = Path(__file__).parents[2]
TINY = {"blocks": 2, "window_size": 8, "patch_size": 2, "width": 32, "heads": 2, "mlp": 48}


def options(*more: str, **changes) -> list[str]:
    values = {**TINY, "threads": 1, "repeats": 2, "device": "cpu", **changes}
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, *more]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measured(*more: str, **changes) -> dict:
    said = []
    return encoder.measure(encoder.parse(options(*more, **changes)), said.append)


def test_json_is_one_document_with_its_provenance():
    chosen = ["--modes", "eager", "--dtypes", "fp32", "bf16"]
    command = [sys.executable, "-m", "bench.encoder", "--json", *chosen, *options()]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["shape"] == TINY and found["threads"] == 1 and found["torch"] == torch.__version__
    assert found["command"].startswith("python -m bench.encoder --json") and not found["recomputed_backward"]
    assert found.keys() >= {"gpu", "cpu", "date", "commit", "repeats"}
    rows = [row for row in found["rows"] if row["rival"] == "plain"]
    cases = {(row["compiled"], row["dtype"], row["windows"], row["pass"]) for row in rows}
    assert cases == {(False, dtype, 1, which) for dtype in ("fp32", "bf16") for which in encoder.PASSES}
    assert len(rows) == len(cases)
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["theirs_ms"] / row["ours_ms"], rel=0.02)
        assert 0 < row["ours_ms_shortest"] <= row["ours_ms"] and row["theirs_ms_shortest"] > 0
        assert row["our_error"] < (1e-5 if row["dtype"] == "fp32" else 0.05)
    assert found["min_ratio"] == min(row["ratio"] for row in found["rows"])
    rivals = {row["rival"] for row in found["rows"]} | {each["rival"] for each in found["missing"]}
    assert rivals == {"plain", "timm"}
    assert str(ROOT) not in done.stdout and "fp32 1 windows eager forward: plain" in done.stderr


def test_a_cpu_measures_what_it_has_time_for():
    """bf16 at full size takes a CPU an hour."""
    found = encoder.parse(["--device", "cpu"])
    assert (found.dtypes, found.windows, found.blocks, found.repeats) == (["fp32"], [1], 4, 3)


def test_compiled_blocks_and_several_numbers_of_windows(monkeypatch, threads):
    torch._dynamo.reset()
    compile_module = torch.nn.Module.compile  # without Inductor, which takes long
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend="aot_eager", **how)
    )
    found = measured("--modes", "compiled", "--dtypes", "fp32", "--windows", "1", "3", "--passes", "forward")
    cases = [(row["compiled"], row["windows"]) for row in found["rows"] if row["rival"] == "plain"]
    assert cases == [(True, 1), (True, 3)]


def test_a_compiled_encoder_has_the_same_weights_and_leaves_the_eager_one_alone():
    config = encoder.VisionConfig(
        window_size=8, patch_size=2, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48
    )
    eager, _ = encoder.encoders(config, torch.float32, torch.device("cpu"))
    for each in eager:
        compiled = each.compiled()
        pairs = zip(each.module.parameters(), compiled.module.parameters(), strict=True)
        assert all(a is b for a, b in pairs)
        states = [
            block._compiled_call_impl is None for block in (*each.module.blocks, *compiled.module.blocks)
        ]
        half = len(states) // 2
        assert states == [True] * half + [False] * half
    ours, plain = (each.module for each in eager[:2])
    weights = ours.blocks[0].mlp_in.weight, plain.blocks[0].fc1.weight
    assert weights[0].data_ptr() == weights[1].data_ptr()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("which", encoder.PASSES)
def test_a_wrong_result_gets_no_number(monkeypatch, capsys, threads, dtype, which):
    right = model.vision._add_normed

    class Wrong(torch.autograd.Function):
        """Right forward, a gradient that is off by a tenth."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.1

    def wrong(*arguments):
        out = right(*arguments)
        return out * 1.1 if which == "forward" else Wrong.apply(out)

    monkeypatch.setattr(model.vision, "_add_normed", wrong)
    more = "--json", "--dtypes", dtype, "--modes", "eager", "--passes", which
    with pytest.raises(AssertionError, match=f"^{which}: .* of ours is off by .*, allowed "):
        encoder.main(options(*more))
    assert capsys.readouterr().out == ""


def test_many_windows_are_checked_by_the_first(threads):
    """Their features and, with no gradient from the others, the weights' gradients are theirs alone."""
    found = measured("--modes", "eager", "--windows", "4")
    assert {row["windows"] for row in found["rows"]} == {4} and found["min_ratio"] > 0


def test_what_cannot_be_had_is_named(monkeypatch, threads):
    def absent(vit):
        raise ModuleNotFoundError("No module named 'timm'")

    monkeypatch.setattr(encoder, "timm_vit_like", absent)
    found = measured("--dtypes", "fp32", "--modes", "eager", "--passes", "forward")
    (missing,) = found["missing"]
    assert missing == {
        "rival": "timm",
        "reason": "ModuleNotFoundError: No module named 'timm'",
        "dtype": "fp32",
    }
    found = measured("--dtypes", "fp32", "--modes", "eager", budget_s=0)
    assert found["rows"] == [] and found["min_ratio"] is None
    late = [each for each in found["missing"] if each["rival"] == "all"]
    assert [each["pass"] for each in late] == list(encoder.PASSES)
    assert {each["reason"] for each in late} == {"the time was over"}


def test_memory_that_does_not_suffice_is_recorded(monkeypatch, threads):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encoder, "check", full)
    found = measured("--dtypes", "fp32", "--modes", "eager", "--passes", "forward")
    assert found["rows"] == []
    assert {"rival": "all", "reason": "out of memory"}.items() <= found["missing"][-1].items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"blocks": 0}, "--blocks must be at least 1, got 0"),
        ({"windows": 0}, "--windows must be at least 1, got 0"),
        ({"window_size": 9}, "--window-size must be a multiple of 2, got 9"),
        ({"width": 30, "heads": 3}, "--width must be a multiple of 4, got 30"),
        ({"dtypes": "fp8"}, "invalid choice: 'fp8'"),
    ],
)
def test_wrong_options_end_with_one_line(capsys, changes, message):
    with pytest.raises(SystemExit, match="2"):
        encoder.main(options(**changes))
    assert message in capsys.readouterr().err


def test_the_step_of_a_gpu_run_keeps_the_report_or_the_reason(monkeypatch):
    """The command itself is run above."""
    said = {"status": "ok", "reason": None, "seconds": 1.0}
    printed = {"rows": [{"rival": "plain"}], "missing": [], "min_ratio": 1.5, "torch": "2"}
    called = []

    def run(command, environment, limit_s, keep_output):
        called.append((command[1:], limit_s, keep_output))
        return {**said, "output": json.dumps(printed) if said["status"] == "ok" else ""}

    monkeypatch.setattr(steps, "_run", run)
    assert steps.run_encoder(100.0, "--repeats", "3") == {
        **said,
        **{k: printed[k] for k in list(printed)[:3]},
    }
    command = ["-m", "bench.encoder", "--json", "--budget-s", "70", "--repeats", "3"]
    assert called == [(command, 100.0, True)]
    nothing = {"rows": None, "missing": None, "min_ratio": None}
    for status, reason in (("failed", "exit code 2: --blocks"), ("budget", "not over after 100 s")):
        said |= {"status": status, "reason": reason}
        assert steps.run_encoder(100.0) == {**said, **nothing}


def test_a_gpu_run_measures_the_encoder_between_its_tests_and_its_cases(monkeypatch, tmp_path):
    order = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    ok = {"status": "ok", "reason": None, "min_ratio": 1.2}
    names = ("build_extension", "run_tests", "run_ledger", "run_sanitizer", "run_wgmma_rate", "run_encoder")
    for name in names:

        def step(*arguments, name=name):
            order.append((name, *arguments))
            return dict(ok)

        monkeypatch.setattr(steps, name, step)
    writer = gpu.results.Writer([tmp_path / "out.json"], {})
    gpu.prepare(writer, torch.device("cuda"), 540.0)
    assert [name for name, *_ in order[-4:-1]] == ["run_sanitizer", "run_sanitizer", "run_wgmma_rate"]
    assert order[-1] == ("run_encoder", gpu.ENCODER_SHARE * 540, "--device", "cuda", "--repeats", "3")
    assert writer.document["encoder"] == ok


def test_the_report_shows_the_encoder(tmp_path):
    found = report.load(synthetic.write(tmp_path / "out.json", sections=("ceilings",)))
    row = {"rival": "plain", "compiled": True, "dtype": "bf16", "windows": 10, "pass": "forward"}
    row |= {"ours_ms": 100.0, "theirs_ms": 125.0, "ratio": 1.25}
    missing = [{"rival": "timm", "reason": "not here", "dtype": dtype} for dtype in ("bf16", "fp32")]
    found["encoder"] = {"status": "ok", "reason": None, "rows": [row], "missing": missing, "min_ratio": 1.25}
    page = report.page(found, {})
    assert "| plain | compiled | bf16 | 10 | forward | 100.0 ms | 125.0 ms | 1.25x |" in page
    assert page.count("- timm: not here") == 1
    found["encoder"] = {"status": "failed", "reason": "no GPU", "rows": None, "missing": None}
    assert "failed: no GPU" in report.page(found, {})

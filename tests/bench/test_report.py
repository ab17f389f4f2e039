"""Tables and pictures come out of result files, and README.md's block out of the command."""

import json

import pytest
from matplotlib import image

from bench import plan, plots, report, results
from bench.harness import Case
from tests.bench import synthetic

GATED_BLOCK = (
    "decode",
    "prefill",
    "vision_keys_values",
    "gated",
    "feed_forward",
    "post_norm",
    "position",
)

LEDGER_ROWS = [
    {
        "kernel": "attention_forward",
        "pass": "fwd",
        "arch": "sm_80",
        "default": True,
        "useful_over_issued": 0.981,
    },
    {
        "kernel": "attention_forward",
        "pass": "fwd",
        "arch": "sm_90",
        "default": True,
        "useful_over_issued": 0.877,
    },
    {
        "kernel": "attention_forward",
        "pass": "fwd",
        "arch": "sm_100",
        "default": True,
        "useful_over_issued": 0.5,
    },
    {
        "kernel": "attention_backward_prepare",
        "pass": "bwd",
        "arch": "sm_80",
        "default": True,
        "useful_over_issued": 0.957,
        "mma": "none",
    },
    {"kernel": "old_forward", "pass": "fwd", "arch": "sm_80", "default": False, "useful_over_issued": 0.6},
    {
        "kernel": "attention_backward",
        "pass": "bwd",
        "arch": "sm_80",
        "default": True,
        "useful_over_issued": 0.957,
    },
    {
        "kernel": "window_attention_kernel",
        "backend": "cuda",
        "pass": "fwd",
        "arch": "sm_90",
        "default": False,
        "useful_over_issued": 0.999,
        "ptxas": "13.0",
    },
    {
        "rival": "FlashAttention-2",
        "pass": "fwd",
        "arch": "sm_80",
        "default": True,
        "useful_over_issued": 0.733,
    },
    {
        "rival": "FlashAttention-3",
        "pass": "fwd",
        "arch": "sm_90",
        "default": True,
        "useful_over_issued": 0.756,
    },
]
COMMON = {
    "backend": "triton",
    "head_dim": 112,
    "seqlen": 1025,
    "registers": 200,
    "spills": 0,
    "spills_in_loop": 0,
}
COMMON |= {"mma": "HMMA.16816 x112", "shared_memory": 65536, "triton": "3.7.1", "ptxas": "12.9"}


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "ledger.json"
    other = {"kernel": "gated", "pass": "fwd", "arch": "sm_80", "default": True, "useful_over_issued": 1.0}
    rows = [{"kernel": "", **COMMON, **row} for row in LEDGER_ROWS]
    path.write_text(json.dumps([*rows, {**COMMON, **other, "head_dim": 768, "seqlen": 0}]))
    return path


BEGIN, END = "<!-- kernels -->", "<!-- /kernels -->"


def rows_of(text: str) -> list[list[str]]:
    return [
        [c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


def test_page_and_pictures(tmp_path, capsys):
    path = synthetic.write(tmp_path / "test.json")
    assert report.main([str(path), "--output", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "test.md")
    text = (tmp_path / "report" / "test.md").read_text()
    header, _, first = rows_of(text)[:3]
    assert header == [
        "op",
        "shape",
        "pass",
        "ours",
        "of ceiling",
        "sdpa_flash",
        "sdpa_cudnn",
        "sdpa_efficient",
        *header[8:],
    ]
    row = dict(zip(header, first, strict=True))
    assert row["shape"] == "40 windows of 1025, 16 heads of 112" and row["pass"] == "fwd"
    entries = results.load(path)["entries"]
    of = {e["implementation"]: e for e in entries if e["section"] == "main"}
    ours, flash = (of[name]["median_us"] for name in ("infimm_kernels", "sdpa_flash"))
    speed = next(e["tflops"] for e in entries if e["section"] == "main")
    assert row["of ceiling"] == f"{100 * speed / 785.0:.0f} %"
    assert row["sdpa_flash"] == f"{flash / ours:.2f}x" == "1.33x" and row["sdpa_cudnn"] == "wrong"
    assert "sdpa_cudnn wrong: dk errs by 0.9" in text and "xformers missing: xformers.ops" in text
    assert "NVIDIA Test 1000 (compute capability 9.0), driver 999.1, torch 2.11.0" in text
    assert "matrix product (size 8192, bfloat16) 1400 us, 785 TFLOP/s" in text and "cut short" not in text
    for name in ("windows", "seqlen", "memory"):
        assert f"(test-{name}.png)" in text
        picture = image.imread(tmp_path / "report" / f"test-{name}.png")
        assert picture.shape[0] > 300 and picture.shape[1] > 600 and picture[..., :3].std() > 0.02


def test_a_share_is_that_of_the_nearer_ceiling():
    case = Case("gated", "gated_residual_projection", {"rows": 32, "hidden": 64, "inner": 64})
    limits = {"tflops": 800.0, "gbps": 4000.0}
    assert report.share_label(case.entry("a", "ok", tflops=80.0, gbps=3000.0), limits) == "75 %"
    assert report.share_label(case.entry("a", "ok", tflops=720.0, gbps=3000.0), limits) == "90 %"
    assert report.share_label(case.entry("a", "ok", tflops=720.0), {"gbps": 4000.0}) == "-"
    assert report.share_label(case.entry("a", "wrong", "errs"), limits) == "-"
    assert report.share_label(None, limits) == "-"


def test_the_gated_block_is_on_the_page_and_its_first_cases_in_the_readme(tmp_path):
    path = synthetic.write(tmp_path / "test.json", sections=("ceilings", "main", *GATED_BLOCK))
    text, block = report.page(results.load(path), {}), report.readme_block(tmp_path, report.LEDGER)
    planned = [case for case in plan.full_plan() if case.section in GATED_BLOCK]
    for section in GATED_BLOCK:
        title = report.SECTIONS[section]
        assert f"## {title}\n" in text and f"\n{title}:\n" in block
    first = next(case for case in planned if case.section == "decode")
    assert first.shape["batch"] == 8 and first.shape["num_windows"] == 10
    lines = [line for line in block.splitlines() if line.startswith("| gated_cross_attention_decode ")]
    assert len(lines) == report.IN_README["decode"] and "batch 8" in lines[0]
    pages = [line for line in text.splitlines() if line.startswith("| gated_cross_attention_decode ")]
    assert len(pages) == sum(case.section == "decode" for case in planned)
    header = next(line for line in block.splitlines() if "recompute" in line)
    assert header.index("sdpa_cached") < header.index("recompute") < header.index("compiled_eager")


def test_every_section_of_the_plan_has_a_title():
    sections = {case.section for case in plan.full_plan()} - {"ceilings"}
    assert sections == set(report.SECTIONS) and set(report.IN_README) <= sections


def test_a_run_that_was_cut_short_says_so(tmp_path):
    path = synthetic.write(tmp_path / "test.json", finished=False)
    assert "The run was cut short." in report.page(results.load(path), {})


def test_failed_tests_of_the_run_stand_beside_its_numbers(tmp_path):
    document = results.load(synthetic.write(tmp_path / "test.json"))
    assert "The GPU tests were not run." in report.provenance(document)
    document["tests"] = {"status": "failed", "reason": "exit code 1", "passed": 7, "failed": 2}
    assert "7 passed, 2 failed." in report.provenance(document)
    document["tests"]["status"] = "budget"
    assert "7 passed, 2 failed (budget: exit code 1)." in report.provenance(document)


def test_a_sweep_holds_the_rest_of_the_shape_fixed(tmp_path):
    entries = results.load(synthetic.write(tmp_path / "test.json"))["entries"]
    fixed, series = plots.sweep(entries, "num_windows", "fwd")
    assert "seqlen 1025" in fixed and "bfloat16" in fixed
    assert [x for x, _ in series["infimm_kernels"]] == [1, 2, 5, 10, 20, 40, 80, 160]
    assert "sdpa_cudnn" not in series
    assert [x for x, _ in plots.sweep(entries, "seqlen", "bwd")[1]["eager"]] == [257, 577, 1025, 2305]
    assert plots.sweep(entries, "head_dim", "fwd") is None


def test_readme_block_of_the_newest_result_of_each_gpu(tmp_path, ledger):
    folder = tmp_path / "results"
    synthetic.write(folder / "a-1.json", date="2030-01-01", driver="1.0")
    synthetic.write(folder / "a-2.json", date="2030-01-03", driver="3.0")
    synthetic.write(folder / "a-3.json", date="2030-01-02", driver="2.0")
    synthetic.write(folder / "cpu.json", gpu="none (CPU)", compute_capability=None, date="2031-01-01")
    block = report.readme_block(folder, ledger)
    assert "driver 3.0" in block and "driver 1.0" not in block and "driver 2.0" not in block
    assert "none (CPU)" not in block and "bench.ledger" not in block
    assert [row[2] for row in rows_of(block)[2:]] == ["fwd", "bwd", "fwd", "bwd"]
    assert (
        "`BUDGET_S=540 python -m bench.gpu`" in block
        and "Not installed or not able there: xformers." in block
    )
    assert block.endswith("No speed was measured on an A100.\n")
    synthetic.write(folder / "b.json", gpu="NVIDIA A100-SXM4-80GB", compute_capability="8.0")
    block = report.readme_block(folder, ledger)
    assert "A100-SXM4" in block and "driver 3.0" in block and "No speed" not in block


def test_readme_block_without_any_result_is_the_ledger(tmp_path, ledger):
    block = report.readme_block(tmp_path / "none", ledger)
    header, _, *rows = rows_of(block)
    assert header[2:5] == ["ours", "FlashAttention-2", "FlashAttention-3"]
    assert [row[:5] for row in rows] == [
        ["fwd", "sm_80", "0.981", "0.733", "-"],
        ["fwd", "sm_90", "0.877", "-", "0.756"],
        ["fwd", "sm_90 (CUDA C++)", "0.999", "-", "0.756"],
        ["bwd", "sm_80", "0.957", "-", "-"],
    ]
    assert "Triton 3.7.1 and ptxas 12.9, nvcc's ptxas 13.0" in block
    assert block.endswith("No speed was measured on any GPU: A100, H100 and H200 are unmeasured.\n")


def test_block_goes_between_the_comments():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = report.with_block(text, "new\n")
    assert new == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert report.with_block(new, "new\n") == new
    for wrong in ("", BEGIN, f"{END}{BEGIN}", text + text):
        with pytest.raises(ValueError, match="text must hold <!-- kernels --> and then"):
            report.with_block(wrong, "new\n")


def test_readme_holds_what_the_command_generates():
    if not report.LEDGER.exists():
        pytest.skip("bench/ledger.json is not there")
    text = report.README.read_text()
    assert report.with_block(text, report.readme_block()) == text, "run python -m bench.report --readme"


def test_readme_command(tmp_path, ledger, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{BEGIN}\n{END}\nb\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "readme_block", lambda: "new\n")
    assert report.main(["--readme"]) == 0
    assert readme.read_text() == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    readme.write_text("no comments")
    with pytest.raises(SystemExit, match="2"):
        report.main(["--readme"])
    assert "once each, got 0 and 0" in capsys.readouterr().err and readme.read_text() == "no comments"


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_file_that_is_no_result_ends_with_one_line(tmp_path, capsys, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(path)])
    assert "x.json" in capsys.readouterr().err

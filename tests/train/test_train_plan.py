"""`python -m train plan`: its arithmetic, its documents, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from train.gpus import GPUS, gpu, peak_flops, reported_gpu
from train.plan import main
from train.recipes import RECIPES

ROOT = Path(__file__).parents[2]
A100S = ["--gpu", "a100-80", "--gpus", "64"]
TINY = ["--gpu", "h200", "--gpus", "2", "--preset", "tiny"]
TINY_FIELDS = ["image.window_size=28", "image.mode=single", "parallel.global_batch_size=8"]


def document(capsys, *arguments: str) -> dict:
    code = main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def refusal(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(scope="module")
def papers_plan() -> dict:
    from contextlib import redirect_stdout
    from io import StringIO

    out = StringIO()
    with redirect_stdout(out):
        assert main([*A100S, "--json"]) == 0
    return json.loads(out.getvalue())


def test_the_papers_machine(papers_plan):
    stages = {stage["stage"]: stage for stage in papers_plan["stages"]}
    assert list(stages) == ["PT", "CPT", "DRA", "IFT"]
    pt = stages["PT"]
    assert (pt["global_batch"], pt["micro_batch"], pt["accumulation"]) == (10_240, 80, 2)
    assert pt["samples"] == 120_000 * 10_240
    # bf16: two bytes a parameter on every GPU, 12 a trainable one over all of them
    total, trainable = sum(pt["parameters"]["by_part"].values()), pt["parameters"]["trainable"]
    assert 17.5e9 < total < 18.5e9 and trainable == pt["parameters"]["by_part"]["gated_cross_attention"]
    assert pt["held"]["parameters"] == 2 * total
    assert pt["held"]["optimizer"] == pytest.approx(12 * trainable / 64)
    assert pt["held"]["gradients"] == pytest.approx(2 * trainable / 64)
    assert all(stage["fits"] for stage in stages.values())
    assert stages["DRA"]["recomputed_flops"] > 0.2 * stages["DRA"]["step_flops"]
    assert (stages["IFT"]["micro_batch"], stages["IFT"]["accumulation"]) == (1, 1)


def test_time_is_operations_over_the_stated_share_of_the_peak(papers_plan):
    for stage in papers_plan["stages"]:
        seconds = stage["step_flops"] / (64 * 312e12 * 0.35)
        assert stage["step_seconds"] == pytest.approx(seconds)
        assert stage["hours"] == pytest.approx(seconds * stage["steps"] / 3600)
    assert papers_plan["hours"] == pytest.approx(sum(stage["hours"] for stage in papers_plan["stages"]))


def test_the_papers_figures_are_computed_and_do_not_agree(papers_plan):
    """Its steps need more than its 30 hours at any utilisation; one pass over its pairs does not."""
    paper, pt = papers_plan["paper"], papers_plan["stages"][0]
    assert paper["hours_at_peak"] == pytest.approx(pt["hours"] * 0.35)
    assert 60 < paper["hours_at_peak"] < 80
    assert paper["share_for_paper"] > 1 > paper["pass_share_for_paper"] > 0.2
    assert paper["passes"] == pytest.approx(1_228_800_000 / 140e6)


def test_the_tables_say_what_the_document_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main([*TINY, "--recipes", "PT,CPT", *TINY_FIELDS]) == 0
    text = capsys.readouterr().out
    for part in ("tiny on 2 x h200", "126.9 usable", "PT", "CPT", "together", "assumed, not measured"):
        assert part in text
    assert "PT figures do not agree" in text and "…" not in text


def test_a_stage_that_does_not_fit_says_what_would(capsys):
    (plan,) = document(
        capsys, "--gpu", "a100-40", "--gpus", "64", "--recipes", "cpt", "--preset", "infimm_hd_7b"
    )["stages"]
    assert plan["micro_batch"] == 4 and not plan["fits"] and 1 <= plan["largest_micro_batch"] < 4
    smaller = document(
        capsys,
        *("--gpu", "a100-40", "--gpus", "64", "--recipes", "CPT", "--preset", "infimm_hd_7b"),
        *("--micro-batch", str(plan["largest_micro_batch"])),
    )["stages"][0]
    assert smaller["fits"] and smaller["accumulation"] == 4 // plan["largest_micro_batch"]
    assert smaller["step_flops"] == plan["step_flops"]


def test_the_tables_say_the_way_out(capsys):
    arguments = ["--preset", "infimm_hd_7b", "--recipes", "CPT", "--gpus", "64", "--gpu"]
    assert main([*arguments, "a100-40"]) == 0 == main([*arguments, "t4", "parallel.precision=fp16"])
    text = capsys.readouterr().out
    assert "CPT: does not fit; --micro-batch 1 does, in 4 accumulation steps." in text
    assert "CPT: does not fit; no micro batch does: try --zero 3" in text
    assert "The paper" not in text  # it has no time for this stage alone


def test_zero_and_offloading_move_memory(capsys):
    def held(*arguments: str) -> dict:
        return document(capsys, *TINY, "--recipes", "PT", *TINY_FIELDS, *arguments)["stages"][0]["held"]

    two, three = held("--zero", "2"), held("--zero", "3")
    assert three["parameters"] < two["parameters"] and three["optimizer"] == two["optimizer"]
    assert held("--zero", "1")["gradients"] == 2 * two["gradients"]
    offloaded = held("--zero", "2", "--offload", "optimizer")
    assert offloaded["optimizer"] == offloaded["gradients"] == 0 < two["optimizer"] < offloaded["host"]
    everything = held("--zero", "3", "--offload", "parameters")
    assert everything["parameters"] < three["parameters"] and everything["host"] > offloaded["host"]


def test_windows_of_dynamic_images(capsys):
    """Time follows the mean, memory the largest image; the default takes all nine grids as equally likely."""
    fields = ["image.window_size=28", "parallel.global_batch_size=8"]

    def plan(*arguments: str) -> dict:
        return document(capsys, *TINY, "--recipes", "DRA", *fields, *arguments)["stages"][0]

    default, few = plan(), plan("--windows-per-image", "1.5")
    assert default["windows_per_image"] == pytest.approx((1 + 2 * 3 + 2 * 4 + 5 + 2 * 7 + 10) / 9)
    assert few["step_flops"] < default["step_flops"] and few["activations"] == default["activations"]
    assert few["most_windows"] == 10
    message = refusal(capsys, *TINY, "--recipes", "DRA", *fields, "--windows-per-image", "11")
    assert "windows_per_image must lie in 1..10 for DRA" in message and "got 11" in message


def test_any_recipe_and_config_file_is_planned(capsys, tmp_path):
    path = tmp_path / "config.json"
    values = RECIPES["CPT"]().to_dict() | {"stage": "mine"}
    values["model"] = {"preset": "tiny", "options": {"text_config": {"num_hidden_layers": 2}}}
    path.write_text(json.dumps(values))
    plan = document(capsys, "--gpu", "L40S", "--gpus", "1", "--recipes", str(path), "image.window_size=28")
    assert [stage["stage"] for stage in plan["stages"]] == ["mine"] and plan["paper"] is None
    four_layers = document(capsys, *TINY, "--recipes", str(path), "image.window_size=28")["stages"][0]
    two_layers = plan["stages"][0]["parameters"]["by_part"]
    assert two_layers["language"] < four_layers["parameters"]["by_part"]["language"]


def test_concatenation_counts_the_images_tokens(capsys):
    arguments = ["--gpu", "h200", "--gpus", "8", "--recipes", "CPT", "--preset", "llava_7b"]
    message = refusal(capsys, *arguments, "image.window_size=336")
    assert "data.sequence_length of CPT must exceed the 576 <image> tokens of a window, got 128" in message
    plan = document(capsys, *arguments, "image.window_size=336", "data.sequence_length=2048")["stages"][0]
    assert plan["row_length"] == 2048 and plan["activations"]["keys_values"] == 4 * 576 * 4096 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10", "--gpus", "8"], "did you mean 'h100' or 'h100-nvl' or 'h100-pcie'?"),
        (["--gpu", "a100", "--gpus", "8"], "gpu must be one of v100-32, t4, a100-40"),
        (
            [*A100S, "--recipes", "PTT"],
            "recipes must be among PT, CPT, DRA, IFT, mra_pretrain, mra_finetune, got 'PTT'",
        ),
        ([*A100S, "--recipes", ","], "recipes must name at least one"),
        ([*A100S, "--recipes", "no.json"], "recipes must name existing config files, got 'no.json'"),
        ([*A100S, "--mfu", "1.5"], "mfu must lie in (0, 1], got 1.5"),
        ([*A100S, "--headroom", "1"], "headroom must lie in [0, 1), got 1.0"),
        (["--gpu", "a100-80", "--gpus", "0"], "gpus must be at least 1, got 0"),
        ([*A100S, "--micro-batch", "0"], "micro_batch must be at least 1, got 0"),
        ([*A100S, "--preset", "tinny", "--recipes", "PT"], "got 'tinny'; did you mean 'tiny'?"),
        (
            [*TINY, "--micro-batch", "3", "--recipes", "PT", *TINY_FIELDS],
            "must divide the 4 samples of a GPU",
        ),
        (
            ["--gpu", "h200", "--gpus", "3", "--recipes", "CPT"],
            "gpus must divide global_batch_size 256 of CPT",
        ),
        (
            ["--gpu", "v100-32", "--gpus", "8", "--recipes", "PT"],
            "v100-32 computes in (fp16, fp32), got 'bf16'",
        ),
        (
            [*TINY, "--offload", "parameters", "--recipes", "PT", *TINY_FIELDS],
            "zero_stage must be at least 3",
        ),
        ([*A100S, "--zero", "0", "--recipes", "PT"], "with parallel.zero_stage 0, got 'bf16'"),
        ([*A100S, "parallel.nothing=3"], "key must be a field of the config, got 'parallel.nothing'"),
    ],
)
def test_what_cannot_be_planned_is_named(capsys, arguments, message):
    assert message in refusal(capsys, *arguments)


def test_parsing_imports_no_torch():
    code = (
        "import sys; from train.plan import main; "
        "assert main(['--gpu', 'a', '--gpus', '8']) == 2; "
        "assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=200)


@pytest.mark.parametrize(
    ("device_name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Some accelerator", None),
        ("", None),
    ],
)
def test_a_reported_name_is_its_gpu_or_none(device_name, known):
    found = reported_gpu(device_name)
    assert (None if found is None else found.name) == known


def test_rates_are_those_of_the_precision():
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16_autocast") == 312e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("Tesla T4", "bf16") is None and peak_flops("cpu", "bf16") is None
    assert gpu("A100-80").memory_gb == 80
    for known in GPUS.values():
        rates = known.tflops
        assert rates["fp16"] >= rates["fp32"] and rates.get("bf16", rates["fp16"]) == rates["fp16"]

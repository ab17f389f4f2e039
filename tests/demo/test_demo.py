"""The demo's own code at a hundredth of its length: every artefact is made and says what the README says."""

import json

import numpy as np
import pytest
import torch

from model import ImageProcessor, InfiMMHD, preset
from train.demo import __main__ as demo
from train.demo.arms import train_side_by_side
from train.demo.evaluate import accuracy, answer_questions, evaluation_set
from train.demo.plots import cross_attention_maps
from train.demo.vocabulary import build_tokenizer
from train.demo.warmup import WarmUpConfig, scattered_strings, warm_up_language, warm_up_vision


def test_the_demo_leaves_its_report_and_pictures(tmp_path, capsys):
    assert demo.main(["--scale", "0.008", "--images", "4", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["PT", "CPT", "DRA", "IFT"]
    for stage in report["stages"]:
        assert {"loss_first", "loss_last", "steps", "seconds"} <= set(stage)
    values = report["accuracy"]
    for name in (
        "with_image",
        "image_withheld",
        "characters_windows",
        "characters_one_view",
        "characters_off_grid",
    ):
        assert 0.0 <= values[name] <= 1.0
    assert set(values["by_kind"]) == {"characters", "colour", "count"}
    assert len(report["samples"]) == 5 and report["seconds_total"] > 0
    for name in ("loss.png", "attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "characters_off_grid" in capsys.readouterr().out
    # each stage starts where the one before ended, and the ViT's table grows once
    assert InfiMMHD.from_pretrained(tmp_path / "PT" / "model").config.vision_config.window_size == 28
    assert InfiMMHD.from_pretrained(tmp_path / "CPT" / "model").config.vision_config.window_size == 56


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "0"], "--scale must lie in 0..100, got 0.0"),
        (["--scale", "nan"], "--scale must lie in 0..100, got nan"),
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must lie in 0..2^63 - 1, got -1"),
        (
            ["--output", "/dev/null/runs"],
            "--output must be a folder that can be written, got '/dev/null/runs'",
        ),
    ],
)
def test_bad_options_are_refused_before_any_training(arguments, message, capsys):
    """`--images 0` trained for minutes and then failed with an IndexError."""
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_failing_arm_ends_both_and_shows_its_log(tmp_path):
    """The arms are processes: one that stops must not leave the other running, or its reason in a file."""
    with pytest.raises(RuntimeError, match="(?s)the arm '(windows|one_view)' stopped.*init_from must be"):
        train_side_by_side(tmp_path, scale=0.01, precision="fp32")
    assert not list(tmp_path.glob("*.json"))


def test_warm_ups_learn():
    """A few dozen steps must already lower both losses well below their start."""
    torch.manual_seed(0)
    model, config = InfiMMHD(preset("tiny")), WarmUpConfig(vision_steps=25, language_steps=25, canvases=2)
    config.half_scale_canvases, config.language_batch = 1, 16
    for losses in (
        warm_up_vision(model, config)["losses"],
        warm_up_language(model, build_tokenizer(), config)["losses"],
    ):
        assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:3])


def test_the_warm_up_map_says_what_the_pixels_show():
    canvas, shown = scattered_strings(np.random.default_rng(0), 112, (14,), 10, 7, off_grid=0.0)
    assert canvas.shape == (112, 112, 3) and canvas.min() >= 0 and canvas.max() <= 255
    marked = shown[0] > 0
    assert 0.01 < marked.mean() < 0.6
    assert ((shown[1] > 0) == marked).all() and ((shown[2] > 0) == marked).all()
    assert shown[0].max() <= 10 and shown[1].max() <= 6 and shown[2].max() <= 4


def test_withholding_removes_pixels_and_the_image_token():
    model, tokenizer = InfiMMHD(preset("tiny")), build_tokenizer()
    seen = []
    original = model.generate
    model.generate = lambda **arguments: seen.append(arguments) or original(**arguments)
    answers = answer_questions(model, tokenizer, evaluation_set(), None, 2)
    assert len(answers) == 2 * 3 * 2
    for arguments in seen:
        assert "pixel_values" not in arguments
        assert model.config.image_token_id not in arguments["input_ids"]
    with pytest.raises(ValueError, match="conditions must select at least one answer"):
        accuracy(answers, kind="size")


def test_attention_maps_are_probabilities_over_the_patches():
    torch.manual_seed(0)
    model, tokenizer = InfiMMHD(preset("tiny")), build_tokenizer()
    model.set_window_size(56)
    view = ImageProcessor(window_size=56, mode="dynamic").process(evaluation_set().painted(0).pixels)
    tokens, maps = cross_attention_maps(model, tokenizer, "which characters at left top ?", "1 2 3", view)
    assert tokens == ["1", "2", "3"] and maps.shape == (3, 5, 8, 8)
    assert (maps >= 0).all() and (maps.sum((1, 2, 3)) <= 1 + 1e-5).all() and (maps.sum((1, 2, 3)) > 0.5).all()

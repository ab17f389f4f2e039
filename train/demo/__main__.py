"""`python -m train.demo`: warm-up, four stages, evaluation, report, pictures; minutes on two CPU cores."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from model import ImageProcessor, InfiMMHD, preset

from .arms import SHARED_STAGES, StageResult, train_side_by_side, train_stages
from .evaluate import Answer, accuracy, accuracy_by_length, accuracy_by_size, answer_questions, evaluation_set
from .painted import KINDS
from .plots import plot_attention, plot_losses
from .stages import ONE_VIEW_FACTOR, WINDOW
from .vocabulary import build_tokenizer
from .warmup import WarmUpConfig, warm_up_language, warm_up_vision

LOSS_WINDOW = 20
"""Steps that the report's first and last losses are means of."""

EVALUATED_IMAGES = 192

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    output = Path(options.output)
    precision = "bf16_autocast" if bfloat16_is_fast() else "fp32"
    print(f"demo: {torch.get_num_threads()} threads on {os.cpu_count()} cores, {precision}, into {output}")

    tokenizer = build_tokenizer()
    warm_up = _warm_up(output / "warm_up", tokenizer, options, precision)
    settings = dict(scale=options.scale, precision=precision)
    results = train_stages(SHARED_STAGES, output, init_from=output / "warm_up", **settings)
    arms = train_side_by_side(output, **settings)
    results |= arms["windows"]
    evaluation = _evaluate(output, tokenizer, options)

    report = {
        "stages": [_stage_row(name, result) for name, result in results.items()],
        **evaluation,
        "one_view_arm": {
            "stages": [_stage_row(name, result) for name, result in arms["one_view"].items()],
            "seconds": sum(result.seconds for result in arms["one_view"].values()),
            "windows_arm_seconds": sum(result.seconds for result in arms["windows"].values()),
            "steps_factor": ONE_VIEW_FACTOR,
        },
        "warm_up": warm_up,
        "precision": precision,
        "scale": options.scale,
        "threads": torch.get_num_threads(),
        "seconds_total": time.perf_counter() - started,
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_losses({name: result.losses for name, result in results.items()}, output / "loss.png")
    _print_report(report, output)
    return 0


def bfloat16_is_fast() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones; measured in 50 ms."""
    if torch.cuda.is_available():
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512).to(dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.demo", description=__doc__)
    parser.add_argument("--output", default="runs/demo", help="folder for models, report and pictures")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of everything")
    parser.add_argument("--images", type=int, default=EVALUATED_IMAGES, help="held-out pictures to ask about")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 0 < options.scale <= 100:
        parser.error(f"--scale must lie in 0..100, got {options.scale}")
    if options.images < 1:
        parser.error(f"--images must be at least 1, got {options.images}")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed must lie in 0..2^63 - 1, got {options.seed}")
    try:
        Path(options.output).mkdir(parents=True, exist_ok=True)
        (Path(options.output) / "report.json").open("a").close()
    except OSError as error:
        parser.error(f"--output must be a folder that can be written, got {options.output!r}: {error}")
    return options


def _warm_up(folder: Path, tokenizer, options: argparse.Namespace, precision: str) -> dict[str, object]:
    """Makes the stand-ins for EVA2-CLIP-E and Vicuna, and the model that PT starts from."""
    config = WarmUpConfig(autocast=precision == "bf16_autocast", seed=options.seed)
    config.vision_steps = max(2, round(config.vision_steps * options.scale))
    config.language_steps = max(2, round(config.language_steps * options.scale))
    model = InfiMMHD(preset("tiny")).to(DEVICE)
    if precision == "bf16_autocast" and DEVICE.type == "cpu":
        # torch's fused attention, the default, has a slow bfloat16 backward there
        model.language.set_attn_implementation("eager")
    vision = warm_up_vision(model, config)
    language = warm_up_language(model, tokenizer, config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    print(f"warm-up: ViT {vision['seconds']:.0f} s {vision['accuracy']}, LLM {language['seconds']:.0f} s")
    return {
        "vision": {
            **_loss_row(vision["losses"]),
            "seconds": vision["seconds"],
            "accuracy": vision["accuracy"],
        },
        "language": {**_loss_row(language["losses"]), "seconds": language["seconds"]},
    }


def _evaluate(output: Path, tokenizer, options: argparse.Namespace) -> dict[str, object]:
    """Accuracies, five answers in full, and the picture of the attention."""
    model = InfiMMHD.from_pretrained(output / "IFT" / "model").to(DEVICE)
    low = InfiMMHD.from_pretrained(output / "IFT_one_view" / "model").to(DEVICE)
    windows = ImageProcessor(window_size=WINDOW, mode="dynamic")
    single = ImageProcessor(window_size=WINDOW, mode="single")
    held_out, off_grid = evaluation_set(), evaluation_set(off_grid=True)
    shown = answer_questions(model, tokenizer, held_out, windows, options.images)
    withheld = answer_questions(model, tokenizer, held_out, None, options.images)
    characters = ("characters",)
    one_view = answer_questions(low, tokenizer, held_out, single, options.images, characters)
    anywhere = answer_questions(model, tokenizer, off_grid, windows, options.images)

    sample = _picture_sample(shown)
    plot_attention(
        model,
        tokenizer,
        windows,
        held_out.painted(sample.index).pixels,
        sample.question,
        sample.given,
        sample.expected,
        output / "attention.png",
    )
    return {
        "accuracy": {
            "with_image": accuracy(shown),
            "image_withheld": accuracy(withheld),
            "characters_windows": accuracy(shown, kind="characters"),
            "characters_one_view": accuracy(one_view, kind="characters"),
            "characters_off_grid": accuracy(anywhere, kind="characters"),
            "by_kind": {
                kind: {
                    "with_image": accuracy(shown, kind=kind),
                    "image_withheld": accuracy(withheld, kind=kind),
                    "off_grid": accuracy(anywhere, kind=kind),
                }
                for kind in KINDS
            },
            "characters_by_length": accuracy_by_length(shown),
            "characters_by_size": {
                "windows": accuracy_by_size(shown),
                "one_view": accuracy_by_size(one_view),
                "off_grid": accuracy_by_size(anywhere),
            },
        },
        "evaluated": {"images": options.images, "questions": len(shown)},
        "samples": [
            {"image": a.index, "question": a.question, "expected": a.expected, "given": a.given}
            for a in _spread(shown, 5)
        ],
    }


def _picture_sample(answers: list[Answer]) -> Answer:
    """The first answer in characters that is right and long, else simply the first."""
    characters = [a for a in answers if a.kind == "characters"]
    right = [a for a in characters if a.correct and len(a.string.text) >= 3]
    return (right or characters)[0]


def _spread(answers: list[Answer], count: int) -> list[Answer]:
    return [answers[i * len(answers) // count] for i in range(count)]


def _loss_row(losses: list[float]) -> dict[str, object]:
    width = min(LOSS_WINDOW, max(1, len(losses) // 2))
    return {
        "loss_first": sum(losses[:width]) / width,
        "loss_last": sum(losses[-width:]) / width,
        "loss_window": width,
        "steps": len(losses),
    }


def _stage_row(name: str, result: StageResult) -> dict[str, object]:
    return {"name": name, **_loss_row(result.losses), "seconds": result.seconds}


def _print_report(report: dict, output: Path) -> None:
    for stage in report["stages"]:
        print(
            f"{stage['name']:>4}: loss {stage['loss_first']:.3f} -> {stage['loss_last']:.3f} "
            f"in {stage['steps']} steps, {stage['seconds']:.0f} s"
        )
    values = report["accuracy"]
    print("held-out photographs and strings, exact match of greedy answers:")
    for name in (
        "with_image",
        "image_withheld",
        "characters_windows",
        "characters_one_view",
        "characters_off_grid",
    ):
        print(f"  {name:<20} {values[name]:6.1%}")
    for sample in report["samples"]:
        print(f"  Q: {sample['question']:<38} A: {sample['given']!r} (expected {sample['expected']!r})")
    print(
        "Text stands on the patch grid except in characters_off_grid; ViT and LLM were warmed up on the spot."
    )
    print(f"{report['seconds_total']:.0f} s; see {output}/report.json, loss.png, attention.png")


if __name__ == "__main__":
    sys.exit(main())

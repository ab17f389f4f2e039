"""The four stages at the size of the demo: the paper's recipes with smaller images, batches and more speed.

A window is 56 pixels here (28 in PT) where the paper has 448 (224 in PT). The learning rates are some
hundred times the paper's: these models are small, start from a minute of warm-up and see thousands of
samples, not millions."""

import dataclasses
from pathlib import Path

from train.config import (
    CheckpointConfig,
    DataConfig,
    ImageConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from train.recipes import CPT, DRA, IFT, PT

from .painted import FONT_SIZES

WINDOW, PT_WINDOW = 56, 28
CANVAS = (2 * WINDOW, 2 * WINDOW)
CANVASES = (CANVAS, CANVAS, (WINDOW, 2 * WINDOW), (2 * WINDOW, WINDOW), (WINDOW, WINDOW))
"""What DRA sees: two in five samples have the full size, the others one or two windows."""

ONE_VIEW_FACTOR = 2.6
"""The low-resolution arm sees one window where the other sees five; with this many times the steps it gets at
least the same compute (the report gives the seconds of both)."""

OFF_GRID = 0.5
"""Share of the training strings that stand anywhere and not on the patch grid."""


@dataclasses.dataclass(frozen=True, slots=True)
class DemoStage:
    recipe: TrainConfig
    steps: int
    batch: int
    lr: dict[str, float]
    options: dict[str, object]
    """Of `PaintedPhotographs`."""


def demo_stages() -> dict[str, DemoStage]:
    """PT, CPT, DRA and IFT of the demo, in order; only IFT asks for the number of characters."""

    def options(seed: int, *canvases: tuple[int, int], count_share: float = 0.0, **more) -> dict[str, object]:
        sizes = [list(canvas) for canvas in canvases]
        return dict(canvases=sizes, seed=seed, off_grid=OFF_GRID, count_share=count_share, **more)

    small = [FONT_SIZES["small"], FONT_SIZES["medium"]]
    return {
        "PT": DemoStage(
            PT(),
            steps=250,
            batch=48,
            lr=dict(gated_cross_attention=4e-3),
            options=options(1, (PT_WINDOW, PT_WINDOW), font_sizes=small, lengths=[1, 2]),
        ),
        "CPT": DemoStage(
            CPT(),
            steps=250,
            batch=32,
            lr=dict(vision=1e-3, gated_cross_attention=3e-3),
            options=options(2, (WINDOW, WINDOW)),
        ),
        "DRA": DemoStage(
            DRA(),
            steps=250,
            batch=32,
            lr=dict(vision=6e-4, gated_cross_attention=2e-3),
            options=options(3, *CANVASES),
        ),
        "IFT": DemoStage(
            IFT(),
            steps=350,
            batch=32,
            lr=dict(gated_cross_attention=2e-3, language=1e-3),
            options=options(4, CANVAS, count_share=0.4),
        ),
    }


def stage_config(
    name: str,
    stage: DemoStage,
    *,
    init_from: Path,
    output_dir: Path,
    precision: str,
    scale: float = 1.0,
    one_view: bool = False,
) -> TrainConfig:
    """The paper's recipe made small; `scale` multiplies the steps, `one_view` resizes to one window."""
    recipe, window = stage.recipe, PT_WINDOW if name == "PT" else WINDOW
    steps = max(2, round(stage.steps * scale * (ONE_VIEW_FACTOR if one_view else 1.0)))
    peak = max(stage.lr.values())
    return dataclasses.replace(
        recipe,
        init_from=str(init_from),
        output_dir=str(output_dir),
        log_interval=max(1, steps // 10),
        image=ImageConfig(window_size=window, mode="single" if one_view else recipe.image.mode),
        data=DataConfig(
            name="painted",
            options=stage.options,
            prompt="plain",
            sequence_length=96,
            shuffle=False,
        ),
        optimizer=OptimizerConfig(
            lr_peak=peak,
            lr_min=0.05 * peak,
            lr_scale={part: rate / peak for part, rate in stage.lr.items()},
            betas=(0.9, 0.98),
            eps=1e-8,
            weight_decay=0.01,
            clip=recipe.optimizer.clip,
        ),
        schedule=ScheduleConfig(steps=steps, warmup_steps=max(1, round(0.08 * steps))),
        parallel=ParallelConfig(
            global_batch_size=stage.batch, zero_stage=recipe.parallel.zero_stage, precision=precision
        ),
        # a demo starts from new warm-ups every time
        checkpoint=CheckpointConfig(every_steps=None, keep_last=1, resume=False),
    )

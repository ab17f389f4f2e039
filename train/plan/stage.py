"""What one stage needs on so many GPUs: memory of each, operations and time of its steps."""

import dataclasses
import functools
import math
from pathlib import Path

from model import InfiMMHDConfig, preset, presets

from ..config import TrainConfig, nearest_name
from ..flops import StepFlops, Work
from ..gpus import Gpu
from .activations import ActivationBytes, Activations
from .memory import HeldBytes, ParameterCounts, cast_weight_bytes, count_parameters, held_bytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The machine and the assumptions of a plan."""

    gpu: Gpu
    gpus: int
    mfu: float
    """Share of the peak rate that computed operations reach, recomputed ones among them."""
    headroom: float
    """Share of a GPU's memory left for CUDA's context, NCCL and fragmentation."""
    offload: str = "none"
    micro_batch: int | None = None
    windows_per_image: float | None = None
    """Mean in dynamic stages; None: all grids that the stage allows are equally likely."""

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a stage may take."""
        return self.gpu.memory_gb * 1e9 * (1 - self.headroom)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """A stage's needs. Bytes are of one GPU; `activations` for images of the most windows."""

    stage: str
    parameters: ParameterCounts
    zero_stage: int
    precision: str
    global_batch: int
    micro_batch: int
    accumulation: int
    windows_per_image: float
    """Mean, which the time is for."""
    most_windows: int
    """Of one image, which the memory is for."""
    row_length: int
    held: HeldBytes
    cast_weights: float
    activations: ActivationBytes
    peak_bytes: float
    fits: bool
    largest_micro_batch: int
    """That fits and divides a GPU's share of the batch; 0 where none does."""
    step_flops: int
    """Of the whole global batch, recomputed operations among them."""
    recomputed_flops: int
    step_seconds: float
    steps: int
    hours: float
    samples: int
    notes: tuple[str, ...]


def model_config(config: TrainConfig, preset_name: str | None) -> InfiMMHDConfig:
    """The model that a stage would train, at its window size: a preset, or what `config` names."""
    if preset_name is None and config.init_from is not None:
        model = _saved_config(Path(config.init_from))
    else:
        name = preset_name or config.model.preset
        if name not in presets():
            nearest = nearest_name(name, presets())
            raise ValueError(
                f"preset must be one of {', '.join(presets())}, got {name!r}; did you mean {nearest!r}?"
            )
        values = preset(name).to_dict()
        if preset_name is None:
            values = _merged(values, config.model.options)
        model = InfiMMHDConfig.from_dict(values)
    model.vision_config.set_input_size(config.image.window_size)
    return model


def _saved_config(folder: Path) -> InfiMMHDConfig:
    inner = folder / "model" / "config.json"
    return InfiMMHDConfig.load(inner if inner.is_file() else folder / "config.json")


def _merged(values: dict, options: dict) -> dict:
    nested = {
        key: _merged(values[key], value)
        for key, value in options.items()
        if isinstance(value, dict) and isinstance(values.get(key), dict)
    }
    return values | options | nested


def grid_windows(side: int) -> list[int]:
    """Windows of an image by grid, up to `side` a side; a grid of several has a thumbnail beside it."""
    cells = [rows * columns for rows in range(1, side + 1) for columns in range(1, side + 1)]
    return [number + (number > 1) for number in cells]


def _windows(config: TrainConfig, mean: float | None) -> tuple[float, int]:
    """(mean, most) windows of an image."""
    if config.image.mode == "single":
        return 1, 1
    choices = grid_windows(config.image.max_windows_per_side)
    if mean is None:
        mean = sum(choices) / len(choices)
    if not 1 <= mean <= max(choices):
        raise ValueError(
            f"windows_per_image must lie in 1..{max(choices)} for {config.stage}, whose images have at most "
            f"{config.image.max_windows_per_side} windows a side, got {mean:g}"
        )
    return mean, max(choices)


def _split(config: TrainConfig, setup: Setup) -> tuple[int, int, list[str]]:
    """(micro batch, accumulation steps, notes) of the global batch on the GPUs."""
    parallel, size, gpus = config.parallel, config.parallel.global_batch_size, setup.gpus
    if size % gpus:
        raise ValueError(
            f"gpus must divide global_batch_size {size} of {config.stage}, got {gpus}; "
            f"the next that does: {_nearest_divisor(size, gpus)}"
        )
    share = size // gpus
    if setup.micro_batch is not None:
        # a stage whose share is smaller takes all of it at once
        micro = min(setup.micro_batch, share)
        if share % micro:
            raise ValueError(
                f"micro_batch must divide the {share} samples of a GPU of {config.stage}, got {micro}"
            )
        return micro, share // micro, []
    try:
        micro = parallel.micro_batch(gpus)
    except ValueError:
        note = (
            f"its batch of {size} does not split into {parallel.gradient_accumulation_steps} accumulation "
            f"steps on {gpus} GPUs: planned with {share} at once"
        )
        return share, 1, [note]
    return micro, share // micro, []


def _nearest_divisor(size: int, wanted: int) -> int:
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - wanted))


def _work(config: TrainConfig, model: InfiMMHDConfig, samples: int, windows: float) -> Work:
    """Rows as long as the stage allows, an image in front of each, logits of all text."""
    length = config.data.sequence_length
    marks = model.image_seq_length
    text = length
    if marks is not None:
        text = length - round(marks * windows)
        if length <= marks:
            raise ValueError(
                f"data.sequence_length of {config.stage} must exceed the {marks} <image> tokens of a window, "
                f"got {length}"
            )
    num_windows = math.ceil(samples * windows)
    pairs = 0 if marks else length * num_windows * model.visual_tokens_per_window
    return Work(
        num_windows=num_windows,
        num_rows=samples,
        row_length=length,
        num_answer_tokens=samples * max(text, 1),
        num_pairs=pairs,
    )


def plan_stage(config: TrainConfig, model: InfiMMHDConfig, setup: Setup) -> StagePlan:
    """The plan of `config` for `model` (of `model_config`); ValueError for what cannot be planned."""
    parallel, trainable = config.parallel, config.trainable
    peak_rate = setup.gpu.peak(parallel.precision)
    if peak_rate is None:
        raise ValueError(
            f"parallel.precision of {config.stage} must be one that {setup.gpu.name} computes in "
            f"({', '.join(setup.gpu.tflops)}), got {parallel.precision!r}"
        )
    mean, most = _windows(config, setup.windows_per_image)
    micro, accumulation, notes = _split(config, setup)
    if model.image_seq_length and model.image_seq_length * most >= config.data.sequence_length:
        notes.append(
            f"rows of {config.data.sequence_length} tokens cut an image of {most} windows "
            f"({model.image_seq_length * most} tokens)"
        )

    counts = count_parameters(model, trainable)
    held = held_bytes(
        counts,
        precision=parallel.precision,
        zero_stage=parallel.zero_stage,
        world_size=setup.gpus,
        offload=setup.offload,
    )
    activations = Activations(model, trainable, parallel.precision, config.gradient_checkpointing)
    cast_weights = cast_weight_bytes(counts, parallel.precision, activations.features_need)

    @functools.cache
    def activation_bytes(samples: int) -> ActivationBytes:
        return activations.of(_work(config, model, samples, most))

    def peak(samples: int) -> float:
        backward = held.buffers + cast_weights + activation_bytes(samples).peak
        return held.total + max(backward, held.step)

    share = micro * accumulation
    fitting = [n for n in range(1, share + 1) if share % n == 0 and peak(n) <= setup.usable]
    global_batch = share * setup.gpus
    flops = StepFlops(model, trainable, config.gradient_checkpointing)
    cost = flops.cost(_work(config, model, global_batch, mean))
    seconds = cost.total / (setup.gpus * peak_rate * setup.mfu)
    return StagePlan(
        stage=config.stage,
        parameters=counts,
        zero_stage=parallel.zero_stage,
        precision=parallel.precision,
        global_batch=global_batch,
        micro_batch=micro,
        accumulation=accumulation,
        windows_per_image=mean,
        most_windows=most,
        row_length=config.data.sequence_length,
        held=held,
        cast_weights=cast_weights,
        activations=activation_bytes(micro),
        peak_bytes=peak(micro),
        fits=peak(micro) <= setup.usable,
        largest_micro_batch=max(fitting, default=0),
        step_flops=cost.total,
        recomputed_flops=cost.recomputed,
        step_seconds=seconds,
        steps=config.schedule.steps,
        hours=seconds * config.schedule.steps / 3600,
        samples=config.schedule.steps * global_batch,
        notes=tuple(notes),
    )

"""A stage of training from beginning to end: `run`."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from model import InfiMMHD

from . import build, checkpoint, distributed, files, output
from .checkpoint import Checkpoints
from .config import TrainConfig
from .data import Dataset, build_dataset
from .distributed import deepspeed
from .optim import build_optimizer
from .settings import deepspeed_dict
from .stage import Stage
from .watch import Progress, Summary


@dataclasses.dataclass(kw_only=True, slots=True)
class RunResult:
    """What `run` did; the same on every rank."""

    stage: str
    output_dir: Path
    losses: list[float]
    """Of every step: the mean over the answer tokens of its global batch."""
    grad_norms: list[float]
    """Of every step, before clipping."""
    seconds: float
    """Of the steps alone."""
    samples_seen: int
    """Samples trained on."""
    skipped: dict[str, int]
    """Samples left out, by reason (`data.on_bad_sample=skip`, steps left out by the guard)."""
    num_truncated: int
    """Samples cut at `data.sequence_length`."""


def run(
    config: TrainConfig,
    *,
    dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: InfiMMHD | None = None,
) -> RunResult:
    """Trains one stage and writes `config.output_dir` (see `train.output`); every rank calls it.

    `dataset`, `tokenizer` and `model` take the place of what `config.data`, `config.init_from` and
    `config.model` would load. `model` is trained in place (with ZeRO 3 it stays partitioned: load the result
    from `output_dir`). Stages may follow each other in one process. The loss is the sum of the cross
    entropies of the answer tokens over the number of them, in the global batch of all ranks and accumulation
    steps.

    If `output_dir` holds checkpoints of the same run, it goes on from the newest undamaged one, bit for bit
    as if it had not stopped; on another number of ranks or at another ZeRO stage, with the same weights and
    optimizer states. If the run is finished, its result is returned and nothing is trained
    (`checkpoint.resume` false begins anew). Before anything is built, rank 0 checks `output_dir`: what stands
    in it under the names that a stage writes must be a stage's.

    ValueError for a config that does not fit the data, the model, the number of ranks or the run in
    `output_dir`, and for a bad sample; FloatingPointError, naming the step, when more steps than
    `guard.max_skipped_steps` have a loss or gradient that is not finite; OSError when something could not be
    written; `train.interrupt.Interrupted` after SIGTERM or SIGINT, with the state saved."""
    if model is None and config.init_from is None:
        build.check_random_frozen(config)
    output_dir = Path(config.output_dir)
    ranks = distributed.start()
    ranks.check_on_first(lambda: _check_output_dir(output_dir, config))
    settings = deepspeed_dict(config, ranks.world_size, overlap_comm=ranks.device.type == "cuda")
    finished = ranks.on_first(lambda: _read_finished(output_dir, config))
    if finished is not None:
        if ranks.rank == 0:
            print(f"{config.stage}: finished earlier, nothing to do in {output_dir}", flush=True)
        return RunResult(**finished | {"output_dir": output_dir})

    checkpoint.seed_generators(config.seed + ranks.rank)
    dataset = build_dataset(config.data) if dataset is None else dataset
    tokenizer = build.load_tokenizer(config) if tokenizer is None else tokenizer
    model = build.build_model(config) if model is None else model
    if ranks.rank == 0:
        for note in getattr(dataset, "notes", []):
            print(f"{config.stage}: data: {note}", flush=True)
    build.prepare_model(model, config, ranks.device)
    offload = config.parallel.offload != "none"
    optimizer = build_optimizer(model, config.optimizer, ranks.device, offload=offload)
    reader = build.build_reader(config, model, dataset, tokenizer, ranks)
    checkpoints = Checkpoints(output_dir / "checkpoints", config.checkpoint, ranks)
    if not config.checkpoint.resume:
        ranks.check_on_first(lambda: output.remove_traces(output_dir))
        checkpoints.clear()
    # after the removal: the settings written here are those of the checkpoints beside them, at any time
    ranks.check_on_first(lambda: _write_settings(output_dir, config, settings))
    newest = checkpoints.newest()
    frozen_checksum = build.frozen_checksum(model)
    linear = torch.nn.functional.linear
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    if ranks.world_size == 1 and config.parallel.zero_stage == 0:
        # There is nothing to sum, and DeepSpeed would copy every gradient into a bucket and back.
        engine.enable_backward_allreduce = False
    try:
        stage = Stage(
            config, engine, optimizer, model, reader, checkpoints, ranks, frozen_checksum=frozen_checksum
        )
        if newest is not None:
            stage.load(newest)
        progress = Progress(
            config,
            output_dir,
            enabled=ranks.rank == 0,
            resume_step=None if newest is None else stage.step,
            tensorboard=config.tensorboard,
        )
        with progress:
            stage.train(progress)
            output.save_model(engine, model, tokenizer, output_dir, ranks, config.data.prompt)
            result = _result(stage, output_dir)
            ranks.check_on_first(lambda: _write_finished(output_dir, result))
            progress.finish(
                Summary(
                    samples_seen=result.samples_seen,
                    skipped=result.skipped,
                    num_truncated=result.num_truncated,
                    skipped_steps=dict(stage.guard.skipped),
                )
            )
    finally:
        engine.destroy()
        # ZeRO 3 puts its own in place for the whole process and leaves it there
        torch.nn.functional.linear = linear
        _release(model)
    return result


def _check_output_dir(output_dir: Path, config: TrainConfig) -> None:
    output.check_output_dir(output_dir)
    if config.checkpoint.resume:
        output.check_same_run(output_dir, config)


def _write_settings(output_dir: Path, config: TrainConfig, settings: dict[str, Any]) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    files.write_json(output_dir / "config.json", config.to_dict())
    files.write_json(output_dir / "deepspeed.json", settings)


def _read_finished(output_dir: Path, config: TrainConfig) -> dict[str, Any] | None:
    path = output_dir / output.FINISHED
    if not config.checkpoint.resume or not path.exists():
        return None
    values = json.loads(path.read_text())
    for key in ("losses", "grad_norms"):
        values[key] = [math.nan if number is None else number for number in values[key]]
    return values


def _write_finished(output_dir: Path, result: RunResult) -> None:
    values = dataclasses.asdict(result) | {"output_dir": str(output_dir)}
    for key in (
        "losses",
        "grad_norms",
    ):  # of a step left out they may be no numbers, which JSON has no word for
        values[key] = [number if math.isfinite(number) else None for number in values[key]]
    files.write_json(output_dir / output.FINISHED, values)


def _result(stage: Stage, output_dir: Path) -> RunResult:
    return RunResult(
        stage=stage.config.stage,
        output_dir=output_dir,
        losses=stage.losses,
        grad_norms=stage.grad_norms,
        seconds=stage.totals.seconds,
        samples_seen=stage.totals.samples,
        skipped=dict(sorted(stage.totals.skipped.items())),
        num_truncated=stage.totals.truncated,
    )


def _release(model: InfiMMHD) -> None:
    """Gives the weights storage of their own; after ZeRO 1 and 2 they are views of DeepSpeed's buffers."""
    for parameter in model.parameters():
        parameter.grad = None
        parameter.data = parameter.data.clone()

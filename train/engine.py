"""The training loop of one stage on a DeepSpeed engine."""

import collections
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model import ImageProcessor, InfiMMHD, InfiMMHDConfig, preset, presets

from . import checkpoint, distributed
from .batch import RowEncoder, StepData, StepReader, prefetched
from .config import PARTS, TrainConfig, deepspeed_dict, nearest_name
from .data import Dataset, build_dataset
from .distributed import Ranks, deepspeed
from .optim import build_optimizer, build_schedule, learning_rate
from .progress import Progress

HOST_ARGUMENTS = ("windows_per_image", "images_per_sample")
"""Counts that the model reads on the host."""


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
    """Samples left out, by reason (`data.on_bad_sample=skip`)."""
    num_truncated: int
    """Samples cut at `data.sequence_length`."""


def run(
    config: TrainConfig,
    *,
    dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: InfiMMHD | None = None,
) -> RunResult:
    """Trains one stage and writes `config.output_dir` (see `train.checkpoint`); every rank calls it.

    `dataset`, `tokenizer` and `model` take the place of what `config.data`, `config.init_from` and
    `config.model` would load. `model` is trained in place (with ZeRO 3 it stays partitioned: load the result
    from `output_dir`). Stages may follow each other in one process. The loss is the sum of the cross
    entropies of the answer tokens over the number of them, in the global batch of all ranks and accumulation
    steps.

    Before anything is built, rank 0 checks `output_dir`: what stands in it under the names that a stage
    writes must be an earlier stage's, and is replaced. ValueError for a config that does not fit the data,
    the model or the number of ranks, and for a bad sample; FloatingPointError, naming the step, for a loss or
    gradient that is not finite."""
    if model is None and config.init_from is None:
        _check_random_frozen(config)
    output_dir = Path(config.output_dir)
    ranks = distributed.start()
    ranks.check_on_first(lambda: checkpoint.check_output_dir(output_dir))
    settings = deepspeed_dict(config, ranks.world_size, overlap_comm=ranks.device.type == "cuda")
    dataset = build_dataset(config.data) if dataset is None else dataset
    tokenizer = _load_tokenizer(config) if tokenizer is None else tokenizer
    model = _build_model(config) if model is None else model
    vocab_size = model.config.language["vocab_size"]
    if len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer must have at most the model's {vocab_size} tokens, got {len(tokenizer)}")
    longest = model.language.config.max_position_embeddings
    if config.data.sequence_length > longest:
        rule = f"be at most the LLM's max_position_embeddings {longest}"
        raise ValueError(f"data.sequence_length must {rule}, got {config.data.sequence_length}")
    model.set_window_size(config.image.window_size)
    model.set_trainable(config.trainable)
    model.gradient_checkpointing = config.gradient_checkpointing
    model.train()

    optimizer = build_optimizer(model, config.optimizer, ranks.device)
    schedule = build_schedule(optimizer, config.optimizer, config.schedule)
    reader = _reader(config, model, dataset, tokenizer, ranks)

    if ranks.rank == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(output_dir / "config.json", config.to_dict())
        checkpoint.write_json(output_dir / "deepspeed.json", settings)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings, dist_init_required=False
    )
    stage = _Stage(config, engine, model, reader, ranks)
    try:
        result = stage.train(output_dir)
        state = {"step": config.schedule.steps, "samples_seen": result.samples_seen}
        checkpoint.save(engine, model, tokenizer, output_dir, ranks, state)
    finally:
        engine.destroy()
        _release(model)
    return result


def _release(model: InfiMMHD) -> None:
    """Gives the weights storage of their own; after ZeRO 1 and 2 they are views of DeepSpeed's buffers."""
    for parameter in model.parameters():
        parameter.grad = None
        parameter.data = parameter.data.clone()


def _check_random_frozen(config: TrainConfig) -> None:
    frozen = [part for part in PARTS if part not in config.trainable]
    if frozen and not config.model.allow_random_frozen:
        raise ValueError(
            f"init_from must name a model whose frozen parts ({', '.join(frozen)}) are trained, got None; "
            "model.allow_random_frozen=true freezes random weights"
        )


def _build_model(config: TrainConfig) -> InfiMMHD:
    if config.init_from is not None:
        return checkpoint.load_model(config.init_from)
    name, options = config.model.preset, config.model.options
    if name not in presets():
        nearest = nearest_name(name, presets())
        raise ValueError(
            f"model.preset must be one of {', '.join(presets())}, got {name!r}; did you mean {nearest!r}?"
        )
    torch.manual_seed(config.seed)
    try:
        return InfiMMHD(InfiMMHDConfig.from_dict(_merged(preset(name).to_dict(), options)))
    except ValueError as error:
        raise ValueError(f"model.options must fit preset {name!r}, got {options}: {error}") from error


def _merged(values: dict[str, Any], options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    nested = {}
    for key in options:
        if isinstance(values.get(key), dict):
            if not isinstance(options[key], dict):
                raise ValueError(f"{prefix}{key} must be an object, got {options[key]!r}")
            nested[key] = _merged(values[key], options[key], f"{prefix}{key}.")
    return values | options | nested


def _load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    if config.data.tokenizer is not None:
        return checkpoint.load_tokenizer(config.data.tokenizer)
    if config.init_from is not None:
        return checkpoint.load_tokenizer(checkpoint.model_folder(config.init_from))
    raise ValueError("data.tokenizer must be a folder with a saved tokenizer, got None and no init_from")


def _reader(
    config: TrainConfig, model: InfiMMHD, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, ranks: Ranks
) -> StepReader:
    image, data = config.image, config.data
    encoder = RowEncoder(
        tokenizer,
        ImageProcessor(
            window_size=image.window_size, mode=image.mode, max_windows_per_side=image.max_windows_per_side
        ),
        prompt=data.prompt,
        sequence_length=data.sequence_length,
        image_token_id=model.config.image_token_id,
        end_token_id=model.config.end_of_chunk_token_id,
    )
    return StepReader(
        dataset,
        encoder,
        data,
        seed=config.seed,
        global_batch_size=config.parallel.global_batch_size,
        micro_batch_size=config.parallel.micro_batch(ranks.world_size),
        pad_token_id=model.config.pad_token_id,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


class _Stage:
    """One stage's loop: read, step, log."""

    def __init__(
        self,
        config: TrainConfig,
        engine: deepspeed.DeepSpeedEngine,
        model: InfiMMHD,
        reader: StepReader,
        ranks: Ranks,
    ) -> None:
        self.config, self.engine, self.model, self.reader, self.ranks = config, engine, model, reader, ranks

    def train(self, output_dir: Path) -> RunResult:
        config, steps = self.config, self.config.schedule.steps
        losses, grad_norms = [], []
        samples_seen = num_truncated = 0
        skipped: collections.Counter[str] = collections.Counter()
        progress = Progress(config, output_dir / "log.jsonl", enabled=self.ranks.rank == 0)
        start = time.perf_counter()
        with progress:
            for step, data in enumerate(prefetched(self._read, range(steps), config.data.workers), start=1):
                num_answer_tokens, num_samples, cut, num_skipped = self._agree(step, data)
                loss, grad_norm = self._step(step, data.micro_batches, num_answer_tokens)
                losses.append(loss)
                grad_norms.append(grad_norm)
                skipped += data.skipped
                samples_seen += num_samples
                num_truncated += cut
                progress.step(
                    step=step,
                    loss=loss,
                    lr=learning_rate(step, config.optimizer, config.schedule),
                    grad_norm=grad_norm,
                    num_answer_tokens=num_answer_tokens,
                    samples_seen=samples_seen,
                    num_skipped=num_skipped,
                    num_truncated=cut,
                    seconds=time.perf_counter() - start,
                )
            seconds = time.perf_counter() - start
            by_rank: list[Any] = [None] * self.ranks.world_size
            torch.distributed.all_gather_object(by_rank, skipped)
            total = sum(by_rank, collections.Counter())
            progress.finish(samples_seen, total, num_truncated)
        return RunResult(
            stage=config.stage,
            output_dir=output_dir,
            losses=losses,
            grad_norms=grad_norms,
            seconds=seconds,
            samples_seen=samples_seen,
            skipped=dict(total),
            num_truncated=num_truncated,
        )

    def _read(self, step: int) -> StepData | Exception:
        try:
            return self.reader(step)
        except Exception as error:  # kept for `_agree`: raised here, it would leave the other ranks waiting
            return error

    def _agree(self, step: int, data: StepData | Exception) -> tuple[int, int, int, int]:
        """Sums the step's counts over the ranks; raises on all of them if one of them cannot go on."""
        failed = isinstance(data, Exception)
        counts = [0] * 4
        if not failed:
            counts = [data.num_answer_tokens, data.num_samples, data.num_truncated, data.skipped.total()]
        *counts, num_failed = map(int, self.ranks.sum([*counts, int(failed)]))
        if failed:
            raise data
        if num_failed:
            raise ValueError(
                f"data must be good on every rank, got a failure elsewhere at step {step} (see above)"
            )
        if counts[0] == 0:
            raise ValueError(f"the global batch must hold an answer token, got none at step {step}")
        return tuple(counts)

    def _step(
        self, step: int, micro_batches: list[dict[str, Tensor]], num_answer_tokens: int
    ) -> tuple[float, float]:
        """One optimizer step: (loss of the global batch, gradient norm before clipping)."""
        device, loss_sum = self.ranks.device, 0.0
        for micro_step, batch in enumerate(micro_batches, start=1):
            batch = {key: t if key in HOST_ARGUMENTS else t.to(device) for key, t in batch.items()}
            out = self.engine(**batch, num_answer_tokens=num_answer_tokens)
            # The loss is a share of the global mean, so shares add up; DeepSpeed averages gradients over the
            # ranks.
            self.engine.backward(out.loss * self.ranks.world_size, scale_wrt_gas=False)
            loss_sum += float(out.loss_sum)
            if micro_step == len(micro_batches):
                loss = self.ranks.sum([loss_sum])[0] / num_answer_tokens
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"loss must be finite, got {loss} at step {step} of {self.config.stage}"
                    )
                local_norm = self._unpartitioned_norm()
            self.engine.step()
        grad_norm = self.engine.get_global_grad_norm() if local_norm is None else local_norm
        grad_norm = float(grad_norm)
        # with fp16 DeepSpeed skips such a step and lowers the loss scale
        if not math.isfinite(grad_norm) and self.config.parallel.precision != "fp16":
            raise FloatingPointError(
                f"gradient norm must be finite, got {grad_norm} at step {step} of {self.config.stage}"
            )
        return loss, grad_norm

    def _unpartitioned_norm(self) -> float | None:
        """The gradient norm where DeepSpeed keeps none: stage 0, whose gradients are whole on each rank."""
        if self.config.parallel.zero_stage > 0:
            return None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

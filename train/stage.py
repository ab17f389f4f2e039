"""The loop of one stage: read, agree, step, log, save."""

import collections
import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import InfiMMHD

from . import checkpoint, reshape
from .batch import StepData, StepReader, prefetched
from .checkpoint import Checkpoints
from .config import TrainConfig
from .data import SkipLimit
from .distributed import Ranks, deepspeed
from .flops import StepFlops
from .gpus import peak_flops
from .guard import StepGuard
from .interrupt import Interrupted, StopSignals
from .optim import LearningRate
from .watch import Progress, StepRecord
from .watch.gates import gate_parameters, gate_values, memory_bytes

HOST_ARGUMENTS = ("windows_per_image", "images_per_sample")
"""Counts that the model reads on the host."""


@dataclasses.dataclass(slots=True)
class Agreement:
    """The counts of one step over all ranks."""

    answer_tokens: int
    samples: int
    truncated: int
    skipped: int
    images: int
    windows: int
    tokens: int
    flops: int
    """Operations of the model's mathematics, on all ranks; 0 where no peak is known to compare them with."""
    signal: int
    """The signal that asked a rank to stop, or 0."""


@dataclasses.dataclass(slots=True)
class Totals:
    """What the stage has done so far; a checkpoint holds it."""

    samples: int = 0
    """Samples trained on."""
    truncated: int = 0
    updates: int = 0
    """Steps that changed the weights."""
    seconds: float = 0.0
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Samples left out, by reason."""


class Stage:
    """One stage on one rank."""

    def __init__(
        self,
        config: TrainConfig,
        engine: deepspeed.DeepSpeedEngine,
        optimizer: torch.optim.Optimizer,
        model: InfiMMHD,
        reader: StepReader,
        checkpoints: Checkpoints,
        ranks: Ranks,
        *,
        frozen_checksum: int,
    ) -> None:
        self.config, self.engine, self.optimizer, self.model = config, engine, optimizer, model
        self.reader, self.checkpoints, self.ranks = reader, checkpoints, ranks
        self.frozen_checksum = frozen_checksum
        self.learning_rate = LearningRate(optimizer, config.optimizer, config.schedule)
        self.guard = StepGuard(config.guard, optimizer, self._grad_norm)
        self.skip_limit = SkipLimit(config.data.max_skipped_share)
        self.flops = StepFlops(model.config, config.trainable, config.gradient_checkpointing)
        on_gpu = ranks.device.type == "cuda"
        name = torch.cuda.get_device_name(ranks.device) if on_gpu else "CPU"
        self.peak_flops = peak_flops(name, config.parallel.precision)
        self.step, self.totals = 0, Totals()
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self._whole_norm: float | None = None

    def train(self, progress: Progress) -> None:
        """Every step from `self.step` + 1 on. `Interrupted` after a signal, with the state saved."""
        steps = self.config.schedule.steps
        reading = prefetched(self._read, range(self.step, steps), self.config.data.workers)
        start = time.perf_counter() - self.totals.seconds
        with StopSignals() as signals:
            for data in reading:
                agreed = self._agree(data, signals.received)
                self._take_step(data, agreed, progress, start)
                if self.checkpoints.is_due(self.step, steps) or agreed.signal:
                    progress.sync()  # no checkpoint is ahead of its log
                    self.save()
                    progress.event("checkpoint", step=self.step)
                if agreed.signal:
                    raise Interrupted(f"stopped by signal {agreed.signal} at step {self.step}", agreed.signal)
        self._check_nothing_lost()

    def _take_step(self, data: StepData, agreed: Agreement, progress: Progress, start: float) -> None:
        config, totals = self.config, self.totals
        rate = self.learning_rate.set(self.engine.optimizer, self.step + 1)
        loss, grad_norm, left_out = self._update(data.micro_batches, agreed.answer_tokens)
        self.step += 1
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        self._count(data, agreed, left_out, progress)
        elapsed = time.perf_counter() - start
        seconds, totals.seconds = elapsed - totals.seconds, elapsed
        shows_gates = self.step % config.log_interval == 0 or self.step in (1, config.schedule.steps)
        record = StepRecord(
            step=self.step,
            loss=loss,
            lr=rate,
            grad_norm=grad_norm,
            num_answer_tokens=agreed.answer_tokens,
            samples_seen=totals.samples,
            num_skipped=agreed.skipped,
            num_truncated=agreed.truncated,
            images=agreed.images,
            windows=agreed.windows,
            tokens=agreed.tokens,
            imbalance=data.imbalance,
            skipped_step=left_out,
            gates=self._gates() if shows_gates else None,
            step_seconds=seconds,
            mfu=self._mfu(agreed.flops, seconds),
            memory_bytes=memory_bytes(self.ranks.device),
        )
        progress.step(record)

    def _count(self, data: StepData, agreed: Agreement, left_out: str | None, progress: Progress) -> None:
        """Adds the step to the totals; every sample of the global batch is trained on or has a reason."""
        skipped: list[tuple[str, str]] = []
        if agreed.skipped:
            skipped = [item for share in self.ranks.gather_objects(data.skipped) for item in share]
        self.totals.skipped.update(reason for reason, _ in skipped)
        self.totals.truncated += agreed.truncated
        if left_out is None:
            self.totals.samples += agreed.samples
            self.totals.updates += 1
        elif agreed.samples:
            self.totals.skipped[f"{left_out}_step"] += agreed.samples
        progress.skipped_samples(self.step, skipped)
        self.skip_limit.add(skipped, agreed.samples)

    def _check_nothing_lost(self) -> None:
        read = self.step * self.config.parallel.global_batch_size
        accounted = self.totals.samples + self.totals.skipped.total()
        if read != accounted:
            raise RuntimeError(
                f"samples read must be trained on or counted as left out, got {read} and {accounted}"
            )

    def _read(self, step: int) -> StepData | Exception:
        try:
            return self.reader(step)
        except Exception as error:  # kept for `_agree`: raised here, it would leave the other ranks waiting
            return error

    def _agree(self, data: StepData | Exception, signal_number: int) -> Agreement:
        """Sums the step's counts over the ranks; raises on all of them if one of them cannot go on."""
        failed = isinstance(data, Exception)
        counts, checksum = [0] * 8, 0
        if not failed:
            counts = [data.num_answer_tokens, data.num_samples, data.num_truncated, len(data.skipped)]
            counts += [data.num_images, data.num_windows, data.num_tokens, self._flops(data)]
            checksum = data.plan_checksum
        by_rank = self.ranks.gather([*counts, signal_number, int(failed), checksum])
        *sums, num_failed, _ = (int(sum(column)) for column in zip(*by_rank, strict=True))
        if failed:
            raise data
        step = self.step + 1
        if num_failed:
            raise ValueError(
                f"data must be good on every rank, got a failure elsewhere at step {step} (see above)"
            )
        if len({row[-1] for row in by_rank}) > 1:
            raise ValueError(
                f"data must look the same from every rank, got other image sizes or samples at step {step}"
            )
        sums[-1] = int(max(row[8] for row in by_rank))
        return Agreement(*sums)

    def _update(
        self, micro_batches: list[dict[str, Tensor]], num_answer_tokens: int
    ) -> tuple[float, float, str | None]:
        """One optimizer step: (loss of the global batch, norm before clipping, why it was left out)."""
        if num_answer_tokens == 0:  # every sample was bad, on every rank
            return math.nan, math.nan, "empty"
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
                self.guard.begin(loss)
                self._whole_norm = self._unpartitioned_norm()
            self.engine.step()
        overflow = bool(getattr(self.engine.optimizer, "overflow", False))
        fp16 = self.config.parallel.precision == "fp16"
        try:
            norm, left_out = self.guard.end(overflow=overflow, finds_scale=fp16)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} at step {self.step + 1} of {self.config.stage}") from None
        return loss, norm, left_out

    def _grad_norm(self) -> float:
        """Of the whole gradient before clipping, asked for when DeepSpeed has reduced it."""
        return (
            float(self.engine.optimizer._global_grad_norm) if self._whole_norm is None else self._whole_norm
        )

    def _unpartitioned_norm(self) -> float | None:
        """The norm where DeepSpeed keeps none: stage 0, whose gradients are whole on each rank."""
        if self.config.parallel.zero_stage > 0:
            return None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _gates(self) -> dict[int, tuple[float, float]]:
        if not self.model.is_gated:
            return {}
        partitioned = self.config.parallel.zero_stage == 3
        with deepspeed.zero.GatheredParameters(gate_parameters(self.model), enabled=partitioned):
            return gate_values(self.model)

    def _flops(self, data: StepData) -> int:
        if self.peak_flops is None:
            return 0
        return sum(self.flops.of_batch(batch, recomputed=False) for batch in data.micro_batches)

    def _mfu(self, flops: int, seconds: float) -> float | None:
        if self.peak_flops is None:
            return None
        return flops / (seconds * self.peak_flops * self.ranks.world_size)

    def save(self) -> Path:
        """Writes a checkpoint of the step just done."""
        trainable = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters() if p.requires_grad)
        num_bytes = trainable * 16  # fp32 weight and two moments, and the weight as the model holds it

        def write(folder: Path) -> None:
            self.engine.save_checkpoint(
                str(folder),
                tag=checkpoint.STATE,
                save_latest=False,
                exclude_frozen_parameters=True,
                client_state={"universal_checkpoint_info": {}},
            )
            checkpoint.write_generators(folder, self.ranks)
            if self.ranks.rank == 0:
                checkpoint.write_trainer(folder, self._state(), self.losses, self.grad_norms)

        return self.checkpoints.save(self.step, num_bytes, write)

    def _state(self) -> dict[str, Any]:
        totals = dataclasses.asdict(self.totals) | {"skipped": dict(self.totals.skipped)}
        return {
            "step": self.step,
            "world_size": self.ranks.world_size,
            "zero_stage": self.config.parallel.zero_stage,
            "offload": self.config.parallel.offload,
            "frozen_checksum": self.frozen_checksum,
            "dataset_length": len(self.reader.dataset),
            "totals": totals,
            "guard": self.guard.state_dict(),
            "skip_limit": self.skip_limit.state_dict(),
        }

    def load(self, folder: Path) -> None:
        """Goes on from the checkpoint in `folder`; ValueError if weights or data are not those of its run."""
        state = self.ranks.on_first(lambda: checkpoint.read_trainer(folder))
        same = {
            "frozen_checksum": (self.frozen_checksum, "the frozen weights and the model's shapes"),
            "dataset_length": (len(self.reader.dataset), "the dataset"),
        }
        for key, (value, what) in same.items():
            if state[key] != value:
                rule = f"{what} must be those of checkpoint {folder.name}"
                raise ValueError(f"{rule}, got {key} {value} in place of {state[key]}")
        topology = {
            "world_size": self.ranks.world_size,
            "zero_stage": self.config.parallel.zero_stage,
            "offload": self.config.parallel.offload,
        }
        if all(state[key] == value for key, value in topology.items()):
            self.engine.load_checkpoint(
                str(folder), tag=checkpoint.STATE, load_module_strict=False, load_lr_scheduler_states=False
            )
        else:
            scratch = folder.parent / f".{folder.name}.universal"
            reshape.load(
                self.engine,
                self.optimizer,
                folder / checkpoint.STATE,
                zero_stage=state["zero_stage"],
                num_updates=state["totals"]["updates"],
                scratch=scratch,
                ranks=self.ranks,
            )
            self.ranks.check_on_first(lambda: shutil.rmtree(scratch, ignore_errors=True))
        self.step = state["step"]
        self.totals = Totals(**state["totals"] | {"skipped": collections.Counter(state["totals"]["skipped"])})
        self.guard.load_state_dict(state["guard"])
        self.skip_limit.load_state_dict(state["skip_limit"])
        self.losses, self.grad_norms = checkpoint.read_history(folder)
        checkpoint.read_generators(folder, self.ranks)

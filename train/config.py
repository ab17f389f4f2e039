"""Configuration of a stage: dataclasses whose limits are checked when they are made, JSON in and out.

The module imports no torch, so that a wrong key is answered at once."""

import dataclasses
from typing import Any, Literal

from .fields import (
    build,
    is_number,
    nearest_name,
    plain,
    require,
    require_choice,
    require_int,
    require_path,
)

PARTS = ("vision", "gated_cross_attention", "language")
"""Parts of the model that a stage trains or freezes, as `model.InfiMMHD` names them."""

MAX_SEED = 2**63 - 1


def _require_part(field: str, part: object) -> None:
    if part not in PARTS:
        rule, nearest = f"name parts of the model ({', '.join(PARTS)})", nearest_name(str(part), list(PARTS))
        raise ValueError(f"{field} must {rule}, got {part!r}; did you mean {nearest!r}?")


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model to build when `init_from` names none."""

    preset: str = "infimm_hd_13b"
    """Name known to `model.preset`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the preset to replace, nested as in the model's config.json."""
    allow_random_frozen: bool = False
    """Freeze parts that no weights were loaded for. They never learn: only for trying the machinery."""


@dataclasses.dataclass(kw_only=True, slots=True)
class ImageConfig:
    """How images become windows (`model.ImageProcessor`)."""

    window_size: int = 448
    """Side of a window in pixels; the ViT's position table is interpolated to it before the stage."""
    mode: Literal["single", "dynamic"] = "single"
    """One window an image, or as many as its size asks for and a thumbnail."""
    max_windows_per_side: int = 3
    """Limit in "dynamic": 3 windows of 448 are the paper's 1344 pixels."""

    def __post_init__(self) -> None:
        require_int(self, "image.", {"window_size": 1, "max_windows_per_side": 1})
        require_choice(self, "image.", "mode")


@dataclasses.dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is read, and how samples become token rows."""

    name: str = "conversations"
    """A dataset of `train.data.DATASETS`."""
    path: str | None = None
    """File of the dataset: records, a manifest, shards ("{000..010}.tar", with * and ?)."""
    image_root: str | None = None
    """Folder the records' image paths start from (default: the file's own)."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further keyword arguments of the dataset."""
    tokenizer: str | None = None
    """Folder of a transformers tokenizer (default: the one saved with `init_from`'s model)."""
    prompt: Literal["vicuna_v1", "plain"] = "vicuna_v1"
    sequence_length: int = 128
    """Longest token row; a longer sample is cut on the right."""
    shuffle: bool = True
    """False reads in the dataset's order, every epoch."""
    on_bad_sample: Literal["skip", "error"] = "skip"
    """"skip" leaves a bad sample out, and counts, logs and prints it by reason; "error" stops the run."""
    max_skipped_share: float = 0.1
    """With "skip": the run stops when more than this share of the samples is bad, after the first 100."""
    balance: Literal["windows", "none"] = "windows"
    """"windows" deals the samples of a global batch so that every forward has about as many windows; "none"
    deals them in the order of reading."""
    workers: int = 0
    """Threads that prepare batches ahead; 0 prepares them between the steps."""

    def __post_init__(self) -> None:
        require_int(self, "data.", {"sequence_length": 2, "workers": 0})
        require_choice(self, "data.", "prompt")
        require_choice(self, "data.", "on_bad_sample")
        require_choice(self, "data.", "balance")
        share = self.max_skipped_share
        require(is_number(share) and 0 <= share <= 1, "data.max_skipped_share", "lie in 0..1", share)
        require_path(self, "data.", "path", "image_root", "tokenizer")


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, its learning rates and gradient clipping."""

    lr_peak: float = 1e-5
    lr_min: float = 1e-6
    """Where the cosine ends; equal to `lr_peak` it keeps the rate constant after the warm-up."""
    lr_scale: dict[str, float] = dataclasses.field(default_factory=dict)
    """Multiplier of the learning rate by part of the model (`PARTS`)."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-5
    weight_decay: float = 0.1
    """Of matrices; vectors (biases, norms, gates, CLS) and the position table do not decay."""
    clip: float = 1.0
    """Largest L2 norm of the whole gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        require(
            is_number(self.lr_peak) and self.lr_peak > 0, "optimizer.lr_peak", "be positive", self.lr_peak
        )
        within = is_number(self.lr_min) and 0 <= self.lr_min <= self.lr_peak
        require(within, "optimizer.lr_min", f"lie in 0..lr_peak {self.lr_peak}", self.lr_min)
        for part, scale in self.lr_scale.items():
            _require_part("optimizer.lr_scale", part)
            require(is_number(scale) and scale > 0, f"optimizer.lr_scale.{part}", "be positive", scale)
        legal = len(self.betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        require(legal, "optimizer.betas", "be two numbers in [0, 1)", self.betas)
        require(is_number(self.eps) and self.eps > 0, "optimizer.eps", "be positive", self.eps)
        for field in ("weight_decay", "clip"):
            value = getattr(self, field)
            require(is_number(value) and value >= 0, f"optimizer.{field}", "be at least 0", value)


@dataclasses.dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Optimizer steps of the stage; the learning rate rises linearly over the first `warmup_steps`."""

    steps: int = 8000
    warmup_steps: int = 400

    def __post_init__(self) -> None:
        require_int(self, "schedule.", {"steps": 1, "warmup_steps": 0})
        rule = f"be at most schedule.steps {self.steps}"
        require(self.warmup_steps <= self.steps, "schedule.warmup_steps", rule, self.warmup_steps)


@dataclasses.dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Batch arithmetic, precision and ZeRO."""

    global_batch_size: int = 256
    """Samples of one optimizer step over all ranks and accumulation steps."""
    max_micro_batch_size: int | None = None
    """Most samples of one forward on one rank; None takes a rank's whole share at once."""
    gradient_accumulation_steps: int | None = None
    """None: as few as `max_micro_batch_size` allows on the ranks at hand. A number is taken as it is."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = "none"
    """What DeepSpeed keeps in the host's memory; the optimizer from ZeRO 1 on, parameters with ZeRO 3."""
    precision: Literal["fp32", "bf16", "fp16", "bf16_autocast"] = "bf16"
    """"bf16" and "fp16" compute in half precision and keep fp32 weights in the optimizer; "bf16_autocast"
    keeps the model itself in fp32 and computes under torch.autocast."""

    def __post_init__(self) -> None:
        require_int(self, "parallel.", {"global_batch_size": 1})
        for field in ("max_micro_batch_size", "gradient_accumulation_steps"):
            if getattr(self, field) is not None:
                require_int(self, "parallel.", {field: 1})
        for field in ("zero_stage", "offload", "precision"):
            require_choice(self, "parallel.", field)
        # DeepSpeed's stage 0 makes the fp32 copy's AdamW states with an extra step of zero gradients, which
        # decays the weights once more and shifts the bias correction: the training is measurably another one
        legal = self.zero_stage > 0 or self.precision not in ("bf16", "fp16")
        rule = "be 'fp32' or 'bf16_autocast' with parallel.zero_stage 0"
        require(legal, "parallel.precision", rule, self.precision)
        least = {"none": 0, "optimizer": 1, "optimizer_and_parameters": 3}[self.offload]
        rule = f"be 'none' with parallel.zero_stage {self.zero_stage} (it needs {least})"
        require(self.zero_stage >= least, "parallel.offload", rule, self.offload)

    def micro_batch(self, world_size: int) -> int:
        """Samples of one forward on one of `world_size` ranks; ValueError if the batch cannot be split so."""
        steps = self.gradient_accumulation_steps
        split = f"{world_size} ranks" + ("" if steps is None else f" x {steps} gradient_accumulation_steps")
        legal = self.global_batch_size % (world_size * (steps or 1)) == 0
        require(legal, "parallel.global_batch_size", f"be a multiple of {split}", self.global_batch_size)
        share = self.global_batch_size // world_size
        if steps is not None:
            return share // steps
        largest = min(share, self.max_micro_batch_size or share)
        return next(size for size in range(largest, 0, -1) if share % size == 0)

    def accumulation_steps(self, world_size: int) -> int:
        """Forwards of one rank in one optimizer step."""
        return self.global_batch_size // (world_size * self.micro_batch(world_size))


@dataclasses.dataclass(kw_only=True, slots=True)
class GuardConfig:
    """Which optimizer steps are left out, and how many may be."""

    max_skipped_steps: int = 10
    """A stage stops with an error when it leaves out more: loss or gradient not finite, or a spike. The
    overflows with which fp16 finds its loss scale do not count."""
    spike_sigmas: float | None = None
    """Leave out a step whose loss or gradient norm exceeds the mean of the last `window` steps by this many
    standard deviations; None leaves out none, as in the paper."""
    window: int = 100
    """Steps that the mean and deviation come from; no spike is seen before there are as many."""

    def __post_init__(self) -> None:
        require_int(self, "guard.", {"max_skipped_steps": 0, "window": 2})
        sigmas = self.spike_sigmas
        legal = sigmas is None or (is_number(sigmas) and sigmas > 0)
        require(legal, "guard.spike_sigmas", "be positive or none", sigmas)


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When the state of the run is written, what is kept, and whether a run goes on from it."""

    every_steps: int | None = 1000
    """None writes one at the end of the stage only, and when the run is told to stop."""
    keep_last: int = 2
    """Checkpoints kept, the newest ones."""
    keep_every_steps: int | None = None
    """Keep every checkpoint at a multiple of this too."""
    resume: bool = True
    """Go on from the newest undamaged checkpoint in `output_dir`. False begins the stage anew and removes
    the checkpoints there."""

    def __post_init__(self) -> None:
        require_int(self, "checkpoint.", {"keep_last": 1})
        for field in ("every_steps", "keep_every_steps"):
            if getattr(self, field) is not None:
                require_int(self, "checkpoint.", {field: 1})


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainConfig:
    """One stage of training."""

    stage: str
    """Name in logs and of the default output folder."""
    trainable: tuple[str, ...]
    """Parts of the model (`PARTS`) that learn; the others stay as they are, bit for bit."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward instead of keeping them."""
    seed: int = 0
    """Of the sample order, and of the weights when none are loaded."""
    init_from: str | None = None
    """Output folder of the stage before (or a folder made by `save_pretrained`)."""
    output_dir: str = "runs/stage"
    """A new folder, or that of an earlier run, which goes on or is replaced (see `checkpoint.resume`)."""
    log_interval: int = 10
    """Steps between readings of the gates, and between the lines printed where there is no terminal."""
    tensorboard: bool = True
    """Write TensorBoard's files beside log.jsonl."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    image: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        require(bool(self.stage), "stage", "be a name", self.stage)
        require(len(self.trainable) > 0, "trainable", "name at least one part", self.trainable)
        for part in self.trainable:
            _require_part("trainable", part)
        require_int(self, "", {"seed": 0, "log_interval": 1})
        require(self.seed <= MAX_SEED, "seed", f"be at most {MAX_SEED} (2^63 - 1)", self.seed)
        require(self.output_dir is not None, "output_dir", "be a folder's name", self.output_dir)
        require_path(self, "", "output_dir", "init_from")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; tuples become lists, so that it equals what JSON gives back."""
        return plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`; an unknown key is a ValueError naming the nearest known one."""
        return build(cls, values, "")

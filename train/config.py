"""Configuration of a stage: dataclasses whose limits are checked when they are made, JSON in and out.

`deepspeed_dict` derives DeepSpeed's settings from a `TrainConfig`; nothing else in the project writes
them. The module imports no torch, so that a wrong key is answered at once."""

import copy
import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal

PARTS = ("vision", "gated_cross_attention", "language")
"""Parts of the model that a stage trains or freezes, as `model.InfiMMHD` names them."""

MAX_SEED = 2**63 - 1

ZERO_BUCKET_ELEMENTS = 50_000_000
"""Elements DeepSpeed reduces or gathers in one call. Its default, 500 million, allocates 2 GB of fp32 a step
even for a tiny model; 50 million still amortises the launch of a collective for the 13B model."""


def _require(condition: bool, field: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{field} must {rule}, got {value!r}")


def _require_int(owner: object, prefix: str, minimums: dict[str, int]) -> None:
    for field, minimum in minimums.items():
        value = getattr(owner, field)
        legal = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
        _require(legal, prefix + field, f"be an int of at least {minimum}", value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require_choice(owner: object, prefix: str, field: str) -> None:
    choices = typing.get_args(typing.get_type_hints(type(owner))[field])
    value = getattr(owner, field)
    _require(value in choices, prefix + field, f"be one of {', '.join(map(repr, choices))}", value)


def _require_part(field: str, part: object) -> None:
    if part not in PARTS:
        rule, nearest = f"name parts of the model ({', '.join(PARTS)})", nearest_name(str(part), list(PARTS))
        raise ValueError(f"{field} must {rule}, got {part!r}; did you mean {nearest!r}?")


def _require_path(owner: object, prefix: str, *fields: str) -> None:
    """An empty path would be the current folder, which nobody means by it."""
    for field in fields:
        value = getattr(owner, field)
        legal = value is None or (isinstance(value, str) and bool(value.strip()))
        _require(legal, prefix + field, "not be empty", value)


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
        _require_int(self, "image.", {"window_size": 1, "max_windows_per_side": 1})
        _require_choice(self, "image.", "mode")


@dataclasses.dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is read, and how samples become token rows."""

    name: str = "conversations"
    """A dataset of `train.data.DATASETS`."""
    path: str | None = None
    """For "conversations": the JSON-lines file."""
    image_root: str | None = None
    """For "conversations": folder the records' image paths start from (default: the file's own)."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further keyword arguments of the dataset."""
    tokenizer: str | None = None
    """Folder of a transformers tokenizer (default: the one saved with `init_from`'s model)."""
    prompt: Literal["vicuna_v1", "plain"] = "vicuna_v1"
    sequence_length: int = 128
    """Longest token row; a longer sample is cut on the right."""
    shuffle: bool = True
    """False reads in the dataset's order, every epoch."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """"skip" leaves a bad sample out, and counts, logs and prints it by reason."""
    workers: int = 0
    """Threads that prepare batches ahead; 0 prepares them between the steps."""

    def __post_init__(self) -> None:
        _require_int(self, "data.", {"sequence_length": 2, "workers": 0})
        _require_choice(self, "data.", "prompt")
        _require_choice(self, "data.", "on_bad_sample")
        _require_path(self, "data.", "path", "image_root", "tokenizer")


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
        _require(
            _is_number(self.lr_peak) and self.lr_peak > 0, "optimizer.lr_peak", "be positive", self.lr_peak
        )
        within = _is_number(self.lr_min) and 0 <= self.lr_min <= self.lr_peak
        _require(within, "optimizer.lr_min", f"lie in 0..lr_peak {self.lr_peak}", self.lr_min)
        for part, scale in self.lr_scale.items():
            _require_part("optimizer.lr_scale", part)
            _require(_is_number(scale) and scale > 0, f"optimizer.lr_scale.{part}", "be positive", scale)
        legal = len(self.betas) == 2 and all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        _require(legal, "optimizer.betas", "be two numbers in [0, 1)", self.betas)
        _require(_is_number(self.eps) and self.eps > 0, "optimizer.eps", "be positive", self.eps)
        for field in ("weight_decay", "clip"):
            value = getattr(self, field)
            _require(_is_number(value) and value >= 0, f"optimizer.{field}", "be at least 0", value)


@dataclasses.dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Optimizer steps of the stage; the learning rate rises linearly over the first `warmup_steps`."""

    steps: int = 8000
    warmup_steps: int = 400

    def __post_init__(self) -> None:
        _require_int(self, "schedule.", {"steps": 1, "warmup_steps": 0})
        rule = f"be at most schedule.steps {self.steps}"
        _require(self.warmup_steps <= self.steps, "schedule.warmup_steps", rule, self.warmup_steps)


@dataclasses.dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Batch arithmetic, precision and ZeRO."""

    global_batch_size: int = 256
    """Samples of one optimizer step over all ranks and accumulation steps."""
    gradient_accumulation_steps: int = 1
    micro_batch_size: int | None = None
    """Samples of one forward on one rank (default: what the other two and the number of ranks leave)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16", "fp16", "bf16_autocast"] = "bf16"
    """"bf16" and "fp16" compute in half precision and keep fp32 weights in the optimizer; "bf16_autocast"
    keeps the model itself in fp32 and computes under torch.autocast."""

    def __post_init__(self) -> None:
        _require_int(self, "parallel.", {"global_batch_size": 1, "gradient_accumulation_steps": 1})
        if self.micro_batch_size is not None:
            _require_int(self, "parallel.", {"micro_batch_size": 1})
        _require_choice(self, "parallel.", "zero_stage")
        _require_choice(self, "parallel.", "precision")
        # DeepSpeed's stage 0 makes the fp32 copy's AdamW states with an extra step of zero gradients, which
        # decays the weights once more and shifts the bias correction: the training is measurably another one
        legal = self.zero_stage > 0 or self.precision not in ("bf16", "fp16")
        rule = "be 'fp32' or 'bf16_autocast' with parallel.zero_stage 0"
        _require(legal, "parallel.precision", rule, self.precision)

    def micro_batch(self, world_size: int) -> int:
        """Samples of one forward on one of `world_size` ranks; ValueError if the batch cannot be split so."""
        shares = self.gradient_accumulation_steps * world_size
        split = f"gradient_accumulation_steps {self.gradient_accumulation_steps} x {world_size} ranks"
        if self.micro_batch_size is None:
            rule = f"be a multiple of {split}"
            _require(
                self.global_batch_size % shares == 0,
                "parallel.global_batch_size",
                rule,
                self.global_batch_size,
            )
            return self.global_batch_size // shares
        product = self.micro_batch_size * shares
        rule = f"be micro_batch_size {self.micro_batch_size} x {split} = {product}"
        _require(
            self.global_batch_size == product, "parallel.global_batch_size", rule, self.global_batch_size
        )
        return self.micro_batch_size


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
    """A new folder, or the output of an earlier run, which is replaced (see `train.checkpoint`)."""
    log_interval: int = 10
    """Steps between the lines printed when the output is not a terminal."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    image: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        _require(bool(self.stage), "stage", "be a name", self.stage)
        _require(len(self.trainable) > 0, "trainable", "name at least one part", self.trainable)
        for part in self.trainable:
            _require_part("trainable", part)
        _require_int(self, "", {"seed": 0, "log_interval": 1})
        _require(self.seed <= MAX_SEED, "seed", f"be at most {MAX_SEED} (2^63 - 1)", self.seed)
        _require(self.output_dir is not None, "output_dir", "be a folder's name", self.output_dir)
        _require_path(self, "", "output_dir", "init_from")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; tuples become lists, so that it equals what JSON gives back."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`; an unknown key is a ValueError naming the nearest known one."""
        return _build(cls, values, "")


def nearest_name(name: str, known: list[str]) -> str:
    """The name of `known` that is most like `name`."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def deepspeed_dict(config: TrainConfig, world_size: int, *, overlap_comm: bool = False) -> dict[str, Any]:
    """DeepSpeed's settings for `config` on `world_size` ranks; ValueError if the batch cannot be split so.

    The optimizer and its schedule are objects of ours, so they are not in it. `overlap_comm` reduces
    gradients during the backward; it pays on a GPU, and on a CPU only takes cores from the computation."""
    parallel = config.parallel
    return {
        "train_batch_size": parallel.global_batch_size,
        "train_micro_batch_size_per_gpu": parallel.micro_batch(world_size),
        "gradient_accumulation_steps": parallel.gradient_accumulation_steps,
        "gradient_clipping": float(config.optimizer.clip),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": parallel.precision == "bf16"},
        "fp16": {"enabled": parallel.precision == "fp16"},
        # no "safe" modules: gradients are fp32 and are reduced in fp32
        "torch_autocast": {
            "enabled": parallel.precision == "bf16_autocast",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": overlap_comm,
            "reduce_bucket_size": ZERO_BUCKET_ELEMENTS,
            "allgather_bucket_size": ZERO_BUCKET_ELEMENTS,
        },
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _build(part: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'config'} must be a JSON object, got {values!r}")
    hints = typing.get_type_hints(part)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(
                f"key must be a field of the config, got {prefix + key!r}; "
                f"did you mean {prefix + nearest_name(key, list(hints))!r}?"
            )
        if dataclasses.is_dataclass(hints[key]):
            arguments[key] = _build(hints[key], value, f"{prefix}{key}.")
        else:
            arguments[key] = _typed(hints[key], value, prefix + key)
    missing = [
        field.name
        for field in dataclasses.fields(part)
        if field.name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{prefix + missing[0]} must be given, got a config without it")
    return part(**arguments)


_JSON_TYPES = {bool: "true or false", str: "a string", tuple: "a list", dict: "a JSON object"}


def _typed(hint: Any, value: Any, name: str) -> Any:
    """Checks the kinds whose limits no `__post_init__` checks; JSON's list becomes the tuple of the field."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    if value is None and type(None) in choices:
        return None
    kind = typing.get_origin(choices[0]) or choices[0]
    if kind in _JSON_TYPES:
        accepted = (list, tuple) if kind is tuple else kind
        _require(isinstance(value, accepted), name, f"be {_JSON_TYPES[kind]}", value)
    return tuple(value) if kind is tuple else copy.deepcopy(value)

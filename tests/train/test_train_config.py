"""Configs refuse what cannot work, survive JSON, and carry the paper's numbers."""

import dataclasses
import json
import math

import pytest

from model import preset
from model.infimm_hd import PARTS as MODEL_PARTS
from train.config import (
    PARTS,
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    ImageConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from train.overrides import override, parse_overrides
from train.recipes import CPT, DRA, IFT, PT, RECIPES, mra_finetune, mra_pretrain
from train.settings import deepspeed_dict

TABLE_8 = {
    # trainable, checkpointing, window, mode, row, betas, eps, lr peak, lr min, steps, warm-up, batch,
    # accumulation
    "PT": (("gated_cross_attention",), False, 224, "single", 32)
    + ((0.9, 0.95), 1e-8, 1e-4, 1e-4, 120_000, 6_000, 10_240, 2),
    "CPT": (("vision", "gated_cross_attention"), False, 448, "single", 128)
    + ((0.9, 0.999), 1e-5, 1e-5, 1e-6, 8_000, 400, 256, 1),
    "DRA": (("vision", "gated_cross_attention"), True, 448, "dynamic", 128)
    + ((0.9, 0.999), 1e-5, 1e-5, 1e-6, 8_000, 400, 256, 1),
    "IFT": (("gated_cross_attention", "language"), False, 448, "dynamic", 1024)
    + ((0.9, 0.999), 1e-5, 5e-6, 5e-7, 11_000, 550, 64, 2),
}


@pytest.mark.parametrize("name", TABLE_8)
def test_recipe_is_table_8(name):
    c = RECIPES[name]()
    assert c.stage == name
    assert (
        c.trainable,
        c.gradient_checkpointing,
        c.image.window_size,
        c.image.mode,
        c.data.sequence_length,
        c.optimizer.betas,
        c.optimizer.eps,
        c.optimizer.lr_peak,
        c.optimizer.lr_min,
        c.schedule.steps,
        c.schedule.warmup_steps,
        c.parallel.global_batch_size,
        c.parallel.accumulation_steps(32 if name == "IFT" else 64),
    ) == TABLE_8[name]
    assert (c.optimizer.weight_decay, c.optimizer.clip) == (0.1, 1.0)
    assert (c.parallel.zero_stage, c.parallel.precision) == (2, "bf16")
    assert c.image.window_size * c.image.max_windows_per_side == 1344 or c.image.mode == "single"
    for ranks in (1, 2, 8, 64):
        micro_batch, steps = c.parallel.micro_batch(ranks), c.parallel.accumulation_steps(ranks)
        assert micro_batch * steps * ranks == c.parallel.global_batch_size
        assert micro_batch <= c.parallel.max_micro_batch_size


def test_recipes_of_llava_hr():
    """Luo et al. 2024: rates 1e-3 and 2e-5, batches of 256 and 128; one epoch of 558k and 665k samples."""
    first, second = mra_pretrain(), mra_finetune()
    assert first.trainable == ("gated_cross_attention",) and second.trainable == PARTS
    assert (first.optimizer.lr_peak, second.optimizer.lr_peak) == (1e-3, 2e-5)
    sizes = [config.parallel.global_batch_size for config in (first, second)]
    assert sizes == [256, 128]
    assert [config.schedule.steps for config in (first, second)] == [558_128 // 256 + 1, 665_298 // 128]
    for config in (first, second):
        assert config.image.window_size == preset(config.model.preset).vision_config.input_size == 1024
        assert config.optimizer.lr_min == config.optimizer.weight_decay == 0.0
        assert config.schedule.warmup_steps == math.ceil(0.03 * config.schedule.steps)


def test_recipes_are_fresh():
    PT().optimizer.lr_scale["vision"] = 3.0
    assert PT().optimizer.lr_scale == {}


@pytest.mark.parametrize("recipe", [PT, CPT, DRA, IFT])
def test_json_round_trip(recipe):
    config = recipe()
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, lr_scale={"vision": 0.5})
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert values == config.to_dict()
    assert TrainConfig.from_dict(values) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScheduleConfig(steps=0), "schedule.steps must be an int of at least 1, got 0"),
        (lambda: ScheduleConfig(steps=True), "schedule.steps must be an int of at least 1, got True"),
        (
            lambda: ScheduleConfig(steps=5, warmup_steps=6),
            "schedule.warmup_steps must be at most schedule.steps 5",
        ),
        (lambda: OptimizerConfig(lr_peak=0.0), "optimizer.lr_peak must be positive, got 0.0"),
        (lambda: OptimizerConfig(lr_peak=float("nan")), "optimizer.lr_peak must be positive, got nan"),
        (lambda: OptimizerConfig(lr_peak=1e-5, lr_min=1e-4), "optimizer.lr_min must lie in 0..lr_peak 1e-05"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), "optimizer.betas must be two numbers in"),
        (lambda: OptimizerConfig(betas=(0.9,)), "optimizer.betas must be two numbers in"),
        (lambda: OptimizerConfig(eps=0), "optimizer.eps must be positive, got 0"),
        (lambda: OptimizerConfig(clip=-1.0), "optimizer.clip must be at least 0, got -1.0"),
        (
            lambda: OptimizerConfig(lr_scale={"vision": 0}),
            "optimizer.lr_scale.vision must be positive, got 0",
        ),
        (
            lambda: OptimizerConfig(lr_scale={"visoin": 0.5}),
            "optimizer.lr_scale must name parts of the model "
            "(vision, gated_cross_attention, language), got 'visoin'; did you mean 'vision'?",
        ),
        (lambda: ImageConfig(window_size=0), "image.window_size must be an int of at least 1, got 0"),
        (lambda: ImageConfig(mode="tiled"), "image.mode must be one of 'single', 'dynamic', got 'tiled'"),
        (lambda: DataConfig(sequence_length=1), "data.sequence_length must be an int of at least 2, got 1"),
        (lambda: DataConfig(on_bad_sample="ignore"), "data.on_bad_sample must be one of 'skip', 'error'"),
        (lambda: DataConfig(balance="tokens"), "data.balance must be one of 'windows', 'none', got 'tokens'"),
        (lambda: DataConfig(max_skipped_share=1.5), "data.max_skipped_share must lie in 0..1, got 1.5"),
        (
            lambda: DataConfig(max_skipped_share=float("nan")),
            "data.max_skipped_share must lie in 0..1, got nan",
        ),
        (lambda: DataConfig(max_skipped_share="all"), "data.max_skipped_share must lie in 0..1, got 'all'"),
        (lambda: DataConfig(workers=-1), "data.workers must be an int of at least 0, got -1"),
        (lambda: ParallelConfig(zero_stage=4), "parallel.zero_stage must be one of 0, 1, 2, 3, got 4"),
        (lambda: ParallelConfig(precision="int8"), "parallel.precision must be one of 'fp32'"),
        (
            lambda: ParallelConfig(zero_stage=0, precision="bf16"),
            "parallel.precision must be 'fp32' or 'bf16_autocast' with parallel.zero_stage 0, got 'bf16'",
        ),
        (
            lambda: ParallelConfig(global_batch_size=0),
            "parallel.global_batch_size must be an int of at least 1",
        ),
        (
            lambda: ParallelConfig(zero_stage=2, offload="optimizer_and_parameters"),
            "parallel.offload must be 'none' with parallel.zero_stage 2 (it needs 3)",
        ),
        (lambda: ParallelConfig(offload="disk"), "parallel.offload must be one of 'none', 'optimizer'"),
        (
            lambda: ParallelConfig(max_micro_batch_size=0),
            "parallel.max_micro_batch_size must be an int of at least 1, got 0",
        ),
        (lambda: GuardConfig(max_skipped_steps=-1), "guard.max_skipped_steps must be an int of at least 0"),
        (lambda: GuardConfig(spike_sigmas=0.0), "guard.spike_sigmas must be positive or none, got 0.0"),
        (lambda: GuardConfig(window=1), "guard.window must be an int of at least 2, got 1"),
        (lambda: CheckpointConfig(keep_last=0), "checkpoint.keep_last must be an int of at least 1, got 0"),
        (
            lambda: CheckpointConfig(every_steps=0),
            "checkpoint.every_steps must be an int of at least 1, got 0",
        ),
        (lambda: dataclasses.replace(PT(), trainable=()), "trainable must name at least one part"),
        (
            lambda: dataclasses.replace(PT(), trainable=("langauge",)),
            "trainable must name parts of the model "
            "(vision, gated_cross_attention, language), got 'langauge'; did you mean 'language'?",
        ),
        (lambda: dataclasses.replace(PT(), trainable=(3,)), "trainable must name parts of the model"),
        (lambda: dataclasses.replace(PT(), seed=-1), "seed must be an int of at least 0, got -1"),
        (
            lambda: dataclasses.replace(PT(), seed=2**63),
            "seed must be at most 9223372036854775807 (2^63 - 1), got 9223372036854775808",
        ),
        (lambda: dataclasses.replace(PT(), output_dir=""), "output_dir must not be empty, got ''"),
        (lambda: dataclasses.replace(PT(), output_dir=" "), "output_dir must not be empty, got ' '"),
        (lambda: dataclasses.replace(PT(), output_dir=None), "output_dir must be a folder's name, got None"),
        (lambda: dataclasses.replace(PT(), init_from=""), "init_from must not be empty, got ''"),
        (lambda: DataConfig(path=""), "data.path must not be empty, got ''"),
        (lambda: DataConfig(tokenizer=""), "data.tokenizer must not be empty, got ''"),
        (lambda: TrainConfig.from_dict({"stage": "a"}), "trainable must be given"),
        (lambda: TrainConfig.from_dict(PT().to_dict() | {"image": 3}), "image must be a JSON object, got 3"),
        (lambda: TrainConfig.from_dict(PT().to_dict() | {"sed": 3}), "got 'sed'; did you mean 'seed'"),
        (
            lambda: TrainConfig.from_dict(PT().to_dict() | {"gradient_checkpointing": "no"}),
            "gradient_checkpointing must be true or false, got 'no'",
        ),
        (
            lambda: TrainConfig.from_dict(PT().to_dict() | {"output_dir": 3}),
            "output_dir must be a string, got 3",
        ),
        (lambda: TrainConfig.from_dict(PT().to_dict() | {"trainable": "vision"}), "trainable must be a list"),
    ],
)
def test_limits_name_field_rule_and_value(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_parts_are_the_models():
    """The config knows the parts without importing the model, which would import torch."""
    assert PARTS == MODEL_PARTS
    TrainConfig(stage="all", trainable=MODEL_PARTS, seed=2**63 - 1)


def test_batch_arithmetic():
    config = ParallelConfig(global_batch_size=48, gradient_accumulation_steps=3)
    assert (config.micro_batch(4), config.accumulation_steps(4)) == (4, 3)
    with pytest.raises(
        ValueError, match="must be a multiple of 5 ranks x 3 gradient_accumulation_steps, got 48"
    ):
        config.micro_batch(5)
    with pytest.raises(ValueError, match="global_batch_size must be a multiple of 2 ranks, got 9"):
        ParallelConfig(global_batch_size=9, max_micro_batch_size=4).micro_batch(2)
    for most, size in ((1, 1), (4, 4), (5, 4), (12, 12), (99, 24), (None, 24)):
        config = ParallelConfig(global_batch_size=48, max_micro_batch_size=most)
        assert (config.micro_batch(2), config.accumulation_steps(2)) == (size, 24 // size)


def test_deepspeed_dict_says_what_the_config_says():
    config = override(
        PT(), {"parallel.zero_stage": 3, "parallel.precision": "bf16_autocast", "optimizer.clip": 0.5}
    )
    settings = deepspeed_dict(config, 64)
    json.dumps(settings)
    assert settings["train_batch_size"] == 10_240
    assert settings["train_micro_batch_size_per_gpu"] == 80
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 3
    enabled = {name: settings[name]["enabled"] for name in ("bf16", "fp16", "torch_autocast")}
    assert enabled == {"bf16": False, "fp16": False, "torch_autocast": True}
    with pytest.raises(ValueError, match="parallel.global_batch_size"):
        deepspeed_dict(config, 63)


@pytest.mark.parametrize(
    ("offload", "devices"),
    [("none", [None, None]), ("optimizer", ["cpu", None]), ("optimizer_and_parameters", ["cpu", "cpu"])],
)
def test_deepspeed_dict_offloads(offload, devices):
    config = override(DRA(), {"parallel.zero_stage": 3, "parallel.offload": offload})
    zero = deepspeed_dict(config, 1)["zero_optimization"]
    assert [zero.get(part, {}).get("device") for part in ("offload_optimizer", "offload_param")] == devices


def test_overrides_are_typed_by_their_fields():
    values = parse_overrides(
        [
            "optimizer.lr_peak=1e-3",
            "optimizer.betas=0.8, 0.9",
            "optimizer.lr_scale.vision=.5",
            "trainable=vision,language",
            "gradient_checkpointing=True",
            "parallel.zero_stage=1",
            "parallel.max_micro_batch_size=none",
            "init_from=runs/pt",
            "data.path=a=b.jsonl",
            'data.options={"split": "train"}',
            "data.options.number=3",
            "model.options.vision_config.num_layers=2",
        ]
    )
    config = override(DRA(), values)
    assert config.optimizer == OptimizerConfig(lr_peak=1e-3, betas=(0.8, 0.9), lr_scale={"vision": 0.5})
    assert config.trainable == ("vision", "language")
    assert config.gradient_checkpointing is True
    assert config.parallel.zero_stage == 1 and config.parallel.max_micro_batch_size is None
    assert config.init_from == "runs/pt"
    assert config.data.path == "a=b.jsonl"
    assert config.data.options == {"split": "train", "number": 3}
    assert config.model.options == {"vision_config": {"num_layers": 2}}
    assert DRA().data.options == {}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.lr_peek=1", "got 'optimizer.lr_peek'; did you mean 'optimizer.lr_peak'?"),
        ("lr_peak=1", "did you mean 'optimizer.lr_peak'?"),
        ("optimizer=1", "did you mean 'optimizer."),
        ("optimizer.eps.x=1", "did you mean 'optimizer.eps'?"),
        ("stage.=1", "did you mean 'stage'?"),
        ("optimizer.eps", "override must be key=value, got 'optimizer.eps'"),
        ("schedule.steps=1.5", "schedule.steps must be an int, got '1.5'"),
        ("optimizer.eps=small", "optimizer.eps must be a number, got 'small'"),
        ("gradient_checkpointing=1", "gradient_checkpointing must be true or false, got '1'"),
        ("parallel.zero_stage=4", "parallel.zero_stage must be one of 0, 1, 2, 3, got '4'"),
        ("data.options=3", "data.options must be a JSON object, got '3'"),
    ],
)
def test_bad_overrides_name_the_nearest_key(word, message):
    with pytest.raises(ValueError) as error:
        parse_overrides([word])
    assert message in str(error.value)


def test_one_key_twice_is_refused():
    with pytest.raises(ValueError, match="given once, got 'seed' twice"):
        parse_overrides(["seed=1", "seed=2"])


def test_configs_share_no_dict_with_their_source():
    """A key inside a dict field was once written into the caller's own dict."""
    options = {"vision_config": {"num_layers": 2}}
    config = override(PT(), {"model.options": options, "model.options.vision_config.num_layers": 3})
    assert config.model.options == {"vision_config": {"num_layers": 3}}
    assert options == {"vision_config": {"num_layers": 2}}
    values = config.to_dict()
    TrainConfig.from_dict(values).model.options["vision_config"]["num_layers"] = 4
    assert values["model"]["options"] == config.model.options == {"vision_config": {"num_layers": 3}}

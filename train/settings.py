"""DeepSpeed's settings, derived from a `TrainConfig`; nothing else in the project writes them."""

from typing import Any

from .config import TrainConfig

ZERO_BUCKET_ELEMENTS = 50_000_000
"""Elements DeepSpeed reduces or gathers in one call. Its default, 500 million, allocates 2 GB of fp32 a step
even for a tiny model; 50 million still amortises the launch of a collective for the 13B model."""


def deepspeed_dict(config: TrainConfig, world_size: int, *, overlap_comm: bool = False) -> dict[str, Any]:
    """DeepSpeed's settings for `config` on `world_size` ranks; ValueError if the batch cannot be split so.

    The optimizer and its schedule are objects of ours, so they are not in it. `overlap_comm` reduces
    gradients during the backward; it pays on a GPU, and on a CPU only takes cores from the computation."""
    parallel = config.parallel
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": overlap_comm,
        "reduce_bucket_size": ZERO_BUCKET_ELEMENTS,
        "allgather_bucket_size": ZERO_BUCKET_ELEMENTS,
    }
    if parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": overlap_comm}
    if parallel.offload == "optimizer_and_parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": overlap_comm}
    return {
        "train_batch_size": parallel.global_batch_size,
        "train_micro_batch_size_per_gpu": parallel.micro_batch(world_size),
        "gradient_accumulation_steps": parallel.accumulation_steps(world_size),
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
        "zero_optimization": zero,
        # torch's AdamW serves offloaded states where DeepSpeed's own CPU optimizer does not build
        "zero_force_ds_cpu_optimizer": False,
    }

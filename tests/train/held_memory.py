"""Run as a module, on one rank or several: what an engine really holds, and what the planner says.

    python -m tests.train.held_memory fp32:0:gated_cross_attention bf16:2:vision+gated_cross_attention

Rank 0 prints a JSON object for every case: bytes by moment, measured over all live tensors and estimated."""

import gc
import json
import sys
import warnings

import torch

from model import InfiMMHD, InfiMMHDConfig, preset
from train import distributed
from train.config import ParallelConfig, TrainConfig
from train.distributed import deepspeed
from train.optim import build_optimizer
from train.plan.memory import counts_of, held_bytes
from train.settings import ZERO_BUCKET_ELEMENTS, deepspeed_dict

STEPS = 2


def medium_config() -> InfiMMHDConfig:
    """About 20 M parameters, some of them small enough for ZeRO 3 to leave whole."""
    values = preset("tiny").to_dict()
    values["vision_config"] |= dict(hidden_size=256, num_layers=5, num_heads=2, intermediate_size=1024)
    values["gated_cross_attention"] |= dict(interval=2, num_heads=4, head_dim=64)
    values["text_config"] |= dict(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1376,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    return InfiMMHDConfig.from_dict(values)


def live_storages() -> dict[int, int]:
    """Bytes by storage of every tensor that Python can reach, gradients included."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some lazy modules warn when they are looked at
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    tensors += [x.grad for x in tensors if x.is_leaf and x.requires_grad and x.grad is not None]
    for tensor in tensors:
        if tensor.device.type == "meta":  # DeepSpeed keeps shapes so
            continue
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return found


def batch_of(config: InfiMMHDConfig) -> dict:
    size = config.vision_config.input_size
    ids = torch.tensor([[5, config.image_token_id, 7, 8]])
    return dict(
        input_ids=ids,
        labels=torch.tensor([[-100, -100, 7, 8]]),
        pixel_values=torch.randn(1, 3, size, size),
        window_positions=torch.tensor([[-1, -1]]),
        windows_per_image=[1],
        images_per_sample=[1],
    )


def measure(precision: str, zero_stage: int, trainable: list[str], ranks: distributed.Ranks) -> dict:
    """Bytes between the last backward and its step, and behind the step, measured and estimated."""
    before = live_storages()

    def held() -> int:
        return sum(size for key, size in live_storages().items() if key not in before)

    config = medium_config()
    torch.manual_seed(0)
    model = InfiMMHD(config)
    counts = counts_of(model, trainable)
    parallel = ParallelConfig(global_batch_size=ranks.world_size, precision=precision, zero_stage=zero_stage)
    stage = TrainConfig(stage="held", trainable=tuple(trainable), parallel=parallel)
    engine, *_ = deepspeed.initialize(
        model=model.train(),
        optimizer=build_optimizer(model, stage.optimizer, ranks.device),
        config=deepspeed_dict(stage, ranks.world_size),
        dist_init_required=False,
    )
    batch = batch_of(config)
    for _ in range(STEPS):
        engine.backward(engine(**batch).loss, scale_wrt_gas=False)
        with_gradients = held()
        engine.step()
    without_gradients = held()
    engine.destroy()
    model.zero_grad()
    estimate = held_bytes(
        counts,
        precision=precision,
        zero_stage=zero_stage,
        world_size=ranks.world_size,
        overlap_comm=False,
    )
    states = estimate.parameters + estimate.optimizer
    kept = 0
    if (
        zero_stage == 3
    ):  # it keeps its gradients' memory and its bucket; others have them in the backward alone
        kept = estimate.gradients + ZERO_BUCKET_ELEMENTS * (2 if precision in ("bf16", "fp16") else 4)
    gradients = kept or estimate.gradients
    return dict(
        case=f"{precision}:{zero_stage}:{'+'.join(trainable)}",
        ranks=ranks.world_size,
        parameters=counts.total,
        trainable=counts.trainable,
        measured=dict(with_gradients=with_gradients, without_gradients=without_gradients),
        estimated=dict(with_gradients=states + gradients, without_gradients=states + kept),
    )


def main(cases: list[str]) -> None:
    torch.set_num_threads(1)
    ranks = distributed.start()
    for case in cases:
        precision, zero_stage, parts = case.split(":")
        result = measure(precision, int(zero_stage), parts.split("+"), ranks)
        if ranks.rank == 0:
            print(json.dumps(result), flush=True)
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1:])

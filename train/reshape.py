"""A checkpoint written on another number of ranks or at another ZeRO stage, brought into this engine.

DeepSpeed's universal checkpoint holds each parameter whole: its fp32 weight and AdamW's two moments.
DeepSpeed converts into it; the loading is done here, because DeepSpeed's own forgets AdamW's step count and
expects the files of the ZeRO stage it came from."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .distributed import Ranks, deepspeed
from .optim import grouped_names

KEYS = ("fp32", "exp_avg", "exp_avg_sq")
Entries = dict[str, Tensor]


def load(
    engine: deepspeed.DeepSpeedEngine,
    optimizer: torch.optim.Optimizer,
    state: Path,
    *,
    zero_stage: int,
    num_updates: int,
    scratch: Path,
    ranks: Ranks,
) -> None:
    """Loads the checkpoint in `state`, written at `zero_stage` after `num_updates` updates of `optimizer`.

    `optimizer` is the one that `engine` was made with. `scratch` is a folder that does not exist, on a disk
    that all ranks see; it is left behind. ValueError if DeepSpeed cannot convert it or lost a parameter."""
    names = {
        name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad
    }
    if zero_stage == 0:
        read = _unpartitioned(state, engine.module)
    else:
        universal = scratch / "universal"  # DeepSpeed writes a file beside it
        ranks.check_on_first(lambda: _convert(state, universal))
        read = _universal(universal)
    stage = engine.zero_optimization_stage()
    set_state = {0: _set_unpartitioned, 3: _set_partitioned}.get(stage, _set_fragments)
    if stage > 0:
        _make_moments(engine, optimizer, stage)
    with torch.no_grad():
        for name, parameter in names.items():
            set_state(parameter, read(name), optimizer, ranks)
    _set_step_count(optimizer, num_updates)
    ranks.barrier()  # rank 0 may remove `scratch` when it returns: nobody reads in it any more


def _convert(state: Path, universal: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(state), "--output_folder", str(universal)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ValueError(
            f"checkpoint {str(state)!r} must convert to a universal one, got: {done.stderr[-600:]}"
        )


def _universal(folder: Path) -> Callable[[str], Entries]:
    def read(name: str) -> Entries:
        entries = {}
        for key in KEYS:
            path = folder / "zero" / name / f"{key}.pt"
            if not path.is_file():
                raise ValueError(f"checkpoint must hold {key} of {name!r}, got none in {str(folder)!r}")
            # DeepSpeed's own file, converted a moment ago
            saved = torch.load(path, map_location="cpu", weights_only=False)
            entries[key] = saved["param"] if isinstance(saved, dict) else saved  # from ZeRO 3 it stands alone
        return entries

    return read


def _unpartitioned(state: Path, model: nn.Module) -> Callable[[str], Entries]:
    saved = torch.load(state / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    weights, moments = saved["module"], saved["optimizer"]["state"]
    # AdamW numbers parameters in the order of its groups
    numbers = {name: number for number, name in enumerate(grouped_names(model))}

    def read(name: str) -> Entries:
        entry = moments[numbers[name]]
        return {"fp32": weights[name], "exp_avg": entry["exp_avg"], "exp_avg_sq": entry["exp_avg_sq"]}

    return read


def _make_moments(engine: deepspeed.DeepSpeedEngine, optimizer: torch.optim.Optimizer, stage: int) -> None:
    """DeepSpeed makes AdamW's moments at the first step only; here they are zeros to be filled."""
    zero = engine.optimizer
    partitions = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for partition in partitions:
        slot = optimizer.state[partition]
        slot["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
        for key in KEYS[1:]:
            slot[key] = torch.zeros_like(partition)
    if stage < 3:
        zero._lazy_init_hp_params_optimizer_state()


def _set_unpartitioned(
    parameter: nn.Parameter, entries: Entries, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    parameter.copy_(entries["fp32"].view_as(parameter))
    slot = optimizer.state[parameter]
    slot.setdefault("step", torch.zeros((), dtype=torch.float32, device=parameter.device))
    for key in KEYS[1:]:
        slot[key] = entries[key].to(parameter.device, torch.float32).view_as(parameter).clone()


def _set_fragments(
    parameter: nn.Parameter, entries: Entries, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """ZeRO 1 and 2: every rank keeps the part of the fp32 state that is its own, and the whole weight."""
    whole = {key: tensor.to(parameter.device).view_as(parameter) for key, tensor in entries.items()}
    parameter.copy_(whole["fp32"])
    deepspeed.utils.safe_set_full_fp32_param(parameter, whole["fp32"])
    for key in KEYS[1:]:
        deepspeed.utils.safe_set_full_optimizer_state(parameter, whole[key], key)


def _set_partitioned(
    parameter: nn.Parameter, entries: Entries, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """ZeRO 3: a rank's share of everything, the last one's padded with zeros."""
    share = parameter.ds_tensor.numel()
    shares = {}
    for key, tensor in entries.items():
        padded = nn.functional.pad(tensor.flatten(), (0, share * ranks.world_size - tensor.numel()))
        shares[key] = padded[share * ranks.rank : share * (ranks.rank + 1)].to(parameter.ds_tensor.device)
    parameter.ds_tensor.copy_(shares["fp32"])
    deepspeed.utils.safe_set_local_fp32_param(parameter, shares["fp32"])
    for key in KEYS[1:]:
        deepspeed.utils.safe_set_local_optimizer_state(parameter, shares[key], key)


def _set_step_count(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """AdamW's bias correction: torch counts by parameter, DeepSpeed's FusedAdam by group."""
    for slot in optimizer.state.values():
        if isinstance(slot.get("step"), Tensor):
            slot["step"].fill_(num_updates)
        elif "step" in slot:
            slot["step"] = num_updates
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = num_updates

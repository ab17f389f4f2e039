"""`python -m train export RUN DESTINATION`: the model of a checkpoint, as `save_pretrained` writes it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import TrainConfig

RUN_ERROR = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments`; the exit code is 1 after one line on what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m train export",
        description="Write the model of a run that is not finished, from its newest undamaged checkpoint, "
        "with processor and tokenizer. A finished run has it in RUN/model already.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a stage's output folder")
    parser.add_argument("destination", metavar="DESTINATION", help="a new folder")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    options = parser.parse_args(arguments)
    from .distributed import stop

    try:
        folder = export(options.run, options.destination, step=options.step)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"train export: error: {' '.join(str(error).split())}\n")
        return RUN_ERROR
    finally:
        stop()
    print(f"{options.destination}: the model of {folder}")
    return 0


def export(run: str | Path, destination: str | Path, *, step: int | None = None) -> Path:
    """Writes the model that `run` had at the checkpoint of `step` (default: the newest undamaged one) into
    the new folder `destination`, in the precision it was trained in; returns the checkpoint's folder.

    ValueError if `run` is no stage's folder, its checkpoint is damaged, `destination` exists, or the weights
    that the stage froze are not those it started with."""
    # DeepSpeed takes seconds to import: a wrong word on the command line is answered before
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from . import build, checkpoint, distributed, output

    run, destination = Path(run), Path(destination)
    if destination.exists():
        raise ValueError(f"destination must be a new folder, got {str(destination)!r}")
    try:
        config = TrainConfig.from_dict(json.loads((run / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"run must be a stage's output folder, got {str(run)!r}: {error}") from error
    ranks = distributed.start()
    folder = checkpoint.find(run / "checkpoints", ranks, step=step)
    trainer = checkpoint.read_trainer(folder)
    tokenizer = build.load_tokenizer(config)
    model = build.build_model(config)
    build.prepare_model(model, config, ranks.device)
    if build.frozen_checksum(model) != trainer["frozen_checksum"]:
        raise ValueError(f"frozen weights must be those that {str(run)!r} started with, got others")
    if trainer["zero_stage"] == 0:
        path = folder / checkpoint.STATE / "mp_rank_00_model_states.pt"
        weights = torch.load(path, map_location="cpu", weights_only=False)["module"]
    else:
        weights = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), tag=checkpoint.STATE, exclude_frozen_parameters=True
        )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = sorted(trainable - weights.keys())
    if missing:
        raise ValueError(f"checkpoint {folder.name} must hold every trained weight, got none of {missing}")
    model.load_state_dict(weights, strict=False)
    model.to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.parallel.precision, torch.float32))
    output.write_model(model, tokenizer, config.data.prompt, destination)
    return folder

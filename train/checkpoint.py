"""What a stage leaves in its output folder, and how the next stage starts from it.

    config.json      the stage's TrainConfig
    deepspeed.json   the settings DeepSpeed ran with
    log.jsonl        one line a step
    checkpoint/      DeepSpeed's own files: partitioned optimizer states and weights
    model/           the model (`save_pretrained`) and its tokenizer: what `init_from` reads

`checkpoint` and `model` are written under another name and renamed when they are complete, `model` last."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model import InfiMMHD

from .distributed import Ranks, deepspeed

UNFINISHED = ".unfinished"


def model_folder(init_from: str) -> Path:
    """The folder of a model inside a stage's output folder, or the folder itself if it holds one."""
    for folder in (Path(init_from) / "model", Path(init_from)):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    raise ValueError(
        f"init_from must be the output folder of a finished stage (with model/), got {init_from!r}"
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a local folder; ValueError names the folder if there is none."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise ValueError(f"data.tokenizer must be a folder with a saved tokenizer, got {str(folder)!r}")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def save(
    engine: deepspeed.DeepSpeedEngine,
    model: InfiMMHD,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    ranks: Ranks,
    state: dict[str, Any],
) -> None:
    """Writes `checkpoint` and `model`; every rank calls it. `state` travels in DeepSpeed's client state."""
    unfinished = output_dir / UNFINISHED
    if ranks.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    ranks.barrier()
    engine.save_checkpoint(str(unfinished / "checkpoint"), client_state=state)
    whole = _whole_copy(engine, model, ranks)
    if ranks.rank == 0:
        whole.save_pretrained(unfinished / "model")
        tokenizer.save_pretrained(unfinished / "model")
        for name in ("checkpoint", "model"):
            _replace(unfinished / name, output_dir / name)
        unfinished.rmdir()
    ranks.barrier()


def _whole_copy(engine: deepspeed.DeepSpeedEngine, model: InfiMMHD, ranks: Ranks) -> InfiMMHD:
    """The model on the host of rank 0, its weights gathered one by one; empty on the other ranks.

    ZeRO keeps weights as parts of larger buffers, which safetensors refuses to write."""
    partitioned = engine.zero_optimization_stage() == 3
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=partitioned):
            if ranks.rank == 0:
                weights[name] = tensor.detach().to("cpu", copy=True)
    with torch.device("meta"):
        whole = InfiMMHD(model.config)
    if ranks.rank == 0:
        whole.load_state_dict(weights, assign=True)
    return whole


def _replace(new: Path, old: Path) -> None:
    retired = old.with_name(f".{old.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        os.rename(old, retired)
    os.rename(new, old)
    shutil.rmtree(retired, ignore_errors=True)

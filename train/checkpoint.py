"""What a stage leaves in its output folder, and how the next stage starts from it.

    config.json      the stage's TrainConfig
    deepspeed.json   the settings DeepSpeed ran with
    log.jsonl        one line a step
    checkpoint/      DeepSpeed's own files: partitioned optimizer states and weights
    model/           the model (`save_pretrained`) and its tokenizer: what `init_from` reads

`checkpoint` and `model` are written under another name and renamed when they are complete, `model` last."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model import InfiMMHD

from .distributed import Ranks, deepspeed

UNFINISHED = ".unfinished"
PROOFS = {"checkpoint": ("latest",), "model": ("config.json", "model*.safetensors")}
"""What is in these folders when a stage wrote them."""


def model_folder(init_from: str) -> Path:
    """The folder of a model inside a stage's output folder, or the folder itself if it holds one."""
    for folder in (Path(init_from) / "model", Path(init_from)):
        if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
            return folder
    rule = "init_from must be the output folder of a finished stage (with model/) or of save_pretrained"
    raise ValueError(f"{rule}, got {init_from!r}")


def load_model(init_from: str) -> InfiMMHD:
    """The model in `model_folder(init_from)`; ValueError names the folder if it cannot be read whole."""
    folder = model_folder(init_from)
    try:
        return InfiMMHD.from_pretrained(folder)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        rule = "init_from must hold a model's config.json and all its weights"
        raise ValueError(f"{rule}, got {str(folder)!r}: {_short(error)}") from error


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a local folder; ValueError names the folder if there is none."""
    rule = f"data.tokenizer must be a folder with a saved tokenizer, got {str(folder)!r}"
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise ValueError(rule)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the readers of its many file formats raise what they like
        raise ValueError(f"{rule}: {_short(error)}") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())  # torch lists missing weights on lines of their own
    return text if len(text) <= 300 else text[:297] + "..."


def check_output_dir(output_dir: Path) -> None:
    """ValueError unless a stage may write into `output_dir`.

    Whatever stands there under a name that a stage writes must be an earlier stage's, because it will be
    replaced; and the folder must be writable, because that is found out after days of training otherwise.
    Leaves nothing behind."""
    try:
        stage_wrote_config = _is_stage_config(output_dir / "config.json")
        for name in ("config.json", "deepspeed.json", "log.jsonl", "checkpoint", "model", UNFINISHED):
            path = output_dir / name
            absent = [proof for proof in PROOFS.get(name, ()) if not any(path.glob(proof))]
            if os.path.lexists(path) and (not stage_wrote_config or absent or path.is_symlink()):
                lack = "no config.json of a stage there"
                if stage_wrote_config:
                    lack = f"no {absent[0]} in it" if absent else "it is a link"
                rule = f"output_dir must not hold a {name!r} that no stage wrote ({lack})"
                raise ValueError(f"{rule}, got {str(output_dir)!r}")
        _try_to_write(output_dir)
    except OSError as error:
        rule = "output_dir must be a folder that can be written"
        raise ValueError(f"{rule}, got {str(output_dir)!r} ({error.strerror})") from error


def _is_stage_config(path: Path) -> bool:
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(values, dict) and {"stage", "trainable", "schedule"} <= values.keys()


def _try_to_write(folder: Path) -> None:
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    finally:
        with contextlib.suppress(OSError):  # not made, or in use by another stage already
            for parent in made:
                parent.rmdir()


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

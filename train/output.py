"""What a stage leaves in its output folder, and how the next stage starts from it.

    config.json      the stage's TrainConfig
    deepspeed.json   the settings DeepSpeed ran with
    log.jsonl        one line a step; skipped.jsonl: one line a sample left out; tensorboard/
    checkpoints/     what the stage goes on from after a stop (`train.checkpoint`)
    model/           the model, its processor and tokenizer (`save_pretrained`): what `init_from` reads
    finished.json    what the stage did, once it is done

`model` is written under another name and renamed when it is complete."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model import InfiMMHD, InfiMMHDProcessor

from . import files
from .config import TrainConfig
from .distributed import Ranks, deepspeed

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()  # its bars for loading and saving are not silent there

UNFINISHED = ".unfinished"
FINISHED = "finished.json"
PROOFS = {"model": ("config.json", "model*.safetensors")}
"""What is in this folder when a stage wrote it."""
WRITTEN = (
    *("config.json", "deepspeed.json", "log.jsonl", "skipped.jsonl", "tensorboard"),
    *("checkpoints", "model", FINISHED, UNFINISHED),
)
"""Names that a stage writes."""


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
        return InfiMMHD.from_pretrained(folder, dtype=torch.float32)
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
        for name in WRITTEN:
            path = output_dir / name
            absent = [proof for proof in PROOFS.get(name, ()) if not any(path.glob(proof))]
            if os.path.lexists(path) and (not stage_wrote_config or absent or path.is_symlink()):
                lack = "no config.json of a stage there"
                if stage_wrote_config:
                    lack = f"no {absent[0]} in it" if absent else "it is a link"
                rule = f"output_dir must not hold a {name!r} that no stage wrote ({lack})"
                raise ValueError(f"{rule}, got {str(output_dir)!r}")
        foreign = [path.name for path in output_dir.glob("checkpoints/*") if "step-" not in path.name]
        if foreign:
            rule = f"output_dir must not hold a 'checkpoints' that no stage wrote ({foreign[0]} in it)"
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


def remove_traces(output_dir: Path) -> None:
    """Removes what would make a new run look like the earlier one going on; `model` stays until replaced."""
    (output_dir / FINISHED).unlink(missing_ok=True)
    shutil.rmtree(output_dir / "tensorboard", ignore_errors=True)


MAY_CHANGE = (
    *("output_dir", "log_interval", "tensorboard", "gradient_checkpointing", "checkpoint", "guard"),
    *("data.workers", "data.on_bad_sample", "data.max_skipped_share"),
    *("parallel.gradient_accumulation_steps", "parallel.max_micro_batch_size"),
    *("parallel.zero_stage", "parallel.offload"),
)
"""Fields (or whole objects) that a run may go on with in another value: the training stays the same one."""


def check_same_run(output_dir: Path, config: TrainConfig) -> None:
    """ValueError if `output_dir` holds the state of a run that `config` would train differently."""
    has_state = (output_dir / FINISHED).exists() or any((output_dir / "checkpoints").glob("*step-*"))
    if not has_state:
        return
    try:
        earlier = json.loads((output_dir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"output_dir must hold a readable config.json, got {str(output_dir)!r}: {error}"
        ) from error
    old, new = _leaves(earlier), _leaves(config.to_dict())
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    changed = [name for name in changed if not any(f"{name}.".startswith(f"{free}.") for free in MAY_CHANGE)]
    if changed:
        shown = ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in changed)
        raise ValueError(
            f"output_dir must be new, or that of a run with the same settings, got {str(output_dir)!r} "
            f"({shown}); checkpoint.resume=false begins that stage anew"
        )


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in values.items():
        inner = _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        leaves |= inner
    return leaves


def _try_to_write(folder: Path) -> None:
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    finally:
        with contextlib.suppress(OSError):  # not made, or in use by another stage already
            for parent in made:
                parent.rmdir()


def save_model(
    engine: deepspeed.DeepSpeedEngine,
    model: InfiMMHD,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    ranks: Ranks,
    prompt: str,
) -> None:
    """Writes `model`; every rank calls it. `prompt` (`data.prompt`) becomes the processor's chat template.

    OSError if it could not be written; an older `model` is then as it was."""
    unfinished = output_dir / UNFINISHED
    whole = _whole_copy(engine, model, ranks)

    def write() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        write_model(whole, tokenizer, prompt, unfinished)
        _replace(unfinished, output_dir / "model")
        files.sync(output_dir)

    ranks.check_on_first(write)


def write_model(model: InfiMMHD, tokenizer: PreTrainedTokenizerBase, prompt: str, folder: Path) -> None:
    """Model, processor and tokenizer into `folder`, on the disk when this returns; OSError if not."""
    folder.mkdir(parents=True)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # no OSError, though it is one
        raise OSError(f"model must be written to {str(folder)!r}, got {error}") from error
    InfiMMHDProcessor.for_model(model.config, tokenizer, prompt).save_pretrained(folder)
    for name in files.files_below(folder):
        files.sync(folder / name)


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

"""The three things that the command line does: convert a checkpoint, build a start from parts, inspect."""

import copy
from pathlib import Path

from ..checks import is_int, require, require_choice
from ..config import InfiMMHDConfig
from ..presets import checked, preset
from .adjust import fit_vocabulary, fit_window
from .checkpoint import PARTS, Checkpoint, Tensors
from .files import shown
from .forms import INFIMM_STAGE1, OWN
from .fresh import fresh_tensors
from .report import Report
from .shards import ShardWriter, bytes_of, check_destination, dtype_of, new_folder
from .sizes import require_sizes_of
from .tokenizer import carry_tokenizer, copy_tokenizer
from .write import TARGETS, form_of_target, write_config, write_own_config, write_weights


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    form: str = "auto",
    target: str = "infimm-hd",
    preset: str | Path | InfiMMHDConfig | None = None,
    window_size: int | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
) -> Report:
    """Reads the weights in `source` and writes them as `target` into the new folder `destination`.

    `form`: how the source names its tensors, a name of `FORMS`, or "auto". `preset`: a name, the path of a
    config.json or a configuration that the weights have to fit; needed where neither shapes nor a config file
    tell everything. `window_size`: interpolate the position table for windows of this many pixels. `dtype`:
    "auto" keeps each tensor's. Memory for about one shard, or the largest tensor. ValueError for whatever is
    missing, unexpected or damaged, naming file and tensor; `destination` is then not there."""
    destination, size, kept = check_destination(destination), bytes_of(max_shard_size), dtype_of(dtype)
    require_choice("--to", target, TARGETS)
    wanted = wanted_config(preset)
    with Checkpoint(source, form, wanted) as checkpoint:
        report = checkpoint.report
        config, vision, text = checkpoint.config, checkpoint.vision_config, checkpoint.text_config
        if config is not None:
            vision, text = config.vision_config, config.text_config
            if wanted is not None and checkpoint.form is OWN:
                require_sizes_of(wanted, config)
        target_form = form_of_target(target, vision)
        absent = [part for part in target_form.parts if part not in checkpoint.form.parts]
        rule = f"hold all parts of {target} weights (to join parts: python -m model build)"
        require(not absent, "SRC", rule, f"{checkpoint.form.name} weights without {', '.join(absent)}")
        if target_form is INFIMM_STAGE1:
            require(bool(config.gated_layers), "SRC", "have gated blocks for infimm-stage1", config.fusion)
        tensors = checkpoint.tensors(target_form.parts, f"no part of {target} weights")
        if vision is not None and "vision" in target_form.parts:
            vision = fit_window(tensors, vision, window_size, report)
        else:
            require(window_size is None, "--window-size", f"be left away for {target}", window_size)
        if config is not None:
            config = copy.deepcopy(config)
            config.vision_config = vision
            config = checked(config)
        with new_folder(destination) as folder:
            if target_form is OWN and checkpoint.form is not OWN:
                carry_tokenizer(checkpoint.folder, folder, config, report)
            elif "language" in target_form.parts:
                copy_tokenizer(checkpoint.folder, folder, report)
            writer = ShardWriter(folder, size, kept)
            write_weights(writer, target_form, tensors, config)
            if target_form is OWN:
                write_own_config(folder, config, writer.widest_dtype)
            else:
                text = copy.deepcopy(text)
                write_config(folder, target_form, config, vision, text, writer.widest_dtype, report)
                report.notes += target_form.not_written
        return report


def build(
    destination: str | Path,
    *,
    preset: str | Path | InfiMMHDConfig,
    vision: str | Path,
    language: str | Path,
    tokenizer: str | Path | None = None,
    seed: int = 0,
    window_size: int | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
) -> list[Report]:
    """A start for training: `vision` and `language` from their checkpoints, connector and gated blocks new.

    Either source may be a whole model, of which the part is taken. Its sizes have to be `preset`'s, but for
    the position table, which is interpolated to `window_size` (default: the preset's), and a smaller
    vocabulary, which grows. `tokenizer`: a folder with one, else the language model's is taken. Returns the
    reports of vision, language and new parts."""
    destination, size, kept = check_destination(destination), bytes_of(max_shard_size), dtype_of(dtype)
    require(is_int(seed, 0), "--seed", "be an int of at least 0", seed)
    wanted = wanted_config(preset)
    mixture = wanted.vision_config.mixture_of_resolution
    require(mixture is None, "--preset", "have a ViT alone (no mixture of resolutions)", preset)
    with Checkpoint(vision, wanted=wanted) as eye, Checkpoint(language, wanted=wanted) as tongue:
        config = copy.deepcopy(wanted)
        eye_tensors = _part(eye, "vision", "--vision")
        found = copy.deepcopy(eye.vision_config or eye.config.vision_config)
        found.feature_layer = wanted.vision_config.feature_layer
        window_size = wanted.vision_config.window_size if window_size is None else window_size
        config.vision_config = fit_window(eye_tensors, found, window_size, eye.report)
        tongue_tensors = _part(tongue, "language", "--language")
        text = tongue.text_config or tongue.config.text_config
        vocab_size = wanted.text_config.vocab_size
        config.text_config = fit_vocabulary(tongue_tensors, text, vocab_size, tongue.report)
        config = checked(config)
        require_sizes_of(wanted, config)
        fresh = fresh_tensors(config, seed)
        made = Report(f"seed {seed}", "new parts", new=list(fresh))
        tensors = {**eye_tensors, **fresh, **tongue_tensors}
        with new_folder(destination) as folder:
            carry_tokenizer(Path(tokenizer or tongue.folder), folder, config, made)
            writer = ShardWriter(folder, size, kept)
            write_weights(writer, OWN, tensors, config)
            write_own_config(folder, config, writer.widest_dtype)
        return [eye.report, tongue.report, made]


def inspect(
    source: str | Path, *, form: str = "auto", preset: str | Path | InfiMMHDConfig | None = None
) -> str:
    """What kind of checkpoint `source` is, its parts, sizes and types, after checking names and shapes."""
    with Checkpoint(source, form, wanted_config(preset)) as checkpoint:
        lines = [checkpoint.report.text()]
        for part in PARTS:
            if count := checkpoint.num_values(part):
                lines.append(f"  {part}: {count:,} parameters")
        lines.append(f"  types: {', '.join(sorted(checkpoint.dtypes()))}")
        lines.append(f"  files: {shown([path.name for path in checkpoint.source.files])}")
        configs = dict(vision=checkpoint.vision_config, language=checkpoint.text_config)
        if checkpoint.config is not None:
            configs = dict(vision=checkpoint.config.vision_config, language=checkpoint.config.text_config)
        if (vision := configs["vision"]) is not None:
            lines.append(
                f"  vision: {vision.num_layers} {vision.block} blocks of {vision.hidden_size}, "
                f"{vision.num_heads} heads, MLP {vision.intermediate_size}, patch {vision.patch_size}, "
                f"windows of {vision.window_size} pixels"
            )
        if (text := configs["language"]) is not None:
            lines.append(
                f"  language: {text.model_type}, {text.num_hidden_layers} layers of {text.hidden_size}, "
                f"{text.num_attention_heads} heads, vocabulary {text.vocab_size}"
            )
        return "\n".join(lines)


def wanted_config(value: str | Path | InfiMMHDConfig | None) -> InfiMMHDConfig | None:
    """A preset by name, a config.json by path, or the configuration itself."""
    if value is None or isinstance(value, InfiMMHDConfig):
        return value
    return InfiMMHDConfig.load(value) if str(value).endswith(".json") else preset(str(value))


def _part(checkpoint: Checkpoint, part: str, argument: str) -> Tensors:
    rule = f"hold the weights of a {part} model"
    held = part in checkpoint.form.parts
    require(held, argument, rule, f"{checkpoint.form.name} weights in {checkpoint.report.source!r}")
    return checkpoint.tensors((part,), f"only the {part} part is taken")

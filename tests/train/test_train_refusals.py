"""What a stage refuses before it builds anything, and the one line the command line says about it."""

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import InfiMMHD
from train import distributed
from train.__main__ import main
from train.config import TrainConfig
from train.engine import run
from train.output import UNFINISHED, check_output_dir

from .tiny_stage import ALL_PARTS, tiny_model


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer) -> Path:
    """A folder laid out as a stage leaves it, written without training."""
    folder = tmp_path_factory.mktemp("finished") / "stage"
    tiny_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    config = TrainConfig(stage="PT", trainable=ALL_PARTS).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").touch()
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["model/config.py"],
        ["checkpoints/notes.txt"],
        ["model/config.json", "model/model.safetensors"],
        ["checkpoints/step-00000003/notes.txt"],
        ["config.json", "model.safetensors"],
        ["log.jsonl"],
        [f"{UNFINISHED}/notes.txt"],
    ],
    ids=lambda names: names[0],
)
def test_what_no_stage_wrote_is_never_replaced(tiny, colours, tokenizer, names):
    """`output_dir=.` in a checkout replaced the package `model/` by the exported weights and deleted it; a
    downloaded model would have gone the same way."""
    config = tiny("CPT")
    output_dir = Path(config.output_dir)
    for name in names:
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (output_dir / name).write_text('{"hidden_size": 3}')
    before = files_under(output_dir)
    name = names[0].partition("/")[0]
    with pytest.raises(ValueError) as error:
        run(config, dataset=colours, tokenizer=tokenizer)
    reason = f"output_dir must not hold a {name!r} that no stage wrote (no config.json of a stage there)"
    assert f"{reason}, got {str(output_dir)!r}" in str(error.value)
    assert files_under(output_dir) == before


@pytest.mark.parametrize(
    ("name", "lack"),
    [
        ("model/config.json", "no config.json in it"),
        ("model/model.safetensors", "no model*.safetensors in it"),
    ],
)
def test_a_folder_beside_a_stages_config_must_be_its_own_too(finished, tmp_path, name, lack):
    output_dir = tmp_path / "stage"
    shutil.copytree(finished, output_dir)
    check_output_dir(output_dir)
    (output_dir / name).unlink()
    with pytest.raises(ValueError) as error:
        check_output_dir(output_dir)
    assert f"{name.partition('/')[0]!r} that no stage wrote ({lack})" in str(error.value)


def test_checkpoints_hold_nothing_else(finished, tmp_path):
    output_dir = tmp_path / "stage"
    shutil.copytree(finished, output_dir)
    (output_dir / "checkpoints" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"a 'checkpoints' that no stage wrote \(thesis.tex in it\)"):
        check_output_dir(output_dir)


def test_a_link_is_not_followed(finished, tmp_path):
    output_dir = tmp_path / "stage"
    shutil.copytree(finished, output_dir)
    (output_dir / "model").rename(tmp_path / "elsewhere")
    (output_dir / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"a 'model' that no stage wrote \(it is a link\)"):
        check_output_dir(output_dir)


def test_the_check_leaves_nothing_behind(finished, tmp_path):
    check_output_dir(tmp_path / "runs" / "new" / "stage")
    (tmp_path / "here").mkdir()
    check_output_dir(tmp_path / "here")
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
    before = files_under(finished)
    check_output_dir(finished)
    assert files_under(finished) == before


@pytest.mark.parametrize("name", ["file", "file/stage", "/proc/stage", "x" * 300])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, name):
    """It was reported as "[Errno 2] No such file or directory: '/proc/stage'", without the option's name."""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as error:
        check_output_dir(tmp_path / name)
    assert str(error.value).startswith("output_dir must be a folder that can be written, got ")
    assert repr(str(tmp_path / name)) in str(error.value)


def test_rank_0_decides_for_all(monkeypatch):
    """The other ranks of a real run do not look at the folder, which they may not even see."""
    sent, looked = [], []

    def broadcast(errors: list, src: int, device: torch.device) -> None:
        if sent:
            errors[:] = sent[0]  # as rank 1 receives it
        else:
            sent.append(list(errors))

    def check() -> None:
        looked.append("rank 0")
        raise ValueError("output_dir must not be there")

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    for rank in (0, 1):
        with pytest.raises(ValueError, match="output_dir must not be there"):
            distributed.Ranks(rank, 2, torch.device("cpu")).check_on_first(check)
    assert looked == ["rank 0"]


@pytest.mark.parametrize(
    ("trainable", "frozen"),
    [(["gated_cross_attention"], "vision, language"), (["vision", "gated_cross_attention"], "language")],
)
def test_random_weights_are_not_frozen_unasked(tiny, colours, tokenizer, trainable, frozen):
    """PT without init_from built a random ViT and a random LLM, froze them, and trained nothing of use."""
    config = tiny("PT", trainable=trainable, model__allow_random_frozen=False, schedule__steps=1)
    with pytest.raises(ValueError) as error:
        run(config, dataset=colours, tokenizer=tokenizer)
    assert f"init_from must name a model whose frozen parts ({frozen}) are trained" in str(error.value)
    assert "model.allow_random_frozen=true" in str(error.value)
    run(config, dataset=colours, tokenizer=tokenizer, model=tiny_model())
    everything = dataclasses.replace(config, trainable=ALL_PARTS)
    everything.checkpoint.resume = False
    run(everything, dataset=colours, tokenizer=tokenizer)


@pytest.fixture
def command(tiny, conversations, tokenizer, tmp_path):
    """`command(*overrides)`: exit code of `python -m train` for a tiny stage on files, as from a shell."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = {"data__path": str(conversations(4)), "data__tokenizer": str(tmp_path / "tokenizer")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny("CPT", schedule__steps=1, **given).to_dict()))
    return lambda *overrides: main([str(path), *overrides])


def test_two_commands_in_one_process(command):
    """The second died with "Group ... is not registered": DeepSpeed kept handles of the first one's group."""
    for zero_stage in (2, 3, 2):
        assert command(f"parallel.zero_stage={zero_stage}", "checkpoint.resume=false") == 0
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output_dir=/proc/stage"], "output_dir must be a folder that can be written, got '/proc/stage' ("),
        (["model.options.text_config.num_attention_heads=3"], "model.options must fit preset 'tiny', got {"),
        (["model.options.gated_cross_attention.interval=9"], "model.options must fit preset 'tiny', got {"),
        (["model.options.text_config.hidden_size=wide"], "model.options must fit preset 'tiny', got {"),
        (["model.options.vision_config.norm_gain_init=wide"], "model.options must fit preset 'tiny', got {"),
        (["data.name=painted", "data.path=none", "data.options.canvases=3"], "canvases"),
        (["data.name=painted", "data.path=none", "data.options.lengths=3"], "lengths"),
        (["data.options.image_root=3"], "data.options must fit dataset 'conversations', got {"),
        (["data.sequence_length=1000000"], "data.sequence_length must be at most the LLM's max_position"),
    ],
)
def test_a_wrong_value_is_one_line_and_code_1(command, capsys, overrides, message):
    """Each of these was a traceback."""
    assert command(*overrides) == 1
    error = capsys.readouterr().err
    assert error.startswith("train: error: ") and message in error and error.count("\n") == 1


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[3:]), folder / "model.safetensors")


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def other_config(folder: Path) -> None:
    (folder / "config.json").write_text('["LlamaForCausalLM"]')


WEIGHTS = "init_from must hold a model's config.json and all its weights, got "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_weight, WEIGHTS),
        (cut_weights, WEIGHTS),
        (
            no_weights,
            "init_from must be the output folder of a finished stage (with model/) or of save_pretr",
        ),
        (broken_config, WEIGHTS),
        (other_config, WEIGHTS),
    ],
)
def test_a_damaged_model_is_one_line_and_code_1(command, finished, tmp_path, capsys, damage, message):
    """Missing weights were a traceback of torch's list of their names."""
    shutil.copytree(finished, tmp_path / "damaged")
    damage(tmp_path / "damaged" / "model")
    assert command(f"init_from={tmp_path / 'damaged'}") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"train: error: {message}") and str(tmp_path / "damaged") in error
    assert error.count("\n") == 1 and len(error) < 600


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_one_line_and_code_1(command, tmp_path, capsys, name):
    (tmp_path / "tokenizer" / name).write_text("{")
    assert command() == 1
    error = capsys.readouterr().err
    folder = str(tmp_path / "tokenizer")
    assert f"data.tokenizer must be a folder with a saved tokenizer, got {folder!r}: " in error
    assert error.count("\n") == 1


def test_a_disk_that_is_full_at_the_export_is_an_error(tiny, colours, tokenizer):
    """safetensors has an exception of its own for it; on rank 0 it left the other ranks waiting."""
    config = tiny("PT")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = InfiMMHD.save_pretrained

    def save_with_little_room(model: InfiMMHD, folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            save(model, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InfiMMHD, "save_pretrained", save_with_little_room)
        with pytest.raises(OSError, match="model must be written to '.*unfinished', got .*File too large"):
            run(config, dataset=colours, tokenizer=tokenizer)
    assert run(config, dataset=colours, tokenizer=tokenizer).samples_seen == 24

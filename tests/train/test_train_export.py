"""The model of a checkpoint is the one that the stage would have left at that step."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from model import InfiMMHD, InfiMMHDProcessor
from train.__main__ import main
from train.engine import run

from .tiny_stage import write_conversations


@pytest.fixture
def trained(tiny, tokenizer, tmp_path):
    """`trained(**overrides)`: output folder of a finished stage that can be built again from its config."""

    def train(**overrides: object) -> Path:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        data = str(write_conversations(tmp_path / "data", 8))
        given = {"data__path": data, "data__tokenizer": str(tmp_path / "tokenizer")}
        return run(tiny("CPT", checkpoint__every_steps=2, **given, **overrides)).output_dir

    return train


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "bf16")])
def test_the_newest_is_what_the_stage_left(trained, tmp_path, capsys, zero_stage, precision):
    folder = trained(parallel__zero_stage=zero_stage, parallel__precision=precision)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("step-00000003\n")
    got, expected = (
        InfiMMHD.from_pretrained(where).state_dict() for where in (tmp_path / "out", folder / "model")
    )
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype, name
    texts = [
        InfiMMHDProcessor.from_pretrained(where).chat_template
        for where in (tmp_path / "out", folder / "model")
    ]
    assert texts[0] == texts[1]


def test_an_earlier_step_is_another_model(trained, tmp_path):
    folder = trained()
    assert main(["export", str(folder), str(tmp_path / "out"), "--step", "2"]) == 0
    got, last = (
        InfiMMHD.from_pretrained(where).state_dict() for where in (tmp_path / "out", folder / "model")
    )
    changed = {name.split(".")[0] for name, tensor in last.items() if not torch.equal(got[name], tensor)}
    assert "vision" in changed and "language" not in changed


def test_what_cannot_be_exported_is_one_line(trained, tmp_path, capsys):
    folder = trained()

    def refusal(*words: object) -> str:
        assert main(["export", *map(str, words)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("train export: error: ") and error.count("\n") == 1
        return error

    out = tmp_path / "out"
    assert "run must be a stage's output folder" in refusal(tmp_path / "nowhere", out)
    assert "destination must be a new folder" in refusal(folder, tmp_path)
    assert "no one of step 7 among ['step-00000002', 'step-00000003']" in refusal(folder, out, "--step", 7)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"seed": 5}))
    assert "frozen weights must be those that" in refusal(folder, out)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    (folder / "checkpoints" / "step-00000003" / "rng-00000.pt").write_bytes(b"")
    assert "rng-00000.pt must have " in refusal(folder, out)
    assert not out.exists()

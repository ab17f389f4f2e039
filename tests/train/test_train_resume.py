"""A stopped run goes on as if it had not stopped; one with other settings is not mistaken for it."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model import InfiMMHD
from train import files, interrupt
from train.config import TrainConfig
from train.data import Sample
from train.distributed import Ranks
from train.engine import RunResult, run
from train.interrupt import Interrupted
from train.overrides import override
from train.stage import Stage
from train.watch import read_log

from .tiny_stage import Colours, assert_weights_close, log_of, tiny_model, weights_of


class Killed(BaseException):
    """Stands in for the end of the process: nothing in the trainer catches it."""


def run_until(monkeypatch, step: int, config: TrainConfig, **objects: object) -> None:
    """Runs until just after the save at `step`."""
    save = Stage.save

    def save_and_die(stage: Stage) -> Path:
        folder = save(stage)
        if stage.step == step:
            raise Killed
        return folder

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "save", save_and_die)
        with pytest.raises(Killed):
            run(config, **objects)


def note(patch: pytest.MonkeyPatch, order: list[str], owner: object, name: str) -> None:
    """Appends the name of every call to `order`, with the suffix of the path it is given."""
    inner = getattr(owner, name)

    def noted(*arguments: object, **keywords: object) -> object:
        paths = [argument for argument in arguments if isinstance(argument, Path)]
        order.append(" ".join([name, *(path.suffix for path in paths)]))
        return inner(*arguments, **keywords)

    patch.setattr(owner, name, noted)


def assert_bit_identical(got: RunResult, expected: RunResult) -> None:
    assert [loss.hex() for loss in got.losses] == [loss.hex() for loss in expected.losses]
    assert [norm.hex() for norm in got.grad_norms] == [norm.hex() for norm in expected.grad_norms]
    assert (got.samples_seen, got.skipped) == (expected.samples_seen, expected.skipped)
    weights = weights_of(expected.output_dir)
    for name, tensor in weights_of(got.output_dir).items():
        assert torch.equal(tensor, weights[name]), name


@pytest.fixture
def both(tiny, tokenizer, tmp_path, monkeypatch):
    """`both(recipe, **overrides)`: an uninterrupted run, and one stopped after step 4 of 6 and gone on."""

    def train(recipe: str, **overrides: object) -> tuple[RunResult, RunResult]:
        steps = {"schedule__steps": 6, "checkpoint__every_steps": 2}
        objects = {"dataset": Colours(), "tokenizer": tokenizer}
        whole = run(tiny(recipe, output_dir=tmp_path / "whole", **steps, **overrides), **objects)
        config = tiny(recipe, output_dir=tmp_path / "stopped", **steps, **overrides)
        run_until(monkeypatch, 4, config, **objects)
        return run(config, **objects), whole

    return train


@pytest.mark.parametrize(
    ("recipe", "zero_stage", "precision"),
    [
        *[("PT", 0, "fp32"), ("CPT", 1, "fp32"), ("IFT", 2, "fp32"), ("DRA", 3, "fp32")],
        *[("IFT", 2, "bf16"), ("CPT", 3, "bf16"), ("IFT", 1, "bf16_autocast")],
    ],
)
def test_resumes_bit_for_bit(both, recipe, zero_stage, precision):
    got, whole = both(recipe, parallel__zero_stage=zero_stage, parallel__precision=precision)
    assert_bit_identical(got, whole)
    lines = [
        [line for line in log_of(r.output_dir) if "step" in line and "loss" in line] for r in (got, whole)
    ]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lr", "samples_seen", "num_answer_tokens", "images", "windows", "gates"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]], key


@pytest.mark.parametrize(("zero_stage", "offload"), [(2, "optimizer"), (3, "optimizer_and_parameters")])
def test_offloaded_states_resume_too(both, zero_stage, offload):
    assert_bit_identical(*both("IFT", parallel__zero_stage=zero_stage, parallel__offload=offload))


def test_generators_go_on(both, monkeypatch):
    """A model with dropout draws the numbers it would have drawn."""
    forward = InfiMMHD.forward

    def noisy(model: InfiMMHD, *args: object, **inputs: object) -> object:
        out = forward(model, *args, **inputs)
        out.loss = out.loss * (1 + 0.1 * torch.rand(()) + 0.1 * float(np.random.rand()))
        return out

    monkeypatch.setattr(InfiMMHD, "forward", noisy)
    assert_bit_identical(*both("IFT"))


def test_skips_and_their_limit_are_carried_over(both, monkeypatch):
    picture = Colours.__getitem__

    def some_bad(dataset: Colours, index: int) -> Sample:
        sample = picture(dataset, index)
        return (
            Sample(sample.images, [(question, "") for question, _ in sample.turns])
            if index % 5 == 0
            else sample
        )

    monkeypatch.setattr(Colours, "__getitem__", some_bad)
    got, whole = both("IFT", data__on_bad_sample="skip", data__max_skipped_share=1.0)
    assert_bit_identical(got, whole)
    assert got.skipped["empty_answer"] > 3 and got.samples_seen + got.skipped["empty_answer"] == 48


@pytest.mark.sample(3)
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (0, 2), (2, 0), (3, 0), (1, 3)])
def test_another_zero_stage_goes_on(tiny, colours, tokenizer, monkeypatch, before, after):
    """Parameters and AdamW's moments are those that were saved, so the next loss is equal to the last bit and
    the later ones within the rounding of other orders of summation. DeepSpeed's own loader of universal
    checkpoints forgot how many steps AdamW had taken."""
    steps = {"schedule__steps": 7, "checkpoint__every_steps": 4}
    config = tiny("IFT", parallel__zero_stage=before, **steps)
    whole = run(
        override(config, {"output_dir": config.output_dir + "-whole"}), dataset=colours, tokenizer=tokenizer
    )
    run_until(monkeypatch, 4, config, dataset=colours, tokenizer=tokenizer)
    config = override(config, {"parallel.zero_stage": after})
    order = []
    with monkeypatch.context() as patch:
        note(patch, order, torch, "load")
        note(patch, order, Ranks, "barrier")
        note(patch, order, shutil, "rmtree")
        got = run(config, dataset=colours, tokenizer=tokenizer)
    before_removal = order[: order.index("rmtree .universal")]
    assert "load .pt" in before_removal
    assert before_removal[-1] == "barrier", "a slower rank may still read in the folder"
    assert got.losses[4] == pytest.approx(whole.losses[4], rel=1e-6)
    assert got.losses == pytest.approx(whole.losses, rel=1e-5)
    assert_weights_close(weights_of(got.output_dir), weights_of(whole.output_dir))
    left = sorted(path.name for path in (got.output_dir / "checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000007"], "of the conversion nothing is left behind"


def test_a_finished_run_is_not_trained_again(tiny, colours, tokenizer, capsys):
    config = tiny("PT")
    first = run(config, dataset=colours, tokenizer=tokenizer)
    weights = (first.output_dir / "model" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert run(config, dataset=colours, tokenizer=tokenizer) == first
    assert capsys.readouterr().out == f"PT: finished earlier, nothing to do in {config.output_dir}\n"
    assert (first.output_dir / "model" / "model.safetensors").stat().st_mtime_ns == weights


def test_other_settings_are_refused_and_named(tiny, colours, tokenizer):
    config = tiny("PT")
    run(config, dataset=colours, tokenizer=tokenizer)
    with pytest.raises(ValueError) as error:
        run(tiny("PT", optimizer__lr_peak=0.5, seed=3), dataset=colours, tokenizer=tokenizer)
    assert "optimizer.lr_peak 0.01 -> 0.5, seed 0 -> 3" in str(error.value)
    assert "checkpoint.resume=false begins that stage anew" in str(error.value)
    # these do not change what is learned
    free = {"log_interval": 3, "data__workers": 2, "checkpoint__keep_last": 5, "parallel__zero_stage": 3}
    run(tiny("PT", **free), dataset=colours, tokenizer=tokenizer)


def test_other_frozen_weights_or_data_are_refused(tiny, colours, tokenizer, monkeypatch):
    config = tiny("PT", schedule__steps=4, checkpoint__every_steps=2)
    objects = {"dataset": colours, "tokenizer": tokenizer}
    run_until(monkeypatch, 2, config, **objects, model=tiny_model(1))
    with pytest.raises(
        ValueError, match="the frozen weights and the model's shapes must be those of checkpoint"
    ):
        run(config, **objects, model=tiny_model(2))

    class Fewer(Colours):
        def __len__(self) -> int:
            return 100

    with pytest.raises(
        ValueError, match="the dataset must be those of checkpoint step-00000002, got .* 100 in"
    ):
        run(config, dataset=Fewer(), tokenizer=tokenizer, model=tiny_model(1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(both, tiny, colours, tokenizer, tmp_path, number):
    """A scheduler sends SIGTERM and kills some seconds later."""
    steps = {"schedule__steps": 6, "checkpoint__every_steps": 100}
    whole = run(tiny("CPT", output_dir=tmp_path / "quiet", **steps), dataset=colours, tokenizer=tokenizer)
    config = tiny("CPT", output_dir=tmp_path / "told", **steps)

    class Tells(Colours):
        def __getitem__(self, index: int) -> Sample:
            log = tmp_path / "told" / "log.jsonl"
            sent = (tmp_path / "sent").exists()
            if not sent and log.exists() and len(read_log(log).steps) >= 2:
                (tmp_path / "sent").touch()
                os.kill(os.getpid(), number)
            return super().__getitem__(index)

    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by signal {number.value} at step 3") as stop:
        run(config, dataset=Tells(), tokenizer=tokenizer)
    assert stop.value.signal_number == number
    assert signal.getsignal(number) is handler
    assert [p.name for p in (tmp_path / "told" / "checkpoints").iterdir()] == ["step-00000003"]
    assert_bit_identical(run(config, dataset=colours, tokenizer=tokenizer), whole)


def test_a_second_signal_ends_at_once():
    """In a process of its own, since it dies."""
    child = os.fork()
    if child == 0:
        with interrupt.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_signals_are_left_alone_outside_the_main_thread():
    handler = signal.getsignal(signal.SIGTERM)
    found = []

    def enter() -> None:
        with interrupt.StopSignals() as signals:
            found.append((signals.received, signal.getsignal(signal.SIGTERM) is handler))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(0, True)]


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    files.write_json(path, {"step": 1})

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}

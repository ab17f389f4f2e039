"""log.jsonl, the printed lines, TensorBoard and gates: exact, whole after any kill, silent where asked."""

import json
import math
import mmap
import os
import sys

import pytest
import torch

from train.watch import CLOCK_KEYS, Progress, RunLog, StepRecord, Summary, read_log
from train.watch.gates import gate_parameters, gate_values, memory_bytes, resident_bytes

from .tiny_stage import tiny_model


def record(step: int, **values) -> StepRecord:
    """A plausible step; the same numbers whenever it is asked for."""
    defaults = dict(
        loss=3.0 / (step + 0.1),
        lr=1e-3 / 3 * step,
        grad_norm=0.1 + 1 / step,
        num_answer_tokens=40 + step,
        samples_seen=8 * step,
        num_skipped=0,
        num_truncated=step % 2,
        step_seconds=0.5,
        images=6,
        windows=10,
        tokens=200,
        mfu=0.41,
        memory_bytes=10**9,
        imbalance=1.25,
        gates={0: (step / 100, step / 300), 4: (0.5, 0.25)},
    )
    return StepRecord(step=step, **(defaults | values))


def write_steps(config, folder, steps, **options):
    folder.mkdir(exist_ok=True)
    with Progress(config, folder, enabled=True, **options) as progress:
        for step in steps:
            progress.step(record(step))


def without_clocks(lines):
    return [{key: value for key, value in line.items() if key not in CLOCK_KEYS} for line in lines]


def test_a_line_holds_the_step_exactly(tiny, tmp_path):
    with Progress(tiny("CPT"), tmp_path, enabled=True) as progress:
        progress.step(record(1))
    (line,) = read_log(tmp_path / "log.jsonl").steps
    expected = record(1)
    for key in ("loss", "lr", "grad_norm", "num_answer_tokens", "samples_seen", "num_truncated", "imbalance"):
        assert line[key] == getattr(expected, key), key
    assert line["gates"] == {"0": [0.01, 1 / 300], "4": [0.5, 0.25]}
    assert (line["step"], line["stage"], line["skipped_step"]) == (1, "CPT", None)
    assert (line["tokens_per_s"], line["images_per_s"]) == (400.0, 12.0)
    assert line.keys() >= CLOCK_KEYS - {"time"}


def test_numbers_that_json_lacks_become_null(tiny, tmp_path):
    with Progress(tiny("CPT"), tmp_path, enabled=True) as progress:
        progress.step(
            record(1, loss=math.nan, grad_norm=math.inf, skipped_step="nonfinite", gates={0: (math.nan, 1.0)})
        )
        progress.event("checkpoint", scale=math.inf)
    log = read_log(tmp_path / "log.jsonl")
    assert (log.steps[0]["loss"], log.steps[0]["grad_norm"]) == (None, None)
    assert log.steps[0]["gates"] == {"0": [None, 1.0]} and log.steps[0]["skipped_step"] == "nonfinite"
    assert log.events[-1]["event"] == "checkpoint" and log.events[-1]["scale"] is None


@pytest.mark.parametrize("torn", [b"", b'{"step": 8, "stage": "CP', b'{"step": 8}', b"\0\0\0\n"])
def test_a_resumed_log_is_the_uninterrupted_one(tiny, tmp_path, torn):
    """Killed behind step 7 with a line half written, resumed from the checkpoint of step 4."""
    config = tiny("CPT", schedule__steps=9)
    write_steps(config, tmp_path / "whole", range(1, 10))
    killed = tmp_path / "killed"
    write_steps(config, killed, range(1, 8))
    with (killed / "log.jsonl").open("ab") as file:
        file.write(torn)
    write_steps(config, killed, range(5, 10), resume_step=4)
    whole, resumed = read_log(tmp_path / "whole" / "log.jsonl"), read_log(killed / "log.jsonl")
    assert without_clocks(resumed.steps) == without_clocks(whole.steps)
    assert resumed.num_unreadable == 0
    seconds = [line["seconds"] for line in resumed.steps]
    assert seconds == sorted(seconds)
    assert [(e["event"], e["step"]) for e in resumed.events] == [("start", 0), ("resume", 4)]
    assert resumed.events[1]["dropped_lines"] == 3 and resumed.events[1]["unreadable_lines"] == bool(torn)
    assert sorted(path.name for path in killed.iterdir()) == ["log.jsonl", "skipped.jsonl"]


def test_seconds_go_on_where_the_kept_lines_end(tiny, tmp_path):
    clock = iter([100.0, 103.0, 107.0])  # start, two steps
    write_steps(tiny("CPT"), tmp_path, (1, 2), clock=lambda: next(clock))
    clock = iter([1000.0, 1005.0])
    write_steps(tiny("CPT"), tmp_path, (2,), resume_step=1, clock=lambda: next(clock))
    assert [line["seconds"] for line in read_log(tmp_path / "log.jsonl").steps] == [3.0, 8.0]


def test_samples_per_second_count_this_start_alone(tiny, tmp_path, capsys):
    clock = iter([0.0, 1.0, 2.0])
    write_steps(tiny("CPT"), tmp_path, (1, 2), clock=lambda: next(clock))
    clock = iter([0.0, 2.0])
    write_steps(tiny("CPT"), tmp_path, (3,), resume_step=2, clock=lambda: next(clock))
    assert "CPT: resumed after step 2/3" in (printed := capsys.readouterr().out)
    assert [line.split()[-2] for line in printed.splitlines() if "loss" in line] == ["8.0", "4.0"]


def test_a_log_that_is_gone_does_not_stop_a_resume(tiny, tmp_path, capsys):
    write_steps(tiny("CPT"), tmp_path, (3,), resume_step=2)
    assert " 0.0 samples/s" in capsys.readouterr().out, "samples of the earlier run were counted"
    log = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in log.steps] == [3] and log.events[0]["event"] == "resume"
    with pytest.raises(ValueError, match="resume_step must be at least 0, got -1"):
        RunLog(tmp_path / "log.jsonl", "CPT", -1)


def test_a_kill_while_the_log_is_cut_leaves_the_old_one(tiny, tmp_path, monkeypatch):
    write_steps(tiny("CPT"), tmp_path, range(1, 4))
    before = (tmp_path / "log.jsonl").read_bytes()

    def killed(*names):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Progress(tiny("CPT"), tmp_path, enabled=True, resume_step=1)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    write_steps(tiny("CPT"), tmp_path, (2,), resume_step=1)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl").steps] == [1, 2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "log.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        RunLog(path, "CPT")


def test_a_line_that_does_not_fit_leaves_no_half_line(tmp_path, monkeypatch):
    log = RunLog(tmp_path / "log.jsonl", "CPT")
    before = log.path.read_bytes()
    write, room = os.write, [50]

    def limited(descriptor, data):
        if not room[0]:
            raise OSError(28, "No space left on device")
        size, room[0] = min(len(data), room[0]), 0
        return write(descriptor, data[:size])

    monkeypatch.setattr(os, "write", limited)
    with pytest.raises(OSError, match=r"No space left on device: .*log\.jsonl"):
        log.step(record(1), 1.0)
    monkeypatch.undo()
    assert log.path.read_bytes() == before
    log.step(record(1), 1.0)
    assert len(read_log(log.path).steps) == 1 and read_log(log.path).num_unreadable == 0
    log.close()


def test_other_ranks_write_and_print_nothing(tiny, tmp_path, capsys):
    with Progress(tiny("CPT"), tmp_path, enabled=False, tensorboard=True, resume_step=0) as progress:
        progress.step(record(1))
        progress.event("checkpoint")
        progress.sync()
        progress.finish(Summary(samples_seen=1, skipped={"bad_json": 1}))
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_what_is_printed_without_a_terminal(tiny, tmp_path, capsys):
    config = tiny("CPT", schedule__steps=12, log_interval=5)
    with Progress(config, tmp_path, enabled=True) as progress:
        for step in range(1, 13):
            progress.step(record(step, skipped_step="spike" if step == 7 else None))
        progress.finish(
            Summary(
                samples_seen=96,
                skipped={"missing_image": 2, "bad_json": 1},
                num_truncated=6,
                skipped_steps={"spike": 1},
            )
        )
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split(" loss ")[0] for line in lines[:5]] == [f"CPT step {s}/12" for s in (1, 5, 7, 10, 12)]
    assert "loss 2.7273 lr 3.33e-04 grad_norm 1.100" in lines[0]
    assert "(spike: weights unchanged)" in lines[2] and "spike" not in "".join(lines[:2])
    assert lines[5:] == [
        "CPT: trained on 96 samples, skipped 3 (bad_json 1, missing_image 2)",
        "CPT: cut 6 samples at 32 tokens",
        "CPT: 1 steps changed no weight (spike 1)",
    ]
    assert printed.err == ""
    finish = read_log(tmp_path / "log.jsonl").events[-1]
    assert (finish["event"], finish["step"], finish["samples_seen"]) == ("finish", 12, 96)
    assert finish["skipped"] == {"missing_image": 2, "bad_json": 1}


def test_a_terminal_gets_a_bar_and_no_lines(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    with Progress(tiny("CPT", log_interval=1), tmp_path, enabled=True) as progress:
        for step in (1, 2, 3):
            progress.step(record(step))
    printed = capsys.readouterr()
    assert "step" not in printed.out
    assert "CPT" in printed.err and "3/3" in printed.err and "loss 0.9677" in printed.err


def test_file_handles_stay_as_they_are(tiny, tmp_path):
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    config = tiny("CPT", schedule__steps=400, log_interval=50)
    before = open_files()
    with Progress(config, tmp_path, enabled=True) as progress:
        during = open_files()
        for step in range(1, 401):
            progress.step(record(step))
        assert open_files() == during == before + 2
    progress.close()
    assert open_files() == before


def scalar_steps(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_after_a_resume_holds_every_step_once(tiny, tmp_path):
    config = tiny("CPT", schedule__steps=6, log_interval=1)
    write_steps(config, tmp_path, range(1, 6), tensorboard=True)
    write_steps(config, tmp_path, range(4, 7), tensorboard=True, resume_step=3)
    assert [step for step, _ in scalar_steps(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert scalar_steps(tmp_path, "gates_attn/layer_0")[4] == (5, pytest.approx(0.05))
    assert scalar_steps(tmp_path, "speed/tokens_per_s")[0] == (1, 400.0)
    write_steps(config, tmp_path, (1, 2), tensorboard=True)  # a new start
    assert [step for step, _ in scalar_steps(tmp_path, "train/loss")] == [1, 2]


def test_a_resume_within_the_same_second_is_read_after_what_it_continues(tiny, tmp_path):
    """TensorBoard reads event files by name: second, host, process, counter as plain text. A resume within
    the second of the run before, as writer 10 after writer 9 of one process, was read first."""
    config = tiny("CPT", schedule__steps=6, log_interval=1)
    seconds = []
    for step in (1, 2, 3):
        write_steps(config, tmp_path, [step], tensorboard=True, resume_step=step - 1 or None)
        seconds.append(
            {int(path.name.split(".")[3]) for path in (tmp_path / "tensorboard").iterdir()}.difference(
                *seconds
            )
        )
    assert [len(new) for new in seconds] == [1, 1, 1]


def test_tensorboard_has_an_interval(tiny, tmp_path):
    config = tiny("CPT", schedule__steps=10, log_interval=4)
    write_steps(config, tmp_path, range(1, 11), tensorboard=True)
    assert [step for step, _ in scalar_steps(tmp_path, "train/lr")] == [1, 4, 8, 10]


def test_a_missing_tensorboard_is_said_and_does_not_stop_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="no TensorBoard files.*pip install tensorboard"):
        write_steps(tiny("CPT"), tmp_path, (1, 2), tensorboard=True)
    assert len(read_log(tmp_path / "log.jsonl").steps) == 2 and not (tmp_path / "tensorboard").exists()


def test_a_tensorboard_folder_that_cannot_be_made_is_named(tiny, tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(OSError, match=r"tensorboard'"):
        Progress(tiny("CPT"), tmp_path, enabled=True, tensorboard=True)


def test_gates_are_the_mean_openings_of_each_block():
    model = tiny_model()
    layers = [int(name) for name in model.gated_blocks]
    block = model.gated_blocks[str(layers[-1])]
    with torch.no_grad():
        block.attn_gate.copy_(torch.linspace(-1, 1, len(block.attn_gate)))
        block.ffn_gate.zero_()
    values = gate_values(model)
    assert sorted(values) == sorted(layers)
    assert values[layers[-1]] == (pytest.approx(float(block.attn_gate.detach().tanh().abs().mean())), 0.0)
    for layer in layers[:-1]:
        assert values[layer] == pytest.approx((math.tanh(0.5),) * 2)
    assert json.loads(json.dumps(values[layers[-1]])) == list(values[layers[-1]])


def test_a_partitioned_gate_is_refused():
    """Under ZeRO 3 a gate that is not gathered is empty, and its mean would be NaN."""
    model = tiny_model()
    assert len(gate_parameters(model)) == 2 * len(model.gated_blocks)
    gate_parameters(model)[1].data = torch.empty(0)
    layer = next(iter(model.gated_blocks))
    with pytest.raises(ValueError, match=rf"ffn_gate of layer {layer} must be gathered.*got shape \[0\]"):
        gate_values(model)


def test_memory_is_the_resident_size_on_a_cpu():
    """Pages of their own: a tensor's may be ones that an earlier test has freed and the process kept."""
    before = resident_bytes()
    with mmap.mmap(-1, 50_000_000) as pages:
        pages.write(b"1" * 50_000_000)
        assert memory_bytes(torch.device("cpu")) - before > 40_000_000

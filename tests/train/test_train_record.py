"""What a stage says about itself: its log, the samples it left out, a bar, the share of the peak."""

import collections
import json
import sys

import numpy as np
import pytest
import torch

from train.config import TrainConfig
from train.data import BadSample, ConversationDataset, Sample
from train.engine import run
from train.flops import StepFlops
from train.optim import learning_rate

from .tiny_stage import log_of, messages, reader_of, tiny_model


def test_run_leaves_its_record(tiny, colours, tokenizer, capsys):
    config = tiny("CPT", schedule__steps=5, log_interval=2, data__workers=2)
    result = run(config, dataset=colours, tokenizer=tokenizer)
    log = [line for line in log_of(result.output_dir) if "loss" in line]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in log] == result.losses
    assert [line["grad_norm"] for line in log] == result.grad_norms
    assert [line["lr"] for line in log] == [
        learning_rate(s, config.optimizer, config.schedule) for s in range(1, 6)
    ]
    assert [line["samples_seen"] for line in log] == [8, 16, 24, 32, 40] and result.samples_seen == 40
    assert all(line["stage"] == "CPT" and line["num_answer_tokens"] > 8 for line in log)
    assert [line["seconds"] for line in log] == sorted(line["seconds"] for line in log)
    assert TrainConfig.from_dict(json.loads((result.output_dir / "config.json").read_text())) == config
    assert json.loads((result.output_dir / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.split(" loss")[0] for line in printed] == [f"CPT step {s}/5" for s in (1, 2, 4, 5)]


def test_bad_records_stop_or_are_counted(tiny, conversations, tokenizer, capsys):
    path = conversations(6)
    bad = [
        {"image": "gone.jpg", "conversations": messages("<image> which ?", "red")},
        {"image": "1.jpg", "conversations": messages("<image> ", "red")},
        {"image": "corrupt.jpg", "conversations": messages("<image> which ?", "red")},
        {"conversations": messages("? " * 40, "red")},
    ]
    (path.parent / "corrupt.jpg").write_bytes((path.parent / "0.jpg").read_bytes()[:300])
    path.write_text(path.read_text() + "".join(json.dumps(record) + "\n" for record in bad))
    dataset = ConversationDataset(path)
    config = tiny("CPT", data__workers=1, parallel__global_batch_size=5)
    # 15 samples: one epoch and a half, the order fixed by the seed
    result = run(config, dataset=dataset, tokenizer=tokenizer)
    assert result.samples_seen + sum(result.skipped.values()) == 15
    reasons = {"missing_image", "empty_question", "unreadable_image", "no_answer_left"}
    assert set(result.skipped) == reasons and all(1 <= count <= 2 for count in result.skipped.values())
    lines = log_of(result.output_dir)
    steps = [line for line in lines if "loss" in line]
    (summary,) = [line for line in lines if line.get("event") == "finish"]
    assert sum(line["num_skipped"] for line in steps) == sum(result.skipped.values())
    assert summary["skipped"] == result.skipped
    printed = capsys.readouterr().out
    assert all(f"{reason} {count}" in printed for reason, count in result.skipped.items())
    written = [json.loads(line) for line in (result.output_dir / "skipped.jsonl").read_text().splitlines()]
    written = [line for line in written if "reason" in line]
    assert collections.Counter(line["reason"] for line in written) == result.skipped
    assert all(str(path) in line["message"] and line["step"] in (1, 2, 3) for line in written)

    stopping = tiny("DRA", parallel__global_batch_size=10, data__workers=1, data__on_bad_sample="error")
    with pytest.raises(BadSample, match=f"{path} line (7|8|9|10): "):
        run(stopping, dataset=dataset, tokenizer=tokenizer)


def test_truncated_samples_are_counted(tiny, colours, tokenizer):
    result = run(tiny("CPT", data__sequence_length=8), dataset=colours, tokenizer=tokenizer)
    assert 0 < result.num_truncated < result.samples_seen == 24
    lines = [line for line in log_of(result.output_dir) if "loss" in line]
    assert sum(line["num_truncated"] for line in lines) == result.num_truncated


def test_a_batch_without_answers_is_left_out(tiny, tokenizer):
    """It stopped the run, however few of the samples were bad in all."""

    class Silent:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Sample:
            return Sample([np.zeros((28, 28, 3), np.uint8)], [("<image>which ?", "")])

    config = tiny("CPT", data__on_bad_sample="skip")
    model = tiny_model()
    model.set_window_size(config.image.window_size)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(config, dataset=Silent(), tokenizer=tokenizer, model=model)
    assert result.samples_seen == 0 and result.skipped == {"empty_answer": 24}
    lines = [line for line in log_of(result.output_dir) if "loss" in line]
    assert [line["skipped_step"] for line in lines] == ["empty"] * 3
    assert all(torch.equal(after, before[name]) for name, after in model.state_dict().items())


def test_a_terminal_gets_a_bar(tiny, colours, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(tiny("PT"), dataset=colours, tokenizer=tokenizer)
    printed = capsys.readouterr()
    assert printed.out == ""
    for shown in ("PT ", "3/3", "samples/s"):
        assert shown in printed.err


def test_mfu_is_counted_work_over_the_peak(tiny, colours, tokenizer, monkeypatch):
    """On a GPU of a known peak; a CPU has none and logs null."""
    config = tiny("IFT", parallel__gradient_accumulation_steps=2)
    steps = [
        line
        for line in log_of(run(config, dataset=colours, tokenizer=tokenizer).output_dir)
        if "loss" in line
    ]
    assert [line["mfu"] for line in steps] == [None] * 3
    monkeypatch.setattr("train.stage.peak_flops", lambda name, precision: 1e12)
    config = tiny("IFT", parallel__gradient_accumulation_steps=2, checkpoint__resume=False)
    model = tiny_model()
    result = run(config, dataset=colours, tokenizer=tokenizer, model=model)
    flops = StepFlops(model.config, config.trainable)
    reader = reader_of(config, colours, tokenizer, 4)
    for step, line in enumerate(line for line in log_of(result.output_dir) if "loss" in line):
        work = sum(flops.of_batch(batch, recomputed=False) for batch in reader(step).micro_batches)
        assert line["mfu"] == pytest.approx(work / (line["step_seconds"] * 1e12), rel=1e-3)

"""bench.trainer: its bare loop and its pieces at tiny size, its verdicts on numbers made up, its document."""

import json

import pytest
import torch

from bench import results, trainer
from bench.plain_trainer import train_plainly
from bench.trainer_stage import (
    BATCH,
    MEDIUM,
    TINY,
    build_model,
    stage_config,
    step_reader,
    write_conversations,
)
from train.demo.vocabulary import build_tokenizer
from train.engine import run

PHOTOGRAPHS = (("chelsea.png", 80), ("rocket.jpg", 130))
DOCUMENT = {
    "device": "Test CPU",
    "threads": 2,
    "torch": "2.13.0",
    "date": "2030-01-02",
    "command": "python -m bench.trainer --save",
    "overhead": [
        {
            "parameters": 23_000_000,
            "batch": 8,
            "zero_stage": zero_stage,
            "plain_ms": 500.0,
            "deepspeed_ms": 520.0,
            "ratio": 1.04,
            "ratio_by_turn": [1.03, 1.05],
            "ratio_of_shortest": 1.02,
            "target": target,
            "demand_samples_per_s": 16.5,
        }
        for zero_stage, target in ((0, 1.1), (2, None))
    ],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_compared_model_has_more_than_20_million_parameters():
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(MEDIUM).parameters())
    assert 20_000_000 < count < 30_000_000


def test_the_bare_loop_trains_as_the_engine_does(tmp_path):
    """Otherwise the ratio would compare two different trainings."""
    dataset = write_conversations(tmp_path, PHOTOGRAPHS)
    config = stage_config(tmp_path / "run", 6, zero_stage=1)
    plain, engine = build_model(TINY), build_model(TINY)
    device = torch.device("cpu")
    times = train_plainly(config, plain, step_reader(config, plain, dataset), device)
    result = run(config, dataset=dataset, tokenizer=build_tokenizer(), model=engine)
    assert times.losses == pytest.approx(result.losses, rel=1e-5)
    assert times.losses[-1] < 0.97 * times.losses[0]
    for (name, ours), theirs in zip(plain.named_parameters(), engine.parameters(), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert all(0 < read < whole for read, whole in zip(times.read_seconds, times.seconds, strict=True))


def test_overhead_at_tiny_size():
    found = trainer.measure_overhead(options=TINY, steps=6, repeats=2, zero_stage=0)
    assert found["steps_of_each"] == 2 * (6 - trainer.FIRST_STEPS)
    assert found["ratio"] == pytest.approx(found["deepspeed_ms"] / found["plain_ms"])
    assert len(found["ratio_by_turn"]) == 2
    assert found["within_target"] == (found["ratio"] <= 1.1)
    assert found["largest_loss_difference"] < 1e-5


def test_loops_that_train_differently_are_not_compared(monkeypatch):
    real = trainer.train_plainly

    def other(config, *arguments):
        config.optimizer.lr_peak *= 2
        return real(config, *arguments)

    monkeypatch.setattr(trainer, "train_plainly", other)
    with pytest.raises(RuntimeError, match="losses of the two loops must agree"):
        trainer.measure_overhead(options=TINY, steps=6, repeats=1, zero_stage=2)


def test_loader_at_tiny_size():
    rows = trainer.measure_loader(photographs=PHOTOGRAPHS, steps=2, repeats=1, paper_window=28)
    assert [(row["window"], row["workers"]) for row in rows] == [(w, n) for w in (56, 28) for n in (0, 1, 2)]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(row["samples_per_s"]) and row["samples_per_s"] > 0
        assert row["windows_per_s"] == pytest.approx(row["images_per_s"] * row["windows_per_image"])
    assert rows[0]["windows_per_image"] == 1 and rows[3]["windows_per_image"] > 2


def test_step_times_come_from_the_log(tmp_path):
    lines = [{"event": "start", "step": 0}, *({"step": s, "loss": 1.0, "seconds": s * s} for s in (1, 2, 3))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert trainer.step_seconds(tmp_path / "log.jsonl") == [3, 5]


def made_up(growth, files_growth=0.0):
    return [
        (step, 400_000_000 + round(growth * step), 20 + int(files_growth * step))
        for step in range(0, 1000, 10)
    ]


def test_a_soak_is_judged_by_its_slopes():
    flat = trainer.summed_up(made_up(0), 1000, 1.0)
    assert (
        flat["flat"] and flat["slope_bytes_per_step"] == pytest.approx(0) and flat["file_handles"] == [20, 20]
    )
    leak = trainer.summed_up(made_up(20_000), 1000, 1.0)
    assert not leak["flat"] and leak["slope_bytes_per_step"] == pytest.approx(20_000)
    assert not trainer.summed_up(made_up(0, 0.02), 1000, 1.0)["flat"]
    early = [(step, 300_000_000 if step < 100 else rss, files) for step, rss, files in made_up(0)]
    assert trainer.summed_up(early, 1000, 1.0)["flat"], "the first quarter is not judged"
    with pytest.raises(ValueError, match="at least 3 samples"):
        trainer.summed_up(made_up(0)[:2], 1000, 1.0)


def test_a_short_soak():
    found = trainer.measure_soak(40, samples=20)
    assert found["samples"] == 20 and found["steps"] == 40
    assert [step for step, _, _ in found["noted"]] == list(range(0, 40, 2))
    low, high = found["file_handles"]
    assert low == high, "a step opens files that it does not close"
    assert found["end_mb"] > 50


@pytest.mark.long
def test_a_soak_is_flat():
    found = trainer.measure_soak(600)
    found.pop("noted")
    assert found["flat"], found


def test_the_document_and_the_block_of_the_readme(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# A\n<!-- trainer -->\nold\n<!-- /trainer -->\nend\n")
    monkeypatch.setattr("bench.report.README", readme)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(trainer, "report", lambda options: DOCUMENT)
    trainer.main(["--save", "--json"])
    assert json.loads(capsys.readouterr().out) == DOCUMENT
    (path,) = (tmp_path / "results" / "trainer").iterdir()
    assert path.name in ("cpu-2030-01-02.json", "gpu-2030-01-02.json")
    assert json.loads(path.read_text()) == DOCUMENT
    text = readme.read_text()
    assert "old" not in text and text.startswith("# A\n") and text.endswith("<!-- /trainer -->\nend\n")
    assert "| ratio of the two, at most 1.10 wanted | 1.040 |" in text and "Test CPU, 2 threads" in text
    assert "| the same on DeepSpeed, ZeRO 2 | 520 ms |\n| ratio of the two | 1.040 |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "PART must be one of overhead, loader, soak, got 'speed'"),
        (["--steps", "3"], "--steps must be at least 4, got 3"),
        (["--overhead-steps", "3"], "--overhead-steps must be at least 4, got 3"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        trainer.parse(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_batch_is_that_of_the_config(tmp_path):
    config = stage_config(tmp_path, 4, zero_stage=2)
    assert config.parallel.global_batch_size == BATCH and config.parallel.precision == "fp32"
    assert config.parallel.gradient_accumulation_steps == 1

"""Several ranks, started as a user starts them: by DeepSpeed's launcher and by torchrun."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.config import TrainConfig
from train.engine import run
from train.overrides import override

from .tiny_stage import assert_weights_close, log_of, messages, tiny_config, weights_of, write_conversations

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_S = 280
"""Other tests run beside it: a start took 100 s on two busy cores."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def popen(launcher: str, config: Path, *overrides: str) -> subprocess.Popen:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = {
        "python": [sys.executable, "-m"],
        "deepspeed": [BIN / "deepspeed", "--num_gpus", "2", "--master_port", port, "--module"],
        "torchrun": [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", port, "-m"],
    }[launcher]
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    return subprocess.Popen(
        [*map(str, command), "train", str(config), *overrides],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(launcher: str, config: Path, *overrides: str) -> subprocess.CompletedProcess:
    with popen(launcher, config, *overrides) as started:
        try:
            out, err = started.communicate(timeout=TIMEOUT_S)
        finally:
            started.kill()
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


def assert_same_training(folder: Path, expected: Path, rel: float = 1e-5) -> None:
    got, wanted = ([line for line in log_of(where) if "loss" in line] for where in (folder, expected))
    for key in ("step", "num_answer_tokens", "samples_seen", "num_skipped", "lr"):
        assert [line[key] for line in got] == [line[key] for line in wanted]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in got] == pytest.approx([line[key] for line in wanted], rel=rel)
    assert_weights_close(weights_of(folder), weights_of(expected))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, tokenizer) -> TrainConfig:
    """A stage trained by one rank on whole batches: 8 records a batch, two of them without an image."""
    folder = tmp_path_factory.mktemp("one_rank")
    tokenizer.save_pretrained(folder / "tokenizer")
    config = tiny_config(
        "CPT",
        folder / "output",
        data__path=str(write_conversations(folder / "data", 12)),
        data__tokenizer=str(folder / "tokenizer"),
    )
    run(config)
    return config


@pytest.fixture
def config_file(tmp_path):
    def write(config: TrainConfig) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config.to_dict()))
        return path

    return write


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("launcher", "zero_stage", "accumulation"),
    [("deepspeed", 2, 2), ("python", 2, 1), ("torchrun", 3, 1), ("torchrun", 0, 2)],
)
def test_two_ranks_train_as_one(one_rank, config_file, tmp_path, launcher, zero_stage, accumulation):
    done = launch(
        launcher,
        config_file(one_rank),
        f"output_dir={tmp_path / 'output'}",
        f"parallel.zero_stage={zero_stage}",
        f"parallel.gradient_accumulation_steps={accumulation}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("CPT step 3/3") == 1, "one rank prints"
    assert_same_training(tmp_path / "output", Path(one_rank.output_dir))


@pytest.mark.long
def test_a_foreign_output_folder_stops_both_ranks(one_rank, config_file, tmp_path):
    """Rank 0 looks, and tells rank 1 before it builds a model and waits for a rank that is gone. One of them
    may be ended by torchrun before it has said so; a line is never torn by the other's, as it was."""
    precious = tmp_path / "output" / "model" / "config.py"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    done = launch("torchrun", config_file(one_rank), f"output_dir={tmp_path / 'output'}")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "train: error" in line]
    folder = str(tmp_path / "output")
    rule = "output_dir must not hold a 'model' that no stage wrote (no config.json of a stage there)"
    assert set(said) == {f"train: error: {rule}, got {folder!r}"}
    assert [path.name for path in (tmp_path / "output").rglob("*")] == ["model", "config.py"]


def test_a_rank_without_any_good_sample_keeps_up(one_rank, config_file, tmp_path):
    """In dataset order rank 1 of 2 reads the second half of every batch, here all bad: it trains on nothing,
    sees no image, and the step is that of the good half alone."""
    path = write_conversations(tmp_path / "data", 4)
    bad = {"image": "gone.jpg", "conversations": messages("<image> which ?", "red")}
    path.write_text(path.read_text() + (json.dumps(bad) + "\n") * 4)
    overrides = {"data.path": str(path), "data.shuffle": False, "data.on_bad_sample": "skip"}
    config = override(one_rank, overrides | {"output_dir": str(tmp_path / "one_rank")})
    run(config)
    done = launch("torchrun", config_file(config), f"output_dir={tmp_path / 'two_ranks'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPT: trained on 12 samples, skipped 12 (missing_image 12)" in done.stdout
    for folder in ("one_rank", "two_ranks"):
        (finish,) = [line for line in log_of(tmp_path / folder) if line.get("event") == "finish"]
        assert finish["skipped"] == {"missing_image": 12}
    assert_same_training(tmp_path / "two_ranks", tmp_path / "one_rank")


@pytest.mark.long
def test_a_bad_sample_of_one_rank_stops_both(one_rank, config_file, tmp_path):
    """The ranks exchange counts before they compute, so that the good rank does not wait in a collective."""
    path = write_conversations(tmp_path / "data", 7)
    path.write_text(path.read_text() + "not JSON\n")
    overrides = [f"output_dir={tmp_path / 'output'}", f"data.path={path}", "data.shuffle=false"]
    overrides.append("data.on_bad_sample=error")
    done = launch("deepspeed", config_file(one_rank), *overrides)
    assert done.returncode != 0
    assert f"train: error: {path} line 8: record must be JSON, got b'not JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "output" / "model").exists()


@pytest.mark.long
def test_a_launcher_told_to_stop_goes_on_with_one_rank(one_rank, config_file, tmp_path):
    """torchrun passes SIGTERM on to its ranks: both save at the same step. One process goes on from there."""
    command = {"checkpoint.every_steps": None, "schedule.steps": 40, "schedule.warmup_steps": 1}
    config = override(one_rank, command | {"output_dir": str(tmp_path / "whole")})
    run(config)
    config = override(config, {"output_dir": str(tmp_path / "told")})
    started = popen("torchrun", config_file(config), "log_interval=1")
    log = tmp_path / "told" / "log.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=TIMEOUT_S)
    assert started.returncode != 0
    assert "train: error: stopped by signal 15 at step " in err, out + err
    (saved,) = (tmp_path / "told" / "checkpoints").iterdir()
    assert f"at step {int(saved.name[5:])}" in err
    run(config)
    # two ranks sum in another order, and 40 steps carry that on
    assert_same_training(tmp_path / "told", tmp_path / "whole", rel=1e-3)

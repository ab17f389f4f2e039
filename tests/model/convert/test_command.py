"""`python -m model convert | build | inspect`, and how much memory a conversion takes."""

import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from model import InfiMMHD, InfiMMHDConfig, preset
from model.__main__ import main
from tests.model.convert.conftest import tensors_in

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    InfiMMHD(preset("tiny")).save_pretrained(folder)
    return folder


def test_convert_prints_what_it_did(saved, tmp_path, capsys):
    out = str(tmp_path / "out")
    options = ["--window-size", "56", "--dtype", "bfloat16", "--max-shard-size", "1MB", "--preset", "tiny"]
    assert main(["convert", str(saved), out, "--from", "infimm-hd", "--to", "infimm-hd", *options]) == 0
    printed = capsys.readouterr().out
    assert "missing: none" in printed and "unexpected: none" in printed and "left out: none" in printed
    assert "interpolated: vision.position_table, from 4 x 4 to 8 x 8 patches" in printed
    assert "tokenizer: none in" in printed and f"written: {out} (infimm-hd)" in printed
    tensors = tensors_in(tmp_path / "out")
    assert tensors["vision.position_table"].shape == (65, 112)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_build_and_inspect(saved, tmp_path, capsys):
    main(["convert", str(saved), str(tmp_path / "llm"), "--to", "transformers-llama"])
    main(["convert", str(saved), str(tmp_path / "vit"), "--to", "timm"])
    capsys.readouterr()
    parts = ["--vision", str(tmp_path / "vit"), "--language", str(tmp_path / "llm"), "--seed", "4"]
    assert main(["build", str(tmp_path / "start"), "--preset", "tiny", *parts]) == 0
    assert "new: connector." in capsys.readouterr().out
    model = InfiMMHD.from_pretrained(tmp_path / "start")
    assert model.config.vision_config.feature_layer == preset("tiny").vision_config.feature_layer
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "start")]) == 0
    printed = capsys.readouterr().out
    assert "vision: 4 post_norm blocks of 112, 1 heads" in printed and "types: F32" in printed
    counts = {part: 0 for part in ("vision", "gated", "language")}
    for name, weight in model.named_parameters():
        root = name.partition(".")[0]
        counts[root if root in counts else "gated"] += weight.numel()
    for part, count in counts.items():
        assert f"{part}: {count:,} parameters" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nowhere", "OUT"], "SRC must be an existing file or folder, got 'nowhere'"),
        (["convert", "SAVED", "SAVED"], "DST must be a new or an empty folder"),
        (["convert", "SAVED", "OUT", "--preset", "infimm_hd_13b"], "vision_config.hidden_size 1792 for 112"),
        (["convert", "SAVED", "OUT", "--preset", "giant"], "name must be one of"),
        (["convert", "SAVED", "OUT", "--from", "timm"], "known form, one of timm"),
        (["inspect", "nowhere"], "SRC must be"),
        (["build", "OUT", "--preset", "tiny", "--vision", "SAVED", "--language", "nowhere"], "SRC must be"),
        (
            ["build", "OUT", "--preset", "tiny", "--vision", "SAVED", "--language", "SAVED", "--seed", "-1"],
            "seed",
        ),
        (["build", "OUT", "--preset", "llava_hr_7b", "--vision", "SAVED", "--language", "SAVED"], "mixture"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, saved, tmp_path, capsys):
    places = {"SAVED": str(saved), "OUT": str(tmp_path / "out")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert not printed.out and not (tmp_path / "out").exists()


RUN = """
import runpy, sys
from model.convert import convert
small, source, destination, *targets = sys.argv[1:]
for target in targets:  # imports and allocates what every run does
    sys.argv[1:] = ["convert", small, destination + target + "-small", "--to", target]
    try:
        runpy.run_module("model", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0
assert not any(name.partition(".")[0] in ("train", "deepspeed") for name in sys.modules)
for target in targets:
    print("ready", flush=True)
    sys.stdin.readline()
    convert(source, destination + target, target=target, dtype="bfloat16", max_shard_size="20MB")
print("done", flush=True)
"""


@pytest.mark.long
def test_a_process_needs_memory_for_a_shard_and_no_trainer(saved, tmp_path):
    """The anonymous memory of a process that converts 130 MB, beyond what it has after a small conversion."""
    config = preset("tiny").to_dict()
    text = dict(vocab_size=8000, hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    config["text_config"] |= text
    model = InfiMMHD(InfiMMHDConfig.from_dict(config))
    size = sum(weight.nbytes for weight in model.parameters())
    assert size > 120e6
    model.save_pretrained(tmp_path / "large")
    targets = ("infimm-hd", "transformers-llama")
    arguments = [str(saved), str(tmp_path / "large"), str(tmp_path / "out-"), *targets]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], cwd=ROOT, **pipes)
    lines = queue.SimpleQueue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stdout])
    reader.start()
    try:
        while lines.get(timeout=200) != "ready\n":  # behind what the small conversions print
            pass
        for target in targets:
            start = peak = anonymous_memory(process.pid)
            process.stdin.write("\n")
            process.stdin.flush()
            while lines.empty() and process.poll() is None:
                peak = max(peak, anonymous_memory(process.pid))
                time.sleep(0.001)
            assert lines.get(timeout=9) == ("done\n" if target == targets[-1] else "ready\n")
            files = (tmp_path / f"out-{target}").glob("*.safetensors")
            largest = max(path.stat().st_size for path in files)
            megabytes = [round(value / 1e6, 1) for value in (size, largest, peak - start)]
            print(target, "model, largest shard, peak in MB:", *megabytes)
            assert largest <= 20.1e6
            assert peak - start < 1.3 * largest + 4e6
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdin.close()
        process.stdout.close()


def anonymous_memory(process: int) -> int:
    """Bytes of the process alone; pages of mapped files, which the kernel drops at will, do not count."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in text.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0

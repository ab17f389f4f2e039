"""The check reads what training would read, counts every sample, and says so in its exit code."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from train.data.__main__ import main
from train.data.check import check_dataset, spread
from train.data.templates import TEMPLATES
from train.demo.painted import PaintedPhotographs

from .tiny_stage import messages, word_tokenizer, write_conversations


@pytest.fixture
def mixed(tmp_path):
    """A manifest of a good set with 8 records and one with 4 bad ones of 10."""
    good, bad = write_conversations(tmp_path / "good", 8), write_conversations(tmp_path / "bad", 8)
    (bad.parent / "1.jpg").write_bytes(b"no picture")
    Image.fromarray(np.full((1000, 600, 3), 9, np.uint8)).save(bad.parent / "0.jpg")
    lines = bad.read_text().splitlines()
    lines[3:5] = ["{", json.dumps({"image": "gone.jpg", "conversations": messages("<image>?", "red")})]
    lines += ["[", json.dumps({"conversations": messages("which ?", "dark red " * 9)})]
    bad.write_text("\n".join(lines))
    sets = [
        {"name": "good", "reader": "conversations", "path": str(good), "weight": 3},
        {"name": "bad", "reader": "conversations", "path": str(bad), "weight": 1},
    ]
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"sets": sets}))
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_report_of_every_set(mixed, capsys, workers):
    assert main(["check", str(mixed), "--json", "--workers", str(workers)]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""  # no bar without a terminal
    assert (report["read"], report["skipped"], report["skipped_share"]) == (18, 4, pytest.approx(4 / 18))
    good, bad = report["sets"]
    assert (good["name"], good["length"], good["good"], good["skipped"]) == ("good", 8, 8, {})
    assert (good["share"], bad["share"]) == (0.75, 0.25)
    assert bad["skipped"] == {"bad_json": 2, "unreadable_image": 1, "missing_image": 1}
    assert bad["good"] == 6 and bad["good"] + sum(bad["skipped"].values()) == bad["read"] == bad["length"]
    (example,) = bad["examples"]["missing_image"]
    assert "records.jsonl line 5: image must be an existing file" in example
    assert good["image_height"] == dict(min=30, median=30, p95=30, max=30)
    # 1000 x 600 pixels are 2 x 1 windows of 448 and a thumbnail
    assert bad["image_height"]["max"] == 1000 and bad["windows_of_448"]["max"] == 3
    assert good["images_per_sample"] == dict(min=0, median=1, p95=1, max=1)
    assert bad["text_characters"]["max"] == len("which ?" + ("dark red " * 9).strip())


def test_exit_code_and_table(mixed, capsys):
    assert main(["check", str(mixed), "--max-skipped-share", "0.5"]) == 0
    printed = capsys.readouterr().out
    for text in ("good", "75.00%", "bad: bad_json 2", "records.jsonl line 5", "bad samples: 22.22%"):
        assert text in printed
    good = mixed.parent / "good" / "records.jsonl"
    assert main(["check", str(good), "--max-skipped-share", "0"]) == 0


def test_limit_spreads_over_the_set(mixed, capsys):
    assert main(["check", str(mixed), "--json", "--limit", "2", "--max-skipped-share", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["read"] for entry in report["sets"]] == [2, 2]
    (endless,) = check_dataset(PaintedPhotographs(), "painted", limit=3)
    assert (endless.good, endless.read) == (3, 3)
    with pytest.raises(ValueError, match="--limit must be given for a set without an end"):
        check_dataset(PaintedPhotographs(), "painted")


def test_lengths_in_tokens(mixed, tmp_path, capsys):
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    good = str(mixed.parent / "good" / "records.jsonl")
    assert main(["check", good, "--json", "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["sets"]
    assert entry["text_tokens"] == dict(min=4, median=4, p95=9, max=9)


def test_readers_and_options(mixed, tmp_path, capsys):
    path = tmp_path / "gqa.json"
    path.write_text(json.dumps({"1": {"imageId": "0", "question": "which ?", "answer": "red"}}))
    options = ["--option", "form=gqa", "--option", f"image_root={tmp_path / 'good'}"]
    assert main(["check", str(path), "--reader", "vqa", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sets"][0]["good"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "gone.jsonl"], "data.path must be an existing file, got 'gone.jsonl'"),
        (["check", "gone.tar"], "data.path must name existing shards, got 'gone.tar'"),
        (["check", "MANIFEST", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["check", "MANIFEST", "--workers", "-1"], "--workers must be at least 0, got -1"),
        (["check", "MANIFEST", "--max-skipped-share", "2"], "--max-skipped-share must lie in 0..1, got 2.0"),
        (["check", "MANIFEST", "--option", "form"], "--option must be KEY=VALUE, got 'form'"),
        (["check", "MANIFEST", "--reader", "vqa2"], "did you mean 'vqa'"),
        (["check", "MANIFEST", "--tokenizer", "gone"], "--tokenizer must be a folder with a saved tokenizer"),
    ],
)
def test_wrong_arguments_are_one_line(mixed, capsys, words, message):
    assert main([str(mixed) if word == "MANIFEST" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("data: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_manifest_prints_a_template(name, capsys):
    assert main(["manifest", name]) == 0
    assert json.loads(capsys.readouterr().out) == TEMPLATES[name]()


def test_spread():
    values = [1] * 60 + [2] * 34 + [7] * 5 + [9]
    counts = {value: values.count(value) for value in set(values)}
    assert spread(counts) == dict(min=1, median=1, p95=7, max=9)
    assert spread({}) is None


def test_a_terminal_gets_a_bar(mixed, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setitem(os.environ, "TERM", "xterm")
    assert main(["check", str(mixed), "--json"]) == 1
    captured = capsys.readouterr()
    assert "reading" in captured.err and json.loads(captured.out)["read"] == 18

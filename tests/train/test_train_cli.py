"""The command line: what it prints, and how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from train.__main__ import main
from train.config import TrainConfig
from train.overrides import override
from train.recipes import DRA, PT, RECIPES

ROOT = Path(__file__).parents[2]


def test_print_config_round_trips(capsys, tmp_path):
    assert main(["dra", "optimizer.lr_peak=2e-5", "--print-config", "data.path=vqa.jsonl"]) == 0
    text = capsys.readouterr().out
    expected = override(DRA(), {"optimizer.lr_peak": 2e-5, "data.path": "vqa.jsonl"})
    assert TrainConfig.from_dict(json.loads(text)) == expected
    (tmp_path / "config.json").write_text(text)
    assert main([str(tmp_path / "config.json"), "--print-config"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CTP"], "got 'CTP'; did you mean 'CPT'?"),
        (["PT", "optimizer.lr_pek=1"], "got 'optimizer.lr_pek'; did you mean 'optimizer.lr_peak'?"),
        (["PT", "schedule.steps=-3"], "schedule.steps must be an int of at least 1, got -3"),
        (["PT", "trainable=languag"], "got 'languag'; did you mean 'language'?"),
        (["PT", "output_dir="], "output_dir must not be empty, got ''"),
        (["PT", "init_from="], "init_from must not be empty, got ''"),
        (["PT", f"seed={10**30}"], f"seed must be at most {2**63 - 1} (2^63 - 1), got {10**30}"),
        (["missing.json"], "recipe must be an existing config file, got 'missing.json'"),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err and printed.err.count("\n") == 1
    with pytest.raises(ValueError):
        main([*arguments, "--debug"])


def test_a_stopped_run_is_one_line_and_code_1(tmp_path):
    words = ["PT", f"output_dir={tmp_path / 'pt'}", "init_from=nowhere", "data.path=nowhere.jsonl"]
    command = [sys.executable, "-m", "train", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    error = "train: error: data.path must be an existing file, got 'nowhere.jsonl'"
    assert done.stderr.splitlines() == [error]


def test_a_config_file_that_cannot_be_read_is_named(capsys, tmp_path):
    """A byte that is no UTF-8 was reported without the file's name, an unreadable file as a traceback."""
    path = tmp_path / "config.json"
    for content in (b"\xff", b'{"stage": '):
        path.write_bytes(content)
        assert main([str(path)]) == 2
        assert f"recipe must be a readable JSON config, got {str(path)!r}: " in capsys.readouterr().err


def test_help_lists_recipes_and_its_examples_parse(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in RECIPES:
        assert f"  {name} " in text
    examples = [line.split()[3:] for line in text.splitlines() if line.strip().startswith("python -m train ")]
    assert len(examples) >= 4
    for words in examples:
        assert main([*(word for word in words if word != "--print-config"), "--print-config"]) == 0


def test_launcher_argument_is_accepted(capsys):
    assert main(["--local_rank=1", "PT", "--print-config"]) == 0
    assert TrainConfig.from_dict(json.loads(capsys.readouterr().out)) == PT()


def test_configs_need_no_torch():
    """`--help` and a wrong key must answer at once, not after seconds of imports."""
    code = (
        "import sys, train.__main__; train.__main__.main(['PT', '--print-config']); "
        "print([name for name in ('torch', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr

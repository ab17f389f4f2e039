"""What the README's first screen says is so."""

import re
from pathlib import Path

import pytest

from model.__main__ import main as model_main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def test_the_first_example_runs_and_agrees_with_eager():
    exec(blocks("python")[0], {})


def test_the_gated_block_example_runs():
    (example,) = [block for block in blocks("python") if "decode_segments" in block]
    exec(example, {})


def test_the_model_example_runs():
    (example,) = [block for block in blocks("python") if "InfiMMHDProcessor" in block]
    found: dict = {}
    exec(example, found)
    assert isinstance(found["answer"], str) and found["tokens"].shape[0] == 1


def test_the_model_commands_are_subcommands(capsys):
    commands = re.findall(r"^python -m model (\w+)", README, flags=re.MULTILINE)
    assert set(commands) == {"generate", "chat", "inspect", "convert", "build"}
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            model_main([command, "--help"])
        assert stopped.value.code == 0


def test_the_file_tree_names_what_exists():
    tree = next(block for block in blocks("") if block.startswith("csrc/"))
    room = ROOT
    for line in tree.splitlines():
        names = line.strip().split("  ")[0].split()
        if not line.startswith(" "):
            room = ROOT / names[0]
            assert room.is_dir(), line
        else:
            for name in names:
                assert list(room.glob(name.rstrip("/"))), line


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text()

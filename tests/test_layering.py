"""Data flows one way, csrc <- infimm_kernels <- model <- train; bench and tests stand on top."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "infimm_kernels": {"infimm_kernels"},
    "model": {"infimm_kernels", "model"},
    "train": {"infimm_kernels", "model", "train"},
}
ROOMS = {"infimm_kernels", "model", "train", "bench", "tests"}


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else node.module)
    return {name.split(".")[0] for name in names} & ROOMS


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_down(room):
    wrong = {
        str(path.relative_to(ROOT)): sorted(upward)
        for path in sorted((ROOT / room).rglob("*.py"))
        if (upward := imported_rooms(path) - MAY_IMPORT[room])
    }
    assert not wrong


def test_the_rule_sees_an_upward_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "model" / "layer.py"
    path.parent.mkdir()
    path.write_text("import torch\ndef f():\n    from train.engine import Engine\n")
    assert imported_rooms(path) == {"train"}


def test_device_code_includes_no_torch_header():
    wrong = [
        str(path)
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in (".h", ".cuh", ".cu", ".cpp") and "torch/" in path.read_text()
    ]
    assert not wrong

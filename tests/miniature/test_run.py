"""The command: pieces in processes, going on, refusals."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.miniature import __main__ as cli
from bench.miniature import run, sizes
from bench.miniature.arms import ARMS
from bench.miniature.plots import draw_answers

from .conftest import SOME_ARMS, TINY


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


def test_all_arms_run_and_the_long_ones_first():
    runs = run.runs_of(list(ARMS), (0, 1))
    assert len(runs) == len(set(runs)) == 2 * (len(ARMS) + 2)
    assert {r for r in runs if r[2] == "compute"} == {
        (a, s, "compute") for a in ("224", "448") for s in (0, 1)
    }
    assert runs[0][0] == "mixture-of-resolution" and runs[-1][0] == "text-only"


def test_what_is_done_is_not_done_again(trained, tiny, capsys):
    """All pieces are there: the command only scores them, in this process."""
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != "document.json"}
    arms = [a for a in SOME_ARMS if a != "448"]
    assert cli.main(["--size", "tiny", "--output", str(trained), "--arms", *arms, "--seeds", "0"]) == 0
    printed = capsys.readouterr().out
    assert all(arm in printed for arm in arms)
    assert "no better than constant answers" in printed
    after = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != "document.json"}
    assert {p: t for p, t in after.items() if p.is_file()} == {p: t for p, t in before.items() if p.is_file()}


@pytest.mark.long
def test_pieces_run_in_processes(warm, tiny):
    """One arm of another seed."""
    run.run_all(TINY, ["dynamic"], [1], warm)
    assert (warm / "arms" / "dynamic-1-steps.json").exists()


def test_pictures_of_answers(trained, tmp_path):
    paths = draw_answers(TINY, trained, tmp_path, "picture")
    assert all(path.stat().st_size > 20_000 for path in paths)


def _fail(*arguments):
    raise ValueError("no such page")


def test_a_piece_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda count, **_: ThreadPoolExecutor(count))
    with pytest.raises(RuntimeError, match="448, seed 3 failed: no such page"):
        run._side_by_side([("448, seed 3", _fail, ())], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "449"], "invalid choice: '449'"),
        (["--seeds", "1", "1"], "--seeds must be different and not negative, got [1, 1]"),
        (["--size", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_refused_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_of_other_settings_is_refused(warm, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--size", "cpu", "--output", str(warm)])
    assert ended.value.code == 2
    assert "--output must be a new folder or one of the same settings" in capsys.readouterr().err

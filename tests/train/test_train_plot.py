"""`python -m train plot`: the right numbers of the right stages in the right order, and clear refusals."""

import json
import os

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from train import plot
from train.demo.plots import plot_losses
from train.plot import draw, main, smoothed
from train.watch.runs import NO_REASON, find_stages

from .synthetic_run import LAYERS, write_run, write_stage

SCALE = 0.1


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    write_run(folder, SCALE)
    return folder


def names(runs):
    stages, left_out = find_stages([str(run) for run in runs])
    return [stage.folder.name for stage in stages], [folder.name for folder in left_out]


def drawn(monkeypatch, stages, path):
    """The panels of the picture by title or label, caught before they are closed."""
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    draw(stages, path, "title")
    monkeypatch.undo()
    panels = {axes.get_title("left") or axes.get_ylabel(): axes for axes in kept[0].axes}
    plt.close(kept[0])
    return panels


def test_a_folder_of_stages_is_one_picture(run_folder, capsys):
    assert main([str(run_folder)]) == 0
    path = run_folder / "training.png"
    assert f"PT, CPT, DRA, IFT: {path}" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == 1200 and picture.height > 800
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 500


def test_what_the_panels_show(run_folder, tmp_path, monkeypatch):
    stages, _ = find_stages([str(run_folder)])
    panels = drawn(monkeypatch, stages, tmp_path / "a.png")
    loss = panels["loss per answer token (nats)"]
    assert [text.get_text() for text in loss.texts] == ["PT", "CPT", "DRA", "IFT"]
    assert loss.get_xlim() == (0, 60 + 40 + 40 + 55)
    points = loss.lines[0]
    expected = stages[0].column("loss")
    np.testing.assert_array_equal(points.get_ydata(), expected)
    assert np.isnan(expected[39]), "a loss that was not finite is a gap"
    marks = [line for line in loss.lines if line.get_label() == "resumed"]
    assert [float(line.get_xdata()[0]) for line in marks] == [30, 100 + 10, 100 + 25]
    skipped = {line.get_label() for line in loss.lines if "skipped" in str(line.get_label())}
    assert skipped == {"step skipped: spike", "step skipped: nonfinite"}
    assert loss.get_ylim()[1] < np.nanmax(expected), "a skipped spike does not set the height"
    assert len(panels["attention gates, mean |tanh|"].lines) == 4 * len(LAYERS) + 3
    samples = sum(sum(stage.skipped_samples().values()) for stage in stages)
    assert f"left out: {samples} samples, 3 steps" in panels
    assert {"text tokens/s", "model FLOP/s utilisation", "learning rate"} <= panels.keys()


def test_numbers_that_are_not_known_have_no_panel(tmp_path, monkeypatch):
    """A log of losses alone, with a torn last line."""
    lines = [json.dumps(dict(step=s, stage="PT", loss=1 / s, lr=0.1, grad_norm=1.0)) for s in range(1, 30)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "lo')
    stages, _ = find_stages([str(tmp_path)])
    panels = drawn(monkeypatch, stages, tmp_path / "a.png")
    assert panels.keys() == {
        "loss per answer token (nats)",
        "learning rate",
        "gradient norm, before clipping",
        "left out: 0 samples",
    }
    assert stages[0].num_steps == 29 and stages[0].log.num_unreadable == 1


def test_stages_are_in_the_order_of_descent(run_folder):
    ordered = ["PT", "CPT", "DRA", "IFT"]
    assert names([run_folder]) == (ordered, [])
    assert names(sorted(run_folder.iterdir())[:3]) == (["CPT", "DRA", "IFT"], [])
    assert names([run_folder / "IFT", run_folder / "PT"]) == (["PT", "IFT"], [])
    assert names([run_folder / "IFT", run_folder]) == (ordered, [])


def test_a_moved_run_is_still_in_order(tmp_path):
    write_run(tmp_path / "before", 0.01)
    os.rename(tmp_path / "before", tmp_path / "after")
    assert names([tmp_path / "after"]) == (["PT", "CPT", "DRA", "IFT"], [])


def test_of_two_arms_the_one_named_as_its_stages_is_drawn(tmp_path, capsys):
    write_run(tmp_path, 0.01)
    write_stage(tmp_path / "DRA_one_view", "DRA", init_from=tmp_path / "CPT", scale=0.01)
    write_stage(tmp_path / "IFT_one_view", "IFT", init_from=tmp_path / "DRA_one_view", scale=0.01)
    assert names([tmp_path]) == (["PT", "CPT", "DRA", "IFT"], ["DRA_one_view", "IFT_one_view"])
    other = [tmp_path / name for name in ("IFT_one_view", "DRA_one_view", "CPT", "PT")]
    assert names(other) == (["PT", "CPT", "DRA_one_view", "IFT_one_view"], [])
    capsys.readouterr()
    assert main([str(tmp_path), "--output", str(tmp_path / "a.png")]) == 0
    assert f"left out: {tmp_path}/DRA_one_view (of another arm" in capsys.readouterr().out


def test_a_stage_that_has_only_started_does_not_hide_the_others(tmp_path):
    write_stage(tmp_path / "PT", "PT", scale=0.01)
    write_stage(tmp_path / "CPT", "CPT", init_from=tmp_path / "PT", scale=0.01)
    log = tmp_path / "CPT" / "log.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    assert names([tmp_path]) == (["PT"], ["CPT"])


def test_samples_whose_reason_is_not_logged_yet_are_counted(tmp_path):
    """A run that was killed has no event that lists the reasons."""
    write_stage(tmp_path / "PT", "PT", scale=0.1)
    path = tmp_path / "PT" / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"finish"' not in line))
    ((stage,), _) = find_stages([str(tmp_path / "PT")])
    assert stage.skipped_samples() == {NO_REASON: 60 // 7}


@pytest.mark.parametrize("kind", ["missing", "empty", "foreign", "no step", "a file"])
def test_what_is_no_run_is_one_line_and_exit_code_2(tmp_path, capsys, kind):
    folder = tmp_path / "run"
    if kind == "a file":
        folder.write_text("x")
    elif kind != "missing":
        folder.mkdir()
    if kind == "foreign":
        (folder / "log.jsonl").write_text('{"epoch": 1}\n[1, 2]\nhello\n')
    if kind == "no step":
        (folder / "log.jsonl").write_text('{"event": "start", "step": 0, "time": ""}\n')
    assert main([str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("train plot: error: RUN must ") and str(folder) in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert not list(tmp_path.rglob("*.png"))


def test_an_output_that_cannot_be_written_is_named(run_folder, tmp_path, capsys):
    assert main([str(run_folder), "--output", str(tmp_path / "gone" / "a.png")]) == 2
    assert f"an existing folder, got '{tmp_path}/gone/a.png'" in capsys.readouterr().err
    (tmp_path / "a.png").mkdir()
    assert main([str(run_folder / "PT"), "--output", str(tmp_path / "a.png")]) == 2
    assert f"{tmp_path}/a.png" in capsys.readouterr().err
    assert main([str(run_folder), "--output", "a.txt"]) == 2
    assert "--output must be a file name that ends in .png, got 'a.txt'" in capsys.readouterr().err


def test_the_running_mean():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(smoothed(values, 3), [1.0, 2.0, 4.0, 4.0])
    np.testing.assert_allclose(smoothed(values, 1), values)
    assert np.isnan(smoothed(np.full(4, np.nan), 3)).all()


def test_the_demo_draws_its_losses_with_the_same_hand(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    plot_losses({"PT": [3.0, 2.0, 1.0], "CPT": [2.0, 1.0]}, tmp_path / "loss.png")
    (axes,) = kept[0].axes
    assert axes.get_xlim() == (0, 5)
    assert [text.get_text() for text in axes.texts] == ["PT", "CPT"]
    assert axes.lines[0].get_color() == plot.STAGE_COLOURS[0]
    assert (tmp_path / "loss.png").stat().st_size > 5_000

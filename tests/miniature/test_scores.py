"""Scores, intervals, findings, table, card and pictures, from documents whose answers are made here."""

import json

import numpy as np
import pytest

from bench import report, results
from bench.miniature import __main__ as cli
from bench.miniature.arms import ARMS
from bench.miniature.card import card
from bench.miniature.plots import draw_findings
from bench.miniature.scores import (
    accuracy,
    blind_accuracy,
    findings,
    groups,
    interval,
    sizes_of,
    table,
    with_scores,
)
from bench.miniature.storage import save_json

KINDS = ["read", "place", "right_of", "below", "colour", "count", "second_page"]
PAGES = 200
RATES = {
    "224": 0.1,
    "448": 0.4,
    "dynamic": 0.8,
    "dynamic-no-position": 0.6,
    "224-resampler": 0.08,
    "448-resampler": 0.25,
    "interval-2": 0.8,
    "llava-style": 0.4,
    "mixture-of-resolution": 0.7,
    "text-only": 0.05,
}


def document(rates=RATES, seeds=(0, 1, 2)):
    """Every arm right at its rate, on pages with a question of each kind."""
    rng = np.random.default_rng(0)
    count = PAGES * len(KINDS)
    questions = {
        "kind": KINDS * PAGES,
        "page": [page for page in range(PAGES) for _ in KINDS],
        "font_size": [(12, 24, 44)[page % 3] for page in range(PAGES) for _ in KINDS],
        "text": [f"what {kind}" for kind in KINDS] * PAGES,
        "answer": [str(rng.integers(10)) for _ in range(count)],
    }
    runs = [(arm, seed, "steps") for arm in rates for seed in seeds]
    runs += [(arm, seed, "compute") for arm in ("224", "448") if arm in rates for seed in seeds]
    arms = [
        {
            "name": arm,
            "seed": seed,
            "match": match,
            "steps": 10,
            "flops": 10**12,
            "train_seconds": 1.5,
            "loss": [2.0, 1.0],
            "correct": "".join("1" if x < rates[arm] else "0" for x in rng.random(count)),
        }
        for arm, seed, match in runs
    ]
    header = {
        "processor": "a CPU",
        "torch": "2",
        "date": "2026-01-02",
        "command": "python -m bench.miniature",
    }
    size = dict(font_sizes=[12, 24, 44], small=[12], large=[44], name="cpu", window=64, patch=8)
    size |= dict(
        vision_layers=4, vision_width=128, text_layers=8, text_width=96, interval=4, batch=32, turns=4
    )
    size |= dict(
        train_pages=6000,
        evaluated_pages=PAGES,
        lr_joining=3e-3,
        lr_gates=0.05,
        lr_language=2e-4,
        lr_resampler=3e-4,
    )
    warm_up = {part: {"accuracy": 0.5, "steps": 100, "seconds": 3.0} for part in ("vision", "language")}
    return dict(header=header, size=size, order=list(ARMS), questions=questions, arms=arms, warm_up=warm_up)


DOCUMENT = document()


def test_groups():
    found = {name: mask.sum() for name, mask in groups(DOCUMENT).items()}
    sizes = [sum(page % 3 == i for page in range(PAGES)) for i in range(3)]
    assert [found[f"{name}_text"] for name in ("small", "medium", "large")] == sizes
    assert found["position"] == 4 * PAGES and found["all"] == 6 * PAGES and found["second_page"] == PAGES
    assert {size: mask.sum() for size, mask in sizes_of(DOCUMENT).items()} == dict(
        zip((12, 24, 44), sizes, strict=True)
    )


def test_accuracy_counts_right_answers():
    small = document({"448": 0.5}, seeds=(0, 1))
    small["arms"][0]["correct"] = "1" * 7 + "0" * (7 * PAGES - 7)
    small["arms"][1]["correct"] = "0" * 7 * PAGES
    everything = np.ones(7 * PAGES, bool)
    assert accuracy(small, "448", everything) == 7 / (2 * 7 * PAGES)
    with pytest.raises(ValueError, match="must hold the arm 'dynamic' at equal steps, it has none"):
        accuracy(small, "dynamic", everything)


def test_the_interval_is_the_binomials():
    """One question a page and one seed: the spread of a mean of independent answers."""
    one = document({"448": 0.3}, seeds=(0,))
    mask = groups(one)["count"]
    low, high = interval(one, [("448", "steps")], mask, lambda a: a)
    mean = accuracy(one, "448", mask)
    assert low < mean < high
    assert (high - low) / 2 == pytest.approx(1.96 * (mean * (1 - mean) / PAGES) ** 0.5, rel=0.1)


def test_seeds_that_differ_widen_the_interval():
    apart = document({"448": 0.5})
    for run, answer in zip(apart["arms"], "011", strict=False):
        run["correct"] = answer * len(run["correct"])
    low, high = interval(apart, [("448", "steps")], groups(apart)["all"], lambda a: a)
    assert low < 0.2 and high == 1.0


def test_differences_are_paired():
    """Two arms that fail on the same pages differ by nothing, however hard the pages are."""
    twins = document({"448": 0.5, "dynamic": 0.5})
    right = {run["seed"]: run["correct"] for run in twins["arms"] if run["name"] == "448"}
    for run in twins["arms"]:
        run["correct"] = right[run["seed"]]
    arms = [("dynamic", "steps"), ("448", "steps")]
    assert interval(twins, arms, groups(twins)["all"], lambda a, b: a - b) == (0.0, 0.0)


def test_findings():
    found = {row["claim"]: row for row in findings(DOCUMENT)}
    assert len(found) == 10
    assert all(row["holds"] for row in found.values())
    flat = {row["claim"]: row for row in findings(document(RATES | {"448-resampler": 0.4}))}
    assert {claim for claim, row in flat.items() if not row["holds"]} == {
        "the resampler costs accuracy at 448",
        "the resampler costs more at 448 than at 224",
    }
    assert found["dynamic reads small text better than 448"]["difference"] == pytest.approx(0.4, abs=0.1)
    assert found["the resampler costs more at 448 than at 224"]["difference"] == pytest.approx(0.13, abs=0.04)
    level = findings(document(dict.fromkeys(RATES, 0.5)))
    assert not any(row["holds"] for row in level if "no better" not in row["claim"])
    assert {row["claim"] for row in findings(document({"448": 0.5, "224": 0.1}))} == {
        "448 reads small text better than 224",
        "448 reads small text better than 224, both at the compute of dynamic",
    }


def test_a_control_that_knows_answers_is_told():
    cheats = {row["claim"]: row for row in findings(document(RATES | {"text-only": 0.9}))}
    assert not cheats["without the image no better than constant answers"]["holds"]
    better = {row["claim"]: row for row in findings(document(RATES | {"interval-2": 0.95}))}
    assert not better["twice as many gated blocks answer no better"]["holds"]


def test_blind_accuracy_is_the_best_constants():
    small = {"questions": {"text": ["a", "a", "a", "b"], "answer": ["x", "x", "y", "z"]}}
    assert blind_accuracy(small, np.ones(4, bool)) == 0.75
    assert blind_accuracy(small, np.array([True, False, True, False])) == 0.5


def test_table_card_and_readme():
    rows = table(DOCUMENT)
    assert [row[:2] for row in rows[1:4]] == [["224", "steps"], ["224", "compute"], ["448", "steps"]]
    assert rows[1][-2:] == ["25.6", "50.0"] and rows[2][-2:] == ["-", "-"]
    mean = 100 * accuracy(DOCUMENT, "224", groups(DOCUMENT)["all"])
    assert rows[1][2].startswith(f"{mean:.1f} ± ")
    text = card(DOCUMENT)
    for part in (
        "a CPU",
        "6,000 pages",
        "12, 24, 44",
        "| dynamic | steps |",
        "10 steps of 32 samples",
        "peak rates 0.003 (gates 0.05, LLM 0.0002, resampler, where there is one, 0.0003)",
        "| yes |",
    ):
        assert part in text
    assert "| **no** |" in card(document(RATES | {"dynamic": 0.3}))
    assert "was not run" in card(document({"448": 0.5}))
    block = cli.readme_block(DOCUMENT, "picture.png")
    assert "](picture.png)" in block and "| 448 |" in block and "interval-2" not in block
    assert "`python -m bench.miniature`" in block


def test_every_run_has_its_scores():
    found = with_scores(DOCUMENT)
    masks = groups(DOCUMENT)
    for arm in ("448", "dynamic"):
        runs = [r for r in found["arms"] if (r["name"], r["match"]) == (arm, "steps")]
        assert [r["seed"] for r in runs] == [0, 1, 2]
        for name in ("small_text", "position", "second_page"):
            mean = sum(r["by_kind"][name] for r in runs) / 3
            assert mean == pytest.approx(accuracy(DOCUMENT, arm, masks[name]), abs=1e-4)
        assert sum(r["accuracy"] for r in runs) / 3 == pytest.approx(
            accuracy(DOCUMENT, arm, masks["all"]), abs=1e-4
        )
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_pictures(tmp_path):
    draw_findings(DOCUMENT, tmp_path / "all.png")
    draw_findings(document({"448": 0.5}), tmp_path / "one.png")
    assert (tmp_path / "all.png").stat().st_size > 30_000 < 2 * (tmp_path / "one.png").stat().st_size


def test_a_document_that_is_not_there_is_named(tmp_path, capsys):
    """The message told to delete the file and to run again."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["--document", str(tmp_path / "none.json")])
    assert ended.value.code == 2
    assert "--document must be a file" in capsys.readouterr().err


def test_a_kept_document_is_enough(tmp_path, capsys, monkeypatch):
    path = tmp_path / "kept.json"
    save_json(path, DOCUMENT)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- miniature -->\nearlier\n<!-- /miniature -->\nafter\n")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(report, "README", readme)
    assert cli.main(["--document", str(path), "--save"]) == 0
    assert "mixture-of-resolution" in capsys.readouterr().out
    saved = tmp_path / "results" / "miniature-cpu-2026-01-02.json"
    assert json.loads(saved.read_text()) == DOCUMENT
    assert "dynamic" in readme.read_text() and "earlier" not in readme.read_text()
    assert {p.name for p in (tmp_path / "results" / "miniature").iterdir()} == {
        "miniature-cpu-2026-01-02.md",
        "miniature-cpu-2026-01-02.png",
    }
    assert results.of_gpu_runs(tmp_path / "results") == [], "bench.report must not take it for a GPU's result"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["arms"][0].update(correct="101"),
            "must hold an answer to each of its 1400 questions, got 3",
        ),
        (lambda d: d.pop("arms"), "--document must be a result file of bench.miniature"),
    ],
)
def test_a_document_that_is_none_is_refused(tmp_path, capsys, change, message):
    broken = document({"448": 0.5})
    change(broken)
    save_json(tmp_path / "kept.json", broken)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--document", str(tmp_path / "kept.json")])
    assert ended.value.code == 2 and message in capsys.readouterr().err

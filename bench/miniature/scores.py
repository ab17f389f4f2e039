"""Accuracies and their intervals, and which of the papers' findings they show.

Everything is computed from a document's `questions` and the answers of its `arms`."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .pages import POSITION_KINDS
from .training import SECOND_PAGE

Document = dict[str, Any]
DRAWS = 2000
LEVEL = 0.95
PAPER = {
    "224": {"DocVQA": 25.6, "TextVQA": 50.0},
    "448": {"DocVQA": 44.9, "TextVQA": 64.1},
    "dynamic": {"DocVQA": 55.1, "TextVQA": 70.7},
    "dynamic-no-position": {"DocVQA": 53.0, "TextVQA": 70.3},
    "224-resampler": {"DocVQA": 25.2, "TextVQA": 48.9},
    "448-resampler": {"DocVQA": 30.7, "TextVQA": 56.0},
}
"""InfiMM-HD, Tables 5, 6 and 7, in percent (ANLS and VQA score)."""
SHOWN = ("all", "small_text", "medium_text", "large_text", "position", "colour", "count", SECOND_PAGE)


def groups(document: Document) -> dict[str, np.ndarray]:
    """What is scored together: a mask over the document's questions by name.

    Text of three sizes is scored on "read" questions, which ask for a word by its colour alone; "position" is
    all kinds whose answer depends on a place; "all" is everything but the questions about two pages."""
    asked, size = document["questions"], document["size"]
    kind, font = np.array(asked["kind"]), np.array(asked["font_size"])
    read = kind == "read"
    small, large = np.isin(font, size["small"]), np.isin(font, size["large"])
    found = {
        "all": kind != SECOND_PAGE,
        "small_text": read & small,
        "medium_text": read & ~small & ~large,
        "large_text": read & large,
        "position": np.isin(kind, POSITION_KINDS),
    }
    return found | {
        name: kind == name for name in ("place", "right_of", "below", "colour", "count", SECOND_PAGE)
    }


def sizes_of(document: Document) -> dict[int, np.ndarray]:
    """ "read" questions by the em of their word in pixels."""
    asked = document["questions"]
    read, font = np.array(asked["kind"]) == "read", np.array(asked["font_size"])
    return {size: read & (font == size) for size in document["size"]["font_sizes"]}


def seeds_of(document: Document, arm: str, match: str = "steps") -> list[int]:
    return sorted(run["seed"] for run in document["arms"] if (run["name"], run["match"]) == (arm, match))


def correct(document: Document, arm: str, match: str = "steps") -> np.ndarray:
    """[seeds, questions] bool; ValueError where the arm was not run."""
    runs = {r["seed"]: r for r in document["arms"] if (r["name"], r["match"]) == (arm, match)}
    if not runs:
        raise ValueError(f"the document must hold the arm {arm!r} at equal {match}, it has none")
    return np.array([[c == "1" for c in runs[seed]["correct"]] for seed in sorted(runs)])


def accuracy(document: Document, arm: str, mask: np.ndarray, match: str = "steps") -> float:
    """Share of right answers, the mean over the seeds; NaN where nothing was asked."""
    chosen = correct(document, arm, match)[:, mask]
    return float(chosen.mean()) if chosen.size else float("nan")


def interval(
    document: Document, arms: list[tuple[str, str]], mask: np.ndarray, value: Callable[..., np.ndarray]
) -> tuple[float, float]:
    """Bootstrap interval of `value(accuracy of arms[0], ...)`: pages and seeds are drawn with replacement,
    the same ones for all (arm, match) of `arms`."""
    pages = np.array(document["questions"]["page"])
    count = int(pages.max()) + 1
    of_page = np.zeros((len(pages), count))
    of_page[np.arange(len(pages)), pages] = mask
    asked = of_page.sum(0)
    page_weights = _drawn(count, 0)  # [draws, pages]
    drawn = np.maximum(page_weights @ asked, 1)
    results = []
    for arm, match in arms:
        right = correct(document, arm, match) @ of_page  # [seeds, pages]
        seeds = len(right)
        means = (page_weights @ right.T * _drawn(seeds, 1)).sum(1) / seeds / drawn
        results.append(means)
    low, high = np.quantile(value(*results), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@functools.cache
def _drawn(count: int, seed: int) -> np.ndarray:
    """How often each of `count` is drawn in every one of `DRAWS` draws with replacement, [draws, count]."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)


def with_scores(document: Document) -> Document:
    """The same, every entry of `arms` with its `accuracy` and `by_kind`: fractions right of all questions
    about one page and of each of `groups`; a group of which nothing was asked is left out."""
    found = groups(document)
    asked = {name: mask for name, mask in found.items() if mask.any()}
    arms = []
    for entry in document["arms"]:
        right = np.array([c == "1" for c in entry["correct"]])
        by_kind = {name: round(float(right[mask].mean()), 4) for name, mask in asked.items()}
        arms.append({**entry, "accuracy": by_kind.pop("all"), "by_kind": by_kind})
    return {**document, "arms": arms}


def blind_accuracy(document: Document, mask: np.ndarray) -> float:
    """The most that constant answers reach: for every question the one that is right the most often here."""
    asked = document["questions"]
    answers: dict[str, list[str]] = {}
    for text, answer, chosen in zip(asked["text"], asked["answer"], mask, strict=True):
        if chosen:
            answers.setdefault(text, []).append(answer)
    best = sum(max(given.count(a) for a in set(given)) for given in answers.values())
    return best / max(1, int(mask.sum()))


def findings(document: Document) -> list[dict[str, Any]]:
    """The papers' claims, each as a difference of accuracies with its interval; `holds` if all of that is
    above 0, and of a claim that something is no better if not all of it is below. Claims about arms that were
    not run are left out."""
    found = groups(document)
    steps, compute = "steps", "compute"

    def minus(a, b):
        return a - b

    def second_difference(a, b, c, d):
        return (a - b) - (c - d)

    claims = [
        (
            "dynamic reads small text better than 448",
            "small_text",
            [("dynamic", steps), ("448", steps)],
            minus,
        ),
        ("448 reads small text better than 224", "small_text", [("448", steps), ("224", steps)], minus),
        (
            "dynamic reads small text better than 448 at equal compute",
            "small_text",
            [("dynamic", steps), ("448", compute)],
            minus,
        ),
        (
            "448 reads small text better than 224, both at the compute of dynamic",
            "small_text",
            [("448", compute), ("224", compute)],
            minus,
        ),
        (
            "questions about places are worse without the position embedding",
            "position",
            [("dynamic", steps), ("dynamic-no-position", steps)],
            minus,
        ),
        ("the resampler costs accuracy at 448", "all", [("448", steps), ("448-resampler", steps)], minus),
        (
            "the resampler costs more at 448 than at 224",
            "all",
            [("448", steps), ("448-resampler", steps), ("224", steps), ("224-resampler", steps)],
            second_difference,
        ),
        (
            "a mixture of resolutions reads small text better with as many tokens",
            "small_text",
            [("mixture-of-resolution", steps), ("llava-style", steps)],
            minus,
        ),
    ]
    run = {(r["name"], r["match"]) for r in document["arms"]}
    rows = []
    for claim, group, arms, value in claims:
        if not set(arms) <= run:
            continue
        mask = found[group]
        means = [np.array(accuracy(document, arm, mask, match)) for arm, match in arms]
        low, high = interval(document, arms, mask, value)
        rows.append(
            {
                "claim": claim,
                "group": group,
                "difference": float(value(*means)),
                "low": low,
                "high": high,
                "holds": low > 0,
            }
        )
    if {("interval-2", steps), ("dynamic", steps)} <= run:
        mask, arms = found["all"], [("dynamic", steps), ("interval-2", steps)]
        means = [accuracy(document, arm, mask) for arm, _ in arms]
        low, high = interval(document, arms, mask, minus)
        rows.append(_no_better("twice as many gated blocks answer no better", minus(*means), low, high))
    if ("text-only", steps) in run:
        # chance is what constant answers reach
        mask, chance = found["all"], blind_accuracy(document, found["all"])
        low, high = interval(document, [("text-only", steps)], mask, lambda a: chance - a)
        difference = chance - accuracy(document, "text-only", mask)
        rows.append(_no_better("without the image no better than constant answers", difference, low, high))
    return rows


def _no_better(claim: str, difference: float, low: float, high: float) -> dict[str, Any]:
    """Holds unless all of the interval is below 0."""
    return {
        "claim": claim,
        "group": "all",
        "difference": difference,
        "low": low,
        "high": high,
        "holds": high > 0,
    }


def table(document: Document) -> list[list[str]]:
    """A row for every arm that was run: percent with the half width of its interval, and the paper's own."""
    found = groups(document)
    rows = [["arm", "equal", *(name.replace("_", " ") for name in SHOWN), "paper: DocVQA", "TextVQA"]]
    order = {name: i for i, name in enumerate(document["order"])}
    run = sorted(
        {(r["name"], r["match"]) for r in document["arms"]}, key=lambda k: (order[k[0]], k[1] == "compute")
    )
    for arm, match in run:
        cells = [arm, match]
        for name in SHOWN:
            low, high = interval(document, [(arm, match)], found[name], lambda a: a)
            cells.append(f"{100 * accuracy(document, arm, found[name], match):.1f} ± {50 * (high - low):.1f}")
        paper = PAPER.get(arm, {}) if match == "steps" else {}
        cells += [f"{paper[name]:.1f}" if paper else "-" for name in ("DocVQA", "TextVQA")]
        rows.append(cells)
    return rows

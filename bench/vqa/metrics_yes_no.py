"""Yes or no: MME's accuracy and accuracy+, POPE's F1."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

POPE_PARSER = "POPE official"
MME_PARSER = "MME official"

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MME_GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"perception": PERCEPTION, "cognition": COGNITION}
)
"""200 points a subtask: at most 2000 and 800."""

POPE_SPLITS = ("random", "popular", "adversarial")


def pope_answer(text: str) -> str:
    """Yes or no in lower case, by POPE's rule: in the first sentence (up to a period), commas left out, one
    of the words No, not and no, set apart by spaces and in that spelling, means no; everything else means
    yes, an empty answer and "NO" too (Li et al. 2023)."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_answer(text: str) -> str:
    """Yes, no or other in lower case, by MME's rule: what the first four characters hold, in lower case and
    without white space before them; other is never right (Fu et al. 2023)."""
    start = text.strip().lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def f1_score(true_positives: float, false_positives: float, false_negatives: float) -> float:
    """2 TP / (2 TP + FP + FN), in 0..1; 0 where nothing is positive."""
    whole = 2 * true_positives + false_positives + false_negatives
    return 2 * true_positives / whole if whole else 0.0


def pope_counts(given: str | None, known: str) -> tuple[int, int, int, int]:
    """What one question adds to (TP, FP, FN, TN), yes being positive; None is a wrong answer."""
    if given is None:
        given = "no" if known == "yes" else "yes"
    cases = (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"))
    return tuple(int((given, known) == case) for case in cases)


def mme_score(images: Sequence[Sequence[bool]]) -> float:
    """100 accuracy + 100 accuracy+ of a subtask, 0..200: the share of questions that were answered rightly,
    and of images both of whose questions were. `images` holds the two of each.

    ValueError for an image without two, or none at all."""
    for pair in images:
        if len(pair) != 2:
            raise ValueError(f"images must have two questions each, got {len(pair)}")
    if not images:
        raise ValueError(f"images must be at least one, got {images!r}")
    right = sum(sum(pair) for pair in images)
    return 100 * right / (2 * len(images)) + 100 * sum(all(pair) for pair in images) / len(images)

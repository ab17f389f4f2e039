"""English words of the VQA evaluation: contractions written without an apostrophe, numbers, articles.

The evaluation puts back the apostrophes of these words and of no others: "wed" and "shed" may be verbs, and
some forms were just left out. So every ending has its own list of stems."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

ARTICLES = ("a", "an", "the")
NUMBERS: Mapping[str, str] = MappingProxyType(
    {"none": "0"}
    | {
        word: str(number)
        for number, word in enumerate(
            ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
        )
    }
)

_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
}
_TWO_ENDINGS = {
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
}
_OTHERS = {
    "maam": "ma'am",
    "oclock": "o'clock",
    "twas": "'twas",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall": "y'all",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "somebody'd": "somebodyd",  # the wrong way round in the evaluation, and so here
}


def _contractions() -> Iterator[tuple[str, str]]:
    """(as written, as meant). Of two apostrophes either may be missing: "couldnt've", "couldn'tve"."""
    for ending, stems in _ENDINGS.items():
        for stem in stems.split():
            yield stem + ending.replace("'", ""), stem + ending
    for ending, stems in _TWO_ENDINGS.items():
        start, _, end = ending.rpartition("'")
        for stem in stems.split():
            yield stem + start.replace("'", "") + "'" + end, stem + ending
            yield stem + start + end, stem + ending
    yield from _OTHERS.items()


CONTRACTIONS: Mapping[str, str] = MappingProxyType(dict(_contractions()))
"""Lower case only: the evaluation lowers its words first, so that its entries of "I" never match."""

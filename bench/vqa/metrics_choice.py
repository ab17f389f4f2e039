"""Multiple choice: which option an answer names, by stated rules; open questions of MMMU."""

import re
from collections.abc import Mapping, Sequence

from .metrics import plain_text

CHOICE_PARSER = "choice-1"
OPEN_PARSER = "open-1"

_ALONE = re.compile(r"[\s\"'*`(\[]*([A-Za-z])[\s\"'*`)\].:,]*")
_LEADING = re.compile(r"[\s\"'*`]*(?:[(\[]([A-Z])[)\]]|([A-Z])[.:)](?=\s))")
# A and I are words themselves ("the answer is A cat"), so that no word may follow them
_STATED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b(?:\s+is)?)\s*[:=]?[\s\"'*`]*"
    r"(?:[(\[]([A-Z])[)\]]|([B-HJ-Z])(?![\w'\u2019])|([AI])(?![\w'\u2019]|[^\S\n]+\w))"
)
_STATED_TEXT = re.compile(r"(?i:\banswer\b(?:\s+is\b\s*:?|\s*[:=]))([^\n]+)")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")


def parse_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names, or None; the same for the same text, never a guess.

    `options` maps capital letters to texts. The first of these rules that gives one of the letters decides:
      1. the answer is a letter alone, in either case: "B", "b", "(B)", "B.", "**B**"
      2. the answer is one option's text, whatever its case, punctuation and spaces
      3. it begins with a capital letter set apart: "(B) ...", "B. ...", "B) ...", "B: ..."
      4. a capital letter behind "answer", "option" or "choice", with or without "is" and ":"; of several the
         last; A and I only where no word follows on the line, as they are words themselves
      5. the rest of a line behind "answer is" or "answer:" is one option's text; of several the last
    So a letter wins over a text ("B. cat" is B although cat is A), and a text that two options share names
    none. ValueError where a letter is none."""
    wrong = [letter for letter in options if not (len(letter) == 1 and "A" <= letter <= "Z")]
    if wrong:
        raise ValueError(f"options must have single capital letters A to Z, got {wrong[0]!r}")
    by_text = _letters_by_text(options)
    alone, leading = _ALONE.fullmatch(answer), _LEADING.match(answer)
    candidates = [alone and alone.group(1).upper(), by_text.get(plain_text(answer))]
    candidates.append(leading and (leading.group(1) or leading.group(2)))
    stated = ["".join(filter(None, found.groups())) for found in _STATED.finditer(answer)]
    texts = [by_text.get(plain_text(found.group(1))) for found in _STATED_TEXT.finditer(answer)]
    candidates += reversed(stated)
    candidates += reversed(texts)
    return next((letter for letter in candidates if letter in options), None)


def _letters_by_text(options: Mapping[str, str]) -> dict[str, str | None]:
    letters: dict[str, str | None] = {}
    for letter, text in options.items():
        key = plain_text(text)
        letters[key] = None if key in letters else letter
    letters.pop("", None)  # an empty answer names no option, whatever is printed there
    return letters


def open_match(answer: str, known: Sequence[str]) -> float:
    """1.0 if a free answer holds one of the known ones, else 0.0 (MMMU's open questions).

    A known number is compared with the last number of the answer, both rounded to two decimals, commas
    between thousands left out; a known text has to stand in the answer as whole words, whatever the case and
    the punctuation. ValueError without a known answer."""
    if isinstance(known, str) or not known:
        raise ValueError(f"known must be a list of at least one text, got {known!r}")
    words, numbers = f" {plain_text(answer)} ", [n for n in _NUMBER.findall(answer) if n.strip("-")]
    for text in known:
        if _NUMBER.fullmatch(text.strip()) and text.strip("- "):
            if numbers and _rounded(numbers[-1]) == _rounded(text):
                return 1.0
        elif plain_text(text) and f" {plain_text(text)} " in words:
            return 1.0
    return 0.0


def _rounded(number: str) -> float:
    return round(float(number.replace(",", "")), 2)


def circular_score(right: Sequence[bool]) -> float:
    """MMBench's circular evaluation of one question: 1.0 only if all rotations of its options were answered
    rightly, else 0.0 (Liu et al. 2023). ValueError without a rotation."""
    if not right:
        raise ValueError(f"right must be a list of at least one rotation, got {right!r}")
    return float(all(right))

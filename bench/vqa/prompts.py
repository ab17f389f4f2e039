"""Forms of a question's text, by name; the chat template of the model stands around it."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from .questions import Question

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
_YES_NO = "Please answer yes or no."
_IMAGE_MARK = re.compile(r"<image (\d+)>")


def _question(question: Question) -> str:
    lines = [question.hint, question.text]
    lines += [f"{letter}. {text}" for letter, text in question.options.items()]
    return "\n".join(line for line in lines if line)


def _ending(text: str, line: str, separator: str = "\n") -> str:
    return text if text.endswith(line) else f"{text}{separator}{line}"


def _short(question: Question) -> str:
    return _ending(_question(question), _SHORT)


def _letter(question: Question) -> str:
    """For questions without options, which some sets mix with the others, the short form."""
    return _ending(_question(question), _LETTER) if question.options else _short(question)


def _yes_no(question: Question) -> str:
    return _ending(_question(question), _YES_NO, " ")


PROMPT_FORMS: Mapping[str, Callable[[Question], str]] = MappingProxyType(
    {"question": _question, "short": _short, "letter": _letter, "yes-no": _yes_no}
)
"""question: hint, question and lettered options, nothing else. short, letter and yes-no: one line more that
asks for a word or phrase, for the option's letter, for yes or no (once, where the set has it already)."""


def content_of(question: Question, form: str) -> list[dict[str, Any]]:
    """The parts of the user's message: the images, then the text in that form.

    Where the text has marks `<image 1>`, `<image 2>` ... (MMMU), image n stands at its first mark, and the
    others in front; a further mark of it stays text."""
    text = PROMPT_FORMS[form](question)
    placed: list[int] = []
    parts: list[dict[str, Any]] = []
    end = 0
    for mark in _IMAGE_MARK.finditer(text):
        number = int(mark.group(1)) - 1
        if number in placed or not 0 <= number < len(question.images):
            continue
        placed.append(number)
        parts += [{"type": "text", "text": text[end : mark.start()]}, {"type": "image", "number": number}]
        end = mark.end()
    parts.append({"type": "text", "text": text[end:]})
    first = [{"type": "image", "number": n} for n in range(len(question.images)) if n not in placed]
    return [part for part in (*first, *parts) if part.get("text") != ""]


def prompt_of(question: Question, form: str) -> str:
    """What is asked, for people and digests: the text with the places of the images."""
    parts = content_of(question, form)
    return "".join(f"<image {part['number'] + 1}>" if "number" in part else part["text"] for part in parts)

"""Answers on the disk: JSON lines that grow batch by batch and that a killed run goes on with."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from train.data.samples import short

from .questions import Question, digest

_FORM = 1
_SMALL_FILE = 1 << 24
_SAMPLES, _SAMPLE_SIZE = 64, 1 << 16
_ENDINGS = (".json", ".jinja", ".model", ".safetensors", ".txt")


class Predictions:
    """The file of one run: a header line with the settings, then {"id", "question", "answer"} or
    {"id", "bad", "message"} a line.

    A new file is begun, or an old one of the same settings read and gone on with. A last line without its
    end, as a kill leaves it, is dropped. ValueError for other settings, for a line that is damaged otherwise,
    and while another process has the file open."""

    def __init__(self, path: Path, settings: Mapping[str, Any], ids: Sequence[str], **about: Any) -> None:
        """`ids`: of the questions. `about` stands in the header of a new file and is not compared."""
        self.path, self.num_dropped = path, 0
        # written with the first answer: a run that fails before it leaves no settings that the next one lacks
        self._header: Mapping[str, Any] | None = {"predictions": _FORM, "settings": dict(settings)} | about
        self.answers: dict[str, str] = {}
        self.bad: dict[str, tuple[str, str]] = {}
        """Questions that could not be asked: (reason, message)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(f"--output must be used by one run at a time, got {str(path)!r}") from None
        try:
            self._read(settings, set(ids))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Predictions":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, identity: str) -> bool:
        return identity in self.answers or identity in self.bad

    def add(self, asked: Mapping[str, str], found: Mapping[str, "str | tuple[str, str]"]) -> None:
        """Appends answers, or (reason, message), by question id, all of them before anything else happens;
        `asked` are the prompts. Those that are there already stay."""
        lines: list[Mapping[str, Any]] = [] if self._header is None else [self._header]
        self._header = None
        for identity, answer in found.items():
            if identity in self:
                continue
            if isinstance(answer, str):
                lines.append({"id": identity, "question": asked[identity], "answer": answer})
                self.answers[identity] = answer
            else:
                lines.append({"id": identity, "bad": answer[0], "message": answer[1]})
                self.bad[identity] = answer
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, settings: Mapping[str, Any], ids: set[str]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self.num_dropped = 1
            self._file.truncate(whole)
            self._file.seek(whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if number == 1:
                self._check_header(value, settings)
            elif not self._take(value, ids):
                raise self._damaged(number, line)

    def _check_header(self, header: Any, settings: Mapping[str, Any]) -> None:
        self._header = None
        known = header.get("settings") if isinstance(header, dict) else None
        if not isinstance(known, dict) or header.get("predictions") != _FORM:
            raise self._damaged(1, header)
        for name in (*settings, *known):
            there, here = known.get(name), settings.get(name)
            if there != here:
                raise ValueError(
                    f"--output must have predictions of the same settings, got {name} {there!r} in "
                    f"{str(self.path)!r} and {here!r} now: choose another --output, or delete the file"
                )

    def _take(self, value: Any, ids: set[str]) -> bool:
        identity = value.get("id") if isinstance(value, dict) else None
        if not isinstance(identity, str) or identity not in ids or identity in self:
            return False
        if isinstance(value.get("answer"), str):
            self.answers[identity] = value["answer"]
        elif isinstance(value.get("bad"), str) and isinstance(value.get("message"), str):
            self.bad[identity] = (value["bad"], value["message"])
        return identity in self

    def _damaged(self, number: int, line: Any) -> ValueError:
        return ValueError(
            f"--output must have whole lines of this run's predictions, got {short(line)} in line {number} "
            f"of {str(self.path)!r}: delete that line to have it answered again, or the file to begin anew"
        )


def fingerprint(folder: Path) -> str:
    """Of a saved model: names, sizes and contents of its files, of large ones 64 pieces spread over them. A
    copy has the same, and other weights under the same name another."""
    texts = []
    for path in sorted(path for path in folder.iterdir() if path.suffix in _ENDINGS and path.is_file()):
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= _SMALL_FILE:
                pieces = [file.read()]
            else:
                pieces = []
                for number in range(_SAMPLES):
                    file.seek(number * (size - _SAMPLE_SIZE) // (_SAMPLES - 1))
                    pieces.append(file.read(_SAMPLE_SIZE))
        texts += [path.name, str(size), b"".join(pieces).hex()]
    return digest(texts)


def questions_digest(questions: Sequence[Question], prompts: Mapping[str, str]) -> str:
    """Of what is asked, and about which images by name; not of the known answers."""
    texts: list[str] = []
    for question in questions:
        names = [getattr(image, "name", str(image)) for image in question.images]
        texts += [question.id, prompts.get(question.id, ""), *names]
    return digest(texts)

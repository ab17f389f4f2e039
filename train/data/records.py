"""JSON files as records at known places: lines, the elements of an array, the entries of an object.

Only the places are kept (16 bytes a record); a record is parsed when it is read. A big array is indexed piece
by piece, so that it never stands in memory as a whole."""

import array
import codecs
import json
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .samples import BadSample, short

_CHUNK = 1 << 20
_LONGEST_RECORD = 1 << 28
"""Bytes of one record; a file without the quote or bracket that ends a record is given up there."""
_SPACE = " \t\n\r"
_BEHIND_VALUE = {*_SPACE, *",:]}"}


class JsonRecords:
    """The records of one file, `len` and `load(i)`.

    `key=None`: one record a line (blank lines and a UTF-8 byte-order mark are skipped), or the elements of an
    array if the file begins with `[`. With `key` the file is an object and the records are the elements of
    its array `key`. `entries=True`: the file is an object and its entries are the records, each loaded as
    (key, value). `visit(record)` is called with every parsed record while the index is made (so that
    it cannot be lines, which are not parsed then) and leaves the record out by returning False;
    `num_left_out` counts those.

    ValueError, naming `argument`, for a file that is missing, without a record, or, where it is no JSON
    lines, not JSON of that form."""

    def __init__(
        self,
        path: str | Path,
        *,
        argument: str = "data.path",
        key: str | None = None,
        entries: bool = False,
        visit: Callable[[Any], bool | None] | None = None,
    ) -> None:
        self.path, self.entries, self.num_left_out = _existing_file(path, argument), entries, 0
        # of every record: its first byte and the one behind its last; for lines its number from 1 as well
        self._starts, self._ends, self._lines = array.array("q"), array.array("q"), array.array("q")
        with self.path.open("rb") as file:
            start = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
            size = file.seek(0, 2)
            if size > start:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                first = _first_byte(self._bytes, start)
                if entries or key is not None or visit is not None or first == b"[":
                    self._index_values(start, argument, key, visit)
                else:
                    self._index_lines(start)
        if not self._starts:
            raise ValueError(f"{argument} must hold at least one record, got none in {str(path)!r}")

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        """File and line, or number from 1, of a record."""
        if self._lines:
            return f"{self.path} line {self._lines[index]}"
        return f"{self.path} record {index + 1}"

    def load(self, index: int) -> Any:
        """The parsed record; `BadSample("bad_json")` if it is not JSON."""
        raw = self._bytes[self._starts[index] : self._ends[index]]
        try:
            value = json.loads(b"{" + raw + b"}" if self.entries else raw)
        except (ValueError, RecursionError) as error:
            rule = f"{self.place(index)}: record must be JSON"
            raise BadSample("bad_json", f"{rule}, got {short(raw)}: {short(str(error))}") from None
        return next(iter(value.items())) if self.entries else value

    def load_object(self, index: int) -> dict[str, Any]:
        """The parsed record, which has to be a JSON object."""
        record = self.load(index)
        if not isinstance(record, dict):
            rule = f"{self.place(index)}: record must be a JSON object"
            raise BadSample("bad_json", f"{rule}, got {short(record)}")
        return record

    def _index_lines(self, start: int) -> None:
        number, size = 0, len(self._bytes)
        while start < size:
            number += 1
            end = self._bytes.find(b"\n", start)
            end = size if end < 0 else end
            if self._bytes[start:end].strip():
                self._starts.append(start)
                self._ends.append(end)
                self._lines.append(number)
            start = end + 1

    def _index_values(self, start: int, argument: str, key: str | None, visit: Callable | None) -> None:
        scanner = _Scanner(self._bytes, start)
        try:
            spans = scanner.entries() if self.entries else scanner.elements(key)
            for first, end, record in spans:
                if visit is not None and visit(record) is False:
                    self.num_left_out += 1
                    continue
                self._starts.append(first)
                self._ends.append(end)
        except _NotJson as error:
            raise ValueError(f"{argument} must be {error}, got {str(self.path)!r}") from None


def _existing_file(path: str | Path, argument: str) -> Path:
    if not isinstance(path, (str, Path)):
        raise ValueError(f"{argument} must be the name of a file, got {path!r}")
    found = Path(path)
    if not found.is_file():
        raise ValueError(f"{argument} must be an existing file, got {str(path)!r}")
    return found


def _first_byte(data: mmap.mmap, start: int) -> bytes:
    while start < len(data) and data[start : start + 1].isspace():
        start += 1
    return data[start : start + 1]


class _NotJson(ValueError):
    pass


class _Scanner:
    """Walks over one JSON value, its elements decoded one by one out of a window of the file."""

    def __init__(self, data: mmap.mmap, start: int) -> None:
        self._data, self._read = data, start
        # bytes that are no UTF-8 pass here: only the record that holds them is bad, and only when it is read
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._place = "", 0
        self._mark, self._mark_byte = 0, start  # a character of the window, and its byte in the file

    def elements(self, key: str | None) -> Iterator[tuple[int, int, Any]]:
        """First byte, byte behind the last and value of the elements of the array, or of its array `key`."""
        if key is None:
            yield from self._elements()
            self._end()
            return
        found = False
        for name in self._keys():
            if name != key:
                self._value()
                continue
            if found:
                raise _NotJson(f"a JSON object with one {key!r} (byte {self._byte()}: the second)")
            found = True
            yield from self._elements()
        if not found:
            raise _NotJson(f"a JSON object with a list {key!r}")
        self._end()

    def entries(self) -> Iterator[tuple[int, int, Any]]:
        """First byte of the key, byte behind the value and (key, value) of an object's entries."""
        for name in self._keys():
            first, value = self._key_byte, self._value()
            yield first, self._byte(), (name, value)
        self._end()

    def _keys(self) -> Iterator[str]:
        """Stands before the value of each key in turn."""
        self._expect("{", "a JSON object")
        if self._next() == "}":
            self._place += 1
            return
        while True:
            self._next()
            self._key_byte = self._byte()
            name = self._value()
            if not isinstance(name, str):
                raise _NotJson(f"JSON with text keys (byte {self._key_byte})")
            self._expect(":", "JSON with a ':' behind a key")
            self._next()
            yield name
            if self._expect(",}", "JSON with ',' or '}' behind a value") == "}":
                return

    def _elements(self) -> Iterator[tuple[int, int, Any]]:
        self._expect("[", "a JSON array")
        if self._next() == "]":
            self._place += 1
            return
        while True:
            self._next()
            first = self._byte()
            value = self._value()
            yield first, self._byte(), value
            if self._expect(",]", "JSON with ',' or ']' behind an element") == "]":
                return

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decode(self._text, self._place)
            except RecursionError:
                raise _NotJson(f"JSON of moderate depth (byte {self._byte()})") from None
            except ValueError as error:
                message = str(error).split(":")[0]
                if not self._grow():
                    raise _NotJson(f"JSON (byte {self._byte()}: {message})") from None
            else:
                # a number may go on behind the window, at any of its characters
                if self._text[end : end + 1] in _BEHIND_VALUE or not self._grow():
                    self._place = end
                    return value

    def _next(self) -> str:
        """The next character that is no white space, which stays the place; "" at the end."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in _SPACE:
                    return self._text[self._place]
                self._place += 1
            if not self._grow():
                return ""

    def _expect(self, characters: str, rule: str) -> str:
        found = self._next()
        if not found or found not in characters:
            got = repr(found) if found else "the end"
            raise _NotJson(f"{rule} (byte {self._byte()}: {got})")
        self._place += 1
        return found

    def _end(self) -> None:
        if self._next():
            rule = "one JSON value, or one a line that is no array at the beginning"
            raise _NotJson(f"{rule} (byte {self._byte()}: {self._next()!r})")

    def _byte(self) -> int:
        passed = self._text[self._mark : self._place]
        self._mark_byte += len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogateescape"))
        self._mark = self._place
        return self._mark_byte

    def _grow(self) -> bool:
        """Drops what is behind the place and adds as much as is left, at least a chunk; False at the end."""
        self._byte()
        left = len(self._text) - self._place
        if self._read >= len(self._data):
            return False
        if left > _LONGEST_RECORD:
            raise _NotJson(f"JSON with records of at most {_LONGEST_RECORD} bytes (byte {self._byte()})")
        more = self._data[self._read : self._read + max(_CHUNK, left)]
        self._read += len(more)
        more_text = self._utf8.decode(more, self._read >= len(self._data))
        self._text = self._text[self._place :] + more_text
        self._place = self._mark = 0
        return True

"""Files for the servers and judges that have the answers, in the forms that they ask for.

A question that could not be asked stands in them with an empty answer: servers refuse incomplete files."""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from train.files import write_text

from .metrics_choice import parse_choice
from .questions import Question

Submit = Callable[[Path, Sequence[Question], Mapping[str, str]], Path]
"""(folder, questions, answers) -> the file that was written."""

_XLSX_PARTS = {
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Override PartName="/xl/workbook.xml" ContentType="application/vnd.openxmlformats-officedocument.'
    'spreadsheetml.sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" ContentType='
    '"application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>',
    "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="rId1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/'
    'officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": '<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" '
    'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"><sheets>'
    '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/'
    'relationships"><Relationship Id="rId1" Type="http://schemas.openxmlformats.org/officeDocument/2006/'
    'relationships/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}
_XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'


def as_list(answer_field: str = "answer") -> Submit:
    """A JSON list of the record's own id field and the answer: {"question_id": 1, "answer": "cat"}."""

    def submit(folder: Path, questions: Sequence[Question], answers: Mapping[str, str]) -> Path:
        rows = [
            (dict(question.fields) or {"id": question.id}) | {answer_field: answers.get(question.id, "")}
            for question in questions
        ]
        return _write(folder, rows)

    return submit


def as_object(folder: Path, questions: Sequence[Question], answers: Mapping[str, str]) -> Path:
    """A JSON object, question id -> answer."""
    return _write(folder, {question.id: answers.get(question.id, "") for question in questions})


def as_letters(folder: Path, questions: Sequence[Question], answers: Mapping[str, str]) -> Path:
    """The same with the letter of the option where the answer names one."""
    found = {}
    for question in questions:
        answer = answers.get(question.id, "")
        found[question.id] = (parse_choice(answer, question.options) if question.options else None) or answer
    return _write(folder, found)


def as_sheet(folder: Path, questions: Sequence[Question], answers: Mapping[str, str]) -> Path:
    """MMBench's spreadsheet (.xlsx): index, question, options, prediction; the prediction is the letter where
    the answer names one."""
    columns = ("index", "question", "A", "B", "C", "D", "prediction")
    rows: list[Sequence[Any]] = [columns]
    for question in questions:
        answer = answers.get(question.id, "")
        row = dict(question.fields) | {"prediction": parse_choice(answer, question.options) or answer}
        index = int(question.id) if question.id.isdecimal() else question.id
        rows.append([index, *(row.get(name, "") for name in columns[1:])])
    path = folder / "submission.xlsx"
    unfinished = folder / ".submission.xlsx.unfinished"
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in _XLSX_PARTS.items():
            archive.writestr(name, _XML + text)
        archive.writestr("xl/worksheets/sheet1.xml", _sheet(rows))
    unfinished.replace(path)
    return path


def _sheet(rows: Sequence[Sequence[Any]]) -> str:
    cells = ("".join(map(_cell, row)) for row in rows)
    data = "".join(f"<row>{line}</row>" for line in cells)
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    return f'{_XML}<worksheet xmlns="{main}"><sheetData>{data}</sheetData></worksheet>'


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"<c><v>{value}</v></c>"
    # XML has no control characters but these three
    text = "".join(c for c in str(value) if c >= " " or c in "\t\n\r")
    return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(text)}</t></is></c>'


def _write(folder: Path, values: Any) -> Path:
    path = folder / "submission.json"
    write_text(path, json.dumps(values, indent=1) + "\n")
    return path

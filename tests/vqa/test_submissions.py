"""Files for test servers, in the forms that they take."""

import json
import zipfile
from xml.etree import ElementTree

import pytest

from bench.vqa.tasks import TASKS

from . import sets
from .test_readers import read

EXPECTED = {
    "vqav2 test-dev": [{"question_id": 90 + i, "answer": text} for i, text in enumerate(("a", "", "c"))],
    "vizwiz test": [
        {"image": f"VizWiz_test_{i:08d}.jpg", "answer": text} for i, text in enumerate(("a", "", "c"))
    ],
    "stvqa test": [{"question_id": 3, "answer": "a"}, {"question_id": 4, "answer": ""}],
    "docvqa test": [{"questionId": 50, "answer": "a"}, {"questionId": 51, "answer": ""}],
    "mmvet": {"v1_0": "a", "v1_1": ""},
    "infimm-eval": {"1": "a", "2": ""},
    "mmmu test": {"test_Art_1": "A", "test_Art_2": ""},
    "gqa": [{"questionId": "01", "prediction": "a"}, {"questionId": "02", "prediction": ""}],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_json_submissions(name, tmp_path):
    """The second question could not be asked: its answer is empty, as servers want all of them."""
    task, build = sets.SETS[name]
    questions = read(task, build(tmp_path / "set"))
    answers = {question.id: text for question, text in zip(questions, ("a", None, "c"), strict=False) if text}
    path = TASKS[task].submit(tmp_path, questions, answers)
    assert path == tmp_path / "submission.json"
    assert json.loads(path.read_text()) == EXPECTED[name]


def test_mmbench_is_a_spreadsheet(tmp_path):
    questions = read("mmbench", sets.mmbench(tmp_path / "set", "test"))
    answers = {"1": "The answer is B", "1000001": "no <idea> & \x07more"}
    path = TASKS["mmbench"].submit(tmp_path, questions, answers)
    assert path == tmp_path / "submission.xlsx"
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    rows = [["".join(cell.itertext()) for cell in row] for row in sheet[0]]
    assert rows == [
        ["index", "question", "A", "B", "C", "D", "prediction"],
        ["1", "Which\tone?", "cat", "dog", "", "", "B"],
        ["1000001", "Which\tone?", "dog", "cat", "", "", "no <idea> & more"],
        ["2", "What?", "1", "2", "3", "nan", ""],
    ]


def test_servers_that_are_asked_have_a_form():
    assert {name for name, task in TASKS.items() if task.submit is None} == {
        *("okvqa", "iconqa", "ocrvqa", "scienceqa", "mme", "pope")
    }

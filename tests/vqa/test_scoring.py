"""Score lines of every set from answers made by hand."""

import pytest

from bench.vqa.metrics import METRIC_VERSION
from bench.vqa.questions import Question
from bench.vqa.tasks import TASKS

from . import sets
from .test_readers import read


def lines_of(task: str, questions, answers) -> dict[str, float]:
    lines = TASKS[task].score(questions, answers, 0)
    for line in lines:
        assert line.low <= line.value + 1e-9 and line.value - 1e-9 <= line.high
        assert line.count > 0 and line.unit and line.parser and line.version == METRIC_VERSION
    return {line.metric.strip(): line.value for line in lines}


def test_vqa_score_both_ways(tmp_path):
    """Six of ten said "unanswerable" ... ; an answer with a period agrees as the annotators disagree."""
    questions = read("vqav2", sets.coco(tmp_path))
    answers = {"90": "Thing 0.", "91": "other"}  # 9 of 10 said thing 0; one said other; 92 is missing
    expected = pytest.approx(100 * (1 + 0.3 + 0) / 3)
    assert lines_of("vqav2", questions, answers) == {
        "VQA score, official": expected,
        "VQA score, plain": expected,
    }


def test_official_and_plain_differ_where_all_agree(tmp_path):
    questions = read("textvqa", sets.textvqa(tmp_path))
    answers = {question.id: "Nokia" for question in questions}
    assert lines_of("textvqa", questions, answers) == {"VQA score, official": 0, "VQA score, plain": 100}


def test_exact_match(tmp_path):
    questions = read("ocrvqa", sets.ocrvqa(tmp_path))
    answers = {"k1_0": "a person", "k1_1": "book", "k2_0": "No."}
    assert lines_of("ocrvqa", questions, answers) == {"exact match": pytest.approx(200 / 3)}


def test_anls(tmp_path):
    questions = read("docvqa", sets.docvqa(tmp_path))
    answers = {"50": "may 1", "51": "1 Mai"}
    assert lines_of("docvqa", questions, answers) == {"ANLS": pytest.approx(90)}


def test_choices_and_blanks(tmp_path):
    questions = read("iconqa", sets.iconqa(tmp_path / "icon"))
    assert lines_of("iconqa", questions, {"10": "four", "11": "B", "12": "5."}) == {
        "accuracy": pytest.approx(200 / 3),
        "accuracy, choose_img": 0,
        "accuracy, choose_txt": 100,
        "accuracy, fill_in_blank": 100,
    }
    questions = read("scienceqa", sets.scienceqa(tmp_path / "science"))
    assert lines_of("scienceqa", questions, {"4": "The answer is C.", "5": "no idea"}) == {
        "accuracy": 50,
        "accuracy, with an image": 100,
        "accuracy, without an image": 0,
    }
    questions = read("mmmu", sets.mmmu(tmp_path / "mmmu"))
    answers = {"validation_Art_1": "newer, by far", "validation_Art_2": "There are 4."}
    assert lines_of("mmmu", questions, answers) == {
        "accuracy": 100,
        "accuracy, multiple choice": 100,
        "accuracy, open": 100,
    }


def test_circles(tmp_path):
    questions = read("mmbench", sets.mmbench(tmp_path))
    whole = {"1": "A", "1000001": "B", "2": "C"}
    assert lines_of("mmbench", questions, whole) == {
        "accuracy, options as published": 100,
        "circular accuracy": 100,
    }
    assert lines_of("mmbench", questions, whole | {"1000001": "A"}) == {
        "accuracy, options as published": 100,
        "circular accuracy": 50,
    }
    assert list(lines_of("mmbench", questions[::2], whole)) == ["accuracy, options as published"]


def test_mme(tmp_path):
    """existence: 3 of 4 questions, 1 of 2 images: 75 + 50; OCR: both of one image."""
    questions = read("mme", sets.mme(tmp_path))
    answers = {
        "existence/a/1": "Yes",
        "existence/a/2": "no, it is not",
        "existence/b/1": "yes",
        "existence/b/2": "perhaps",
        "OCR/c/1": "No",
        "OCR/c/2": "Yes.",
    }
    expected = {"MME perception (2 of 10 subtasks)": 325, "existence": 125, "OCR": 200}
    assert lines_of("mme", questions, answers) == expected


def test_a_damaged_file_of_mme_is_an_image_with_wrong_answers(tmp_path):
    written = sets.mme(tmp_path)
    (tmp_path / "existence" / "b.txt").write_text("")
    questions = read("mme", written)
    answers = {"existence/a/1": "Yes", "existence/a/2": "No", "OCR/c/1": "No", "OCR/c/2": "Yes"}
    assert lines_of("mme", questions, answers)["existence"] == 100


def test_pope(tmp_path):
    questions = read("pope", sets.pope(tmp_path))
    answers = {
        "random/1": "Yes",
        "random/2": "No",
        "popular/1": "yes",
        "popular/2": "yes",
        "adversarial/2": "no",
    }
    assert lines_of("pope", questions, answers) == {
        "F1, mean": pytest.approx((100 + 200 / 3 + 0) / 3),
        "F1, random": 100,
        "F1, popular": pytest.approx(200 / 3),  # TP 1, FP 1
        "F1, adversarial": 0,
    }
    one = [question for question in questions if question.group == "random"]
    assert list(lines_of("pope", one, answers)) == ["F1, mean of 1 splits", "F1, random"]


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.score is not None])
def test_questions_that_could_not_be_asked_are_wrong(task, tmp_path):
    """Also those whose record is so damaged that nothing is known of them."""
    written = sets.SETS[task][1](tmp_path)
    questions = read(task, written)
    group = questions[0].group
    bad = Question(id="bad record: 1", group=group, bad=("bad_json", "x"))
    scores = lines_of(task, [*questions, bad], {})
    assert set(scores.values()) == {0.0}


def test_intervals_are_seeded_and_shrink(tmp_path):
    few = [Question(id=str(i), text="x", answers=("yes",)) for i in range(20)]
    many = [Question(id=str(i), text="x", answers=("yes",)) for i in range(2000)]
    answers = {str(i): "yes" if i % 2 else "no" for i in range(2000)}
    widths = []
    for questions in (few, many):
        (line,) = TASKS["gqa"].score(questions, answers, 0)
        assert TASKS["gqa"].score(questions, answers, 0) == [line]
        widths.append(line.high - line.low)
    assert widths[0] == pytest.approx(2 * 1.96 * 50 / 20**0.5, rel=0.15)
    assert widths[1] == pytest.approx(2 * 1.96 * 50 / 2000**0.5, rel=0.1)


def test_mme_intervals_draw_images_not_questions():
    """Images are right or wrong as wholes: the width is that of the images, 200 points times theirs."""
    questions = [
        Question(id=f"{i}/{n}", text="x", answers=("yes",), group="count", unit=str(i))
        for i in range(400)
        for n in (1, 2)
    ]
    answers = {question.id: "yes" if int(question.unit) % 2 else "no" for question in questions}
    line = TASKS["mme"].score(questions, answers, 0)[0]
    assert line.value == 100 and line.count == 400 and line.unit == "images"
    assert line.high - line.low == pytest.approx(2 * 1.96 * 200 * 0.5 / 400**0.5, rel=0.1)

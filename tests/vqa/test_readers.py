"""Questions of every set out of its published form; what is damaged is named and stays."""

import json

import pytest
from PIL import Image

from bench.vqa.prompts import PROMPT_FORMS, content_of, prompt_of
from bench.vqa.questions import Question, checked, limited
from bench.vqa.tasks import TASKS, source_of, task_of
from model.picture import load_pixels

from . import sets
from .conftest import write


def read(name: str, written: sets.Written, **options) -> list[Question]:
    source = source_of(name, written.data, written.images, split=written.split, **options)
    return checked(TASKS[name].read(source), str(source.path))


@pytest.mark.parametrize("name", sets.SETS)
def test_questions_of_every_form(name, tmp_path):
    task, build = sets.SETS[name]
    written = build(tmp_path / "set")
    questions = read(task, written)
    assert [question.id for question in questions] == written.ids
    assert [question.answers for question in questions] == written.answers
    assert all(question.bad is None and question.text for question in questions)
    for question in questions:
        for image in question.images:
            assert load_pixels(image).ndim == 3
        assert not question.options or set(question.answers) <= set(question.options)


def test_every_task_is_written_here():
    assert {task for task, _ in sets.SETS.values()} == set(TASKS)


def test_a_file_may_be_named_itself(tmp_path):
    written = sets.coco(tmp_path)
    data = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    moved = (tmp_path / "v2_mscoco_val2014_annotations.json").rename(tmp_path / "mine.json")
    source = source_of("vqav2", data, written.images, annotations=moved)
    assert [q.id for q in TASKS["vqav2"].read(source)] == written.ids
    pope = sets.pope(tmp_path / "pope")
    source = source_of("pope", pope.data / "coco_pope_popular.json", pope.images)
    assert {question.group for question in TASKS["pope"].read(source)} == {"popular"}


def test_details_of_the_sets(tmp_path):
    icon = {q.id: q for q in read("iconqa", sets.iconqa(tmp_path / "icon"))}
    assert icon["10"].options == {"A": "three", "B": "four"} and len(icon["11"].images) == 3
    parts = content_of(icon["11"], "letter")
    marks = [part["number"] for part in parts if part["type"] == "image"]
    assert marks == [0, 1, 2] and parts[1]["text"] == "Which one?\nA. "
    science = read("scienceqa", sets.scienceqa(tmp_path / "science"))
    assert [len(question.images) for question in science] == [1, 0]
    assert prompt_of(science[1], "letter").startswith("Look.\nWhich is it?\nA. up\nB. down\nC. left\nAnswer")
    first, rotated, second = read("mmbench", sets.mmbench(tmp_path / "mmbench"))
    assert first.unit == rotated.unit == "1" and second.unit == "2" and first.text == "Which\tone?"
    assert list(second.options) == ["A", "B", "C"] and first.hint == ""
    assert (load_pixels(first.images[0]) == load_pixels(rotated.images[0])).all()
    compared, counted = read("mmmu", sets.mmmu(tmp_path / "mmmu"))
    assert compared.options["B"] == "newer, by far" and counted.options == {}
    assert prompt_of(compared, "question").startswith("Compare <image 1> and <image 2>.\nA. older")
    assert [part["type"] for part in content_of(compared, "question")] == ["text", "image"] * 2 + ["text"]
    book = read("ocrvqa", sets.ocrvqa(tmp_path / "books"))
    assert book[2].images[0].name == "k2.png"


def test_forms_of_the_prompt():
    question = Question(id="1", text="Is it? Please answer yes or no.", hint="Look.", images=("x",))
    assert prompt_of(question, "question") == "<image 1>Look.\nIs it? Please answer yes or no."
    assert prompt_of(question, "yes-no") == "<image 1>Look.\nIs it? Please answer yes or no."
    short = "\nAnswer the question using a single word or phrase."
    assert prompt_of(question, "short") == prompt_of(question, "question") + short
    assert prompt_of(question, "letter") == prompt_of(question, "short")
    other = Question(id="1", text="Which?", options={"A": "x", "B": "y"})
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert prompt_of(other, "letter") == "Which?\nA. x\nB. y" + letter
    assert prompt_of(other, "yes-no").endswith("B. y Please answer yes or no.")
    assert {task.prompt for task in TASKS.values()} == set(PROMPT_FORMS)


DAMAGES = {
    "textvqa": [
        ({"question_id": None}, "bad_record", "question_id must be a text or a whole number"),
        ({"question": " "}, "empty_question", "question must not be empty"),
        ({"image_id": None}, "bad_record", "fields of the image's name"),
        ({"answers": [3]}, "bad_record", "answers must be a text, a list of texts"),
        ({"answers": []}, "no_answer", "question 7 has no answer"),
    ],
    "gqa": [({"answer": {"x": 1}}, "bad_record", "answer must be a text")],
    "iconqa": [({"answer": 7}, "bad_record", "answer must be an index in 0..1")],
    "scienceqa": [({"choices": "up"}, "bad_record", "choices must be a list")],
    "mmvet": [({"imagename": 3}, "missing_image", "must be a file name or several")],
}


def damage(name: str, folder, change: dict) -> None:
    """Changes the first record of a set's file."""
    names = {
        "gqa": "testdev_balanced_questions.json",
        "textvqa": "TextVQA_0.5.1_val.json",
        "mmvet": "mm-vet.json",
    }
    path = folder / names.get(name, "problems.json")
    content = json.loads(path.read_text())
    record = content["data"][0] if name == "textvqa" else next(iter(content.values()))
    record |= change
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change", "reason", "message"),
    [(name, *each) for name, damages in DAMAGES.items() for each in damages],
)
def test_a_damaged_record_is_a_bad_question(name, change, reason, message, tmp_path):
    written = sets.SETS[name][1](tmp_path)
    damage(name, tmp_path, change)
    questions = read(name, written)
    assert len(questions) == len(written.ids)
    assert questions[0].bad[0] == reason and message in questions[0].bad[1]
    assert all(question.bad is None for question in questions[1:])


def test_other_damages_are_bad_questions_too(tmp_path):
    written = sets.coco(tmp_path / "coco")
    write(
        tmp_path / "coco" / "v2_mscoco_val2014_annotations.json",
        {"annotations": [{"question_id": 91, "answers": ["x"]}]},
    )
    assert [q.bad and q.bad[0] for q in read("vqav2", written)] == ["no_annotation", None, "no_annotation"]
    written = sets.mme(tmp_path / "mme")
    write(tmp_path / "mme" / "existence" / "b.txt", "one line\tYes\n")
    bad = [q for q in read("mme", written) if q.bad is not None]
    assert [(q.group, q.bad[0]) for q in bad] == [("existence", "bad_record")]
    assert "two questions, got 1 lines" in bad[0].bad[1]
    written = sets.pope(tmp_path / "pope")
    path = tmp_path / "pope" / "coco_pope_popular.json"
    path.write_text(path.read_text().replace('"label": "no"', '"label": "maybe"') + "{no json\n")
    bad = [q for q in read("pope", written) if q.bad is not None]
    assert [(q.group, q.bad[0]) for q in bad] == [("popular", "bad_record"), ("popular", "bad_json")]
    written = sets.mmbench(tmp_path / "mmbench")
    path = tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\tB\tnan", "\tE\tnan"))
    bad = [q for q in read("mmbench", written) if q.bad is not None]
    assert len(bad) == 1 and "answer must be one of A, B, got 'E'" in bad[0].bad[1]
    written = sets.ocrvqa(tmp_path / "books")
    path = tmp_path / "books" / "dataset.json"
    path.write_text(path.read_text().replace('["No"]', "[]"))
    bad = [q for q in read("ocrvqa", written) if q.bad is not None]
    assert len(bad) == 1 and "must be as many, got 1 and 0" in bad[0].bad[1]
    written = sets.mmmu(tmp_path / "mmmu")
    path = tmp_path / "mmmu" / "validation.jsonl"
    path.write_text(path.read_text().replace("['older'", "['older").replace('"c.png"', "5"))
    assert [q.bad[0] for q in read("mmmu", written)] == ["bad_record", "missing_image"]
    path.write_text(path.read_text().replace("['older", "['older'").replace('"B"', '"F"'))
    assert "answer must be one of A, B, got 'F'" in read("mmmu", written)[0].bad[1]
    written = sets.scienceqa(tmp_path / "science")
    path = tmp_path / "science" / "problems.json"
    path.write_text('{"9": {}, "9": {}, ' + path.read_text().lstrip("{"))  # a key twice moves no other
    assert [q.answers for q in read("scienceqa", written)] == [("C",), ("A",)]


def test_infimm_eval_may_be_an_object_or_lines(tmp_path):
    written = sets.infimm_eval(tmp_path)
    rows = json.loads((tmp_path / "core-mm-wo-answer.json").read_text())
    write(tmp_path / "core-mm-wo-answer.json", {f"q{row['id']}": row for row in rows})
    assert [q.id for q in read("infimm-eval", written)] == ["q1", "q2"]
    lines = write(tmp_path / "lines.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    source = source_of("infimm-eval", lines, written.images)
    assert [len(q.images) for q in TASKS["infimm-eval"].read(source)] == [1, 2]


def test_ids_are_unique_and_sets_not_empty(tmp_path):
    written = sets.textvqa(tmp_path)
    damage("textvqa", tmp_path, {"question_id": 8})
    with pytest.raises(ValueError, match="question ids must be unique, got '8' twice"):
        read("textvqa", written)
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": []})
    with pytest.raises(ValueError, match="--data must hold at least one record, got none"):
        read("textvqa", written)
    with pytest.raises(ValueError, match="--data must hold at least one question"):
        checked([], "x")


def test_a_limit_is_spread_over_the_set_and_keeps_units_whole():
    questions = [Question(id=str(i), text="x") for i in range(100)]
    assert [q.id for q in limited(questions, 4)] == ["0", "25", "50", "75"]
    assert len(limited(questions, 7)) == 7 and limited(questions, None) == questions == limited(
        questions, 200
    )
    pairs = [Question(id=str(i), text="x", unit=str(i // 2)) for i in range(100)]
    assert [q.id for q in limited(pairs, 4)] == ["0", "1", "50", "51"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(data="nowhere"),
            "--data must be v2_OpenEnded_mscoco_val2014_questions.json or the folder with it",
        ),
        (dict(split="dev"), "--split must be one of val, test-dev, test, train for vqav2, got 'dev'"),
        (dict(split="train"), "--data must be v2_OpenEnded_mscoco_train2014_questions.json"),
        (dict(images="nowhere"), "--images must be a folder with COCO_val2014_"),
        (dict(annotations="no"), "--annotations must be v2_mscoco_val2014_annotations.json, the answers"),
    ],
)
def test_files_that_are_not_there_are_named(options, message, tmp_path):
    sets.coco(tmp_path)
    given = {"data": tmp_path} | {k: tmp_path / v if k != "split" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        source_of("vqav2", **given)


def test_annotations_belong_to_two_sets_and_splits_with_answers(tmp_path):
    sets.textvqa(tmp_path)
    with pytest.raises(ValueError, match="--annotations must be left out for textvqa val"):
        source_of("textvqa", tmp_path, annotations=tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mme", None, "--data must hold folders of subtasks .existence, count"),
        ("pope", None, "--data must hold coco_pope_random.json"),
        ("iconqa", None, "--data must be an existing file, got .*problems.json"),
        ("scienceqa", {"problems.json": {"1": {}}}, "--data must hold pid_splits.json"),
        ("scienceqa", {"problems.json": {"1": {}}, "pid_splits.json": {"val": []}}, "--split must be one of"),
        ("mmbench", {"mmbench_dev_20230712.tsv": "index\tquestion\n1\tx\n"}, "got no A, B, image in"),
        ("gqa", {"testdev_balanced_questions.json": []}, "--data must be a JSON object"),
        ("docvqa", {"val_v1.0.json": {"no": 1}}, "--data must be a JSON object with a list 'data'"),
    ],
)
def test_sets_of_another_form_are_refused(name, content, message, tmp_path):
    for file, value in (content or {}).items():
        write(tmp_path / file, value)
    with pytest.raises(ValueError, match=message):
        read(name, sets.Written(tmp_path, tmp_path, [], []))


def test_pope_files_say_their_split(tmp_path):
    path = write(tmp_path / "mine.json", "{}")
    with pytest.raises(ValueError, match="--data must have its split in its name"):
        TASKS["pope"].read(source_of("pope", path))


@pytest.mark.parametrize(
    ("name", "found"), [("OK-VQA", "okvqa"), ("MM-Vet", "mmvet"), ("mm_bench", "mmbench")]
)
def test_names_of_tasks(name, found):
    assert task_of(name)[0] == found


def test_an_unknown_task_is_answered_with_a_close_one():
    with pytest.raises(
        ValueError, match="--task must be one of vqav2, .*, got 'textvq'; did you mean 'textvqa'"
    ):
        task_of("textvq")


def test_a_picture_that_is_no_base64_is_named(tmp_path):
    sets.mmbench(tmp_path)
    path = tmp_path / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace(sets.encoded(2), "###"))
    questions = read("mmbench", sets.Written(tmp_path, tmp_path, [], []))
    with pytest.raises(ValueError, match="row 3 image"):
        load_pixels(questions[2].images[0])
    assert isinstance(Image.fromarray(load_pixels(questions[0].images[0])), Image.Image)

"""The runner with a tiny model: every set from its files to its scores, kills, damage, the command line."""

import json
import os
import re
import signal
import sys

import pytest
from PIL import Image

from bench.vqa.__main__ import main
from bench.vqa.answering import Answerer, load_processor, plan_batches
from bench.vqa.prompts import content_of
from bench.vqa.run import Options, Report, run
from bench.vqa.tasks import TASKS
from model import InfiMMHD

from . import sets
from .conftest import save_model, write
from .test_readers import read


@pytest.fixture
def ask(saved, tmp_path):
    """`ask(written, task, **options)`: a run into tmp_path/out."""

    def asked(written: sets.Written, task: str, **options) -> Report:
        given = dict(
            model=saved,
            task=task,
            data=written.data,
            images=written.images,
            split=written.split,
            output=tmp_path / "out",
            max_new_tokens=4,
        )
        return run(Options(**given | options))

    return asked


def answers_of(folder) -> dict[str, str]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()[1:]
    return {entry["id"]: entry["answer"] for entry in map(json.loads, lines)}


@pytest.mark.parametrize("name", sets.SETS)
def test_every_set_from_files_to_scores(name, ask, tmp_path):
    task, build = sets.SETS[name]
    written = build(tmp_path / "set")
    report = ask(written, task)
    answers = answers_of(tmp_path / "out")
    assert sorted(answers) == sorted(written.ids)
    document = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert document["questions"] == document["answered"] == len(written.ids) and document["bad"] == {}
    labelled = any(written.answers)
    assert bool(report.scores) == labelled == bool(document["scores"])
    submitted = [path for path in report.files if path.name.startswith("submission")]
    assert bool(submitted) != labelled and all(path.is_file() for path in report.files)
    if labelled:
        questions = read(task, written)
        assert report.scores == TASKS[task].score(questions, answers, 0)
        for line in document["scores"]:
            assert line["split"] == written.split or written.split is None
            assert line["prompt"] == TASKS[task].prompt and line["parser"] and line["version"] == "1"
    else:
        judged = TASKS[task].score is None
        assert any(("needs a judge" if judged else "has no known answers") in note for note in report.notes)


def test_answers_are_those_of_generate(ask, saved, tmp_path):
    """One question by hand: the processor's chat template, greedy, and the window counts of its picture."""
    written = sets.mmmu(tmp_path / "set")
    ask(written, "mmmu")
    question = read("mmmu", written)[0]
    processor, model = load_processor(saved), InfiMMHD.from_pretrained(saved).eval()
    parts = [
        {"type": "image", "path": str(question.images[part["number"]])} if part["type"] == "image" else part
        for part in content_of(question, "letter")
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert inputs["windows_per_image"].tolist() == [1, 4]
    tokens = model.generate(**inputs, max_new_tokens=4)
    expected = processor.decode(tokens[0, inputs["input_ids"].shape[1] :])
    assert expected == answers_of(tmp_path / "out")[question.id]


def many(folder, count: int = 13) -> sets.Written:
    """GQA with pictures of four sizes, in no order, and questions of several lengths."""
    images = sets.save_pictures(folder / "images", *(f"n{i}.jpg" for i in range(count)))
    rows = {
        str(i): {"imageId": f"n{i}", "question": f"What is{' it' * (i % 5)} {i}?", "answer": "yes"}
        for i in range(count)
    }
    write(folder / "testdev_balanced_questions.json", rows)
    return sets.Written(folder, images, list(rows), [("yes",)] * count)


def test_batches_hold_images_of_like_sizes(saved, tmp_path):
    questions = read("gqa", many(tmp_path))
    batches = plan_batches(questions, load_processor(saved), 4)
    assert [len(batch) for batch in batches] == [4, 4, 4, 1]
    windows = {0: 1, 1: 4, 2: 7, 3: 1}
    counts = [[windows[int(question.id) % 4] for question in batch] for batch in batches]
    assert sum(counts, []) == sorted(sum(counts, []))
    assert plan_batches(questions, load_processor(saved), 4) == batches


def test_batches_give_the_answers_of_one_by_one(ask, tmp_path):
    written = many(tmp_path / "set")
    ask(written, "gqa", output=tmp_path / "one", batch_size=1)
    ask(written, "gqa", output=tmp_path / "five", batch_size=5)
    one = answers_of(tmp_path / "one")
    assert one == answers_of(tmp_path / "five") and len(set(one.values())) > 3


@pytest.mark.parametrize("half_line", [b"", b'{"id": "3", "question": "Wha'])
def test_a_killed_run_goes_on_to_the_same_file(ask, saved, tmp_path, half_line):
    written = many(tmp_path / "set")
    options = Options(
        model=saved,
        task="gqa",
        data=written.data,
        images=written.images,
        batch_size=4,
        max_new_tokens=4,
        output=tmp_path / "killed",
    )
    child = os.fork()
    if child == 0:
        run(options, lambda done, total: done >= 8 and os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    path = tmp_path / "killed" / "predictions.jsonl"
    assert len(path.read_bytes().splitlines()) == 1 + 8
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + half_line)  # and the last line was not on the disk, or half of it
    asked = []
    report = run(options, lambda done, total: asked.append((done, total)))
    assert asked == [(4, 13), (8, 13), (12, 13), (13, 13)]
    assert bool(report.notes) == bool(half_line) and all("was dropped" in note for note in report.notes)
    whole = ask(written, "gqa", batch_size=4)
    assert sorted(path.read_bytes().splitlines()) == sorted(
        (tmp_path / "out" / "predictions.jsonl").read_bytes().splitlines()
    )
    assert report.scores == whole.scores


def test_a_finished_run_only_scores(ask, tmp_path, monkeypatch):
    written = sets.gqa(tmp_path / "set")
    first = ask(written, "gqa")
    monkeypatch.setattr("model.talk.load", lambda options: pytest.fail("the model was loaded"))
    assert ask(written, "gqa").scores == first.scores


def test_what_differs_is_not_mixed(ask, saved, tmp_path):
    written = sets.textvqa(tmp_path / "set")
    ask(written, "textvqa")
    for options, name in (
        (dict(prompt_form="question"), "prompt_form"),
        (dict(max_new_tokens=5), "max_new_tokens"),
        (dict(batch_size=2), "batch_size"),
        (dict(limit=2), "questions"),
        (dict(dtype="float32"), "dtype"),
    ):
        with pytest.raises(ValueError, match=f"of the same settings, got {name}"):
            ask(written, "textvqa", **options)
    with pytest.raises(ValueError, match="of the same settings, got weights"):
        ask(written, "textvqa", model=save_model(tmp_path / "other", hidden_size=64, intermediate_size=64))
    path = written.data / "TextVQA_0.5.1_val.json"
    path.write_text(path.read_text().replace("brand", "name"))
    with pytest.raises(ValueError, match="of the same settings, got questions_digest"):
        ask(written, "textvqa")


def test_a_run_that_could_not_begin_leaves_no_settings(ask, tmp_path):
    written = sets.gqa(tmp_path / "set")
    with pytest.raises(ValueError, match="--dtype must be one of"):
        ask(written, "gqa", dtype="int8")
    assert ask(written, "gqa").scores


def spoilt(folder) -> sets.Written:
    """Ten questions: an image missing, one broken, an image mark in the text, a text too long, a record
    without a question, and five good ones."""
    written = many(folder, 10)
    (written.images / "n0.jpg").unlink()
    (written.images / "n1.jpg").write_bytes(b"no picture")
    path = folder / "testdev_balanced_questions.json"
    rows = json.loads(path.read_text())
    rows["2"]["question"] = "What is this <image>?"
    rows["3"]["question"] = "what " * 200
    rows["4"]["question"] = ""
    path.write_text(json.dumps(rows))
    return written


def test_bad_questions_are_counted_as_wrong(ask, tmp_path):
    written = spoilt(tmp_path / "set")
    report = ask(written, "gqa", skip_bad=True, batch_size=4)
    reasons = ("missing_image", "bad_image", "bad_text", "too_long", "empty_question")
    assert report.bad == {reason: 1 for reason in reasons}
    assert report.scores[0].count == 10
    document = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert document["questions"] == 10 and document["answered"] == 5 and document["bad"] == report.bad
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[1:]
    ]
    messages = {line["bad"]: line["message"] for line in lines if "bad" in line}
    assert "n0.jpg" in messages["missing_image"] and "n1.jpg" in messages["bad_image"]
    assert "question 2" in messages["bad_text"] and "got 1" in messages["too_long"]
    good = [line for line in lines if "answer" in line]
    assert len(good) == 5
    again = ask(written, "gqa", skip_bad=True, batch_size=4)
    assert again.bad == report.bad and again.scores == report.scores
    with pytest.raises(ValueError, match="--skip-bad"):
        ask(written, "gqa", batch_size=4)


@pytest.mark.parametrize(
    ("mend", "message"),
    [
        ((), "empty_question: .*record 5 .*question must not be empty"),
        (("4",), "missing_image: question 0: image must be an existing file, got '.*n0.jpg'.*give the right"),
        (("4", "0"), "bad_image: question 1: .*n1.jpg.*it is in no known image format"),
        (("4", "0", "1"), "too_long: question 3: prompt must be at most 636 tokens long for 4 new ones"),
        (("4", "0", "1", "3"), "bad_text: question 2: .*not contain '<image>'"),
    ],
)
def test_a_bad_question_stops_the_run_and_is_named(ask, tmp_path, mend, message):
    written = spoilt(tmp_path / "set")
    path = tmp_path / "set" / "testdev_balanced_questions.json"
    rows = json.loads(path.read_text())
    for identity in mend:
        rows[identity] = rows["9"]
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        ask(written, "gqa", batch_size=4)


def test_a_limit_is_stated(ask, tmp_path):
    report = ask(many(tmp_path / "set"), "gqa", limit=3)
    assert report.conditions["split"] == "testdev, 3 questions by --limit" and report.scores[0].count == 3
    report = ask(sets.docvqa(tmp_path / "doc", "test"), "docvqa", limit=1, output=tmp_path / "doc-out")
    assert "the submission holds the questions of --limit alone" in report.notes


def test_an_answerer_without_questions(saved):
    answerer = Answerer(InfiMMHD.from_pretrained(saved), load_processor(saved), "short", 4)
    assert answerer([]) == {}


def test_a_tokenizer_without_padding_is_named(saved, tmp_path):
    """It once asked the same batch again for ever, as no question of it was bad by itself."""
    questions = read("gqa", many(tmp_path))
    processor = load_processor(saved)
    processor.tokenizer.pad_token = None
    answerer = Answerer(InfiMMHD.from_pretrained(saved).eval(), processor, "short", 4)
    with pytest.raises(ValueError, match="tokenizer must have a pad_token where texts differ in length"):
        answerer(questions[:3])


def command(saved, tmp_path, *arguments: str) -> int:
    given = ["--model", str(saved), "--output", str(tmp_path / "out"), "--max-new-tokens", "3"]
    return main([*given, *arguments])


def test_the_command_prints_what_a_score_means(saved, tmp_path, capsys):
    written = sets.textvqa(tmp_path / "set")
    arguments = ["--task", "TextVQA", "--data", str(written.data), "--images", str(written.images)]
    assert command(saved, tmp_path, *arguments) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "VQA score, official" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert re.fullmatch(r"\d+\.\d\d", cells[1]) and re.fullmatch(r"\d+\.\d\d to \d+\.\d\d", cells[2])
    assert cells[3:] == ["3 questions", "val", "short", "official normalisation", "1"]
    assert "written: " in printed and "scores.json" in printed
    (written.images / "a.jpg").unlink()
    (tmp_path / "out" / "predictions.jsonl").unlink()
    assert command(saved, tmp_path, *arguments, "--skip-bad", "--prompt-form", "question") == 0
    assert "counted as wrong: 1 missing_image" in capsys.readouterr().out


def test_a_set_for_a_judge_says_so(saved, tmp_path, capsys):
    written = sets.mmvet(tmp_path / "set")
    arguments = ["--task", "mmvet", "--data", str(written.data), "--images", str(written.images)]
    assert command(saved, tmp_path, *arguments) == 0
    printed = capsys.readouterr().out
    assert "MM-Vet needs a judge (GPT-4)" in printed and "submission.json" in printed and "│" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "textvqq"], "--task must be one of .*; did you mean 'textvqa'?"),
        (["--prompt-form", "shrt"], "--prompt-form must be one of .*; did you mean 'short'?"),
        (["--model", "nowhere"], "--model must be a folder with a saved model and processor, got 'nowhere'"),
        (["--data", "nowhere"], "--data must be TextVQA_0.5.1_val.json or the folder with it"),
        (["--images", "nowhere"], "--images must be a folder with ID.jpg, got 'nowhere'"),
        (["--split", "dev"], "--split must be one of val, test, train for textvqa, got 'dev'"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--max-new-tokens", "-1"], "--max-new-tokens must be at least 1, got -1"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--dtype", "int8"], "--dtype must be one of auto"),
        (["--device", "moon"], "--device must be one that works here, got 'moon'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(saved, tmp_path, capsys, arguments, message):
    written = sets.textvqa(tmp_path / "set")
    known = ["--task", "textvqa", "--data", str(written.data), "--images", str(written.images)]
    assert command(saved, tmp_path, *known, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"error: {message}", error) and "Traceback" not in error


def test_what_is_not_given_is_named(capsys):
    assert main(["--task", "gqa"]) == 2
    assert capsys.readouterr().err == "error: --model must be given (--list names the tasks), got None\n"


def test_a_corrupt_file_of_predictions_is_one_line(saved, tmp_path, capsys):
    written = sets.textvqa(tmp_path / "set")
    known = ["--task", "textvqa", "--data", str(written.data), "--images", str(written.images)]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl").write_text("garbage\n")
    assert command(saved, tmp_path, *known) == 2
    assert "error: --output must have whole lines" in capsys.readouterr().err


def test_the_list_names_everything(capsys):
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name, task in TASKS.items():
        assert f"{name}: {task.title}; {task.metric}; prompt {task.prompt!r}" in printed
        assert task.where in printed and all(files.questions in printed for files in task.splits.values())
    assert printed.count("needs a judge") == 2


def test_metrics_need_neither_torch_nor_transformers():
    code = "import sys, bench.vqa.metrics, bench.vqa.metrics_vqa, bench.vqa.metrics_choice\n"
    code += "import bench.vqa.metrics_yes_no\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0


def test_pictures_are_turned_upright_before_they_are_counted(saved, tmp_path):
    """The header's size is that of the file; the batch plan has to see the size that is cut into windows."""
    tall = Image.new("RGB", (90, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = sets.save_pictures(tmp_path / "images", "n1.jpg")
    tall.save(folder / "n1.jpg", exif=exif)
    processor = load_processor(saved)
    assert processor.image_processor(folder / "n1.jpg")["windows_per_image"].tolist() == [4]
    rows = {"1": {"imageId": "n1", "question": "Is it?", "answer": "yes"}}
    write(tmp_path / "testdev_balanced_questions.json", rows)
    questions = read("gqa", sets.Written(tmp_path, folder, ["1"], [("yes",)]))
    assert plan_batches(questions, processor, 1) == [questions]

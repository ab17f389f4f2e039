"""`python -m model generate` and `chat` on a small saved model, as a user types them."""

import io

import pytest
import torch
from PIL import Image

from model import InfiMMHD, InfiMMHDProcessor
from model.__main__ import main
from model.talk import Conversation
from tests.model.conftest import open_model
from train.demo.vocabulary import build_tokenizer

QUESTION = "left characters ?"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk")
    model = open_model()
    model.save_pretrained(folder / "model")
    InfiMMHDProcessor.for_model(model.config, build_tokenizer(), "plain").save_pretrained(folder / "model")
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (60, 40), colour).save(folder / f"{number}.jpg")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture
def conversation(saved):
    model = InfiMMHD.from_pretrained(saved / "model")
    return Conversation(model, InfiMMHDProcessor.from_pretrained(saved / "model"))


def test_generate_prints_the_answer_of_the_model(saved, conversation, capsys):
    arguments = ["generate", "--model", str(saved / "model"), "--prompt", QUESTION, "--max-new-tokens", "4"]
    expected = conversation.ask(QUESTION, [saved / "0.jpg"], max_new_tokens=4)
    assert main([*arguments, "--image", str(saved / "0.jpg")]) == 0
    assert capsys.readouterr().out.strip() == expected
    beams = [*arguments, "--image", str(saved / "0.jpg"), "--num-beams", "3"]
    conversation.reset()
    expected = conversation.ask(QUESTION, [saved / "0.jpg"], max_new_tokens=4, num_beams=3)
    assert main(beams) == 0 and capsys.readouterr().out.strip() == expected


def test_generate_samples_by_its_seed(saved, capsys):
    answers = []
    for seed in (1, 1, 2, 3):
        arguments = ["--prompt", QUESTION, "--temperature", "2", "--seed", str(seed), "--max-new-tokens", "8"]
        assert main(["generate", "--model", str(saved / "model"), *arguments]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(set(answers)) > 1


def test_a_conversation_is_the_model_on_its_whole_text(saved, conversation):
    """The second question sees the first one, its answer and both images; the images are encoded once."""
    calls = []
    conversation.model.vision.register_forward_hook(lambda *_: calls.append("vision"))
    first = conversation.ask(QUESTION, [saved / "0.jpg"], max_new_tokens=4)
    second = conversation.ask("right colour ?", max_new_tokens=4)
    assert calls == ["vision"]
    third = conversation.ask("right characters ?", [saved / "1.jpg"], max_new_tokens=4)
    assert calls == ["vision"] * 2
    processor, model = conversation.processor, conversation.model
    end = processor.end_of_chunk_token
    text = f"<image>{QUESTION} {first}{end}right colour ? {second}{end}<image>right characters ?"
    inputs = processor(images=[[saved / "0.jpg", saved / "1.jpg"]], text=[text])
    tokens = model.generate(**inputs, max_new_tokens=4)
    assert processor.decode(tokens[0, inputs["input_ids"].shape[1] :]) == third


def test_a_question_that_fails_is_forgotten(saved, conversation):
    expected = conversation.ask(QUESTION, [saved / "0.jpg"], max_new_tokens=3)
    conversation.reset()
    with pytest.raises(ValueError, match="broken.jpg"):
        conversation.ask(QUESTION, [saved / "broken.jpg"])
    with pytest.raises(ValueError, match="text must be text that the tokenizer can read, got 'unheard-of'"):
        conversation.ask("unheard-of")
    with pytest.raises(ValueError, match="max_position_embeddings"):
        conversation.ask("left " * 600)
    assert conversation.messages == [] and conversation.pictures == []
    assert conversation.ask(QUESTION, [saved / "0.jpg"], max_new_tokens=3) == expected


def test_chat_reads_lines_until_it_is_told_to_quit(saved, conversation, capsys, monkeypatch):
    expected = conversation.ask(QUESTION, [saved / "0.jpg"], max_new_tokens=3)
    again = conversation.ask("right colour ?", max_new_tokens=3)
    conversation.reset()
    alone = conversation.ask("right colour ?", max_new_tokens=3)
    lines = [
        f"/image {saved / '0.jpg'}",
        QUESTION,
        "right colour ?",
        "/image nowhere.jpg",
        "right characters ?",
        "/help",
        "/reset",
        "",
        "right colour ?",
        "/quit",
        "never asked",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--model", str(saved / "model"), "--max-new-tokens", "3"]) == 0
    said = [line.strip() for line in capsys.readouterr().out.split("> ")]
    assert said[2] == expected and said[3] == again
    assert said[5].startswith("error: image must be an existing file, got 'nowhere.jpg'")
    assert said[6].startswith("unknown command '/help': /image FILE")
    assert said[9] == alone and len(said) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "--model must be a folder with a saved model and processor, got 'nowhere'"),
        (["--temperature", "-1"], "--temperature must be at least 0, got -1.0"),
        (["--top-p", "0"], "--top-p must lie in (0, 1], got 0.0"),
        (["--num-beams", "0"], "--num-beams must be at least 1, got 0"),
        (["--dtype", "int8"], "--dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        (["--device", "moon"], "--device must be one that works here, got 'moon'"),
        (["--max-new-tokens", "0"], "max_new_tokens must be a positive int, got 0"),
        (["--image", "nowhere.jpg"], "image must be an existing file, got 'nowhere.jpg'"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(saved, capsys, arguments, message):
    given = ["--model", str(saved / "model"), "--prompt", QUESTION, *arguments]
    assert main(["generate", *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {message}")


def test_a_folder_without_a_processor_is_named(saved, tmp_path, capsys):
    InfiMMHD.from_pretrained(saved / "model").save_pretrained(tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--prompt", QUESTION]) == 2
    assert "--model must hold a saved processor" in capsys.readouterr().err


def test_the_answer_is_streamed_in_pieces(saved, conversation):
    pieces = []
    torch.manual_seed(0)
    answer = conversation.ask(QUESTION, [saved / "0.jpg"], say=pieces.append, max_new_tokens=6)
    assert len(pieces) > 1 and "".join(pieces).strip() == answer

"""The file of answers: gone on with, or refused with what to do."""

import json

import pytest

from bench.vqa.predictions import Predictions, fingerprint

SETTINGS = {"task": "gqa", "batch_size": 2}
IDS = ["1", "2", "3", "4"]
PROMPTS = {identity: f"what {identity}" for identity in IDS}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "predictions.jsonl"


def opened(path, settings=SETTINGS, ids=IDS) -> Predictions:
    return Predictions(path, settings, ids, model="m")


def begun(path) -> bytes:
    with opened(path) as predictions:
        predictions.add(PROMPTS, {"1": "cat\n", "2": ("bad_image", "broken")})
    return path.read_bytes()


def test_what_was_added_is_there_again(path):
    begun(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"predictions": 1, "settings": SETTINGS, "model": "m"}
    assert lines[1] == {"id": "1", "question": "what 1", "answer": "cat\n"}
    assert lines[2] == {"id": "2", "bad": "bad_image", "message": "broken"}
    with opened(path) as predictions:
        assert predictions.answers == {"1": "cat\n"} and predictions.bad == {"2": ("bad_image", "broken")}
        assert "1" in predictions and "2" in predictions and "3" not in predictions
        predictions.add(PROMPTS, {"1": "another", "3": "dog"})  # the first answer stays
    with opened(path) as predictions:
        assert predictions.answers == {"1": "cat\n", "3": "dog"} and predictions.num_dropped == 0


def test_every_cut_of_the_file_is_gone_on_with(path):
    """A kill leaves any number of its bytes: whole lines count, the rest is dropped and written anew."""
    whole = begun(path)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with opened(path) as predictions:
            assert predictions.num_dropped == int(size not in (0, *ends))
            assert len(predictions.answers) + len(predictions.bad) == sum(end <= size for end in ends[1:])
            predictions.add(PROMPTS, {"1": "cat\n", "2": ("bad_image", "broken")})
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda lines: [lines[0], b"{no json", *lines[2:]], "got b'{no json' in line 2"),
        (lambda lines: [*lines[:2], b"[1]", *lines[2:]], "in line 3 .*: delete that line"),
        (lambda lines: [*lines, lines[1]], "in line 4"),
        (lambda lines: [*lines, b'{"id": "9", "answer": "x"}'], "in line 4"),
        (lambda lines: [*lines, b'{"id": "3", "answer": 5}'], "in line 4"),
        (lambda lines: [*lines, b""], "in line 4"),
        (lambda lines: lines[1:], "in line 1"),
        (lambda lines: [b"\xff\xfe", *lines], "in line 1"),
        (lambda lines: [b'{"predictions": 2, "settings": {}}'], "in line 1"),
    ],
)
def test_damaged_lines_are_refused_and_left_alone(path, spoilt, message):
    lines = begun(path).splitlines()
    content = b"".join(line + b"\n" for line in spoilt(lines))
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"--output must have whole lines of this run's predictions.*{message}"
    ):
        opened(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "gqa", "batch_size": 4}, "got batch_size 2 in .* and 4 now"),
        ({"task": "vqav2", "batch_size": 2}, "got task 'gqa' in .* and 'vqav2' now"),
        ({"task": "gqa"}, "got batch_size 2 in .* and None now"),
        ({"task": "gqa", "batch_size": 2, "new": 1}, "got new None in .* and 1 now"),
    ],
)
def test_other_settings_are_refused(path, settings, message):
    begun(path)
    with pytest.raises(
        ValueError, match=f"of the same settings, {message}: choose another --output, or delete"
    ):
        opened(path, settings)


def test_one_run_at_a_time(path):
    with opened(path), pytest.raises(ValueError, match="--output must be used by one run at a time"):
        opened(path)
    opened(path).__exit__(None, None, None)


def test_a_fingerprint_is_of_contents_not_of_places(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
        (tmp_path / folder / "notes.md").write_text(folder)
    first = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "b") == first
    (tmp_path / "b" / "model.safetensors").write_bytes(bytes(range(256)) * 99 + bytes(256))
    assert fingerprint(tmp_path / "b") != first


def test_a_fingerprint_of_a_large_file_reads_pieces_of_it(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(20 << 20)
    first = fingerprint(tmp_path)
    for place in (0, 5 << 20, (20 << 20) - 1):
        with path.open("r+b") as file:
            file.seek(place // (1 << 16) * (1 << 16) if place else 0)
            file.write(b"x" * (1 << 19) if place < 19 << 20 else b"x" * 8)
        assert fingerprint(tmp_path) != first
        first = fingerprint(tmp_path)

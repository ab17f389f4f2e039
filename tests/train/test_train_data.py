"""Reading: every sample once an epoch, every record checked, nothing lost silently."""

import json
import random
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import DataConfig
from train.data import BadSample, ConversationDataset, build_dataset, sample_index
from train.data import records as records_module
from train.data.order import sample_indices
from train.data.records import JsonRecords

from .tiny_stage import messages


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 300), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**12))
def test_an_epoch_reads_every_sample_once(length, seed, epoch):
    positions = range(epoch * length, (epoch + 1) * length)
    indices = sample_indices(positions, length, seed=seed).tolist()
    assert sorted(indices) == list(range(length))
    assert sample_index(positions[-1], length, seed=seed) == indices[-1]


def test_order_depends_on_seed_and_epoch_and_is_spread():
    length = 1000

    def order(start: int, seed: int) -> list[int]:
        return sample_indices(range(start, start + length), length, seed=seed).tolist()

    first = order(0, seed=0)
    assert first == order(0, seed=0)
    assert first != order(0, seed=1) and first != order(length, seed=0)
    # fixed for good: a resumed run must not read another order. As computed with Python's own integers
    assert first[:6] == [879, 23, 217, 979, 356, 895]
    # a random permutation: about one fixed point, and neighbours land about a third of the length apart
    assert sum(p == i for p, i in enumerate(first)) < 8
    gaps = [abs(a - b) for a, b in zip(first, first[1:], strict=False)]
    assert 0.30 < sum(gaps) / len(gaps) / length < 0.37


def test_endless_dataset_is_read_without_memory():
    drawn = {sample_index(p, sys.maxsize, seed=3) for p in range(1000)}
    assert len(drawn) == 1000
    assert all(0 <= index < sys.maxsize for index in drawn)
    assert 0.4 < sum(drawn) / len(drawn) / sys.maxsize < 0.6


def test_no_shuffle_keeps_the_order():
    assert [sample_index(p, 3, shuffle=False) for p in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_conversations(conversations):
    path = conversations(4)
    dataset = ConversationDataset(path)
    assert len(dataset) == 4
    sample = dataset[1]
    assert sample.images == [path.parent / "1.jpg"]
    assert sample.turns == [("<image>which colour ?", "green")]
    assert sample.origin == f"{path} line 2"
    text_only = dataset[3]
    assert text_only.images == []
    assert text_only.turns == [("which colour ?", "red"), ("how bright ?", "light red")]
    with pytest.raises(IndexError):
        dataset[4]


GOOD = {"image": "0.jpg", "conversations": messages("<image>\nwhich ?", "red")}


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        ('{"image": ', "bad_json", "record must be JSON"),
        ("\xff", "bad_json", "record must be JSON"),
        ("[" * 100_000, "bad_json", "record must be JSON"),
        ('"text"', "bad_json", "record must be a JSON object, got 'text'"),
        (GOOD | {"image": "gone.jpg"}, "missing_image", "gone.jpg"),
        (GOOD | {"image": 3}, "missing_image", "image must be a file name, got 3"),
        (GOOD | {"image": "a\0b"}, "missing_image", "image must be an existing file"),
        (GOOD | {"image": "x" * 5000}, "missing_image", "image must be an existing file"),
        ({"image": "0.jpg"}, "bad_conversation", "must be a list of pairs of messages, got None"),
        (GOOD | {"conversations": messages("<image>\nwhich ?")}, "bad_conversation", "list of pairs"),
        (
            GOOD | {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
            "bad_conversation",
            "message 1 must be from 'human'",
        ),
        (
            GOOD | {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "b"}]},
            "bad_conversation",
            "message 1 must have a text value",
        ),
        (
            GOOD | {"conversations": messages("which ?", "red")},
            "image_marks",
            "each image (1), in questions",
        ),
        (
            GOOD | {"conversations": messages("<image><image> which ?", "red")},
            "image_marks",
            "once for each image (1), in questions alone, got [2, 0] by message",
        ),
        (
            GOOD | {"conversations": messages("<image> a ?", "b", "<image> c ?", "d")},
            "image_marks",
            "got [1, 0, 1, 0] by message",
        ),
        ({"conversations": messages("<image> which ?", "red")}, "image_marks", "each image (0)"),
        (GOOD | {"conversations": messages("<image> a ?", "b <image>")}, "image_marks", "got [1, 1]"),
        (GOOD | {"image": ["0.jpg", "gone.jpg"]}, "missing_image", "gone.jpg"),
        (GOOD | {"image": ["0.jpg", "1.jpg"]}, "image_marks", "each image (2)"),
        (
            GOOD | {"conversations": messages("<image>\n ", "red")},
            "empty_question",
            "question 1 must not be empty",
        ),
        (
            GOOD | {"conversations": messages("<image> a ?", "b", "c", " ")},
            "empty_answer",
            "answer 2 must not",
        ),
    ],
)
def test_bad_record_names_file_line_rule_and_value(conversations, record, reason, message):
    path = conversations(2)
    line = record if isinstance(record, str) else json.dumps(record)
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(BadSample) as error:
        ConversationDataset(path)[2]
    assert error.value.reason == reason
    assert f"{path} line 3: " in str(error.value) and message in str(error.value)
    assert len(str(error.value)) < 500


def test_several_images_stand_where_their_marks_are(conversations):
    path = conversations(3)
    both = messages("compare <image> with <image>", "red", "and\n<image> ?", "blue")
    last = messages("which ?\n<image>", "red")
    records = [
        {"image": ["0.jpg", "1.jpg", "2.jpg"], "conversations": both},
        {"image": "1.jpg", "conversations": last},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    dataset = ConversationDataset(path)
    assert dataset[0].images == [path.parent / f"{i}.jpg" for i in range(3)]
    assert dataset[0].turns == [("compare <image> with <image>", "red"), ("and\n<image> ?", "blue")]
    # one image comes before the question wherever it is marked
    assert dataset[1].turns == [("<image>which ?", "red")]
    assert dataset.image_sizes(0) == [(30, 40)] * 3 and dataset.num_images(0) == 3
    (path.parent / "1.jpg").write_bytes(b"no picture")
    assert dataset.image_sizes(0) == [(30, 40)] * 2 and dataset.image_sizes(1) == []


@pytest.mark.parametrize("indent", [None, 2])
def test_one_json_array_is_read_like_lines(conversations, indent):
    """LLaVA's own files are one array of 665 thousand records."""
    path = conversations(4)
    lines = ConversationDataset(path)
    whole = path.parent / "whole.json"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records.insert(2, "no object")
    whole.write_text(json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8")
    dataset = ConversationDataset(whole)
    assert len(dataset) == 5
    for number, index in enumerate((0, 1, 3, 4)):
        sample = dataset[index]
        assert (sample.images, sample.turns) == (lines[number].images, lines[number].turns)
        assert sample.origin == f"{whole} record {index + 1}"
    with pytest.raises(BadSample, match="record 3: record must be a JSON object, got 'no object'"):
        dataset[2]
    for damaged in (whole.read_bytes()[:-30], b"[1 2]", b"[1, ]", b'["a', b"[" * 10_000):
        whole.write_bytes(damaged)
        with pytest.raises(ValueError, match="data.path must be JSON.*byte [0-9]+.*, got '.*whole.json'"):
            ConversationDataset(whole)
    whole.write_text("[ ]")
    with pytest.raises(ValueError, match="must hold at least one record"):
        ConversationDataset(whole)


def random_value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.random()
    if depth > 3 or kind < 0.5:
        text = "".join(rng.choice('ab"\\\n\u00e9\u4e2d\U0001f600{}[],: \0') for _ in range(rng.randint(0, 9)))
        number = rng.random() * 10.0 ** rng.randint(-300, 300)
        return rng.choice([None, True, rng.randint(-(10**20), 10**20), number, text])
    if kind < 0.75:
        return [random_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return {f"\u00e9{i}": random_value(rng, depth + 1) for i in range(rng.randint(0, 4))}


def test_records_of_arrays_and_objects_are_found_piece_by_piece(tmp_path, monkeypatch):
    """Windows of a few bytes cut numbers, escapes and characters of several bytes: "1.5e" was read as 1.5."""
    path, rng = tmp_path / "records.json", random.Random(5)
    for _ in range(150):
        values = [random_value(rng) for _ in range(rng.randint(1, 10))]
        named = {f"k\u00e9{i}": value for i, value in enumerate(values)}
        monkeypatch.setattr(records_module, "_CHUNK", rng.randint(1, 40))
        for content, options in (
            (values, {}),
            ({"a": [1], "found": values, "b": {}}, {"key": "found"}),
            (named, {"entries": True}),
        ):
            text = json.dumps(content, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
            path.write_text(text, "utf-8")
            visited = []
            records = JsonRecords(path, visit=visited.append, **options)
            expected = list(named.items()) if content is named else values
            assert [records.load(i) for i in range(len(records))] == expected == visited


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ('[]\n{"a": 1}', {}),
        ("[1] 2", {}),
        ('{"k": [1]} {}', {"key": "k"}),
        ('{"k": 1}\n{}', {"entries": True}),
    ],
)
def test_nothing_may_follow_an_array_or_object(tmp_path, content, options):
    """JSON lines whose first line was an array ended with it: the fuzz lost every other record in silence."""
    path = tmp_path / "records.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="data.path must be one JSON value, or one a line .*byte [0-9]+: '"):
        JsonRecords(path, **options)


def test_a_second_list_of_records_is_not_ignored(tmp_path):
    path = tmp_path / "records.json"
    path.write_text('{"k": [1], "k": [2]}')
    with pytest.raises(ValueError, match="data.path must be a JSON object with one 'k' .byte 16: the second"):
        JsonRecords(path, key="k")


def test_blank_lines_are_no_records(conversations):
    """A blank line, even one at the end of the file, stopped the training at the step that reached it; lines
    are still counted as an editor counts them."""
    path = conversations(2)
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n" + first + b"\r\n \t\n\n" + second + b"\nnot JSON")
    dataset = ConversationDataset(path)
    assert len(dataset) == 3
    assert [dataset[i].turns[0][1] for i in range(2)] == ["red", "green"]
    assert [dataset[i].origin for i in range(2)] == [f"{path} line 2", f"{path} line 5"]
    with pytest.raises(BadSample, match=f"{path} line 6: record must be JSON, got b'not JSON'"):
        dataset[2]
    path.write_bytes(b"\n \r\n")
    with pytest.raises(ValueError, match="data.path must hold at least one record, got none in"):
        ConversationDataset(path)


@pytest.mark.parametrize("behind", ['{"conversations": []}', "[]", "x"])
def test_nothing_may_stand_behind_an_array(tmp_path, behind):
    """Such records were left out without a word."""
    path = tmp_path / "records.json"
    path.write_text('[{"conversations": []}]\n \n')
    assert len(ConversationDataset(path)) == 1
    path.write_text(f'[{{"conversations": []}}]\n{behind}\n')
    rule = r"data.path must be one JSON value, or one a line that .* \(byte 24: '" + re.escape(behind[0])
    with pytest.raises(ValueError, match=rule):
        ConversationDataset(path)


def test_a_byte_order_mark_is_no_part_of_the_file(conversations):
    """A JSON array behind a UTF-8 byte-order mark passed for JSON lines, and the training failed later."""
    path = conversations(2)
    records = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + records)
    dataset = ConversationDataset(path)
    assert [dataset[i].turns[0][1] for i in range(2)] == ["red", "green"]
    path.write_bytes(b"\xef\xbb\xbf\n[" + records)
    with pytest.raises(ValueError, match="data.path must be JSON with ',' or '\\]' behind an element"):
        ConversationDataset(path)
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match="must hold at least one record"):
        ConversationDataset(path)


def test_files_that_are_no_dataset(tmp_path, conversations):
    with pytest.raises(ValueError, match="data.path must be an existing file, got 'nowhere.jsonl'"):
        ConversationDataset("nowhere.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ValueError, match="must hold at least one record"):
        ConversationDataset(empty)
    with pytest.raises(ValueError, match="data.image_root must be an existing folder, got 'nowhere'"):
        ConversationDataset(conversations(1), "nowhere")


def test_datasets_by_name(conversations):
    path = conversations(2)
    dataset = build_dataset(DataConfig(path=str(path), options={"image_root": str(path.parent)}))
    assert len(dataset) == 2
    with pytest.raises(ValueError, match="got 'conversation'; did you mean 'conversations'"):
        build_dataset(DataConfig(name="conversation"))
    with pytest.raises(ValueError, match="data.options must fit dataset 'conversations'"):
        build_dataset(DataConfig(path=str(path), options={"split": "train"}))
    with pytest.raises(ValueError, match="data.options must fit dataset 'conversations'.*'image_root': 3"):
        build_dataset(DataConfig(path=str(path), options={"image_root": 3}))
    with pytest.raises(ValueError, match="data.options must fit dataset 'conversations'.*'path'"):
        build_dataset(DataConfig())


def test_a_dataset_without_its_packages_says_so(monkeypatch):
    """Without the demo's extra, data.name=painted was a traceback that ended in ModuleNotFoundError."""
    monkeypatch.setitem(sys.modules, "train.demo.painted", None)
    with pytest.raises(ValueError, match="data.name must be a dataset whose packages are installed, got"):
        build_dataset(DataConfig(name="painted"))

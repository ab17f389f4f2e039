"""Reading: every sample once an epoch, every record checked, nothing lost silently."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import DataConfig
from train.data import BadSample, ConversationDataset, build_dataset, sample_index

from .tiny_stage import messages


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 300), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**12))
def test_an_epoch_reads_every_sample_once(length, seed, epoch):
    positions = range(epoch * length, (epoch + 1) * length)
    assert sorted(sample_index(p, length, seed=seed) for p in positions) == list(range(length))


def test_order_depends_on_seed_and_epoch_and_is_spread():
    length = 1000
    first = [sample_index(p, length, seed=0) for p in range(length)]
    assert first == [sample_index(p, length, seed=0) for p in range(length)]
    assert first != [sample_index(p, length, seed=1) for p in range(length)]
    assert first != [sample_index(length + p, length, seed=0) for p in range(length)]
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
    assert sample.image == path.parent / "1.jpg"
    assert sample.turns == [("which colour ?", "green")]
    assert sample.origin == f"{path} line 2"
    text_only = dataset[3]
    assert text_only.image is None
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
        (GOOD | {"conversations": messages("which ?", "red")}, "image_marks", "once, in the first question"),
        (
            GOOD | {"conversations": messages("<image><image> which ?", "red")},
            "image_marks",
            "once, in the first question, got [2, 0] by message",
        ),
        (
            GOOD | {"conversations": messages("<image> a ?", "b", "<image> c ?", "d")},
            "image_marks",
            "got [1, 0, 1, 0] by message",
        ),
        ({"conversations": messages("<image> which ?", "red")}, "image_marks", "nowhere without an image"),
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


def test_a_byte_order_mark_is_no_part_of_the_file(conversations):
    """A JSON array behind a UTF-8 byte-order mark passed for JSON lines, and the training failed later."""
    path = conversations(2)
    records = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + records)
    dataset = ConversationDataset(path)
    assert [dataset[i].turns[0][1] for i in range(2)] == ["red", "green"]
    path.write_bytes(b"\xef\xbb\xbf\n[" + records)
    with pytest.raises(ValueError, match="one JSON record a line, got a JSON array"):
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
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps([GOOD]))
    with pytest.raises(ValueError, match="one JSON record a line, got a JSON array"):
        ConversationDataset(whole)
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

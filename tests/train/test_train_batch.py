"""Rows and batches: what the model is asked, which tokens it is judged on, and who reads what."""

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model import IGNORE_INDEX, ImageProcessor
from train.batch import VICUNA_SYSTEM, RowEncoder, StepReader, collate, prefetched
from train.config import DataConfig
from train.data import BadSample, Sample

from .tiny_stage import WORDS

PICTURE = np.full((28, 28, 3), 200, np.uint8)


@pytest.fixture
def encoder(tokenizer):
    def build(
        prompt: str = "plain", sequence_length: int = 64, tokenizer=tokenizer, mode: str = "single"
    ) -> RowEncoder:
        return RowEncoder(
            tokenizer,
            ImageProcessor(window_size=28, mode=mode),
            prompt=prompt,
            sequence_length=sequence_length,
            image_token_id=2,
            end_token_id=3,
        )

    return build


def text_of(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def answers_of(row) -> str:
    return text_of([label for label in row.labels if label != IGNORE_INDEX])


def test_plain_prompt(encoder):
    row = encoder()(Sample([PICTURE], [("<image>which colour ?", "red"), ("how bright ?", "dark red")]))
    assert text_of(row.input_ids) == ("<s> <image> which colour ? red <end> how bright ? dark red <end>")
    assert answers_of(row) == "red <end> dark red <end>"
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    text_only = encoder()(Sample([], [("which colour ?", "red")]))
    assert text_of(text_only.input_ids) == "<s> which colour ? red <end>"
    assert text_only.images == []
    caption = encoder()(Sample([PICTURE], [("<image>", "light red")]))
    assert text_of(caption.input_ids) == "<s> <image> light red <end>"
    assert answers_of(caption) == "light red <end>"


def test_images_stand_at_their_marks(encoder):
    turns = [("which <image> \n<image> colour ?", "red"), ("<image> ?", "dark red")]
    row = encoder()(Sample([PICTURE] * 3, turns))
    assert text_of(row.input_ids) == ("<s> which <image> <image> colour ? red <end> <image> ? dark red <end>")
    assert answers_of(row) == "red <end> dark red <end>" and len(row.images) == 3
    words = text_of(encoder("vicuna_v1")(Sample([PICTURE] * 3, turns)).input_ids)
    assert words.endswith(
        "USER: which <image> <image> colour ? ASSISTANT: red <end> USER: <image> ? ASSISTANT: dark red <end>"
    )
    document = Sample([PICTURE] * 3, [("", "light"), ("<image>", "red"), ("<image><image>", "blue")], "plain")
    row = encoder("vicuna_v1")(document)
    assert text_of(row.input_ids) == "<s> light <end> <image> red <end> <image> <image> blue <end>"
    assert answers_of(row) == "light <end> red <end> blue <end>"


@pytest.mark.parametrize("image_seq_length", [None, 2])
def test_images_behind_the_cut_are_dropped_with_their_marks(tokenizer, image_seq_length):
    """The model refuses a row with more images than marks, or with a part of an image's marks."""
    tall = np.full((56, 28, 3), 90, np.uint8)
    sample = Sample(
        [tall, PICTURE, "gone.jpg"], [("<image>", "red"), ("<image>", "blue"), ("<image>", "dark")]
    )
    windows = [3, 1, 1]
    full = 1 + sum((n * (image_seq_length or 0) or 1) + 2 for n in windows)
    third = full - 2 - (image_seq_length or 1)
    for length in range(2, full):
        encoder = RowEncoder(
            tokenizer,
            ImageProcessor(window_size=28, mode="dynamic"),
            prompt="plain",
            sequence_length=length,
            image_token_id=2,
            end_token_id=3,
            image_seq_length=image_seq_length,
        )
        try:
            row = encoder(sample)
        except BadSample as error:
            # the third is read once there is room for its mark
            assert error.reason == ("unreadable_image" if length > third else "no_answer_left"), length
            continue
        assert row.truncated and len(row.input_ids) <= length
        marks = sum(n * (image_seq_length or 0) or 1 for n in windows[: len(row.images)])
        assert row.input_ids.count(2) == marks
        assert [len(image.pixel_values) for image in row.images] == windows[: len(row.images)]
        batch = collate([row], 0)
        assert batch["images_per_sample"].tolist() == [len(row.images)]
        assert batch["windows_per_image"].tolist() == windows[: len(row.images)]


def test_vicuna_prompt(encoder):
    row = encoder("vicuna_v1")(
        Sample([PICTURE], [("<image>which colour ?", "red"), ("how bright ?", "dark")])
    )
    words = text_of(row.input_ids)
    assert words.endswith(
        "USER: <image> which colour ? ASSISTANT: red <end> USER: how bright ? ASSISTANT: dark <end>"
    )
    assert words.startswith("<s> " + "<unk> " * len(VICUNA_SYSTEM.split()) + "USER:")
    assert answers_of(row) == "red <end> dark <end>"


def test_vicuna_characters(encoder):
    """Byte tokens show the exact text: `system USER: <image>question ASSISTANT: answer<end>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "<image>", "<end>", *alphabet])}
    letters = Tokenizer(models.BPE(vocab, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, additional_special_tokens=["<image>", "<end>"]
    )
    row = encoder("vicuna_v1", 512, tokenizer)(
        Sample([PICTURE], [("<image>Which?", "Red."), ("How?", "Söft.")])
    )
    assert tokenizer.decode(row.input_ids) == (
        f"{VICUNA_SYSTEM} USER: <image>Which? ASSISTANT: Red.<end>USER: How? ASSISTANT: Söft.<end>"
    )
    assert (
        tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX]) == " Red.<end> Söft.<end>"
    )


def test_truncation_never_leaves_a_row_without_labels(encoder):
    sample = Sample(
        [PICTURE], [("<image>which colour ?", "red"), ("how bright ?", "dark")], origin="f.jsonl line 9"
    )
    lengths = {}
    for length in range(2, 14):
        try:
            row = encoder(sequence_length=length)(sample)
        except BadSample as error:
            assert error.reason == "no_answer_left"
            assert "f.jsonl line 9: " in str(error) and str(length) in str(error)
        else:
            assert len(row.input_ids) == len(row.labels) == min(length, 12)
            lengths[length] = row.truncated
    assert lengths == {length: length < 12 for length in range(6, 14)}


@pytest.mark.parametrize(
    ("sample", "reason", "message"),
    [
        (Sample([PICTURE], [("<image>which ?", " ")]), "empty_answer", "answer 1 must not be empty"),
        (
            Sample([PICTURE], [("which <image> ? <image>", "red")]),
            "image_marks",
            "as there are images, 1, got 2",
        ),
        (Sample([PICTURE], [("which ?", "red")]), "image_marks", "as there are images, 1, got 0"),
        (Sample([], [("which ?", "red <image>")]), "reserved_token", "text must not contain '<image>'"),
        (
            Sample([PICTURE], [("<image>which ?", "red <end> blue")]),
            "reserved_token",
            "text must not contain '<end>'",
        ),
        (Sample([], []), "no_answer_left", "prompt must leave room for an answer token"),
        (Sample([], [("which ?", "\ud800")]), "unreadable_text", "readable by the tokenizer"),
        (Sample([PICTURE[:0]], [("<image>which ?", "red")]), "unreadable_image", "image must"),
        (Sample([PICTURE * np.float32("nan")], [("<image>which ?", "red")]), "unreadable_image", "finite"),
        (Sample(["gone.jpg"], [("<image>which ?", "red")]), "unreadable_image", "gone.jpg"),
    ],
)
def test_bad_samples(encoder, sample, reason, message):
    with pytest.raises(BadSample) as error:
        encoder()(dataclasses.replace(sample, origin="here"))
    assert error.value.reason == reason
    assert str(error.value).startswith("here: ") and message in str(error.value)


def test_corrupt_jpeg_names_file_and_line(encoder, conversations):
    from train.data import ConversationDataset

    path = conversations(3)
    picture = path.parent / "1.jpg"
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(BadSample) as error:
        encoder()(ConversationDataset(path)[1])
    assert error.value.reason == "unreadable_image"
    assert f"{path} line 2: " in str(error.value) and "1.jpg" in str(error.value)


def test_slow_tokenizer_is_refused(encoder):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer must be a fast one"):
        encoder(tokenizer=Slow())


def test_collate_packs_windows(encoder):
    dynamic = encoder(mode="dynamic")
    samples = [
        Sample([np.full((56, 28, 3), 90, np.uint8)], [("<image>which ?", "red")]),
        Sample([], [("which colour ?", "dark red")]),
        Sample([PICTURE], [("<image>?", "blue")]),
    ]
    rows = [dynamic(sample) for sample in samples]
    batch = collate(rows, pad_token_id=0)
    assert batch["images_per_sample"].tolist() == [1, 0, 1]
    assert batch["windows_per_image"].tolist() == [3, 1]
    assert batch["pixel_values"].shape == (4, 3, 28, 28)
    assert batch["window_positions"].tolist() == [[-1, -1], [0, 0], [1, 0], [-1, -1]]
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        assert batch["input_ids"][i].tolist() == row.input_ids + [0] * (7 - length)
        assert batch["labels"][i].tolist() == row.labels + [IGNORE_INDEX] * (7 - length)
        assert batch["attention_mask"][i].tolist() == [True] * length + [False] * (7 - length)
    assert torch.equal(batch["pixel_values"][:3], rows[0].images[0].pixel_values)


def test_collate_packs_several_images_a_row(encoder):
    dynamic = encoder(mode="dynamic")
    tall = np.full((56, 28, 3), 90, np.uint8)
    rows = [
        dynamic(Sample([PICTURE, tall], [("<image><image> which ?", "red")])),
        dynamic(Sample([], [("?", "red")])),
        dynamic(Sample([tall], [("<image>?", "red")])),
    ]
    batch = collate(rows, pad_token_id=0)
    assert batch["images_per_sample"].tolist() == [2, 0, 1]
    assert batch["windows_per_image"].tolist() == [1, 3, 3]
    assert batch["pixel_values"].shape == (7, 3, 28, 28)
    assert torch.equal(batch["pixel_values"][1:4], rows[0].images[1].pixel_values)


def test_empty_batch_is_one_row_without_labels():
    batch = collate([], pad_token_id=5)
    assert batch["input_ids"].tolist() == [[5, 5]]
    assert (batch["labels"] == IGNORE_INDEX).all() and batch["attention_mask"].all()
    assert "pixel_values" not in batch and batch["images_per_sample"].tolist() == [0]


class Numbers:
    """Sample i answers with i words, so that a batch shows what it was made of; every 5th sample is bad."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Sample:
        if index % 5 == 0:
            raise BadSample("fifth", f"sample {index} must not be a fifth")
        return Sample([], [("?", "red " * index)])


def reader_for(encoder, rank: int, world_size: int, micro: int, **data: object) -> StepReader:
    config = DataConfig(prompt="plain", sequence_length=64, **data)
    return StepReader(
        Numbers(),
        encoder(),
        config,
        seed=4,
        global_batch_size=12,
        micro_batch_size=micro,
        pad_token_id=0,
        rank=rank,
        world_size=world_size,
    )


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 3), (2, 6), (2, 2), (4, 1)])
def test_ranks_and_accumulation_share_the_same_global_batch(encoder, world_size, micro):
    def answers(world_size: int, micro: int, step: int) -> list[int]:
        lengths = []
        for rank in range(world_size):
            data = reader_for(encoder, rank, world_size, micro, on_bad_sample="skip")(step)
            assert len(data.micro_batches) == 12 // world_size // micro
            counts = [(batch["labels"] != IGNORE_INDEX).sum(1).tolist() for batch in data.micro_batches]
            assert data.num_answer_tokens == sum(map(sum, counts))
            assert data.num_samples + len(data.skipped) == 12 // world_size
            lengths += [count - 1 for micro_batch in counts for count in micro_batch if count]
        return lengths

    for step in range(5):  # two epochs
        assert answers(world_size, micro, step) == answers(1, 12, step)


def test_bad_samples_stop_or_are_counted(encoder):
    with pytest.raises(BadSample, match="must not be a fifth"):
        for step in range(3):
            reader_for(encoder, 0, 1, 12, on_bad_sample="error")(step)
    skipped = [reader_for(encoder, 0, 1, 12, on_bad_sample="skip")(step) for step in range(5)]
    assert sum(data.skipped_by_reason["fifth"] for data in skipped) == 12  # 6 of 30 samples, two epochs
    assert ("fifth", "sample 5 must not be a fifth") in [entry for data in skipped for entry in data.skipped]


def test_an_error_inside_a_dataset_names_it_and_its_options(encoder):
    """data.options.canvases=3 was a bare TypeError out of the dataset's drawing."""

    class Broken(Numbers):
        def __getitem__(self, index: int) -> Sample:
            return Sample([], [("?", "red " * len(index))])

    config = DataConfig(prompt="plain", shuffle=False, options={"canvases": 3})
    sizes = dict(global_batch_size=2, micro_batch_size=2, pad_token_id=0, rank=0, world_size=1)
    reader = StepReader(Broken(), encoder(), config, seed=0, **sizes)
    with pytest.raises(ValueError, match="dataset Broken must give sample 4, got TypeError: .*'canvases': 3"):
        reader(2)


def test_a_step_counts_what_it_holds(encoder):
    class Documents(Numbers):
        def __getitem__(self, index: int) -> Sample:
            return Sample([PICTURE] * index, [("<image>" * index + "?", "red blue")])

    config = DataConfig(prompt="plain", sequence_length=64, shuffle=False)
    sizes = dict(global_batch_size=4, micro_batch_size=2, pad_token_id=0)
    ranks = [
        StepReader(Documents(), encoder(), config, seed=0, rank=rank, world_size=2, **sizes)
        for rank in (0, 1)
    ]
    first, second = (reader(0) for reader in ranks)
    assert (first.num_images, second.num_images) == (0 + 1, 2 + 3) == (first.num_windows, second.num_windows)
    assert (first.num_tokens, second.num_tokens) == (2 * 5 + 1, 2 * 5 + 5)
    assert first.plan_checksum == second.plan_checksum != ranks[0](1).plan_checksum


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_order_and_exceptions(workers):
    threads = set()

    def read(step: int) -> int:
        threads.add(threading.get_ident())
        time.sleep(0.002 * (step % 3))
        if step == 7:
            raise BadSample("seven", "step must not be 7")
        return step

    got = []
    with pytest.raises(BadSample, match="must not be 7"):
        for value in prefetched(read, range(20), workers):
            got.append(value)
    assert got == list(range(7))
    assert (threading.get_ident() in threads) == (workers == 0)


def test_closing_prefetch_does_not_wait_for_a_slow_step():
    """A rank that fails must say so at once, not after the steps that its threads still read."""
    release, started = threading.Event(), threading.Event()

    def read(step: int) -> int:
        if step:
            started.set()
            release.wait(20)
        return step

    steps = prefetched(read, range(10), 1)
    try:
        assert next(steps) == 0
        assert started.wait(5)
        begun = time.perf_counter()
        steps.close()
        assert time.perf_counter() - begun < 2
    finally:
        release.set()

"""Arguments of `forward` and `generate`: what cannot be meant is a ValueError before any work."""

import pytest
import torch

from model import IGNORE_INDEX, InfiMMHD, preset
from tests.model.conftest import IMAGE, batch_of

ROWS = [[1, 10, IMAGE, 11, 12, IMAGE, 13, 14], [IMAGE, 20, 21, 22, 23, 24, 25, 26]]
WINDOWS = [[2, 1], [3]]


def batch() -> dict:
    return batch_of(ROWS, WINDOWS)


def with_value(name: str, value: float) -> dict:
    tensor = batch()[name].clone()
    tensor.view(-1)[-1] = value
    return {name: tensor}


def pixels(**changes) -> dict:
    return {"pixel_values": batch()["pixel_values"].to(**changes)}


VISION_AND_TEXT = [
    (with_value("pixel_values", float("nan")), "pixel_values must be finite, got '1 NaN or infinite"),
    (with_value("pixel_values", float("-inf")), "pixel_values must be finite, got '1 NaN or infinite"),
    (pixels(dtype=torch.uint8), "pixel_values must be a floating tensor .*, got 'torch.uint8"),
    (dict(pixel_values=[1.0]), r"pixel_values must be a floating tensor .*, got \[1.0\]"),
    (dict(window_positions=torch.zeros(6, 2)), "window_positions must be an integer tensor .*float32"),
    (dict(window_positions=[[0, 0]] * 6), r"window_positions must be an integer tensor .*, got \[\["),
    (dict(windows_per_image=[2, 1, 3.0]), r"windows_per_image must be .* integers .*, got \[2, 1, 3.0\]"),
    (dict(windows_per_image=torch.tensor([2.0, 1.0, 3.9])), "windows_per_image must be .* integers"),
    (dict(windows_per_image=[2, True, 3]), "windows_per_image must be .* integers"),
    (dict(images_per_sample=[2, -1]), "images_per_sample must be .* integers of at least 0"),
    (dict(images_per_sample=torch.tensor(3)), "images_per_sample must be .* 1-D tensor .*, got 3"),
    (dict(input_ids=ROWS), r"input_ids must be an int64 or int32 tensor, got \[\["),
    (dict(input_ids=torch.zeros(2, 8)), "input_ids must be an int64 or int32 tensor, got 'torch.float32"),
    (dict(input_ids=torch.zeros(2, 0, dtype=torch.long)), r"input_ids must have shape .*, got \[2, 0\]"),
    (dict(input_ids=torch.ones(2, 513, dtype=torch.long)), "input_ids must be at most .* 512 tokens long"),
    (with_value("input_ids", 64), "input_ids must lie in 0..63, got 64"),
    (with_value("input_ids", -1), "input_ids must lie in 0..63, got -1"),
    (dict(attention_mask=[[True] * 8] * 2), "attention_mask must be a bool or integer tensor"),
    (dict(attention_mask=torch.ones(2, 8)), "attention_mask must be a bool or integer tensor"),
    (dict(attention_mask=torch.full((2, 8), 2)), "attention_mask must be 0 or 1, got 2"),
    (
        dict(attention_mask=torch.ones(2, 9, dtype=torch.bool)),
        r"attention_mask must have the shape of input_ids \[2, 8\], got \[2, 9\]",
    ),
]


@pytest.mark.parametrize(("change", "message"), VISION_AND_TEXT)
@pytest.mark.parametrize("method", ["forward", "generate"])
def test_arguments_that_cannot_be_meant_are_named(model, method, change, message):
    """NaN pixels once became NaN logits, 3.9 windows three of them, a long mask a different answer, and an id
    beyond the vocabulary an IndexError (on a GPU, the end of the process)."""
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(**(batch() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=batch()["input_ids"].int()), "labels must be an int64 tensor, got 'torch.int32"),
        (dict(labels=torch.full((2, 8), 64)), "labels must lie in 0..63 or be -100, got 64"),
        (dict(labels=torch.full((2, 8), -1)), "labels must lie in 0..63 or be -100, got -1"),
        (dict(num_answer_tokens=0), "num_answer_tokens must be a positive int, got 0"),
        (dict(num_answer_tokens=True), "num_answer_tokens must be a positive int, got True"),
        (dict(num_answer_tokens=torch.tensor(0)), "num_answer_tokens must be one positive number"),
        (dict(num_answer_tokens=torch.tensor([1, 2])), "num_answer_tokens must be one positive number"),
    ],
)
def test_what_the_loss_is_made_of_is_checked(model, change, message):
    """Dividing by no answer tokens gave an infinite loss."""
    labels = torch.full((2, 8), IGNORE_INDEX)
    labels[0, 7] = 5
    with pytest.raises(ValueError, match=message):
        model(**(batch() | dict(labels=labels) | change))


def test_generation_has_to_fit_behind_its_prompt(model):
    """Positions beyond max_position_embeddings are ones the language model has never seen."""
    ids = torch.ones(1, 500, dtype=torch.long)
    assert model.generate(ids, max_new_tokens=1).shape == (1, 501)
    with pytest.raises(ValueError, match=r"max_new_tokens must be at most .* \(12\), got 13"):
        model.generate(ids, max_new_tokens=13)
    with pytest.raises(ValueError, match="max_new_tokens must be a positive int, got True"):
        model.generate(ids, max_new_tokens=True)


def test_the_same_numbers_in_other_types_give_the_same_result(model):
    """Integer masks, int32 ids, lists, arrays and a tensor of the answer count are all legal."""
    plain = batch()
    plain["attention_mask"][1, 6:] = False
    labels = plain["input_ids"]
    expected = model(**plain, labels=labels, num_answer_tokens=5).loss
    other = plain | dict(
        input_ids=plain["input_ids"].int(),
        attention_mask=plain["attention_mask"].long(),
        windows_per_image=plain["windows_per_image"].numpy(),
        images_per_sample=plain["images_per_sample"].tolist(),
    )
    assert torch.equal(model(**other, labels=labels, num_answer_tokens=torch.tensor(5.0)).loss, expected)


def test_shapes_can_be_planned_on_the_meta_device():
    """The checks read no number where there is none."""
    with torch.device("meta"):
        vision = InfiMMHD(preset("tiny")).vision
        assert vision(torch.zeros(2, 3, 28, 28)).shape == (2, 17, 112)


def test_large_half_precision_pixels_are_finite(model):
    """Their sum overflows float16; the values do not."""
    model = model.half()
    tall = batch() | dict(pixel_values=torch.full((6, 3, 28, 28), 60.0, dtype=torch.float16))
    assert model(**tall).logits.shape == (2, 8, 64)

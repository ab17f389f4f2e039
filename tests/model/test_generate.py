"""Greedy generation with a KV cache against recomputing the whole sequence for every token."""

import pytest
import torch

from tests.model.conftest import END, IMAGE, batch_of

PROMPTS = [[1, 10, IMAGE, 11, 12], [1, IMAGE, IMAGE, 20], [1, 30, 31], [IMAGE]]
WINDOWS = [[2], [1, 3], [], [1]]


def left_padded(prompts, windows):
    batch = batch_of(prompts, windows)
    longest = max(len(p) for p in prompts)
    batch["input_ids"] = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    batch["attention_mask"] = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])
    return batch


def recomputed(model, prompt, windows, pixel_values, window_positions, steps):
    ids, new = list(prompt), []
    for _ in range(steps):
        logits = model(
            input_ids=torch.tensor([ids]),
            pixel_values=pixel_values if windows else None,
            window_positions=window_positions if windows else None,
            windows_per_image=windows,
            images_per_sample=[len(windows)],
        ).logits[0, -1]
        logits[IMAGE] = float("-inf")
        new.append(int(logits.argmax()))
        ids.append(new[-1])
        if new[-1] == END:
            break
    return new


def test_cached_batched_generation_equals_recomputing_everything(model):
    """Different numbers of images and windows in one batch; a new token sees its sample's last image."""
    model = model.double()
    batch = left_padded(PROMPTS, WINDOWS)
    generated = model.generate(**batch, max_new_tokens=7).tolist()
    offset = 0
    for row, prompt, windows in zip(generated, PROMPTS, WINDOWS, strict=True):
        part = slice(offset, offset + sum(windows))
        offset += sum(windows)
        expected = recomputed(
            model, prompt, windows, batch["pixel_values"][part].double(), batch["window_positions"][part], 7
        )
        assert row[: len(expected)] == expected


def test_generation_stops_at_the_end_token_and_pads(model):
    with torch.no_grad():
        model.language.lm_head.weight.zero_()
        model.language.lm_head.weight[END] = 1.0  # the sign of the hidden sum decides between END and token 0
        model.language.lm_head.weight[7] = -1.0
    generated = model.generate(**left_padded(PROMPTS, WINDOWS), max_new_tokens=12)
    for row in generated.tolist():
        if END in row:
            assert set(row[row.index(END) + 1 :]) <= {0}
    assert generated.shape[1] <= 12


def test_the_image_token_is_never_generated(model):
    with torch.no_grad():
        model.language.lm_head.weight.copy_(model.language.lm_head.weight.abs() * 0.01)
        model.language.lm_head.weight[IMAGE] *= 1e3
        model.language.model.norm.weight.abs_()
    assert IMAGE not in model.generate(**left_padded(PROMPTS, WINDOWS), max_new_tokens=5).flatten().tolist()


def test_vision_is_encoded_once(model):
    calls = []
    model.vision.register_forward_hook(lambda *_: calls.append("vision"))
    model.vision_keys_values.register_forward_hook(lambda *_: calls.append("kv"))
    model.generate(**left_padded(PROMPTS, WINDOWS), max_new_tokens=6)
    assert calls == ["vision", "kv"]


def test_bad_arguments_are_named(model):
    batch = left_padded(PROMPTS, WINDOWS)
    with pytest.raises(ValueError, match="max_new_tokens must be a positive int, got 0"):
        model.generate(**batch, max_new_tokens=0)
    with pytest.raises(ValueError, match="attention_mask must be True in its last column"):
        model.generate(**(batch | dict(attention_mask=batch["attention_mask"].flip(1))))

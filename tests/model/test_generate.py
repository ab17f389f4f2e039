"""Generation through transformers' `generate`, against recomputing the whole sequence for every token."""

import itertools

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from tests.model.conftest import END, IMAGE, batch_of, open_model

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
    longest = batch["input_ids"].shape[1]
    generated = model.generate(**batch, max_new_tokens=7)[:, longest:].tolist()
    offset = 0
    for row, prompt, windows in zip(generated, PROMPTS, WINDOWS, strict=True):
        part = slice(offset, offset + sum(windows))
        offset += sum(windows)
        expected = recomputed(
            model, prompt, windows, batch["pixel_values"][part].double(), batch["window_positions"][part], 7
        )
        assert row[: len(expected)] == expected


def sample(batch, index):
    """One sample of a batch, without its padding."""
    images = batch["images_per_sample"].tolist()
    windows = batch["windows_per_image"].tolist()
    first = sum(images[:index])
    mine = windows[first : first + images[index]]
    start = sum(windows[:first])
    part = slice(start, start + sum(mine))
    row = batch["input_ids"][index][batch["attention_mask"][index]]
    return dict(
        input_ids=row[None],
        pixel_values=batch["pixel_values"][part] if mine else None,
        window_positions=batch["window_positions"][part] if mine else None,
        windows_per_image=mine,
        images_per_sample=[len(mine)],
    )


@pytest.mark.parametrize("only_immediate", [True, False])
@pytest.mark.parametrize("options", [dict(), dict(num_beams=3), dict(num_beams=2, num_return_sequences=2)])
def test_a_batch_is_generated_as_each_sample_alone(options, only_immediate):
    """Greedy and beam search; beams and returned sequences keep the images of their sample."""
    model = open_model(only_attend_immediate_media=only_immediate).double()
    batch = left_padded(PROMPTS, WINDOWS)
    longest = batch["input_ids"].shape[1]
    together = model.generate(**batch, max_new_tokens=6, **options)[:, longest:]
    copies = options.get("num_return_sequences", 1)
    for index, prompt in enumerate(PROMPTS):
        alone = model.generate(**sample(batch, index), max_new_tokens=6, **options)[:, len(prompt) :]
        rows = together[index * copies : (index + 1) * copies, : alone.shape[1]]
        assert torch.equal(rows, alone)
        assert not together[index * copies : (index + 1) * copies, alone.shape[1] :].any()


@torch.no_grad()
def test_beam_search_finds_the_likeliest_continuation(model):
    """With as many beams as tokens, two steps are an exhaustive search over all pairs."""
    model = model.double()
    batch = left_padded([[1, 10, IMAGE, 11]], [[2]])
    prompt = batch["input_ids"].shape[1]
    found = model.generate(**batch, max_new_tokens=2, num_beams=64, length_penalty=0.0)[0, prompt:].tolist()
    allowed = [t for t in range(64) if t not in (IMAGE, END)]
    first = model(**batch).logits[0, -1].log_softmax(-1)
    first[IMAGE] = -torch.inf
    best = -torch.inf, None
    for token in allowed:
        longer = left_padded([[1, 10, IMAGE, 11, token]], [[2]])
        second = model(**longer).logits[0, -1].log_softmax(-1)
        second[IMAGE] = -torch.inf
        score = first[token] + second.max()
        best = max(best, (float(score), [token, int(second.argmax())]))
    if float(first[END]) > best[0]:
        best = float(first[END]), [END]
    assert found[: len(best[1])] == best[1]


@torch.no_grad()
def test_sampling_is_reproducible_and_follows_the_logits(model):
    batch = left_padded([[1, 10, IMAGE, 11]], [[2]])
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(
            model.generate(**batch, max_new_tokens=1, do_sample=True, num_return_sequences=400)[:, -1]
        )
    assert torch.equal(*drawn)
    probabilities = model(**batch).logits[0, -1].double()
    probabilities[IMAGE] = -torch.inf
    expected = probabilities.softmax(-1)
    frequency = torch.bincount(drawn[0], minlength=64) / 400
    assert (frequency - expected).abs().max() < 0.1 and len(drawn[0].unique()) > 3


def test_a_streamer_gets_every_token_as_it_is_made(model):
    class Recorder(BaseStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Recorder()
    batch = left_padded([[1, 10, IMAGE, 11]], [[2]])
    tokens = model.generate(**batch, max_new_tokens=5, streamer=streamer)[0].tolist()
    assert streamer.ended and streamer.pieces[0] == tokens[:4]
    assert list(itertools.chain(*streamer.pieces[1:])) == tokens[4:]


@pytest.mark.parametrize("new_tokens", [1, 3, 9])
@pytest.mark.parametrize("only_immediate", [True, False])
def test_cached_logits_equal_those_without_a_cache(only_immediate, new_tokens):
    """Up to eight tokens run in the decode op, more in the attention of prompts."""
    model = open_model(only_attend_immediate_media=only_immediate)
    batch = batch_of([[1, IMAGE, 11, IMAGE, 12], [1, 20, IMAGE, 21, IMAGE]], [[2, 1], [1, 3]])
    more = torch.randint(4, 64, (2, new_tokens), generator=torch.Generator().manual_seed(0))
    whole = batch | dict(input_ids=torch.cat([batch["input_ids"], more], 1), attention_mask=None)
    with torch.no_grad():
        start = model(**batch, use_cache=True)
        cached = model(more, past_key_values=start.past_key_values, images=start.images).logits
        expected = model(**whole).logits
    torch.testing.assert_close(cached, expected[:, -new_tokens:], rtol=1e-5, atol=1e-5)
    assert torch.equal(start.logits, model(**batch).logits)
    kept = model(**batch, logits_to_keep=2).logits
    torch.testing.assert_close(kept, start.logits[:, -2:])


def test_images_are_encoded_once_for_several_questions(model):
    batch = left_padded([[1, 10, IMAGE, 11]], [[2]])
    expected = model.generate(**batch, max_new_tokens=4)
    views = {name: batch.pop(name) for name in ("pixel_values", "window_positions", "windows_per_image")}
    images = model.encode_images(**views, images_per_sample=batch.pop("images_per_sample"))
    model.vision.register_forward_hook(lambda *_: pytest.fail("the vision encoder ran again"))
    assert torch.equal(model.generate(**batch, images=images, max_new_tokens=4), expected)


def test_a_cache_needs_the_images_it_was_made_with(model):
    """Without them the text behind the prompt would see no image, and nobody would notice."""
    batch = batch_of([[1, IMAGE, 11]], [[2]])
    start = model(**batch, use_cache=True)
    token = torch.tensor([[5]])
    with pytest.raises(
        ValueError, match="images must be the `images` of the output that gave past_key_values"
    ):
        model(token, past_key_values=start.past_key_values)
    with pytest.raises(ValueError, match="input_ids must hold no <image> behind past_key_values"):
        model(torch.tensor([[IMAGE]]), past_key_values=start.past_key_values, images=start.images)
    with pytest.raises(ValueError, match=r"images.images_per_sample must have one entry per sample \(2\)"):
        model(token.repeat(2, 1), past_key_values=DynamicCache(), images=start.images)


def test_generation_stops_at_the_end_token_and_pads(model):
    with torch.no_grad():
        model.language.lm_head.weight.zero_()
        model.language.lm_head.weight[END] = 1.0  # the sign of the hidden sum decides between END and token 0
        model.language.lm_head.weight[7] = -1.0
    batch = left_padded(PROMPTS, WINDOWS)
    generated = model.generate(**batch, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
    for row in generated.tolist():
        if END in row:
            assert set(row[row.index(END) + 1 :]) <= {0}
    assert generated.shape[1] <= 12


def test_the_image_token_is_never_generated(model):
    with torch.no_grad():
        model.language.lm_head.weight.copy_(model.language.lm_head.weight.abs() * 0.01)
        model.language.lm_head.weight[IMAGE] *= 1e3
        model.language.model.norm.weight.abs_()
    batch = left_padded(PROMPTS, WINDOWS)
    generated = model.generate(**batch, max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    assert IMAGE not in generated.flatten().tolist()


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
    with pytest.raises(ValueError, match="input_ids must be given once, got 'both or none'"):
        model.generate(batch["input_ids"], **batch)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(**batch, generation_config=GenerationConfig(max_new_tokens=600))
    with pytest.raises(ValueError, match="max_new_tokns"):
        model.generate(**batch, max_new_tokns=3)

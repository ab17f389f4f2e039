"""InfiMM-HD as a whole: who sees which image, closed gates, the loss, saving, and no state between calls."""

import copy

import pytest
import torch
import torch.nn.functional as F

from model import InfiMMHD, preset
from model.infimm_hd import PARTS
from tests.model.conftest import IMAGE, batch_of, open_model

ROWS = [[1, 10, IMAGE, 11, 12, IMAGE, 13, 14], [IMAGE, 20, 21], [1, 30, 31, 32]]
WINDOWS = [[2, 1], [3], []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_closed_gates_the_logits_are_the_bare_llms_bit_for_bit(dtype):
    torch.manual_seed(0)
    model = InfiMMHD(preset("tiny")).to(dtype).eval()
    batch = batch_of(ROWS, WINDOWS)
    logits = model(**batch).logits
    bare = model.language(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    assert torch.equal(logits, bare)


def test_autocast_with_closed_gates_keeps_the_bare_llms_logits_bit_for_bit():
    """A gated block that rounds the float32 residual stream changes the language model before it learns."""
    torch.manual_seed(0)
    model = InfiMMHD(preset("tiny")).eval()
    batch = batch_of(ROWS, WINDOWS)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch).logits
        bare = model.language(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    assert torch.equal(logits, bare)


def test_open_gates_change_exactly_the_tokens_behind_an_image(model):
    """Text before any image, and samples without one, must stay the bare LLM's bit for bit."""
    batch = batch_of(ROWS, WINDOWS)
    logits = model(**batch).logits
    bare = model.language(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    same = (logits == bare).all(-1)
    assert same[0].tolist() == [True, True] + [False] * 6
    assert not same[1].any()
    assert same[2].all()


def test_a_token_sees_the_image_before_it_and_no_other():
    """One gated block before the last layer, so that no earlier token can carry an image over."""
    model = open_model(interval=4)
    row = [1, IMAGE, 11, IMAGE, 12, 13]
    batch = batch_of([row], [[1, 2]])
    for image, windows in ((0, slice(0, 1)), (1, slice(1, 3))):
        changed = dict(batch, pixel_values=batch["pixel_values"].clone())
        changed["pixel_values"][windows] += 1.0
        before, after = (_block_output(model, arguments) for arguments in (batch, changed))
        differs = (before != after).any(-1)[0].tolist()
        assert differs == (
            [False, True, True, False, False, False] if image == 0 else [False] * 3 + [True] * 3
        )


@pytest.mark.parametrize("ffn_before_image", [False, True])
def test_text_before_the_first_image_passes_unchanged_or_through_the_feed_forward(ffn_before_image):
    """The released stage-1 code switches the feed-forward branch by sample, not by token."""
    model = open_model(interval=4, ffn_before_image=ffn_before_image)
    batch = batch_of([[1, 9, IMAGE, 11], [1, 5, 6, 7]], [[1], []])
    with torch.no_grad():
        plain = model.language.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[3]
        found = _block_output(model, batch)
        block = model.gated_blocks["3"]
        through = block.ffn_out(F.gelu(block.ffn_in(block.ffn_norm(plain)))) * block.ffn_gate.tanh() + plain
    expected = through if ffn_before_image else plain
    torch.testing.assert_close(found[0, :2], expected[0, :2])
    assert torch.equal(found[1], plain[1])
    assert not torch.isclose(found[0, 2:], plain[0, 2:]).all(-1).any()
    new = model.generate(**batch, max_new_tokens=2)
    again = batch | dict(input_ids=new[:, :5], attention_mask=torch.ones(2, 5, dtype=torch.bool))
    logits = model(**again).logits[:, -1]
    logits[:, IMAGE] = -torch.inf
    assert torch.equal(logits.argmax(-1), new[:, 5])


def _block_output(model: InfiMMHD, arguments: dict) -> torch.Tensor:
    outputs = []
    handle = model.gated_blocks["3"].register_forward_hook(lambda _, args, output: outputs.append(output))
    model(**arguments)
    handle.remove()
    return outputs[0]


def test_padding_and_batching_do_not_change_a_sample(model):
    model = model.double()
    together = model(**batch_of(ROWS, WINDOWS)).logits
    pixels = batch_of(ROWS, WINDOWS)
    offset = 0
    for i, (row, windows) in enumerate(zip(ROWS, WINDOWS, strict=True)):
        alone = batch_of([row], [windows])
        if windows:
            alone["pixel_values"] = pixels["pixel_values"][offset : offset + sum(windows)]
            alone["window_positions"] = pixels["window_positions"][offset : offset + sum(windows)]
        offset += sum(windows)
        torch.testing.assert_close(model(**alone).logits[0], together[i, : len(row)], rtol=1e-9, atol=1e-9)


def test_the_position_of_a_window_matters_and_the_thumbnail_has_none(model):
    batch = batch_of([[IMAGE, 5, 6]], [[2]])
    batch["window_positions"] = torch.tensor([[-1, -1], [0, 0]])
    moved = dict(batch, window_positions=torch.tensor([[-1, -1], [0, 1]]))
    assert not torch.equal(model(**batch).logits, model(**moved).logits)
    features = model.encode_windows(batch["pixel_values"])
    pairs, moved_pairs = (model.vision_keys_values(features, b["window_positions"]) for b in (batch, moved))
    for (key, _), (moved_key, _) in zip(pairs, moved_pairs, strict=True):
        key, moved_key = (x.unflatten(0, features.shape[:2]) for x in (key, moved_key))
        assert torch.equal(key[0], moved_key[0]) and not torch.equal(key[1], moved_key[1])
    without = open_model(position="none")
    assert torch.equal(without(**batch).logits, without(**moved).logits)


def test_the_loss_is_the_sum_over_answers_by_the_count_that_is_given(model):
    batch = batch_of(ROWS, WINDOWS)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 6:8] = batch["input_ids"][0, 6:8]
    labels[2, 3] = batch["input_ids"][2, 3]
    logits = model(**batch).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    out = model(**batch, labels=labels)
    assert out.num_answer_tokens == 3 and out.logits is None
    torch.testing.assert_close(out.loss_sum, expected)
    torch.testing.assert_close(out.loss, expected / 3)
    torch.testing.assert_close(model(**batch, labels=labels, num_answer_tokens=12).loss, expected / 12)
    none = model(**batch, labels=torch.full_like(labels, -100))
    assert none.num_answer_tokens == 0 and none.loss == 0
    none.loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient_even_without_any_image(model, checkpointing):
    """Ranks with text only must run the collectives of every parameter, or ZeRO hangs."""
    model.train()
    model.gradient_checkpointing = checkpointing
    model.set_trainable(PARTS)
    batch = batch_of([[1, 5, 6, 7]], [[]])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.startswith("language"):
            assert not parameter.grad.any(), name


def test_gradient_checkpointing_gives_the_same_gradients(model):
    batch = batch_of(ROWS, WINDOWS)
    other = copy.deepcopy(model)
    other.gradient_checkpointing = True
    for m in (model, other):
        m.train()
        m(**batch, labels=batch["input_ids"]).loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_set_trainable_freezes_the_rest():
    model = InfiMMHD(preset("tiny"))
    model.set_trainable(["gated_cross_attention"])
    groups = model.parameter_groups()
    assert all(p.requires_grad for _, p in groups["gated_cross_attention"])
    assert not any(p.requires_grad for part in ("vision", "language") for _, p in groups[part])
    assert any(name.startswith("connector") for name, _ in groups["gated_cross_attention"])
    with pytest.raises(ValueError, match="parts must be among .*, got 'gates'"):
        model.set_trainable(["gates"])


def test_nothing_is_stored_between_calls(model):
    """Features kept on layers break recomputation and leak memory (open_flamingo's way)."""
    seen = {name: set(vars(module)) for name, module in model.named_modules()}
    tensors = sum(isinstance(v, torch.Tensor) for module in model.modules() for v in vars(module).values())
    batch = batch_of(ROWS, WINDOWS)
    first = model(**batch).logits
    model(**batch_of(ROWS, WINDOWS, seed=1))
    model.generate(**batch_of([[IMAGE, 5]], [[1]]), max_new_tokens=2)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == seen
    assert sum(isinstance(v, torch.Tensor) for m in model.modules() for v in vars(m).values()) == tensors
    assert torch.equal(model(**batch).logits, first)


def test_saving_and_loading_gives_the_same_model(model, tmp_path):
    model.set_window_size(56)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    loaded = InfiMMHD.from_pretrained(tmp_path).eval()
    batch = batch_of(ROWS, WINDOWS, window_size=56)
    assert loaded.config == model.config
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_models_of_one_config_are_independent():
    """`set_window_size` once wrote into the caller's config, and so into every model made of it."""
    config = preset("tiny")
    first, second = InfiMMHD(config), InfiMMHD(config)
    first.set_window_size(56)
    assert first.config.vision_config.window_size == first.vision.config.window_size == 56
    assert second.config == config == preset("tiny")
    assert second(**batch_of(ROWS, WINDOWS)).logits.shape == (3, 8, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(input_ids=torch.tensor([1, 2])),
            r"input_ids must have shape \[batch, text_len\], not empty, got \[2\]",
        ),
        (
            dict(images_per_sample=[2, 1]),
            r"images_per_sample must have one count per sample \(3\), got \[2, 1\]",
        ),
        (dict(images_per_sample=[1, 1, 0]), r"windows_per_image must have one count per image \(2\)"),
        (dict(windows_per_image=[2, 1, 4]), "windows_per_image must be positive and sum to the 6 windows"),
        (dict(windows_per_image=[6, 0, 0]), "windows_per_image must be positive"),
        (
            dict(window_positions=None),
            r"window_positions must be an integer tensor of shape \[6, 2\], got None",
        ),
        (dict(pixel_values=torch.zeros(6, 3, 28, 29)), "pixel_values must have shape"),
        (dict(labels=torch.zeros(3, 4, dtype=torch.long)), "labels must have the shape of input_ids"),
        (dict(images_per_sample=[1, 2, 0]), "sample 0"),
        (dict(images_per_sample=[2, 0, 1]), "sample 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**(batch_of(ROWS, WINDOWS) | change))

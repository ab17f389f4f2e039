"""Every system that the papers compare is one config away: it trains a step, saves, loads and generates."""

import numpy as np
import pytest
import torch

from model import IGNORE_INDEX, InfiMMHD, InfiMMHDConfig, InfiMMHDProcessor, preset, variant, variants
from model.infimm_hd import PARTS
from tests.model.conftest import IMAGE, batch_of
from train.demo.vocabulary import build_tokenizer

WINDOWS = [[2, 1], [3], []]


def small(name: str) -> InfiMMHDConfig:
    config = variant(preset("tiny"), name)
    config.connector.num_layers, config.connector.num_latents = 2, 5
    config.connector.num_heads, config.connector.head_dim = 2, 8
    return config


def variant_model(name: str) -> InfiMMHD:
    torch.manual_seed(0)
    model = InfiMMHD(small(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("_gate"):
                parameter.normal_()
    return model


def rows_of(config: InfiMMHDConfig, windows=WINDOWS) -> list[list[int]]:
    """Left-padded to one length, so that they suit training and generation."""
    per_window = config.image_seq_length
    rows = []
    for sample in windows:
        row = [1, 10]
        for i, count in enumerate(sample):
            row += [IMAGE] * (1 if per_window is None else count * per_window) + [11 + i, 20]
        rows.append([*row, 5, 6])
    longest = max(map(len, rows))
    return [[0] * (longest - len(row)) + row for row in rows]


def batch_for(model: InfiMMHD, windows=WINDOWS) -> dict:
    batch = batch_of(rows_of(model.config, windows), windows, model.config.vision_config.input_size)
    return batch | dict(attention_mask=batch["input_ids"] != 0)


def labels_of(batch: dict) -> torch.Tensor:
    labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    return labels


@pytest.mark.parametrize("name", variants())
def test_a_variant_trains_saves_loads_and_generates(name, tmp_path):
    model = variant_model(name)
    batch = batch_for(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=labels_of(batch)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = InfiMMHD.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for weight, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[weight], value), weight
    with torch.no_grad():  # close and not equal: loaded weights lie elsewhere in memory, and sums follow that
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    generated = loaded.generate(**batch, max_new_tokens=3)
    assert torch.equal(generated, model.generate(**batch, max_new_tokens=3))
    assert generated.shape[0] == 3 and IMAGE not in generated[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", variants())
def test_every_parameter_of_a_variant_learns_with_and_without_images(name):
    """The gradient reaches every part, and none is missing where a batch has no image (or ZeRO hangs)."""
    model = variant_model(name).train()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # layers that start at zero hide the gradient of those before them
            if not parameter.any():
                parameter.normal_(std=0.1)
    model.set_trainable(PARTS)
    for windows in (WINDOWS, [[], []]):
        model.zero_grad()
        batch = batch_for(model, windows)
        model(**batch, labels=labels_of(batch)).loss.backward()
        for parameter_name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
            if windows is WINDOWS:
                assert parameter.grad.any(), parameter_name
            elif not parameter_name.startswith("language"):
                assert not parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", variants())
def test_a_batch_of_a_variant_is_generated_as_each_sample_alone(name):
    model = variant_model(name).double().eval()
    batch = batch_for(model)
    longest = batch["input_ids"].shape[1]
    together = model.generate(**batch, max_new_tokens=4)[:, longest:]
    first_window = 0
    for index, windows in enumerate(WINDOWS):
        part = slice(first_window, first_window + sum(windows))
        first_window += sum(windows)
        row = batch["input_ids"][index]
        alone = model.generate(
            row[row != 0][None],
            pixel_values=batch["pixel_values"][part] if windows else None,
            window_positions=batch["window_positions"][part] if windows else None,
            windows_per_image=windows,
            images_per_sample=[len(windows)],
            max_new_tokens=4,
        )
        new = alone[0, int((row != 0).sum()) :]
        assert torch.equal(new, together[index, : len(new)])


@pytest.mark.parametrize("name", ["infimm-hd", "llava-style", "resampler", "mixture-of-resolution"])
def test_a_text_alone_does_not_run_the_vision_encoder(name, monkeypatch):
    """At 13B it would read a blank window with 4 billion parameters. With other ranks it still runs: they may
    be waiting to gather them."""
    model = variant_model(name).eval()
    calls = []
    model.vision.register_forward_hook(lambda *_: calls.append("vision"))
    ids = torch.tensor([[1, 10, 11], [1, 20, 21]])
    with torch.no_grad():
        alone = model(ids).logits
        generated = model.generate(ids, max_new_tokens=3)
        assert not calls
        torch.testing.assert_close(alone, model.language(ids).logits)
        monkeypatch.setattr("model.infimm_hd._has_other_ranks", lambda: True)
        torch.testing.assert_close(model(ids).logits, alone)
        assert torch.equal(model.generate(ids, max_new_tokens=3), generated) and len(calls) == 2
    model(ids)
    assert len(calls) == 3


@pytest.mark.parametrize("name", variants())
def test_gradient_checkpointing_of_a_variant_changes_no_gradient(name):
    model = variant_model(name).train()
    batch = batch_for(model)
    gradients = []
    for enabled in (False, True):
        model.gradient_checkpointing_enable() if enabled else model.gradient_checkpointing_disable()
        assert model.gradient_checkpointing is enabled
        model.zero_grad()
        model(**batch, labels=labels_of(batch)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    ("mode", "window_size", "windows"), [("single", 28, 1), ("single", 56, 1), ("dynamic", 28, 7)]
)
def test_fixed_and_dynamic_resolutions_are_options_of_the_config(mode, window_size, windows, tmp_path):
    """The papers' 224, 448 and dynamic: what the config says is what the saved processor does."""
    config = preset("tiny")
    config.image.mode = mode
    config.vision_config.set_input_size(window_size)
    model = InfiMMHD(config)
    InfiMMHDProcessor.for_model(model.config, build_tokenizer(), "plain").save_pretrained(tmp_path)
    picture = np.full((56, 84, 3), 90, np.uint8)
    inputs = InfiMMHDProcessor.from_pretrained(tmp_path)([picture], "<image>left characters ?")
    assert inputs["pixel_values"].shape == (windows, 3, window_size, window_size)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = InfiMMHD.from_pretrained(tmp_path)
    assert loaded.config.image.mode == mode and loaded.config.vision_config.input_size == window_size
    expected = model.eval().generate(**inputs, max_new_tokens=3)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=3), expected)


def test_what_makes_a_variant():
    base = preset("infimm_hd_13b")
    assert len(variant(base, "interval-2").gated_layers) == 20 == 2 * len(base.gated_layers)
    assert variant(base, "resampler").visual_tokens_per_window == 64
    assert variant(base, "all-earlier-images").gated_cross_attention.only_attend_immediate_media is False
    llava = variant(base, "llava-style")
    assert llava.gated_layers == () and llava.image_seq_length == 256
    assert variant(base, "mixture-of-resolution").vision_config.input_size == 512
    assert base == preset("infimm_hd_13b")
    hr = preset("llava_hr_7b")
    assert hr.vision_config.window_size == 448 and hr.vision_config.input_size == 1024
    assert hr.image_seq_length == 1024


def test_concatenation_puts_the_visual_tokens_where_the_image_stands():
    """The same logits as the bare LLM on embeddings that are put together here."""
    model = variant_model("llava-style").eval()
    batch = batch_for(model, [[2]])
    with torch.no_grad():
        tokens = model.connector(model.vision(batch["pixel_values"])[:, 1:]).flatten(0, 1)
        x = model.language.get_input_embeddings()(batch["input_ids"])[0]
        place = int((batch["input_ids"][0] == IMAGE).nonzero()[0])
        x = torch.cat([x[:place], tokens, x[place + len(tokens) :]])
        expected = model.language(inputs_embeds=x[None]).logits
        torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize(
    ("windows", "message"), [([[2, 1], [2], []], "sample 1 .*32"), ([[1], [3], []], "sample 0")]
)
def test_concatenation_needs_a_mark_for_every_visual_token(windows, message):
    """Too few marks would push visual tokens of one sample into the next."""
    model = variant_model("llava-style")
    batch = batch_for(model)
    views = batch_of([[1]] * 3, windows, model.config.vision_config.input_size)
    views.pop("input_ids"), views.pop("attention_mask")
    with pytest.raises(
        ValueError, match="input_ids must hold one <image> for each visual token of " + message
    ):
        model(**(batch | views))


def test_the_position_of_a_window_matters_in_concatenation_too():
    config = small("llava-style")
    config.position = "token"
    model = InfiMMHD(config).eval()
    batch = batch_for(model, [[2]])
    moved = batch | dict(window_positions=batch["window_positions"] + 1)
    assert not torch.equal(model(**batch).logits, model(**moved).logits)
    thumbnail = torch.full_like(batch["window_positions"], -1)
    config.position = "none"
    model.config.position = "none"
    assert torch.equal(model(**batch).logits, model(**(batch | dict(window_positions=thumbnail))).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(connector=dict(kind="resampler"), position="token"),
            "position must be 'window' or 'none' with a",
        ),
        (dict(fusion="concatenation"), "connector.kind must be 'mlp' or 'resampler' with fusion"),
        (
            dict(fusion="fusion"),
            "fusion must be one of 'gated_cross_attention', 'concatenation', got 'fusion'",
        ),
        (dict(connector=dict(kind="qformer")), "connector.kind must be one of .*, got 'qformer'"),
        (dict(connector=dict(latents=3)), "got 'connector.latents'; did you mean 'num_latents'"),
        (dict(image=dict(mode="any")), "image.mode must be one of 'single', 'dynamic', got 'any'"),
        (
            dict(image=dict(max_windows_per_side=0)),
            "image.max_windows_per_side must be a positive int or None",
        ),
        (
            dict(vision_config=dict(mixture_of_resolution=dict(image_size=100))),
            "mixture_of_resolution.image_size must be a multiple of the ConvNeXt's stride 32, got 100",
        ),
        (
            dict(vision_config=dict(mixture_of_resolution=dict(depths=[1], hidden_sizes=[1, 2]))),
            "mixture_of_resolution.hidden_sizes must have one entry per stage of depths",
        ),
        (dict(vision_config=dict(block="norm")), "vision_config.block must be one of .*, got 'norm'"),
    ],
)
def test_variants_that_do_not_fit_together_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        InfiMMHDConfig(**change)


def test_unknown_variants_and_presets_are_named():
    with pytest.raises(ValueError, match="name must be one of 'infimm-hd', .*, got 'llava'"):
        variant(preset("tiny"), "llava")

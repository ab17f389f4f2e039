"""Configurations: limits, JSON round trip, and the exact sizes of the paper's model."""

import pytest
import torch

from model import (
    GatedCrossAttentionConfig,
    InfiMMHD,
    InfiMMHDConfig,
    VisionConfig,
    preset,
    presets,
)


def test_presets_round_trip_through_json(tmp_path):
    for name in presets():
        config = preset(name)
        config.save(tmp_path / "config.json")
        assert InfiMMHDConfig.load(tmp_path / "config.json") == config


def test_infimm_hd_13b_has_the_papers_parameter_counts():
    with torch.device("meta"):
        model = InfiMMHD(preset("infimm_hd_13b"))
    counts = {part: sum(p.numel() for _, p in named) for part, named in model.parameter_groups().items()}
    assert 4.3e9 < counts["vision"] < 4.45e9  # paper: 4.4 B
    parts = (model.vision_keys_values, model.gated_blocks)
    blocks = sum(p.numel() for part in parts for p in part.parameters())
    assert len(model.gated_blocks) == 10 and 0.63e9 < blocks < 0.70e9
    assert 63.0e6 < blocks / 10 < 63.2e6
    assert 13.0e9 < counts["language"] < 13.1e9  # Vicuna-13B
    assert list(model.gated_blocks) == [str(i) for i in range(3, 40, 4)]
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_infimm_hd_13b_has_exactly_these_parameters():
    """Layer by layer from facts of the sources: EVA2-CLIP-E at 224 pixels, ten gated blocks, Vicuna-13B."""
    with torch.device("meta"):
        model = InfiMMHD(preset("infimm_hd_13b"))
    width, wide = 1792, 15360
    attention = 4 * width**2 + 3 * width  # q, k, v and out; no bias for k
    block = attention + 2 * width * wide + wide + width + 4 * width
    vision = 64 * block + 3 * 14**2 * width + 2 * width + 257 * width
    hidden, inner = 5120, 768
    gated = 2 * hidden * inner + 2 * hidden**2 + 4 * hidden + 2 * hidden + 2 * inner * width
    layer = 4 * hidden**2 + 3 * hidden * 13824 + 2 * hidden
    language = 40 * layer + 2 * 32002 * hidden + hidden
    connector = 2 * (width**2 + width) + 2 * width

    def count(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(model.vision) == vision == 4_348_717_312
    assert count(model.gated_blocks) + count(model.vision_keys_values) == 10 * gated == 630_763_520
    assert count(model.language) == language == 13_015_884_800
    assert count(model.connector) == connector
    assert count(model) == vision + 10 * gated + language + connector


def test_the_tiny_preset_keeps_the_real_structure():
    config = preset("tiny")
    assert config.vision_config.hidden_size // config.vision_config.num_heads == 112
    assert len(config.gated_layers) >= 2
    assert config.connector.kind == "residual_mlp"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preset("huge"), "name must be one of .*, got 'huge'"),
        (
            lambda: VisionConfig(window_size=450),
            "vision_config.window_size must be a multiple of patch_size 14, got 450",
        ),
        (
            lambda: VisionConfig(num_heads=15),
            "vision_config.hidden_size must be a multiple of num_heads 15, got 1792",
        ),
        (lambda: VisionConfig(feature_layer=0), "vision_config.feature_layer must be .* -64 and -1, got 0"),
        (lambda: VisionConfig(num_layers=0), "vision_config.num_layers must be a positive int, got 0"),
        (lambda: VisionConfig(position_init="zeros"), "vision_config.position_init must be .*, got 'zeros'"),
        (
            lambda: GatedCrossAttentionConfig(interval=0),
            "gated_cross_attention.interval must be a positive int, got 0",
        ),
        (
            lambda: InfiMMHDConfig(position="pixel"),
            "position must be one of 'window', 'token', 'none', got 'pixel'",
        ),
        (
            lambda: InfiMMHDConfig(text_config=dict(vocab_size=100)),
            "image_token_id must be a token id below .* 32001",
        ),
        (
            lambda: InfiMMHDConfig.from_dict(dict(visoin={})),
            "key must be a field of InfiMMHDConfig.*did you mean 'vision_config'",
        ),
        (
            lambda: InfiMMHDConfig.from_dict(dict(vision_config=dict(patchsize=7))),
            "did you mean 'patch_size'",
        ),
    ],
)
def test_bad_values_name_field_rule_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def tiny(**changes) -> InfiMMHDConfig:
    values = preset("tiny").to_dict()
    values["text_config"] |= changes.pop("llama", {})
    return InfiMMHDConfig.from_dict(values | changes)


@pytest.mark.parametrize(
    ("llama", "message"),
    [
        (dict(num_hiden_layers=1), "got 'text_config.num_hiden_layers'; did you mean 'num_hidden_layers'"),
        (dict(num_attention_heads=3), "text_config must be accepted by .* not a multiple"),
        (
            dict(num_key_value_heads=3),
            "text_config.num_key_value_heads must divide num_attention_heads 4, got 3",
        ),
        (dict(hidden_size="abc"), "text_config.hidden_size must be a positive int, got 'abc'"),
        (dict(hidden_size=True), "text_config.hidden_size must be a positive int, got True"),
        (dict(num_hidden_layers=-1), "text_config.num_hidden_layers must be a positive int, got -1"),
        (dict(num_attention_heads=0), "text_config.num_attention_heads must be a positive int, got 0"),
        (dict(rms_norm_eps=float("nan")), "text_config.rms_norm_eps must be a positive number, got nan"),
        (dict(hidden_act="foo"), "text_config must be accepted by .*KeyError: 'foo'"),
        (dict(pad_token_id=99), "text_config must be accepted by .*Padding_idx"),
        (dict(rope_parameters=dict(rope_type="foo")), "text_config must be accepted by .*'foo'"),
    ],
)
def test_arguments_that_llama_ignores_or_refuses_are_named(llama, message):
    """LlamaConfig takes a misspelt name in silence, and its refusals are of a dozen types, some of them only
    when the model is built."""
    with pytest.raises(ValueError, match=message):
        tiny(llama=llama)


def test_llama_arguments_of_older_configs_are_accepted_and_left_alone():
    """LlamaConfig writes into a nested dict that it is given."""
    llama = dict(rope_scaling=dict(rope_type="linear", factor=2.0), rope_theta=1e4, torch_dtype="bfloat16")
    config = tiny(llama=llama)
    assert config.text_config.rope_parameters == dict(rope_type="linear", factor=2.0, rope_theta=1e4)
    assert llama["rope_scaling"] == dict(rope_type="linear", factor=2.0)
    assert InfiMMHD(config).config == config


def test_checking_a_config_draws_no_random_numbers():
    """It builds a Llama layer, which must not change what a seeded program does next."""
    before = torch.get_rng_state()
    preset("tiny")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(text_config=[1]), r"text_config must be a dict or a transformers config, got \[1\]"),
        (lambda: tiny(vision_config=3), "vision_config must be a VisionConfig or a dict, got 3"),
        (lambda: tiny(gated_cross_attention=3), "gated_cross_attention must be a Gated.*, got 3"),
        (lambda: tiny(image_token_id=3), "end_of_chunk_token_id must differ from image_token_id, got 3"),
        (lambda: tiny(pad_token_id=2), "pad_token_id must differ from image_token_id, got 2"),
        (lambda: tiny(image_token_id=True), "image_token_id must be a token id .*, got True"),
        (lambda: InfiMMHDConfig.from_dict([]), r"values must be a dict, got \[\]"),
        (lambda: VisionConfig(feature_layer="a"), "vision_config.feature_layer must be an int .*, got 'a'"),
        (lambda: VisionConfig(num_layers=True), "vision_config.num_layers must be a positive int, got True"),
        (
            lambda: VisionConfig(layer_norm_eps=0),
            "vision_config.layer_norm_eps must be a positive number, got 0",
        ),
        (
            lambda: VisionConfig(norm_gain_init="1"),
            "vision_config.norm_gain_init must be a finite number, got '1'",
        ),
        (
            lambda: GatedCrossAttentionConfig(only_attend_immediate_media=1),
            "gated_cross_attention.only_attend_immediate_media must be True or False, got 1",
        ),
        (
            lambda: tiny(gated_cross_attention=GatedCrossAttentionConfig(interval=5)),
            "gated_cross_attention.interval must leave at least one block, got 5$",
        ),
    ],
)
def test_values_of_the_wrong_type_are_named(make, message):
    """They were a TypeError or an AttributeError; an end token equal to `<image>` is never generated."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("text", [b'{"vision_config": ', b"[]", b'{"visoin": {}}', b"\xff\xfe", b""])
def test_a_broken_config_file_is_named(tmp_path, text):
    """A JSONDecodeError says a column of a file it does not name."""
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="path must hold a model's config, got .*config.json': "):
        InfiMMHD.from_pretrained(tmp_path)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="path must name a model's config.json, got .*config.json"):
        InfiMMHD.from_pretrained(tmp_path)

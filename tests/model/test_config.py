"""Configurations: limits, JSON round trip, and the exact sizes of the paper's model."""

import pytest
import torch

from model import GatedCrossAttentionConfig, InfiMMHD, InfiMMHDConfig, VisionConfig, preset, presets


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
    blocks = sum(p.numel() for p in model.gated_blocks.parameters())
    assert len(model.gated_blocks) == 10 and 0.63e9 < blocks < 0.70e9
    assert 63.0e6 < blocks / 10 < 63.2e6
    assert 13.0e9 < counts["language"] < 13.1e9  # Vicuna-13B
    assert list(model.gated_blocks) == [str(i) for i in range(3, 40, 4)]
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_the_tiny_preset_keeps_the_real_structure():
    config = preset("tiny")
    assert config.vision.hidden_size // config.vision.num_heads == 112
    assert len(config.gated_layers) >= 2
    assert config.gated_cross_attention.visual_token_transform


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preset("huge"), "name must be one of .*, got 'huge'"),
        (
            lambda: VisionConfig(window_size=450),
            "vision.window_size must be a multiple of patch_size 14, got 450",
        ),
        (
            lambda: VisionConfig(num_heads=15),
            "vision.hidden_size must be a multiple of num_heads 15, got 1792",
        ),
        (lambda: VisionConfig(feature_layer=0), "vision.feature_layer must be between -64 and -1, got 0"),
        (lambda: VisionConfig(num_layers=0), "vision.num_layers must be a positive int, got 0"),
        (lambda: VisionConfig(position_init="zeros"), "vision.position_init must be .*, got 'zeros'"),
        (
            lambda: GatedCrossAttentionConfig(interval=0),
            "gated_cross_attention.interval must be a positive int, got 0",
        ),
        (
            lambda: GatedCrossAttentionConfig(position="pixel"),
            "gated_cross_attention.position must be .*'pixel'",
        ),
        (
            lambda: InfiMMHDConfig(language=dict(vocab_size=100)),
            "image_token_id must be a token id below .* 32001",
        ),
        (
            lambda: InfiMMHDConfig.from_dict(dict(visoin={})),
            "key must be a field of InfiMMHDConfig.*did you mean 'vision'",
        ),
        (lambda: InfiMMHDConfig.from_dict(dict(vision=dict(patchsize=7))), "did you mean 'patch_size'"),
    ],
)
def test_bad_values_name_field_rule_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="path must name a model's config.json, got .*config.json"):
        InfiMMHD.from_pretrained(tmp_path)

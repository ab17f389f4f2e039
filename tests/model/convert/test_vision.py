"""Vision towers through the converter: the same features as an independent ViT with the same weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from model import InfiMMHD, InfiMMHDConfig, VisionConfig, preset
from model.convert import ConversionError, build, convert, inspect
from model.convert.checkpoint import Checkpoint
from model.vision import VisionTransformer
from tests.model.convert.conftest import (
    clip_config,
    eva_tensors,
    random_weights,
    stage1_model_config,
    tensors_in,
)
from tests.model.plain_vit import PlainViT


def loaded(path, config: VisionConfig | None = None, form: str = "auto") -> VisionTransformer:
    """The ViT that a checkpoint becomes."""
    wanted = preset("tiny")
    if config is not None:
        wanted.vision_config = config
    with Checkpoint(path, form, wanted if config is not None else None) as checkpoint:
        vit = VisionTransformer(checkpoint.vision_config)
        tensors = checkpoint.tensors().items()
        vit.load_state_dict({name.removeprefix("vision."): read() for name, read in tensors})
    return vit.eval()


def plain_vit(seed: int = 0) -> PlainViT:
    return random_weights(PlainViT(side=28, patch=7, width=112, heads=1, mlp_width=448, depth=4), seed)


def in_timms_names(vit: PlainViT) -> dict[str, torch.Tensor]:
    found = {
        "cls_token": vit.cls,
        "pos_embed": vit.positions,
        "patch_embed.proj.weight": vit.conv.weight,
        "patch_embed.proj.bias": vit.conv.bias,
    }
    for number, block in enumerate(vit.blocks):
        for name, weight in block.named_parameters():
            place = {"qkv": "attn.", "q_bias": "attn.", "v_bias": "attn.", "proj": "attn."}
            place |= {"fc1": "mlp.", "fc2": "mlp."}
            found[f"blocks.{number}.{place.get(name.partition('.')[0], '')}{name}"] = weight
    return {name: weight.detach().clone() for name, weight in found.items()}


TEXT_TOWER = {
    "text.token_embedding.weight": torch.ones(3, 4),
    "logit_scale": torch.ones(()),
    "transformer.resblocks.0.ln_1.weight": torch.ones(4),
}


@pytest.mark.parametrize(
    ("prefix", "form"), [("", "timm"), ("visual.", "eva-clip"), ("visual.trunk.", "open-clip-timm")]
)
def test_eva_names_give_the_features_of_a_plain_post_norm_vit(prefix, form, tmp_path):
    vit = plain_vit()
    heads = {"norm.weight": torch.ones(112), "head.weight": torch.ones(5, 112)}
    heads["blocks.0.attn.k_bias"] = torch.zeros(112)
    tensors = {prefix + name: weight for name, weight in (in_timms_names(vit) | heads).items()}
    beside = TEXT_TOWER if prefix else {}
    save_file(tensors | beside, tmp_path / "model.safetensors")
    config = stage1_model_config().vision_config
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path, config)(pixels), vit(pixels), rtol=1e-5, atol=1e-5)
    with Checkpoint(tmp_path, wanted=preset("tiny")) as checkpoint:
        assert checkpoint.form.name == form
        left_out = checkpoint.report.left_out
    assert left_out.keys() == {prefix + name for name in heads} | beside.keys()
    assert all(left_out[name].startswith("text tower") for name in beside)


def test_a_bias_on_keys_that_the_model_lacks_has_to_be_zero(tmp_path):
    tensors = in_timms_names(plain_vit()) | {"blocks.1.attn.k_bias": torch.full((112,), 1e-3)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="blocks.1.attn.k_bias in .* must be zero"):
        loaded(tmp_path, preset("tiny").vision_config)


def test_a_text_tower_beside_no_visual_prefix_is_unexpected(tmp_path):
    save_file(in_timms_names(plain_vit()) | TEXT_TOWER, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="3 unexpected: "):
        loaded(tmp_path, preset("tiny").vision_config)


def clip_vision_model(activation: str = "quick_gelu") -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        hidden_act=activation,
    )
    return random_weights(CLIPVisionModel(config))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_clip_gives_its_features(activation, tmp_path):
    clip = clip_vision_model(activation)
    clip.save_pretrained(tmp_path)
    vit = loaded(tmp_path)
    assert vit.config.activation == activation and vit.config.num_heads == 2 and vit.config.key_bias
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = clip(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(vit(pixels), expected, rtol=1e-5, atol=1e-5)


def test_the_visual_part_of_a_whole_clip_is_taken(tmp_path):
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    text = small | dict(vocab_size=10, bos_token_id=1, eos_token_id=2)
    config = CLIPConfig(vision_config=small | dict(image_size=56, patch_size=14), text_config=text)
    clip = random_weights(CLIPModel(config))
    clip.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(loaded(tmp_path)(pixels), expected, rtol=1e-5, atol=1e-5)
    text = inspect(tmp_path)
    assert "transformers-clip" in text and "text_model.encoder.layers.N.layer_norm1.bias (3)" in text
    assert "3 pre_norm blocks of 32, 2 heads" in text


def in_openai_names(clip: CLIPVisionModel) -> dict[str, torch.Tensor]:
    weights = clip.state_dict()
    found = {
        "conv1.weight": weights["embeddings.patch_embedding.weight"],
        "class_embedding": weights["embeddings.class_embedding"],
        "positional_embedding": weights["embeddings.position_embedding.weight"],
    }
    norms = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for number in range(3):
        ours, theirs = f"transformer.resblocks.{number}.", f"encoder.layers.{number}."
        norms |= {ours + "ln_1": theirs + "layer_norm1", ours + "ln_2": theirs + "layer_norm2"}
        norms |= {ours + "mlp.c_fc": theirs + "mlp.fc1", ours + "mlp.c_proj": theirs + "mlp.fc2"}
        norms[ours + "attn.out_proj"] = theirs + "self_attn.out_proj"
        for kind in ("weight", "bias"):
            parts = [weights[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{ours}attn.in_proj_{kind}"] = torch.cat(parts)
    for name, other in norms.items():
        for kind in ("weight", "bias"):
            found[f"{name}.{kind}"] = weights[f"{other}.{kind}"]
    return found | {"proj": torch.ones(32, 8)}


@pytest.mark.parametrize("prefix", ["", "visual."])
@pytest.mark.parametrize("told_by", ["preset", "open_clip_config.json"])
def test_openai_names_are_the_same_vit(prefix, told_by, tmp_path):
    clip = clip_vision_model("quick_gelu" if told_by == "preset" else "gelu")
    beside = dict(TEXT_TOWER) if prefix else {}
    torch.save(
        {prefix + name: weight for name, weight in in_openai_names(clip).items()} | beside,
        tmp_path / "clip.pt",
    )
    with pytest.raises(ValueError, match="SRC must come with a config file, or with --preset"):
        loaded(tmp_path)
    config = clip_config() if told_by == "preset" else None
    if told_by != "preset":
        settings = {"model_cfg": {"quick_gelu": False, "vision_cfg": {"width": 32, "head_width": 16}}}
        (tmp_path / told_by).write_text(json.dumps(settings))
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        vit = loaded(tmp_path, config)
        expected = clip(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(vit(pixels), expected, rtol=1e-5, atol=1e-5)


def own_model(tmp_path, vision: VisionConfig) -> InfiMMHD:
    config = preset("tiny")
    config.vision_config = vision
    model = random_weights(InfiMMHD(InfiMMHDConfig.from_dict(config.to_dict())))
    model.save_pretrained(tmp_path / "own")
    return model


@pytest.mark.parametrize(
    "target", ["timm", "eva-clip", "open-clip", "transformers-clip", "open-clip-pre-norm"]
)
def test_exports_come_back_bit_for_bit(target, tmp_path):
    pre_norm = target in ("transformers-clip", "open-clip-pre-norm")
    model = own_model(tmp_path, clip_config() if pre_norm else preset("tiny").vision_config)
    report = convert(tmp_path / "own", tmp_path / "out", target=target.removesuffix("-pre-norm"))
    assert all(name.startswith("vision.") for name in report.used)
    assert report.left_out["language.lm_head.weight"].startswith("no part of")
    assert "not written: norm and head behind the features" in report.text()
    knows = target in ("timm", "transformers-clip", "open-clip-pre-norm")
    vit = loaded(tmp_path / "out", None if knows else model.config.vision_config)
    for name, weight in model.vision.state_dict().items():
        assert torch.equal(vit.state_dict()[name], weight), name


def test_exported_timm_names_and_shapes(tmp_path):
    model = own_model(tmp_path, preset("tiny").vision_config)
    convert(tmp_path / "own", tmp_path / "out", target="timm")
    written, expected = tensors_in(tmp_path / "out"), eva_tensors(model, "")
    assert written.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in written.items())
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["architecture"] == "eva02_enormous_patch14_clip_224"
    assert settings["model_args"]["embed_dim"] == 112 and settings["model_args"]["img_size"] == 28


def test_transformers_reads_the_exported_clip(tmp_path):
    model = own_model(tmp_path, clip_config())
    convert(tmp_path / "own", tmp_path / "out", target="transformers-clip")
    clip = CLIPVisionModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = clip(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(model.vision(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "target"), [(preset("tiny").vision_config, "transformers-clip"), (clip_config(), "timm")]
)
def test_a_form_for_other_blocks_is_refused(vision, target, tmp_path):
    own_model(tmp_path, vision)
    with pytest.raises(ValueError, match="post-norm|only tensors that timm weights"):
        convert(tmp_path / "own", tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [56, 42, 14])
def test_the_position_table_is_interpolated_as_the_model_does(size, tmp_path):
    model = own_model(tmp_path, preset("tiny").vision_config)
    report = convert(tmp_path / "own", tmp_path / "out", window_size=size)
    assert f"from 4 x 4 to {size // 7} x {size // 7} patches" in report.text()
    read = InfiMMHD.from_pretrained(tmp_path / "out")
    assert read.config.vision_config.window_size == size
    model.set_window_size(size)
    for name, weight in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight), name


@pytest.mark.parametrize("size", [0, 30, -28])
def test_a_window_that_patches_do_not_fill_is_refused(size, tmp_path):
    own_model(tmp_path, preset("tiny").vision_config)
    with pytest.raises(ValueError, match="window_size must be a positive multiple of patch_size 7"):
        convert(tmp_path / "own", tmp_path / "out", window_size=size)


def test_a_tower_alone_is_no_model(tmp_path):
    clip_vision_model().save_pretrained(tmp_path / "clip")
    with pytest.raises(
        ValueError, match="python -m model build.*transformers-clip weights without gated, language"
    ):
        convert(tmp_path / "clip", tmp_path / "out")
    with pytest.raises(ValueError, match="--language must hold the weights of a language model"):
        config = preset("tiny")
        config.vision_config = clip_config()
        build(tmp_path / "out", preset=config, vision=tmp_path / "clip", language=tmp_path / "clip")

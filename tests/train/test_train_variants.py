"""The trainer on models that are not InfiMM-HD: rows, stages and what they leave follow the config."""

import numpy as np
import pytest
import torch

from model import IGNORE_INDEX, ImageProcessor, InfiMMHD, InfiMMHDConfig, InfiMMHDProcessor, preset, variant
from train.batch import RowEncoder
from train.data import Sample
from train.engine import run

from .tiny_stage import MODEL_OPTIONS, weights_of

PICTURE = np.full((28, 60, 3), 200, np.uint8)


def variant_model(name: str) -> InfiMMHD:
    torch.manual_seed(7)
    values = preset("tiny").to_dict()
    for part, options in MODEL_OPTIONS.items():
        values[part] |= options
    # two adapters need three blocks
    values["vision_config"]["num_layers"] = 3
    values["connector"] |= dict(num_layers=1, num_latents=3, num_heads=1, head_dim=8)
    return InfiMMHD(variant(InfiMMHDConfig.from_dict(values), name))


@pytest.mark.parametrize("name", ["llava-style", "resampler", "mixture-of-resolution"])
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_stage_trains_a_variant(tiny, colours, tokenizer, name, zero_stage):
    """All parts learn, images of any number of windows fit, and the saved processor asks as the stage did."""
    model = variant_model(name)
    size = model.config.vision_config.input_size
    before = {weight: value.clone() for weight, value in model.state_dict().items()}
    config = tiny(
        "DRA",
        trainable=["vision", "gated_cross_attention", "language"],
        image__window_size=size,
        data__sequence_length=256,
        parallel__zero_stage=zero_stage,
        schedule__steps=4,
    )
    result = run(config, dataset=colours, tokenizer=tokenizer, model=model)
    assert all(np.isfinite(result.losses)) and result.losses[-1] < result.losses[0]
    after = weights_of(result.output_dir)
    frozen = {weight for weight, parameter in model.named_parameters() if not parameter.requires_grad}
    changed = {weight for weight, value in after.items() if not torch.equal(value, before[weight])}
    assert {weight.split(".")[0] for weight in changed} >= {"vision", "language", "connector"}
    assert not changed & frozen
    loaded = InfiMMHD.from_pretrained(result.output_dir / "model")
    assert loaded.config.image.mode == "dynamic"
    processor = InfiMMHDProcessor.from_pretrained(result.output_dir / "model")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which colour ?"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, processor_kwargs={"images": [PICTURE]}
    )
    assert loaded.generate(**inputs, max_new_tokens=2).shape[0] == 1
    encoder = RowEncoder(
        tokenizer,
        processor.image_processor,
        prompt=config.data.prompt,
        sequence_length=256,
        image_token_id=loaded.config.image_token_id,
        end_token_id=loaded.config.end_of_chunk_token_id,
        image_seq_length=loaded.config.image_seq_length,
    )
    row = encoder(Sample([PICTURE], [("<image>which colour ?", "red")]))
    asked = inputs["input_ids"][0].tolist()
    assert row.input_ids[: len(asked)] == asked


def test_a_row_has_a_mark_for_every_visual_token(tokenizer):
    encoder = RowEncoder(
        tokenizer,
        ImageProcessor(window_size=28, mode="dynamic"),
        prompt="plain",
        sequence_length=64,
        image_token_id=2,
        end_token_id=3,
        image_seq_length=5,
    )
    row = encoder(Sample([PICTURE], [("<image>which colour ?", "red")]))
    assert len(row.images[0].pixel_values) == 3 and row.input_ids[1:16] == [2] * 15
    assert row.input_ids.count(2) == 15 and row.labels[:16] == [IGNORE_INDEX] * 16

"""A size that trains in a second: narrow, two steps of everything."""

import dataclasses

import pytest
import torch

from bench.miniature import features, resampler, sizes, training, warmup
from bench.miniature.arms import RESAMPLERS
from bench.miniature.sizes import WarmUp
from bench.miniature.storage import claim

STEPS = WarmUp(steps=2, batch=2, lr=1e-3)
TINY = dataclasses.replace(
    sizes.SIZES["cpu"],
    name="tiny",
    vision_width=16,
    vision_heads=2,
    vision_layers=2,
    convnext_widths=(8, 8, 16),
    text_width=16,
    text_heads=2,
    cross_heads=2,
    cross_head_dim=8,
    vision=STEPS,
    vision_low=STEPS,
    convnext=STEPS,
    language=STEPS,
    resampler=STEPS,
    language_reads_first=0,
    steps=2,
    batch=4,
    train_pages=6,
    evaluated_pages=4,
)
CPU = torch.device("cpu")
SOME_ARMS = ("448", "dynamic", "mixture-of-resolution", "llava-style", "448-resampler", "text-only")


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A run's folder with the warm-up and all features."""
    folder = tmp_path_factory.mktemp("miniature")
    claim(folder, TINY)
    for make in warmup.PARTS.values():
        make(TINY, folder / "warm_up", CPU)
    for view in ("low", "single", "dynamic", "whole"):
        for split in features.SPLITS:
            features.compute(TINY, view, split, folder, CPU)
    for arm in RESAMPLERS:
        resampler.warm_up_resampler(TINY, folder, CPU, arm)
    return folder


@pytest.fixture(scope="session")
def trained(warm):
    """The same with some arms."""
    for arm in SOME_ARMS:
        training.run_arm(TINY, arm, 0, "steps", warm, CPU)
    return warm

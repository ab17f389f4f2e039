"""The arms: one change each to the same model, and the view of a page that each is given."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from model import ImageProcessor, InfiMMHD, InfiMMHDConfig, variant
from model.presets import checked

from .sizes import Size, base_config, mixture_of
from .storage import load_tensors

VIEWS = ("low", "single", "dynamic", "whole")
"""The page in one window of half size (the paper's 224), in one window (448), in four and a thumbnail, or as
it is (what a mixture of resolutions reads)."""
POSITIONS = {"dynamic": ((-1, -1), (0, 0), (0, 1), (1, 0), (1, 1))}
"""(row, column) of a view's windows; of the others' only one (-1, -1), no position."""


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    view: str
    change: str = "infimm-hd"
    """A name of `model.presets.variants()`; the interval of "interval-2" is half of the base's."""
    paper: str = ""
    """What it stands for."""
    images: bool = True
    """False: the same texts without images and without `<image>`."""


ARMS = {
    "224": Arm("low", paper="one window of 224 pixels"),
    "448": Arm("single", paper="one window of 448 pixels"),
    "dynamic": Arm("dynamic", paper="windows of 448 pixels and a thumbnail"),
    "dynamic-no-position": Arm("dynamic", "no-position", "dynamic without the 2-D position of the windows"),
    "224-resampler": Arm("low", "resampler", "224 through Flamingo's resampler"),
    "448-resampler": Arm("single", "resampler", "448 through Flamingo's resampler"),
    "interval-2": Arm("dynamic", "interval-2", "dynamic, gated blocks at half the interval, twice as many"),
    "llava-style": Arm("single", "llava-style", "448, its tokens in the LLM's own sequence"),
    "mixture-of-resolution": Arm(
        "whole", "mixture-of-resolution", "llava-style, a ConvNeXt mixed into its ViT"
    ),
    "text-only": Arm("dynamic", paper="no image: what the questions alone give", images=False),
}
RESAMPLERS = {"224-resampler": "resampler_low", "448-resampler": "resampler"}
"""Arm -> the part of the warm-up that its resampler starts from."""
RESOLUTIONS = ("224", "448", "dynamic")
"""Arms that are also compared at equal compute: the first two train longer, as long as the third costs."""


def arm_config(size: Size, name: str) -> InfiMMHDConfig:
    config = base_config(size)
    change = ARMS[name].change
    if change == "mixture-of-resolution":
        config = variant(config, "llava-style")
        config.vision_config.mixture_of_resolution = mixture_of(size)
        config.image.mode = "single"
        return checked(config)
    if change == "interval-2":
        # half of the paper's 4; here of an LLM with fewer layers
        config.gated_cross_attention.interval = size.interval // 2
    else:
        config = variant(config, change)
    if ARMS[name].view == "low":
        config.vision_config.set_input_size(size.window // 2)
    config.image.mode = "dynamic" if ARMS[name].view == "dynamic" else "single"
    return checked(config)


def processor(size: Size, view: str) -> ImageProcessor:
    """How a page becomes the pixels of a view."""
    window = {"low": size.window // 2, "whole": size.page}.get(view, size.window)
    return ImageProcessor(window_size=window, mode="dynamic" if view == "dynamic" else "single")


def build(size: Size, name: str, warm_up: Path, seed: int) -> InfiMMHD:
    """The arm's model: encoders, resampler and LLM from the warm-up in folder `warm_up`, all else new.

    The encoders are frozen; the LLM and what joins them train."""
    torch.manual_seed(seed)
    model = InfiMMHD(arm_config(size, name))
    view = ARMS[name].view
    vision = load_tensors(warm_up / ("vision_low.pt" if view == "low" else "vision.pt"))["part"]
    if view == "whole":
        # the mixture's ViT has no CLS token: its row of the table stays and is not read
        model.vision.vit.load_state_dict(vision)
        model.vision.convnext.load_state_dict(load_tensors(warm_up / "convnext.pt")["part"])
    else:
        model.vision.load_state_dict(vision)
    if name in RESAMPLERS:
        model.connector.load_state_dict(load_tensors(warm_up / f"{RESAMPLERS[name]}.pt")["part"])
    model.language.load_state_dict(load_tensors(warm_up / "language.pt")["part"])
    model.set_trainable(("gated_cross_attention", "language"))
    return model


class GivenFeatures(nn.Module):
    """Stands in for a frozen vision encoder whose features [n, tokens, width] were computed before."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.config = encoder.config
        self.features: Tensor | None = None
        self.gradient_checkpointing = False

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.features

    def freeze_inactive_blocks(self) -> None:
        """Nothing here trains."""

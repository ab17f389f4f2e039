"""The miniature at each size: what stands for the paper's resolutions, models and trainings."""

import dataclasses

from model import ConnectorConfig, GatedCrossAttentionConfig, InfiMMHDConfig, VisionConfig
from model.vision_config import MixtureOfResolutionConfig

from .pages import tokenizer

SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WarmUp:
    """Steps of one part of the shared warm-up."""

    steps: int
    batch: int
    """Windows' worth of whole pages, or texts, a step."""
    lr: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A page is four windows; `window` stands for the paper's 448 pixels and half of it for its 224."""

    name: str
    window: int
    patch: int
    font_sizes: tuple[int, ...]
    """Em in pixels of the page, which has 2 * window a side: what `dynamic` reads natively, 448 at half and
    224 at a quarter of it."""
    small: tuple[int, ...]
    large: tuple[int, ...]
    """Which of `font_sizes` count as small and large text; the others are medium."""
    vision_width: int
    vision_heads: int
    vision_layers: int
    convnext_depths: tuple[int, ...]
    convnext_widths: tuple[int, ...]
    text_width: int
    text_heads: int
    text_layers: int
    interval: int
    cross_heads: int
    cross_head_dim: int
    latents: int
    """Of the resampler: the paper's share of a window's tokens, 64 of 1025 and of 257."""
    resampler_layers: int
    vision: WarmUp
    vision_low: WarmUp
    """More steps on windows of half the size, for the arms that stand for 224."""
    convnext: WarmUp
    language: WarmUp
    language_reads_first: int
    """Of its steps: in these it only spells words that are named by their colour. Among all kinds
    of questions it does not learn to (bench/LOG.md)."""
    resampler: WarmUp
    """In pages; of the resamplers for the papers' 224 and 448 each."""
    steps: int
    """Of an arm."""
    batch: int
    """Samples a step, each with `turns` questions."""
    turns: int
    two_pages: float
    """Share of the samples with two pages, each followed by half of the questions."""
    lr_joining: float
    """Peak rate of gated blocks, connector and adapters, but for gates and resampler."""
    lr_resampler: float
    """At `lr_joining` it forgets its warm-up."""
    lr_gates: float
    """Above `lr_joining`: while the gates are almost closed, Adam's steps in what they gate are noise, and
    attention settles on that before it finds where a word stands (bench/LOG.md)."""
    lr_language: float
    train_pages: int
    evaluated_pages: int
    loader_workers: int
    arms_at_once: int
    """Processes that train side by side, one thread each on a CPU."""

    @property
    def page(self) -> int:
        return 2 * self.window


SIZES = {
    "cpu": Size(
        name="cpu",
        window=64,
        patch=8,
        font_sizes=(16, 22, 32, 44),
        small=(16, 22),
        large=(44,),
        vision_width=128,
        vision_heads=4,
        vision_layers=4,
        convnext_depths=(1, 1, 2),
        convnext_widths=(32, 64, 128),
        text_width=128,
        text_heads=4,
        text_layers=4,
        interval=2,
        cross_heads=4,
        cross_head_dim=32,
        latents=4,
        resampler_layers=2,
        vision=WarmUp(steps=8000, batch=4, lr=3e-3),
        vision_low=WarmUp(steps=2000, batch=4, lr=1e-3),
        convnext=WarmUp(steps=20000, batch=4, lr=2e-3),
        language=WarmUp(steps=4000, batch=16, lr=1e-3),
        language_reads_first=1000,
        resampler=WarmUp(steps=2000, batch=16, lr=1e-3),
        steps=1000,
        batch=16,
        turns=4,
        two_pages=0.2,
        lr_joining=3e-3,
        lr_resampler=3e-4,
        lr_gates=0.05,
        lr_language=2e-4,
        train_pages=6000,
        evaluated_pages=300,
        loader_workers=0,
        arms_at_once=2,
    ),
    "gpu": Size(
        name="gpu",
        window=224,
        patch=16,
        font_sizes=(28, 40, 64, 96),
        small=(28, 40),
        large=(96,),
        vision_width=448,
        vision_heads=4,
        vision_layers=8,
        convnext_depths=(1, 1, 3, 1),
        convnext_widths=(48, 96, 192, 384),
        text_width=256,
        text_heads=4,
        text_layers=4,
        interval=2,
        cross_heads=4,
        cross_head_dim=64,
        latents=12,
        resampler_layers=2,
        vision=WarmUp(steps=6000, batch=48, lr=6e-4),
        vision_low=WarmUp(steps=1200, batch=48, lr=2e-4),
        convnext=WarmUp(steps=2000, batch=48, lr=1e-3),
        language=WarmUp(steps=4000, batch=64, lr=7e-4),
        language_reads_first=1000,
        resampler=WarmUp(steps=2000, batch=64, lr=5e-4),
        steps=1500,
        batch=64,
        turns=4,
        two_pages=0.2,
        lr_joining=1.5e-3,
        lr_resampler=2e-4,
        lr_gates=0.05,
        lr_language=1e-4,
        train_pages=12000,
        evaluated_pages=500,
        loader_workers=8,
        arms_at_once=3,
    ),
}


def base_config(size: Size) -> InfiMMHDConfig:
    """InfiMM-HD at this size: what every arm is a change of."""
    words = len(tokenizer())
    return InfiMMHDConfig(
        vision_config=VisionConfig(
            window_size=size.window,
            patch_size=size.patch,
            hidden_size=size.vision_width,
            num_layers=size.vision_layers,
            num_heads=size.vision_heads,
            intermediate_size=4 * size.vision_width,
            feature_layer=-1,
            norm_gain_init=0.5,
            position_init="sincos",
        ),
        connector=ConnectorConfig(
            num_layers=size.resampler_layers,
            num_latents=size.latents,
            num_heads=size.cross_heads,
            head_dim=size.cross_head_dim,
        ),
        gated_cross_attention=GatedCrossAttentionConfig(
            interval=size.interval, num_heads=size.cross_heads, head_dim=size.cross_head_dim
        ),
        text_config=dict(
            vocab_size=words,
            hidden_size=size.text_width,
            intermediate_size=2 * size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_heads,
            num_key_value_heads=size.text_heads,
            max_position_embeddings=1024,
            initializer_range=0.02,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=3,
        ),
        image_token_id=2,
        end_of_chunk_token_id=3,
    )


def mixture_of(size: Size) -> MixtureOfResolutionConfig:
    """A ConvNeXt that reads the whole page at its native size, one cell for each patch of the ViT."""
    mixture = MixtureOfResolutionConfig(
        image_size=size.page,
        depths=list(size.convnext_depths),
        hidden_sizes=list(size.convnext_widths),
        min_vit_size=size.patch,
        num_adapters=min(3, size.vision_layers - 1),
        adapter_kernel_size=3,
    )
    expected = size.window // size.patch * mixture.stride
    if size.page != expected:
        raise ValueError(
            f"convnext_depths must give one cell for each patch of the ViT: a page of {size.page} pixels "
            f"needs the stride {size.page * size.patch // size.window}, got {mixture.stride}"
        )
    return mixture

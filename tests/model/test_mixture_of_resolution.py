"""The mixture of resolutions against its equations, written down again in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import MixtureOfResolutionConfig, VisionConfig
from model.mixture_of_resolution import Adapter, MixtureOfResolutionEncoder
from model.vision import VisionTransformer
from tests.model.plain_vit import PlainBlock, plain_vit_like

SAME_GRIDS = dict(image_size=32, min_vit_size=2)  # 4 x 4 cells of 8 pixels, 4 x 4 patches
FINER_VIT = dict(image_size=32, min_vit_size=12)  # 4 x 4 cells, 6 x 6 patches


def config(mixture: dict, **changes) -> VisionConfig:
    sizes = dict(depths=[1, 2], hidden_sizes=[8, 16], adapter_kernel_size=3)
    vit = dict(patch_size=2, hidden_size=32, num_layers=5, num_heads=2, intermediate_size=48)
    mixture = MixtureOfResolutionConfig(**sizes | mixture)
    return VisionConfig(window_size=8, mixture_of_resolution=mixture, **vit | changes)


def randomised(config: VisionConfig, dtype=torch.float64) -> MixtureOfResolutionEncoder:
    torch.manual_seed(0)
    encoder = MixtureOfResolutionEncoder(config).to(dtype)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def resampling(new: int, old: int) -> Tensor:
    """[new, old]: linear interpolation between the centres of cells, over a triangle two steps wide where
    the grid shrinks, weights normalised at the borders."""
    step = old / new
    width = max(step, 1.0)
    at = (torch.arange(new, dtype=torch.float64) + 0.5) * step - 0.5
    if step < 1:
        at = at.clamp(0, old - 1)
    weights = (1 - (torch.arange(old) - at[:, None]).abs() / width).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def resampled(images: Tensor, size: int) -> Tensor:
    matrix = resampling(size, images.shape[-1])
    return matrix @ images @ matrix.T


def linear(layer: torch.nn.Linear, grid: Tensor) -> Tensor:
    """A 1 x 1 convolution of [n, channels, side, side]."""
    return F.conv2d(grid, layer.weight[:, :, None, None], layer.bias)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def plain_adapter(adapter: Adapter, v: Tensor, c: Tensor) -> Tensor:
    """On maps [n, channels, side, side]."""
    width, kernel = len(adapter.low_out.weight), adapter.low_conv.kernel_size[0]
    padded = F.pad(v, [kernel // 2] * 4)
    windows = padded.unfold(2, kernel, 1).unfold(3, kernel, 1)  # [n, width, side, side, kernel, kernel]
    weight = adapter.low_conv.weight.view(1, width, 1, 1, kernel, kernel)
    convolved = (windows * weight).sum((-1, -2)) + adapter.low_conv.bias[:, None, None]
    y = v + linear(adapter.low_out, gelu(convolved))
    high = linear(adapter.high_out, gelu(linear(adapter.high_in, c)))
    high = resampled(high, v.shape[-1]) if high.shape[-1] != v.shape[-1] else high
    means = torch.cat([y.mean((2, 3)), high.mean((2, 3))], 1)
    hidden = gelu(means @ adapter.gate_in.weight.T + adapter.gate_in.bias)
    gate = torch.tanh(hidden @ adapter.gate_out.weight.T + adapter.gate_out.bias)  # [n, 1]
    return y + gate[:, :, None, None] * high


def plain_blocks(encoder: MixtureOfResolutionEncoder) -> list[PlainBlock]:
    """With the encoder's own parameters, so that gradients reach them."""
    blocks = []
    for block in encoder.vit.blocks:
        plain = PlainBlock(32, 2, 48, encoder.config.layer_norm_eps).double()
        plain.qkv, plain.q_bias, plain.v_bias = block.attn.qkv_proj, block.attn.q_bias, block.attn.v_bias
        plain.proj, plain.fc1, plain.fc2 = block.attn.out_proj, block.mlp_in, block.mlp_out
        plain.norm1, plain.norm2 = block.attn_norm, block.mlp_norm
        blocks.append(plain)
    return blocks


def plain_forward(encoder: MixtureOfResolutionEncoder, pixels: Tensor, places: list[int]) -> Tensor:
    """places: active blocks before each adapter."""
    vit, adapters = encoder.vit, encoder.adapters
    size, patch = vit.config.window_size, vit.config.patch_size
    coarse = encoder.convnext(pixels).last_hidden_state  # [n, channels, cells, cells]
    weight = vit.patch_embed.weight.view(-1, 3, patch, patch)
    low = resampled(pixels, size) if size != pixels.shape[-1] else pixels
    v = F.conv2d(low, weight, vit.patch_embed.bias, stride=patch)
    side = v.shape[-1]
    tokens = v.flatten(2).mT + vit.position_table[1:]
    for index, block in enumerate(plain_blocks(encoder)[: vit.config.num_active_layers], start=1):
        tokens = block(tokens)
        if index in places:
            adapter = adapters.stages[places.index(index)]
            tokens = plain_adapter(adapter, tokens.mT.unflatten(2, (side, side)), coarse).flatten(2).mT
    high = linear(adapters.convnext_proj, coarse)
    high = resampled(high, side) if high.shape[-1] != side else high
    return linear(adapters.vit_proj, tokens.mT.unflatten(2, (side, side))).add(high).flatten(2).mT


CASES = [  # mixture, changes to the ViT, active blocks before each adapter
    (SAME_GRIDS, {"feature_layer": -1}, [1, 2, 3]),
    (FINER_VIT, {"feature_layer": -2}, [1, 2, 3]),
    (FINER_VIT | {"num_adapters": 1}, {"feature_layer": -1}, [2]),
    (SAME_GRIDS | {"image_size": 48}, {"feature_layer": -1}, [1, 2, 3]),
]


@pytest.mark.parametrize(("mixture", "changes", "places"), CASES)
def test_features_and_gradients_are_the_plain_ones(mixture, changes, places):
    encoder = randomised(config(mixture, **changes))
    size = mixture["image_size"]
    pixels = torch.randn(3, 3, size, size, dtype=torch.float64)
    ours, plain = encoder(pixels), plain_forward(encoder, pixels, places)
    assert ours.shape == (3, encoder.config.num_tokens, 32)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(ours)
    named = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    got, expected = (torch.autograd.grad(x, list(named.values()), cotangent) for x in (ours, plain))
    for name, a, b in zip(named, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_adapters_stand_after_each_quarter_of_clip_s_blocks():
    encoder = MixtureOfResolutionEncoder(config(SAME_GRIDS, num_layers=24, feature_layer=-1))
    order = []
    for index, block in enumerate(encoder.vit.blocks):
        block.register_forward_hook(lambda *_, index=index: order.append(index + 1))
    for adapter in encoder.adapters.stages:
        adapter.register_forward_hook(lambda *_: order.append("adapter"))
    with torch.no_grad():
        encoder(torch.randn(1, 3, 32, 32))
    assert [order[i - 1] for i, name in enumerate(order) if name == "adapter"] == [6, 12, 18]
    assert order[-1] == 24


def test_at_the_start_the_vit_s_features_pass_through_unchanged():
    """The ViT's are those of the same ViT on the small image, its CLS token left out."""
    torch.manual_seed(0)
    encoder = MixtureOfResolutionEncoder(config(FINER_VIT))
    pixels = torch.randn(2, 3, 32, 32)
    features = []
    encoder.adapters.vit_proj.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    with torch.no_grad():
        out = encoder(pixels)
        small = F.interpolate(pixels, size=(12, 12), mode="bilinear", antialias=True)
        assert torch.equal(features[0], encoder.vit(small))
        silent = copy.deepcopy(encoder)
        torch.nn.init.zeros_(silent.adapters.convnext_proj.weight)
        torch.nn.init.zeros_(silent.adapters.convnext_proj.bias)
        assert torch.equal(silent(pixels), encoder.adapters.vit_proj(features[0]))
    assert not torch.equal(out, silent(pixels))


def test_the_start_can_be_left():
    """Zero last layers are no saddle: they get gradients at once, the layers before them a step later."""
    torch.manual_seed(0)
    encoder = MixtureOfResolutionEncoder(config(SAME_GRIDS))
    pixels = torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        encoder(pixels).square().mean().backward()
        optimizer.step()
    without = [name for name, p in encoder.named_parameters() if p.requires_grad and not p.grad.any()]
    assert without == []


def test_every_image_has_its_own_gate_and_features():
    encoder = randomised(config(SAME_GRIDS), torch.float64)
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        together = encoder(pixels)
        torch.testing.assert_close(encoder(pixels[order]), together[order])
        torch.testing.assert_close(encoder(pixels[1:2]), together[1:2])


def test_gradient_checkpointing_changes_nothing_but_memory():
    encoder = randomised(config(FINER_VIT))
    other = copy.deepcopy(encoder)
    assert not other.gradient_checkpointing
    other.gradient_checkpointing = True
    assert other.vit.gradient_checkpointing
    runs = []
    parts = (other.vit.blocks[0], other.adapters.stages[0], other.convnext.encoder.stages[1].layers[0])
    for part in parts:
        part.register_forward_pre_hook(lambda *_: runs.append(None))
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    encoder(pixels).square().sum().backward()
    other(pixels).square().sum().backward()
    assert len(runs) == 2 * len(parts)
    for a, b in zip(encoder.parameters(), other.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


@pytest.mark.long
def test_compiles_whole_with_a_changing_number_of_images():
    torch._dynamo.reset()
    encoder = randomised(two_blocks(), torch.float32)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3, 5):
        pixels = torch.randn(n, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(pixels), encoder(pixels))


def two_blocks() -> VisionConfig:
    return config(FINER_VIT | {"num_adapters": 1, "depths": [1, 1]}, num_layers=2, feature_layer=-1)


def test_bfloat16_and_autocast():
    exact = randomised(config(FINER_VIT))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = exact(pixels.double())
        limit = 0.06 * float(expected.abs().max())
        features = copy.deepcopy(exact).bfloat16()(pixels)
        assert features.dtype == torch.bfloat16
        assert (features.double() - expected).abs().max() < limit
    wide = copy.deepcopy(exact).float()
    with torch.autocast("cpu", torch.bfloat16):
        features = wide(pixels)
    assert (features.double() - expected).abs().max() < limit
    features.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in wide.parameters() if p.requires_grad)


def test_another_size_fits_the_position_table():
    encoder = randomised(config(SAME_GRIDS))
    assert encoder.config is encoder.vit.config
    encoder.set_window_size(64, interpolation="bilinear")
    assert (encoder.config.input_size, encoder.config.window_size, encoder.config.num_tokens) == (64, 16, 64)
    assert encoder(torch.randn(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 64, 32)
    alone = VisionTransformer(config(SAME_GRIDS)).double()
    alone.position_table.data.copy_(randomised(config(SAME_GRIDS)).vit.position_table.data)
    alone.set_window_size(64, interpolation="bilinear")
    assert torch.equal(encoder.vit.position_table, alone.position_table)


def test_what_never_runs_is_frozen_and_all_that_is_new_is_an_adapter():
    encoder = MixtureOfResolutionEncoder(config(SAME_GRIDS, feature_layer=-2))
    for _ in range(2):
        frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
        expected = {name for name, _ in encoder.named_parameters() if name.startswith("vit.blocks.4.")}
        assert frozen == expected | {"vit.cls_token"}
        encoder.requires_grad_(True)
        encoder.freeze_inactive_blocks()
    vit = {f"vit.{name}" for name, _ in VisionTransformer(config(SAME_GRIDS)).named_parameters()}
    others = {name for name, _ in encoder.named_parameters()} - vit
    assert {name.split(".")[0] for name in others} == {"convnext", "adapters"}
    assert plain_vit_like(encoder.vit).blocks[0].qkv.weight.data_ptr() == (
        encoder.vit.blocks[0].attn.qkv_proj.weight.data_ptr()
    )


def test_bad_arguments_are_named():
    given = config(SAME_GRIDS)
    encoder = MixtureOfResolutionEncoder(given)
    with pytest.raises(ValueError, match=r"pixel_values must have shape \[num_windows, 3, 32, 32\], got"):
        encoder(torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        ValueError, match="window_size must be a positive multiple of the ConvNeXt's stride 8"
    ):
        encoder.set_window_size(36)
    with pytest.raises(ValueError, match="interpolation must be one of"):
        encoder.set_window_size(64, interpolation="nearest")
    assert encoder.config.input_size == 32
    encoder.set_window_size(64)
    assert given.input_size == 32

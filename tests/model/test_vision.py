"""The ViT against independent statements of its equations."""

import copy

import pytest
import torch
import torch.nn.functional as F

from model import VisionConfig
from model.vision import VisionTransformer


def small(**changes) -> VisionConfig:
    sizes = dict(
        window_size=8,
        patch_size=2,
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        intermediate_size=48,
        feature_layer=-1,
    )
    return VisionConfig(**(sizes | changes))


def randomised(config: VisionConfig, dtype=torch.float64) -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(config).to(dtype)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit


def plain_forward(vit: VisionTransformer, pixel_values: torch.Tensor, num_layers: int) -> torch.Tensor:
    """EVA2-CLIP-E written down again: convolution, softmax by hand, norms after the branches."""
    config = vit.config
    weight = vit.patch_embed.weight.view(config.hidden_size, 3, config.patch_size, config.patch_size)
    tokens = F.conv2d(pixel_values, weight, vit.patch_embed.bias, stride=config.patch_size).flatten(2).mT
    x = torch.cat([vit.cls_token.expand(len(tokens), 1, -1), tokens], 1) + vit.position_table

    def layer_norm(y, norm):
        y = y - y.mean(-1, keepdim=True)
        return (
            y / (y.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt() * norm.weight + norm.bias
        )

    for block in vit.blocks[:num_layers]:
        attn = block.attn
        q_weight, k_weight, v_weight = attn.qkv_proj.weight.chunk(3)
        heads = (len(x), -1, config.num_heads, config.hidden_size // config.num_heads)
        q = (x @ q_weight.T + attn.q_bias).view(heads).transpose(1, 2)
        k = (x @ k_weight.T).view(heads).transpose(1, 2)
        v = (x @ v_weight.T + attn.v_bias).view(heads).transpose(1, 2)
        out = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + layer_norm(attn.out_proj(out.transpose(1, 2).flatten(2)), block.attn_norm)
        hidden = block.mlp_in(x)
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + layer_norm(block.mlp_out(gelu), block.mlp_norm)
    return x


def test_forward_and_gradients_equal_the_plain_statement():
    vit = randomised(small())
    pixels = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    ours, plain = vit(pixels), plain_forward(vit, pixels, 3)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(ours)
    parameters = list(vit.parameters())
    for got, expected in zip(
        torch.autograd.grad(ours, parameters, cotangent),
        torch.autograd.grad(plain, parameters, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_the_feature_is_the_output_of_the_chosen_block_and_later_blocks_are_frozen():
    vit = randomised(small(feature_layer=-2))
    fresh = VisionTransformer(small(feature_layer=-2))
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(vit(pixels), plain_forward(vit, pixels, 2))
    assert not any(p.requires_grad for p in fresh.blocks[2].parameters())
    assert all(p.requires_grad for p in fresh.blocks[1].parameters())


def test_gradient_checkpointing_changes_nothing_but_memory():
    vit = randomised(small())
    other = copy.deepcopy(vit)
    other.gradient_checkpointing = True
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    vit(pixels).square().sum().backward()
    other(pixels).square().sum().backward()
    for a, b in zip(vit.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_position_table_is_interpolated_and_keeps_its_cls_row():
    vit = randomised(small())
    before = vit.position_table.detach().clone()
    smooth = torch.linspace(0, 1, 4, dtype=torch.float64)
    with torch.no_grad():
        vit.position_table[1:, 0] = smooth.repeat_interleave(4)
    vit.position_table.requires_grad_(False)
    vit.set_window_size(16)
    assert vit.config.window_size == 16 and vit.position_table.shape == (65, 32)
    assert torch.equal(vit.position_table[0], before[0])
    assert not vit.position_table.requires_grad
    rows = vit.position_table[1:, 0].view(8, 8)
    assert (rows.diff(dim=0) > 0).all() and rows.diff(
        dim=1
    ).abs().max() < 1e-6  # still a ramp from top to bottom
    assert vit(torch.randn(1, 3, 16, 16, dtype=torch.float64)).shape == (1, 65, 32)
    same = vit.position_table
    vit.set_window_size(16)
    assert vit.position_table is same


def test_compiles_whole_with_a_changing_number_of_windows():
    torch._dynamo.reset()
    vit = VisionTransformer(small())
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_windows in (2, 3, 5):
        pixels = torch.randn(num_windows, 3, 8, 8)
        torch.testing.assert_close(compiled(pixels), vit(pixels))


def test_strided_pixels_and_a_config_of_its_own():
    """A transposed batch failed in `view`; the caller's config was changed in place."""
    config = small()
    vit = VisionTransformer(config)
    pixels = torch.randn(2, 3, 8, 8)
    strided = pixels.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(vit(strided), vit(pixels))
    vit.set_window_size(16)
    assert config.window_size == 8 and vit.config.window_size == 16


def test_bad_arguments_are_named():
    vit = VisionTransformer(small())
    with pytest.raises(
        ValueError, match=r"pixel_values must have shape \[num_windows, 3, 8, 8\], got \[1, 3, 8, 9\]"
    ):
        vit(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="window_size must be a positive multiple of patch_size 2, got 7"):
        vit.set_window_size(7)
    with pytest.raises(ValueError, match="window_size must be a positive multiple .*, got True"):
        VisionTransformer(small(patch_size=1)).set_window_size(True)

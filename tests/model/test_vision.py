"""The ViT against independent statements of its equations: plain PyTorch, transformers' CLIP, timm's Eva."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from model import MixtureOfResolutionConfig, VisionConfig
from model.mixture_of_resolution import MixtureOfResolutionEncoder
from model.vision import VisionTransformer, build_vision_encoder
from tests.model.plain_vit import PLAIN_NAMES, plain_vit_like, renamed, timm_vit_like

CLIP = dict(block="pre_norm", activation="quick_gelu", key_bias=True, patch_bias=False, embedding_norm=True)


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


def assert_near(got: torch.Tensor, expected: torch.Tensor, limit: float, name: str = "features") -> None:
    """The largest error relative to the largest value."""
    assert got.shape == expected.shape and got.dtype == expected.dtype, name
    error, size = (got - expected).abs().max(), expected.abs().max()
    assert error <= limit * size, f"{name} is off by {error / size:.3g}"


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("layer", [-1, -2])
def test_post_norm_features_and_gradients_are_the_plain_ones(layer, dtype, limit):
    vit = randomised(small(feature_layer=layer), dtype)
    plain = plain_vit_like(vit)
    pixels = torch.randn(3, 3, 8, 8, dtype=dtype, requires_grad=True)
    ours, theirs = vit(pixels), plain(pixels)
    assert_near(ours, theirs, limit)
    cotangent = torch.randn_like(ours)
    parameters = {name: p for name, p in vit.named_parameters() if p.requires_grad}
    others = dict(plain.named_parameters())
    got = torch.autograd.grad(ours, [pixels, *parameters.values()], cotangent)
    wanted = [others[renamed(name, PLAIN_NAMES)] for name in parameters]
    expected = torch.autograd.grad(theirs, [pixels, *wanted], cotangent)
    for name, a, b in zip(("pixels", *parameters), got, expected, strict=True):
        assert_near(a, b.view(a.shape), limit, name)


def test_a_key_bias_changes_nothing():
    vit = randomised(small(key_bias=True))
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        before = vit(pixels)
        for block in vit.blocks:
            block.attn.k_bias.add_(5.0)
        assert_near(vit(pixels), before, 1e-12)


def clip_like(vit: VisionTransformer, activation: str) -> CLIPVisionModel:
    """transformers' CLIP with the weights of `vit`."""
    c = vit.config
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            image_size=c.window_size,
            patch_size=c.patch_size,
            hidden_act=activation,
            layer_norm_eps=c.layer_norm_eps,
        )
    )
    embeddings, norm = theirs.embeddings, theirs.pre_layrnorm
    pairs = {
        embeddings.patch_embedding.weight: vit.patch_embed.weight,
        embeddings.class_embedding: vit.cls_token,
        embeddings.position_embedding.weight: vit.position_table,
        norm.weight: vit.embedding_norm.weight,
        norm.bias: vit.embedding_norm.bias,
    }
    for layer, block in zip(theirs.encoder.layers, vit.blocks, strict=True):
        attn = block.attn
        q, k, v = attn.qkv_proj.weight.chunk(3)
        for proj, weight, bias in (("q", q, attn.q_bias), ("k", k, attn.k_bias), ("v", v, attn.v_bias)):
            linear = getattr(layer.self_attn, f"{proj}_proj")
            pairs |= {linear.weight: weight, linear.bias: bias}
        modules = (
            (layer.self_attn.out_proj, attn.out_proj),
            (layer.layer_norm1, block.attn_norm),
            (layer.layer_norm2, block.mlp_norm),
            (layer.mlp.fc1, block.mlp_in),
            (layer.mlp.fc2, block.mlp_out),
        )
        for target, source in modules:
            pairs |= {target.weight: source.weight, target.bias: source.bias}
    with torch.no_grad():
        for target, source in pairs.items():
            target.copy_(source.view(target.shape))
    return theirs


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_pre_norm_features_are_transformers_clip_s(activation):
    vit = randomised(small(**CLIP | {"activation": activation}, feature_layer=-2), torch.float32)
    theirs = clip_like(vit, activation)
    pixels = torch.randn(2, 3, 8, 8, requires_grad=True)
    ours, expected = vit(pixels), theirs(pixels, output_hidden_states=True).hidden_states[-2]
    assert_near(ours, expected, 1e-5)
    cotangent = torch.randn_like(ours)
    block, layer = vit.blocks[0], theirs.encoder.layers[0]
    mine = [pixels, vit.cls_token, block.attn.v_bias, block.mlp_in.weight, vit.embedding_norm.weight]
    other = [pixels, theirs.embeddings.class_embedding, layer.self_attn.v_proj.bias, layer.mlp.fc1.weight]
    other.append(theirs.pre_layrnorm.weight)
    got, wanted = (
        torch.autograd.grad(out, leaves, cotangent) for out, leaves in ((ours, mine), (expected, other))
    )
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert_near(a, b, 1e-5, f"gradient {index}")


def test_post_norm_features_are_timm_s():
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    vit = randomised(small(feature_layer=-2), torch.float32)
    theirs = timm_vit_like(vit)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert_near(vit(pixels), theirs.forward_features(pixels), 1e-5)


class Calls(TorchDispatchMode):
    """Names of the operators that ran on tensors, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.name() != "aten::promote_types":
            self.names.append(func.name().removesuffix(".default").split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_post_norm_block_is_its_products_attention_gelu_and_norms(dtype):
    """No copy, no concatenation: forward, and in the backward one sum for each bias."""
    vit = randomised(small(), dtype)
    x = torch.randn(2, 17, 32, dtype=dtype, requires_grad=True)
    bias = torch.randn(96, dtype=dtype, requires_grad=True)
    with Calls() as forward:
        out = vit.blocks[0](x, bias)
    product, norm = "addmm", "residual_post_norm"
    attention = ["window_attention", product, norm]
    assert forward.names == [product, *attention, product, "gelu", product, norm]
    cotangent = torch.ones_like(out)
    with Calls() as backward:
        torch.autograd.grad(out, [x, bias, *vit.blocks[0].parameters()], cotangent, allow_unused=True)
    assert not {"copy_", "clone", "cat", "_to_copy", "stack"} & set(backward.names)
    assert backward.names.count("mm") == 8


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_forward_copies_the_pixels_once_and_joins_two_small_tables(num_layers):
    vit = randomised(small(num_layers=num_layers), torch.float32)
    with Calls() as calls:
        vit(torch.randn(2, 3, 8, 8))
    assert calls.names.count("copy_") == 1 and calls.names.count("cat") == 2
    assert not {"clone", "_to_copy", "stack"} & set(calls.names)


def test_inference_gives_the_same_numbers_and_writes_over_no_input():
    """Without gradients GELU runs in place."""
    vit = randomised(small(), torch.float32)
    pixels = torch.randn(2, 3, 8, 8)
    kept = pixels.clone()
    with torch.no_grad():
        features = vit(pixels)
    assert torch.equal(features, vit(pixels)) and torch.equal(pixels, kept)


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_the_feature_is_the_output_of_the_chosen_block(layer):
    vit, whole = randomised(small(feature_layer=layer)), randomised(small())
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    outputs = []
    for block in whole.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    whole(pixels)
    assert torch.equal(vit(pixels), outputs[layer])


def test_blocks_behind_the_feature_layer_are_frozen():
    vit = VisionTransformer(small(feature_layer=-2))
    for _ in range(2):
        assert not any(p.requires_grad for p in vit.blocks[2].parameters())
        assert all(p.requires_grad for p in (*vit.blocks[1].parameters(), vit.cls_token))
        vit.requires_grad_(True)
        vit.freeze_inactive_blocks()


@pytest.mark.parametrize("changes", [{}, CLIP])
def test_gradient_checkpointing_changes_nothing_but_memory(changes):
    vit = randomised(small(**changes))
    other = copy.deepcopy(vit)
    other.gradient_checkpointing = True
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    runs = []
    other.blocks[0].register_forward_pre_hook(lambda *_: runs.append(None))
    vit(pixels).square().sum().backward()
    other(pixels).square().sum().backward()
    assert len(runs) == 2
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
    assert (rows.diff(dim=0) > 0).all()
    assert rows.diff(dim=1).abs().max() < 1e-6  # still a ramp from top to bottom
    assert vit(torch.randn(1, 3, 16, 16, dtype=torch.float64)).shape == (1, 65, 32)
    same = vit.position_table
    vit.set_window_size(16)
    assert vit.position_table is same


def with_columns(columns: torch.Tensor, dtype=torch.float64) -> VisionTransformer:
    """A ViT whose table is `columns` in every row of its grid, in every channel."""
    vit = VisionTransformer(small(window_size=2 * len(columns))).to(dtype)
    with torch.no_grad():
        vit.position_table[1:] = columns.to(dtype).repeat(len(columns))[:, None]
    return vit


def columns_of(vit: VisionTransformer) -> torch.Tensor:
    grid = vit.config.grid_size
    return vit.position_table.detach()[1 : 1 + grid, 0]


def test_bilinear_doubling_mixes_neighbours_three_to_one():
    columns = torch.tensor([1.0, 5.0, -3.0, 0.0], dtype=torch.float64)
    vit = with_columns(columns)
    vit.set_window_size(16, interpolation="bilinear")
    expected = [1.0, 2.0, 4.0, 3.0, -1.0, -2.25, -0.75, 0.0]
    torch.testing.assert_close(columns_of(vit), torch.tensor(expected, dtype=torch.float64))


def test_bicubic_keeps_more_of_a_wave_than_bilinear():
    def wave(cells: int) -> torch.Tensor:
        return torch.sin(2 * torch.pi * (torch.arange(cells) + 0.5) * (32 / cells) / 6).double()

    errors = {}
    for interpolation in ("bicubic", "bilinear"):
        vit = with_columns(wave(32))
        vit.set_window_size(128, interpolation=interpolation)
        errors[interpolation] = float((columns_of(vit) - wave(64))[8:-8].abs().max())
    default = with_columns(wave(32))
    default.set_window_size(128)
    assert 0.02 < errors["bicubic"] < 0.04 and 0.08 < errors["bilinear"] < 0.1
    assert float((columns_of(default) - wave(64))[8:-8].abs().max()) == errors["bicubic"]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_shrinking_table_averages(interpolation):
    """One cell in four: sampling without a filter would miss it, or find nothing else."""
    vit = with_columns(torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(8))
    vit.set_window_size(16, interpolation=interpolation)
    assert (columns_of(vit)[1:-1] - 0.25).abs().max() < 0.03


def test_a_bfloat16_table_is_interpolated_in_float32():
    vit = with_columns(torch.tensor([1.0, 1.0078125] * 4), torch.bfloat16)
    wide = copy.deepcopy(vit).float()
    for each in (vit, wide):
        each.set_window_size(26)
    assert vit.position_table.dtype == torch.bfloat16
    assert torch.equal(vit.position_table, wide.position_table.bfloat16())


@pytest.mark.parametrize("changes", [{}, pytest.param(CLIP, marks=pytest.mark.long)])
def test_compiles_whole_with_a_changing_number_of_windows(changes):
    torch._dynamo.reset()
    vit = randomised(small(**changes, num_layers=1), torch.float32)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_windows in (2, 3, 5):
        pixels = torch.randn(num_windows, 3, 8, 8)
        features, expected = compiled(pixels), vit(pixels)
        assert_near(features, expected, 1e-5)
        if not changes:  # compiling a backward takes long
            got, wanted = (torch.autograd.grad(x.sum(), vit.cls_token)[0] for x in (features, expected))
            assert_near(got, wanted, 1e-4)


@pytest.mark.parametrize("changes", [{}, CLIP])
def test_bfloat16_and_autocast(changes):
    """Autocast keeps the residual stream, and so the features, in float32."""
    exact = randomised(small(**changes))
    pixels = torch.randn(2, 3, 8, 8)
    expected = exact(pixels.double()).detach()
    narrow = copy.deepcopy(exact).bfloat16()
    features = narrow(pixels)
    assert features.dtype == torch.bfloat16
    assert_near(features.double(), expected, 0.05)
    wide = copy.deepcopy(exact).float()
    with torch.autocast("cpu", torch.bfloat16):
        features = wide(pixels)
    assert features.dtype == torch.float32
    assert_near(features.double(), expected, 0.05)
    features.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in wide.parameters())


def test_strided_pixels_and_a_config_of_its_own():
    """A transposed batch failed in `view`; the caller's config was changed in place."""
    config = small()
    vit = VisionTransformer(config)
    pixels = torch.randn(2, 3, 8, 8)
    strided = pixels.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(vit(strided), vit(pixels))
    vit.set_window_size(16)
    assert config.window_size == 8 and vit.config.window_size == 16


def test_the_configuration_chooses_the_encoder():
    assert type(build_vision_encoder(small())) is VisionTransformer
    mixture = MixtureOfResolutionConfig(image_size=8, depths=[1], hidden_sizes=[8], min_vit_size=2)
    config = small(num_layers=5, mixture_of_resolution=mixture)
    assert type(build_vision_encoder(config)) is MixtureOfResolutionEncoder


def test_names_of_the_parameters():
    names = {name for name, _ in VisionTransformer(small()).named_parameters()}
    options = {name for name, _ in VisionTransformer(small(**CLIP)).named_parameters()}
    block = {"attn_norm", "mlp_in", "mlp_out", "mlp_norm", "attn.out_proj"}
    expected = {
        f"blocks.{i}.{name}.{part}" for i in range(3) for name in block for part in ("weight", "bias")
    }
    expected |= {
        f"blocks.{i}.attn.{part}" for i in range(3) for part in ("q_bias", "v_bias", "qkv_proj.weight")
    }
    expected |= {"patch_embed.weight", "patch_embed.bias", "cls_token", "position_table"}
    assert names == expected
    new = {"embedding_norm.weight", "embedding_norm.bias", *(f"blocks.{i}.attn.k_bias" for i in range(3))}
    assert options == expected - {"patch_embed.bias"} | new


def test_bad_arguments_are_named():
    vit = VisionTransformer(small())
    rule = r"pixel_values must have shape \[num_windows, 3, 8, 8\], got "
    for shape, got in (((1, 3, 8, 9), r"\[1, 3, 8, 9\]"), ((3, 8, 8), r"\[3, 8, 8\]")):
        with pytest.raises(ValueError, match=rule + got):
            vit(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"pixel_values must be floating, got torch\.uint8"):
        vit(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="window_size must be a positive multiple of patch_size 2, got 7"):
        vit.set_window_size(7)
    with pytest.raises(ValueError, match="window_size must be a positive multiple .*, got True"):
        VisionTransformer(small(patch_size=1)).set_window_size(True)
    with pytest.raises(ValueError, match="interpolation must be one of 'bicubic', 'bilinear', got 'nearest'"):
        vit.set_window_size(16, interpolation="nearest")
    assert vit.config.window_size == 8 and len(vit.position_table) == 17

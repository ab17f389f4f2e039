"""The connectors against plain statements of their equations in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ConnectorConfig
from model.connector import Mlp, PerceiverResampler, ResidualMlp, build_connector

SMALL = dict(num_layers=2, num_latents=5, num_heads=2, head_dim=6)


def randomised(module: nn.Module, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.to(dtype).parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def resampler(out_size: int = 16, dtype=torch.float64) -> PerceiverResampler:
    return randomised(build_connector(ConnectorConfig(kind="resampler", **SMALL), 16, out_size), dtype)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def plain_resampler(module: PerceiverResampler, features: Tensor) -> Tensor:
    """One window and one head at a time."""
    windows = []
    for window in features:
        z = module.latents
        for layer in module.layers:
            queries = layer_norm(z, layer.latents_norm)
            read = torch.cat([layer_norm(window, layer.features_norm), queries])
            q = queries @ layer.q_proj.weight.T
            k, v = (read @ layer.kv_proj.weight.T).chunk(2, dim=-1)
            heads = []
            for q1, k1, v1 in zip(*(x.split(6, dim=-1) for x in (q, k, v)), strict=True):
                scores = (q1 @ k1.T / 6**0.5).exp()
                heads.append(scores / scores.sum(-1, keepdim=True) @ v1)
            z = z + torch.cat(heads, -1) @ layer.out_proj.weight.T
            hidden = gelu(layer_norm(z, layer.ffn_norm) @ layer.ffn_in.weight.T)
            z = z + hidden @ layer.ffn_out.weight.T
        windows.append(layer_norm(z, module.norm))
    out = torch.stack(windows)
    return out if isinstance(module.proj, nn.Identity) else out @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize("out_size", [16, 24])
def test_the_resampler_is_the_plain_one(out_size):
    module = resampler(out_size)
    features = torch.randn(3, 11, 16, dtype=torch.float64, requires_grad=True)
    ours, plain = module(features), plain_resampler(module, features)
    assert ours.shape == (3, 5, out_size)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(ours)
    leaves = [features, *module.parameters()]
    got, expected = (torch.autograd.grad(x, leaves, cotangent) for x in (ours, plain))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_latents_read_their_own_window_in_any_order():
    module = resampler()
    features = torch.randn(3, 11, 16, dtype=torch.float64)
    with torch.no_grad():
        together = module(features)
        torch.testing.assert_close(module(features[[2, 0, 1]]), together[[2, 0, 1]])
        torch.testing.assert_close(module(features[1:2]), together[1:2])
        torch.testing.assert_close(module(features[:, torch.randperm(11)]), together)


def test_the_defaults_are_flamingo_s():
    module = build_connector(ConnectorConfig(kind="resampler"), 8, 8)
    assert len(module.layers) == 6 and module.latents.shape == (64, 8)
    layer = module.layers[0]
    assert (layer.num_heads, layer.head_dim, layer.ffn_in.out_features) == (8, 64, 32)
    assert isinstance(module.proj, nn.Identity)


@pytest.mark.long
def test_the_resampler_compiles_whole_with_changing_sizes():
    torch._dynamo.reset()
    module = resampler(dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, tokens in ((2, 11), (3, 11), (5, 7)):
        features = torch.randn(n, tokens, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(features), module(features))


@pytest.mark.parametrize("kind", ["residual_mlp", "mlp", "resampler"])
def test_bfloat16_and_autocast(kind):
    exact = randomised(build_connector(ConnectorConfig(kind=kind, **SMALL), 16, 16))
    features = torch.randn(2, 11, 16)
    with torch.no_grad():
        expected = exact(features.double())
        limit = 0.05 * float(expected.abs().max())
        narrow = copy.deepcopy(exact).bfloat16()(features.bfloat16())
        assert narrow.dtype == torch.bfloat16
        assert (narrow.double() - expected).abs().max() < limit
    wide = copy.deepcopy(exact).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = wide(features)
    assert (out.double() - expected).abs().max() < limit
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in wide.parameters())


def test_the_residual_mlp():
    """It starts as the norm alone: the MLP's last layer is zero."""
    module = build_connector(ConnectorConfig(kind="residual_mlp"), 16, 16).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert isinstance(module, ResidualMlp)
    torch.testing.assert_close(module(x), F.layer_norm(x, (16,)))
    randomised(module)
    normed = layer_norm(x, module.norm)
    hidden = gelu(normed @ module.linear_in.weight.T + module.linear_in.bias)
    expected = normed + hidden @ module.linear_out.weight.T + module.linear_out.bias
    torch.testing.assert_close(module(x), expected)


def test_the_mlp_and_none():
    module = randomised(build_connector(ConnectorConfig(kind="mlp"), 16, 24))
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert isinstance(module, Mlp)
    hidden = gelu(x @ module.linear_in.weight.T + module.linear_in.bias)
    torch.testing.assert_close(module(x), hidden @ module.linear_out.weight.T + module.linear_out.bias)
    assert module(x).shape == (2, 7, 24)
    assert build_connector(ConnectorConfig(kind="none"), 16, 16)(x) is x


@pytest.mark.parametrize("kind", ["none", "residual_mlp"])
def test_a_connector_that_keeps_the_width_refuses_another(kind):
    with pytest.raises(ValueError, match=f"out_size must equal in_size 16 with connector '{kind}', got 24"):
        build_connector(ConnectorConfig(kind=kind), 16, 24)


def test_features_of_another_shape_are_refused():
    module = resampler()
    for shape in ((11, 16), (2, 0, 16), (2, 11, 8)):
        with pytest.raises(ValueError, match=r"features must have shape \[n, tokens, 16\], got \["):
            module(torch.zeros(shape, dtype=torch.float64))

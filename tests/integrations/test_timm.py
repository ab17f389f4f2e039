"""use_window_attention against the untouched model. timm imports torchvision; without either this skips."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

from timm.layers.attention import Attention, AttentionRope  # noqa: E402
from timm.models.eva import EvaAttention  # noqa: E402

from infimm_kernels.integrations import batched  # noqa: E402
from infimm_kernels.integrations import timm as hook  # noqa: E402
from infimm_kernels.integrations.timm import use_window_attention  # noqa: E402

VIT_E = dict(img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2, num_classes=5)


@pytest.fixture
def prefixes(monkeypatch):
    """num_prefix_tokens of every call of window_attention and varlen_attention that the hook makes."""
    seen = []

    def spied(attention):
        def spy(*args, **kwargs):
            seen.append((attention.__name__, kwargs["num_prefix_tokens"]))
            return attention(*args, **kwargs)

        return spy

    monkeypatch.setattr(hook, "window_attention", spied(hook.window_attention))
    monkeypatch.setattr(batched, "varlen_attention", spied(batched.varlen_attention))
    return seen


def vit_e(**changes):
    """InfiMM-HD's encoder, narrow and of two blocks, with weights that are not at their initial zeros."""
    return shaken(timm.create_model("eva02_enormous_patch14_clip_224", **VIT_E | changes))


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def assert_same(model, original, x, call=None):
    """Equal outputs, and equal gradients of every parameter and of x."""
    results = []
    for run, owner in ((call or model.forward, model), (original.forward, original)):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        out = run(leaf)
        names, parameters = zip(*owner.named_parameters(), strict=True)
        grads = torch.autograd.grad((out * torch.randn_like(out)).sum(), (leaf, *parameters))
        results.append(dict(zip(("out", "x", *names), (out, *grads), strict=True)))
    found, expected = results
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        limit = 1e-5 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[name], value, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


def images():
    return torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(2))


def test_vit_e_equals_the_untouched_model(prefixes):
    original = vit_e()
    model = copy.deepcopy(original)
    assert use_window_attention(model) == 2
    assert_same(model, original, images())
    assert prefixes == [("window_attention", 1)] * 2


@pytest.mark.parametrize(
    "model_name, changes, expected",
    [
        ("vit_tiny_patch16_224", dict(), ("window_attention", 1)),
        ("vit_tiny_patch16_224", dict(reg_tokens=3), ("window_attention", 4)),
        ("vit_tiny_patch16_224", dict(reg_tokens=9), ("window_attention", 8)),
        ("vit_tiny_patch16_224", dict(qk_norm=True, scale_attn_norm=True), ("varlen_attention", 1)),
        (
            "vit_tiny_patch16_224",
            dict(qkv_bias=False, class_token=False, global_pool="avg"),
            ("window_attention", 0),
        ),
        ("eva_giant_patch14_224", dict(qkv_fused=False), ("varlen_attention", 1)),
        ("eva_giant_patch14_224", dict(qkv_bias=False), ("window_attention", 1)),
        ("eva_giant_patch14_224", dict(scale_attn_inner=True), ("window_attention", 1)),
    ],
)
def test_kinds_of_attention_equal_the_untouched_model(model_name, changes, expected, prefixes):
    original = shaken(timm.create_model(model_name, **VIT_E | changes))
    model = copy.deepcopy(original)
    assert use_window_attention(model) == 2
    assert_same(model, original, images())
    assert prefixes == [expected] * 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_a_layer_alone_equals_the_untouched_one(separate, fused):
    layer = EvaAttention(
        24, 2, qkv_fused=fused, qkv_bias_separate=separate, qk_norm=True, norm_layer=torch.nn.LayerNorm
    )
    original = shaken(layer)
    model = copy.deepcopy(original)
    assert use_window_attention(model) == 1
    assert_same(model, original, torch.randn(2, 5, 24))


def test_parameters_state_and_kind_stay():
    model = vit_e()
    parameters = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    use_window_attention(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    assert isinstance(model.blocks[0].attn, EvaAttention)


def test_a_changed_model_can_be_copied_pickled_and_changed_again(prefixes):
    original = vit_e()
    model = copy.deepcopy(original)
    assert use_window_attention(model) == 2
    assert use_window_attention(model) == 0
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert_same(model, original, images())
    assert len(prefixes) == 2


def test_a_changed_model_compiles_in_one_graph():
    original = vit_e()
    model = copy.deepcopy(original)
    use_window_attention(model)
    assert_same(
        model, original, images(), call=torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    )


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: timm.create_model("eva02_tiny_patch14_224", **VIT_E),
            r"blocks\.0\.attn: it is called with the rotary positions of rope; blocks\.1\.attn",
        ),
        (lambda: torch.nn.ModuleDict({"a": AttentionRope(24, 2)}), "a: AttentionRope has rotary positions"),
        (lambda: EvaAttention(24, 2, scale_norm=False, gated=True), "module: its output has a gate"),
        (lambda: type("Biased", (Attention,), {})(24, 2), "module: Biased is derived from timm's attention"),
    ],
    ids=["rope of the model", "rope", "gate", "derived"],
)
def test_what_is_known_at_replacement_raises_and_changes_nothing(build, message):
    module = torch.nn.ModuleDict({"served": Attention(24, 2)})
    refused = build()
    with pytest.raises(NotImplementedError, match=f"window_attention cannot serve {message}"):
        use_window_attention(refused)
    module["refused"] = refused
    with pytest.raises(NotImplementedError, match="cannot serve refused"):
        use_window_attention(module)
    assert type(module["served"]) is Attention


@pytest.mark.parametrize(
    "layer, arguments, message",
    [
        (Attention(24, 2), {"attn_mask": torch.zeros(5, 5)}, "attn_mask"),
        (Attention(24, 2), {"is_causal": True}, "is_causal"),
        (EvaAttention(24, 2, scale_norm=False), {"attn_mask": torch.zeros(5, 5)}, "attn_mask"),
        (EvaAttention(24, 2, scale_norm=False), {"rope": torch.zeros(4, 24)}, "rope"),
        (
            EvaAttention(24, 2, scale_norm=False),
            {"rope": torch.zeros(4, 24), "is_causal": True},
            "rope, is_causal",
        ),
    ],
)
def test_what_a_call_asks_for_raises(layer, arguments, message):
    module = torch.nn.Sequential(copy.deepcopy(layer))
    use_window_attention(module)
    x = torch.randn(2, 5, 24)
    module(x)
    with pytest.raises(NotImplementedError, match=f"^window_attention cannot serve 0: {message}$"):
        module[0](x, **arguments)


def test_attention_dropout_raises_in_training_alone():
    original = vit_e(attn_drop_rate=0.1)
    model = copy.deepcopy(original)
    use_window_attention(model)
    assert_same(model, original, images())
    with pytest.raises(NotImplementedError, match=r"blocks\.0\.attn: attention dropout 0\.1 in training"):
        model.train()(images())


@pytest.mark.parametrize("module", [torch.nn.Linear(2, 2), "a model"])
def test_a_module_without_attention_raises(module):
    rule = "contain an Attention or EvaAttention of timm, got Linear"
    if module == "a model":
        rule = r"be a torch\.nn\.Module, got str"
    with pytest.raises(ValueError, match=f"module must {rule}"):
        use_window_attention(module)

"""attn_implementation="infimm" equals "eager" where it serves, and raises where it does not."""

import subprocess
import sys
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface, masking_utils  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402
from transformers.models.llama.modeling_llama import eager_attention_forward  # noqa: E402
from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: E402

from infimm_kernels.integrations import batched  # noqa: E402
from infimm_kernels.integrations import transformers as hook  # noqa: E402
from tests.integrations import models  # noqa: E402


@pytest.fixture(autouse=True)
def registered():
    hook.register()


@pytest.fixture
def calls(monkeypatch):
    """The packed q, k and v of every call of varlen_attention that a hook makes."""
    seen = []

    def spy(q, k, v, *args, **kwargs):
        seen.append((q, k, v))
        return attention(q, k, v, *args, **kwargs)

    attention = batched.varlen_attention
    monkeypatch.setattr(batched, "varlen_attention", spy)
    monkeypatch.setattr(hook, "varlen_attention", spy)
    return seen


def assert_same(model, eager, inputs, call=None):
    """`call` (or `model`) and `eager` give the same states and gradients; some gradients must exist."""
    call = model if call is None else call
    found = models.outputs_and_gradients(call, dict(model.named_parameters()), inputs)
    expected = models.outputs_and_gradients(eager, dict(eager.named_parameters()), inputs)
    assert len(expected) > 20
    assert_close(found, expected)


def assert_close(found, expected):
    """Within 1e-5 of the largest element: a LayerNorm of zero registers makes gradients of a thousand."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        limit = 1e-5 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[name], value, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


def pixels(batch=3):
    return {"pixel_values": torch.randn(batch, 3, 28, 28, generator=torch.manual_seed(2), requires_grad=True)}


def tokens(batch=2, length=7):
    return torch.arange(3, 3 + batch * length).view(batch, length)


@pytest.mark.parametrize("name", models.TOWERS)
def test_vision_towers_equal_eager(name, calls):
    assert_same(models.tower(name, "infimm"), models.tower(name, "eager"), pixels())
    assert len(calls) == 2


def test_a_model_can_be_switched(calls):
    model, eager = models.tower("clip", "eager"), models.tower("clip", "eager")
    model.set_attn_implementation("infimm")
    assert_same(model, eager, pixels())
    assert len(calls) == 2


def test_projections_are_read_in_place(calls):
    """[batch, heads, seqlen, head_dim] is a view of the projection; undoing it must not copy."""
    module = torch.nn.Module()
    module.is_causal = False
    given = [torch.randn(2, 5, 3, 16).transpose(1, 2) for _ in range(3)]
    out, weights = AttentionInterface()["infimm"](module, *given, None)
    assert [x.data_ptr() for x in calls[0]] == [x.data_ptr() for x in given]
    assert out.shape == (2, 5, 3, 16) and out.is_contiguous() and weights is None


@pytest.mark.parametrize(
    "lengths",
    [{}, {"cu_seq_lens_q": torch.tensor([0, 5, 10]), "cu_seq_lens_k": torch.tensor([0, 9, 18])}],
    ids=["batch", "packed"],
)
def test_grouped_heads_and_a_scale_equal_eager(lengths):
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = False, 3
    q, k, v = torch.randn(2, 6, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    out, _ = AttentionInterface()["infimm"](module, q, k, v, None, scaling=0.7, **lengths)
    torch.testing.assert_close(out, eager_attention_forward(module, q, k, v, None, scaling=0.7)[0])


@pytest.mark.parametrize("config", [{}, {"is_causal": False}], ids=["by the call", "by the config"])
def test_llama_without_causality_equals_eager(config, calls):
    """transformers makes a decoder an encoder by is_causal=False, which overrides its layers' True."""
    model, eager = (models.llama(name, **config).model for name in ("infimm", "eager"))
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 7)}
    assert_same(model, eager, inputs if config else inputs | {"is_causal": False})
    assert len(calls) == 2
    with pytest.raises(NotImplementedError, match="padding"):
        model(tokens(), attention_mask=padded(), is_causal=False)


# --- packed sequences ---------------------------------------------------------------------------------------


def two_images():
    pixel_rows = torch.randn(16 + 24, 3 * 2 * 4 * 4, generator=torch.manual_seed(2), requires_grad=True)
    return {"hidden_states": pixel_rows, "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 6]])}


def test_qwen2_vl_tower_equals_eager(calls):
    assert_same(models.qwen2_vl_tower("infimm"), models.qwen2_vl_tower("eager"), two_images())
    assert len(calls) == 4  # image by image


def test_qwen2_vl_tower_packed_as_for_flash_attention_equals_eager(calls, monkeypatch):
    eager = models.qwen2_vl_tower("eager")
    model = models.qwen2_vl_tower("infimm")
    expected = models.outputs_and_gradients(eager, dict(eager.named_parameters()), two_images())
    monkeypatch.setattr(modeling_qwen2_vl, "is_flash_attention_requested", lambda config: True)
    found = models.outputs_and_gradients(model, dict(model.named_parameters()), two_images())
    assert len(calls) == 2  # both images at once
    assert_close(found, expected)


def test_cu_seq_lens_keep_sequences_apart():
    """int64 lengths and lengths as tensors come from some models; the hint is then left out."""
    packed = {
        "cu_seq_lens_q": torch.tensor([0, 2, 7]),
        "cu_seq_lens_k": torch.tensor([0, 2, 7]),
        "max_length_q": torch.tensor(5),
        "max_length_k": 5,
    }
    model = models.bert("infimm")
    ids, positions = tokens(1), torch.tensor([[0, 1, 0, 1, 2, 3, 4]])
    found = model(ids, position_ids=positions, **packed).last_hidden_state
    apart = [model(ids[:, a:b]).last_hidden_state for a, b in ((0, 2), (2, 7))]
    torch.testing.assert_close(found, torch.cat(apart, 1))
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q and cu_seq_lens_k must be given together"):
        model(ids, cu_seq_lens_q=packed["cu_seq_lens_q"])
    with pytest.raises(ValueError, match=r"cu_seqlens_q must end at the number of tokens \(7\), got 6"):
        model(ids, **packed | {"cu_seq_lens_q": torch.tensor([0, 2, 6])})


# --- masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, torch.ones(2, 7, dtype=torch.int64)], ids=["none", "all true"])
def test_unpadded_text_encoder_equals_eager(mask, calls):
    assert_same(models.bert("infimm"), models.bert("eager"), {"input_ids": tokens(), "attention_mask": mask})
    assert len(calls) == 2


def padded():
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return mask


@pytest.mark.parametrize(
    "mask, message",
    [
        (padded(), "padding in attention_mask"),
        (torch.zeros(2, 1, 7, 7), r"BertSelfAttention: an attention mask \[2, 1, 7, 7\]"),
    ],
    ids=["padded", "ready-made"],
)
def test_masked_text_encoder_raises(mask, message):
    with pytest.raises(NotImplementedError, match=message):
        models.bert("infimm")(tokens(), attention_mask=mask)


def test_cross_attention_of_a_decoder_raises():
    model = models.bert("infimm", is_decoder=True, add_cross_attention=True)
    with pytest.raises(NotImplementedError, match="causal, sliding or custom mask"):
        model(tokens(), encoder_hidden_states=torch.randn(2, 4, 32))


def mask_arguments(**changes):
    bidirectional = masking_utils.bidirectional_mask_function
    arguments = dict(batch_size=2, q_length=7, kv_length=7, mask_function=bidirectional)
    return arguments | dict(allow_is_bidirectional_skip=True) | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"mask_function": masking_utils.causal_mask_function},
            "causal, sliding or custom mask",
        ),
        (
            {"mask_function": masking_utils.sliding_window_bidirectional_mask_function(9)},
            "sliding",
        ),
        ({"allow_is_bidirectional_skip": False}, "its mask as a tensor"),
        ({"attention_mask": torch.ones(2, 6, dtype=torch.bool)}, r"padding: 7 keys, attention_mask \[2, 6\]"),
        ({"attention_mask": torch.ones(2, 7, dtype=torch.bool), "kv_offset": 1}, "padding: 8 keys"),
        ({"attention_mask": padded().bool(), "kv_length": 5, "kv_offset": 2}, "padding in attention_mask"),
    ],
)
def test_mask_function_raises(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        AttentionMaskInterface()["infimm"](**mask_arguments(**changes))


def test_mask_function_looks_at_the_keys_of_the_call_alone():
    assert AttentionMaskInterface()["infimm"](**mask_arguments()) is None
    changes = {"attention_mask": padded().bool(), "kv_length": 5}
    assert AttentionMaskInterface()["infimm"](**mask_arguments(**changes)) is None


# --- causal models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"use_cache": False},
        {"is_causal": True},
        {"attention_mask": torch.ones(2, 7, dtype=torch.int64)},
        {"attention_mask": torch.zeros(2, 1, 7, 7)},
        {"attention_mask": torch.zeros(2, 1, 7, 7), "is_causal": False},
    ],
    ids=["prefill", "no cache", "is_causal", "all true", "ready-made", "ready-made, is_causal=False"],
)
def test_llama_raises(inputs):
    with pytest.raises(NotImplementedError, match="infimm_kernels"):
        models.llama("infimm")(tokens(), **inputs)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_llama_generate_raises(cache_implementation):
    with pytest.raises(NotImplementedError, match="causal"):
        models.llama("infimm").generate(
            tokens(), max_new_tokens=2, do_sample=False, cache_implementation=cache_implementation
        )


def test_llama_decoding_raises():
    """A cache filled by eager attention, then one token: nothing to mask, and refused all the same."""
    model = models.llama("eager")
    cache = model(tokens()[:, :6], use_cache=True).past_key_values
    model.set_attn_implementation("infimm")
    with pytest.raises(NotImplementedError, match="causal"):
        model(tokens()[:, 6:], past_key_values=cache)


@pytest.mark.parametrize("masks", ["skipped", "sdpa's"])
def test_llama_raises_when_its_mask_is_left_out(masks, monkeypatch):
    """transformers makes no mask for an implementation without a mask function, and sdpa's leaves a plain
    causal mask to the kernel: either way a layer is called with attention_mask=None."""
    mapping = dict(AttentionMaskInterface._global_mapping)
    del mapping["infimm"]
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", mapping)
    if masks == "sdpa's":
        mapping["infimm"] = masking_utils.sdpa_mask
    with pytest.raises(NotImplementedError, match="LlamaAttention: causal attention"):
        models.llama("infimm")(tokens())


def test_causal_clip_text_raises():
    """Its layers say is_causal=False, and only the call says the opposite."""
    arguments = models.TEXT | dict(max_position_embeddings=16)
    model = models.build(transformers.CLIPTextModel, transformers.CLIPTextConfig, arguments, "infimm")
    with pytest.raises(NotImplementedError, match="causal"):
        model(tokens())


# --- other refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"is_causal": True}, "causal attention"),
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"scaling": torch.tensor(1.0)}, "a tensor as scaling"),
        ({"sliding_window": 4}, "the argument sliding_window"),
        ({"softcap": 30.0}, "the argument softcap"),
        ({"s_aux": torch.zeros(3)}, "the argument s_aux"),
        ({"sinks": torch.zeros(3)}, "the argument sinks"),
        ({"position_bias": torch.zeros(1, 3, 5, 5)}, "the argument position_bias"),
        ({"head_mask": torch.ones(3)}, "the argument head_mask"),
        ({"indices": torch.zeros(2, 5, 1)}, "the argument indices"),
        ({"output_attentions": True}, "the argument output_attentions"),
        ({"key": torch.randn(1, 3, 5, 16), "value": torch.randn(1, 3, 5, 16)}, "2 queries and 1 keys"),
        ({"value": torch.randn(2, 3, 5, 8)}, "head_dim 16 of the keys and 8 of the values"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_unserved_argument_raises(changes, message):
    module = torch.nn.Module()
    module.is_causal = False
    q = torch.randn(2, 3, 5, 16)
    arguments = {"query": q, "key": q, "value": q, "attention_mask": None}
    nothing = {"softcap": None, "output_attentions": False, "position_ids": torch.arange(5)}
    AttentionInterface()["infimm"](module, **arguments, **nothing)
    with pytest.raises(NotImplementedError, match=f"infimm_kernels cannot serve .* Module: .*{message}"):
        AttentionInterface()["infimm"](module, **arguments | changes)


def test_a_module_that_does_not_say_whether_it_is_causal_raises():
    q = torch.randn(2, 3, 5, 16)
    with pytest.raises(NotImplementedError, match="neither the call nor the module says is_causal=False"):
        AttentionInterface()["infimm"](torch.nn.Module(), q, q, q, None)
    AttentionInterface()["infimm"](torch.nn.Module(), q, q, q, None, is_causal=False)


def test_every_reason_is_listed():
    q = torch.randn(2, 3, 5, 16)
    with pytest.raises(NotImplementedError, match="causal attention; dropout 0.5; the argument softcap"):
        AttentionInterface()["infimm"](torch.nn.Module(), q, q, q, None, 0.5, is_causal=True, softcap=1.0)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_attention_weights_are_refused(name):
    """SigLIP's layers never see output_attentions; transformers then returned an empty tuple of weights."""
    with pytest.raises(NotImplementedError, match="the argument output_attentions"):
        models.tower(name, "infimm")(**pixels(), output_attentions=True)
    models.tower(name, "infimm")(**pixels(), output_hidden_states=True)


def test_dropout_raises_in_training_alone(calls):
    model = models.bert("infimm", attention_probs_dropout_prob=0.1)
    model(tokens())
    assert len(calls) == 2
    with pytest.raises(NotImplementedError, match=r"dropout 0\.1"):
        model.train()(tokens())


# --- torch.compile ------------------------------------------------------------------------------------------


def test_a_vision_tower_compiles_in_one_graph():
    model = models.tower("dinov2", "infimm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(model, models.tower("dinov2", "eager"), pixels(), call=compiled)


def test_a_layer_alone_compiles_in_one_graph():
    """Without its model around it, reading what transformers records would break the graph."""
    layer = models.tower("siglip", "infimm").encoder.layers[0]
    states = torch.randn(2, 17, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(states, None), layer(states, None))


def test_a_padding_mask_is_refused_inside_a_graph_and_read_outside():
    torch.compiler.reset()
    model = models.bert("infimm")
    with pytest.raises(Exception, match="padding cannot be looked for inside torch.compile"):
        torch.compile(model, fullgraph=True, backend="eager")(tokens(), attention_mask=padded())
    with warnings.catch_warnings(), pytest.raises(NotImplementedError, match="padding"):
        warnings.simplefilter("ignore")
        torch.compile(model, backend="eager")(tokens(), attention_mask=padded())


# --- register -----------------------------------------------------------------------------------------------


def test_register_again_and_under_another_name(calls, monkeypatch):
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    hook.register()
    hook.register("windows")
    hook.register("windows")
    models.tower("clip", "windows")(**pixels())
    assert len(calls) == 2


@pytest.mark.parametrize(
    "name", ["sdpa", "eager", "flash_infimm", "flex_infimm", "paged|infimm", "a/b", "", None]
)
def test_a_name_with_a_meaning_of_its_own_is_refused(name):
    with pytest.raises(
        ValueError, match="name must be an identifier without eager, sdpa, flash, flex, paged, got"
    ):
        hook.register(name)


@pytest.mark.parametrize("interface", [AttentionInterface, AttentionMaskInterface])
def test_a_taken_name_is_refused(interface, monkeypatch):
    monkeypatch.setattr(interface, "_global_mapping", interface._global_mapping | {"taken": print})
    with pytest.raises(ValueError, match=f"name must not be registered in {interface.__name__} by others"):
        hook.register("taken")
    assert interface()["taken"] is print


def test_importing_the_package_imports_no_other_library():
    code = (
        "import sys, infimm_kernels, infimm_kernels.integrations\n"
        "print([name for name in ('transformers', 'timm', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Decode attention in the compiled module: its errors; and what its backend refuses."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from infimm_kernels import backends, extension
from infimm_kernels.gated_cross_attention import cuda

POINTERS = ("x", "out", "query", "key", "value", "out_weight", "attn_gate", "key_ranges", "workspace")
CALL = {
    **dict.fromkeys(POINTERS, 4096),
    **dict(workspace_floats=(264 + 12) * 66 + 768, dtype=2, x_dtype=2, gate_dtype=2, max_blocks=264),
    **dict(batch=1, text_len=1, hidden=5120, total=10250, num_heads=12, num_kv_heads=12, head_dim=64),
    **dict(x_stride_sample=5120, x_stride_row=5120, query_stride_sample=768, query_stride_row=768),
    **dict(query_stride_head=64, key_stride_token=768, key_stride_head=64, value_stride_token=768),
    **dict(value_stride_head=64, out_weight_stride_row=768, key_ranges_stride_sample=2),
    **dict(key_ranges_stride_bound=1, softmax_scale=0.125, device=0, stream=0),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_a_launch_is_an_error_not_a_crash(compiled):
    with pytest.raises(RuntimeError) as caught:
        compiled.decode_attention(**CALL)
    assert re.fullmatch(
        r"decode_attention: CUDA error \d+ \(.+\) for x \[1, 1, 5120\] bfloat16, key \[10250, 12, 64\] "
        r"bfloat16 on device 0",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *((dict([(name, 0)]), f"{name} must be a device address, got 0") for name in POINTERS),
        (dict(dtype=3), "dtype must be a code of DTYPES, got 3"),
        (dict(x_dtype=-1), "dtype must be a code of DTYPES, got -1"),
        (dict(gate_dtype=9), "dtype must be a code of DTYPES, got 9"),
        (dict(batch=2049), "batch must be from 0 to 2048, got 2049"),
        (dict(batch=-1), "batch must be from 0 to 2048, got -1"),
        (dict(text_len=9), "text_len must be from 0 to 8, got 9"),
        (dict(hidden=-1), "hidden must be at least 0, got -1"),
        (dict(total=2**30 + 1), f"total must be from 0 to {2**30}, got {2**30 + 1}"),
        (dict(num_heads=0), "num_heads must be from 1 to 4096, got 0"),
        (dict(num_kv_heads=5), "num_kv_heads must divide num_heads (12), got 5"),
        (dict(num_kv_heads=0), "num_kv_heads must divide num_heads (12), got 0"),
        (dict(num_kv_heads=24), "num_kv_heads must divide num_heads (12), got 24"),
        (dict(head_dim=60), "head_dim must be a multiple of 8 up to 256, got 60"),
        (dict(head_dim=264), "head_dim must be a multiple of 8 up to 256, got 264"),
        (dict(head_dim=0), "head_dim must be a multiple of 8 up to 256, got 0"),
        (dict(max_blocks=0), "max_blocks must be from 1 to 512, got 0"),
        (dict(device=-1), "device must be at least 0, got -1"),
        (dict(workspace_floats=18983), "workspace_floats must be at least 18984, got 18983"),
        (dict(batch=2), "workspace_floats must be at least 20544, got 18984"),
    ],
    ids=str,
)
def test_bad_arguments(compiled, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        compiled.decode_attention(**{**CALL, **changes})


@pytest.mark.parametrize(
    "changes", [dict(x=None), dict(value=-1), dict(batch=1.5), dict(hidden=2**70)], ids=str
)
def test_bad_types(compiled, changes):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        compiled.decode_attention(**{**CALL, **changes})


@pytest.mark.parametrize("empty", ["batch", "text_len", "hidden"])
def test_nothing_to_do_launches_nothing(compiled, empty):
    assert compiled.decode_attention(**{**CALL, empty: 0, "x": 0}) is None


def fake_call(
    device="cuda:0", dtype=torch.bfloat16, batch=2, text_len=1, num_heads=4, num_kv_heads=4, head_dim=64
):
    """The tensors of a call, without memory, so that they can be on a GPU that is not there."""
    inner = num_heads * head_dim
    shapes = dict(
        x=(batch, text_len, 40),
        query=(batch, text_len, num_heads, head_dim),
        key=(9, num_kv_heads, head_dim),
        value=(9, num_kv_heads, head_dim),
        out_weight=(40, inner),
        attn_gate=(40,),
    )
    tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    return tensors | dict(key_ranges=torch.empty((batch, 2), dtype=torch.int32, device=device))


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {}, None),
        ({}, dict(num_kv_heads=2, text_len=8, head_dim=112), None),
        (dict(x=torch.float32), {}, None),
        ({}, dict(device="cpu"), "needs tensors on an NVIDIA GPU, x is on cpu"),
        ({}, dict(dtype=torch.float64), "supports bfloat16, x is float64"),
        (dict(attn_gate=torch.float64), {}, "supports bfloat16, attn_gate is float64"),
        (dict(value=torch.float16), {}, "needs value in the dtype of query, bfloat16, it is float16"),
        (dict(key_ranges=torch.int64), {}, "needs int32 key_ranges, they are int64"),
        ({}, dict(head_dim=60), "needs head_dim to be a multiple of 8 up to 256, it is 60"),
        ({}, dict(head_dim=264), "needs head_dim to be a multiple of 8 up to 256, it is 264"),
        (
            {},
            dict(text_len=9),
            f"serves up to 8 new tokens, 2048 samples and {2**30} keys, got 9, 2 and 9",
        ),
        ({}, dict(num_kv_heads=3), "needs 1 to 4096 query heads in whole groups per key head, got 4 and 3"),
    ],
    ids=str,
)
def test_cuda_backend_says_why_not(monkeypatch, changes, options, reason):
    class Module:
        DTYPES = {"bfloat16": 2}
        build_info = staticmethod(lambda: {"archs": ["80+PTX"]})

    if reason is None or "in the dtype of" in reason:
        Module.DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
    monkeypatch.setattr(extension, "_attempt", lambda: (Module, None))
    monkeypatch.setattr(backends, "capability", lambda device: (9, 0))
    with FakeTensorMode():
        tensors = fake_call(**options)
        for name, dtype in changes.items():
            tensors[name] = tensors[name].to(dtype)
        assert cuda.why_not_cuda(**tensors) == reason


def test_cuda_backend_wants_one_device_and_a_fitting_build(monkeypatch):
    class Module:
        DTYPES = {"bfloat16": 2}
        build_info = staticmethod(lambda: {"archs": ["90a"]})

    monkeypatch.setattr(extension, "_attempt", lambda: (None, "not here"))
    monkeypatch.setattr(backends, "capability", lambda device: (8, 0))
    with FakeTensorMode():
        tensors = fake_call()
        assert cuda.why_not_cuda(**tensors) == "not here"
        monkeypatch.setattr(extension, "_attempt", lambda: (Module, None))
        assert "built for 90a, the GPU has compute capability 8.0" in cuda.why_not_cuda(**tensors)
        tensors["key"] = fake_call("cpu")["key"]
        assert cuda.why_not_cuda(**tensors) == "needs key on the device of x (cuda:0), it is on cpu"

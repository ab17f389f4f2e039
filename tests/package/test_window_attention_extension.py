"""Attention for Hopper in the compiled module: its machine code, its errors; and what its backend refuses."""

import re
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from infimm_kernels import backends, extension, varlen_attention
from infimm_kernels.attention import cuda
from tests.package.test_extension import cuda_tool, output_of

POINTERS = ("q", "k", "v", "out", "lse")
CALL = {
    **dict.fromkeys(POINTERS, 4096),
    **dict(cu_seqlens_q=0, cu_seqlens_k=0, dtype=2, total_q=10250, total_k=10250, num_segments=10),
    **dict(seqlen=1025, num_heads=16, num_kv_heads=16, head_dim=112, num_prefix_tokens=1),
    **dict(q_stride_token=5376, q_stride_head=112, k_stride_token=5376, k_stride_head=112),
    **dict(v_stride_token=5376, v_stride_head=112, softmax_scale=0.1, device=0, stream=0),
}
RAGGED = dict(cu_seqlens_q=4096, cu_seqlens_k=4096, seqlen=0)


BACKWARD = {
    **{name: value for name, value in CALL.items() if name != "out"},
    **dict.fromkeys(("dout", "delta", "dq_sum", "dk", "dv"), 4096),
    **dict(dout_stride_token=1792, dout_stride_head=112, dk_stride_token=5376, dk_stride_head=112),
    **dict(dv_stride_token=5376, dv_stride_head=112),
}


@pytest.fixture(scope="module")
def code(extension_file):
    """By (kernel, dtype, head_dim), how often each instruction stands in it."""
    sass = output_of(cuda_tool("cuobjdump"), "-sass", "-arch", "sm_90a", extension_file)
    found = {}
    for name, listing in re.findall(r"Function : (\S+)\n(.*?)(?=\tFunction : |\Z)", sass, re.DOTALL):
        kernel = re.search(r"(window_attention\w*)_kernelI\d*(\w+?)Li(\d+)E", name)
        if kernel is not None:
            opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", listing)
            found[kernel[1], kernel[2].removeprefix("__"), int(kernel[3])] = Counter(opcodes)
    return found


TYPES = ("nv_bfloat16", "half")
FORWARD_KERNELS = [("window_attention", dtype, size) for dtype in TYPES for size in (64, 112, 128)]
BACKWARD_KERNELS = [("window_attention_backward", dtype, size) for dtype in TYPES for size in (64, 112)]


def test_every_kernel_is_there(code):
    assert set(code) == {*FORWARD_KERNELS, *BACKWARD_KERNELS}


@pytest.mark.parametrize("kernel", FORWARD_KERNELS + BACKWARD_KERNELS, ids=str)
def test_exact_products_that_nothing_serialises(code, kernel):
    """Where ptxas waits for each wgmma by itself (C75xx), it opens and closes a group for each."""
    counts, (_, _, head_dim) = code[kernel], kernel
    shapes, expected = Counter(), Counter()
    for opcode, count in counts.items():
        if opcode.startswith("HGMMA"):
            shapes[opcode.split(".")[1]] += count
    if kernel in FORWARD_KERNELS:
        expected["64x128x16"] += 2 * head_dim // 16  # scores: of the first key tile, and in the loop
        expected[f"64x{head_dim}x16"] += 2 * 8  # values: in the loop, and of the last
    else:
        expected["64x64x16"] += 2 * head_dim // 16  # scores and the gradients of the weights
        expected[f"64x{head_dim}x16"] += 4 + 4 + 8  # dv, dk, dq
    assert shapes == expected
    assert (counts["WARPGROUP.ARRIVE"], counts["WARPGROUP.DEPBAR.LE"]) == (3, 4)
    assert not any(opcode.startswith(("LDL", "STL", "HMMA")) for opcode in counts), "it spills"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_a_launch_is_an_error_not_a_crash(compiled):
    with pytest.raises(RuntimeError) as caught:
        compiled.window_attention(**CALL)
    assert re.fullmatch(
        r"window_attention: CUDA error \d+ \(.+\) for q \[10250, 16, 112\], k \[10250, 16, 112\] bfloat16 "
        r"in 10 segments on device 0",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *((dict([(name, 0)]), f"{name} must be a device address, got 0") for name in POINTERS),
        (dict(dtype=3), "dtype must be a code of DTYPES, got 3"),
        (dict(dtype=0), "dtype must be the code of float16 or bfloat16, got float32's"),
        (dict(total_q=-1), f"total_q must be from 0 to {2**30}, got -1"),
        (dict(total_k=2**30 + 1), f"total_k must be from 0 to {2**30}, got {2**30 + 1}"),
        (dict(num_segments=-1), f"num_segments must be from 0 to {2**30}, got -1"),
        (dict(seqlen=-1), "seqlen must be at least 0, got -1"),
        (dict(num_heads=0), "num_heads must be from 1 to 4096, got 0"),
        (dict(num_kv_heads=5), "num_kv_heads must divide num_heads (16), got 5"),
        (dict(num_kv_heads=0), "num_kv_heads must divide num_heads (16), got 0"),
        (dict(head_dim=96), "head_dim must be 64, 112 or 128, got 96"),
        (dict(num_prefix_tokens=9), "num_prefix_tokens must be from 0 to 8, got 9"),
        (dict(softmax_scale=0.0), "softmax_scale must be a positive float32, got 0.000000"),
        (dict(softmax_scale=float("nan")), "softmax_scale must be a positive float32, got nan"),
        (dict(device=-1), "device must be at least 0, got -1"),
        (dict(cu_seqlens_q=4096), "cu_seqlens_k must be given with cu_seqlens_q"),
        (dict(RAGGED, seqlen=5), "seqlen must be 0 with cu_seqlens, got 5"),
        (dict(seqlen=1024), "num_segments * seqlen must be total_q (10250), got 10 * 1024"),
        (dict(total_k=10249), "total_k must be total_q without cu_seqlens (10250), got 10249"),
        (
            dict(RAGGED, num_segments=2**28),
            "(tokens / 128 + num_segments) * num_heads must fit 30 bits, got 10250 tokens, num_segments "
            f"{2**28}, num_heads 16",
        ),
        (
            dict(k=4104),
            "k must have an address and strides of whole 16 bytes, got strides of 5376 and 112 elements",
        ),
        (
            dict(v_stride_head=113),
            "v must have an address and strides of whole 16 bytes, got strides of 5376 and 113 elements",
        ),
    ],
    ids=str,
)
def test_bad_arguments(compiled, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        compiled.window_attention(**{**CALL, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            (dict([(name, 0)]), f"{name} must be a device address, got 0")
            for name in ("q", "k", "v", "dout", "lse", "delta", "dq_sum", "dk", "dv")
        ),
        (dict(head_dim=128), "head_dim must be 64 or 112, got 128"),
        (dict(num_kv_heads=5), "num_kv_heads must divide num_heads (16), got 5"),
        (dict(softmax_scale=-1.0), "softmax_scale must be a positive float32, got -1.000000"),
        (
            dict(dout_stride_token=1793),
            "dout must have an address and strides of whole 16 bytes, got strides of 1793 and 112 elements",
        ),
        (
            dict(dv_stride_head=113),
            "dv must have an address and strides of whole 4 bytes, got strides of 5376 and 113 elements",
        ),
        (dict(dq_sum=4100), "dq_sum must have an address of whole 8 bytes, got 4100"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_backward(compiled, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        compiled.window_attention_backward(**{**BACKWARD, **changes})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_backward_is_an_error_too(compiled):
    with pytest.raises(RuntimeError, match=r"window_attention_backward: CUDA error \d+ .* in 10 segments"):
        compiled.window_attention_backward(**BACKWARD)


@pytest.mark.parametrize(
    "changes", [dict(q=None), dict(k=-1), dict(total_q=1.5), dict(seqlen=2**70)], ids=str
)
def test_bad_types(compiled, changes):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        compiled.window_attention(**{**CALL, **changes})


def test_nothing_to_do_launches_nothing(compiled):
    nothing = dict(total_q=0, total_k=0, num_segments=0, q=0)
    assert compiled.window_attention(**{**CALL, **nothing}) is None
    assert compiled.window_attention(**{**CALL, **RAGGED, "total_q": 0, "out": 0}) is None


@pytest.mark.parametrize(
    ("options", "archs", "capability", "reason"),
    [
        ({}, ["80+PTX", "90a"], (9, 0), None),
        (dict(dtype=torch.float16, shape=(9, 4, 64)), ["90a"], (9, 0), None),
        (dict(device="cpu"), ["90a"], (9, 0), "needs tensors on an NVIDIA GPU, got cpu"),
        (dict(dtype=torch.float32), ["90a"], (9, 0), "supports bfloat16 and float16, got float32"),
        (dict(shape=(9, 4, 96)), ["90a"], (9, 0), "head_dim must be one of 64, 112, 128, got 96"),
        (
            dict(shape=(9, 5000, 64)),
            ["90a"],
            (9, 0),
            f"serves up to 4096 heads and {2**30} tokens, got [9, 5000, 64]",
        ),
        ({}, ["80+PTX", "90"], (9, 0), "the CUDA extension is built for 80+PTX;90, without 90a"),
        (
            {},
            ["90a"],
            (10, 0),
            "the CUDA extension is built for 90a, the GPU has compute capability 10.0",
        ),
    ],
    ids=str,
)
def test_cuda_backend_says_why_not(monkeypatch, options, archs, capability, reason):
    class Module:
        build_info = staticmethod(lambda: {"archs": archs})

    if "90a" in archs:
        Module.window_attention = None
    monkeypatch.setattr(extension, "_attempt", lambda: (Module, None))
    monkeypatch.setattr(backends, "capability", lambda device: capability)
    options = dict(device="cuda:0", dtype=torch.bfloat16, shape=(9, 4, 112)) | options
    with FakeTensorMode():
        q = torch.empty(options["shape"], dtype=options["dtype"], device=options["device"])
        assert cuda.why_not_cuda(q, q, q) == reason


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "_attempt", lambda: (None, "not here"))
    q, cu_seqlens = torch.zeros(2, 1, 64), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="got 'cuda': not here"):
        varlen_attention(q, q, q, cu_seqlens, cu_seqlens, backend="cuda")

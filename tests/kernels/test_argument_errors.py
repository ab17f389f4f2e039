"""Bad input: a ValueError that names the argument, the rule and the value; never a crash."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infimm_kernels import (
    add_position_2d,
    decode_segments,
    gated_cross_attention,
    gated_residual_projection,
    media_segments,
    varlen_attention,
    window_attention,
)
from infimm_kernels.testing import packed_lengths

T = torch.randn
CU = packed_lengths((2, 3))


def varlen(**change):
    return varlen_attention(
        **(
            {"q": T(5, 2, 8), "k": T(5, 2, 8), "v": T(5, 2, 8), "cu_seqlens_q": CU, "cu_seqlens_k": CU}
            | change
        )
    )


def window(**change):
    return window_attention(**({"qkv": T(2, 5, 3, 2, 8)} | change))


def position(**change):
    return add_position_2d(**({"x": T(2, 9, 8), "positions": torch.zeros(2, 2).long()} | change))


def gated(**change):
    return gated_residual_projection(
        **({"x": T(2, 4, 8), "o": T(2, 4, 6), "weight": T(8, 6), "gate": T(8)} | change)
    )


SEGMENTS = media_segments(torch.tensor([[False, True, False]]), [5], [1])


def cross(**change):
    names = ("x", "query", "key", "value", "out_weight", "attn_gate")
    legal = (T(1, 3, 8), T(1, 3, 2, 4), T(5, 2, 4), T(5, 2, 4), T(8, 8), T(8))
    return gated_cross_attention(**(dict(zip(names, legal, strict=True)) | {"segments": SEGMENTS} | change))


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


BAD = [
    (varlen, {"q": None}, "q must be a torch.Tensor, got NoneType"),
    (varlen, {"q": T(5, 16)}, "q must have shape [total_q, num_heads, head_dim], got [5, 16]"),
    (varlen, {"k": T(5, 2, 8).to_sparse()}, "k must be a dense tensor, got torch.sparse_coo"),
    (varlen, {"q": torch.nested.nested_tensor([T(5, 2, 8)])}, "q must be a dense tensor, got a nested one"),
    (
        varlen,
        {"q": T(5, 2, 8).long()},
        "q must have dtype float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (varlen, {"k": T(5, 2, 8).double()}, "k must have the dtype of q (torch.float32), got torch.float64"),
    (varlen, {"v": T(5, 2, 8, device="meta")}, "v must be on the device of q (cpu), got meta"),
    (varlen, {"q": T(5, 0, 8)}, "q must have at least one head and one channel, got [5, 0, 8]"),
    (varlen, {"k": T(5, 2, 4)}, "k must have the head_dim of q (8), got [5, 2, 4]"),
    (varlen, {"k": T(5, 0, 8)}, "k must have a number of heads that divides the 2 heads of q, got [5, 0, 8]"),
    (varlen, {"q": T(5, 3, 8)}, "k must have a number of heads that divides the 3 heads of q, got [5, 2, 8]"),
    (varlen, {"v": T(5, 1, 8)}, "v must have the shape of k [5, 2, 8], got [5, 1, 8]"),
    (varlen, {"cu_seqlens_q": [0, 2, 5]}, "cu_seqlens_q must be a torch.Tensor, got list"),
    (varlen, {"cu_seqlens_q": CU.long()}, "cu_seqlens_q must have dtype torch.int32, got torch.int64"),
    (varlen, {"cu_seqlens_q": CU[None]}, "cu_seqlens_q must have shape [num_segments + 1], got [1, 3]"),
    (varlen, {"cu_seqlens_q": CU[:0]}, "cu_seqlens_q must have at least one element, got [0]"),
    (varlen, {"cu_seqlens_k": CU.to("meta")}, "cu_seqlens_k must be on the device of q (cpu), got meta"),
    (varlen, {"cu_seqlens_k": ints(0, 5)}, "cu_seqlens_k must have the shape of cu_seqlens_q [3], got [2]"),
    (varlen, {"cu_seqlens_q": ints(1, 2, 5)}, "cu_seqlens_q must start at 0, got 1"),
    (varlen, {"cu_seqlens_k": ints(0, 6, 5)}, "cu_seqlens_k must be non-decreasing, got 5 after 6"),
    (varlen, {"cu_seqlens_k": ints(0, 2, 4)}, "cu_seqlens_k must end at the number of tokens (5), got 4"),
    (varlen, {"cu_seqlens_q": ints(0, 2, 9)}, "cu_seqlens_q must end at the number of tokens (5), got 9"),
    (varlen, {"max_seqlen_q": 2}, "max_seqlen_q must be at least the longest segment (3), got 2"),
    (varlen, {"max_seqlen_k": -1}, "max_seqlen_k must be a non-negative integer or None, got -1"),
    (varlen, {"max_seqlen_k": "3"}, "max_seqlen_k must be a non-negative integer or None, got 3"),
    (varlen, {"num_prefix_tokens": 9}, "num_prefix_tokens must be an integer from 0 to 8, got 9"),
    (varlen, {"num_prefix_tokens": True}, "num_prefix_tokens must be an integer from 0 to 8, got True"),
    (varlen, {"softmax_scale": float("inf")}, "softmax_scale must be a finite number or None, got inf"),
    (varlen, {"softmax_scale": "x"}, "softmax_scale must be a finite number or None, got x"),
    (varlen, {"return_lse": 1}, "return_lse must be True or False, got 1"),
    (varlen, {"backend": "cudnn"}, "backend must be None or one of reference, triton, cuda, got 'cudnn'"),
    (
        window,
        {"qkv": T(5, 3, 2, 8)},
        "qkv must have shape [num_windows, seqlen, 3, num_heads, head_dim] without",
    ),
    (
        window,
        {"cu_seqlens": CU},
        "qkv must have shape [total, 3, num_heads, head_dim] with cu_seqlens, got [2, 5,",
    ),
    (
        window,
        {"qkv": T(2, 5, 2, 2, 8)},
        "qkv must have 3 as its third dimension from the end, got [2, 5, 2, 2, 8]",
    ),
    (
        window,
        {"qkv": T(2, 5, 3, 2, 0)},
        "qkv must have at least one head and one channel, got [2, 5, 3, 2, 0]",
    ),
    (window, {"max_seqlen": 4}, "max_seqlen must be at least the longest segment (5), got 4"),
    (window, {"max_seqlen": "a"}, "max_seqlen must be a non-negative integer or None, got a"),
    (
        window,
        {"qkv": T(6, 3, 2, 8), "cu_seqlens": CU},
        "cu_seqlens must end at the number of tokens (6), got 5",
    ),
    (position, {"x": T(2, 9)}, "x must have shape [num_windows, seqlen, hidden], got [2, 9]"),
    (
        position,
        {"x": T(2, 9, 6)},
        "x must have a hidden size that is a positive multiple of 4, got [2, 9, 6]",
    ),
    (
        position,
        {"positions": torch.zeros(2, 2)},
        "positions must have dtype torch.int32 or torch.int64, got torch.fl",
    ),
    (
        position,
        {"positions": torch.zeros(3, 2).int()},
        "positions must have shape [num_windows, 2] = [2, 2], got [3,",
    ),
    (position, {"granularity": "patch"}, "granularity must be 'window' or 'token', got 'patch'"),
    (
        position,
        {"num_prefix_tokens": 1, "granularity": "token"},
        "window_shape must be given when the number of patc",
    ),
    (
        position,
        {"window_shape": (2, 4), "granularity": "token"},
        "window_shape must hold the 9 patches of a window, ",
    ),
    (
        position,
        {"window_shape": (-3, -3), "granularity": "token"},
        "window_shape must hold the 9 patches of a windo",
    ),
    (
        position,
        {"window_shape": 3, "granularity": "token"},
        "window_shape must be a pair of integers (h, w), got 3",
    ),
    (
        position,
        {"x": T(2, 1, 8), "num_prefix_tokens": 2},
        "num_prefix_tokens must be at most the number of tokens of",
    ),
    (gated, {"x": T(())}, "x must have at least one dimension, got []"),
    (
        gated,
        {"o": T(2, 3, 6)},
        "o must have shape [..., inner] with the leading shape of x = [2, 4, 6], got [2, 3, 6]",
    ),
    (gated, {"weight": T(6, 8)}, "weight must have shape [hidden, inner] = [8, 6], got [6, 8]"),
    (gated, {"weight": T(8)}, "weight must have shape [hidden, inner], got [8]"),
    (gated, {"gate": T(6)}, "gate must have shape [hidden] = [8], got [6]"),
    (
        gated,
        {"x": T(2, 4, 8).int()},
        "x must have dtype float16, bfloat16, float32 or float64, got torch.int32",
    ),
    (
        gated,
        {"o": T(2, 4, 6).int()},
        "o must have dtype float16, bfloat16, float32 or float64, got torch.int32",
    ),
    (
        gated,
        {"o": T(2, 4, 6).double(), "weight": T(8, 6).double()},
        "o must have the dtype of x (torch.float32) or a narrower one, got torch.float64",
    ),
    (
        gated,
        {
            "x": T(2, 4, 8).half(),
            "o": T(2, 4, 6).bfloat16(),
            "weight": T(8, 6).bfloat16(),
            "gate": T(8).half(),
        },
        "o must have the dtype of x (torch.float16) or a narrower one, got torch.bfloat16",
    ),
    (gated, {"o": T(2, 4, 6).half()}, "weight must have the dtype of o (torch.float16), got torch.float32"),
    (
        gated,
        {"gate": T(8).half()},
        "gate must have the dtype of x (torch.float32) or of weight (torch.float32), got torch.float16",
    ),
    (
        gated,
        {"o": T(2, 4, 6).bfloat16(), "weight": T(8, 6).bfloat16(), "gate": T(8).double()},
        "gate must have the dtype of x (torch.float32) or of weight (torch.bfloat16), got torch.float64",
    ),
    (gated, {"o": T(2, 4, 6, device="meta")}, "o must be on the device of x (cpu), got meta"),
    (gated, {"weight": T(8, 6, device="meta")}, "weight must be on the device of o (cpu), got meta"),
    (gated, {"gate": T(8, device="meta")}, "gate must be on the device of x (cpu), got meta"),
    (gated, {"row_mask": torch.ones(2, 4)}, "row_mask must have dtype torch.bool, got torch.float32"),
    (
        gated,
        {"row_mask": torch.ones(2, 3) > 0},
        "row_mask must have shape the leading shape of x = [2, 4], got [2, 3]",
    ),
    (
        gated,
        {"x": T(2, 4, 0), "weight": T(0, 6), "gate": T(0)},
        "weight must have at least one row and one column, g",
    ),
    (
        gated,
        {"backend": "cuda"},
        "backend must name a backend that can run gated_residual_projection, got 'cuda': ga",
    ),
    (varlen, {"softmax_scale": 10**400}, "softmax_scale must be a finite number or None, got 1000"),
    (
        position,
        {"granularity": "token", "window_shape": (3.0, 3)},
        "window_shape must be a pair of integers (h, w), got (3.0, 3)",
    ),
    (
        position,
        {"granularity": "token", "window_shape": (float("inf"), 1)},
        "window_shape must be a pair of integers (h, w), got (inf, 1)",
    ),
    (position, {"granularity": "token", "window_shape": "33"}, "window_shape must be a pair of integers"),
    (
        cross,
        {"key": T(5, 2, 3)},
        "key must have the head_dim of query (4) and a divisor of its 2 heads, got [5, 2, 3]",
    ),
    (cross, {"key": T(5, 3, 4)}, "key must have the head_dim of query (4) and a divisor of its 2 heads"),
    (cross, {"value": T(6, 2, 4)}, "value must have shape the shape of key = [5, 2, 4], got [6, 2, 4]"),
    (cross, {"out_weight": T(8, 7)}, "out_weight must have shape [hidden, num_heads * head_dim] = [8, 8]"),
    (cross, {"attn_gate": T(7)}, "attn_gate must have shape [hidden] = [8], got [7]"),
    (cross, {"segments": None}, "segments must be MediaSegments, got NoneType"),
    (
        cross,
        {"segments": SEGMENTS._replace(text_mask=None)},
        "segments.text_mask must be a torch.Tensor, got NoneType",
    ),
]


@pytest.mark.parametrize(
    ("call", "change", "message"), BAD, ids=[f"{c.__name__}-{m[:40]}" for c, _, m in BAD]
)
def test_message(call, change, message):
    with pytest.raises(ValueError) as raised:
        call(**change)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("call", [varlen, window, position, gated, cross])
def test_the_unchanged_call_is_legal(call):
    assert call().isfinite().all()


SHAPES = st.lists(st.integers(0, 6), max_size=5)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int32, torch.bool, torch.complex64])
TENSORS = st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), SHAPES, DTYPES)
ODD_VALUES = st.one_of(
    TENSORS,
    st.none(),
    st.integers(-3, 99),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=3),
)
NAMES = {
    varlen: [
        "q",
        "k",
        "v",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "num_prefix_tokens",
        "softmax_scale",
    ],
    window: [
        "qkv",
        "cu_seqlens",
        "max_seqlen",
        "num_prefix_tokens",
        "softmax_scale",
        "return_lse",
        "backend",
    ],
    position: ["x", "positions", "granularity", "window_shape", "num_prefix_tokens", "backend"],
    gated: ["x", "o", "weight", "gate", "row_mask", "backend"],
}


@pytest.mark.parametrize("call", list(NAMES), ids=lambda call: call.__name__)
@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_argument_gives_a_result_or_a_value_error(call, data):
    names = data.draw(st.lists(st.sampled_from(NAMES[call]), min_size=1, max_size=3, unique=True))
    change = {name: data.draw(ODD_VALUES) for name in names}
    try:
        call(**change)
    except ValueError as error:
        assert " must " in str(error)


@settings(max_examples=150)
@given(st.lists(st.integers(-2, 8), min_size=1, max_size=5))
def test_any_cu_seqlens_gives_a_result_or_a_value_error(values):
    legal = values[0] == 0 and values[-1] == 5 and values == sorted(values)
    cu_seqlens = ints(*values)
    if legal:
        varlen(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
        return
    with pytest.raises(ValueError, match="cu_seqlens_q must"):
        varlen(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)


def test_segments_refuse_more_tokens_than_int32_counts():
    """Cumulative lengths wrapped to negative numbers, which a kernel would have clamped without a word."""
    with pytest.raises(ValueError, match="vision_seqlens must count at most 2147483647 tokens"):
        media_segments(torch.tensor([[True, True]]), [2**31 - 1, 3], [2])
    with pytest.raises(ValueError, match="vision_seqlens must count at most 2147483647 tokens"):
        decode_segments([2**31 - 1, 3], [2])
    with pytest.raises(ValueError, match="text_len must count at most 2147483647 tokens"):
        decode_segments([3], [1], text_len=2**31)


def test_segments_do_not_depend_on_the_default_device():
    """Under `torch.device("meta")` the counts became meta tensors and a false error blamed them."""
    locations = torch.tensor([[False, True, False]])
    with torch.device("meta"):
        made = media_segments(locations, [5], [1])
        decoded = decode_segments([5], [1])
    assert made.cu_seqlens_q.tolist() == [0, 1, 3] and made.cu_seqlens_k.tolist() == [0, 0, 5]
    assert decoded.cu_seqlens_q.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="media_locations must be on a CPU or CUDA device"):
        media_segments(locations.to("meta"), [5], [1])

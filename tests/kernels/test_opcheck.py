"""Every registered op keeps PyTorch's rules: opcheck on each, and none is forgotten."""

import pytest
import torch

from infimm_kernels.testing import packed_lengths
from tests.kernels.cases import attention_inputs, gated_inputs
from tests.kernels.public_calls import POSITIONS, ROW_MASK, packed_window, position, window


def registered_calls():
    ops = torch.ops.infimm_kernels
    q, k, v, cu_q, cu_k = attention_inputs((3, 2, 4), (2, 0, 5), 2, 1, 8)
    qkv, packed, cu = window().inputs[0], packed_window().inputs[0], packed_lengths((4, 0, 5))
    x, o, weight, gate = gated_inputs((2, 4))
    mixed = gated_inputs((2, 4), dtype=(torch.float32, torch.bfloat16, torch.float32))
    dout, dlse = torch.randn(9, 2, 8).double(), torch.randn(2, 9).double()
    plain = [t.detach() for t in (q, k, v)]
    results = [torch.randn(9, 2, 8).double(), torch.randn(2, 9).double()]
    # Three segments of one sample, each of which sees the keys of those before it too.
    ranges = torch.tensor([[[0, 2], [0, 2], [0, 7]], [[0, 9], [3, 9], [5, 9]]], dtype=torch.int32)
    features, kv_weight = torch.randn(3, 5, 8).double(), torch.randn(2, 2, 4, 8).double()
    dkv, place = torch.randn(2, 2, 15, 4).double(), (POSITIONS, "token", 2, 2, 1, None)
    leaves = [t.clone().requires_grad_() for t in (features, kv_weight)]
    norm = [torch.randn(shape).double().requires_grad_() for shape in ((3, 5, 8), (3, 5, 8), (8,), (8,))]
    narrow = [norm[0].detach().float(), *(t.detach().bfloat16() for t in norm[1:])]
    statistics = [norm[1].detach(), norm[2].detach(), *torch.rand(2, 3, 5).double()]
    step = [torch.randn(s).double() for s in ((2, 3, 6), (2, 3, 2, 4), (5, 2, 4), (5, 2, 4), (6, 8), (6,))]
    key_ranges = torch.tensor([[1, 4], [0, 0]], dtype=torch.int32)
    return {
        "varlen": (ops.varlen_attention, (q, k, v, cu_q, cu_k, 0.3, 0, None)),
        "varlen backward": (
            ops.varlen_attention_backward,
            (*plain, *results, dout, None, cu_q, cu_k, 0.3, 0, None),
        ),
        "varlen lse backward": (
            ops.varlen_attention_backward,
            (*plain, *results, dout, dlse, cu_q, cu_k, 0.3, 1, None),
        ),
        "overlapping": (ops.overlapping_attention, (q, k, v, cu_q, cu_k, *ranges, 0.3, None)),
        "overlapping backward": (
            ops.overlapping_attention_backward,
            (*plain, *results, dout, dlse, cu_q, cu_k, *ranges, 0.3, None),
        ),
        "window": (ops.window_attention, (qkv, None, 0.3, 1, None)),
        "packed window": (ops.window_attention, (packed, cu, 0.3, 1, "reference")),
        "window backward": (
            ops.window_attention_backward,
            (packed.detach(), *results, dout, None, cu, 0.3, 1, None),
        ),
        "position": (ops.add_position_2d, (position().inputs[0], POSITIONS, "token", 2, 2, 1, None)),
        "position, out": (ops.add_position_2d_out, (features.clone(), *place, torch.empty(3, 5, 8).double())),
        "post-norm": (ops.residual_post_norm, (*norm, 1e-6, None, "window", 1, 1, 0, None)),
        "post-norm, mixed dtypes": (ops.residual_post_norm, (*narrow, 1e-6, *place)),
        "post-norm backward": (
            ops.residual_post_norm_backward,
            (features, *statistics, True, True, None),
        ),
        "post-norm backward, y alone": (
            ops.residual_post_norm_backward,
            (features, *statistics, True, False, None),
        ),
        "post-norm backward, sums alone": (
            ops.residual_post_norm_backward,
            (features, *statistics, False, True, None),
        ),
        "keys and values": (ops.vision_keys_values, (*leaves, *place)),
        "keys and values, no position": (ops.vision_keys_values, (*leaves, None, "window", 1, 1, 0, None)),
        "keys and values backward, features": (
            ops.vision_keys_values_backward_features,
            (dkv, kv_weight, None),
        ),
        "keys and values backward, weight": (
            ops.vision_keys_values_backward_weight,
            (dkv, features, *place),
        ),
        "decode": (ops.gated_cross_attention_decode, (*step, key_ranges, 3, 0.3, None)),
        "gated": (ops.gated_residual_projection, (x, o, weight, gate, ROW_MASK, None)),
        "gated, no mask": (ops.gated_residual_projection, (x, o, weight, gate, None, None)),
        "gated backward": (
            ops.gated_residual_projection_backward,
            (x.detach(), o.detach(), weight.detach(), gate.detach(), ROW_MASK),
        ),
        "gated backward, two of three": (
            ops.gated_residual_projection_backward,
            (x.detach(), o.detach(), weight.detach(), gate.detach(), None, (True, False, True)),
        ),
        "gated, mixed dtypes": (ops.gated_residual_projection, (*mixed, ROW_MASK, None)),
        "gated backward, mixed dtypes": (
            ops.gated_residual_projection_backward,
            (*(t.detach() for t in mixed), ROW_MASK),
        ),
    }


@pytest.mark.parametrize("name", list(registered_calls()))
def test_opcheck(name):
    op, arguments = registered_calls()[name]
    results = torch.library.opcheck(op.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_every_registered_op_is_checked():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "infimm_kernels::" in name
    }
    assert registered == {op.__name__ for op, _ in registered_calls().values()}

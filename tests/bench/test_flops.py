"""The formulas of the ops' backwards against torch's counter on the same products written plainly."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.flops import FORMULAS
from infimm_kernels import varlen_attention, vision_keys_values, window_attention
from infimm_kernels.attention.overlapping import overlapping_attention
from infimm_kernels.gated_residual import gated_residual_projection


def flops(run) -> int:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_()


def attention(q, k, v):
    """[tokens, heads, channels] each."""
    scores = q.transpose(0, 1) @ k.permute(1, 2, 0)
    return scores.softmax(-1) @ v.transpose(0, 1)


def assert_made_again(ours, plain) -> None:
    """The plain backward has four products; ours makes the scores again, a fifth."""
    made = flops(lambda: plain().sum().backward())
    forward = made // 3
    assert flops(lambda: ours().sum().backward()) == made + forward // 2 > 0


def test_window_attention():
    qkv, windows = leaf(2, 5, 3, 2, 8), [leaf(5, 3, 2, 8) for _ in range(2)]
    assert_made_again(
        lambda: window_attention(qkv),
        lambda: torch.stack([attention(*window.unbind(1)) for window in windows]),
    )


def test_varlen_and_overlapping_attention_by_the_lengths_of_their_segments():
    q, k, v = leaf(7, 2, 8), leaf(9, 2, 8), leaf(9, 2, 8)
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 7], [0, 1, 9]))

    def segments(ranges):
        pieces = [attention(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in ranges]
        return torch.cat([piece.flatten() for piece in pieces])

    assert_made_again(
        lambda: varlen_attention(q, k, v, cu_q, cu_k, max_seqlen_q=4, max_seqlen_k=8),
        lambda: segments([((0, 3), (0, 1)), ((3, 7), (1, 9))]),
    )
    key_ranges, query_ranges = (
        torch.tensor(ranges, dtype=torch.int32) for ranges in ([[0, 1], [0, 9]], [[0, 7], [3, 7]])
    )
    assert_made_again(
        lambda: overlapping_attention(q, k, v, cu_q, cu_k, key_ranges, query_ranges, 0.3, None),
        lambda: segments([((0, 3), (0, 1)), ((3, 7), (0, 9))]),
    )


def test_products_by_the_gradients_that_are_needed():
    for needs_features in (False, True):
        for needs_weight in (False, True):
            if not (needs_features or needs_weight):
                continue
            features = torch.randn(3, 5, 16, requires_grad=needs_features)
            weight = torch.randn(2, 2, 8, 16, requires_grad=needs_weight)
            ours = flops(
                lambda f=features, w=weight: vision_keys_values(f, w, num_heads=2)[0][0].sum().backward()
            )
            plain = flops(lambda f=features, w=weight: (f @ w.view(32, 16).T).sum().backward())
            assert ours == plain > 0
            o = torch.randn(1, 6, 8, requires_grad=needs_features)
            out_weight, gate = torch.randn(16, 8, requires_grad=needs_weight), torch.randn(16)
            x = torch.zeros(1, 6, 16)
            ours = flops(
                lambda x=x, o=o, w=out_weight, g=gate: gated_residual_projection(x, o, w, g).sum().backward()
            )
            assert ours == flops(lambda o=o, w=out_weight: (o @ w.T).sum().backward()) > 0

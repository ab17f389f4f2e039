"""When gated_cross_attention goes to the op for a few new tokens, what that op owes to PyTorch, and GPUs."""

import pytest
import torch
from torch.autograd import forward_ad

from infimm_kernels import gated_cross_attention, media_segments
from infimm_kernels.gated_cross_attention import decode
from infimm_kernels.testing import assert_within_twice_eager, max_error
from tests.kernels.test_decode import FLOATS, MANY, NAMES, bits, eager, registered, step

IMAGES = ((6,), (), (3, 4))


@pytest.fixture
def taken(monkeypatch):
    """A list that grows by one with every call of the registered op."""
    calls, original = [], decode.gated_cross_attention_decode

    def counting(*arguments):
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(decode, "gated_cross_attention_decode", counting)
    return calls


def composed(tensors, segments):
    """The differentiable form, which segments without key ranges take."""
    return gated_cross_attention(*tensors, segments._replace(key_ranges=None))


# --- which way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("text_len", [1, 8])
def test_taken_where_no_gradient_is_recorded(guard, text_len, taken):
    tensors, segments = step(IMAGES, text_len)
    parameters = [t.requires_grad_() for t in tensors]
    with guard():
        y = gated_cross_attention(*parameters, segments)
        assert len(taken) == 1
        assert max_error(y, composed(parameters, segments)) < 1e-13
        assert len(taken) == 1


def test_taken_in_grad_mode_where_nothing_needs_a_gradient(taken):
    tensors, segments = step(IMAGES)
    gated_cross_attention(*tensors, segments)
    assert len(taken) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_goes_through_the_differentiable_form(name, taken):
    tensors, segments = step(IMAGES, 2)
    leaf = tensors[NAMES.index(name)].requires_grad_()
    y = gated_cross_attention(*tensors, segments)
    assert not taken
    expected = eager(tensors, segments.key_ranges.tolist())
    assert max_error(y, expected) < 1e-12
    dy = torch.randn_like(y)
    (ours,), (theirs,) = (torch.autograd.grad(out, leaf, dy) for out in (y, expected))
    assert max_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("text_len", [0, 9])
def test_other_lengths_go_through_the_differentiable_form(text_len, taken):
    tensors, segments = step(IMAGES, text_len)
    y = gated_cross_attention(*tensors, segments)
    assert not taken
    assert max_error(y, eager(tensors, segments.key_ranges.tolist())) < 1e-12


def test_the_segments_of_a_text_go_through_the_differentiable_form(taken):
    tensors, _ = step(((6,), (4,)), 5)
    locations = torch.tensor([[False, True, False, False, False], [True] + [False] * 4])
    gated_cross_attention(*tensors, media_segments(locations, [6, 4], [1, 1]))
    assert not taken


def test_transforms_go_through_the_differentiable_form(taken):
    """A registered op has no forward-mode formula: its tangent would be zero without a word."""
    tensors, segments = step(IMAGES, 2)
    tangents = tuple(torch.randn_like(t) for t in tensors)

    def call(*tensors):
        return gated_cross_attention(*tensors, segments)

    ahead, behind = (
        call(*(t + s * d for t, d in zip(tensors, tangents, strict=True))) for s in (1e-6, -1e-6)
    )
    expected = (ahead - behind) / 2e-6
    taken.clear()
    _, tangent = torch.func.jvp(call, tuple(tensors), tangents)
    assert max_error(tangent, expected) < 1e-7
    with forward_ad.dual_level():
        dual = call(*(forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)))
        assert max_error(forward_ad.unpack_dual(dual).tangent, expected) < 1e-7
    batched = torch.func.vmap(call)(*(torch.stack((t, t)) for t in tensors))
    assert max_error(batched[1], call(*tensors)) < 1e-12
    assert len(taken) == 1  # the last call alone

    gradient = torch.func.grad(lambda x: call(x, *tensors[1:]).sum())(tensors[0])
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_the_op_refuses_to_record_a_gradient():
    tensors, segments = step(IMAGES)
    tensors[2].requires_grad_()
    with pytest.raises(RuntimeError, match="gated_cross_attention_decode has no gradient"):
        registered(tensors, segments.key_ranges, 0, None)
    with torch.no_grad():
        assert not registered(tensors, segments.key_ranges, 0, None).requires_grad


# --- the registered op --------------------------------------------------------------------------------------


def test_compiles_without_graph_breaks():
    """One graph for images of other sizes too: the hint must not be a constant of the first."""
    graphs = []

    def counting(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(gated_cross_attention, fullgraph=True, backend=counting, dynamic=True)
    for images in (((6,), (), (3, 4)), ((9,), (7,), ()), ((0, 30), (2, 5), (8,))):
        tensors, segments = step(images, 2)
        assert torch.equal(compiled(*tensors, segments), gated_cross_attention(*tensors, segments))
    assert len(graphs) == 1
    assert any("gated_cross_attention_decode" in target for target in graphs[0])


def test_compiled_with_gradients():
    tensors, segments = step(IMAGES, 2)
    compiled = torch.compile(gated_cross_attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert max_error(compiled(*tensors, segments), composed(tensors, segments)) < 1e-13
    leaves = [t.requires_grad_() for t in tensors]
    ours, expected = compiled(*leaves, segments), composed(leaves, segments)
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    assert max(map(max_error, *gradients)) < 1e-12


def test_meta_tensors():
    tensors, segments = step(IMAGES, 2)
    segments = segments._replace(
        **{
            name: value.to("meta")
            for name, value in segments._asdict().items()
            if isinstance(value, torch.Tensor)
        }
    )
    y = gated_cross_attention(*(t.to("meta") for t in tensors), segments)
    assert (y.shape, y.dtype, y.device.type) == (tensors[0].shape, torch.float64, "meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_residual_stream(dtype):
    tensors, segments = step(IMAGES, 2, dtype=torch.float32)
    x, *branch, gate = tensors
    expected = gated_cross_attention(x, *(t.to(dtype) for t in branch), gate, segments)
    with torch.autocast("cpu", dtype=dtype):
        y = gated_cross_attention(*tensors, segments)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_ranges": [[0, 6]]}, r"segments.key_ranges must be a torch.Tensor, got list"),
        (
            {"key_ranges": torch.zeros(3, 2)},
            r"segments.key_ranges must have dtype torch.int32, got torch.float32",
        ),
        (
            {"key_ranges": torch.zeros(2, 2, dtype=torch.int32)},
            r"segments.key_ranges must have shape \[batch, 2\] = \[3, 2\], got \[2, 2\]",
        ),
        (
            {"key_ranges": torch.zeros(6, dtype=torch.int32)},
            r"segments.key_ranges must have shape \[batch, 2\], got \[6\]",
        ),
        (
            {"key_ranges": torch.zeros(3, 2, dtype=torch.int32, device="meta")},
            r"segments.key_ranges must be on the device of x \(cpu\), got meta",
        ),
        ({"max_keys": 2.5}, "segments.max_keys must be an integer of at most .*, got 2.5"),
        ({"cu_seqlens_k": None}, "segments.cu_seqlens_k must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_segments(change, message):
    tensors, segments = step(IMAGES)
    with pytest.raises(ValueError, match=message):
        gated_cross_attention(*tensors, segments._replace(**change))


def test_vision_tokens_that_the_segments_do_not_count():
    """Ranges are cut to the keys there are, so a missing image would otherwise be a wrong number."""
    tensors, segments = step(IMAGES)
    tensors[2:4] = tensors[2][:-1], tensors[3][:-1]
    message = r"key must have the vision tokens that segments count \(13\), got 12"
    with pytest.raises(ValueError, match=message):
        gated_cross_attention(*tensors, segments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax_scale": float("nan")}, "softmax_scale must be a finite number or None, got nan"),
        ({"backend": "cublas"}, "backend must be None or one of reference, triton, cuda, got 'cublas'"),
        ({"backend": "cuda"}, "backend must name a backend that can run gated_cross_attention, got 'cuda'"),
    ],
)
def test_bad_options(options, message):
    tensors, segments = step(IMAGES)
    with pytest.raises(ValueError, match=message):
        gated_cross_attention(*tensors, segments, **options)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [
        (8, torch.float32, "head_dim must be from 16 to 256, got 8"),
        (16, torch.float64, "float64 is not supported"),
    ],
)
def test_triton_says_why_not(head_dim, dtype, reason, interpreter):
    tensors, segments = step(IMAGES, head_dim=head_dim, dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        gated_cross_attention(*tensors, segments, backend="triton")


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("text_len", [1, 4, 8])
@pytest.mark.parametrize(
    "shape", [(MANY, (4, 2), 112), (((10250,),) * 3, (12, 12), 64)], ids=("many", "long")
)
def test_gpu(shape, text_len, dtype):
    images, heads, head_dim = shape
    tensors, segments = step(images, text_len, heads, head_dim, 5120, dtype, "cuda")
    y, ranges = gated_cross_attention(*tensors, segments), segments.key_ranges.tolist()
    expected = eager([t.double() for t in tensors], ranges)
    assert_within_twice_eager("y", y, eager(tensors, ranges), expected)
    keyless = [first == end for first, end in ranges]
    assert torch.equal(bits(y[keyless]), bits(tensors[0][keyless]))


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_tokens_and_ranges():
    """The ranges are read on the device: one graph serves images of any sizes within the packed tokens."""
    tensors, segments = step(((700,), (1025,), ()), 1, (12, 12), 64, 5120, torch.bfloat16, "cuda")
    static, rest = tensors[0].clone(), tensors[1:]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gated_cross_attention(static, *rest, segments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gated_cross_attention(static, *rest, segments)
    for ranges in ([[0, 700], [700, 1725], [0, 0]], [[5, 9], [0, 0], [0, 1725]], [[0, 0], [1, 2], [3, 400]]):
        static.copy_(torch.randn_like(static))
        segments.key_ranges.copy_(torch.tensor(ranges, dtype=torch.int32))
        graph.replay()
        assert torch.equal(y, gated_cross_attention(static, *rest, segments))
        expected = eager([t.double() for t in (static, *rest)], ranges)
        assert_within_twice_eager("y", y, eager((static, *rest), ranges), expected)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gated_cross_attention(static, *rest, segments)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The segments against Flamingo's mask written down directly, and the step built on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infimm_kernels import decode_segments, gated_cross_attention, media_segments
from infimm_kernels.testing import assert_within_twice_eager, max_error
from tests.kernels.cases import MIXED_DTYPES, exact, masked_attention

# Rows of text; X marks an <image> token.
BATCHES = (
    ["..X...", "XX...X", "......"],
    ["X"],
    ["....."],
    ["X....X", ".X..X.", "XXXXXX"],
    ["......", "......"],
    [""],
)


def locations(rows):
    return torch.tensor([[c == "X" for c in row] for row in rows], dtype=torch.bool).view(len(rows), -1)


def hidden_mask(rows, vision_seqlens, immediate=True):
    """[text, vision]: True unless the vision token is of the last <image> at or before the text token.

    Unless `immediate`, those of earlier images of the sample are seen too.
    """
    image_of_key = [i for i, n in enumerate(vision_seqlens) for _ in range(n)]
    mask, image = [], -1
    for row in rows:
        seen = []
        for c in row:
            if c == "X":
                image += 1
                seen = [image] if immediate else [*seen, image]
            mask.append([i not in seen for i in image_of_key])
    return torch.tensor(mask, dtype=torch.bool).view(sum(map(len, rows)), len(image_of_key))


def step_inputs(rows, vision_seqlens):
    text_len = len(rows[0])
    shapes = ((len(rows), text_len, 12), (len(rows), text_len, 2, 4), (sum(vision_seqlens), 2, 4))
    x, query, key = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    value = torch.randn_like(key).requires_grad_()
    weight = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(12, dtype=torch.float64, requires_grad=True)
    return x, query, key, value, weight, gate


def check_step(rows, vision_seqlens, immediate=True):
    images = [row.count("X") for row in rows]
    option = {"only_attend_immediate_media": immediate}
    segments = media_segments(locations(rows), vision_seqlens, images, **option)
    inputs = x, query, key, value, weight, gate = step_inputs(rows, vision_seqlens)
    y = gated_cross_attention(*inputs, segments)
    hidden = hidden_mask(rows, vision_seqlens, immediate)
    out = masked_attention(query.flatten(0, 1), key, value, hidden)
    expected = x + gate.tanh() * (out.reshape(*x.shape[:2], 8) @ weight.t())
    assert max_error(y, expected) < 1e-12
    dy = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    assert max(map(max_error, ours, theirs)) < 1e-12
    blind = ~segments.text_mask
    assert torch.equal(y[blind], x[blind])
    assert torch.equal(blind.flatten(), hidden_mask(rows, [1] * len(vision_seqlens)).all(1))


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("rows", BATCHES, ids=str)
def test_equals_the_masked_form(rows, immediate):
    check_step(rows, [2 + i % 3 for i in range(sum(row.count("X") for row in rows))], immediate)


@settings(max_examples=40)
@given(st.data())
def test_equals_the_masked_form_for_any_text(data):
    text_len = data.draw(st.integers(1, 7))
    row = st.text("X.", min_size=text_len, max_size=text_len)
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    num_images = sum(row.count("X") for row in rows)
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=num_images, max_size=num_images))
    check_step(rows, lengths, data.draw(st.booleans()))


@pytest.mark.parametrize("dtypes", MIXED_DTYPES, ids=str)
def test_twice_eager_with_a_wider_residual_stream(dtypes):
    rows, vision_seqlens = ["..X...", "XX...X", "......"], [5, 3, 0, 7]
    stream, branch, gate = dtypes
    torch.manual_seed(0)
    inputs = tuple(
        x.detach().to(dtype).requires_grad_()
        for x, dtype in zip(step_inputs(rows, vision_seqlens), (stream, *(branch,) * 4, gate), strict=True)
    )
    segments = media_segments(locations(rows), vision_seqlens, [row.count("X") for row in rows])

    def eager(x, query, key, value, weight, gate):
        out = masked_attention(query.flatten(0, 1), key, value, hidden_mask(rows, vision_seqlens))
        return x + gate.tanh() * torch.nn.functional.linear(out.reshape(*x.shape[:2], 8), weight)

    inputs64 = exact(*inputs)
    results = gated_cross_attention(*inputs, segments), eager(*inputs), eager(*inputs64)
    assert_within_twice_eager("y", *results)
    dy = torch.randn_like(results[0])
    ours, theirs = (torch.autograd.grad(y, inputs, dy) for y in results[:2])
    expected = torch.autograd.grad(results[2], inputs64, dy.double())
    for name, a, b, c in zip(
        ("x", "query", "key", "value", "weight", "gate"), ours, theirs, expected, strict=True
    ):
        assert_within_twice_eager(f"d{name}", a, b, c)


def test_segments_by_hand():
    segments = media_segments(locations(["..X...", "XX...X"]), torch.tensor([5, 6, 7, 8]), (1, 3))
    assert segments.cu_seqlens_q.tolist() == [0, 2, 6, 6, 7, 11, 12]
    assert segments.cu_seqlens_k.tolist() == [0, 0, 5, 5, 11, 18, 26]
    assert segments.cu_seqlens_q.dtype == segments.cu_seqlens_k.dtype == torch.int32
    assert segments.text_mask.tolist() == [[False, False, True, True, True, True], [True] * 6]


def test_overlapping_segments_by_hand():
    rows, option = ["..X...", "XX...X"], {"only_attend_immediate_media": False}
    segments = media_segments(locations(rows), [5, 6, 7, 8], [1, 3], **option)
    keys = [[0, 0], [0, 5], [5, 5], [5, 11], [5, 18], [5, 26]]
    assert segments.segment_key_ranges.tolist() == keys
    queries = [[0, 6], [2, 6], [6, 12], [6, 12], [7, 12], [11, 12]]
    assert segments.segment_query_ranges.tolist() == queries
    with pytest.raises(ValueError, match="only_attend_immediate_media must be True or False, got 0"):
        media_segments(locations(rows), [5, 6, 7, 8], [1, 3], only_attend_immediate_media=0)


def overlapping_step():
    rows, vision_seqlens = ["..X...", "XX...X"], [5, 6, 7, 8]
    option = {"only_attend_immediate_media": False}
    return step_inputs(rows, vision_seqlens), media_segments(
        locations(rows), vision_seqlens, [1, 3], **option
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment_key_ranges": torch.zeros(6, 2)}, "segment_key_ranges must have dtype torch.int32, got"),
        ({"segment_key_ranges": torch.zeros(5, 2).int()}, r"segment_key_ranges must have shape \[num_seg"),
        ({"segment_query_ranges": None}, "segment_query_ranges must be a torch.Tensor, got NoneType"),
        ({"segment_query_ranges": torch.zeros(6, 2, device="meta").int()}, "segment_query_ranges must be on"),
        ({"cu_seqlens_q": torch.zeros(7)}, "cu_seqlens_q must have dtype torch.int32, got torch.float32"),
        ({"cu_seqlens_k": torch.tensor([0, 26]).int()}, r"cu_seqlens_k must have shape \[num_segments"),
    ],
)
def test_wrong_overlapping_segments_are_refused(change, message):
    inputs, segments = overlapping_step()
    with pytest.raises(ValueError, match=message):
        gated_cross_attention(*inputs, segments._replace(**change))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("segments_of", [media_segments, decode_segments], ids=lambda f: f.__name__)
def test_a_forgotten_image_is_refused(segments_of, grad):
    """Ranges of keys are cut to the keys there are: more keys than counted once gave a wrong number."""
    inputs, segments = overlapping_step()
    if segments_of is decode_segments:
        segments = decode_segments([5, 6, 7, 8], [1, 3], text_len=6, only_attend_immediate_media=False)
    x, query, key, *rest = inputs
    key, rest[0] = (torch.cat((t, t[:2])) for t in (key, rest[0]))
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ValueError, match=r"^key must have the vision tokens .*26"),
    ):
        gated_cross_attention(x, query, key, *rest, segments)


@pytest.mark.parametrize("shape", [(2, 6, 0, 4), (2, 6, 2, 0)], ids=str)
@pytest.mark.parametrize("immediate", [True, False])
def test_no_heads_or_channels_are_refused(shape, immediate):
    """Zero heads once divided by zero in the CPU's kernel and took the process down."""
    (x, _, key, _, _, gate), _ = overlapping_step()
    key = key.detach()[..., : shape[3]]
    weight = torch.randn(12, shape[2] * shape[3], dtype=torch.float64)
    step = decode_segments([5, 6, 7, 8], [1, 3], text_len=6, only_attend_immediate_media=immediate)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="query must have at least one head and one channel"),
    ):
        gated_cross_attention(x, torch.randn(shape, dtype=torch.float64), key, key, weight, gate, step)


@pytest.mark.parametrize("grad", [False, True])
def test_generated_text_sees_all_images_of_its_sample(grad):
    """The last rows of a text that was read at once, and the same rows generated after it."""
    rows, vision_seqlens, images = ["..X.X..", "X......", "......."], [5, 6, 7], [2, 1, 0]
    option = {"only_attend_immediate_media": False}
    x, query, *rest = step_inputs(rows, vision_seqlens)
    whole = gated_cross_attention(
        x, query, *rest, media_segments(locations(rows), vision_seqlens, images, **option)
    )
    step = decode_segments(vision_seqlens, images, text_len=2, **option)
    assert step.key_ranges.tolist() == [[0, 11], [11, 18], [0, 0]]
    with torch.set_grad_enabled(grad):
        assert max_error(gated_cross_attention(x[:, 5:], query[:, 5:], *rest, step), whole[:, 5:]) < 1e-12


def test_decode_segments_by_hand():
    segments = decode_segments([5, 6, 7, 8], [1, 0, 3], text_len=2)
    lengths_q, lengths_k = segments.cu_seqlens_q.diff().tolist(), segments.cu_seqlens_k.diff().tolist()
    assert lengths_q == [0, 2, 2, 0, 0, 0, 2]
    assert lengths_k == [0, 5, 0, 0, 6, 7, 8]
    assert segments.text_mask.tolist() == [[True, True], [False, False], [True, True]]


@pytest.mark.parametrize("rows", BATCHES[:5], ids=str)
def test_decoding_continues_the_text(rows):
    """A token generated after the text sees what the text's next token would."""
    images = [row.count("X") for row in rows]
    vision_seqlens = [2 + i % 3 for i in range(sum(images))]
    inputs = step_inputs([row + "." for row in rows], vision_seqlens)
    longer = media_segments(locations([row + "." for row in rows]), vision_seqlens, images)
    expected = gated_cross_attention(*inputs, longer)[:, -1:]
    x, query, *rest = inputs
    y = gated_cross_attention(x[:, -1:], query[:, -1:], *rest, decode_segments(vision_seqlens, images))
    assert max_error(y, expected) < 1e-12


@pytest.mark.parametrize(("images", "sample", "found"), [([1, 2], 1, 1), ([2, 1], 0, 1)])
def test_wrong_number_of_image_tokens_names_the_sample(images, sample, found):
    message = (
        f"media_locations must mark one token per image in sample {sample} \\(2 images\\), got {found} tokens"
    )
    with pytest.raises(ValueError, match=message):
        media_segments(locations(["..X.", "X..."]), [3, 3, 3], images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"media_locations": torch.zeros(2, 4)},
            "media_locations must have dtype torch.bool, got torch.float32",
        ),
        (
            {"media_locations": torch.zeros(4) > 0},
            r"media_locations must have shape \[batch, text_len\], got \[4\]",
        ),
        ({"vision_seqlens": [3]}, r"vision_seqlens must have one entry per image \(2\), got 1"),
        ({"vision_seqlens": [3, -1]}, "vision_seqlens must hold no negative number, got -1"),
        ({"vision_seqlens": [3.5, 1]}, r"vision_seqlens must be a sequence of integers, got \[3.5, 1\]"),
        ({"vision_seqlens": "ab"}, "vision_seqlens must be a sequence of integers, got ab"),
        ({"images_per_sample": [2]}, r"images_per_sample must have one entry per sample \(2\), got 1"),
        ({"images_per_sample": None}, "images_per_sample must be a sequence of integers, got None"),
    ],
)
def test_bad_segments(change, message):
    arguments = {
        "media_locations": locations(["..X.", "X..."]),
        "vision_seqlens": [3, 3],
        "images_per_sample": [1, 1],
    }
    with pytest.raises(ValueError, match=message):
        media_segments(**(arguments | change))


def test_bad_text_len():
    with pytest.raises(ValueError, match="text_len must be a non-negative integer, got -1"):
        decode_segments([1], [1], text_len=-1)


def test_bad_step():
    rows, lengths = ["..X."], [3]
    segments = media_segments(locations(rows), lengths, [1])
    x, query, key, value, weight, gate = step_inputs(rows, lengths)
    with pytest.raises(ValueError, match="segments must be MediaSegments, got tuple"):
        gated_cross_attention(x, query, key, value, weight, gate, tuple(segments))
    with pytest.raises(ValueError, match=r"query must have shape \[batch, text_len, num_heads, head_dim\]"):
        gated_cross_attention(x, query[:, :-1], key, value, weight, gate, segments)
    with pytest.raises(ValueError, match="weight must have shape"):
        gated_cross_attention(x, query, key, value, weight[:, :-1], gate, segments)
    with pytest.raises(
        ValueError, match=r"segments.text_mask must have shape \[batch, text_len\] = \[1, 4\], got"
    ):
        gated_cross_attention(
            x, query, key, value, weight, gate, segments._replace(text_mask=torch.ones(1, 3) > 0)
        )


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        (
            {"x": torch.float32, "attn_gate": torch.float32},
            r"query must have the dtype of x \(torch.float32\) or a narrower one, got torch.float64",
        ),
        (
            {"query": torch.int64},
            "query must have dtype float16, bfloat16, float32 or float64, got torch.int64",
        ),
        ({"key": torch.float32}, r"key must have the dtype of query \(torch.float64\), got torch.float32"),
        (
            {"value": torch.float32},
            r"value must have the dtype of query \(torch.float64\), got torch.float32",
        ),
        (
            {"out_weight": torch.float32},
            r"out_weight must have the dtype of query \(torch.float64\), got torch.float32",
        ),
        (
            {"attn_gate": torch.float32},
            r"attn_gate must have the dtype of x \(torch.float64\) or of out_weight \(torch.float64\)",
        ),
    ],
)
def test_bad_dtypes_of_the_step(dtypes, message):
    names = ("x", "query", "key", "value", "out_weight", "attn_gate")
    inputs = dict(zip(names, step_inputs(["..X."], [3]), strict=True))
    inputs |= {name: inputs[name].detach().to(dtype) for name, dtype in dtypes.items()}
    with pytest.raises(ValueError, match=message):
        gated_cross_attention(**inputs, segments=media_segments(locations(["..X."]), [3], [1]))

"""The CUDA backends of add_position_2d and of decode attention on a GPU, against the fp64 reference."""

import pytest
import torch

from infimm_kernels import add_position_2d, extension
from infimm_kernels.gated_cross_attention.cuda import launch_decode
from infimm_kernels.testing import assert_within_twice_eager, poisoned_allocations
from tests.emulate.decode_attention import formula

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(extension.load() is None, reason=str(extension.why_not())),
]


def example(num_windows, seqlen, hidden, dtype):
    x = torch.randn(num_windows, seqlen, hidden, device="cuda").to(dtype)
    positions = torch.randint(0, 64, (num_windows, 2), device="cuda")
    positions[1:2] = -1
    return x, positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [4, 20, 112, 1792])
@pytest.mark.parametrize(
    ("seqlen", "options"),
    [
        (257, {}),
        (1025, {"num_prefix_tokens": 1}),
        (1025, {"granularity": "token", "num_prefix_tokens": 1}),
        (46, {"granularity": "token", "window_shape": (5, 9), "num_prefix_tokens": 1}),
    ],
)
def test_error_is_at_most_twice_that_of_eager(dtype, hidden, seqlen, options):
    x, positions = example(5, seqlen, hidden, dtype)
    out = add_position_2d(x, positions, backend="cuda", **options)
    exact = add_position_2d(x.double(), positions, backend="reference", **options)
    eager = add_position_2d(x, positions, backend="reference", **options)
    assert (out.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()
    assert torch.equal(out[1], x[1])


def test_any_alignment_and_strides():
    wide, positions = example(4, 66, 133, torch.float16)
    for x in (wide[:, 1:, 5:117], wide[:, ::2, :128], wide[:, :, 2:62].transpose(0, 1)[:4]):
        torch.testing.assert_close(
            add_position_2d(x, positions[: len(x)], backend="cuda"),
            add_position_2d(x, positions[: len(x)], backend="reference"),
        )


def test_graph_replay_reads_the_new_input():
    x, positions = example(3, 257, 1792, torch.bfloat16)
    add_position_2d(x, positions, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = add_position_2d(x, positions, backend="cuda")
    x.normal_()
    positions.fill_(7)
    graph.replay()
    assert torch.equal(out, add_position_2d(x, positions, backend="cuda"))


def test_side_stream():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x, positions = example(3, 257, 1792, torch.bfloat16)
        torch.cuda._sleep(10_000_000)
        x.add_(1)
        out = add_position_2d(x, positions, backend="cuda")
    stream.synchronize()
    assert torch.equal(out, add_position_2d(x, positions, backend="cuda"))


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = torch.zeros(1200, 1025, 1792, dtype=torch.bfloat16, device="cuda")
    positions = torch.stack([torch.arange(1200) % 64, torch.arange(1200) // 64], 1).cuda()
    out = add_position_2d(x, positions, backend="cuda")
    last = add_position_2d(x[-1:, -3:], positions[-1:], backend="reference")
    torch.testing.assert_close(out[-1:, -3:], last)


def decode_example(
    dtype, lengths, text_len=1, num_heads=12, num_kv_heads=12, head_dim=64, hidden=5120, x_dtype=None
):
    """Keyword arguments of `launch_decode`: sample i sees the i-th run of keys, of the given length."""
    inner, total = num_heads * head_dim, sum(lengths)
    ends = torch.tensor(lengths).cumsum(0)

    def random(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    return dict(
        x=random(len(lengths), text_len, hidden).to(x_dtype or dtype),
        query=random(len(lengths), text_len, num_heads, head_dim),
        key=random(total, num_kv_heads, head_dim),
        value=random(total, num_kv_heads, head_dim),
        out_weight=random(hidden, inner) / inner**0.5,
        attn_gate=random(hidden),
        key_ranges=torch.stack([ends - torch.tensor(lengths), ends], 1).to("cuda", torch.int32),
        max_keys=max(lengths),
        softmax_scale=head_dim**-0.5,
    )


def check_decode(arguments):
    tensors = {name: value for name, value in arguments.items() if name != "max_keys"}
    with poisoned_allocations():
        out = launch_decode(**arguments)
    eager, exact = formula(**tensors), formula(**tensors, dtype=torch.float64)
    assert_within_twice_eager("out", out, eager, exact)
    keyless = arguments["key_ranges"][:, 0] == arguments["key_ranges"][:, 1]
    assert torch.equal(out[keyless], arguments["x"][keyless])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text_len", [1, 2, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 112, 128, 256])
def test_decode_error_is_at_most_twice_that_of_eager(dtype, text_len, head_dim):
    lengths = [0, 1, 63, 257, 10250]
    check_decode(decode_example(dtype, lengths, text_len, head_dim=head_dim, hidden=1792))


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_decode_batches(batch):
    check_decode(decode_example(torch.bfloat16, [1025 * (i % 11) for i in range(1, batch + 1)]))


def test_decode_groups_wide_residual_and_odd_strides():
    grouped = dict(num_heads=32, num_kv_heads=8, text_len=4, head_dim=128, hidden=4096)
    check_decode(decode_example(torch.bfloat16, [2050, 0, 700], x_dtype=torch.float32, **grouped))
    arguments = decode_example(torch.float16, [300, 41], text_len=2)
    for name in ("x", "query", "key", "value", "out_weight"):
        wide = torch.nn.functional.pad(arguments[name], (1, 2), value=float("nan"))
        check_decode(arguments | {name: wide[..., 1:-2]})


def test_decode_is_deterministic_over_many_launches():
    """A wait that is too short or a line read from an old cache would show now and then."""
    arguments = decode_example(torch.bfloat16, [10250, 3075, 0, 1025], text_len=2)
    first = launch_decode(**arguments)
    assert all(torch.equal(launch_decode(**arguments), first) for _ in range(300))


def test_decode_graph_replay_reads_the_new_input():
    arguments = decode_example(torch.bfloat16, [5000, 2000])
    launch_decode(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch_decode(**arguments)
    arguments["x"].normal_()
    arguments["key_ranges"].copy_(torch.tensor([[0, 0], [100, 6000]]))
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, launch_decode(**arguments))
    assert torch.equal(out[0], arguments["x"][0])


def test_two_streams_decode_at_once():
    """Both want the whole GPU: blocks of one that wait for room may not make the other wait for ever."""
    calls = [decode_example(torch.bfloat16, [10250] * 4) for _ in range(2)]
    expected = [launch_decode(**arguments) for arguments in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream, arguments in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(launch_decode(**arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i % 2]) for i, out in enumerate(results))

"""The CUDA backend of add_position_2d on a GPU, against the fp64 reference."""

import pytest
import torch

from infimm_kernels import add_position_2d, extension

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

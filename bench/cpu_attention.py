"""window_attention on the CPU against F.scaled_dot_product_attention.

    python -m bench.cpu_attention [--json]

Equal windows against one batched call on the same packed tensor; ragged windows against padding: rows
scattered into zeros, one call with a boolean mask, rows gathered. Index and mask are made beforehand.
A ratio is SDPA's time over ours, so above 1 we are faster; the two run in turns. Times are medians; on a busy
machine, where they measure the others, the ratio of the shortest times says more. A shape whose result breaks
the error rule against float64 stops the run.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infimm_kernels import window_attention
from infimm_kernels.testing import assert_within_twice_eager, packed_lengths

HEAD_DIM = 112
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# num_windows, seqlen, num_heads
UNIFORM = ((160, 65, 1), (4, 257, 16), (1, 1025, 16), (10, 257, 4), (3, 65, 2))
# lengths, num_heads
RAGGED = (
    ((257, 1025, 325, 577, 257, 325), 16),
    (tuple(random.Random(0).choices(range(257, 1026), k=12)), 4),
)
PASSES = ("forward", "forward_backward")

Attention = Callable[[Tensor], Tensor]


def sdpa(qkv: Tensor) -> Tensor:
    """qkv [num_windows, seqlen, 3, num_heads, head_dim] -> [num_windows, seqlen, num_heads, head_dim]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def padded_sdpa(lengths: Sequence[int]) -> Attention:
    """The function of qkv [total, 3, num_heads, head_dim] that pads every window to the longest."""
    longest = max(lengths)
    slots = torch.cat([i * longest + torch.arange(length) for i, length in enumerate(lengths)])
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[
        :, None, None
    ]  # [num_windows, 1, 1, keys]

    def attention(qkv: Tensor) -> Tensor:
        padded = qkv.new_zeros((len(lengths) * longest, *qkv.shape[1:])).index_copy(0, slots, qkv)
        q, k, v = padded.view(len(lengths), longest, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, slots)

    return attention


def eager(qkv: Tensor) -> Tensor:
    """The equation of one window, qkv [seqlen, 3, num_heads, head_dim], in its dtype throughout."""
    q, k, v = qkv.permute(1, 2, 0, 3)
    return ((q @ k.transpose(1, 2) * HEAD_DIM**-0.5).softmax(-1) @ v).transpose(0, 1)


def run(attention: Attention, qkv: Tensor, dout: Tensor, which: str) -> tuple[Tensor, ...]:
    """(out,) or (out, gradient of qkv)."""
    if which == "forward":
        with torch.no_grad():
            return (attention(qkv),)
    qkv = qkv.detach().requires_grad_()
    out = attention(qkv)
    out.backward(dout)
    return out.detach(), qkv.grad


def check(attention: Attention, qkv: Tensor, dout: Tensor, lengths: Sequence[int]) -> None:
    """The error rule for output and gradient of the first and the last window; AssertionError if broken."""
    results = [x.reshape(sum(lengths), -1) for x in run(attention, qkv, dout, "forward_backward")]
    qkv, dout = qkv.view(-1, 3, *qkv.shape[-2:]), dout.view(-1, *dout.shape[-2:])
    for bounds in {(0, lengths[0]), (sum(lengths) - lengths[-1], sum(lengths))}:
        window = slice(*bounds)
        inputs = qkv[window], dout[window]
        same, exact = (run(eager, *x, "forward_backward") for x in (inputs, [x.double() for x in inputs]))
        for name, result, a, b in zip(("out", "dqkv"), results, same, exact, strict=True):
            assert_within_twice_eager(name, result[window], a.flatten(1), b.flatten(1))


def milliseconds(calls: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """The times of each call, taken in turns for about that long, at least three times."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    order = list(enumerate(calls))
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for index, call in order:
            start = time.perf_counter()
            call()
            times[index].append(1e3 * (time.perf_counter() - start))
        order.reverse()
    return times


def compare(
    ours: Attention, theirs: Attention, qkv: Tensor, lengths: Sequence[int], seconds: float
) -> list[dict]:
    """One row per pass, after the check."""
    dout = torch.randn((*qkv.shape[:-3], *qkv.shape[-2:])).to(qkv.dtype)
    check(ours, qkv, dout, lengths)
    rows = []
    for which in PASSES:
        calls = [lambda f=f, which=which: run(f, qkv, dout, which) for f in (ours, theirs)]
        times = milliseconds(calls, seconds)
        ours_ms, sdpa_ms = map(statistics.median, times)
        shortest_ours, shortest_sdpa = map(min, times)
        rows.append(
            {
                "pass": which,
                "ours_ms": ours_ms,
                "sdpa_ms": sdpa_ms,
                "ratio": round(sdpa_ms / ours_ms, 3),
                "ratio_of_shortest": round(shortest_sdpa / shortest_ours, 3),
            }
        )
    return rows


def measure(seconds: float) -> dict:
    """The whole report; `seconds` of timing for each of its rows."""
    torch.manual_seed(0)
    uniform, ragged = [], []
    for num_windows, seqlen, num_heads in UNIFORM:
        for name, dtype in DTYPES.items():
            qkv = torch.randn(num_windows, seqlen, 3, num_heads, HEAD_DIM).to(dtype)
            for row in compare(window_attention, sdpa, qkv, (seqlen,) * num_windows, seconds):
                uniform.append({"shape": list(qkv.shape), "dtype": name, **row})
    for lengths, num_heads in RAGGED:
        cu_seqlens = packed_lengths(lengths)
        for name, dtype in DTYPES.items():
            qkv = torch.randn(sum(lengths), 3, num_heads, HEAD_DIM).to(dtype)

            def ours(qkv: Tensor, cu_seqlens: Tensor = cu_seqlens) -> Tensor:
                return window_attention(qkv, cu_seqlens)

            for row in compare(ours, padded_sdpa(lengths), qkv, lengths, seconds):
                ragged.append({"shape": list(qkv.shape), "lengths": lengths, "dtype": name, **row})
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "uniform": uniform,
        "ragged": ragged,
        "min_uniform_ratio": min(row["ratio"] for row in uniform),
        "min_ragged_ratio": min(row["ratio"] for row in ragged),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_attention", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--threads", type=int, help="of torch; its own choice when not given")
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing for each row (default 0.4)")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        if arguments.threads < 1:
            parser.error(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    report = measure(arguments.seconds)
    if arguments.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{report['threads']} threads, torch {report['torch']}; ratio = SDPA / ours, above 1 we are faster")
    for kind in ("uniform", "ragged"):
        for row in report[kind]:
            print(
                f"{kind:8}{row['shape']!s:24}{row['dtype']:6}{row['pass']:18}"
                f"ours {row['ours_ms']:9.3f} ms  SDPA {row['sdpa_ms']:9.3f} ms  ratio {row['ratio']:6.3f}"
                f"  of shortest {row['ratio_of_shortest']:6.3f}"
            )
    print(f"smallest ratio: uniform {report['min_uniform_ratio']}, ragged {report['min_ragged_ratio']}")


if __name__ == "__main__":
    main()

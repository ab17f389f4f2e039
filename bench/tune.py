"""Tile sizes of the attention kernels against each other on the GPU at hand, next to the shipped ones.

    python -m bench.tune [--windows 40] [--output FILE]

Every candidate runs window_attention at the ViT's shape, must agree with the shipped tiles, and is timed in
turns with all others. Prints a line for each, fastest first, ratios to the shipped tiles; FILE gets them as
JSON. A candidate that does not compile or is wrong is reported as such. What wins goes into triton_launch.py
by hand, with the file under bench/results.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.results import header
from bench.timing import Timed, clock_of, interleave, summarize
from infimm_kernels import window_attention
from infimm_kernels.attention import triton_launch
from infimm_kernels.attention.triton_config import BackwardConfig, ForwardConfig, pieces

HEAD_DIM, NUM_HEADS = 112, 16
SHIPPED = "shipped"


def forward_candidates() -> dict[str, ForwardConfig]:
    exact, padded = pieces(HEAD_DIM, exact=True), pieces(HEAD_DIM, exact=False)
    tiles = [(64, 64, 32, 4), (128, 32, 32, 8), (128, 64, 32, 4), (128, 64, 32, 8), (128, 128, 64, 8)]
    configs = [
        ForwardConfig(widths, m, n, prefix, warps, stages, drop_tail, False)
        for widths in (exact, padded)
        for m, n, prefix, warps in tiles
        for stages in (2, 3)
        for drop_tail in (False, True)
    ]
    return {_name(config): config for config in configs}


def backward_candidates() -> dict[str, BackwardConfig]:
    exact, padded = pieces(HEAD_DIM, exact=True), pieces(HEAD_DIM, exact=False)
    tiles = [(32, 64, 4), (64, 64, 4), (32, 128, 8), (64, 128, 8), (64, 64, 8), (128, 64, 8)]
    configs = [
        BackwardConfig(widths, m, n, warps, stages)
        for widths in (exact, padded)
        for m, n, warps in tiles
        for stages in (1, 2, 3)
    ]
    return {_name(config): config for config in configs}


def _name(config: ForwardConfig | BackwardConfig) -> str:
    widths, *numbers = config
    return f"{'+'.join(map(str, widths))} " + " ".join(str(int(number)) for number in numbers)


@contextlib.contextmanager
def chosen(config: ForwardConfig | BackwardConfig | None) -> Iterator[None]:
    """Launches take `config`, or the shipped one for None."""
    if config is None:
        yield
        return
    name = "forward_config" if isinstance(config, ForwardConfig) else "backward_config"
    shipped = getattr(triton_launch, name)

    def replaced(*args):
        return config if name == "forward_config" else shipped(*args)._replace(fused=config)

    setattr(triton_launch, name, replaced)
    try:
        yield
    finally:
        setattr(triton_launch, name, shipped)


def compare(candidates: dict[str, Any], qkv: torch.Tensor, backward: bool, seconds: float) -> list[dict]:
    """One dict per candidate: name, status, reason, median_us, ratio (shipped time over its own)."""
    dout = torch.randn(*qkv.shape[:2], *qkv.shape[3:], dtype=qkv.dtype, device=qkv.device)
    clock = clock_of(qkv.device)

    def prepare() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = qkv.detach().requires_grad_(backward)
        return leaf, window_attention(leaf, num_prefix_tokens=1, backend="triton") if backward else leaf

    def run(config: Any, state: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        leaf, out = state
        with chosen(config):
            if backward:
                return torch.autograd.grad(out, leaf, dout)[0]
            return window_attention(leaf, num_prefix_tokens=1, backend="triton")

    expected = run(None, prepare())
    tolerance = 1e-2 * float(expected.abs().max())
    timed, rows = {SHIPPED: Timed(prepare, lambda state: run(None, state))}, []
    for name, config in candidates.items():
        try:
            error = float((run(config, prepare()) - expected).abs().max())
        except Exception as refused:  # a tile may ask for more than the GPU has, in any way
            rows.append({"name": name, "status": "failed", "reason": str(refused)[:200]})
            continue
        if not error <= tolerance:
            rows.append({"name": name, "status": "wrong", "reason": f"off by {error:.3g}"})
            continue
        timed[name] = Timed(prepare, lambda state, config=config: run(config, state))
    samples, raised = interleave(clock, timed, seconds)
    medians = {name: summarize(taken).median_us for name, taken in samples.items()}
    rows += [{"name": name, "status": "failed", "reason": str(error)[:200]} for name, error in raised.items()]
    for name, median in medians.items():
        rows.append({"name": name, "status": "ok", "median_us": median, "ratio": medians[SHIPPED] / median})
    return sorted(rows, key=lambda row: row.get("median_us", float("inf")))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, forward and backward each")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device is visible")
    device = torch.device("cuda")
    qkv = torch.randn(options.windows, 1025, 3, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    command = f"python -m bench.tune --windows {options.windows} --seconds {options.seconds:g}"
    found: dict[str, Any] = {"header": header(device, command, 2 * options.seconds)}
    for direction, candidates in (("fwd", forward_candidates()), ("bwd", backward_candidates())):
        found[direction] = compare(candidates, qkv, direction == "bwd", options.seconds)
        for row in found[direction]:
            said = f"{row['median_us']:9.1f} us  x{row['ratio']:.3f}" if "ratio" in row else row["reason"]
            print(f"{direction}  {row['name']:<36}{row['status']:<8}{said}", flush=True)
        if options.output:
            options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

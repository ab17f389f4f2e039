"""A whole gated cross-attention block of the 13 B model against plain PyTorch, feed-forward included.

    python -m bench.cross_attention [--json]

Compared are the block as bench/flamingo.py writes it down (positions added to the features, keys and values
made by every call, dense masked scores) and ours, made of the public ops:

    decode_speedup          that block over ours with keys and values kept, one new token
    decode_vs_cached_sdpa   the same block on kept keys and values through SDPA over ours, one new token
    prefill_cached_speedup  that block over ours with keys and values kept, a text of --tokens
    prefill_speedup         that block over ours, which makes its keys and values too

A speedup is their median time over our median time, above 1 we are faster; the two run in turns. On a busy
machine, where times measure the others, the ratio of the shortest times says more. A result that breaks the
error rule against float64 ends the run without a number.
"""

import argparse
import contextlib
import datetime
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import flamingo, results, timing
from bench.functions import places
from infimm_kernels import MediaSegments, decode_segments, gated_cross_attention, media_segments
from infimm_kernels.gated_feed_forward import gated_feed_forward
from infimm_kernels.testing import assert_within_twice_eager, max_error
from infimm_kernels.vision_keys_values import vision_keys_values

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {
    "tokens": 128,
    "windows": 10,
    "seqlen": 1025,
    "hidden": 5120,
    "vision_hidden": 1792,
    "heads": 12,
    "head_dim": 64,
    "ffn_hidden": 5120,
}


class Inputs(NamedTuple):
    """A text of one image, `text` [1, tokens, hidden], a `token` [1, 1, hidden] behind it, and the image."""

    weights: flamingo.Weights
    text: Tensor
    token: Tensor
    features: Tensor
    position: Tensor
    places: Tensor
    num_heads: int

    @property
    def media_locations(self) -> Tensor:
        """The image stands after the first sixteenth of the text."""
        tokens = self.text.shape[1]
        return torch.arange(tokens, device=self.text.device) == tokens // 16

    @property
    def image_of_key(self) -> Tensor:
        return torch.ones(self.features[..., 0].numel(), dtype=torch.int64, device=self.text.device)

    def to(self, where: torch.dtype | torch.device) -> "Inputs":
        floating = {"weights": flamingo.Weights(*(x.to(where) for x in self.weights))}
        floating |= {
            name: getattr(self, name).to(where) for name in ("text", "token", "features", "position")
        }
        placed = {} if isinstance(where, torch.dtype) else {"places": self.places.to(where)}
        return self._replace(**floating, **placed)


def random_inputs(sizes: dict[str, int]) -> Inputs:
    torch.manual_seed(0)
    found = places(sizes["windows"], torch.device("cpu"))
    inner = sizes["heads"] * sizes["head_dim"]
    return Inputs(
        flamingo.random_weights(sizes["hidden"], sizes["vision_hidden"], inner, sizes["ffn_hidden"]),
        torch.randn(1, sizes["tokens"], sizes["hidden"]),
        torch.randn(1, 1, sizes["hidden"]),
        torch.randn(sizes["windows"], sizes["seqlen"], sizes["vision_hidden"]),
        flamingo.encoding(found, sizes["vision_hidden"]).float(),
        found,
        sizes["heads"],
    )


def exactly(inputs: Inputs) -> Inputs:
    """The same in float64; the positions are no input that was rounded, but sines."""
    position = flamingo.encoding(inputs.places, inputs.features.shape[-1]).to(inputs.features.device)
    return inputs.to(torch.float64)._replace(position=position)


def our_keys_values(inputs: Inputs) -> tuple[Tensor, Tensor]:
    weight = inputs.weights.key_value.unflatten(0, (1, 2, -1))  # [1 layer, keys and values, inner, vision]
    options = {"num_heads": inputs.num_heads, "positions": inputs.places}
    return vision_keys_values(inputs.features, weight, **options)[0]


def our_block(inputs: Inputs, x: Tensor, key: Tensor, value: Tensor, segments: MediaSegments) -> Tensor:
    w = inputs.weights
    normed = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, flamingo.EPS)
    query = F.linear(normed, w.query).unflatten(-1, (inputs.num_heads, -1))
    x = gated_cross_attention(x, query, key, value, w.out, w.attn_gate, segments)
    feed_forward = w.ffn_norm_weight, w.ffn_norm_bias, w.ffn_in, w.ffn_out, w.ffn_gate
    return gated_feed_forward(x, *feed_forward, row_mask=segments.text_mask, eps=flamingo.EPS)


Call = Callable[[], Tensor]


class Comparison(NamedTuple):
    """key: of the JSON document; dense: the call whose error is eager's error."""

    key: str
    ours: Call
    theirs: Call
    dense: Call
    exact: Call


def comparisons(inputs: Inputs, exact: Inputs) -> list[Comparison]:
    """exact: the same inputs in float64."""
    device, total = inputs.text.device, len(inputs.image_of_key)
    key, value = our_keys_values(inputs)
    kept = flamingo.keys_values(inputs.weights, inputs.features, inputs.position, inputs.num_heads)
    decode = decode_segments([total], [1], device=device)
    prefill = media_segments(inputs.media_locations[None], [total], [1])

    def dense(of: Inputs, x: str) -> Call:
        arguments = of.features, of.position, of.media_locations, of.image_of_key, of.num_heads
        return lambda: flamingo.dense_block(of.weights, getattr(of, x), *arguments)

    def ours_from_features() -> Tensor:
        return our_block(inputs, inputs.text, *our_keys_values(inputs), prefill)

    def ours_decode() -> Tensor:
        return our_block(inputs, inputs.token, key, value, decode)

    def ours_prefill() -> Tensor:
        return our_block(inputs, inputs.text, key, value, prefill)

    def cached() -> Tensor:
        return flamingo.cached_block(inputs.weights, inputs.token, *kept)

    token, text = ((dense(inputs, x), dense(exact, x)) for x in ("token", "text"))
    return [
        Comparison("decode_speedup", ours_decode, token[0], *token),
        Comparison("decode_vs_cached_sdpa", ours_decode, cached, *token),
        Comparison("prefill_cached_speedup", ours_prefill, text[0], *text),
        Comparison("prefill_speedup", ours_from_features, text[0], *text),
    ]


def check(comparison: Comparison) -> dict[str, float]:
    """The largest errors of both against float64; AssertionError where one breaks the error rule."""
    eager, exact = comparison.dense(), comparison.exact()
    found = {}
    for name, call in (("ours", comparison.ours), ("theirs", comparison.theirs)):
        result = call()
        assert_within_twice_eager(f"{comparison.key}: {name}", result, eager, exact)
        found[f"{name}_error"] = max_error(result, exact)
    return found


def compare(
    comparison: Comparison, clock: timing.CpuClock | timing.CudaClock, repeats: int
) -> dict[str, float]:
    """Medians and the shortest times in milliseconds, and their ratios."""
    timed = {
        name: timing.Timed(lambda: None, lambda _, call=call: call())
        for name, call in (("ours", comparison.ours), ("theirs", comparison.theirs))
    }
    samples, raised = timing.interleave(clock, timed, 0.0, repeats, repeats, warm_up=1)
    for error in raised.values():
        raise error
    found = {}
    for suffix, summary in (("", statistics.median), ("_shortest", min)):
        ours, theirs = (summary(samples[name]) / 1e3 for name in ("ours", "theirs"))
        found |= {f"ours_ms{suffix}": round(ours, 4), f"theirs_ms{suffix}": round(theirs, 4)}
        found[f"ratio{suffix}"] = round(theirs / ours, 3)
    return found


def measure(
    sizes: dict[str, int], dtype: str, device: torch.device, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The whole report; every comparison is checked before the first is timed."""
    inputs = random_inputs(sizes).to(device).to(DTYPES[dtype])
    with torch.no_grad():
        found = comparisons(inputs, exactly(inputs))
        errors = {}
        for each in found:
            errors[each.key] = check(each)
            say(f"{each.key}: both within the error rule")
        rows = {}
        for each in found:
            # A token through kept keys takes little time on either side, so more of them can be compared.
            rounds = 3 * repeats if each.key == "decode_vs_cached_sdpa" else repeats
            rows[each.key] = compare(each, timing.clock_of(device), rounds) | errors[each.key]
            say(f"{each.key}: {rows[each.key]['ratio']}")
    return {key: row["ratio"] for key, row in rows.items()} | {"comparisons": rows}


def provenance(
    options: argparse.Namespace, sizes: dict[str, int], arguments: Sequence[str]
) -> dict[str, Any]:
    on_gpu = options.device == "cuda"
    return {
        "shape": sizes,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": f"python -m bench.cross_attention {shlex.join(arguments)}".strip(),
    }


def cpu_model() -> str:
    """As the kernel names it, else as Python does."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cross_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--repeats", type=int, default=9, help="samples of each (default 9)")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"(default {value})")
    options = parser.parse_args(arguments)
    for name in ("threads", "repeats", *SIZES):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.vision_hidden % 4:
        parser.error(f"--vision-hidden must be a multiple of 4, got {options.vision_hidden}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu where no CUDA device is visible, got cuda")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    sizes = {name: getattr(options, name) for name in SIZES}

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    report = measure(sizes, options.dtype, torch.device(options.device), options.repeats, say)
    report = results.scrub(provenance(options, sizes, arguments) | report)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(", ".join(f"{key} {report[key]}" for key in ("device", "cpu", "threads", "dtype", "torch")))
    for key, row in report["comparisons"].items():
        print(
            f"{key:24}ours {row['ours_ms']:9.2f} ms  theirs {row['theirs_ms']:9.2f} ms"
            f"  ratio {row['ratio']:7.3f}  of shortest {row['ratio_shortest']:7.3f}"
        )


if __name__ == "__main__":
    main()

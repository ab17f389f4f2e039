"""The ViT of InfiMM-HD, whole, against plain PyTorch (tests/model/plain_vit.py) and timm.

    python -m bench.encoder [--json]

EVA2-CLIP-E's blocks at full width over windows of 1025 tokens: 4 of them and 1 window on a CPU, all 64 and 10
and 40 windows on a GPU, where the backward recomputes each block, as training does. A forward runs without a
graph. Eager and torch.compile'd (block by block, for all alike), all with the same weights. A ratio is the
median time of a rival over ours, above 1 we are faster; they run in turns. On a busy machine, where times
measure the others, the ratio of the shortest times says more. Features or gradients that differ end the run
without a number: in float32 by 1e-5 of the largest value, else by more than twice the plain model's error.
"""

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import results, timing
from bench.cross_attention import cpu_model
from bench.harness import reason_of
from model.vision import VisionTransformer
from model.vision_config import VisionConfig
from tests.model.plain_vit import PLAIN_NAMES, TIMM_NAMES, plain_vit_like, renamed, timm_vit_like

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward_backward")
MODES = {"eager": False, "compiled": True}
# Parameters of a VisionTransformer whose gradients are compared; every kind of operation lies before one.
CHECKED = (
    "position_table",
    "blocks.0.attn.qkv_proj.weight",
    "blocks.0.attn.q_bias",
    "blocks.0.mlp_norm.weight",
)
NAMES = {"ours": {}, "plain": PLAIN_NAMES, "timm": TIMM_NAMES}
LIMIT = 1e-5  # of float32
CHECKED_WINDOWS = 2

Say = Callable[[str], None]


class Encoder:
    """One implementation; `features(pixel_values)` [n, tokens, width]."""

    def __init__(self, name: str, module: nn.Module):
        self.name, self.module = name, module
        self.features = module.forward_features if name == "timm" else module
        own = dict(module.named_parameters())
        names = CHECKED if name == "ours" else [renamed(name_, NAMES[name]) for name_ in CHECKED]
        self._checked = [own[name_] for name_ in names]

    def compiled(self) -> "Encoder":
        """The same weights, each block behind torch.compile."""
        module = copy.deepcopy(self.module, {id(p): p for p in self.module.parameters()})
        for block in module.blocks:
            block.compile(dynamic=False)
        return Encoder(self.name, module)

    def forget(self) -> None:
        """Drop the gradients, so that the next backward makes new ones."""
        self.module.zero_grad(set_to_none=True)

    def run(self, pixels: Tensor, cotangent: Tensor, which: str) -> None:
        if which == "forward":
            with torch.no_grad():
                self.features(pixels)
        else:
            self.features(pixels).backward(cotangent)

    def outcome(self, pixels: Tensor, cotangent: Tensor, which: str) -> dict[str, Tensor]:
        """What is compared: the features, with the backward some gradients too."""
        if which == "forward":
            with torch.no_grad():
                return {"features": self.features(pixels)}
        features = self.features(pixels)
        grads = torch.autograd.grad(features, self._checked, cotangent)
        return {"features": features.detach()} | dict(zip(CHECKED, grads, strict=True))


def encoders(
    config: VisionConfig, dtype: torch.dtype, device: torch.device
) -> tuple[list[Encoder], list[dict]]:
    """Ours, plain and, where it imports, timm's, of the same weights; what is missing."""
    torch.manual_seed(0)
    with torch.device(device):
        vit = VisionTransformer(config)
    vit = vit.to(dtype).train()
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.dim() == 1:  # zeros and ones at the start, which would hide what they do
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    found, missing = [Encoder("ours", vit), Encoder("plain", plain_vit_like(vit).train())], []
    try:
        found.append(Encoder("timm", timm_vit_like(vit).train()))
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        missing.append({"rival": "timm", "reason": reason_of(error)})
    on_gpu = device.type == "cuda"
    vit.gradient_checkpointing = found[1].module.checkpointing = on_gpu
    for each in found[2:]:
        each.module.set_grad_checkpointing(on_gpu)
    return found, missing


def check(found: list[Encoder], pixels: Tensor, cotangent: Tensor, which: str) -> dict[str, float]:
    """The largest error of each, relative to the largest value; AssertionError where one is too large.

    float32 is compared with the plain model, a narrower dtype with the plain model in float32. Windows are
    independent, so that a few of them, alone with a gradient, stand for all."""
    few, narrow = min(len(pixels), CHECKED_WINDOWS), pixels.dtype != torch.float32
    cotangent = cotangent.clone()
    cotangent[few:] = 0
    plain = next(each for each in found if each.name == "plain")
    exact = Encoder("plain", copy.deepcopy(plain.module).float()) if narrow else plain
    expected = exact.outcome(pixels[:few].float(), cotangent[:few].float(), which)
    del exact
    worst, allowed = {}, {}
    for each in sorted(found, key=lambda each: each is not plain):  # the plain model's error is the measure
        if each is plain and not narrow and few == len(pixels):
            continue  # with itself
        for name, result in each.outcome(pixels, cotangent, which).items():
            result = result[:few] if name == "features" else result
            reference = expected[name].view(result.shape)
            error = float((result.float() - reference).abs().max() / reference.abs().max())
            if each is plain and narrow:
                allowed[name] = 2 * max(error, torch.finfo(pixels.dtype).eps / 2)
            limit = allowed.get(name, LIMIT)
            if not error <= limit:
                raise AssertionError(
                    f"{which}: {name} of {each.name} is off by {error:.3g}, allowed {limit:.3g}"
                )
            worst[each.name] = max(error, worst.get(each.name, 0.0))
    return worst


def compare(
    found: list[Encoder], pixels: Tensor, cotangent: Tensor, which: str, repeats: int
) -> tuple[list[dict], list[dict]]:
    """One row per rival, and what could not be timed, after the check, which is the warm-up too."""
    errors = check(found, pixels, cotangent, which)
    clock = timing.clock_of(pixels.device)
    timed = {
        each.name: timing.Timed(each.forget, lambda _, each=each: each.run(pixels, cotangent, which))
        for each in found
    }
    samples, raised = timing.interleave(clock, timed, 0.0, repeats, repeats, warm_up=0)
    for each in found:
        each.forget()
    if "ours" in raised:
        raise raised["ours"]
    missing = [{"rival": name, "reason": reason_of(error)} for name, error in raised.items()]
    rows = []
    for rival in (name for name in samples if name != "ours"):
        row: dict[str, Any] = {"rival": rival, "our_error": errors["ours"]}
        for suffix, summary in (("", statistics.median), ("_shortest", min)):
            ours, theirs = (summary(samples[name]) / 1e3 for name in ("ours", rival))
            row |= {f"ours_ms{suffix}": round(ours, 3), f"theirs_ms{suffix}": round(theirs, 3)}
            row[f"ratio{suffix}"] = round(theirs / ours, 3)
        rows.append(row)
    return rows, missing


def measure(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """The rows, what is missing and why, and the smallest ratio (None without a row)."""
    device, deadline = torch.device(options.device), time.monotonic() + options.budget_s
    config = VisionConfig(
        window_size=options.window_size,
        patch_size=options.patch_size,
        hidden_size=options.width,
        num_layers=options.blocks,
        num_heads=options.heads,
        intermediate_size=options.mlp,
        feature_layer=-1,
    )
    rows, missing = [], []
    for dtype in options.dtypes:
        eager, absent = encoders(config, DTYPES[dtype], device)
        missing += [{**each, "dtype": dtype} for each in absent]
        compiled = [each.compiled() for each in eager] if "compiled" in options.modes else []
        for windows in options.windows:
            shape = windows, 3, options.window_size, options.window_size
            pixels = torch.randn(shape, device=device).to(DTYPES[dtype])
            cotangent = torch.randn(windows, config.num_tokens, options.width, device=device).to(pixels.dtype)
            for mode in options.modes:
                for which in options.passes:
                    case = {"compiled": MODES[mode], "dtype": dtype, "windows": windows, "pass": which}
                    if time.monotonic() > deadline:
                        missing.append({"rival": "all", "reason": "the time was over", **case})
                        continue
                    found = compiled if MODES[mode] else eager
                    try:
                        new, untimed = compare(found, pixels, cotangent, which, options.repeats)
                    except torch.OutOfMemoryError as error:
                        new, untimed = [], [{"rival": "all", "reason": reason_of(error)}]
                    for row in new:
                        ratios = f"{row['ratio']}, of shortest {row['ratio_shortest']}"
                        say(f"{dtype} {windows} windows {mode} {which}: {row['rival']} {ratios}")
                    rows += [{**case, **row} for row in new]
                    missing += [{**each, **case} for each in untimed]
        del eager, compiled
    return {"rows": rows, "missing": missing, "min_ratio": min((row["ratio"] for row in rows), default=None)}


def provenance(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    command = f"python -m bench.encoder {shlex.join(arguments)}".strip()
    found = results.header(torch.device(options.device), command, options.budget_s)
    sizes = ("blocks", "window_size", "patch_size", "width", "heads", "mlp")
    return found | {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "recomputed_backward": options.device == "cuda",
        "shape": {name: getattr(options, name) for name in sizes},
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m bench.encoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument(
        "--dtypes", nargs="+", choices=tuple(DTYPES), help="(default bf16, on a CPU fp32: bf16 takes an hour)"
    )
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--windows", nargs="+", type=int, help="(default 10 40, on a CPU 1)")
    parser.add_argument("--blocks", type=int, help="(default 64, on a CPU 4)")
    for name, value in (
        ("window-size", 448),
        ("patch-size", 14),
        ("width", 1792),
        ("heads", 16),
        ("mlp", 15360),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default {value})")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--repeats", type=int, help="samples of each (default 5, on a CPU 3)")
    parser.add_argument("--budget-s", type=float, default=1e9, help="seconds after which no row begins")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not on_gpu:
        parser.error("--device must be cpu where no CUDA device is visible, got cuda")
    cuda = options.device == "cuda"
    options.dtypes = options.dtypes or ["bf16" if cuda else "fp32"]
    options.repeats = (5 if cuda else 3) if options.repeats is None else options.repeats
    options.windows = options.windows or ([10, 40] if cuda else [1])
    options.blocks = (64 if cuda else 4) if options.blocks is None else options.blocks
    sizes = ("blocks", "window_size", "patch_size", "width", "heads", "mlp", "threads", "repeats")
    counts = {name: [getattr(options, name)] for name in sizes} | {"windows": options.windows}
    for name, values in counts.items():
        if min(values) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {min(values)}")
    for name, divisor in (("window_size", "patch_size"), ("width", "heads"), ("width", 4)):
        value, of = getattr(options, name), divisor if divisor == 4 else getattr(options, divisor)
        if value % of:
            parser.error(f"--{name.replace('_', '-')} must be a multiple of {of}, got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(options.threads)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    report = measure(options, say)
    report = results.scrub(provenance(options, arguments) | report)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(", ".join(f"{key} {report[key]}" for key in ("gpu", "cpu", "threads", "torch", "date")))
    for row in report["rows"]:
        mode = "compiled" if row["compiled"] else "eager"
        print(
            f"{row['rival']:6}{mode:9}{row['dtype']:5}{row['windows']:4} windows  {row['pass']:17}"
            f"ours {row['ours_ms']:10.2f} ms  theirs {row['theirs_ms']:10.2f} ms"
            f"  ratio {row['ratio']:6.3f}  of shortest {row['ratio_shortest']:6.3f}"
        )
    for each in report["missing"]:
        print(f"not measured: {', '.join(f'{key} {value}' for key, value in each.items())}")
    print(f"smallest ratio: {report['min_ratio']}")


if __name__ == "__main__":
    main()

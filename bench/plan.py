"""What `python -m bench.gpu` measures, most important first."""

from dataclasses import replace

from bench.harness import Case
from bench.problem import OURS

EVA_E = {"num_heads": 16, "head_dim": 112, "num_prefix_tokens": 1}  # the ViT of InfiMM-HD
VISION_TOKENS = 10250  # 10 windows of 1025, the most that an image of 1344 x 1344 has
CROSS = {"num_heads": 12, "num_kv_heads": 12, "head_dim": 64}
HOST = (OURS, "sdpa", "sdpa_flash", "sdpa_cudnn", "eager")


def full_plan() -> list[Case]:
    """The cases of a GPU; a case that two sections share stands in the first alone."""
    cases = [*_host(), *_ceilings(8192, 1 << 29)]
    for num_windows in (40, 160):
        cases += _both("main", _windows(num_windows), compiled=True)
    for seqlen in (257, 577, 2305):
        cases += _both("seqlen", _windows(40, seqlen))
    for num_windows in (1, 2, 5, 10, 20, 80):
        cases += _both("windows", _windows(num_windows))
    for head_dim in (64, 80, 88, 128):
        cases += _both("head_dim", _windows(40, head_dim=head_dim))
    lengths = [257, 1025, 577, 1025, 325, 1025, 730, 1025] * 5
    cases += _both("ragged", {"lengths": lengths, **EVA_E}, compiled=True)
    image = [VISION_TOKENS]
    answer = {"lengths_q": [512] * 4, "lengths_k": image * 4, **CROSS}
    grouped = answer | {"num_kv_heads": 3}
    several = {"lengths_q": [200, 60, 400, 31], "lengths_k": [1025, 5125, VISION_TOKENS, 2050], **CROSS}
    decode = {"lengths_q": [1] * 8, "lengths_k": image * 8, **CROSS}
    for shape in (answer, grouped, several):
        cases += _both("cross", shape, op="varlen_attention")
    cases += [Case("cross", "varlen_attention", decode)]
    cases += [
        Case("memory", "window_attention", _windows(n), backward=True, metric="memory") for n in (40, 160)
    ]
    cases += [replace(case, dtype="float16") for case in _both("float16", _windows(40))]
    cases += [Case("deterministic", "window_attention", _windows(40), backward=True, deterministic=True)]
    return cases + _other_ops(num_windows=40, seqlen=1025, hidden=1792, rows=8192, stream=5120, inner=768)


def quick_plan() -> list[Case]:
    """One tiny case of every kind, to see that everything runs."""
    tiny = {"num_windows": 2, "seqlen": 17, "num_heads": 2, "head_dim": 16, "num_prefix_tokens": 1}
    packed = {"lengths": [5, 17, 9], "num_heads": 2, "head_dim": 16, "num_prefix_tokens": 1}
    cross = {"lengths_q": [3, 2], "lengths_k": [9, 9], "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    cases = [*_ceilings(64, 1 << 12), *_both("main", tiny), *_both("windows", tiny | {"num_windows": 4})]
    cases += [*_both("seqlen", tiny | {"seqlen": 33}), *_both("ragged", packed)]
    cases += _both("cross", cross, op="varlen_attention")
    cases += [Case("host", "window_attention", tiny, metric="host", only=HOST)]
    cases += [Case("memory", "window_attention", tiny, backward=True, metric="memory")]
    cases += [Case("deterministic", "window_attention", tiny, backward=True, deterministic=True)]
    other = _other_ops(num_windows=3, seqlen=17, hidden=16, rows=8, stream=16, inner=8)
    return cases + [replace(case, compiled=False) for case in other]


def _windows(num_windows: int, seqlen: int = 1025, **changes: int) -> dict:
    return {"num_windows": num_windows, "seqlen": seqlen, **EVA_E, **changes}


def _both(section: str, shape: dict, op: str = "window_attention", compiled: bool = False) -> list[Case]:
    return [Case(section, op, shape, backward=backward, compiled=compiled) for backward in (False, True)]


def _host() -> list[Case]:
    """Shapes small enough that the GPU is never behind the host."""
    windows = {"num_windows": 1, "seqlen": 65, "num_heads": 1, "head_dim": 64, "num_prefix_tokens": 1}
    cross = {"lengths_q": [16], "lengths_k": [64], "num_heads": 1, "num_kv_heads": 1, "head_dim": 64}
    position = {"num_windows": 1, "seqlen": 65, "hidden": 64, "granularity": "window", "num_prefix_tokens": 1}
    gated = {"rows": 16, "hidden": 64, "inner": 64}
    shapes = {
        "window_attention": windows,
        "varlen_attention": cross,
        "add_position_2d": position,
        "gated_residual_projection": gated,
    }
    return [Case("host", op, shape, metric="host", only=HOST) for op, shape in shapes.items()]


def _ceilings(size: int, numel: int) -> list[Case]:
    return [Case("ceilings", "matrix_product", {"size": size}), Case("ceilings", "copy", {"numel": numel})]


def _other_ops(num_windows: int, seqlen: int, hidden: int, rows: int, stream: int, inner: int) -> list[Case]:
    position = {"num_windows": num_windows, "seqlen": seqlen, "hidden": hidden, "num_prefix_tokens": 1}
    cases = [
        Case("other_ops", "add_position_2d", {**position, "granularity": granularity}, compiled=True)
        for granularity in ("window", "token")
    ]
    gated = {"rows": rows, "hidden": stream, "inner": inner}
    return cases + _both("other_ops", gated, op="gated_residual_projection", compiled=True)

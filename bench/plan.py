"""What `python -m bench.gpu` measures, most important first."""

import itertools
from dataclasses import replace

from bench.harness import Case
from bench.problem import OURS

EVA_E = {"num_heads": 16, "head_dim": 112, "num_prefix_tokens": 1}  # the ViT of InfiMM-HD
VISION_TOKENS = 10250  # 10 windows of 1025, the most that an image of 1344 x 1344 has
HEADS = {"num_heads": 12, "head_dim": 64}  # of the gated blocks
CROSS = HEADS | {"num_kv_heads": 12}
HIDDEN, VISION_HIDDEN = 5120, 1792  # of the 13 B model's text and of its ViT
TEXTS = (2048, 32, 128, 384, 1024)  # rows of a step, from one stage's texts to a batch of them
IMAGES = (10, 5, 1)  # windows of an image
BATCHES = (8, 1, 64)  # samples that get a token each
HOST = (OURS, "sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_cached", "eager")


def full_plan() -> list[Case]:
    """The cases of a GPU; a case that two sections share stands in the first alone."""
    cases = [*_host(), *_ceilings(8192, 1 << 29)]
    for num_windows in (40, 160):
        cases += _both("main", _windows(num_windows), compiled=True)
    cases += _gated_block()
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
    return cases


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
    return cases + _tiny_gated_block()


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
    features = {"num_windows": 1, "seqlen": 65, "hidden": 64}
    heads = {"num_heads": 1, "head_dim": 64}
    shapes = {
        "window_attention": windows,
        "varlen_attention": cross,
        "gated_cross_attention_decode": {**features, **heads, "batch": 1, "vision_hidden": 64},
        "gated_residual_projection": gated,
        "gated_feed_forward": gated,
        "vision_keys_values": {**features, **heads, "num_layers": 1},
        "residual_post_norm": features,
        "add_position_2d": position,
    }
    return [Case("host", op, shape, metric="host", only=HOST) for op, shape in shapes.items()]


def _ceilings(size: int, numel: int) -> list[Case]:
    return [Case("ceilings", "matrix_product", {"size": size}), Case("ceilings", "copy", {"numel": numel})]


def _gated_block() -> list[Case]:
    """What a gated cross-attention block and the ViT's norms and positions do, most important first."""
    image = {"seqlen": 1025, "hidden": HIDDEN, **HEADS}
    decode = [
        {**image, "batch": batch, "num_windows": windows, "vision_hidden": VISION_HIDDEN}
        for windows in IMAGES
        for batch in BATCHES
    ]
    cases = [Case("decode", "gated_cross_attention_decode", shape) for shape in decode]
    for windows, rows in itertools.product(IMAGES, TEXTS):
        shape = {**image, "text_len": rows, "num_windows": windows}
        cases += _both("prefill", shape, op="gated_cross_attention")
    several = {**image, "text_len": 384, "num_windows": 5, "num_images": 3}
    cases += _both("prefill", several, op="gated_cross_attention")
    features = {"num_windows": 10, "seqlen": 1025, "hidden": VISION_HIDDEN, "num_prefix_tokens": 1, **HEADS}
    for layers, granularity in ((10, "window"), (10, "token"), (1, "window")):
        shape = {**features, "num_layers": layers, "granularity": granularity}
        cases += _both("vision_keys_values", shape, op="vision_keys_values")
    for inner, rows in itertools.product((768, HIDDEN), (*TEXTS, 8192)):
        shape = {"rows": rows, "hidden": HIDDEN, "inner": inner}
        cases += _both("gated", shape, op="gated_residual_projection")
    for rows in (2048, 32, 8192):
        shape = {"rows": rows, "hidden": HIDDEN, "inner": HIDDEN}
        cases += _both("feed_forward", shape, op="gated_feed_forward")
    return _first_compiled([*cases, *_vision_norms(num_windows=40, seqlen=1025, hidden=VISION_HIDDEN)])


def _vision_norms(num_windows: int, seqlen: int, hidden: int) -> list[Case]:
    features = {"num_windows": num_windows, "seqlen": seqlen, "hidden": hidden}
    cases = _both("post_norm", features, op="residual_post_norm")
    for granularity, in_place in itertools.product(("window", "token"), (False, True)):
        shape = {**features, "num_prefix_tokens": 1, "granularity": granularity, "in_place": in_place}
        cases.append(Case("position", "add_position_2d", shape))
    return cases


def _first_compiled(cases: list[Case]) -> list[Case]:
    """torch.compile takes seconds for each shape: only the first case of a section and pass waits for it."""
    first = {(case.section, case.backward): index for index, case in reversed([*enumerate(cases)])}
    return [replace(case, compiled=index in first.values()) for index, case in enumerate(cases)]


def _tiny_gated_block() -> list[Case]:
    """One tiny case of every kind in `_gated_block`."""
    image = {"num_windows": 3, "seqlen": 10, "hidden": 16, "num_heads": 2, "head_dim": 8}
    decode = {**image, "batch": 2, "vision_hidden": 8}
    cases = [Case("decode", "gated_cross_attention_decode", decode)]
    cases += _both("prefill", {**image, "text_len": 32}, op="gated_cross_attention")
    cases += _both("prefill", {**image, "text_len": 32, "num_images": 2}, op="gated_cross_attention")
    shape = {**image, "num_layers": 2, "granularity": "token", "num_prefix_tokens": 1}
    cases += _both("vision_keys_values", shape, op="vision_keys_values")
    rows = {"rows": 8, "hidden": 16, "inner": 8}
    cases += _both("gated", rows, op="gated_residual_projection")
    cases += _both("feed_forward", rows, op="gated_feed_forward")
    return cases + _vision_norms(num_windows=3, seqlen=10, hidden=16)

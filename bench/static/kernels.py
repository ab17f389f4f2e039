"""The kernels beside attention's: the problem of each, and what its row of the ledger is held to.

Matrix products have the useful share of what they issue. Where a call is bound by memory, one of two figures
says whether the kernel can be: `bytes_ratio`, the bytes that must pass between GPU and memory over those that
do, from tiles and trips; and `instructions_per_element`, against the issue slots that an element's traffic
leaves time for.
"""

from collections.abc import Callable, Mapping
from math import ceil
from typing import NamedTuple

from bench.static.measure import Figures
from bench.static.work import Region, Work

# Rows of text, out and inner features of one gated block of the 13 B model; the few rows of a decoding batch.
TEXT_ROWS, HIDDEN, INNER = 4096, 5120, 768
FEW_ROWS = 16
# Ten windows of ViT-E.
VISION_ROWS, VISION_HIDDEN = 10250, 1792
# New tokens of a batch, each over such an image.
DECODE_BATCH, DECODE_KEYS = 8, VISION_ROWS
# The text of one such image in training, and the channels of a head of it.
SHORT_SEGMENT, CROSS_HEAD_DIM = 128, 64

PRODUCT_GATE = 0.97
BYTES_GATE = 0.95

# Multiprocessors x schedulers x clock (Hz) x lanes, and bytes a second: A100 80GB SXM and H100 SXM.
ISSUED_PER_SECOND = {"sm_80": 108 * 4 * 1.41e9 * 32, "sm_90": 132 * 4 * 1.7e9 * 32}
BYTES_PER_SECOND = {"sm_80": 2.039e12, "sm_90": 3.35e12}


def instruction_budget(arch: str, bytes_per_element: float) -> float:
    """Instructions of a thread that the GPU issues while the bytes of one element pass at full bandwidth.

    About 34 on an H100 for an element that is read and written in two bytes.
    """
    return ISSUED_PER_SECOND[arch] / BYTES_PER_SECOND[arch] * bytes_per_element


class Elements(NamedTuple):
    """Of one CTA: elements of its straight code, and of one trip of its loops, 0 without loops.

    bytes: of an element, in bf16.
    """

    bytes: float
    straight: float
    per_trip: float = 0


def instructions_per_element(elements: Elements, figures: Figures, num_warps: int) -> float:
    """Instructions that one thread's share of an element takes: of the loops' trips and of the rest."""
    in_loops = figures.loop_instructions if elements.per_trip else 0
    found = (figures.instructions - in_loops) / elements.straight
    if in_loops:
        found += in_loops / elements.per_trip
    return 32 * num_warps * found


class Kernel(NamedTuple):
    """What one kernel does for its problem, by the constexprs of a configuration.

    work: useful multiply-adds of the problem, and what the tiles issue; None without matrix work.
    inner: the size that the ledger shows as head_dim, where it is not the configuration's own.
    product_gate: what the useful share must reach, None for no gate; exempt: configurations with this in
    their name are shown and not held to it.
    bytes_ratio: its function gives None for a configuration that is not bound by memory.
    elements: of a kernel that goes over memory element by element.
    """

    work: Callable[[Mapping], tuple[int, Work]] | None = None
    inner: int = 0
    product_gate: float | None = None
    exempt: str | None = None
    bytes_ratio: Callable[[Mapping], float | None] | None = None
    elements: Callable[[Mapping], Elements] | None = None


def product(rows: int, columns: int, depth: int, **more) -> Kernel:
    """A matrix product in tiles of BLOCK_M x BLOCK_N x BLOCK_K, masked at the edges."""

    def work(tile: Mapping) -> tuple[int, Work]:
        macs = tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"]
        tiles = ceil(rows / tile["BLOCK_M"]) * ceil(columns / tile["BLOCK_N"])
        issued = Work((Region(macs, tiles * ceil(depth / tile["BLOCK_K"])),))
        return rows * columns * depth, issued

    return Kernel(work=work, **more)


def few_rows_ratio(tile: Mapping) -> float | None:
    """Of gated_residual_kernel on FEW_ROWS rows in bf16: weight, o, x and y once, and what is read beyond.

    Every block of rows reads the weight from memory again, and a tile that is wider than what is left reads
    more of it. That each block of columns reads o again is the L2 cache's traffic: o is 24 KB.
    """
    if not tile["MASK_ROWS"]:
        return None
    ideal = HIDDEN * INNER + FEW_ROWS * (INNER + 2 * HIDDEN)
    row_blocks = ceil(FEW_ROWS / tile["BLOCK_M"])
    columns = ceil(HIDDEN / tile["BLOCK_N"]) * tile["BLOCK_N"]
    moved = row_blocks * columns * INNER + FEW_ROWS * (INNER + 2 * HIDDEN)
    return ideal / moved


def decode_attention(tile: Mapping) -> tuple[int, Work]:
    """All query rows of a key head share its keys; the rows that fill up a tile cost no bytes."""
    groups = DECODE_BATCH * tile["NUM_HEADS"] // tile["GROUP"]
    useful = 2 * groups * tile["TEXT_LEN"] * tile["GROUP"] * DECODE_KEYS * tile["HEAD_DIM"]
    macs = 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["WIDTH"]
    return useful, Work((Region(macs, groups * ceil(DECODE_KEYS / tile["BLOCK_N"])),))


def decode_projection(tile: Mapping) -> tuple[int, Work]:
    """A trip is one head: its part of the inner size, in a tile of 16 rows."""
    rows = DECODE_BATCH * tile["TEXT_LEN"]
    useful = rows * HIDDEN * tile["NUM_HEADS"] * tile["HEAD_DIM"]
    programs = ceil(rows / tile["ROWS"]) * ceil(HIDDEN / tile["BLOCK_N"])
    return useful, Work((Region(16 * tile["BLOCK_N"] * tile["WIDTH"], programs * tile["NUM_HEADS"]),))


def decode_bytes_ratio(tile: Mapping) -> float:
    """Of both kernels of a decoding call in bf16 on an H100: keys, values, weight, queries, x and y once.

    Beyond that the masked tails of the keys are counted, and the partial results, written and read. That
    every block of columns reads the partial results again is the L2 cache's traffic.
    """
    from infimm_kernels.gated_cross_attention.triton_decode import splits_for

    kv_heads, rows = tile["NUM_HEADS"] // tile["GROUP"], DECODE_BATCH * tile["TEXT_LEN"]
    inner = tile["NUM_HEADS"] * tile["HEAD_DIM"]
    once = 2 * (HIDDEN * inner + rows * (inner + 2 * HIDDEN))
    per_key = 2 * 2 * DECODE_BATCH * kv_heads * tile["HEAD_DIM"]
    splits = splits_for(
        batch=DECODE_BATCH,
        text_len=tile["TEXT_LEN"],
        num_kv_heads=kv_heads,
        head_dim=tile["HEAD_DIM"],
        max_keys=DECODE_KEYS,
        num_sms=132,
    )
    partial = 4 * splits * rows * tile["NUM_HEADS"] * (tile["HEAD_DIM"] + 2)
    keys = ceil(DECODE_KEYS / tile["BLOCK_N"]) * tile["BLOCK_N"]
    return (per_key * DECODE_KEYS + once) / (per_key * keys + once + 2 * partial)


def short_segment_ratio(tile: Mapping) -> float | None:
    """Of attention_forward_kernel in bf16 for a text of SHORT_SEGMENT tokens over the image before it.

    Queries, keys, values and results once; beyond that every block of queries reads the keys and values
    again, and lse is written. None for another head_dim, equal windows, prefix tokens and shared key heads.
    """
    one = (tile["HEAD_DIM"], tile["HEADS_PER_KV_HEAD"], tile["NUM_PREFIX"]) == (CROSS_HEAD_DIM, 1, 0)
    if not one or tile["EVEN_K"]:
        return None
    rows, keys = (2 * 2 * count * CROSS_HEAD_DIM for count in (SHORT_SEGMENT, DECODE_KEYS))
    return (rows + keys) / (rows + 4 * SHORT_SEGMENT + ceil(SHORT_SEGMENT / tile["BLOCK_M"]) * keys)


def epilogue(tile: Mapping) -> Elements:
    """x and m read, y written."""
    return Elements(6, tile["BLOCK_M"] * tile["BLOCK_N"])


def scale(tile: Mapping) -> Elements:
    """dy read, dm written."""
    return Elements(4, tile["BLOCK_M"] * tile["BLOCK_N"])


def add_position(tile: Mapping) -> Elements:
    """x read and written. A line holds the tokens of a window, whose last block is cut, or a whole line."""
    seqlen = VISION_ROWS // 10
    tokens = tile["BLOCK_T"] if tile["PER_TOKEN"] else seqlen / ceil(seqlen / tile["BLOCK_T"])
    return Elements(4, tokens * tile["BLOCK_C"])


def post_norm(tile: Mapping) -> Elements:
    """A row: x and y read, the result written."""
    return Elements(6, tile["BLOCK"] * tile["PIECES"])


def post_norm_backward(tile: Mapping) -> Elements:
    """A trip is a row: dout and y read, dy written where it is wanted. A program of an H100 has some 50."""
    row = tile["BLOCK"] * tile["PIECES"]
    return Elements(6 if tile["NEED_DY"] else 4, 50 * row, row)


NO_FIGURE = Kernel()  # memory-bound, and small beside the kernel that it serves

KERNELS: dict[str, Kernel] = {
    "gated_residual_kernel": product(
        TEXT_ROWS, HIDDEN, INNER, inner=INNER, product_gate=PRODUCT_GATE
    )._replace(bytes_ratio=few_rows_ratio),
    "gated_residual_backward_input_kernel": product(
        TEXT_ROWS, INNER, HIDDEN, inner=INNER, product_gate=PRODUCT_GATE
    ),
    # Where dy is float32 it enters as two bfloat16 numbers: two products for one.
    "gated_residual_backward_weight_kernel": product(
        HIDDEN, INNER, TEXT_ROWS, inner=INNER, product_gate=PRODUCT_GATE, exempt="bf16+fp32"
    ),
    "gated_residual_backward_gate_kernel": NO_FIGURE,
    "gated_residual_epilogue_kernel": Kernel(elements=epilogue),
    "gated_residual_scale_kernel": Kernel(elements=scale),
    "vision_keys_values_kernel": product(
        VISION_ROWS, 2 * INNER, VISION_HIDDEN, inner=VISION_HIDDEN, product_gate=PRODUCT_GATE
    ),
    "vision_keys_values_backward_features_kernel": product(
        VISION_ROWS, VISION_HIDDEN, 2 * INNER, inner=VISION_HIDDEN, product_gate=PRODUCT_GATE
    ),
    "vision_keys_values_backward_weight_kernel": product(
        2 * INNER, VISION_HIDDEN, VISION_ROWS, inner=VISION_HIDDEN, product_gate=PRODUCT_GATE
    ),
    "decode_attention_kernel": Kernel(decode_attention, bytes_ratio=decode_bytes_ratio),
    "decode_projection_kernel": Kernel(decode_projection),
    "position_table_kernel": NO_FIGURE,
    "add_position_kernel": Kernel(elements=add_position),
    "add_position_2d_kernel": NO_FIGURE,  # csrc: no tile to count by
    "residual_post_norm_kernel": Kernel(elements=post_norm),
    "residual_post_norm_backward_kernel": Kernel(elements=post_norm_backward),
    "residual_post_norm_backward_sums_kernel": NO_FIGURE,
}

"""Parts shared by the attention kernels: head_dim in pieces, rows of a matrix, the segment of a program.

The sides of a Triton tile are powers of two, and head_dim 112 is none. A tile of rows is therefore a tuple of
pieces: 112 = 64 + 32 + 16 channels exactly, or one piece of 128 whose last channels are masked. The products
over the pieces add up to the product over head_dim.

Rows of a segment are addressed from a 64-bit base with 32-bit offsets; triton_launch.py sees to it that they
fit.
"""

import triton
import triton.language as tl

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(
    -1.7e38
)  # half of float32's: below all scores, and differences stay finite
SEARCH: tl.constexpr = tl.constexpr(128)  # segments compared at once


@triton.constexpr_function
def piece_start(widths, i):
    return sum(widths[:i])


# --- rows of a matrix ---------------------------------------------------------------------------------------


@triton.jit
def _load_piece(ptr, rows, stride, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    channels = START + tl.arange(0, WIDTH)
    pointers = ptr + rows[:, None] * stride + channels[None, :]
    if START + WIDTH > HEAD_DIM:
        return tl.load(pointers, mask=channels[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_rows(ptr, rows, stride, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A tile [len(rows), width] of each piece; rows int32 [len(rows)], relative to ptr."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles += (_load_piece(ptr, rows, stride, piece_start(PIECES, i), PIECES[i], HEAD_DIM),)
    return tiles


@triton.jit
def _store_piece(
    ptr, tile, rows, stride, mask, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr
):
    channels = START + tl.arange(0, WIDTH)
    pointers = ptr + rows[:, None] * stride + channels[None, :]
    mask = mask[:, None]
    if START + WIDTH > HEAD_DIM:
        mask = mask & (channels[None, :] < HEAD_DIM)
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(ptr, tiles, rows, stride, mask, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr):
    for i in tl.static_range(len(PIECES)):
        _store_piece(ptr, tiles[i], rows, stride, mask, piece_start(PIECES, i), PIECES[i], HEAD_DIM)


@triton.jit
def _atomic_add_piece(
    ptr,
    tile,
    rows,
    stride,
    mask,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    channels = START + tl.arange(0, WIDTH)
    pointers = ptr + rows[:, None] * stride + channels[None, :]
    if START + WIDTH > HEAD_DIM:
        inside = channels[None, :] < HEAD_DIM
        if MASKED:
            inside = inside & mask[:, None]
        tl.atomic_add(pointers, tile, mask=inside, sem="relaxed")
    elif MASKED:
        tl.atomic_add(pointers, tile, mask=mask[:, None], sem="relaxed")
    else:
        tl.atomic_add(pointers, tile, sem="relaxed")


@triton.jit
def _zero_piece(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def zero_rows(ROWS: tl.constexpr, PIECES: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles += (_zero_piece(ROWS, PIECES[i]),)
    return tiles


@triton.jit
def scale_rows(tiles, factor):
    """factor: one number, or one per row as [rows, 1]."""
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled += (tiles[i] * factor,)
    return scaled


@triton.jit
def add_rows(tiles, others):
    total = ()
    for i in tl.static_range(len(tiles)):
        total += (tiles[i] + others[i],)
    return total


# --- one row, in float32 vector work ------------------------------------------------------------------------


@triton.jit
def load_vector(ptr, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One row as float32 [1, width] of each piece."""
    row = load_rows(ptr, tl.arange(0, 1), 0, PIECES, HEAD_DIM)
    vector = ()
    for i in tl.static_range(len(PIECES)):
        vector += (row[i].to(tl.float32),)
    return vector


@triton.jit
def store_vector(ptr, vector, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr):
    row = tl.arange(0, 1)
    store_rows(ptr, vector, row, 0, row == 0, PIECES, HEAD_DIM)


@triton.jit
def atomic_add_vector(ptr, vector, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr):
    row = tl.arange(0, 1)
    for i in tl.static_range(len(PIECES)):
        _atomic_add_piece(
            ptr, vector[i], row, 0, row == 0, piece_start(PIECES, i), PIECES[i], False, HEAD_DIM
        )


@triton.jit
def add_outer(tiles, column, vector):
    """tiles + column vector: column [rows]."""
    total = ()
    for i in tl.static_range(len(tiles)):
        total += (tiles[i] + column[:, None] * vector[i],)
    return total


@triton.jit
def dot_vector(tiles, vector):
    """The product of every row with one row, in float32: -> [rows]."""
    product = tl.sum(tiles[0].to(tl.float32) * vector[0], 1)
    for i in tl.static_range(1, len(tiles)):
        product += tl.sum(tiles[i].to(tl.float32) * vector[i], 1)
    return product


@triton.jit
def sum_rows(column, tiles):
    """column^T tiles: column [rows] -> [1, width] of each piece."""
    total = ()
    for i in tl.static_range(len(tiles)):
        total += (tl.sum(column[:, None] * tiles[i].to(tl.float32), 0, keep_dims=True),)
    return total


# --- products on the tensor cores ---------------------------------------------------------------------------


@triton.jit
def dot_channels(a, b):
    """a b^T over all pieces: a of M rows, b of N rows -> [M, N]."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision="ieee")
    return product


@triton.jit
def dot_rows(p, b, acc):
    """acc + p b, piece by piece: p [M, N], b of N rows, acc of M rows."""
    total = ()
    for i in tl.static_range(len(b)):
        total += (tl.dot(p, b[i], acc[i], input_precision="ieee"),)
    return total


@triton.jit
def atomic_add_product(
    ptr, p, b, rows, stride, mask, MASKED: tl.constexpr, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """ptr[rows] += p b, one piece after the other, so that one product is held at a time."""
    for i in tl.static_range(len(PIECES)):
        product = tl.dot(p, b[i], input_precision="ieee")
        _atomic_add_piece(
            ptr, product, rows, stride, mask, piece_start(PIECES, i), PIECES[i], MASKED, HEAD_DIM
        )


# --- scores -------------------------------------------------------------------------------------------------
# With FUSED_SCALE the scale, in units of log 2, enters the exponential in one multiply-add per score. That
# needs a positive scale (the maximum is taken before it) and costs float32 some accuracy: a score is rounded
# at its own size, not at its distance from the maximum. Without it scores are scaled at once, in natural
# units.


@triton.jit
def scaled(scores, scale, FUSED_SCALE: tl.constexpr):
    return scores if FUSED_SCALE else scores * scale


@triton.jit
def scaled_later(scores, scale, FUSED_SCALE: tl.constexpr):
    return scores * scale if FUSED_SCALE else scores


@triton.jit
def power(x, FUSED_SCALE: tl.constexpr):
    return tl.exp2(x) if FUSED_SCALE else tl.exp2(x * LOG2_E)


@triton.jit
def probabilities(scores, lse, scale, FUSED_SCALE: tl.constexpr):
    """exp(softmax_scale * scores - lse); lse is broadcast to the shape of scores."""
    if FUSED_SCALE:
        lse *= LOG2_E
    scores = scaled_later(scaled(scores, scale, FUSED_SCALE), scale, FUSED_SCALE)
    return power(scores - lse, FUSED_SCALE)


# --- segments -----------------------------------------------------------------------------------------------


@triton.jit
def segment_of(cu_seqlens_ptr, slot, total, num_segments, BLOCK: tl.constexpr):
    """The segment of a slot: s owns those from cu_seqlens[s] // BLOCK + s on, one at least and enough for its
    tiles. So a grid of total // BLOCK + num_segments slots serves any lengths, and none has to be known."""
    count = 0
    for first in range(0, num_segments, SEARCH):
        s = first + tl.arange(0, SEARCH)
        start = tl.load(cu_seqlens_ptr + s, mask=s < num_segments, other=0)
        start = tl.minimum(tl.maximum(start, 0), total)
        count += tl.sum(((s < num_segments) & (start // BLOCK + s <= slot)).to(tl.int32), 0)
    return tl.maximum(count - 1, 0)


@triton.jit
def bounds(cu_seqlens_ptr, segment, total):
    """First token and length of a segment, inside the tensor whatever cu_seqlens holds."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + segment), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + segment + 1), start), total)
    return start, end - start


@triton.jit
def _range_bounds(ranges_ptr, segment, total):
    """`bounds` of a segment whose (first, end) are given, and may overlap those of others."""
    start = tl.minimum(tl.maximum(tl.load(ranges_ptr + 2 * segment), 0), total)
    end = tl.minimum(tl.maximum(tl.load(ranges_ptr + 2 * segment + 1), start), total)
    return start, end - start


@triton.jit
def tile_of(
    cu_seqlens_ptr,
    other_ptr,
    other_ranges_ptr,
    total,
    other_total,
    num_segments,
    seqlen,
    num_tiles,
    BLOCK: tl.constexpr,
):
    """This program's place -> tile, start and length of its segment, start and length on the other side.

    Without cu_seqlens every segment has seqlen tokens on both sides, and num_tiles tiles. other_ranges, int32
    [num_segments, 2], stand in for cu_seqlens on the other side.
    """
    slot = tl.program_id(0)
    if cu_seqlens_ptr is None:
        segment = slot // num_tiles
        start = segment * seqlen
        return slot - segment * num_tiles, start, seqlen, start, seqlen
    else:
        segment = segment_of(cu_seqlens_ptr, slot, total, num_segments, BLOCK)
        start, length = bounds(cu_seqlens_ptr, segment, total)
        if other_ranges_ptr is None:
            other_start, other_length = bounds(other_ptr, segment, other_total)
        else:
            other_start, other_length = _range_bounds(other_ranges_ptr, segment, other_total)
        return slot - start // BLOCK - segment, start, length, other_start, other_length

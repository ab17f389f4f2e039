"""The ledger's table of the kernels beside attention's: their work, their bytes, their instructions."""

import pytest

from bench.static import kernels
from bench.static.rows import ledger_of
from bench.static.work import Region, Work
from tests.bench.test_ledger_static import measured, mma

PRODUCT_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}


@pytest.mark.parametrize(
    ("kernel", "useful", "programs", "trips"),
    [
        ("gated_residual_kernel", 4096 * 5120 * 768, 32 * 40, 12),
        ("gated_residual_backward_input_kernel", 4096 * 5120 * 768, 32 * 6, 80),
        ("gated_residual_backward_weight_kernel", 4096 * 5120 * 768, 40 * 6, 64),
        ("vision_keys_values_kernel", 10250 * 1792 * 1536, 81 * 12, 28),
        ("vision_keys_values_backward_features_kernel", 10250 * 1792 * 1536, 81 * 14, 24),
        ("vision_keys_values_backward_weight_kernel", 10250 * 1792 * 1536, 12 * 14, 161),
    ],
)
def test_work_of_the_products(kernel, useful, programs, trips):
    found, issued = kernels.KERNELS[kernel].work(PRODUCT_TILE)
    assert found == useful
    assert issued == Work((Region(128 * 128 * 64, programs * trips),))


DECODE_TILE = {"TEXT_LEN": 1, "NUM_HEADS": 12, "GROUP": 1, "HEAD_DIM": 64, "WIDTH": 64}
DECODE_TILE |= {"BLOCK_M": 16, "BLOCK_N": 64, "ROWS": 8}


def test_work_of_decoding():
    """One query row in a tile of 16: a sixteenth of what is issued is useful, and no byte more is read."""
    useful, issued = kernels.decode_attention(DECODE_TILE)
    assert useful == 2 * 8 * 12 * 10250 * 64
    assert issued == Work((Region(2 * 16 * 64 * 64, 8 * 12 * 161),))
    useful, issued = kernels.decode_projection(DECODE_TILE | {"BLOCK_N": 32})
    assert useful == 8 * 5120 * 768
    assert issued == Work((Region(16 * 32 * 64, 160 * 12),))


def test_bytes_of_decoding():
    pytest.importorskip("triton")
    ratio = kernels.decode_bytes_ratio(DECODE_TILE)
    keys = 2 * 2 * 8 * 768
    least = keys * 10250 + 2 * (5120 * 768 + 8 * (768 + 2 * 5120))
    assert ratio < least / (least + keys * 54)  # the masked tail, and partial results on top
    assert ratio > 0.99
    assert kernels.decode_bytes_ratio(DECODE_TILE | {"BLOCK_N": 4096}) < 0.86


def test_bytes_of_short_segments():
    """Two blocks of queries would read the keys twice; lse is all that one block adds."""
    tile = {"HEAD_DIM": 64, "HEADS_PER_KV_HEAD": 1, "NUM_PREFIX": 0, "EVEN_K": False, "BLOCK_M": 128}
    assert 0.999 < kernels.short_segment_ratio(tile) < 1.0
    assert kernels.short_segment_ratio(tile | {"BLOCK_M": 64}) < 0.51
    others = ({"EVEN_K": True}, {"NUM_PREFIX": 1}, {"HEAD_DIM": 112}, {"HEADS_PER_KV_HEAD": 4})
    assert all(kernels.short_segment_ratio(tile | change) is None for change in others)


def test_bytes_of_few_rows():
    tile = {"MASK_ROWS": True, "BLOCK_M": 16, "BLOCK_N": 32}
    assert kernels.few_rows_ratio(tile) == 1.0
    assert kernels.few_rows_ratio(tile | {"BLOCK_M": 8}) < 0.55  # two blocks read the weight
    assert kernels.few_rows_ratio(tile | {"BLOCK_N": 3000}) < 0.9
    assert kernels.few_rows_ratio(tile | {"MASK_ROWS": False}) is None


def test_instructions_of_an_element():
    """4 warps, 500 instructions of which 100 stand in loops; without trips the loops are slow paths."""
    figures, count = measured().figures, kernels.instructions_per_element
    assert count(kernels.Elements(4, 4096), figures, 4) == 32 * 4 * 500 / 4096
    assert count(kernels.Elements(4, 4096, 1024), figures, 4) == 32 * 4 * (400 / 4096 + 100 / 1024)


def test_elements_of_the_element_wise_kernels():
    block = {"BLOCK_T": 32, "BLOCK_C": 128}
    token = kernels.add_position(block | {"PER_TOKEN": True})
    window = kernels.add_position(block | {"PER_TOKEN": False})
    assert token == (4, 32 * 128, 0)
    assert window.straight == 1025 / 33 * 128  # the last of 33 blocks holds one token
    row = {"BLOCK": 256, "PIECES": 7}
    assert kernels.post_norm(row) == (6, 1792, 0)
    assert kernels.post_norm_backward(row | {"NEED_DY": True}) == (6, 50 * 1792, 1792)
    assert kernels.post_norm_backward(row | {"NEED_DY": False}).bytes == 4
    assert kernels.epilogue({"BLOCK_M": 16, "BLOCK_N": 256}) == (6, 4096, 0)
    assert kernels.scale({"BLOCK_M": 16, "BLOCK_N": 256}) == (4, 4096, 0)


def test_the_budget_of_an_element():
    """A two-byte read and write on an H100: 132 x 4 warps a cycle against 3.35 TB/s."""
    assert kernels.instruction_budget("sm_90", 4) == pytest.approx(34.3, abs=0.1)
    assert kernels.instruction_budget("sm_80", 4) == pytest.approx(38.2, abs=0.1)


def test_rows_of_the_other_kernels():
    tile = PRODUCT_TILE | {"MASK_ROWS": True}
    regions = (mma(1, 128 * 128 * 64 / 4),)
    product = measured(kernel="gated_residual_kernel", tile=tile)
    product = product._replace(figures=product.figures._replace(regions=regions))
    epilogue = measured(kernel="gated_residual_epilogue_kernel", tile={"BLOCK_M": 16, "BLOCK_N": 256})
    found = ledger_of([product, product._replace(tile=tile | {"MASK_ROWS": False}), epilogue])
    assert found.findings == []
    few, many, elementwise = found.rows
    assert (few["useful_over_issued"], few["head_dim"], few["bytes_ratio"]) == (1.0, 768, 1.0)
    assert "bytes_ratio" not in many and "instructions_per_element" not in many
    assert elementwise["instructions_per_element"] == round(128 * 500 / 4096, 2)
    assert elementwise["instruction_budget"] == pytest.approx(57.4, abs=0.1)
    assert not {"regions", "instructions"} & set(few)

"""The parts of the ledger that need no compiler: machine code, tile arithmetic, rivals, rows."""

from collections import Counter

import pytest

from bench.static import rivals, work
from bench.static.measure import Figures, ctas_per_sm
from bench.static.rows import Measured, ledger_of
from bench.static.sass import Code, MmaRegion, mma_macs, mma_shape, race_flags
from bench.static.work import Problem, Region, Work, issued_macs

# A spill before the loop; a loop with one wait, one spill and 2 + 1 matrix instructions, whose slow path
# stands behind the kernel's end and jumps back; straight matrix code; the endless branch at the end of every
# kernel.
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;              /* 0x00000a00ff017624 */
                                                                        /* 0x000fe400078e00ff */
        /*0010*/                   STL [R1], R5 ;                      /* 0x0 */
        /*0020*/               @P0 BRA 0x90 ;                          /* 0x0 */
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   LDL R5, [R1] ;
        /*0070*/              @!P1 BRA 0xc0 ;
        /*0080*/               @P2 BRA 0x30 ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        /*00d0*/                   BRA 0x80 ;
        /*00e0*/                   BRA 0xe0;
        /*00f0*/                   NOP;
"""


def test_loops_are_those_of_the_control_flow():
    """Code that stands behind the kernel's end and jumps back into the loop belongs to it; by address alone
    it would be a loop around the straight code between."""
    code = Code(CODE)
    assert code.loops == [frozenset({0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0xC0, 0xD0})]
    assert code.hot_addresses == code.loops[0]
    assert code.count(("LDL", "STL")) == 2
    assert code.count(("LDL", "STL"), code.hot_addresses) == 1
    assert code.count(("WARPGROUP.DEPBAR",), code.hot_addresses) == 1


def test_padding_and_the_endless_branch_are_no_instructions():
    assert Code(CODE).reachable == frozenset(range(0, 0xE0, 0x10))


def test_matrix_work_is_counted_by_loop_and_straight_code():
    loop, straight = Code(CODE).mma_regions
    assert loop == MmaRegion(
        1, 2 * 64 * 128 * 16 / 4 + 16 * 8 * 8, Counter({"HGMMA.64x128x16": 2, "HMMA.1688": 1})
    )
    assert straight == MmaRegion(0, 16 * 8 * 16, Counter({"HMMA.16816": 1}))


def test_nested_loops_keep_their_own_matrix_work():
    text = """
        /*0000*/ HMMA.16816.F32 R0, R0, R0, R0 ;
        /*0010*/ HMMA.16816.F32 R0, R0, R0, R0 ;
        /*0020*/ BRA.U UP0, 0x10 ;
        /*0030*/ @P0 BRA 0x0 ;
        /*0040*/ EXIT ;
"""
    code = Code(text)
    assert code.loops == [frozenset({0x10, 0x20}), frozenset({0, 0x10, 0x20, 0x30})]
    assert [(r.depth, r.macs) for r in code.mma_regions] == [(1, 2048), (2, 2048)]


def test_a_loop_left_by_a_call_is_inside_the_loop_around_it():
    """ptxas leaves some loops by CALL.REL.NOINC, which never returns; without that edge the inner loop of a
    backward over grouped heads stood outside the loop over the heads."""
    text = """
        /*0000*/ HMMA.16816.F32 R0, R0, R0, R0 ;
        /*0010*/ HMMA.16816.F32 R0, R0, R0, R0 ;
        /*0020*/ @!P6 CALL.REL.NOINC 0x40 ;
        /*0030*/ BRA 0x10 ;
        /*0040*/ @P5 EXIT ;
        /*0050*/ BRA 0x0 ;
"""
    assert [(r.depth, r.macs) for r in Code(text).mma_regions] == [(1, 2048), (2, 2048)]


@pytest.mark.parametrize(
    ("opcode", "shape", "macs"),
    [
        ("HMMA.16816.F32.BF16", "HMMA.16816", 2048),
        ("HMMA.1688.F32.TF32", "HMMA.1688", 1024),
        ("HGMMA.64x112x16.F32.BF16", "HGMMA.64x112x16", 64 * 112 * 4),
        ("UTCHMMA", "UTCHMMA", 0),
        ("FFMA.FTZ", None, None),
        ("WARPGROUP.ARRIVE", None, None),
    ],
)
def test_shapes_of_matrix_instructions(opcode, shape, macs):
    assert mma_shape(opcode) == shape
    if shape is not None:
        assert mma_macs(shape) == macs


def test_race_flags():
    copy = "cp.async.cg.shared.global [%r1], [%rd1], 16;\n"
    wait = "wgmma.wait_group.sync.aligned 0;\n"
    assert race_flags(copy + wait + "bar.sync 0;\n" + copy) == 0
    assert race_flags(wait + copy + "st.shared.b32 [%r1], %r2;\n" + "bar.sync 0;\n") == 2


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "expected"),
    [
        (255, 57344, 8, 80, 1),  # registers: 32 * 255 -> 8192 a warp, 8 warps an SM
        (128, 57344, 8, 80, 2),
        (144, 0, 1, 90, 12),  # warps get registers by four
        (32, 54 * 1024, 4, 80, 2),  # shared memory, with the kilobyte that the system takes
        (32, 0, 4, 90, 16),  # warps
        (16, 0, 1, 90, 32),  # CTAs
        (255, 0, 16, 90, 0),
    ],
)
def test_ctas_per_sm(registers, shared, warps, arch, expected):
    assert ctas_per_sm(registers, shared, warps, arch) == expected


FORWARD = {
    "NUM_PREFIX": 1,
    "HEAD_DIM": 112,
    "PIECES": (64, 32, 16),
    "BLOCK_M": 128,
    "BLOCK_N": 64,
    "PREFIX_BLOCK_N": 32,
    "ONE_LOOP": False,
    "EVEN_Q": True,
    "EVEN_K": True,
}


BACKWARD = {
    "HEADS_PER_KV_HEAD": 1,
    "NUM_PREFIX": 1,
    "PIECES": (64, 32, 16),
    "BLOCK_M": 32,
    "BLOCK_N": 64,
    "EVEN_Q": True,
    "EVEN_K": True,
    "WITH_DQ": True,
}


def issued(tile, problem, kernel="attention_forward_kernel"):
    made = work.ATTENTION[kernel](tile, problem)
    return sum(region.macs * region.trips for region in made.regions) + made.scalar


def test_peeled_forward_issues_what_is_useful_and_no_more():
    """1025 = 1 + 8 x 128: 1024^2 in tiles, the prefix row and column as scalars."""
    assert issued(FORWARD, Problem(1025, 1, 112)) == 2 * 1025**2 * 112


def test_padded_and_masked_work_is_issued():
    padded = FORWARD | {"PIECES": (128,)}
    assert issued(padded, Problem(1025, 1, 112)) == 2 * 1025**2 * 128
    whole = FORWARD | {"NUM_PREFIX": 0, "EVEN_Q": False, "EVEN_K": False}
    assert issued(whole, Problem(1025, 0, 112)) == 2 * (9 * 128) * (17 * 64) * 112


def test_a_configuration_serves_what_its_launcher_gives_it():
    forward = work.ATTENTION["attention_forward_kernel"]
    assert forward(FORWARD, Problem(1025, 0, 112)) is None
    assert forward(FORWARD, Problem(1024, 1, 112)) is None
    assert forward(FORWARD | {"EVEN_Q": False, "EVEN_K": False}, Problem(1024, 1, 112)) is not None


def test_fused_backward_issues_five_products():
    """1024^2 in tiles, the prefix query's row of keys, and in `prepare` the prefix key's column of queries
    (17 tiles of 64)."""
    vit = Problem(1025, 1, 112)
    assert issued(BACKWARD, vit, "attention_backward_kernel") == 5 * (1024 + 1) * 1024 * 112
    column = issued(
        {"NUM_PREFIX": 1, "PIECES": (112,), "BLOCK_M": 64}, vit, "attention_backward_prepare_kernel"
    )
    assert column == 5 * 17 * 64 * 112
    ragged = BACKWARD | {"NUM_PREFIX": 0, "EVEN_Q": False, "EVEN_K": False}
    assert issued(ragged, Problem(1025, 0, 112), "attention_backward_kernel") == 5 * 1056 * 1088 * 112


def test_deterministic_backward_issues_seven_products():
    text = Problem(1024, 0, 64)
    tile = BACKWARD | {"NUM_PREFIX": 0, "PIECES": (64,), "WITH_DQ": False}
    main = issued(tile, text, "attention_backward_kernel")
    assert main + issued(tile, text, "attention_backward_dq_kernel") == 7 * 1024**2 * 64


def test_the_kernels_of_a_pass():
    def kernels(tile, problem):
        parts = work.parts_of_pass("attention_backward_kernel", tile, problem)
        return [part.kernel.removeprefix("attention_backward_") for part in parts]

    with_prefix, without = Problem(1025, 1, 112), Problem(1024, 0, 64)
    assert kernels(BACKWARD, without) == ["prepare_kernel", "kernel", "finish_kernel"]
    deterministic = BACKWARD | {"WITH_DQ": False}
    assert kernels(deterministic, with_prefix) == ["prepare_kernel", "kernel", "dq_kernel", "finish_kernel"]
    assert kernels(deterministic, without) == ["prepare_kernel", "kernel", "dq_kernel"]


def mma(depth, macs):
    return MmaRegion(depth, macs, Counter({"HMMA.16816": 1}))


def test_trips_come_from_the_tiles_and_work_from_the_machine_code():
    two_loops = Work((Region(1000, 10), Region(4000, 3)), scalar=7)
    assert issued_macs(two_loops, [mma(1, 1000), mma(1, 250)], 4) == (22007, "machine code")
    # An instruction that is larger than the tile counts as what it is.
    assert issued_macs(two_loops, [mma(1, 250), mma(1, 1500)], 4) == (28007, "machine code")
    # One loop copied by the assembler: its copies are the whole kernel's factor.
    copied = [mma(1, 250), mma(1, 1000), mma(1, 1000)]
    assert issued_macs(two_loops, copied, 4) == (22000 * 9 / 5 + 7, "machine code as a whole")


def test_regions_of_equal_size_are_told_apart_by_the_loops_around_them():
    """A masked tail in the loop over query heads was taken for the loop over tiles inside, with its trips."""
    group = Work((Region(1000, 10, depth=2), Region(1000, 0, depth=1)))
    assert issued_macs(group, [mma(1, 300), mma(2, 250)], 4) == (10000, "machine code")


def test_masked_products_may_be_left_out_of_the_machine_code():
    prefix = Work((Region(1000, 10, depth=0, dead=250),))
    assert issued_macs(prefix, [mma(0, 200)], 4) == (8000, "machine code")


def test_machine_code_with_less_work_than_the_tiles_is_refused():
    with pytest.raises(
        ValueError, match="must hold the multiply-adds of the tiles, 1000 in all regions, got"
    ):
        issued_macs(Work((Region(1000, 10),)), [mma(1, 200)], 4)
    with pytest.raises(ValueError, match="got 0"):
        issued_macs(Work((Region(1000, 10),)), [], 4)


def test_instructions_without_a_shape_leave_the_tiles():
    code = [MmaRegion(1, 0, Counter({"UTCHMMA": 8}))]
    assert issued_macs(Work((Region(1000, 10),)), code, 4) == (10000, "tile sizes")


def test_rivals_at_1025_tokens_of_112_channels():
    found = {
        (row["rival"], row["pass"], row["arch"]): row["useful_over_issued"]
        for row in rivals.rows()
        if (row["seqlen"], row["head_dim"]) == (1025, 112)
    }
    assert found["FlashAttention-2", "fwd", "sm_80"] == pytest.approx(0.733, abs=1e-3)
    assert found["FlashAttention-2", "bwd", "sm_90"] == pytest.approx(0.733, abs=1e-3)
    assert found["FlashAttention-3", "fwd", "sm_90"] == pytest.approx(0.756, abs=1e-3)
    assert found["FlashAttention-4", "fwd", "sm_90"] == pytest.approx(0.792, abs=1e-3)
    assert found["xformers", "fwd", "sm_80"] == pytest.approx(0.765, abs=1e-3)
    # 64 x 64 tiles padded to 128 channels; backward its dK, dV and its dQ recompute the scores: 7 products.
    assert found["FlexAttention", "fwd", "sm_90"] == pytest.approx(1025**2 * 112 / (1088**2 * 128), abs=1e-4)
    assert found["FlexAttention", "bwd", "sm_80"] == pytest.approx(
        5 * 1025**2 * 112 / (7 * 1088**2 * 128), abs=1e-4
    )
    assert ("FlashAttention-4", "fwd", "sm_80") not in found
    assert all(0 < row["useful_over_issued"] <= 1 and None not in row.values() for row in rivals.rows())


def measured(**changes):
    figures = Figures(
        registers=128,
        spills=0,
        spills_in_loop=0,
        shared_memory=1024,
        ctas_per_sm=2,
        loop_instructions=100,
        async_copies=4,
        wgmma_waits=0,
        wgmma_serialised="no",
        race_flags=0,
        mma="HMMA.16816 x8",
        regions=(),
        instructions=500,
        triton="3.7.1",
        ptxas="12.8.93",
    )
    return Measured(
        kernel="add_position_kernel",
        backend="triton",
        config="add_position bf16",
        direction="fwd",
        default=True,
        head_dim=0,
        tile={},
        num_warps=4,
        num_stages=3,
        arch=80,
        figures=figures,
    )._replace(**changes)


def test_what_was_not_understood_is_a_finding_and_for_information_a_remark():
    assert [row["seqlen"] for row in ledger_of([measured()]).rows] == [0]
    unknown = measured(kernel="another_kernel")
    assert "must say what this kernel does" in ledger_of([unknown]).findings[0]
    refused = measured(figures="RuntimeError: no")
    assert ledger_of([refused]).findings == [
        "add_position bf16 [add_position_kernel, sm_80] does not compile: RuntimeError: no"
    ]
    matrix = measured(figures=measured().figures._replace(regions=(mma(1, 2048),)))
    assert "must have no matrix instructions, got HMMA.16816 x8" in ledger_of([matrix]).findings[0]
    information = ledger_of([refused._replace(arch=100)])
    assert information.findings == [] and "does not compile" in information.remarks[0]


def test_a_backward_needs_all_its_kernels():
    prepare = {"NUM_PREFIX": 0, "PIECES": (64,), "BLOCK_M": 64}
    backward = measured(
        kernel="attention_backward_prepare_kernel", head_dim=64, tile=prepare, direction="bwd"
    )
    (finding,) = ledger_of([backward]).findings
    assert "no configuration of attention_backward_kernel completes the pass" in finding
    tile = BACKWARD | {"NUM_PREFIX": 0, "PIECES": (64,)}
    regions = (mma(1, 5 * 32 * 64 * 64 / 4),)
    main = backward._replace(
        kernel="attention_backward_kernel",
        tile=tile,
        figures=backward.figures._replace(regions=regions),
    )
    finish = backward._replace(kernel="attention_backward_finish_kernel", tile=prepare | {"WITH_DQ": True})
    ledger = ledger_of([backward, main, finish])
    assert ledger.findings == []
    assert [row["useful_over_issued"] for row in ledger.rows] == [1.0, 1.0, 1.0]
    assert {row["work_from"] for row in ledger.rows} == {"machine code"}

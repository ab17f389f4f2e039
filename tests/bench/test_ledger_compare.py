"""What the ledger calls worse: limits, gates, and the comparison with the stored rows."""

import pytest

from bench.static import compare

ROW = {
    "kernel": "attention_forward_kernel",
    "backend": "triton",
    "pass": "fwd",
    "arch": "sm_80",
    "default": True,
    "head_dim": 112,
    "seqlen": 1025,
    "useful_over_issued": 1.0,
    "config": "attention_forward head_dim=112",
    "gated": True,
    "num_warps": 8,
    "registers": 240,
    "spills": 0,
    "spills_in_loop": 0,
    "shared_memory": 57344,
    "ctas_per_sm": 1,
    "loop_instructions": 1000,
    "async_copies": 14,
    "wgmma_waits": 2,
    "wgmma_serialised": "no",
    "race_flags": 0,
    "mma": "HMMA.16816 x168, HMMA.1688 x8",
    "triton": "3.7.1",
    "ptxas": "12.8.93",
}
DEFAULTS = [
    ROW | {"pass": direction, "arch": arch, "useful_over_issued": gate}
    for (direction, arch), gate in compare.GATES.items()
]


def test_nothing_is_found_in_equal_or_better_rows():
    assert compare.beyond_limits(DEFAULTS) == []
    assert compare.worse([ROW], [ROW]) == []
    better = ROW | {"spills": 0, "loop_instructions": 900, "wgmma_waits": 1, "ctas_per_sm": 2}
    assert compare.worse([better], [ROW | {"spills": 4, "useful_over_issued": 0.9}]) == []
    assert compare.other_tools([ROW], [ROW]) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"useful_over_issued": 0.875}, "useful_over_issued fell from 1.0 to 0.875"),
        ({"spills": 12}, "spills rose from 0 to 12"),
        ({"spills_in_loop": 3}, "spills_in_loop rose from 0 to 3"),
        ({"wgmma_waits": 7}, "wgmma_waits rose from 2 to 7"),
        ({"wgmma_serialised": "C7515"}, "ptxas makes wgmma instructions wait for each other (C7515)"),
        ({"race_flags": 1}, "race_flags rose from 0 to 1"),
        ({"loop_instructions": 1051}, "loop_instructions rose from 1000 to 1051"),
        ({"ctas_per_sm": 0}, "ctas_per_sm fell from 1 to 0"),
        ({"async_copies": 0}, "the loops no longer copy asynchronously, had 14"),
        ({"mma": "HMMA.16816 x176"}, "lost the matrix instruction HMMA.1688, has HMMA.16816 x176"),
        ({"config": "another"}, "is in the stored ledger and no longer shipped"),
    ],
)
def test_every_figure_that_gets_worse_is_a_finding(change, sentence):
    findings = compare.worse([ROW | change], [ROW])
    assert any(sentence in finding for finding in findings), findings
    assert any("attention_forward head_dim=112" in finding for finding in findings)


def test_a_new_configuration_is_a_finding():
    assert "is not in the stored ledger" in compare.worse([ROW], [])[0]


def test_stored_figures_of_other_tools_are_compared_by_their_ratio_alone():
    stored = ROW | {"triton": "3.6.0"}
    worse = ROW | {
        "spills": 9,
        "spills_in_loop": 2,
        "wgmma_waits": 9,
        "loop_instructions": 9999,
        "ctas_per_sm": 0,
        "mma": "none",
    }
    assert compare.worse([worse], [stored]) == []
    (finding,) = compare.worse([worse | {"useful_over_issued": 0.9}], [stored])
    assert "useful_over_issued fell from 1.0 to 0.9" in finding
    assert "stored with Triton 3.6.0, ptxas 12.8.93, now Triton 3.7.1" in compare.other_tools(
        [worse], [stored]
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"useful_over_issued": 0.8}, "useful_over_issued is 0.8, must be at least"),
        ({"spills_in_loop": 2}, "spills_in_loop is 2, must be 0"),
        ({"shared_memory": 240 * 1024}, "shared_memory is 245760 bytes, the limit is"),
        ({"ctas_per_sm": 0}, "8 warps of 240 registers a thread do not fit an SM"),
        ({"default": False}, "no default attention row for"),
    ],
)
@pytest.mark.parametrize("which", range(len(DEFAULTS)))
def test_limits_and_gates(which, change, sentence):
    rows = [row | change if i == which else row for i, row in enumerate(DEFAULTS)]
    (finding,) = compare.beyond_limits(rows)
    assert sentence in finding


PRODUCT = ROW | {"kernel": "vision_keys_values_kernel", "config": "vision_keys_values bf16", "gated": False}
PRODUCT |= {"head_dim": 1792, "seqlen": 0, "useful_over_issued": 0.97}
DECODE = PRODUCT | {"kernel": "decode_attention_kernel", "useful_over_issued": 0.06, "bytes_ratio": 0.95}
EPILOGUE = PRODUCT | {"kernel": "gated_residual_epilogue_kernel", "useful_over_issued": 1.0}
EPILOGUE |= {"instructions_per_element": 30.0, "instruction_budget": 30.0}


@pytest.mark.parametrize("row", [PRODUCT, DECODE, EPILOGUE], ids=["product", "decode", "epilogue"])
def test_kernels_that_just_reach_their_gates(row):
    assert compare.beyond_limits([*DEFAULTS, row]) == []
    assert compare.worse([row], [row]) == []


@pytest.mark.parametrize(
    ("row", "change", "sentence"),
    [
        (PRODUCT, {"useful_over_issued": 0.9699}, "useful_over_issued is 0.9699, must be at least 0.97"),
        (PRODUCT, {"spills": 1}, "spills is 1, must be 0"),
        (DECODE, {"bytes_ratio": 0.9499}, "bytes_ratio is 0.9499, must be at least 0.95"),
        (DECODE, {"spills": 1}, "spills is 1, must be 0"),
        (
            EPILOGUE,
            {"instructions_per_element": 30.01},
            "instructions_per_element is 30.01, must be at most 30",
        ),
    ],
)
def test_gates_of_the_other_kernels(row, change, sentence):
    (finding,) = compare.beyond_limits([*DEFAULTS, row | change])
    assert sentence in finding
    assert compare.beyond_limits([*DEFAULTS, row | change | {"arch": "sm_100"}]) == []


BACKWARD_SHAPES = "HGMMA.64x112x16 x16, HGMMA.64x64x16 x14"
CUDA = ROW | {
    "kernel": "window_attention_kernel",
    "backend": "cuda",
    "arch": "sm_90",
    "default": False,
    "config": "window_attention bf16 template=(112,)",
    "num_warps": 12,
    "registers": 168,
    "wgmma_waits": 4,
    "mma": "HGMMA.64x112x16 x16, HGMMA.64x128x16 x14",
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"useful_over_issued": 0.97}, "useful_over_issued is 0.97, must be at least 0.98"),
        ({"spills": 1}, "spills is 1, must be 0"),
        ({"pass": "bwd", "useful_over_issued": 0.92, "mma": BACKWARD_SHAPES}, "must be at least 0.93"),
        ({"pass": "bwd", "useful_over_issued": 0.94, "mma": BACKWARD_SHAPES}, None),
        ({"pass": "bwd"}, "must have the matrix instruction HGMMA.64x64x16"),
        ({"wgmma_waits": 30}, "wgmma_waits is 30, must be at most 4"),
        ({"wgmma_serialised": "C7513"}, "wait for each other (C7513)"),
        ({"mma": "HGMMA.64x128x16 x30"}, "must have the matrix instruction HGMMA.64x112x16, has"),
        ({"mma": "HMMA.16816 x30, HGMMA.64x112x16 x16"}, "must have the matrix instruction HGMMA.64x128x16"),
    ],
)
def test_gates_of_the_cuda_attention(change, sentence):
    findings = compare.beyond_limits([*DEFAULTS, CUDA | change])
    assert [sentence in finding for finding in findings] == ([] if sentence is None else [True]), findings


def test_what_is_exempt_from_a_gate():
    """A float32 gradient enters as two bfloat16 numbers: the second product is no waste."""
    row = PRODUCT | {"kernel": "gated_residual_backward_weight_kernel", "useful_over_issued": 0.5}
    assert compare.beyond_limits([*DEFAULTS, row | {"config": "dweight bf16+fp32"}]) == []
    assert len(compare.beyond_limits([*DEFAULTS, row | {"config": "dweight bf16+bf16"}])) == 1


@pytest.mark.parametrize(
    ("row", "change", "sentence"),
    [
        (DECODE, {"bytes_ratio": 0.96}, "bytes_ratio fell from 0.97 to 0.96"),
        (EPILOGUE, {"instructions_per_element": 22.0}, "instructions_per_element rose from 20.0 to 22.0"),
    ],
)
def test_figures_of_the_other_kernels_that_get_worse(row, change, sentence):
    stored = row | {name: {"bytes_ratio": 0.97, "instructions_per_element": 20.0}[name] for name in change}
    assert compare.worse([stored], [stored]) == []
    (finding,) = compare.worse([row | change], [stored])
    assert sentence in finding
    slower = compare.worse([row | change | {"triton": "3.6.0"}], [stored])
    assert bool(slower) == ("bytes_ratio" in change)


def test_a_stored_row_may_lack_a_new_figure():
    old = {name: value for name, value in DECODE.items() if name != "bytes_ratio"}
    assert compare.worse([DECODE], [old]) == []


def test_serialised_defaults_are_always_said():
    serialised = ROW | {"wgmma_serialised": "C7515"}
    assert compare.worse([serialised], [serialised]) == []
    (remark,) = compare.slow_defaults([ROW, serialised, serialised | {"default": False}])
    assert "at seqlen 1025: ptxas makes wgmma" in remark


def test_sm_100_is_information():
    row = ROW | {"arch": "sm_100", "spills_in_loop": 9, "shared_memory": 10**6}
    assert compare.beyond_limits([*DEFAULTS, row]) == []
    assert compare.worse([row], [ROW | {"arch": "sm_100"}]) == compare.worse([], []) == []

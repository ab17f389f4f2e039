"""Every shipped Triton configuration compiles for sm_80 and sm_90; the interpreter alone would not notice."""

import pytest

from bench.static import compile as aot
from bench.static.measure import SHARED_PER_CTA

# Local memory, in bytes per thread, of the kernels that have any; every other kernel must stay in registers.
# The exact sine and cosine keep a small array for the reduction of very large angles; attention of ragged
# segments spills a little (bench/ledger.json has the rows, and no default spills in a hot loop).
RECORDED_LOCAL_BYTES = {
    "position_table_kernel": 32,
    "attention_forward_kernel": 80,
    "attention_backward_prepare_kernel": 32,
    "attention_backward_kernel": 224,
}
SHARDS = 4


def compiled(module: str, shard: int, default_only: bool) -> list[tuple[str, str, int, int, int, int]]:
    """(kernel, name, arch, bytes of cubin, of shared and of local memory) of every SHARDS-th one."""
    configs = aot.shipped(module)
    if default_only:
        configs = [config for config in configs if config.default and config.dtype == "bf16"]
    rows = []
    for config in configs[shard::SHARDS]:
        code = aot.compile_config(config)
        (usage,) = aot.usage(code.cubin, code.cuobjdump).values()
        arch = 10 * config.capability[0] + config.capability[1]
        sizes = (len(code.cubin), code.shared_bytes, usage.local_bytes)
        rows.append((config.kernel.__name__, config.name, arch, *sizes))
    return rows


# In the short run those that most calls go through.
QUICK = ("infimm_kernels.attention.triton_launch", "infimm_kernels.gated_residual.triton_forward")


@pytest.mark.parametrize(
    ("module", "which"),
    [
        *((module, "default") for module in QUICK),
        *(pytest.param(module, "all", marks=pytest.mark.long) for module in aot.modules()),
    ],
)
def test_shipped_configurations_compile(module, which):
    pytest.importorskip("triton")
    parts = aot.in_processes(compiled, [(module, shard, which == "default") for shard in range(SHARDS)])
    rows = [row for part in parts for row in part]
    assert {80, 90} <= {arch for _, _, arch, *_ in rows} <= {80, 90, 100}
    for kernel, name, arch, cubin_bytes, shared_bytes, _ in rows:
        assert cubin_bytes > 0, (kernel, name, arch)
        assert shared_bytes <= SHARED_PER_CTA[arch], (kernel, name, arch, shared_bytes)
    too_much = [
        f"{name} on sm_{arch}: {local_bytes} bytes"
        for kernel, name, arch, _, _, local_bytes in rows
        if local_bytes > RECORDED_LOCAL_BYTES.get(kernel, 0)
    ]
    assert not too_much, "\n".join(too_much)


def test_every_module_that_launches_a_kernel_names_its_configurations():
    package = aot.ROOT / "infimm_kernels"
    launching = {path for path in package.rglob("triton_*.py") if "_kernel[" in path.read_text()}
    assert launching == {aot.ROOT.joinpath(*module.split(".")).with_suffix(".py") for module in aot.modules()}

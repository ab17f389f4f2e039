"""Every shipped Triton configuration compiles for sm_80 and sm_90; the interpreter alone would not notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Local memory, in bytes per thread, of the kernels that have any; every other kernel must stay in registers.
# The exact sine and cosine keep a small array for the reduction of very large angles.
RECORDED_LOCAL_BYTES = {"position_table": 32}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
SHIPPED = {"attention": 36, "gated_residual": 30, "position_2d": 16}


@pytest.mark.parametrize("folder", list(SHIPPED))
def test_shipped_configurations_compile(folder):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_compile.py")
    done = subprocess.run(
        [sys.executable, str(script), f"infimm_kernels.{folder}.triton_forward"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == SHIPPED[folder]
    assert {row["arch"] for row in rows} == {80, 90}
    for row in rows:
        assert row["cubin_bytes"] > 0, row
        assert row["shared_bytes"] <= SHARED_BYTES[row["arch"]], row
        assert row["local_bytes"] <= RECORDED_LOCAL_BYTES.get(row["name"].split()[0], 0), row

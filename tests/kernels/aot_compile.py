"""Compile every shipped Triton configuration for sm_80 and sm_90 without a GPU; print one JSON line for each.

Run as a script, without TRITON_INTERPRET: ``python tests/kernels/aot_compile.py [MODULE ...]``, all modules
by default. The lines give the size of the cubin and what the assembler says of registers, spills and shared
memory.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))

MODULES = (
    "infimm_kernels.attention.triton_forward",
    "infimm_kernels.gated_residual.triton_forward",
    "infimm_kernels.position_2d.triton_forward",
)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_config(config) -> dict:
    names = config.kernel.arg_names
    signature = {name: config.signature.get(name, "constexpr") for name in names}
    # As the launcher finds them: aligned pointers, strides that are multiples of 16 elements.
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name.startswith("stride_")]
    source = ASTSource(
        config.kernel,
        signature=signature,
        constexprs=config.constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = GPUTarget("cuda", 10 * config.capability[0] + config.capability[1], 32)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    cubin = compiled.asm["cubin"]
    return {
        "name": config.name,
        "arch": target.arch,
        "cubin_bytes": len(cubin),
        "shared_bytes": compiled.metadata.shared,
        **resources(cubin),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory (stack and spills, bytes) per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text).groups()
    return {"registers": int(registers), "local_bytes": int(stack) + int(local)}


if __name__ == "__main__":
    for module in sys.argv[1:] or MODULES:
        for shipped in importlib.import_module(module).aot_configs():
            print(json.dumps(compile_config(shipped)), flush=True)

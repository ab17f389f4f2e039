"""``python -m tests.emulate [KERNEL ...]``: every seeded bug against the emulation; one JSON line.

KERNEL is one of add_position_2d, decode_attention, window_attention and window_attention_backward; all
without it.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.emulate import seeded_bugs
from tests.emulate import test_add_position_2d_emulated as add_position_2d
from tests.emulate import test_decode_attention_emulated as decode_attention
from tests.emulate import test_window_attention_backward_emulated as window_attention_backward
from tests.emulate import test_window_attention_emulated as window_attention

KERNELS = {
    "add_position_2d": add_position_2d,
    "decode_attention": decode_attention,
    "window_attention": window_attention,
    "window_attention_backward": window_attention_backward,
}
JOBS = 2


def is_caught(kernel: str, old: str, new: str) -> bool:
    module = KERNELS[kernel]
    with tempfile.TemporaryDirectory() as folder:
        mutant = module.build_mutant(Path(folder), old, new)
        return seeded_bugs.is_caught(lambda: module.check_everything(mutant))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulate", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(KERNELS))
    kernels = parser.parse_args(arguments).kernels or list(KERNELS)
    for kernel in kernels:
        if kernel not in KERNELS:
            parser.error(f"KERNEL must be one of {', '.join(KERNELS)}, got {kernel!r}")
    bugs = [(kernel, *bug) for kernel in kernels for bug in KERNELS[kernel].MUTATIONS]
    missed = []
    with ProcessPoolExecutor(JOBS) as pool:
        tried = pool.map(is_caught, *zip(*[(kernel, old, new) for kernel, _, old, new in bugs], strict=True))
        for (kernel, name, *_), hit in zip(bugs, tried, strict=True):
            if not hit:
                missed.append(f"{kernel}: {name}")
                print("missed", missed[-1], file=sys.stderr, flush=True)
    caught = len(bugs) - len(missed)
    print(json.dumps({"mutants": len(bugs), "caught": caught, "missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m infimm_kernels [--json]``: versions, and which backend of which op runs here, or why not."""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path

import torch

import infimm_kernels
from infimm_kernels import backends, extension
from infimm_kernels.attention.cuda import UNVERIFIED as ATTENTION_UNVERIFIED
from infimm_kernels.gated_cross_attention.cuda import UNVERIFIED as DECODE_UNVERIFIED
from infimm_kernels.position_2d.cuda import UNVERIFIED

DRIVER_VERSION = Path("/sys/module/nvidia/version")


def versions() -> dict[str, str]:
    """One printable value per component, in the order of the report."""
    return {
        "infimm_kernels": infimm_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none (CPU build)",
        "triton": _installed("triton"),
        "NVIDIA driver": DRIVER_VERSION.read_text().strip() if DRIVER_VERSION.exists() else "none",
        "extension": _extension(),
    }


def gpus() -> list[dict[str, str]]:
    """Name and compute capability of every GPU that torch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append({"name": torch.cuda.get_device_name(index), "compute capability": f"{major}.{minor}"})
    return found


def report() -> dict:
    """What is printed: versions, gpus, backends (one row per op, backend and pass), notes."""
    return {
        "versions": versions(),
        "gpus": gpus(),
        "backends": [row._asdict() for row in backends.availability()],
        "notes": [
            f"varlen_attention and window_attention, cuda: {ATTENTION_UNVERIFIED}",
            f"add_position_2d, cuda: {UNVERIFIED}",
            f"gated_cross_attention_decode, cuda: {DECODE_UNVERIFIED}",
        ],
    }


def as_text(found: dict) -> str:
    lines = [f"{name:<16}{value}" for name, value in found["versions"].items()]
    for gpu in found["gpus"] or [{"name": "none", "compute capability": ""}]:
        capability = gpu["compute capability"]
        lines.append(
            f"{'GPU':<16}{gpu['name']}" + (f", compute capability {capability}" if capability else "")
        )
    table = [("op", "backend", "pass", "here", "note")]
    for row in found["backends"]:
        table.append((row["op"], row["backend"], row["direction"], row["reason"] or "ok", row["note"]))
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines.append("")
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    lines += ["", *(f"note: {note}" for note in found["notes"])]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m infimm_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the same report as JSON")
    options = parser.parse_args(arguments)
    found = report()
    print(json.dumps(found, indent=2) if options.json else as_text(found))


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    module = extension.load()
    if module is None:
        return extension.why_not()
    info = module.build_info()
    return f"archs {';'.join(info['archs'])}, nvcc {info['nvcc']}, pybind11 {info['pybind11']}"


if __name__ == "__main__":
    main()

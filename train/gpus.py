"""Memory and peak arithmetic rates of GPUs, by name. No torch here.

Rates are the vendor's dense ones, without sparsity, with float32 accumulation: a data sheet that gives a
tensor-core number "with sparsity" is halved. A reached share of the peak (MFU) is of these."""

import dataclasses
import re

from .config import nearest_name

RATE_OF_PRECISION = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "bf16_autocast": "bf16"}
"""Which rate of a GPU a `parallel.precision` computes at; torch leaves TF32 off unless it is asked for it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One model of GPU."""

    name: str
    memory_gb: float
    """As sold, 10^9 bytes."""
    tflops: dict[str, float]
    """Peak 10^12 operations a second by "bf16", "fp16", "tf32", "fp32"; a format it has not is left out."""
    reported_as: str
    """Regular expression of the whole name that the driver reports."""

    def peak(self, precision: str) -> float | None:
        """Operations a second at a `parallel.precision` or at "tf32"; None where it has no such unit."""
        rate = self.tflops.get(RATE_OF_PRECISION.get(precision, precision))
        return None if rate is None else rate * 1e12


def _gpu(name: str, memory_gb: float, half: float, tf32: float, fp32: float, reported_as: str) -> Gpu:
    rates = {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}
    return Gpu(name=name, memory_gb=memory_gb, tflops=rates, reported_as=rf"(NVIDIA )?{reported_as}")


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA V100 data sheet (2020), SXM2: no bf16, no TF32
        Gpu(
            name="v100-32",
            memory_gb=32,
            tflops={"fp16": 125, "fp32": 15.7},
            reported_as=r"(NVIDIA |Tesla )*V100-SXM[23]-32GB",
        ),
        # NVIDIA T4 data sheet (2019)
        Gpu(
            name="t4",
            memory_gb=16,
            tflops={"fp16": 65, "fp32": 8.1},
            reported_as=r"(NVIDIA |Tesla )*T4",
        ),
        # NVIDIA A100 data sheet (2021); the same rates for SXM and PCIe
        _gpu("a100-40", 40, 312, 156, 19.5, r"A100-(SXM4|PCIE)-40GB"),
        _gpu("a100-80", 80, 312, 156, 19.5, r"A100[- ](SXM4[- ]|PCIE[- ])?80GB( PCIe)?"),
        # NVIDIA A40 data sheet (2021)
        _gpu("a40", 48, 149.7, 74.8, 37.4, r"A40"),
        # NVIDIA Ampere GA102 whitepaper (2021)
        _gpu("rtxa6000", 48, 154.8, 77.4, 38.7, r"RTX A6000"),
        _gpu("rtx3090", 24, 71, 35.6, 35.6, r"GeForce RTX 3090"),
        # NVIDIA Ada GPU architecture whitepaper (2022)
        _gpu("rtx4090", 24, 165.2, 82.6, 82.6, r"GeForce RTX 4090"),
        # NVIDIA L4, L40 and L40S data sheets (2023)
        _gpu("l4", 24, 121, 60, 30.3, r"L4"),
        _gpu("l40", 48, 181.05, 90.5, 90.5, r"L40"),
        _gpu("l40s", 48, 362.05, 183, 91.6, r"L40S"),
        # NVIDIA H100 data sheet (2023): SXM, NVL and PCIe
        _gpu("h100", 80, 989.4, 494.7, 66.9, r"H100 80GB HBM3"),
        _gpu("h100-nvl", 94, 835.5, 417.5, 60, r"H100 NVL"),
        _gpu("h100-pcie", 80, 756, 378, 51.2, r"H100 PCIe"),
        # NVIDIA H200 data sheet (2024): SXM and NVL
        _gpu("h200", 141, 989.4, 494.7, 66.9, r"H200"),
        _gpu("h200-nvl", 141, 835.5, 417.5, 60, r"H200 NVL"),
        # NVIDIA HGX B200 data sheet (2025)
        _gpu("b200", 180, 2250, 1100, 75, r"B200"),
        # NVIDIA RTX Blackwell GPU architecture whitepaper (2025)
        _gpu("rtx5090", 32, 209.5, 104.8, 104.8, r"GeForce RTX 5090"),
    )
}


def gpu(name: str) -> Gpu:
    """A GPU by its name in `GPUS`, in any case; ValueError with the nearest name for another."""
    known = GPUS.get(name.lower())
    if known is None:
        kinds = [other for other in GPUS if name and other.startswith(name.lower())]
        nearest = " or ".join(map(repr, kinds or [nearest_name(name.lower(), list(GPUS))]))
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}; did you mean {nearest}?")
    return known


def reported_gpu(device_name: str) -> Gpu | None:
    """The GPU that `torch.cuda.get_device_name()` names; None for one that is not listed, and for a slice
    (MIG, vGPU) of one, whose peak is another."""
    for known in GPUS.values():
        if re.fullmatch(known.reported_as, device_name.strip()):
            return known
    return None


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations a second of the named device at a `parallel.precision`; None where unknown, as for a CPU."""
    known = reported_gpu(device_name)
    return None if known is None else known.peak(precision)

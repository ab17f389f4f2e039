"""`python -m train plan`: whether the stages fit some GPUs, and how long they take there.

Parsing needs no torch, so that a wrong name is answered at once."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import TrainConfig, nearest_name
from ..gpus import GPUS, gpu
from ..overrides import override, parse_overrides
from ..recipes import RECIPES

USAGE_ERROR = 2
DEFAULT_MFU = 0.35
"""Between the 30 % of Megatron-Turing NLG 530B and the 46 % of PaLM 540B (Chowdhery et al. 2022, Table 3)."""
DEFAULT_HEADROOM = 0.1

_EPILOG = f"""\
gpus: {", ".join(GPUS)}

examples:
  python -m train plan --gpu a100-80 --gpus 64
  python -m train plan --gpu h200 --gpus 8 --recipes DRA,IFT --micro-batch 2 --zero 3
  python -m train plan --gpu rtx4090 --gpus 2 --preset infimm_hd_7b --offload parameters --zero 3
  python -m train plan --gpu a100-80 --gpus 16 --recipes PT gradient_checkpointing=true

Operations are counted (train/flops.py), time is operations / (GPUs x peak x --mfu): nothing is fitted to a
measurement, and --mfu stands for communication and reading too. Memory is that of rows as long as the stage
allows, images of the most windows, and logits of all text.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the plan and returns the exit code: 0, or 2 after one line on what is wrong."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        configs = _configs(options)
        known = gpu(options.gpu)
        _check(options)
        document, plans, pairs = _planned(options, known, configs)
    except ValueError as error:
        line = " ".join(part.strip() for part in str(error).splitlines())
        sys.stderr.write(f"train plan: error: {line}\n")
        return USAGE_ERROR
    if options.json:
        print(json.dumps(document, indent=1))
        return 0
    from .report import show

    show(document, plans, pairs)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train plan",
        description="Plan stages of training on so many GPUs: memory of each, operations, hours.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a field of every stage, dotted")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="kind of GPU, see below")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="how many")
    parser.add_argument("--preset", help="model (default: the one that each recipe names)")
    parser.add_argument(
        "--recipes",
        default="PT,CPT,DRA,IFT",
        metavar="A,B",
        help=f"of {', '.join(RECIPES)}, or config files (default %(default)s)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=DEFAULT_MFU,
        help="share of the peak that is reached; recomputed operations count (default %(default)s: "
        "published runs of large models reach 0.30 to 0.46, Chowdhery et al. 2022)",
    )
    parser.add_argument("--zero", type=int, choices=range(4), help="ZeRO stage (default: the recipe's)")
    parser.add_argument(
        "--offload",
        default="none",
        choices=("none", "optimizer", "parameters"),
        help="what is moved to the host's memory; its transfers are not in the time",
    )
    parser.add_argument("--micro-batch", type=int, metavar="N", help="samples of one forward on a GPU")
    parser.add_argument(
        "--windows-per-image",
        type=float,
        metavar="X",
        help="mean in dynamic stages, for the time (default: all grids of windows equally likely)",
    )
    parser.add_argument(
        "--headroom",
        type=float,
        default=DEFAULT_HEADROOM,
        help="share of the memory left for CUDA, NCCL and fragmentation (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("gpus", "micro_batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"mfu must lie in (0, 1], got {options.mfu}")
    if not 0 <= options.headroom < 1:
        raise ValueError(f"headroom must lie in [0, 1), got {options.headroom}")


def _configs(options: argparse.Namespace) -> list[TrainConfig]:
    changes = parse_overrides(options.overrides)
    if options.zero is not None:
        changes["parallel.zero_stage"] = options.zero
    names = [name.strip() for name in options.recipes.split(",") if name.strip()]
    if not names:
        raise ValueError(f"recipes must name at least one, got {options.recipes!r}")
    return [override(_recipe(name), changes) for name in names]


def _recipe(name: str) -> TrainConfig:
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"recipes must name existing config files, got {name!r}")
        try:
            return TrainConfig.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise ValueError(f"recipes must name readable configs, got {name!r}: {error}") from error
    by_name = {known.lower(): recipe for known, recipe in RECIPES.items()}
    if name.lower() not in by_name:
        nearest = nearest_name(name.lower(), list(by_name))
        nearest = next(known for known in RECIPES if known.lower() == nearest)
        raise ValueError(
            f"recipes must be among {', '.join(RECIPES)}, got {name!r}; did you mean {nearest!r}?"
        )
    return by_name[name.lower()]()


def _planned(options: argparse.Namespace, known: Any, configs: list[TrainConfig]) -> tuple[dict, list, Any]:
    # the model takes seconds to import: a wrong name is answered before
    from .paper import LATER_STAGES, paper_pairs
    from .stage import Setup, model_config, plan_stage

    setup = Setup(
        gpu=known,
        gpus=options.gpus,
        mfu=options.mfu,
        headroom=options.headroom,
        offload=options.offload,
        micro_batch=options.micro_batch,
        windows_per_image=options.windows_per_image,
    )
    plans = [plan_stage(config, model_config(config, options.preset), setup) for config in configs]
    is_papers = any(plan.stage in ("PT", *LATER_STAGES) for plan in plans)
    pairs = paper_pairs() if is_papers else None
    document = {
        "gpu": known.name,
        "gpus": options.gpus,
        "peak_tflops": {plan.stage: known.peak(plan.precision) / 1e12 for plan in plans},
        "mfu": options.mfu,
        "usable_bytes": round(setup.usable),
        "headroom": options.headroom,
        "offload": options.offload,
        "windows_per_image": options.windows_per_image,
        "preset": options.preset or ", ".join(dict.fromkeys(config.model.preset for config in configs)),
        "stages": [_plain(plan) for plan in plans],
        "hours": sum(plan.hours for plan in plans),
        "paper": None if pairs is None else dataclasses.asdict(pairs),
    }
    return document, plans, pairs


def _plain(plan: Any) -> dict[str, Any]:
    values = dataclasses.asdict(plan)
    for part in ("held", "activations"):
        values[part] = {name: round(number) for name, number in values[part].items()}
    for name in ("peak_bytes", "cast_weights"):
        values[name] = round(values[name])
    return values | {"notes": list(plan.notes)}

"""`python -m train RECIPE key=value ...`: one stage of training from the command line."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import TrainConfig, nearest_name
from .overrides import override, parse_overrides
from .recipes import RECIPES

RUN_ERROR, USAGE_ERROR = 1, 2

_EPILOG = """\
recipes:
{recipes}
  FILE.json  a config written by --print-config or found as config.json beside a checkpoint

examples:
  python -m train PT init_from=pretrained data.path=pairs.jsonl output_dir=runs/pt
  python -m train CPT data.path=vqa.jsonl init_from=runs/pt output_dir=runs/cpt
  python -m train ift data.path=llava.jsonl init_from=runs/dra optimizer.lr_scale.language=0.5
  python -m train DRA model.preset=tiny parallel.zero_stage=3 parallel.precision=fp32 --print-config

several processes, one a device (GPUs, or CPU processes where there is no GPU):
  deepspeed --num_gpus 2 --module train PT init_from=pretrained ...
  torchrun --nproc_per_node 2 -m train PT init_from=pretrained ...

init_from is the output folder of the stage before. For PT, whose ViT and LLM stay frozen, it is a folder with
their pretrained weights and a tokenizer, both as save_pretrained (of model.InfiMMHD, of transformers) writes.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (default: sys.argv) and returns the exit code: 0, 2 after one line on
    what is wrong with the arguments, 1 after one line on what stopped the training."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        config = override(_recipe(options.recipe), parse_overrides(options.overrides))
    except ValueError as error:
        return _failed(error, USAGE_ERROR, options.debug)
    if options.print_config:
        print(json.dumps(config.to_dict(), indent=2))
        return 0
    # torch and DeepSpeed take seconds to import: a wrong key is answered before
    from .distributed import stop
    from .engine import run

    try:
        run(config)
    except (ValueError, NotImplementedError, ArithmeticError, OSError) as error:
        return _failed(error, RUN_ERROR, options.debug)
    finally:
        stop()
    return 0


def _failed(error: Exception, code: int, debug: bool) -> int:
    if debug:
        raise error
    line = " ".join(part.strip() for part in str(error).splitlines())
    sys.stderr.write(f"train: error: {line}\n")  # in one piece: several ranks write to the same terminal
    return code


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:<9}  {recipe.__doc__.splitlines()[0]}" for name, recipe in RECIPES.items())
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train one stage of InfiMM-HD. Its fields can be replaced by their dotted names.",
        epilog=_EPILOG.format(recipes=lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe (any case) or a config file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a field of the config, dotted")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config as JSON and stop"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # DeepSpeed's launcher appends it; the rank is read from the environment, which torchrun sets too
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _recipe(name: str) -> TrainConfig:
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"recipe must be an existing config file, got {name!r}")
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"recipe must be a readable JSON config, got {name!r}: {error}") from error
        return TrainConfig.from_dict(values)
    if name.upper() not in RECIPES:
        nearest = nearest_name(name.upper(), list(RECIPES))
        raise ValueError(
            f"recipe must be one of {', '.join(RECIPES)}, got {name!r}; did you mean {nearest!r}?"
        )
    return RECIPES[name.upper()]()


if __name__ == "__main__":
    sys.exit(main())

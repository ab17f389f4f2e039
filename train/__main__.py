"""`python -m train RECIPE key=value ...`: one stage of training; `plan`, `plot` and `data` beside it."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import TrainConfig
from .fields import nearest_name
from .overrides import override, parse_overrides
from .recipes import RECIPES

RUN_ERROR, USAGE_ERROR, SIGNAL_BASE = 1, 2, 128
COMMANDS = {
    "plan": ("train.plan", "memory and hours of the stages on some number of GPUs"),
    "export": ("train.export", "the model of a checkpoint, as save_pretrained writes it"),
    "plot": ("train.plot", "losses, gates and speed of a run"),
    "data": ("train.data.__main__", "check every sample of a data set; write a manifest"),
}
"""Words in the place of RECIPE, the modules whose `main` they call, and what that does."""

_EPILOG = """\
recipes:
{recipes}
  FILE.json     a config written by --print-config or found as config.json beside a checkpoint

commands, each with --help:
{commands}

examples:
  python -m train PT init_from=pretrained data.path=pairs.jsonl output_dir=runs/pt
  python -m train CPT data.path=vqa.jsonl init_from=runs/pt output_dir=runs/cpt
  python -m train ift data.path=llava.jsonl init_from=runs/dra optimizer.lr_scale.language=0.5
  python -m train DRA model.preset=tiny parallel.zero_stage=3 parallel.precision=fp32 --print-config

several processes, one a device (GPUs, or CPU processes where there is no GPU):
  deepspeed --num_gpus 2 --module train PT init_from=pretrained ...
  torchrun --nproc_per_node 2 -m train PT init_from=pretrained ...
several nodes that see one file system; hosts has a line "NAME slots=8" for each:
  deepspeed --hostfile hosts --module train PT ...
  torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 -m train PT ...

The same command goes on after a crash, a kill or SIGTERM, from the newest undamaged checkpoint in output_dir,
also on another number of ranks or at another ZeRO stage.
init_from is the output folder of the stage before. For PT, whose ViT and LLM stay frozen, it is a folder with
their pretrained weights and a tokenizer, both as save_pretrained (of model.InfiMMHD, of transformers) writes.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (default: sys.argv) and returns the exit code: 0, 2 after one line on
    what is wrong with the arguments, 1 after one line on what stopped the training."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in COMMANDS:
        return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
    options = _parser().parse_intermixed_args(words)
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
    from .interrupt import Interrupted

    try:
        run(config)
    except Interrupted as stop_request:
        _failed(stop_request, SIGNAL_BASE, debug=False)
        return SIGNAL_BASE + stop_request.signal_number
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
    lines = "\n".join(f"  {name:<12}  {recipe.__doc__.splitlines()[0]}" for name, recipe in RECIPES.items())
    commands = "\n".join(f"  {name:<12}  {does}" for name, (_, does) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train one stage of InfiMM-HD. Its fields can be replaced by their dotted names.",
        epilog=_EPILOG.format(recipes=lines, commands=commands),
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
    by_case = {known.lower(): recipe for known, recipe in RECIPES.items()}
    if name.lower() not in by_case:
        known = [*RECIPES, *COMMANDS]
        nearest = nearest_name(name.lower(), [word.lower() for word in known])
        nearest = next(word for word in known if word.lower() == nearest)
        raise ValueError(f"recipe must be one of {', '.join(known)}, got {name!r}; did you mean {nearest!r}?")
    return by_case[name.lower()]()


if __name__ == "__main__":
    sys.exit(main())

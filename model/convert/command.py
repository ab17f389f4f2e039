"""The subcommands `convert`, `build` and `inspect` of `python -m model`."""

import argparse

from .forms import FORMS
from .run import build, convert, inspect
from .shards import DTYPES
from .write import TARGETS

_CONVERT = """\
forms that are read (--from): {forms}
forms that are written (--to): {targets}

examples:
  python -m model convert vite_vicuna13b_bf16.ckpt infimm-stage1 --window-size 448
  python -m model convert runs/ift/model vicuna --to transformers-llama --dtype float16
  python -m model convert runs/ift/model vit-e --to timm
"""
_BUILD = """\
example:
  python -m model build start --preset infimm_hd_13b --vision eva02_enormous --language vicuna-13b-v1.5
"""


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Adds the three subcommands; each sets `run`, a function of the parsed options."""
    epilog = _CONVERT.format(forms=", ".join(FORMS), targets=", ".join(TARGETS))
    parser = _parser(subparsers, "convert", "Read weights of a known form and write them as another.", epilog)
    parser.add_argument("source", metavar="SRC", help="file or folder, safetensors or torch's files")
    _destination(parser)
    parser.add_argument("--from", dest="form", default="auto", choices=("auto", *FORMS), metavar="FORM")
    parser.add_argument("--to", dest="target", default="infimm-hd", choices=tuple(TARGETS), metavar="FORM")
    _preset(parser)
    _writing(parser)
    parser.set_defaults(run=_convert)

    parser = _parser(
        subparsers, "build", "Assemble a start for training: two released parts, the rest new.", _BUILD
    )
    _destination(parser)
    _preset(parser, required=True)
    parser.add_argument("--vision", required=True, metavar="SRC", help="weights of a vision tower")
    parser.add_argument("--language", required=True, metavar="SRC", help="a transformers language model")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with a tokenizer (default: --language's)")
    parser.add_argument("--seed", type=int, default=0, help="of the new parts (default: 0)")
    _writing(parser)
    parser.set_defaults(run=_build)

    parser = _parser(subparsers, "inspect", "Say what weights are, after checking names and shapes.", None)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("--from", dest="form", default="auto", choices=("auto", *FORMS), metavar="FORM")
    _preset(parser)
    parser.set_defaults(run=lambda options: inspect(options.source, form=options.form, preset=options.preset))


def _parser(
    subparsers: argparse._SubParsersAction, name: str, description: str, epilog: str | None
) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        name,
        help=description,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _destination(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", metavar="DST", help="folder to make; it must be new or empty")


def _preset(parser: argparse.ArgumentParser, required: bool = False) -> None:
    text = "name of a preset, or a model's config.json, whose sizes the weights must have"
    parser.add_argument("--preset", metavar="NAME", required=required, help=text)


def _writing(parser: argparse.ArgumentParser) -> None:
    text = "interpolate the position table for windows of N pixels"
    parser.add_argument("--window-size", type=int, metavar="N", help=text)
    text = "type of the weights (default: auto, as they are)"
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help=text)
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: 5GB)")


def _convert(options: argparse.Namespace) -> str:
    report = convert(
        options.source,
        options.destination,
        form=options.form,
        target=options.target,
        preset=options.preset,
        window_size=options.window_size,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    return f"{report.text()}\nwritten: {options.destination} ({options.target})"


def _build(options: argparse.Namespace) -> str:
    reports = build(
        options.destination,
        preset=options.preset,
        vision=options.vision,
        language=options.language,
        tokenizer=options.tokenizer,
        seed=options.seed,
        window_size=options.window_size,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    texts = [report.text() for report in reports]
    return "\n".join([*texts, f"written: {options.destination} (infimm-hd)"])

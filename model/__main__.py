"""`python -m model COMMAND ...`: weights of other forms in and out; questions to a model."""

import argparse
import sys
from collections.abc import Sequence

from . import talk
from .convert.command import add_parsers as add_convert_parsers

ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (default: sys.argv); 0, or 2 after one line on what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m model", description=__doc__, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_convert_parsers(commands)
    talk.add_parsers(commands)
    options = parser.parse_args(arguments)
    try:
        print(options.run(options))
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        line = " ".join(part.strip() for part in str(error).splitlines())
        sys.stderr.write(f"error: {line}\n")
        return ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: every command is a function of :mod:`tutelage.commands`, and its docstring is the help."""

from __future__ import annotations

import argparse
import inspect as inspect_module
import os
import sys
from types import ModuleType
from typing import Any

import docstring_parser

from tutelage.commands import cache, compare, compress, demo, distill, export, gap, inspect, measure, methods, tune
from tutelage.console import say

COMMANDS = (demo, distill, cache, compare, tune, gap, inspect, methods, measure, export, compress)


def parser() -> argparse.ArgumentParser:
    """The grammar of all commands."""
    top = argparse.ArgumentParser(
        prog="tutelage",
        description="Knowledge distillation for PyTorch: train a small student of a large teacher, and deploy it.",
        epilog="Start with `tutelage demo`. `tutelage COMMAND --help` explains a command.",
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        _enter(module, commands)
    return top


def _enter(module: ModuleType, commands: Any) -> None:
    name = module.__name__.rpartition(".")[2]
    function = getattr(module, name)
    described = docstring_parser.parse(inspect_module.getdoc(function) or "")
    summary = described.short_description
    sub = commands.add_parser(name, help=summary, description=summary)
    sub.set_defaults(function=function)
    helps = {p.arg_name: p.description for p in described.params}

    def add(flag: str, **options: Any) -> None:
        default = f" Default: {options['default']}." if "default" in options else ""
        sub.add_argument(flag, help=f"{helps[flag.lstrip('-').replace('-', '_')]}{default}", **options)

    module.arguments(add)


def _version() -> str:
    from tutelage import __version__

    return f"tutelage {__version__}"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; mistakes of the user become one line on standard error and exit status 2.

    With ``TUTELAGE_DEBUG=1`` in the environment they keep their traceback.
    """
    given = vars(parser().parse_args(arguments))
    function = given.pop("function")
    try:
        function(**given)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        say(str(stop) or "stopped")
        return 130
    except (BrokenPipeError, SystemExit):  # which rich makes of it
        # the reader of our output went away (`| head`): not an error, and nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("TUTELAGE_DEBUG"):
            raise
        say(f"tutelage: {_printable(' '.join(str(error).split()))}")
        return getattr(error, "exit_status", 2)  # 1: all went well, and the answer is no
    return 0


def _printable(text: str) -> str:
    """Text that may quote somebody's file, without what a terminal would obey and without pages of it."""
    if len(text) > 2000:
        text = f"{text[:1000]} ... {text[-900:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    sys.exit(main())

"""The command line: one module per subcommand, imported when the subcommand is called.

May import every other package; nothing imports it. This module hands on `main` and `entry`, which
run a subcommand and turn errors into exit codes. Each subcommand's module has
`add_arguments(parser)` and `run(arguments)`; its docstring is the description that `--help` prints.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from passlm.errors import InputError

COMMANDS = {
    "generate": "print the completion of a prompt as it is generated",
    "train": "train look-ahead files for a model",
    "distill-data": "generate a model's answers to prompts, as training data for 'train'",
    "bench": "compare the speed of decoding methods",
    "serve": "serve a model over HTTP with an OpenAI-compatible API",
    "advise": "measure whether PaSS speeds up your prompts here, and print the best flags",
    "profile": "measure the cost of passes on this machine and predict the fastest method",
    "info": "describe a model or a look-ahead folder",
}

DONE, FAULT, USAGE, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line and suggests similar options."""

    def error(self, message: str) -> NoReturn:
        """Raise `InputError` instead of printing the usage and exiting."""
        raise InputError(f"{message}; see '{self.prog} --help'")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments; suggest a similar option for an unknown one.

        Raises:
            InputError: the arguments are invalid.
        """
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            near = difflib.get_close_matches(unknown[0], list(self._option_string_actions), 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unrecognized argument {unknown[0]}{hint}")
        return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code.

    Args:
        arguments: the arguments without the program's name; None for those of this process.
    """
    logging.basicConfig(level=logging.WARNING, format="passlm: %(message)s", stream=sys.stderr)
    logging.getLogger("passlm").setLevel(logging.INFO)
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # inside the `try`, so that a closed pipe is handled below
        return code
    except InputError as error:
        print(f"passlm: {error}", file=sys.stderr)
        return USAGE
    except PermissionError as error:
        remedy = "choose another path or change its permissions"
        print(f"passlm: {error.filename}: {error.strerror}: {remedy}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does. Standard output is redirected because Python
        # flushes it again at exit and would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return DONE if arguments else USAGE
    if arguments[0] == "--version":
        from passlm import __version__

        print(f"passlm {__version__}")
        return DONE
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
        raise InputError(f"unknown command {name!r}: {hint}")
    module = import_module(f"passlm.cli.{name.replace('-', '_')}")
    parser = Parser(prog=f"passlm {name}", description=module.__doc__, allow_abbrev=False)
    module.add_arguments(parser)
    module.run(parser.parse(arguments[1:]))
    return DONE


def _usage() -> str:
    lines = [f"  {name:<12} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: passlm COMMAND ...",
            "",
            "Faster decoding of language models with PaSS (Parallel Speculative Sampling).",
            "",
            "commands:",
            *lines,
            "",
            "Run 'passlm COMMAND --help' for the options of a command.",
        ]
    )


def entry() -> NoReturn:
    """Run the installed command `passlm` and exit."""
    sys.exit(main())

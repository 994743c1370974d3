"""The command line: finds the subcommand, runs it, and turns errors into exit codes.

Each subcommand is a module of its own, imported when it is called, with `HELP`,
`add_arguments(parser)` and `run(arguments)`.
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
    "generate": "stream a completion",
    "train": "train look-ahead files for a model",
    "distill-data": "let a model answer prompts, as text to train on",
    "bench": "run methods side by side",
    "serve": "serve a model over HTTP, as the OpenAI API",
    "advise": "say whether PaSS pays for your prompts here, and with which flags",
    "profile": "measure what passes cost here, and say which plan pays",
    "info": "what a model or a look-ahead folder is",
}

DONE, FAULT, USAGE, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Argparse's parser with errors of one line, which name the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise InputError(f"{message}; see '{self.prog} --help'")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """As argparse's `parse_args`, with a suggestion for an unknown option."""
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            near = difflib.get_close_matches(unknown[0], list(self._option_string_actions), 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unrecognized argument {unknown[0]}{hint}")
        return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; gives the exit code."""
    logging.basicConfig(level=logging.WARNING, format="passlm: %(message)s", stream=sys.stderr)
    logging.getLogger("passlm").setLevel(logging.INFO)
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # here, where a closed pipe can still be met quietly
        return code
    except InputError as error:
        print(f"passlm: {error}", file=sys.stderr)
        return USAGE
    except PermissionError as error:
        cure = "give another path, or the rights to this one"
        print(f"passlm: {error.filename}: {error.strerror}: {cure}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has enough; python would complain again at exit.
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
            "PaSS, Parallel Speculative Sampling",
            "",
            *lines,
            "",
            "'passlm COMMAND --help' says more of each.",
        ]
    )


def entry() -> NoReturn:
    """The installed command."""
    sys.exit(main())

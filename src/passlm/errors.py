"""The base class of all errors caused by a user's input."""

from __future__ import annotations


class InputError(ValueError):
    """Error caused by an argument, file or setting that the user provided.

    The message is one line that says what was wrong, what was expected and what to do. The command
    line prints it and exits with code 2.
    """

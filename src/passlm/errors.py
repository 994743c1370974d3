"""What all errors about a user's input have in common."""

from __future__ import annotations


class InputError(ValueError):
    """Something a user gave cannot be used.

    The message is one line: what was wrong, what was expected, what to do. The command line
    prints it and exits with 2.
    """

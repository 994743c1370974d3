"""Entry point of `python -m passlm.cli`, for launchers that start modules."""

from passlm.cli import entry

entry()

"""Write the figures of training to TensorBoard event files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passlm.errors import InputError

if TYPE_CHECKING:
    from passlm.train.loop import Progress


def board_writer() -> Callable[[str], Any]:
    """Return the class that writes TensorBoard event files to a folder.

    Raises:
        InputError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs tensorboard: pip install tensorboard") from error
    writer: Callable[[str], Any] = SummaryWriter
    return writer


@contextlib.contextmanager
def written_to(
    board: Callable[[str], Any] | None, folder: Path
) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that writes figures to TensorBoard; without `board` it does nothing."""
    if board is None:
        yield lambda _: None
        return
    with board(str(folder / "tensorboard")) as writer:

        def note(done: Progress) -> None:
            for name in ("loss", "learning_rate", "gradient_norm", "accepted_length"):
                if getattr(done, name) is not None:
                    writer.add_scalar(name, getattr(done, name), done.step)
            for row, share in enumerate(done.accepted_by_position or (), start=1):
                writer.add_scalar(f"accepted_to_row/{row}", share, done.step)

        yield note

"""Serve a model over HTTP, as the OpenAI API."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from passlm.cli.common import (
    add_decoding_arguments,
    add_fields,
    add_model_arguments,
    loaded,
    taken,
)
from passlm.errors import InputError

if TYPE_CHECKING:
    from passlm.serve.jobs import WorkerSettings
    from passlm.serve.settings import ServeSettings

KEY_VARIABLE = "PASSLM_API_KEY"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")

_log = logging.getLogger("passlm.serve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    from passlm.serve.jobs import WorkerSettings
    from passlm.serve.settings import ServeSettings

    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="F",
        help=f"keys, one a line, of which requests must bring one; as is ${KEY_VARIABLE}",
    )
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="for texts under way when told to stop; default 30",
    )
    add_model_arguments(parser)
    add_decoding_arguments(parser, compiled=True)
    add_fields(parser, WorkerSettings)
    add_fields(parser, ServeSettings, ("api_keys",))


def run(arguments: argparse.Namespace) -> None:
    """Serve until a signal comes.

    Raises:
        InputError: a setting, a key, the address, the model or the look-ahead files cannot be used.
        KeyboardInterrupt: it was interrupted; what was under way is finished.
    """
    _check_packages()
    worker_settings, settings = _settings(arguments)
    from passlm.serve.logs import log_json_lines
    from passlm.serve.run import address_of, bound_socket, is_loopback, serve

    listening = bound_socket(arguments.host, arguments.port, settings.write_seconds)
    with listening:
        log_json_lines()
        if not (settings.api_keys or is_loopback(listening)):
            _log.warning(
                "--host %s lets others in and there is no API key: give --api-key-file or set $%s",
                arguments.host,
                KEY_VARIABLE,
            )
        raise_file_limit()
        from passlm.serve.app import create_app
        from passlm.serve.memory import keep_large_blocks_apart
        from passlm.serve.worker import Worker, model_thread

        keep_large_blocks_apart()
        thread = model_thread()
        with ending_at_once():  # a download or a conversion in another thread would be waited for
            lm = thread.submit(loaded, arguments).result()
        worker = Worker(lm, worker_settings, thread)
        app = create_app(lm, worker, settings)
        worker.start()
        line = f"passlm serves {settings.model_name} on {address_of(listening)}"
        ended = serve(
            app,
            worker,
            listening,
            arguments.grace_seconds,
            settings.read_seconds,
            lambda: print(line, flush=True),
        )
    if ended == signal.SIGINT:
        raise KeyboardInterrupt


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a signal that asks to stop end the process, whatever other threads do."""

    def end(number: int, frame: object) -> None:
        os._exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            f"serving needs {', '.join(missing).replace('_', '-')}: pip install 'passlm[serve]'"
        )


def _settings(arguments: argparse.Namespace) -> tuple[WorkerSettings, ServeSettings]:
    from passlm.serve.jobs import WorkerSettings
    from passlm.serve.settings import ServeSettings

    if arguments.grace_seconds < 0:
        raise InputError(f"--grace-seconds is {arguments.grace_seconds}: it must be 0 or more")
    if not 0 <= arguments.port < 2**16:
        raise InputError(f"--port is {arguments.port}: it must lie between 0 and 65535")
    settings = taken(ServeSettings, arguments, ("api_keys",))
    return taken(WorkerSettings, arguments), replace(
        settings,
        model_name=settings.model_name or model_name(arguments.model),
        api_keys=read_keys(arguments.api_key_file, os.environ.get(KEY_VARIABLE)),
    )


def model_name(model: str) -> str:
    """What clients call a model: of a folder or file its own name, not where it lies."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def read_keys(file: Path | None, variable: str | None) -> tuple[str, ...]:
    """The keys of a file and of the environment; none where neither is given.

    Args:
        file: one key a line; empty lines and those that begin with `#` say nothing.
        variable: what the environment variable holds.

    Raises:
        InputError: the file cannot be read or holds no key, or a key cannot be sent in a header.
    """
    keys = [] if variable is None else [variable]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            mode = file.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read --api-key-file {file}: {error}") from error
        found = [line.strip() for line in lines]
        found = [line for line in found if line and not line.startswith("#")]
        if not found:
            raise InputError(f"--api-key-file {file} holds no key: write one on each line")
        if mode & stat.S_IROTH:
            _log.warning("everybody on this machine can read %s: chmod 600 %s", file, file)
        keys += found
    if not all(key.isascii() and key.isprintable() and key and " " not in key for key in keys):
        raise InputError(
            f"a key in ${KEY_VARIABLE} or --api-key-file is empty or holds a space or a character "
            "that no header can: give letters, digits and signs"
        )
    return tuple(keys)


def raise_file_limit() -> None:
    """Each connection is an open file, and the usual limit is low."""
    try:
        import resource
    except ImportError:  # of Unix alone
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

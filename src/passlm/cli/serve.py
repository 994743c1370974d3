"""Serve a model over HTTP with an OpenAI-compatible API."""

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
    settings_from,
)
from passlm.errors import InputError

if TYPE_CHECKING:
    from passlm.serve.protocol import WorkerSettings
    from passlm.serve.settings import ServeSettings

KEY_VARIABLE = "PASSLM_API_KEY"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")

_log = logging.getLogger("passlm.serve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    from passlm.serve.protocol import WorkerSettings
    from passlm.serve.settings import ServeSettings

    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine only)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8000,
        help="port to listen on; 0 chooses a free one (default: 8000)",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="F",
        help="file with one API key per line; requests must send one of them or the key in "
        f"${KEY_VARIABLE}",
    )
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="time that running requests get to finish after a stop signal (default: 30)",
    )
    add_model_arguments(parser)
    add_decoding_arguments(parser, compiled=True)
    add_fields(parser, WorkerSettings)
    add_fields(parser, ServeSettings, ("api_keys",))


def run(arguments: argparse.Namespace) -> None:
    """Serve until a signal arrives.

    Raises:
        InputError: a setting, a key, the address, the model or the look-ahead files cannot be used.
        KeyboardInterrupt: the server was interrupted; running requests were given time to finish.
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
                "--host %s is reachable from other machines and there is no API key: give "
                "--api-key-file or set $%s",
                arguments.host,
                KEY_VARIABLE,
            )
        raise_file_limit()
        from passlm.serve.app import create_app
        from passlm.serve.memory import keep_large_blocks_apart
        from passlm.serve.worker import Worker, model_thread

        keep_large_blocks_apart()
        thread = model_thread()
        # Python would wait for the download or conversion in the other thread before it exits.
        with ending_at_once():
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
    """Make SIGINT and SIGTERM end the process immediately, without waiting for other threads."""

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
    from passlm.serve.protocol import WorkerSettings
    from passlm.serve.settings import ServeSettings

    if arguments.grace_seconds < 0:
        raise InputError(f"--grace-seconds is {arguments.grace_seconds}: it must be 0 or more")
    if not 0 <= arguments.port < 2**16:
        raise InputError(f"--port is {arguments.port}: it must lie between 0 and 65535")
    settings = settings_from(ServeSettings, arguments, ("api_keys",))
    return settings_from(WorkerSettings, arguments), replace(
        settings,
        model_name=settings.model_name or model_name(arguments.model),
        api_keys=read_keys(arguments.api_key_file, os.environ.get(KEY_VARIABLE)),
    )


def model_name(model: str) -> str:
    """Return the name that clients use for a model; for a folder or file, without its path."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def read_keys(file: Path | None, variable: str | None) -> tuple[str, ...]:
    """Return the API keys of a file and of the environment variable; none if neither is given.

    Args:
        file: one key per line; empty lines and lines that start with `#` are ignored.
        variable: value of the environment variable.

    Raises:
        InputError: the file cannot be read or contains no key, or a key is not allowed in a header.
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
            raise InputError(f"--api-key-file {file} contains no key: write one key per line")
        if mode & stat.S_IROTH:
            _log.warning("every user of this machine can read %s: run 'chmod 600 %s'", file, file)
        keys += found
    if not all(key.isascii() and key.isprintable() and key and " " not in key for key in keys):
        raise InputError(
            f"a key in ${KEY_VARIABLE} or --api-key-file is empty, or contains a space or a "
            "character that is not allowed in a header: use ASCII letters, digits and punctuation"
        )
    return tuple(keys)


def raise_file_limit() -> None:
    """Raise the limit on open files to its maximum, because each connection counts as one."""
    try:
        import resource
    except ImportError:  # not available on Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

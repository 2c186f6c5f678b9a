"""The verb `serve`: from options to a running server."""

from __future__ import annotations

import importlib.util
import ipaddress
import secrets
import signal
import socket
from pathlib import Path
from typing import Any

from vclipseg.console import Console
from vclipseg.errors import UsageError

NEEDED = ("fastapi", "uvicorn", "python_multipart")
CONNECTIONS = 128
"""Open at once; more are told to come again."""


def run_verb(
    folder: Path,
    data: Path | None,
    host: str,
    port: int,
    token: str | None,
    largest_mb: int,
    console: Console,
) -> None:
    """Serve until Ctrl-C.

    Raises:
        UsageError: the extra is not installed, there is no run, or the address is taken.
    """
    require_extra()
    import uvicorn

    from vclipseg.serve.app import create_app
    from vclipseg.serve.guard import LOOPBACK, Limits, address

    local = is_loopback(host)
    token = token or (None if local else secrets.token_urlsafe(24))
    with listen(host, port) as listening:
        app = create_app(
            folder,
            data,
            token=token,
            hosts={*LOOPBACK, host} if local else (),
            limits=Limits(body_bytes=largest_mb * 2**20),
            console=console,
        )
        if not local:
            console.note("Open to other machines, unencrypted: put a proxy with TLS before it.")
        print(address(host, listening.getsockname()[1], token), flush=True)
        config = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        server = uvicorn.Server(config)
        end_with_terminal(server)
        server.run(sockets=[listening])


def end_with_terminal(server: Any) -> None:
    """What people sent is removed, too, when the terminal is closed; `nohup` keeps the server."""
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        return

    def end(number: int, frame: object) -> None:
        server.should_exit = True

    signal.signal(signal.SIGHUP, end)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        UsageError: the address is taken, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"{host}:{port}: cannot be listened on ({error.strerror}); choose another --port"
        ) from error


def require_extra() -> None:
    """The extra `serve` is installed.

    Raises:
        UsageError: it is not.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"serving needs {', '.join(missing)}: install it with `pip install 'vclipseg[serve]'`"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

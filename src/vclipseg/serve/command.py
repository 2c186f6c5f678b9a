"""The verb `serve`: from options to a running server."""

from __future__ import annotations

import importlib.util
import ipaddress
import secrets
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
    app = create_app(
        folder,
        data,
        token=token,
        hosts={*LOOPBACK, host} if local else (),
        limits=Limits(body_bytes=largest_mb * 2**20),
        console=console,
    )
    settings: dict[str, Any] = {
        "host": host,
        "port": port,
        "log_level": "warning",
        "limit_concurrency": CONNECTIONS,
        "timeout_graceful_shutdown": 5,
        "server_header": False,
    }
    server = uvicorn.Server(uvicorn.Config(app, **settings))
    try:
        socket = server.config.bind_socket()
    except SystemExit as error:  # what uvicorn makes of an address in use
        raise UsageError(f"{host}:{port}: cannot be listened on; choose another --port") from error
    port = socket.getsockname()[1]
    if not local:
        console.note("Open to other machines, unencrypted: put a proxy with TLS before it.")
    print(address(host, port, token), flush=True)
    server.run(sockets=[socket])


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

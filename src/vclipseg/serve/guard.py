"""What every request passes first: who may ask, how much may be sent, and what the browser may do.

On loopback only requests for a loopback name are answered, so that no page in the same browser can
reach the server under a name of its own (DNS rebinding), and only from the server's own pages.
Beyond loopback a token is asked for.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.exceptions import HTTPException

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
COOKIE = "vclipseg"
OPEN_PATHS = ("/auth/", "/auth/token")
"""Asked before there is a token: how to get one."""
BODY_TIMEOUT = 60.0
"""Seconds to wait for the next piece of a body."""
SMALL = 2**16
"""Bytes of a body that counts as no upload."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """What the guard holds requests to.

    Attributes:
        body_bytes: largest body of a request.
        uploads: bodies above `SMALL` taken in at once.
    """

    body_bytes: int = 512 * 2**20
    uploads: int = 4


class Refused(HTTPException):
    """A request that is not passed on, or not read to its end."""


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(
        self, app: App, *, token: str | None, hosts: Iterable[str], limits: Limits
    ) -> None:
        """Guard `app`.

        Args:
            app: what answers.
            token: needed for every request, if there is one.
            hosts: names that requests may be for, without a port; all where there are none.
            limits: of what is sent.
        """
        self.app, self.token, self.limits = app, token, limits
        self.hosts = frozenset(hosts)
        self.uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or say why not."""
        if scope["type"] == "websocket":
            raise RuntimeError("there are no websockets here")
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        started = False

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                sent = {k.lower() for k, _ in message.get("headers", ())}
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [
                    *message.get("headers", ()),
                    *(pair for pair in extra if pair[0] not in sent),
                ]
            await send(message)

        try:
            self._check_origin(scope, headers)
            if await self._log_in(scope, with_headers):
                return
            self._check_token(scope, headers)
            async with self._body(headers, receive) as guarded:
                await self.app(scope, guarded, with_headers)
        except Refused as refused:
            if not started:
                await answer(with_headers, refused)

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self.hosts and hostname(host) not in self.hosts:
            raise Refused(403, "this server answers on its own name only")
        origin = headers.get("origin")
        if origin is not None and urlsplit_or_none(origin) != host.lower():
            raise Refused(403, "requests from pages of other sites are not answered")
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and headers.get("sec-fetch-mode") != "navigate":
            raise Refused(403, "requests from pages of other sites are not answered")

    async def _log_in(self, scope: Scope, send: Send) -> bool:
        """`/?token=...`, as printed at the start, becomes a cookie and a clean address."""
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        if not self.token or scope["path"] != "/" or "token" not in query:
            return False
        if not same(query["token"], self.token):
            raise Refused(401, "wrong token")
        cookie = f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        if scope.get("scheme") == "https":
            cookie += "; Secure"
        await answer(send, Refused(303, "", {"location": "/", "set-cookie": cookie}))
        return True

    def _check_token(self, scope: Scope, headers: dict[str, str]) -> None:
        if not self.token or scope["path"] in OPEN_PATHS:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and same(given.strip(), self.token):
            return
        if same(cookie_of(headers.get("cookie", "")), self.token):
            return
        raise Refused(
            401,
            "a token is needed: open the address that the server printed when it began",
            {"www-authenticate": "Bearer"},
        )

    def _body(self, headers: dict[str, str], receive: Receive) -> Body:
        length = headers.get("content-length")
        declared = int(length) if length and length.isdecimal() else None
        if declared is not None and declared > self.limits.body_bytes:
            raise self.too_large()
        sends = declared is None and "transfer-encoding" in headers
        return Body(self, receive, upload=sends or (declared or 0) > SMALL)

    def too_large(self) -> Refused:
        """What a body above the limit is answered."""
        return Refused(413, f"more than {self.limits.body_bytes / 2**20:g} MiB in one request")


class Body:
    """A request's body, counted as it comes; a context in which it is an upload, if it is one."""

    def __init__(self, guard: Guard, receive: Receive, upload: bool) -> None:
        self.guard, self.receive, self.upload = guard, receive, upload
        self.bytes = 0

    async def __aenter__(self) -> Receive:
        if self.upload:
            if self.guard.uploads >= self.guard.limits.uploads:
                raise Refused(503, "too many uploads at once; try again", {"retry-after": "5"})
            self.guard.uploads += 1
        return self.next

    async def __aexit__(self, *error: object) -> None:
        self._received()

    def _received(self) -> None:
        if self.upload:
            self.upload = False
            self.guard.uploads -= 1

    async def next(self) -> Message:
        """The next piece, if it comes in time and is not too much."""
        if self.bytes < 0:  # all is there: what comes next is the end of the connection
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), BODY_TIMEOUT)
        except TimeoutError as error:
            raise Refused(408, "the request did not come in time") from error
        if message["type"] != "http.request":
            return message
        self.bytes += len(message.get("body", b""))
        if self.bytes > self.guard.limits.body_bytes:
            raise self.guard.too_large()
        if not message.get("more_body", False):
            self.bytes = -1
            self._received()
        return message


async def answer(send: Send, refused: Refused) -> None:
    """Send a short JSON answer."""
    body = json.dumps({"detail": refused.detail}).encode() if refused.detail else b""
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    # the rest of a body that was refused is not read
    headers |= {"connection": "close"} if refused.status_code in (408, 413, 503) else {}
    pairs = [(k.encode(), v.encode()) for k, v in {**headers, **(refused.headers or {})}.items()]
    await send({"type": "http.response.start", "status": refused.status_code, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def hostname(host: str) -> str:
    """`localhost` of `localhost:8000`; brackets of IPv6 taken away."""
    name = urlsplit_or_none(f"//{host}", part="hostname")
    return (name or "").rstrip(".")


def urlsplit_or_none(url: str, part: str = "netloc") -> str | None:
    """Part of an address in lower case, None where it is no address."""
    try:
        found = getattr(urlsplit(url), part)
    except ValueError:
        return None
    return found.lower() if found else None


def cookie_of(header: str) -> str:
    """The token in a Cookie header, or nothing; other servers of the host may put anything beside it."""
    pairs = (part.partition("=") for part in header.split(";"))
    return next((value.strip() for name, _, value in pairs if name.strip() == COOKIE), "")


def same(given: str, token: str) -> bool:
    """Whether two texts are equal, in a time that tells nothing."""
    return hmac.compare_digest(given.encode(), token.encode())


def address(host: str, port: int, token: str | None) -> str:
    """Where to point a browser."""
    shown = f"[{host}]" if ":" in host else host
    query = "?" + urlencode({"token": token}) if token else ""
    return f"http://{shown}:{port}/{query}"

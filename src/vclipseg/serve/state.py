"""What the routes share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from vclipseg.data.volume import Volume
from vclipseg.serve.catalog import Catalog
from vclipseg.serve.incoming import Scans
from vclipseg.serve.jobs import Jobs
from vclipseg.serve.limits import ScanLimits
from vclipseg.serve.models import Models
from vclipseg.serve.schemas import Problem
from vclipseg.serve.volumes import NIFTI, etag, nifti_bytes

READERS = 3
"""Volumes read and packed at once: each takes memory."""
WAITING = 12
"""Requests that wait for a job at once: each holds one of about forty threads."""


@dataclass
class State:
    """Runs, models, jobs, scans.

    Attributes:
        temporary: folder of what is sent; it goes when the server ends.
        token: what requests must know, if anything.
    """

    catalog: Catalog
    jobs: Jobs
    temporary: Path
    limits: ScanLimits = field(default_factory=ScanLimits)
    token: str | None = None
    reading: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(READERS)
    )
    waiting: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(WAITING)
    )

    def __post_init__(self) -> None:
        self.models = Models(self.jobs, self.temporary / "looks")
        self.scans = Scans(self.temporary / "scans", self.limits)

    def send(self, request: Request, read: Callable[[], Volume], name: str) -> Response:
        """A volume as a NIfTI file; nothing if the browser has it."""
        with self.reading:
            content = nifti_bytes(read())
        tag = etag(content)
        headers = {"etag": tag, "cache-control": "private, no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=NIFTI, headers=headers | attached(name))


def taking_files(most: int) -> type[APIRoute]:
    """Routes that take so many files in a request; usually it is 1000, and a series may have more."""

    class Many(Request):
        def form(self, **limits: Any) -> Any:
            return super().form(**{**limits, "max_files": most})

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def of_many(request: Request) -> Response:
                return await handle(Many(request.scope, request.receive))

            return of_many

    return Route


def attached(name: str) -> dict[str, str]:
    """Headers that name a file to save; `name` is of plain characters."""
    plain = name.encode("ascii", "replace").decode().replace('"', "").replace("?", "_")
    return {"content-disposition": f'attachment; filename="{plain}"'}


PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in {
        400: "what was asked makes no sense",
        401: "a token is needed",
        403: "not from here",
        404: "no such thing",
        409: "somebody has decided meanwhile",
        413: "too much",
        422: "what was sent cannot be read",
        503: "too much at once; try again",
        507: "no space is left on the server",
    }.items()
}
VOLUME: dict[int | str, dict[str, Any]] = {
    200: {"content": {NIFTI: {"schema": {"type": "string", "format": "binary"}}}},
    304: {"description": "as you have it"},
}

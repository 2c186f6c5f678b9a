"""The application: routes, errors as answers, and the pages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from vclipseg import __version__
from vclipseg.console import Console
from vclipseg.data.reviews import Conflict
from vclipseg.errors import DataError, UsageError, VclipsegError
from vclipseg.serve.catalog import Catalog, NotFound
from vclipseg.serve.guard import LOOPBACK, Guard, Limits
from vclipseg.serve.jobs import Busy, Jobs
from vclipseg.serve.limits import NoSpace, ScanLimits, TooMuch
from vclipseg.serve.monai_routes import monai_routes
from vclipseg.serve.predict_routes import predict_routes
from vclipseg.serve.review_routes import review_routes
from vclipseg.serve.state import PROBLEMS, State
from vclipseg.serve.temporary import TemporaryFolder
from vclipseg.serve.view_routes import view_routes

PATIENCE = 5.0
"""Seconds that the end of the server waits for what is under way."""

DESCRIPTION = """Runs of vclipseg: look at cases, predict scans, review pseudo-labels.

Routes under `/api` are the browser page's. The others follow MONAI Label's, so that its extension of
3D Slicer can be pointed at this server. Masks hold class indices unless a route says otherwise."""


def create_app(
    root: Path,
    data: Path | None = None,
    *,
    token: str | None = None,
    hosts: Iterable[str] = LOOPBACK,
    limits: Limits | None = None,
    scan_limits: ScanLimits | None = None,
    waiting: int = 8,
    console: Console | None = None,
) -> FastAPI:
    """An application that serves a run folder, or a folder of them.

    Args:
        root: the folder.
        data: where the data are, if not where the runs found them.
        token: what requests must know; none is needed without.
        hosts: names that requests may be for; all if there are none.
        limits: of requests.
        scan_limits: of scans.
        waiting: jobs that may wait.
        console: where failures of the server itself are said.

    Raises:
        UsageError: there is no run.
    """
    catalog = Catalog(root, data)
    temporary = TemporaryFolder()
    jobs = Jobs(waiting, console=console)
    state = State(catalog, jobs, temporary.path, scan_limits or ScanLimits(), token)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        state.scans.close()
        jobs.close(PATIENCE)  # a job that still writes would make the folder anew
        temporary.remove()

    app = FastAPI(
        title="vclipseg",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,  # its page is loaded from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses=PROBLEMS,
    )
    app.state.served = state
    for routes in (view_routes, predict_routes, review_routes, monai_routes):
        app.include_router(routes(state))
    static = Path(str(resources.files("vclipseg.serve"))) / "static"

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(static / "index.html")

    app.mount("/static", StaticFiles(directory=static), name="static")
    app.add_exception_handler(VclipsegError, _error)
    app.add_exception_handler(Busy, _busy)
    app.add_middleware(Guard, token=token, hosts=hosts, limits=limits or Limits())
    return app


STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotFound, 404),
    (Conflict, 409),
    (TooMuch, 413),
    (NoSpace, 507),
    (DataError, 422),
    (UsageError, 400),
    (VclipsegError, 500),
)


async def _error(request: Request, error: Exception) -> JSONResponse:
    status = next(code for kind, code in STATUS if isinstance(error, kind))
    return JSONResponse({"detail": str(error)}, status)


async def _busy(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 503, {"retry-after": "5"})

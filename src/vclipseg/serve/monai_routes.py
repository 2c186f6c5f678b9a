"""Routes of MONAI Label, so that its extensions of 3D Slicer and others can ask this server.

A model is a run. The datastore is the data set of the first run; its images are the run's unlabeled
cases. Labels sent to it are reviews. Masks hold class indices.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, File, Form, Query, Request, Response, UploadFile

from vclipseg.data.reviews import read_reviews
from vclipseg.data.volume import Volume
from vclipseg.errors import DataError, UsageError
from vclipseg.serve.catalog import NotFound, ServedRun
from vclipseg.serve.guard import Refused, same
from vclipseg.serve.jobs import Busy, Job, JobFailed
from vclipseg.serve.monai_facts import (
    app_info,
    class_numbers,
    first_run,
    objects,
    session_info,
    stats,
)
from vclipseg.serve.predict_routes import mask_of, predict_scan, scan_of
from vclipseg.serve.review_routes import current_mask, look_at_all, make_queue, save
from vclipseg.serve.state import VOLUME, State, attached, taking_files
from vclipseg.serve.volumes import NIFTI, nifti_bytes

INFER_SECONDS = 600
Output = Literal["image", "json", "all"]
Sent = Annotated[UploadFile | None, File()]


def monai_routes(state: State) -> APIRouter:
    """The routes, on the runs of `state`."""
    route = taking_files(state.limits.files + 1)
    router = APIRouter(tags=["MONAI Label"], route_class=route)
    _about(router, state)
    _infer(router, state)
    _sessions(router, state)
    _datastore(router, state)
    return router


def _about(router: APIRouter, state: State) -> None:
    @router.get("/info/")
    def information() -> dict[str, Any]:
        """What the server can do."""
        return app_info(state)

    @router.post("/activelearning/{strategy}")
    def next_sample(strategy: str, params: Annotated[dict | None, Body()] = None) -> dict[str, Any]:
        """The next image to annotate; empty when none is left."""
        served = first_run(state)
        if served.model_path.is_file():
            look_at_all(state, served)
        queue = make_queue(state, served, strategy)
        left = [case for case in queue.cases if case.decision is None]
        if not left:
            return {}
        name = f"{left[0].id}.nii.gz"
        return {
            "id": left[0].id,
            "name": name,
            "path": name,  # not a path here: clients then ask for the image
            "weight": left[0].score,
            "url": f"/datastore/image?image={left[0].id}",
            "strategy": strategy,
            "reasons": left[0].reasons,
        }

    @router.get("/train/")
    def train_status(check_if_running: bool = False) -> dict[str, Any]:
        """Nothing is trained here."""
        if check_if_running:
            raise NotFound("no training is running")
        return {
            "status": "none",
            "details": "train with `vclipseg train`; it uses what was reviewed",
        }

    @router.get("/auth/")
    def auth() -> dict[str, Any]:
        """Whether a token is needed."""
        return {"enabled": state.token is not None}

    @router.post("/auth/token")
    def log_in(password: Annotated[str, Form(max_length=200)]) -> dict[str, str]:
        """The token for the token: clients that ask for a name and a password get in with it."""
        if state.token and not same(password, state.token):
            raise Refused(401, "wrong token")
        return {"access_token": state.token or "", "token_type": "bearer"}

    @router.get("/auth/token/valid")
    def valid() -> dict[str, Any]:
        """Answers if the token is right."""
        return {}


def _infer(router: APIRouter, state: State) -> None:
    @router.post("/infer/{model}", responses=VOLUME)
    def infer(
        model: str,
        image: str = "",
        session_id: str = "",
        output: Output | None = None,
        params: Annotated[str, Form(max_length=10_000)] = "{}",
        file: Sent = None,
        label: Sent = None,
    ) -> Response:
        """Predict an image of the datastore, of a session, or sent along."""
        check_params(params)
        served = state.catalog.get(model)
        mask = infer_mask(state, served, image, session_id, file)
        facts = {"label_names": class_numbers(served), "model": model}
        return reply(mask, facts, output)


def _sessions(router: APIRouter, state: State) -> None:
    @router.put("/session/")
    def create_session(
        files: Annotated[list[UploadFile], File()],
        uncompress: bool = False,
        expiry: Annotated[int, Query(ge=0, le=10**9)] = 0,
    ) -> dict[str, Any]:
        """Send an image once, to infer it several times."""
        scan = state.scans.add([(file.filename or "", file.file) for file in files])
        return {"session_id": scan.id, "session_info": session_info(scan)}

    @router.get("/session/{session_id}")
    def get_session(session_id: str) -> dict[str, Any]:
        """What is known of a session."""
        return session_info(scan_of(state, session_id))

    @router.delete("/session/{session_id}")
    def end_session(session_id: str) -> dict[str, Any]:
        """Forget a session's image."""
        told = session_info(scan_of(state, session_id))
        state.scans.remove(session_id)
        return told


def _datastore(router: APIRouter, state: State) -> None:
    @router.get("/datastore/")
    def datastore(output: Literal["stats", "all", "train"] | None = None) -> Any:
        """Images and labels, or how many there are."""
        served = first_run(state)
        if output == "all":
            return {"objects": objects(served)}
        if output == "train":
            return [{"image": i, "label": i} for i in read_reviews(served.dataset.root)]
        return stats(served)

    @router.put("/datastore/")
    def add_image(file: Annotated[UploadFile, File()], image: str = "") -> dict[str, str]:
        """Send an image for `/infer`. It is kept for a while and is no case of the data set."""
        scan = state.scans.add([(file.filename or "", file.file)])
        return {"image": scan.id}

    @router.get("/datastore/image", responses=VOLUME)
    def image(image: str, request: Request) -> Response:
        """The first channel of a case's image."""
        served = first_run(state)
        return state.send(request, lambda: served.image(image), f"{image}.nii.gz")

    @router.put("/datastore/label")
    def add_label(
        image: str,
        label: Annotated[UploadFile, File()],
        tag: str = "",
        params: Annotated[str, Form(max_length=10_000)] = "{}",
    ) -> dict[str, Any]:
        """Save a mask as the review of a case; `original` ones are the model's and are not sent."""
        check_params(params)
        if tag not in ("", "final"):
            raise UsageError(f"labels are saved with the tag final, not {tag!r}")
        review = save(state, first_run(state), image, "fixed", label, None)
        return {"image": image, "label": image, "tag": "final", "revision": review.revision}

    @router.get("/datastore/label", responses=VOLUME)
    def label(label: str, request: Request, tag: str = "final") -> Response:
        """A case's reviewed mask, or the model's with the tag `original`."""
        served = first_run(state)
        if tag == "original":
            return state.send(request, lambda: state.models.mask(served, label), "label.nii.gz")
        if label not in read_reviews(served.dataset.root):
            raise NotFound(f"{label}: has no label with the tag {tag!r}")
        return state.send(request, lambda: current_mask(state, served, label), "label.nii.gz")


def infer_mask(
    state: State, served: ServedRun, image: str, session_id: str, file: UploadFile | None
) -> Volume:
    """The mask of what was asked for, once it is made."""
    if file is not None:
        scan = state.scans.add([(file.filename or "", file.file)])
    elif session_id or state.scans.get(image):
        scan = scan_of(state, session_id or image)
    elif image:
        wait(state, state.models.look_at(served, image))
        return state.models.mask(served, image)
    else:
        raise UsageError("name an image, a session_id, or send a file")
    try:
        wait(state, predict_scan(state, served, scan))
        return mask_of(scan, served)
    finally:
        if file is not None:
            state.scans.remove(scan.id)


def wait(state: State, job: Job) -> None:
    """Wait for a job; what it says of a bad scan is said of the request.

    Raises:
        Busy: as many as may are waiting; each holds a thread.
    """
    if not state.waiting.acquire(blocking=False):
        raise Busy("too many requests are waiting for a mask; try again")
    try:
        job.wait(INFER_SECONDS)
    except TimeoutError as error:
        raise Refused(503, "took too long", {"retry-after": "60"}) from error
    except JobFailed as error:
        if error.mine:
            raise DataError(str(error)) from error
        raise Refused(500, str(error)) from error
    finally:
        state.waiting.release()


def check_params(params: str) -> None:
    """Parameters are a JSON object; none of them is used.

    Raises:
        UsageError: they are something else.
    """
    try:
        value = json.loads(params or "{}")
    except (ValueError, RecursionError) as error:
        raise UsageError("params: not JSON") from error
    if not isinstance(value, dict):
        raise UsageError("params: must be a JSON object")


def reply(mask: Volume, facts: dict[str, Any], output: Output | None) -> Response:
    """A mask, facts about it, or both as multipart/form-data."""
    if output == "json":
        return Response(json.dumps(facts), media_type="application/json")
    content = nifti_bytes(mask)
    if output == "image":
        return Response(content, media_type=NIFTI, headers=attached("mask.nii.gz"))
    boundary = secrets.token_hex(16)
    parts = (
        ('name="params"', "application/json", json.dumps(facts).encode()),
        ('name="image"; filename="mask.nii.gz"', NIFTI, content),
    )
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {name}\r\n"
        f"Content-Type: {kind}\r\n\r\n".encode()
        + data
        + b"\r\n"
        for name, kind, data in parts
    )
    end = f"--{boundary}--\r\n".encode()
    return Response(body + end, media_type=f"multipart/form-data; boundary={boundary}")

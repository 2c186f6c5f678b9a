"""Routes of the page Predict: a scan in, a mask out."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from fastapi import APIRouter, File, Request, Response, UploadFile

from vclipseg.data.dicom_objects import check_kind
from vclipseg.data.plan import Plan
from vclipseg.data.volume import Volume, read_image, read_labels, with_values, write
from vclipseg.errors import UsageError
from vclipseg.serve.catalog import NotFound, ServedRun
from vclipseg.serve.incoming import Scan
from vclipseg.serve.jobs import Busy, Job
from vclipseg.serve.reading import in_own_process, read_scan
from vclipseg.serve.schemas import Format, JobInfo, ScanInfo
from vclipseg.serve.state import VOLUME, State, attached, taking_files
from vclipseg.serve.volumes import DICOM, NIFTI, nifti_bytes

BINARY = {"schema": {"type": "string", "format": "binary"}}
SAVED: dict[int | str, dict[str, Any]] = {200: {"content": {NIFTI: BINARY, DICOM: BINARY}}}


def predict_routes(state: State) -> APIRouter:
    """The routes, on the runs of `state`."""
    route = taking_files(state.limits.files + 1)
    router = APIRouter(prefix="/api", tags=["predict"], route_class=route)

    @router.post("/runs/{run}/scans", status_code=202)
    def send_scan(run: str, files: Annotated[list[UploadFile], File()]) -> ScanInfo:
        """Send a scan to a run's model.

        NIfTI (a file a channel, or one), a zip archive of one DICOM
        series, or its files.
        """
        served = state.catalog.get(run)
        scan = state.scans.add([(file.filename or "", file.file) for file in files])
        try:
            job = predict_scan(state, served, scan)
        except (Busy, UsageError):
            state.scans.remove(scan.id)
            raise
        return ScanInfo(id=scan.id, name=scan.name, formats=formats(scan), job=JobInfo.of(job))

    @router.get("/scans/{scan}/image.nii.gz", responses=VOLUME)
    def image(scan: str, request: Request) -> Response:
        """The first channel of a scan as it was read."""
        found = scan_of(state, scan)
        if not found.image_path.is_file():
            raise NotFound(f"{found.name}: has not been read yet")
        return state.send(request, lambda: first_channel(found), "image.nii.gz")

    @router.get("/scans/{scan}/masks/{run}.nii.gz", responses=VOLUME)
    def mask(scan: str, run: str, request: Request) -> Response:
        """The mask that a run's model made of a scan, class indices."""
        found, served = scan_of(state, scan), state.catalog.get(run)
        return state.send(request, lambda: mask_of(found, served), "mask.nii.gz")

    @router.get("/scans/{scan}/masks/{run}", responses=SAVED)
    def download(scan: str, run: str, format: Format = "nifti") -> Response:
        """The mask as a file to keep: NIfTI with the data set's own label values, or a DICOM object.

        The latter are for scans that were sent as DICOM.
        """
        found, served = scan_of(state, scan), state.catalog.get(run)
        stem = found.name.split(".")[0] or "scan"
        with state.reading:
            if format == "nifti":
                content = nifti_object(found, served)
                return Response(content, media_type=NIFTI, headers=attached(f"{stem}_seg.nii.gz"))
            content = dicom_object(found, served, format)
            return Response(content, media_type=DICOM, headers=attached(f"{stem}_seg.dcm"))

    @router.delete("/scans/{scan}", status_code=204)
    def forget(scan: str) -> None:
        """Forget a scan and what was made of it."""
        if not state.scans.remove(scan):
            raise NotFound(f"no scan {scan!r}")

    return router


def predict_scan(state: State, served: ServedRun, scan: Scan) -> Job:
    """A job that reads a scan and predicts it.

    Raises:
        Busy: too many jobs are waiting.
        UsageError: the run has no finished model.
    """
    if not served.model_path.is_file():
        raise UsageError(f"{served.id}: has no finished model yet")
    state.scans.hold(scan)
    try:
        return state.jobs.submit("predict", lambda job: _predict(state, served, scan, job))
    except Busy:
        state.scans.release(scan)
        raise


def _predict(state: State, served: ServedRun, scan: Scan, job: Job) -> dict:
    try:
        scan.refuse_if_forgotten()
        job.step(0.02, "reading")
        plan = Plan.model_validate(served.run.experiment["plan"])
        image = read_scan(scan, plan, state.limits)
        made = state.models.look(served, image, job)
        job.step(0.97, "writing")
        scan.refuse_if_forgotten()
        write(made.mask, scan.mask_path(served.id))
    finally:
        state.scans.release(scan)
    voxel_ml = abs(float(np.linalg.det(image.affine[:3, :3]))) / 1000
    counts = np.bincount(made.mask.array.ravel(), minlength=len(served.class_names))
    volumes = zip(served.class_names[1:], counts[1:].tolist(), strict=True)
    return {
        "scan": scan.id,
        "run": served.id,
        "volumes_ml": {name: round(count * voxel_ml, 3) for name, count in volumes},
        "uncertainty": round(made.uncertainty, 4),
    }


def scan_of(state: State, scan_id: str) -> Scan:
    """A scan by id.

    Raises:
        NotFound: there is none.
    """
    scan = state.scans.get(scan_id)
    if scan is None:
        raise NotFound(f"no scan {scan_id!r}; it may have been forgotten")
    return scan


def first_channel(scan: Scan) -> Volume:
    """(X, Y, Z)."""
    volume = read_image(scan.image_path)
    return Volume(volume.array[0], volume.affine)


def mask_of(scan: Scan, served: ServedRun) -> Volume:
    """Class indices (X, Y, Z) uint8."""
    path = scan.mask_path(served.id)
    if not path.is_file():
        raise NotFound(f"{scan.name}: has no mask of {served.id} yet")
    stored = read_labels(path)
    return Volume(stored.array.astype(np.uint8), stored.affine)


def formats(scan: Scan) -> list[Format]:
    """What a scan's mask can be saved as."""
    dicom = scan.kind == "dicom" and find_spec("highdicom") is not None
    return list(get_args(Format)) if dicom else ["nifti"]


def nifti_object(scan: Scan, served: ServedRun) -> bytes:
    """The mask with the data set's own label values, where the scan says that it is.

    Raises:
        NotFound: there is no mask yet.
    """
    mask = mask_of(scan, served)
    stored = Volume(with_values(mask.array, served.run.experiment["label_values"]), mask.affine)
    if scan.kind != "nifti":
        return nifti_bytes(stored)
    with tempfile.TemporaryDirectory(dir=scan.folder) as folder:
        out = Path(folder) / "mask.nii.gz"
        write(stored, out, like=scan.files[0])
        return out.read_bytes()


def dicom_object(scan: Scan, served: ServedRun, kind: str) -> bytes:
    """The mask as a DICOM object of the series that was sent; made once.

    Raises:
        UsageError: the scan was not sent as DICOM, or the extra `dicom` is not installed.
        DataError: the series is not one that an object can refer to.
        NotFound: there is no mask yet.
    """
    if scan.kind != "dicom":
        raise UsageError(f"{scan.name}: was not sent as DICOM; its mask is to be had as NIfTI")
    check_kind(kind)
    mask, out = scan.mask_path(served.id), scan.folder / f"mask-{served.id}-{kind}.dcm"
    if not mask.is_file():
        raise NotFound(f"{scan.name}: has no mask of {served.id} yet")
    with scan.lock:
        if not out.is_file():
            method = f"{served.run.method} ({served.run.setting('settings', 'preset')})"
            about = (scan.folder / "sent", mask, out, kind, method, *served.class_names)
            in_own_process(scan, "vclipseg.serve.encode", *about)
        return out.read_bytes()

"""Routes of the page Review: which unlabeled case next, and what people decide about it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, File, Query, Request, Response, UploadFile

from vclipseg.data.reviews import IGNORED, Review, latest_review, read_reviews, save_review
from vclipseg.data.volume import Header, Volume, read_header, read_labels
from vclipseg.errors import DataError, UsageError
from vclipseg.evaluation import on_grid_of
from vclipseg.ranking import STRATEGIES, Choice, Signals, rank
from vclipseg.serve.catalog import ServedRun
from vclipseg.serve.incoming import copy, recognize
from vclipseg.serve.jobs import Job
from vclipseg.serve.nifti_header import check_nifti
from vclipseg.serve.schemas import Queue, QueuedCase, ReviewInfo
from vclipseg.serve.state import VOLUME, State

Asked = Literal["accepted", "fixed", "ignored"]
Revision = Annotated[int | None, Query(ge=0, le=10**6)]


def review_routes(state: State) -> APIRouter:
    """The routes, on the runs of `state`."""
    router = APIRouter(prefix="/api", tags=["review"])

    @router.get("/runs/{run}/queue")
    def queue(run: str, strategy: str = "uncertain") -> Queue:
        """A run's unlabeled cases, the first to annotate first."""
        return make_queue(state, state.catalog.get(run), strategy)

    @router.post("/runs/{run}/queue/look", status_code=202)
    def look(run: str) -> Queue:
        """Let the model look at every case of the queue, when it has nothing else to do."""
        served = state.catalog.get(run)
        look_at_all(state, served)
        return make_queue(state, served, "uncertain")

    @router.get("/runs/{run}/reviews/{case}/mask.nii.gz", responses=VOLUME)
    def mask(run: str, case: str, request: Request) -> Response:
        """The reviewed mask, or the model's if there is none: class indices, and `ignored_value`."""
        served = state.catalog.get(run)
        return state.send(request, lambda: current_mask(state, served, case), f"{case}.nii.gz")

    @router.put("/runs/{run}/reviews/{case}")
    def decide(
        run: str,
        case: str,
        decision: Asked,
        after: Revision = None,
        mask: Annotated[UploadFile | None, File()] = None,
    ) -> ReviewInfo:
        """Accept the model's mask, send a `fixed` one, or have training ignore the case.

        `after` is the revision that was seen; somebody else's later decision is then not overruled.
        """
        served = state.catalog.get(run)
        return info(save(state, served, case, decision, mask, after))

    @router.delete("/runs/{run}/reviews/{case}")
    def reopen(run: str, case: str, after: Revision = None) -> ReviewInfo:
        """Take a decision back; its mask is kept among the data set's reviews."""
        served = state.catalog.get(run)
        reviewable(served, case)
        dataset = served.dataset
        review = save_review(dataset.root, case, "open", None, dataset.classes, after=after)
        return info(review)

    return router


def make_queue(state: State, served: ServedRun, strategy: str) -> Queue:
    """Ranked cases, then those that the model has not looked at."""
    unlabeled, labeled = (cases_of(served, role) for role in ("unlabeled", "labeled"))
    signals = {i: state.models.signals(served, i) for i in (*unlabeled, *labeled)}
    candidates = [s for i in unlabeled if (s := signals[i])]
    known = [s for i in labeled if (s := signals[i])]
    choices = rank(strategy, candidates, known)
    places = {choice.case_id: (place, choice) for place, choice in enumerate(choices, start=1)}
    rest = [i for i in unlabeled if i not in places]
    cases = [
        _queued(served, case_id, places.get(case_id), signals[case_id])
        for case_id in (*places, *rest)
    ]
    with state.models.lock:
        pending = [job for (run, _), job in state.models.pending.items() if run == served.id]
    return Queue(
        strategy=strategy,
        strategies=list(STRATEGIES),
        classes=list(served.class_names),
        ignored_value=len(served.class_names),
        looked_at=len(candidates),
        total=len(unlabeled),
        looking=any(not job.ended.is_set() for job in pending),
        cases=cases,
    )


def _queued(
    served: ServedRun, case_id: str, found: tuple[int, Choice] | None, signals: Signals | None
) -> QueuedCase:
    place, choice = found or (None, None)
    review = latest_review(served.dataset.root, case_id)
    return QueuedCase(
        id=case_id,
        place=place,
        score=choice.score if choice else None,
        reasons=list(choice.reasons) if choice else [],
        uncertainty=signals.uncertainty if signals else None,
        decision=review.decision if review and review.decision != "open" else None,
        revision=review.revision if review else 0,
        when=review.when if review else None,
    )


def cases_of(served: ServedRun, role: str) -> list[str]:
    """Ids of a run's cases of one role that are still in the data set."""
    there = {case.case_id for case in served.dataset.cases}
    return [i for i, found in served.roles.items() if found == role and i in there]


def look_at_all(state: State, served: ServedRun) -> list[Job]:
    """Jobs, done ahead, for the cases that ranking needs: unlabeled ones, then labeled ones.

    Raises:
        UsageError: the run has no finished model.
    """
    if not served.model_path.is_file():
        raise UsageError(f"{served.id}: has no finished model yet")
    missing = [
        case_id
        for role in ("unlabeled", "labeled")
        for case_id in cases_of(served, role)
        if state.models.signals(served, case_id) is None
    ]
    return [state.models.look_at(served, case_id, ahead=True) for case_id in missing]


def reviewable(served: ServedRun, case_id: str) -> None:
    """Only cases that were unlabeled to the run are decided about.

    Raises:
        NotFound: there is no such case.
        UsageError: it has another role.
    """
    served.case(case_id)
    role = served.roles[case_id]
    if role != "unlabeled":
        raise UsageError(
            f"{case_id}: is a {role} case of {served.id}; only unlabeled ones are reviewed"
        )


def save(
    state: State,
    served: ServedRun,
    case_id: str,
    decision: Asked,
    sent: UploadFile | None,
    after: int | None,
) -> Review:
    """Save a decision.

    Raises:
        Conflict: somebody else has decided meanwhile.
        UsageError: a mask is missing or too much, or the case is not one to review.
        DataError: the mask is damaged or does not fit the image.
    """
    reviewable(served, case_id)
    if (decision == "fixed") != (sent is not None):
        raise UsageError("send a mask with `fixed`, and none with `accepted` or `ignored`")
    dataset = served.dataset
    mask = None
    if sent is not None:
        mask = sent_mask(state, served, case_id, sent)
    elif decision == "accepted":
        mask = state.models.mask(served, case_id)
    classes, model = dataset.classes, served.settings_hash
    return save_review(dataset.root, case_id, decision, mask, classes, model=model, after=after)


def sent_mask(state: State, served: ServedRun, case_id: str, sent: UploadFile) -> Volume:
    """A mask that was sent, on its image's grid: class indices, `IGNORED` for `ignored_value`."""
    kind = recognize(sent.filename or "mask", sent.file)
    if kind not in ("nii", "nii.gz"):
        raise UsageError("send the mask as a NIfTI file")
    with state.reading, tempfile.TemporaryDirectory(dir=state.temporary) as folder:
        path = Path(folder) / f"mask.{kind}"
        copy(sent.file, path, state.limits.unpacked_bytes)
        check_nifti(path, state.limits, "mask")
        try:
            mask = read_labels(path)
        except DataError as error:
            raise DataError(str(error).replace(str(path), "the mask")) from error
    mask = on_grid_of(grid_of(read_header(served.case(case_id).images[0])), mask, case_id)
    ignored = len(served.class_names)
    if mask.array.min() < 0 or mask.array.max() > ignored:
        raise DataError(f"the mask holds values other than 0 to {ignored}")
    classes = np.where(mask.array == ignored, IGNORED, mask.array).astype(np.uint8)
    if (classes == IGNORED).all():
        raise DataError("every voxel is marked to be ignored; mark the case instead")
    return Volume(classes, mask.affine)


def grid_of(header: Header) -> Volume:
    """A volume on a file's grid that takes no memory."""
    return Volume(np.broadcast_to(np.uint8(0), header.shape), header.affine)


def current_mask(state: State, served: ServedRun, case_id: str) -> Volume:
    """The reviewed mask or the model's, `ignored_value` where nobody knows."""
    reviewable(served, case_id)
    review = read_reviews(served.dataset.root).get(case_id)
    if not review or not review.label:
        return state.models.mask(served, case_id)
    mask = served.dataset.reviewed_labels(review)
    ignored = np.uint8(len(served.class_names))
    return Volume(np.where(mask.array == IGNORED, ignored, mask.array), mask.affine)


def info(review: Review) -> ReviewInfo:
    """What is told of a decision."""
    return ReviewInfo(
        case=review.case_id,
        decision=review.decision,
        revision=review.revision,
        when=review.when,
    )

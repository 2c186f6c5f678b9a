"""What the server's answers hold, as OpenAPI describes it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from vclipseg.data.reviews import Decision
from vclipseg.serve.catalog import Role
from vclipseg.serve.jobs import Job

Format = Literal["nifti", "seg", "seg-labelmap", "rtstruct"]
"""What a mask can be saved as."""


class Problem(BaseModel):
    """What went wrong, and what to do."""

    detail: str | list[Any]


class RunInfo(BaseModel):
    """A run; `means` are over its test cases, `classes` has the background first."""

    id: str
    name: str
    method: str
    preset: str
    steps: int | None
    seed: int | None
    labeled: int
    unlabeled: int
    test: int
    classes: list[str]
    channels: list[str]
    has_model: bool
    has_data: bool
    lcc: bool
    protocol: str
    transductive: bool
    means: dict[str, float | None]
    missing: list[str]


class CaseInfo(BaseModel):
    """A case of a run; `metrics` are means over its classes, `classes` has them one by one."""

    id: str
    role: Role
    metrics: dict[str, float | None]
    classes: dict[str, dict[str, float | None]]
    uncertainty: float | None
    has_reference: bool
    has_prediction: bool
    decision: Decision | None


class JobInfo(BaseModel):
    """Something that takes long: ask again until it is `done` or `failed`."""

    id: str
    kind: str
    state: Literal["waiting", "running", "done", "failed"]
    progress: float
    message: str
    result: dict[str, Any] | None

    @classmethod
    def of(cls, job: Job) -> JobInfo:
        """What may be seen of a job."""
        return cls(
            id=job.id,
            kind=job.kind,
            state=job.state,
            progress=job.progress,
            message=job.message,
            result=job.result if isinstance(job.result, dict) else None,
        )


class ScanInfo(BaseModel):
    """A scan that was sent, and the job that predicts it; `formats` are those to save its mask in."""

    id: str
    name: str
    formats: list[Format]
    job: JobInfo


class ReviewInfo(BaseModel):
    """A decision; the next one about this case gives its `revision` as `after`."""

    case: str
    decision: Decision
    revision: int
    when: str


class QueuedCase(BaseModel):
    """A case that nobody annotated: its place, why it is there, and what was decided."""

    id: str
    place: int | None
    score: float | None
    reasons: list[str]
    uncertainty: float | None
    decision: Decision | None
    revision: int
    when: str | None


class Queue(BaseModel):
    """All of a run's unlabeled cases, the first to annotate first.

    `ignored_value` is the value, in masks sent either way, of voxels that training leaves out.
    """

    strategy: str
    strategies: list[str]
    classes: list[str]
    ignored_value: int
    looked_at: int
    total: int
    looking: bool
    cases: list[QueuedCase]

"""Routes of the pages View and Compare: runs, their cases, and the volumes of each."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from vclipseg.data.reviews import Decision, read_reviews
from vclipseg.errors import VclipsegError
from vclipseg.report.reading import as_dict, as_list, number
from vclipseg.serve.catalog import SHOWN, NotFound, ServedRun, finite
from vclipseg.serve.schemas import CaseInfo, JobInfo, RunInfo
from vclipseg.serve.state import VOLUME, State

What = Literal["image", "reference", "prediction", "disagreement"]


def view_routes(state: State) -> APIRouter:
    """The routes, on the runs of `state`."""
    router = APIRouter(prefix="/api", tags=["view"])

    @router.get("/runs")
    def runs() -> list[RunInfo]:
        """Every run that is served."""
        state.catalog.find()
        return [run_info(run) for run in state.catalog.runs.values()]

    @router.get("/runs/{run}")
    def one_run(run: str) -> RunInfo:
        """One run."""
        return run_info(state.catalog.get(run))

    @router.get("/runs/{run}/cases")
    def cases(run: str) -> list[CaseInfo]:
        """Its cases, test cases first, the worst of them first."""
        return case_list(state, state.catalog.get(run))

    @router.get("/runs/{run}/cases/{case}/{what}.nii.gz", responses=VOLUME)
    def volume(
        run: str,
        case: str,
        what: What,
        request: Request,
        channel: Annotated[int, Query(ge=0, lt=64)] = 0,
    ) -> Response:
        """A volume of a case: masks hold class indices, `disagreement` whole percents."""
        served = state.catalog.get(run)
        read = {
            "image": lambda: served.image(case, channel),
            "reference": lambda: served.reference(case),
            "prediction": lambda: state.models.mask(served, case),
            "disagreement": lambda: state.models.disagreement(served, case),
        }[what]
        return state.send(request, read, f"{case}_{what}.nii.gz")

    @router.post("/runs/{run}/cases/{case}/look", status_code=202)
    def look(run: str, case: str) -> JobInfo:
        """Let the model predict a case and say where its decoders differ."""
        return JobInfo.of(state.models.look_at(state.catalog.get(run), case))

    @router.get("/jobs/{job}")
    def job_state(job: str) -> JobInfo:
        """How far a job is."""
        found = state.jobs.get(job)
        if found is None:
            raise NotFound(f"no job {job!r}; it may have been forgotten")
        return JobInfo.of(found)

    return router


def run_info(served: ServedRun) -> RunInfo:
    """What is told of a run."""
    run = served.run
    means = as_dict(run.metrics.get("mean"))
    steps = number(run.setting("settings", "train", "steps"))
    seed = number(run.experiment.get("seed"))
    return RunInfo(
        id=served.id,
        name=run.name,
        method=run.method,
        preset=str(run.setting("settings", "preset") or ""),
        steps=None if steps != steps else int(steps),
        seed=None if seed != seed else int(seed),
        labeled=len(run.case_list("labeled")),
        unlabeled=len(run.case_list("unlabeled")),
        test=len(run.case_list("test")),
        classes=list(served.class_names),
        channels=[str(name) for name in as_list(run.experiment.get("channel_names"))],
        has_model=served.model_path.is_file(),
        has_data=served.has_data(),
        lcc=run.lcc,
        protocol=run.protocol,
        transductive=run.transductive,
        means={m: finite(number(as_dict(means.get(m)).get("mean"))) for m in SHOWN},
        missing=[line.replace(str(served.folder), served.id) for line in run.missing],
    )


def case_list(state: State, served: ServedRun) -> list[CaseInfo]:
    """The cases of a run: test cases by Dice, the worst first, then the others."""
    by_case: dict[str, dict[str, dict[str, float | None]]] = {}
    run = served.run
    for score in run.select(lcc=run.lcc):
        values = {metric: finite(getattr(score, metric)) for metric in SHOWN}
        by_case.setdefault(score.case_id, {})[score.class_name] = values
    means = {metric: run.per_case(metric) for metric in SHOWN}
    decided = decisions(served)
    infos = [
        CaseInfo(
            id=case_id,
            role=role,
            metrics={m: finite(means[m][case_id]) for m in SHOWN if case_id in means[m]},
            classes=by_case.get(case_id, {}),
            uncertainty=signals.uncertainty if signals else None,
            has_reference=has_reference(served, case_id),
            has_prediction=bool(signals) or prediction_file(served, case_id),
            decision=decided.get(case_id),
        )
        for case_id, role in served.roles.items()
        for signals in [state.models.signals(served, case_id)]
    ]
    return sorted(infos, key=_worst_first)


def decisions(served: ServedRun) -> dict[str, Decision]:
    """Case id -> what was decided about it."""
    try:
        return {i: r.decision for i, r in read_reviews(served.dataset.root).items()}
    except VclipsegError:
        return {}


def has_reference(served: ServedRun, case_id: str) -> bool:
    """Whether there is a reference that may be shown."""
    if not served.has_data() or served.roles[case_id] == "unlabeled":
        return False
    try:
        return served.case(case_id).label is not None
    except VclipsegError:
        return False


def prediction_file(served: ServedRun, case_id: str) -> bool:
    """Whether the run's evaluation left a mask."""
    return (served.folder / "predictions" / f"{case_id}.nii.gz").is_file()


def _worst_first(case: CaseInfo) -> tuple[int, float, float]:
    dice = case.metrics.get("dice")
    order = {"test": 0, "unlabeled": 1, "labeled": 2}[case.role]
    return order, 2.0 if dice is None else dice, -(case.uncertainty or 0.0)

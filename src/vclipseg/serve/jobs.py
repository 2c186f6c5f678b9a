"""One worker thread and a short queue: what takes long is done one after the other, or refused."""

from __future__ import annotations

import secrets
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from vclipseg.console import Console
from vclipseg.errors import VclipsegError

ENDING = "the server is ending"
State = Literal["waiting", "running", "done", "failed"]


class Busy(Exception):
    """The queue is full."""


class Ending(VclipsegError):
    """The server ends: what was under way is given up."""

    def __init__(self) -> None:
        super().__init__(ENDING)


class JobFailed(Exception):
    """What a job that was waited for says; `mine` if the request was at fault."""

    def __init__(self, message: str, mine: bool) -> None:
        super().__init__(message)
        self.mine = mine


@dataclass
class Job:
    """Something that takes long.

    Attributes:
        progress: 0 to 1.
        message: what it is at, or why it failed.
        result: what its work returned.
        mine: it failed for what was asked, not for the server.
        given_up: the server ends; the next step is the last.
    """

    kind: str
    work: Callable[[Job], Any] = field(repr=False)
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = "waiting"
    progress: float = 0.0
    message: str = ""
    result: Any = None
    mine: bool = False
    given_up: bool = False
    ended: threading.Event = field(default_factory=threading.Event, repr=False)

    def step(self, progress: float, message: str) -> None:
        """Say how far it is.

        Raises:
            Ending: the server ends.
        """
        if self.given_up:
            raise Ending
        self.progress, self.message = progress, message

    def fail(self, message: str, mine: bool = False) -> None:
        """Say why it failed; who waits for it goes on."""
        if not self.ended.is_set():
            self.message, self.mine, self.state = message, mine, "failed"
            self.ended.set()

    def wait(self, seconds: float) -> Any:
        """The result, once it is there.

        Raises:
            JobFailed: it failed.
            TimeoutError: it is not done in time.
        """
        if not self.ended.wait(seconds):
            raise TimeoutError
        if self.state == "failed":
            raise JobFailed(self.message, self.mine)
        return self.result


class Jobs:
    """The queue, its worker, and the jobs that were done last.

    What somebody waits for comes before what is done ahead (`ahead`).
    """

    def __init__(self, waiting: int = 8, kept: int = 200, console: Console | None = None) -> None:
        self.limit, self.kept = waiting, kept
        self.console = console or Console(quiet=True)
        self.known: OrderedDict[str, Job] = OrderedDict()
        self.queue: deque[Job] = deque()
        self.later: deque[Job] = deque()
        self.changed = threading.Condition()
        self.closed = False
        self.running: Job | None = None
        self.worker = threading.Thread(target=self._run, name="vclipseg-worker", daemon=True)
        self.worker.start()

    def submit(self, kind: str, work: Callable[[Job], Any]) -> Job:
        """Put work at the end of the queue.

        Raises:
            Busy: the queue is full.
        """
        with self.changed:
            self._refuse_more()
            return self._add(self.queue, Job(kind, work))

    def ahead(self, kind: str, work: Callable[[Job], Any]) -> Job:
        """Put work where it is done when nobody waits for anything else."""
        with self.changed:
            return self._add(self.later, Job(kind, work))

    def get(self, job_id: str) -> Job | None:
        """A job that is waiting, running, or was among the last ones done."""
        with self.changed:
            return self.known.get(job_id)

    def hurry(self, job: Job) -> None:
        """Somebody waits for what was to be done ahead.

        Raises:
            Busy: the queue is full.
        """
        with self.changed:
            if job in self.later:
                self._refuse_more()
                self.later.remove(job)
                self.queue.append(job)

    def close(self, seconds: float = 0) -> None:
        """Take no more work, give up what waits, and give what runs so long to end."""
        with self.changed:
            self.closed = True
            for job in (*self.queue, *self.later):
                job.fail(ENDING)
            self.queue.clear()
            self.later.clear()
            if self.running:
                self.running.given_up = True
            self.changed.notify_all()
        self.worker.join(seconds)
        if running := self.running:
            running.fail(ENDING)

    def _refuse_more(self) -> None:
        if self.closed or len(self.queue) >= self.limit:
            raise Busy(f"{len(self.queue)} jobs are waiting already; try again")

    def _add(self, queue: deque[Job], job: Job) -> Job:
        queue.append(job)
        self.known[job.id] = job
        over = len(self.known) - self.kept
        for old in [j for j in self.known.values() if j.ended.is_set()][: max(over, 0)]:
            del self.known[old.id]
        self.changed.notify()
        return job

    def _next(self) -> Job | None:
        with self.changed:
            while not self.closed and not self.queue and not self.later:
                self.changed.wait()
            self.running = None if self.closed else (self.queue or self.later).popleft()
            return self.running

    def _run(self) -> None:
        while job := self._next():
            job.state = "running"
            try:
                job.result = job.work(job)
                job.progress, job.message, job.state = 1.0, "", "done"
                job.ended.set()
            except Ending as error:
                job.fail(str(error))
            except VclipsegError as error:
                job.fail(str(error), mine=True)
            except Exception:
                self.console.note(f"{job.kind} failed:\n{traceback.format_exc()}")
                job.fail("failed; the server's own output says why")
            job.work = _nothing  # what it held in memory is free


def _nothing(job: Job) -> None:
    pass

"""The queue: in order, bounded, and alive after what fails."""

from __future__ import annotations

import threading

import pytest

from vclipseg.errors import DataError
from vclipseg.serve.jobs import Busy, JobFailed, Jobs


@pytest.fixture
def jobs():
    made = Jobs(waiting=2, kept=6)
    yield made
    made.close()


def test_results_and_progress(jobs):
    def work(job):
        job.step(0.5, "half")
        return {"answer": job.message}

    job = jobs.submit("think", work)
    assert job.wait(10) == {"answer": "half"}
    assert (job.state, job.progress) == ("done", 1.0)
    assert jobs.get(job.id) is job
    assert jobs.get("another") is None


def test_failures_are_told_apart(jobs):
    def bad_request(job):
        raise DataError("damaged")

    def own_fault(job):
        raise ZeroDivisionError("secret")

    with pytest.raises(JobFailed, match="damaged") as told:
        jobs.submit("a", bad_request).wait(10)
    assert told.value.mine
    with pytest.raises(JobFailed, match="server's own output") as told:
        jobs.submit("b", own_fault).wait(10)
    assert not told.value.mine
    assert jobs.submit("c", lambda job: 1).wait(10) == 1


def test_only_so_many_wait_and_what_is_asked_for_comes_first(jobs):
    gate, order = threading.Event(), []
    running = jobs.submit("block", lambda job: gate.wait(10))
    while running.state == "waiting":
        pass
    later = jobs.ahead("later", lambda job: order.append("later"))
    asked = [jobs.submit(str(i), lambda job: order.append(job.kind)) for i in range(2)]
    with pytest.raises(Busy, match="2 jobs are waiting"):
        jobs.submit("one more", lambda job: None)
    with pytest.raises(TimeoutError):
        running.wait(0.01)
    gate.set()
    later.wait(10)
    assert order == ["0", "1", "later"]
    assert all(job.ended.is_set() for job in asked)


def test_old_jobs_are_forgotten(jobs):
    made = [jobs.submit(str(i), lambda job: None) for i in range(1)]
    for i in range(20):
        made[-1].wait(10)
        made.append(jobs.submit(str(i), lambda job: None))
    made[-1].wait(10)
    assert len(jobs.known) <= 6
    assert jobs.get(made[0].id) is None


def test_closed(jobs):
    jobs.close()
    with pytest.raises(Busy):
        jobs.submit("a", lambda job: None)
    jobs.worker.join(10)
    assert not jobs.worker.is_alive()


def test_what_runs_may_end_before_it_is_closed(jobs):
    begun, go_on, ended = (threading.Event() for _ in range(3))

    def work(job):
        begun.set()
        go_on.wait(10)
        ended.set()

    jobs.submit("a", work)
    begun.wait(10)
    jobs.close()  # at once: nobody waits for it
    assert not ended.is_set()
    threading.Timer(0.2, go_on.set).start()
    jobs.close(10)
    assert ended.is_set()


def test_nobody_waits_for_what_the_end_gives_up(jobs):
    """Else the thread of a request would keep the server's process alive."""
    begun, go_on = threading.Event(), threading.Event()

    def work(job):
        begun.set()
        go_on.wait(10)
        job.step(0.5, "half")

    running = jobs.submit("a", work)
    begun.wait(10)
    waiting, later = jobs.submit("b", lambda job: 1), jobs.ahead("c", lambda job: 1)
    jobs.close()
    for job in (running, waiting, later):
        with pytest.raises(JobFailed, match="the server is ending"):
            job.wait(0)
    go_on.set()
    jobs.worker.join(10)
    assert not jobs.worker.is_alive()  # its next step ended it
    assert running.progress == 0


def test_what_is_asked_for_is_not_done_twice(jobs):
    gate = threading.Event()
    running = jobs.submit("block", lambda job: gate.wait(10))
    while running.state == "waiting":
        pass
    order = []
    first = jobs.ahead("first", lambda job: order.append("first"))
    second = jobs.ahead("second", lambda job: order.append("second"))
    for _ in range(3):
        jobs.hurry(second)
    assert [job.kind for job in jobs.queue] == ["second"]
    gate.set()
    first.wait(10)
    assert order == ["second", "first"]

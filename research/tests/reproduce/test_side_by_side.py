"""Tasks in several processes: what is finished is kept, whatever becomes of the rest. The tasks only sleep."""

import multiprocessing
import signal
import threading
import time
from concurrent.futures import wait

import pytest

from jacmatch.errors import InputError
from jacmatch_research import processes


def handed_over(tasks, workers=2):
    """What `side_by_side` hands over of tasks that sleep, and the error that it ends with."""
    done, error = [], None
    try:
        processes.side_by_side(time.sleep, tasks, workers, lambda task, _: done.append(task))
    except (ValueError, KeyboardInterrupt) as caught:
        error = caught
    assert multiprocessing.active_children() == []
    return done, type(error)


def test_every_task_is_handed_over_and_no_more_than_the_workers_are_under_way(monkeypatch):
    most = []

    def counting(under_way, **how):
        most.append(len(under_way))
        return wait(under_way, **how)

    monkeypatch.setattr(processes, "wait", counting)
    done, error = handed_over([0.0, 0.01, 0.02, 0.03, 0.04])
    assert (sorted(done), error) == ([0.0, 0.01, 0.02, 0.03, 0.04], type(None))
    assert max(most) == 2


def test_if_a_task_fails_those_under_way_finish_and_no_other_begins():
    """A negative time is refused at once."""
    assert handed_over([1.0, -1, 0.0]) == ([1.0], ValueError)


@pytest.mark.ci
def test_an_interrupt_does_not_wait_for_the_workers():
    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    timer = threading.Timer(1.5, interrupt)
    timer.start()
    start = time.perf_counter()
    done, error = handed_over([60, 61, 62])
    assert (done, error) == ([], KeyboardInterrupt)
    assert time.perf_counter() - start < 20


def test_what_is_finished_when_the_interrupt_comes_is_stored(monkeypatch):
    def interrupted(under_way, **how):
        wait(under_way, **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "wait", interrupted)
    assert handed_over([60, 0.0]) == ([0.0], KeyboardInterrupt)


@pytest.mark.ci
def test_a_killed_worker_is_reported_and_the_others_end(monkeypatch):
    """The one that was begun last: the pool of the standard library does not watch it until something else happens."""
    kill = [lambda: max(multiprocessing.active_children(), key=lambda process: process.pid).kill()]

    def killed(under_way, **how):
        while kill:
            kill.pop()()
        return wait(under_way, **how)

    monkeypatch.setattr(processes, "wait", killed)
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"until its task is done\. Got one that was killed from outside"):
        processes.side_by_side(time.sleep, [60, 61, 62], 2, print)
    assert time.perf_counter() - start < 20
    assert multiprocessing.active_children() == []

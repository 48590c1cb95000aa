"""Tasks in several processes: what is finished is handed over, whatever becomes of the rest."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import TypeVar

Task = TypeVar("Task")
Made = TypeVar("Made")


def side_by_side(
    work: Callable[[Task], Made], tasks: Iterable[Task], workers: int, done: Callable[[Task, Made], None]
) -> None:
    """Calls `done` in this process with each task and what `work` made of it in another, as soon as it is finished.

    If a task fails, no other is begun; those under way are finished and handed over, then its error is raised. Ctrl-C
    is for this process alone: what is finished is handed over, and the workers end at once.

    Args:
        work: What a new process can import.
        tasks: Its arguments.
        workers: How many processes, and so how many tasks at once.
        done: Takes what is finished, in the order in which it is.
    """
    left, under_way, failures = deque(tasks), dict[Future[Made], Task](), list[BaseException]()

    def hand_over() -> None:
        for future in [future for future in under_way if future.done()]:
            task, error = under_way.pop(future), future.exception()
            if error is None:
                done(task, future.result())
            else:
                failures.append(error)

    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_obey)
    try:
        while under_way or (left and not failures):
            while left and not failures and len(under_way) < workers:
                task = left.popleft()
                under_way[pool.submit(work, task)] = task
            wait(under_way, return_when=FIRST_COMPLETED)
            hand_over()
    except KeyboardInterrupt:
        hand_over()
        raise
    finally:
        for process in list(pool._processes.values()) if under_way else ():
            process.terminate()
        pool.shutdown(cancel_futures=True)
    if failures:
        raise failures[0]


def _obey() -> None:
    """In a worker: Ctrl-C is not for it, and SIGTERM ends it at once, also in a training."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))

"""Processes for measurements: threads, search paths, and tasks in several processes."""

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import connection, get_context, parent_process
from typing import TypeVar

import torch

from jacmatch.errors import InputError

_LOOK = 2.0  # seconds between two checks of the processes

Task = TypeVar("Task")
Made = TypeVar("Made")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread in the block, so that results do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Within the block, processes of `multiprocessing` begin without the working folder; from Python 3.11 on."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def side_by_side(
    work: Callable[[Task], Made], tasks: Iterable[Task], workers: int, done: Callable[[Task, Made], None]
) -> None:
    """Run `work` on each task in one of `workers` processes, and call `done` in this one with task and result.

    If a task fails, no other task is started; running tasks are finished and passed to `done`, and then the error is
    raised. After Ctrl-C, finished tasks are passed to `done`, and the workers end at once. If a worker is killed, the
    others end too, because the state of its task is unknown. A new process must be able to import `work`.

    Raises:
        InputError: A worker was killed.
    """
    left, under_way, failures = deque(tasks), dict[Future[Made], Task](), list[BaseException]()

    def hand_over() -> None:
        for future in [future for future in under_way if future.done()]:
            task, error = under_way.pop(future), future.exception()
            if error is None:
                done(task, future.result())
            else:
                failures.append(error)

    deaf = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=signal.signal, initargs=deaf)
    try:
        while under_way or (left and not failures):
            while left and not failures and len(under_way) < workers:
                task = left.popleft()
                with safe_path():  # a process is begun when there is something to do
                    under_way[pool.submit(work, task)] = task
            wait(under_way, timeout=_LOOK, return_when=FIRST_COMPLETED)
            hand_over()
            # The pool does not watch a process that it began last until something else happens.
            if under_way and any(process.exitcode is not None for process in list((pool._processes or {}).values())):
                failures.append(BrokenProcessPool())
                break
    except KeyboardInterrupt:
        hand_over()
        raise
    finally:
        for process in list(pool._processes.values()) if under_way else ():
            process.kill()  # a training would finish its step before it obeyed SIGTERM
        pool.shutdown(cancel_futures=True)
    if failures and isinstance(failures[0], BrokenProcessPool):
        rule = "Each process of `--workers` must run until its task is done."
        do = "Use fewer --workers if memory is short. Finished work is kept: run the same command again to resume."
        raise InputError(rule, got="one that was killed from outside", do=do) from failures[0]
    if failures:
        raise failures[0]


@cache
def end_with_parent() -> None:
    """Let a worker end when its parent process has ended for any reason; no effect in other processes."""
    parent = parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True, name="jacmatch-parent").start()

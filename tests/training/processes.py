"""A function in two processes that know each other."""

import multiprocessing
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed


def both(function, *arguments, timeout=120):
    """What the function returns in each of two processes, or the error that it raises there.

    They are forks, which cost next to nothing: what is compared with them is computed before.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        each = [context.Process(target=_run, args=(rank, folder, function, arguments)) for rank in (0, 1)]
        for process in each:
            process.start()
        for process in each:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
        assert [process.exitcode for process in each] == [0, 0], "a process hung or crashed"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def _run(rank, folder, function, arguments):
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        result = function(*arguments)
    except Exception as error:
        result = error
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()

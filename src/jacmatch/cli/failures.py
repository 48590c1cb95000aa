"""Errors that end a job from outside this package: the user's own code, and lack of memory."""

import contextlib
import errno
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from jacmatch.errors import ElsewhereError, InputError, Stopped, UnsupportedError
from jacmatch.training.distributed import is_of_connections

_OURS = Path(__file__).resolve().parents[1]
_LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|alloc_cpu|not enough memory|out of memory|can.{1,2}t allocate", re.I)
_REMEDY = "Fix it there; --traceback shows the lines."


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn exceptions of the user's code within the block, and lack of memory, into `Stopped`."""
    try:
        yield
    except (InputError, UnsupportedError, ElsewhereError, KeyboardInterrupt):
        raise
    except SystemExit as stop:
        who = _location(stop) or "Code that the job runs"
        raise Stopped(f"{who} called sys.exit({stop.code!r}): it must return. {_REMEDY}") from stop
    except BaseException as error:
        if _is_of_memory(error):
            raise Stopped("the memory is full. Use a smaller --batch-size.") from error
        location = None if is_of_connections(error) else _location(error)
        if location is None:
            raise
        text = " ".join(str(error).split())[:300]
        raise Stopped(f"{location} raised {type(error).__name__}{f': {text}' if text else ''}. {_REMEDY}") from error


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def _location(error: BaseException) -> str | None:
    """Return the last line of the user's code in a traceback; None if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if frame.filename.startswith("<") or not file.is_absolute():
            continue
        above = {file, *file.parents}
        if _OURS not in above and not above & _LIBRARIES and not {"site-packages", "dist-packages"} & set(file.parts):
            return f"{file.name}, line {frame.lineno}, in {frame.name}"
    return None

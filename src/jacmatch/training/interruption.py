"""Ctrl-C, which must not stop a training in the middle of a step."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C was pressed inside the block.

    An interrupt in the middle of a step would leave a state that no checkpoint may hold: some weights new, some old.
    So the first Ctrl-C is only noted; the second interrupts at once, as usual.
    Outside the main thread, or where the program has a handler of its own for Ctrl-C, nothing is changed.

    Raises:
        KeyboardInterrupt: When the block ends, if Ctrl-C was pressed and the block did not raise.
    """
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pressed.append(number)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours = usual and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt

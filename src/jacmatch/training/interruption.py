"""Ctrl-C, and SIGTERM by which a cluster takes a machine back: neither must stop a training in the middle of a step."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_USUAL = {signal.SIGINT: (signal.default_int_handler,), signal.SIGTERM: (signal.default_int_handler, signal.SIG_DFL)}


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C was pressed, or SIGTERM was sent, inside the block.

    An interrupt in the middle of a step would leave a state that no checkpoint may hold: some weights new, some old.
    So the first one is only noted; the second interrupts at once.
    Outside the main thread nothing is changed, nor is a signal for which the program has a handler of its own.

    Raises:
        KeyboardInterrupt: When the block ends, if there was such a signal and the block did not raise.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        for each in usual:
            signal.signal(each, signal.default_int_handler)
        noted.append(number)

    here = threading.current_thread() is threading.main_thread()
    before = {each: signal.getsignal(each) for each in SIGNALS} if here else {}
    usual = {each: handler for each, handler in before.items() if handler in _USUAL[each]}
    for each in usual:
        signal.signal(each, note)
    try:
        yield lambda: bool(noted)
    finally:
        for each, handler in usual.items():
            signal.signal(each, handler)
    if noted:
        raise KeyboardInterrupt

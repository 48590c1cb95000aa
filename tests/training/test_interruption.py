"""Ctrl-C and SIGTERM wait for the end of a step; nothing is lost of either."""

import signal
import threading

import pytest

from jacmatch.training.loop import SIGNALS, deferred_interrupt


@pytest.fixture(autouse=True)
def _usual_handlers():
    before = {each: signal.getsignal(each) for each in SIGNALS}
    yield
    for each, handler in before.items():
        assert signal.getsignal(each) is handler
        signal.signal(each, handler)


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_the_first_signal_waits_for_the_end_of_the_step_and_the_second_does_not(first, second):
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as interrupted:  # noqa: PT012
        assert not interrupted()
        signal.raise_signal(getattr(signal, first))
        done.append("the step")
        assert interrupted()
        signal.raise_signal(getattr(signal, second))
        done.append("never")
    assert done == ["the step"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_late_signal_is_not_lost(number):
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():  # noqa: PT012
        signal.raise_signal(number)
        done.append("the step")
    assert done == ["the step"]


@pytest.mark.parametrize("number", SIGNALS)
def test_another_handler_is_left_alone(number):
    own = signal.signal(number, signal.SIG_IGN)
    try:
        with deferred_interrupt() as interrupted:
            assert signal.getsignal(number) is signal.SIG_IGN
            signal.raise_signal(number)
            assert not interrupted()
    finally:
        signal.signal(number, own)


def test_other_threads_do_not_touch_signals():
    seen = []

    def work():
        with deferred_interrupt() as interrupted:
            seen.append((interrupted(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.default_int_handler)]

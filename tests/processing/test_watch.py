"""What has a rank stop, and how."""

import os
import signal

import pytest

from ssx_mpi.processing.watch import Watch

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)


@pytest.fixture(autouse=True)
def handlers():
    """Those of the tests are there again afterwards."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    # in the background of a script SIGINT is ignored from the start, which a watch would respect
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS[:-1])
def test_every_request_ends_it_in_order(number):
    watch = Watch(None, 300.0)
    assert not watch.stopping()
    os.kill(os.getpid(), number)
    assert watch.stopping()
    assert watch.reason == f"on request ({number.name})"


def test_an_interrupt_pressed_again_ends_it_at_once():
    Watch(None, 300.0)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 1.0)
    assert left.value.code == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_whoever_started_it_ignores_is_left_alone(number):
    signal.signal(number, signal.SIG_IGN)
    watch = Watch(None, 300.0)
    os.kill(os.getpid(), number)
    assert not watch.stopping()


def test_the_time_limit_is_a_reason_to_stop():
    # a fifth of the time is kept for what is in hand
    watch = Watch(-1.0, 300.0)
    assert watch.stopping()
    assert watch.reason == "ahead of the time limit"

import os
import signal

import pytest

from runtime.signals import Interrupted, Interrupts


@pytest.fixture(autouse=True)
def handlers_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_next_check(number, code):
    interrupts = Interrupts()
    interrupts.check()
    os.kill(os.getpid(), number)
    with pytest.raises(Interrupted) as raised:
        interrupts.check()
    assert raised.value.code == code and str(raised.value) == signal.Signals(number).name


def test_a_second_interrupt_does_not_wait():
    Interrupts()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)

"""A request to stop is noted once and handed to the loop; the process's handlers come back."""

import os
import signal

import pytest

from alignjax.system.preemption import Preemption


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noted_and_the_handlers_come_back(signum):
  before = signal.getsignal(signum)
  with Preemption() as preemption:
    assert not preemption.requested(1)
    os.kill(os.getpid(), signum)
    assert preemption.requested(2)
    assert preemption.requested(3)
  assert signal.getsignal(signum) is before


def test_second_interrupt_is_immediate():
  with Preemption() as preemption:
    assert not preemption.requested(1)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_before_the_first_step_is_over_is_immediate():
  with Preemption(), pytest.raises(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)

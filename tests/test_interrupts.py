"""Requests to save and to stop."""

import os
import signal

import pytest

from utils.interrupts import Interrupts


@pytest.fixture(autouse=True)
def handlers():
    """Give the signals back after a test."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    yield
    for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
        signal.signal(number, handler)


def test_sigterm_asks_to_stop_and_sigusr1_to_save_once():
    """A scheduler's warning is acted on between two steps, not inside one."""
    interrupts = Interrupts(minutes=60)
    assert not interrupts.stop and not interrupts.save
    os.kill(os.getpid(), signal.SIGUSR1)
    assert interrupts.save and not interrupts.stop
    interrupts.saved()
    assert not interrupts.save
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.stop


def test_the_clock_asks_to_save(monkeypatch):
    """At most CHECKPOINT_MINUTES of work are lost."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    interrupts = Interrupts(minutes=2)
    now[0] += 119
    assert not interrupts.save
    now[0] += 2
    assert interrupts.save

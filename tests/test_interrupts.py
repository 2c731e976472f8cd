"""Requests to save and to stop."""

import os
import signal

import pytest
from conftest import INTERRUPTS

from utils.interrupts import Interrupts


@pytest.fixture(autouse=True)
def handlers():
    """Give the signals back after a test."""
    before = {number: signal.getsignal(number) for number in INTERRUPTS}
    yield
    for number, handler in before.items():
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


def test_ctrl_c_asks_to_stop_and_again_stops_at_once(monkeypatch, capsys):
    """Nothing is lost by the first; torchrun passes each on to its ranks, which the terminal told before."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    interrupts = Interrupts(minutes=60)
    os.kill(os.getpid(), signal.SIGINT)
    now[0] += 0.5
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.stop and interrupts.exit_code == 130
    assert capsys.readouterr().out.count("Ctrl-C again") == 1
    now[0] += 1
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_clock_asks_to_save(monkeypatch):
    """At most CHECKPOINT_MINUTES of work are lost."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    interrupts = Interrupts(minutes=2)
    now[0] += 119
    assert not interrupts.save
    now[0] += 2
    assert interrupts.save

"""Requests to save or to stop, from the scheduler of a cluster or from the clock."""

import signal
import time

GRACE_SECONDS = 30                # that a data-loading process outlives SIGTERM


def leave_to_parent(worker):
    """For data-loading processes: a signal to the whole job is answered by the training process.

    It still needs data for the step at hand; SIGTERM ends a loading process later, if nobody else did before.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(GRACE_SECONDS))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Interrupts:
    """SIGTERM asks to save and stop, SIGUSR1 to save and go on; the clock asks to save every ``minutes``.

    Handlers only set a flag, so that the training loop acts between two optimizer steps, where its state is
    whole.
    """

    def __init__(self, minutes):
        self.seconds = 60 * minutes
        self.stop = self.signalled = False
        self.saved()
        signal.signal(signal.SIGTERM, self.on_stop)
        signal.signal(signal.SIGUSR1, self.on_save)

    def on_stop(self, signum, frame):
        self.stop = True

    def on_save(self, signum, frame):
        self.signalled = True

    @property
    def save(self):
        """True when a save is due."""
        return self.signalled or time.monotonic() - self.last_save >= self.seconds

    def saved(self):
        """Tell that the state has just been written."""
        self.signalled = False
        self.last_save = time.monotonic()

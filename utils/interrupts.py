"""Requests to save or to stop, from the scheduler of a cluster, from the keyboard or from the clock."""

import signal
import time

GRACE_SECONDS = 30                # that a data-loading process outlives SIGTERM
TWICE_SECONDS = 1                 # within which a second Ctrl-C is the first: torchrun passes it on once more


def leave_to_parent(worker):
    """For data-loading processes: a signal to the whole job is answered by the training process.

    It still needs data for the step at hand; SIGTERM ends a loading process later, if nobody else did before.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(GRACE_SECONDS))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Interrupts:
    """SIGTERM and Ctrl-C ask to save and stop, SIGUSR1 to save and go on, the clock to save each ``minutes``.

    Handlers only set a flag, so that the training loop acts between two optimizer steps, where its state is
    whole; a second Ctrl-C ends the process at once.  ``exit_code``: of a run that was asked to stop.
    """

    def __init__(self, minutes):
        self.seconds = 60 * minutes
        self.stop = self.signalled = False
        self.exit_code = 128 + signal.SIGTERM
        self.asked = None                                      # when Ctrl-C came
        self.saved()
        signal.signal(signal.SIGTERM, self.on_stop)
        signal.signal(signal.SIGINT, self.on_keyboard)
        signal.signal(signal.SIGUSR1, self.on_save)

    def on_stop(self, signum, frame):
        self.stop, self.exit_code = True, 128 + signum

    def on_keyboard(self, signum, frame):
        if self.asked is None:
            self.asked = time.monotonic()
            print("\nSaves after this step, then stops; Ctrl-C again stops at once", flush=True)
        elif time.monotonic() - self.asked > TWICE_SECONDS:
            raise KeyboardInterrupt
        self.on_stop(signum, frame)

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

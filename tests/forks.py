"""Processes that a test may kill, fill up or lock out: forks of its own, which have everything imported."""

import ctypes
import gc
import os
import resource
import signal
import sys
import time
import traceback
from functools import partial

import torch
import torch.distributed as dist

from utils.config import exit_code


class Fork:
    """A new process that calls ``prepare``, and then ends with exit_code(call).

    What it prints comes through a pipe, since its limits and rights may keep it from writing to files.
    """

    def __init__(self, call, prepare=lambda: None):
        self.printed, self.code, (self.pipe, end) = "", None, os.pipe()
        self.number = os.fork()
        if self.number == 0:
            os.close(self.pipe)
            sys.stdout = sys.stderr = os.fdopen(end, "w", buffering=1)
            gc.freeze()                              # what the parent has left may have threads there alone
            torch.set_num_threads(1)                 # the pool of the parent's threads has not come along
            code = 1
            try:
                prepare()
                code = exit_code(call) or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(end)
        os.set_blocking(self.pipe, False)

    def read(self):
        """Take over what it has printed since."""
        try:
            while part := os.read(self.pipe, 1 << 16):
                self.printed += part.decode(errors="replace")
        except BlockingIOError:                      # nothing more as yet
            pass

    @property
    def text(self):
        """What it has printed so far."""
        self.read()
        return self.printed

    @property
    def errors(self):
        """The error lines that it has printed; AssertionError for a traceback."""
        assert "Traceback" not in self.text, self.text
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    def poll(self):
        """Its exit code, negative for a signal; None as long as it lives."""
        if self.code is None:
            done, status = os.waitpid(self.number, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code

    def until(self, ready):
        """Wait until ``ready()``, as long as it lives."""
        while not ready() and (self.poll() is None or not ready()):
            assert self.code is None, self.text
            time.sleep(0.01)

    def end(self, seconds=120):
        """Its exit code, negative for a signal; it is killed when it takes longer."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            self.read()                              # so that it never waits for room in the pipe
            time.sleep(0.005)
        late = self.kill()
        assert not late, f"still there after {seconds} s:\n{self.text}"
        return self.code

    def kill(self):
        """SIGKILL; returns whether it was still there."""
        if self.code is None:
            os.kill(self.number, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
            return self.code == -signal.SIGKILL
        return False


def two_ranks(call, seconds=300):
    """All that two processes print that call ``call`` as ranks of one group, as torchrun's are.

    They find torchrun's variables and store.  When one fails, or both take longer, so do both and the test.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def become(number):
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), CUDA_VISIBLE_DEVICES="",
                          TORCHELASTIC_USE_AGENT_STORE="True")

    ranks, deadline = [Fork(call, partial(become, number)) for number in (0, 1)], time.monotonic() + seconds
    while {rank.poll() for rank in ranks} in ({None}, {None, 0}) and time.monotonic() < deadline:
        for rank in ranks:
            rank.read()                              # so that it never waits for room in the pipe
        time.sleep(0.005)
    for rank in ranks:
        rank.kill()
    printed = "".join(rank.text for rank in ranks)
    assert [rank.code for rank in ranks] == [0, 0], printed
    return printed


def full_disk(size):
    """From here on no file grows beyond ``size`` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def lose_rights():
    """From here on root, too, writes only where a file's mode says so.

    Without the capabilities DAC_OVERRIDE and DAC_READ_SEARCH, numbers 1 and 2, in this thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        sets[0] &= ~0b110                            # the effective ones
        libc.capset(header, sets)

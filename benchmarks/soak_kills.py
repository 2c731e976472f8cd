"""Training runs killed again and again: each must end, bitwise, as the run that nobody killed.

A run lasts about half a minute on one core and saves several times a second, so that SIGKILL comes while the
program starts, trains, validates and writes.  Then one more is sent SIGTERM, and says how long it took to go.
"""

import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
SMALL = ["DEMO_PATIENTS=12", "DEMO_PAIRS_PER_PATIENT=4", "DEMO_STUDIES=12", "DEMO_EM_SIZE=[24, 64]",
         "DEMO_LEAVES=12", "DEMO_SPINE=[12, 96]", "NUM_WORKERS=0", "CHECKPOINT_MINUTES=0.005",
         "SAVE_EVERY_EPOCHS=2", "KEEP_TOP_K=1", "LOG_EVERY_BATCHES=1"]
SECONDS = 600                     # that one run may take
STARTUP_SHARE = 0.2               # of the kills come before the first epoch
PHASES = ("starting", "training", "writing")
GRACE = 10                        # seconds that a run may take to save and go after SIGTERM


class Entry(NamedTuple):
    """A way to train: the script's words, and constants for a run of half a minute."""

    words: list
    constants: list


ENTRIES = {
    "longitudinal_mim": Entry(["longitudinal_MIM_training.py", "-p", "demo"], [
        "IMG_SIZE=64", "BATCH_SIZE=4", "LONGITUDINAL_MIM_EPOCHS=3", "SAMPLES_PER_EPOCH=2"]),
    "jepa": Entry(["train_pretrain.py", "--method", "jepa", "-p", "brain_demo"], [
        "STUDY_VIT_DEPTH=2", "JEPA_EPOCHS=6"]),
    "simclr": Entry(["train_pretrain.py", "--method", "simclr", "-p", "leaf_demo"], [
        "HVIT_IMG_SIZE=48", "SIMCLR_EPOCHS=5", "SIMCLR_BATCH_SIZE=8"]),
    "mil": Entry(["train_finetune.py", "--task", "mil", "-p", "brain_demo"], [
        "STUDY_VIT_DEPTH=2", "MIL_EPOCHS=8", "MIL_FREEZE_BACKBONE=False"]),
    "hvit": Entry(["train_finetune.py", "--task", "hvit", "-p", "leaf_demo"], [
        "HVIT_IMG_SIZE=48", "HVIT_EPOCHS=6", "HVIT_BATCH_SIZE=8"]),
    "multitask": Entry(["train_finetune.py", "--task", "multitask", "-p", "spine_demo_masks"], [
        "SPINE_SIZE=64", "SPINE_EPOCHS=5"]),
    "vista3d": Entry(["train_vista3d.py", "-p", "em_demo"], [
        "VISTA_FEATURES=8", "VISTA_HEAD_WIDTH=16", "VISTA_PATCH_SIZE=[8, 32, 32]", "VISTA_EPOCHS=3",
        "VISTA_CROPS_PER_EPOCH=40"]),
}


def command(kind, name, output, *words, launcher=()):
    """The words that train the run ``name``, or go on with it."""
    entry = ENTRIES[kind]
    settings = [*SMALL, *entry.constants, f"DEMO_DIR={output / 'data'}", f"RUNS_DIR={output / 'runs'}"]
    return [sys.executable, *launcher, *entry.words, "-n", name, "-c", "auto", *words, "--set", *settings]


def start(words, log):
    """The process of a command in a session of its own, whose output is added to the file ``log``."""
    with open(log, "a") as file:
        return subprocess.Popen([str(word) for word in words], cwd=ROOT, stdout=file, stderr=file,
                                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(words, log):
    """(exit code, seconds until the first epoch, seconds) of a command that is left alone."""
    log.write_text("")
    began, epoch, process = time.monotonic(), None, start(words, log)
    while process.poll() is None and time.monotonic() < began + SECONDS:
        if epoch is None and "Epoch" in log.read_text():
            epoch = time.monotonic() - began
        time.sleep(0.02)
    seconds = time.monotonic() - began
    kill(process)
    return process.returncode, epoch or seconds, seconds


def wait(process, seconds):
    """Return after so many seconds, or when the process has ended."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def kill(process):
    """SIGKILL to a process and all that it started; returns whether it was still there."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return process.wait() == -signal.SIGKILL


def differences(first, second):
    """What two runs' folders do not have in common: a file, or an entry of a checkpoint; "" when nothing."""
    names = [{str(path.relative_to(run)) for path in run.rglob("*") if path.parent.name != "tb"}
             for run in (first, second)]
    if names[0] != names[1]:
        return f"files {', '.join(sorted(names[0] ^ names[1]))}"
    for path in sorted(first.glob("*.pt")):
        states = (torch.load(run / path.name, weights_only=True) for run in (first, second))
        different = unequal(*({key: value for key, value in state.items() if key != "constants"}
                              for state in states))
        if different:
            return f"{path.name}: {different}"
    same = (first / "metrics.csv").read_bytes() == (second / "metrics.csv").read_bytes()
    return "" if same else "metrics.csv"


def unequal(first, second, name=""):
    """The path of the first leaf that differs between nested values, "" when all are bitwise equal."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return "" if torch.equal(first, second) else name
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return next(filter(None, (unequal(first[key], second[key], f"{name}/{key}") for key in first)), "")
    if isinstance(first, (list, tuple)) and len(first) == len(second):
        return unequal(dict(enumerate(first)), dict(enumerate(second)), name)
    return "" if first == second or first != first and second != second else name or "its entries"


def moment(seed, number, startup, whole, count):
    """(whether the first epoch is waited for, seconds from there or from the start) of a kill.

    A run bears ``count`` of them, or half as many, before it ends.
    """
    draw = random.Random(f"{seed} {number}")
    if draw.random() < STARTUP_SHARE:
        return False, draw.uniform(0, startup)
    return True, draw.uniform(0, 2 * (whole - startup) / count)


def await_moment(process, log, moment):
    """Return at a kill's moment, or when the process has ended."""
    trains, seconds = moment
    while trains and process.poll() is None and "Epoch" not in log.read_text():
        time.sleep(0.02)
    wait(process, seconds)


def phase(run, log, began):
    """What a process was at when it was killed; what one before it left half written does not count."""
    if any(path.stat().st_mtime > began for path in run.glob("*.tmp")):
        return "writing"
    return "training" if "Epoch" in log.read_text() else "starting"


def batter(words, run, log, moments, phases):
    """Kill a run at the next ``moments``, which are taken off, till none is left or it ends: exit code."""
    while moments:
        log.write_text("")
        began, process = time.time(), start(words, log)
        await_moment(process, log, moments[0])
        if not kill(process):
            return process.returncode
        moments.pop(0)
        phases[phase(run, log, began)] += 1
    return finish(words, log)[0]


def batter_ranks(words, run, log, moments, phases):
    """The same for two ranks under torchrun, of which one is killed at a time; torchrun starts both again."""
    log.write_text("")
    process, draw = start(words, log), random.Random(len(moments))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while moments and process.poll() is None:
        began, ranks = time.time(), children.read_text().split()
        await_moment(process, log, moments[0])
        if process.poll() is None and len(ranks) == 2 and ranks == children.read_text().split():
            os.kill(int(draw.choice(ranks)), signal.SIGKILL)
            moments.pop(0)
            phases[phase(run, log, began)] += 1
            log.write_text("")
    wait(process, SECONDS)
    return process.returncode if process.poll() is not None else kill(process)


def stop(words, log):
    """Seconds from SIGTERM in the first epoch to the end of a run that has said how to resume it."""
    log.write_text("")
    process = start(words, log)
    while process.poll() is None and "Train Loss" not in log.read_text():
        time.sleep(0.02)
    began = time.monotonic()
    process.terminate()
    wait(process, SECONDS)
    seconds = time.monotonic() - began
    kill(process)
    told = process.returncode == 128 + signal.SIGTERM and "resume with -c auto" in log.read_text()
    return seconds if told else float("inf")


def kill_entry(kind, count, seed, first, output, launcher=()):
    """(what is wrong or "", cells of the table) of an entry that is killed ``count`` times."""
    log, runs = output / "log.txt", output / "runs"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    code, *_ = finish(command(kind, "data", output, "--fast-dev-run"), log)           # makes the demo data
    if code == 0:
        code, startup, whole = finish(command(kind, "whole", output, launcher=launcher), log)
    if code != 0:
        return f"exit code {code} without being killed", ()
    phases, equal, batterer = collections.Counter(), 0, batter_ranks if launcher else batter
    moments = [moment(seed, number, startup, whole, count) for number in range(first, first + count)]
    grace = 0 if launcher else stop(command(kind, "killed_1", output), log)
    while moments or not equal:
        run = runs / f"killed_{equal + 1}"
        code = batterer(command(kind, run.name, output, launcher=launcher), run, log, moments, phases)
        wrong = f"exit code {code}" if code else differences(runs / "whole", run)
        if wrong:
            return f"{run.name}: {wrong}", ()
        shutil.rmtree(run)                            # checkpoints of many runs may fill a disk
        equal += 1
    cells = (phases.total(), *(phases[word] for word in PHASES), equal, whole, grace)
    return "" if grace <= GRACE else f"{grace} s after SIGTERM", cells


def kills(count, seed, first, output):
    """Kill each entry ``count`` times, and ranks of one under torchrun -> (kills, entries that failed)."""
    columns = ("entry", "kills", *PHASES, "runs equal", "a run, s", "SIGTERM, s", "all, s")
    print("{:16}  {:5}  {:>8}  {:>8}  {:>7}  {:10}  {:8}  {:10}  {:>6}".format(*columns), flush=True)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                f"--max-restarts={count}")
    rows, failed = [*((kind, kind, ()) for kind in ENTRIES), ("two ranks", "multitask", torchrun)], 0
    for row, kind, launcher in rows:
        began, folder = time.monotonic(), output.resolve() / "kill" / row.replace(" ", "_")
        wrong, cells = kill_entry(kind, count, seed, first, folder, launcher)
        failed += bool(wrong)
        if cells:
            print("{:16}  {:5}  {:8}  {:8}  {:7}  {:10}  {:8.0f}  {:10.1f}  {:6.0f}".format(
                row, *cells, time.monotonic() - began), flush=True)
        if wrong:
            print(f"{row}: {wrong}; see {folder}", flush=True)
        else:
            shutil.rmtree(folder)
    return count * len(rows), failed

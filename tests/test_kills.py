"""Hard knocks: runs that are killed, stopped, locked out or started twice, and disks that take no more."""

import importlib
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import SMALL_STUDY
from forks import Fork, full_disk, lose_rights
from test_scripts import states_differ

# Of each training entry the fixture that calls it, and its module.
KINDS = {"longitudinal_mim": ("train", "longitudinal_MIM_training"),
         "jepa": ("train_study", "train_pretrain"),
         "simclr": ("train_photo", "train_pretrain"), "vista3d": ("train_vista", "train_vista3d"),
         "multitask": ("train_spine", "train_finetune")}

# As many steps as batches.
STEPS = [f"{section}UPDATE_EVERY_BATCHES=1" for section in ("", "JEPA_", "SIMCLR_", "VISTA_", "SPINE_")]


@pytest.fixture
def start(request, narrow_xray, monkeypatch):
    """A function (kind, run, *options) -> a Fork that trains it, and saves after each step.

    It goes on where the run has begun.
    """
    for name in ("plot_loss_curves", "plot_detailed_curves"):
        monkeypatch.setattr(f"utils.history.{name}", lambda *values: None)              # they take longest

    def call(kind, run, *options, prepare=lambda: None):
        train = request.getfixturevalue(KINDS[kind][0])
        kind = () if kind in ("longitudinal_mim", "vista3d") else (kind,)
        return Fork(lambda: train(*kind, run, "CHECKPOINT_MINUTES=0.0", "SAVE_EVERY_EPOCHS=2", "KEEP_TOP_K=1",
                                  *STEPS, *options, words=["-c", "auto"]), prepare)

    return call


def assert_same_run(first, second):
    """The same checkpoints, bitwise, the same table, and nothing unfinished."""
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    for name in names:
        if name.endswith(".pt"):
            assert states_differ(first / name, second / name) == [], name
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()
    assert os.listdir(first / "samples") == os.listdir(second / "samples")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_three_times_and_stopped_once_ends_bitwise_equal(kind, start, tmp_path):
    """SIGKILL leaves no chance to tidy up; SIGTERM, a scheduler's, has the run saved within ten seconds.

    First between an epoch's checkpoint and its copies, where the best one would be lost; then at moments
    about the writing of a checkpoint, which are drawn.
    """
    module, moments = importlib.import_module(KINDS[kind][1]), random.Random(kind)
    save = module.save_checkpoint

    def kill(*values):
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_at_copies():
        module.keep_checkpoint = kill

    def kill_soon():
        def save_and_die(path, **entries):
            threading.Timer(moments.uniform(0, 0.02), kill).start()
            save(path, **entries)

        module.save_checkpoint = save_and_die

    def stop_while_saving():
        def save_when_stopped(path, **entries):
            os.kill(os.getpid(), signal.SIGTERM)
            save(path, **entries)

        module.save_checkpoint = save_when_stopped

    process, run = start(kind, "whole"), tmp_path / "runs" / "killed"
    assert process.end() == 0, process.text
    assert start(kind, "killed", prepare=kill_at_copies).end() == -signal.SIGKILL
    assert not (run / f"{kind}_best.pt").exists()
    for _ in range(2):
        assert start(kind, "killed", prepare=kill_soon).end() == -signal.SIGKILL
        moments.random()                                      # the next process draws another one
    process = start(kind, "killed", prepare=stop_while_saving)
    process.until(lambda: "Epoch" in process.text)
    assert process.end(seconds=10) == 128 + signal.SIGTERM, process.text
    assert "resume with -c auto" in process.text
    process = start(kind, "killed")
    assert process.end() == 0, process.text
    assert_same_run(tmp_path / "runs" / "whole", run)


@pytest.mark.parametrize("workers", [0, 1])
def test_of_two_runs_of_one_name_the_second_is_refused_until_the_first_is_gone(workers, start, tmp_path):
    """They would overwrite each other's files.  A killed one is gone, though its loading process lives on."""
    options, run = (f"NUM_WORKERS={workers}", "JEPA_EPOCHS=99"), tmp_path / "runs" / "run"
    first = start("jepa", "run", *options)
    first.until((run / "jepa_last.pt").exists)
    saved = (run / "training_params.json").read_bytes()
    second = start("jepa", "run", *options)
    assert second.end() == 2
    line, = second.errors
    assert str(run) in line and f"process {first.number}" in line and "another -n" in line
    assert (run / "training_params.json").read_bytes() == saved
    assert first.kill()
    third = start("jepa", "run", *options)
    third.until(lambda: "Epoch" in third.text)
    assert third.kill()


def test_a_disk_that_takes_no_more_costs_no_step_that_was_saved(start, tmp_path):
    """Full at whatever file, or not to be written to: one line, and with space again the run ends as ever."""
    run = tmp_path / "runs" / "run"
    assert start("multitask", "whole").end() == 0
    process = start("multitask", "run")
    process.until((run / "multitask_last.pt").exists)
    assert process.kill()
    saved = (run / "multitask_last.pt").read_bytes()
    for size in (0, 100, 30_000, 1_000_000):
        process = start("multitask", "run", prepare=lambda size=size: full_disk(size))
        assert process.end() == 2 and len(process.errors) == 1, process.text
        assert (run / "multitask_last.pt").read_bytes() == saved
    mode = stat.S_IMODE(run.stat().st_mode)
    run.chmod(0o555)
    process = start("multitask", "run", prepare=lose_rights)
    assert process.end() == 2
    run.chmod(mode)
    line, = process.errors
    assert str(run) in line and "Permission denied" in line
    assert start("multitask", "run").end() == 0
    assert_same_run(tmp_path / "runs" / "whole", run)


def torchrun(run, studies, *words):
    """Process of torchrun with two ranks that pretrain, and go on where they were when they are restarted."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=3", "train_pretrain.py", "--method", "jepa", "-n", run.name, "-c", "auto",
               "--data", studies / "cache", "--set", *SMALL_STUDY, "JEPA_EPOCHS=1", "CHECKPOINT_MINUTES=0.0",
               f"RUNS_DIR={run.parent}", f"STUDY_LABELS={studies / 'labels.csv'}"]
    return subprocess.Popen([str(word) for word in command], env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_rank_that_is_killed_under_torchrun_costs_nothing(start, studies, tmp_path):
    """Started again by --max-restarts, both end with the weights of a run in peace; one process goes on."""
    whole, run = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    process = torchrun(whole, studies)
    printed, _ = process.communicate()
    assert process.returncode == 0 and printed.count("Epoch 1 Complete") == 1, printed
    process = torchrun(run, studies)
    while not (run / "jepa_last.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[0]), signal.SIGKILL)
    printed, _ = process.communicate()
    assert process.returncode == 0 and "Resuming from" in printed, printed
    assert_same_run(whole, run)
    process = start("jepa", "killed", f"STUDY_LABELS={studies / 'labels.csv'}")
    assert process.end() == 0 and "Epoch 2 Complete" in process.text, process.text

"""Hard knocks: damaged files, mistaken users."""

import multiprocessing
import os
import pickle

import nibabel
import numpy as np
import pytest
import torch
from conftest import SMALL, write_case
from test_scripts import LAST

pytestmark = pytest.mark.usefixtures("narrow_xray")


def test_a_damaged_last_checkpoint_is_named_and_the_newest_sound_one_used(train, capsys):
    """The run goes on from the best file instead of starting afresh."""
    run = train("damaged", "LONGITUDINAL_MIM_EPOCHS=1")
    (run / LAST).write_bytes((run / LAST).read_bytes()[:1000])
    train("damaged", words=["-c", "auto"])
    printed = capsys.readouterr().out
    assert f"Damaged, passed over: {run / LAST}" in printed and f"{run}/longitudinal_mim_best.pt" in printed


def save_prior(root, array):
    """Replace the prior image of the first case."""
    image = nibabel.Nifti1Image(array.astype(np.float32), np.eye(4))
    nibabel.save(image, root / "p00_a" / "prior.nii.gz")


# Each writes one fault into a folder of pairs.

def truncated(root):
    path = root / "p00_a" / "current.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def volume(root):
    save_prior(root, np.zeros((64, 64, 5)))


def other_size(root):
    save_prior(root, np.zeros((64, 32)))


def not_a_number(root):
    save_prior(root, np.full((64, 64), np.nan))


def missing(root):
    (root / "p00_a" / "prior.nii.gz").unlink()


def empty(root):
    for path in root.rglob("*.nii.gz"):
        path.unlink()


def write_split(folder):
    """(folder of the pairs of six patients, CSV that trains on the first four and validates on two)."""
    root, csv = folder / "pairs", folder / "splits.csv"
    for patient in range(6):
        write_case(root / f"p{patient:02d}_a", seed=patient)
    csv.write_text("patient,split\n" + "".join(f"p{i:02d},{'train' if i < 4 else 'val'}\n" for i in range(6)))
    return root, csv


@pytest.mark.parametrize("fault", [truncated, volume, other_size, not_a_number, missing, empty])
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_training_data_ends_in_one_line(fault, workers, refused, tmp_path):
    """The file is named, whether it is read in the main process or in a data-loading one, which ends too."""
    root, csv = write_split(tmp_path)
    fault(root)
    line = refused("longitudinal_MIM_training", "-n", "a", "--data", root, "--set", *SMALL,
                   f"RUNS_DIR={tmp_path}", f"NUM_WORKERS={workers}", f"SPLIT_CSV={csv}")
    assert str(root) in line and (fault is empty or "p00_a" in line)
    assert multiprocessing.active_children() == []


def test_bad_cases_are_skipped_and_counted_when_asked(script, tmp_path, capsys):
    """ON_BAD_FILE="skip" trains on the rest and says what it left out."""
    root, csv = write_split(tmp_path)
    truncated(root)
    script("longitudinal_MIM_training", "-n", "a", "--data", root, "--set", *SMALL,
           f"RUNS_DIR={tmp_path}", f"SPLIT_CSV={csv}", "ON_BAD_FILE=skip")
    printed = capsys.readouterr().out
    assert "Skipped 1 bad file" in printed and "p00_a/current.nii.gz" in printed


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("content", ["missing", "text", "cut", "pickle", "other kind", "tensor"])
def test_a_wrong_checkpoint_is_refused_in_one_line(content, refused, pairs, tmp_path):
    """Asked to resume, a script never starts afresh, and never runs what a file carries."""
    path = tmp_path / "wrong.pt"
    if content == "text":
        path.write_text("hello")
    elif content == "cut":
        torch.save({"kind": "longitudinal_mim", "weights": torch.zeros(10_000)}, path)
        path.write_bytes(path.read_bytes()[:5_000])
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    elif content == "other kind":
        torch.save({"kind": "jepa", "format_version": 1, "model_state_dict": {}, "constants": {}}, path)
    elif content == "tensor":
        torch.save(torch.zeros(3), path)
    line = refused("longitudinal_MIM_training", "-n", "a", "-c", path, "--data", pairs,
                   "--set", *SMALL, f"RUNS_DIR={tmp_path}")
    assert str(path) in line
    line = refused("infer_longitudinal", "--checkpoint", path, "--data", pairs, "--output", tmp_path / "out")
    assert str(path) in line
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_network_is_refused(train, refused, pairs):
    """Weights of another size are not loaded in part."""
    run = train("one", "LONGITUDINAL_MIM_EPOCHS=1")
    line = refused("longitudinal_MIM_training", "-n", "two", "-c", run / LAST, "--data", pairs,
                   "--set", *SMALL, f"RUNS_DIR={run.parent}", "EFFICIENTNET=b1")
    assert "another model" in line


def test_a_loss_that_is_not_finite_stops_the_run(refused, pairs, tmp_path):
    """The step, the terms and the cases are named, and the weights on disk stay finite."""
    line = refused("longitudinal_MIM_training", "-n", "a", "--data", pairs,
                   "--set", *SMALL, f"RUNS_DIR={tmp_path}", "LAMBDA_L2=1e999")
    assert "step 1" in line and "L2=" in line and "p0" in line

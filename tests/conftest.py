"""Small pairs of images on disk, and the scripts as functions."""

import importlib
import sys

import nibabel
import numpy as np
import pytest
import torch

import constants as C

# A network of a few million weights on images of 64 pixels: an epoch takes a second or two.
SMALL = ["EFFICIENTNET=b0", "VIT=tiny", "IMG_SIZE=64", "MASK_PATCH_SIZE=32", "BATCH_SIZE=2",
         "UPDATE_EVERY_BATCHES=2", "LONGITUDINAL_MIM_EPOCHS=2", "NUM_WORKERS=0", "TRACKERS=[]",
         "PRECISION=fp32", "SAVE_EVERY_EPOCHS=0", "KEEP_TOP_K=0", "LOG_EVERY_BATCHES=2"]


def write_case(folder, seed, size=64):
    """A pair whose current image has one bright or dark disc more; returns the folder."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] / size
    base = 0.5 + 0.2 * np.sin(6 * rows + seed) * np.cos(5 * columns)
    base += 0.02 * rng.standard_normal((size, size))
    row, column, sign = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.choice([-1, 1])
    diff = 0.25 * sign * (np.hypot(rows - row, columns - column) < 0.15)
    folder.mkdir(parents=True)
    for name, image in [("prior", base), ("current", np.clip(base + diff, 0, 1)), ("diff_map", diff)]:
        nibabel.save(nibabel.Nifti1Image(image.T.astype(np.float32), np.diag([-1, -1, 1, 1])),
                     folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Folder with the pairs of 16 patients, one each."""
    root = tmp_path_factory.mktemp("pairs")
    for patient in range(16):
        write_case(root / f"p{patient:02d}_a", seed=patient)
    return root


@pytest.fixture
def script(monkeypatch):
    """Call a script's ``main`` with command-line words; constants.py is as it was afterwards."""
    before = {name: value for name, value in vars(C).items() if name.isupper()}
    threads = torch.get_num_threads()

    def call(name, *words):
        vars(C).update(before)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        return importlib.import_module(name).main()

    yield call
    vars(C).update(before)
    torch.set_num_threads(threads)


@pytest.fixture
def train(script, pairs, tmp_path):
    """Train the small network into ``tmp_path/runs/<name>``; returns that folder."""
    def call(name, *overrides, words=()):
        script("longitudinal_MIM_training", "-n", name, "--data", pairs, *words,
               "--set", *SMALL, f"RUNS_DIR={tmp_path / 'runs'}", *overrides)
        return tmp_path / "runs" / name

    return call

"""Hard knocks for electron microscopy: damaged and mistaken volumes, labels, settings, and a full disk."""

import shutil
import sys

import h5py
import numpy as np
import pytest
from conftest import SMALL_VISTA, bricks
from forks import Fork, full_disk

from models.vista import Vista
from utils.checkpoint import save_checkpoint


@pytest.fixture
def folder(tmp_path):
    """Folder snemi3d with the small volume, to be damaged."""
    (tmp_path / "snemi3d").mkdir()
    for name, values in zip(("inputs", "labels"), bricks(), strict=True):
        write(tmp_path / "snemi3d" / f"toy_{name}.h5", values)
    return tmp_path / "snemi3d"


def write(path, values, key="main"):
    """An HDF5 file with one array."""
    with h5py.File(path, "w") as file:
        file[key] = values


@pytest.fixture
def untrained(tmp_path):
    """A checkpoint with the random weights of a small network."""
    constants = dict(pair.split("=", 1) for pair in SMALL_VISTA)
    constants = {"VISTA_ENCODER": "segresnet", "VISTA_FEATURES": 8, "VISTA_HEAD_WIDTH": 8,
                 "VISTA_EMBEDDING": int(constants["VISTA_EMBEDDING"]), "VISTA_PATCH_SIZE": [8, 32, 32],
                 "PRECISION": "fp32"}
    save_checkpoint(tmp_path / "net.pt", kind="vista3d", constants=constants, spacing_nm=[30, 6, 6],
                    model_state_dict=Vista(3, "segresnet", 8, 16, 4, 8).state_dict())
    return tmp_path / "net.pt"


LABELS = bricks()[1]
FAULTS = {
    "no_such_key": ("inputs", lambda path: write(path, bricks()[0], "volume_of_mine/x"), None),
    "flat": ("inputs", lambda path: write(path, bricks()[0][0]), "toy_inputs.h5"),
    "four_axes": ("inputs", lambda path: write(path, bricks()[0][None]), "toy_inputs.h5"),
    "empty_file": ("inputs", lambda path: path.write_bytes(b""), "toy_inputs.h5"),
    "truncated": ("inputs", lambda path: path.write_bytes(path.read_bytes()[:3000]), "toy_inputs.h5"),
    "text": ("labels", lambda path: path.write_text("neurons\n" * 99), "toy_labels.h5"),
    "fractions": ("labels", lambda path: write(path, LABELS + np.float32(0.5)), "toy_labels.h5"),
    "negative": ("labels", lambda path: write(path, LABELS.astype(np.int32) - 9), "toy_labels.h5"),
    "other_shape": ("labels", lambda path: write(path, LABELS[:, 1:]), "toy_labels.h5"),
    "not_a_number": ("inputs", lambda path: write(path, np.full(LABELS.shape, np.nan, np.float32)),
                     "toy_inputs.h5"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_volume_is_one_line_that_names_the_file(fault, folder, refused, tmp_path):
    """Whatever is wrong with it, training ends before it begins, or at the first crop of it."""
    name, damage, named = FAULTS[fault]
    damage(folder / f"toy_{name}.h5")
    if named is None:                                # the only 3D array of a file is taken, whatever its name
        with h5py.File(folder / "toy_inputs.h5", "a") as file:
            file["other"] = bricks()[0]
        named = "volume_of_mine/x"
    line = refused("train_vista3d", "-n", "run", "--data", folder.parent,
                   "--set", *SMALL_VISTA, f"RUNS_DIR={tmp_path / 'runs'}")
    assert named in line, line


@pytest.mark.parametrize("setting, words", [
    ("VISTA_CLASS_WEIGHTS=[1.0, 2.0, 3.0]", ["VISTA_CLASS_WEIGHTS", "3", "16"]),
    ("VISTA_ENCODER=unet", ["VISTA_ENCODER", "unet", "vista3d", "segresnet"]),
    ("VISTA_DATASETS=['snemi4d']", ["snemi4d", "snemi3d"]),
    ("VISTA_DATASETS=['cremi3d']", ["cremi3d"]),
    ("VISTA_VAL_FRACTION=1.2", ["VISTA_VAL_FRACTION"]),
    ("VISTA_GAP=60", ["VISTA_GAP"]),
    ("VISTA_AUG_FLIP=1.5", ["flip"]),
    ("VISTA_MONITOR=val/nothing", ["val/nothing"]),
    ("VISTA_FEATURES=12", ["VISTA_FEATURES"])])
def test_a_setting_that_makes_no_sense_is_named(setting, words, refused, volumes, tmp_path):
    """One line, before or in the first epoch."""
    line = refused("train_vista3d", "-n", "run", "--data", volumes,
                   "--set", *SMALL_VISTA, f"RUNS_DIR={tmp_path / 'runs'}", setting)
    assert all(word in line for word in words), line


def test_a_patch_larger_than_the_volume_is_padded(train_vista, script, untrained, volumes, tmp_path):
    """By reflection, without labels there; inference does the same and writes the volume's own shape."""
    train_vista("large", "VISTA_PATCH_SIZE=[64, 64, 64]", "VISTA_BATCH_SIZE=1", "VISTA_VAL_CROPS=1",
                words=["--fast-dev-run"])
    script("infer_vista3d", "--checkpoint", untrained, "--input", volumes / "snemi3d" / "toy_inputs.h5",
           "--output", tmp_path / "out.h5", "--patch-size", 64, 64, 64)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["segmentation"].shape == (40, 48, 52)


@pytest.mark.parametrize("words, named", [
    (["--input-key", "volumes/raw"], ["volumes/raw", "main"]),
    (["--patch-size", 0, 32, 32], ["--stride"]),
    (["--stride", 9, 32, 32], ["--stride", "[8, 32, 32]"]),
    (["--class-id", 4], ["--class-id"]),
    (["--output-probs", "--output-classes"], ["--output-probs"]),
    (["--output", "out.mat"], [".mat"]),
    (["--merge-threshold", 2], ["--merge-threshold"]),
    (["--input", "absent.h5"], ["absent.h5"])])
def test_a_mistake_on_the_command_line_of_inference_is_named(words, named, refused, untrained, volumes,
                                                             tmp_path):
    """Before any window is computed, and without leaving anything behind."""
    line = refused("infer_vista3d", "--checkpoint", untrained, "--output", tmp_path / "out.h5", "--input",
                   volumes / "snemi3d" / "toy_inputs.h5", *words)
    assert all(word in line for word in named), line
    assert not list(tmp_path.glob("out.h5*"))


def test_parts_of_another_run_are_never_mixed_in(script, refused, untrained, volumes, tmp_path, monkeypatch):
    """An interrupted run with other settings: the folder and the setting are named."""
    words = ["infer_vista3d", "--checkpoint", untrained, "--output", tmp_path / "out.h5", "--input",
             volumes / "snemi3d" / "toy_inputs.h5"]
    with monkeypatch.context() as patched:
        patched.setattr("infer_vista3d.write_output", lambda *values: sys.exit(1))
        with pytest.raises(SystemExit):
            script(*words)
    line = refused(*words, "--bandwidth", 0.7)
    assert "out.h5.parts" in line and "bandwidth" in line
    script(*words)
    assert not (tmp_path / "out.h5.parts").exists()


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_a_full_disk_leaves_nothing_that_looks_finished(limit, script, untrained, volumes, tmp_path):
    """While parts are written, and while the output is: exit code 2, one line, and a rerun ends the work."""
    def infer():
        script("infer_vista3d", "--checkpoint", untrained, "--output", tmp_path / "out.h5",
               "--input", volumes / "snemi3d" / "toy_inputs.h5", "--output-probs")

    process = Fork(infer, prepare=lambda: full_disk(limit))
    assert process.end() == 2 and len(process.errors) == 1, process.text
    assert not (tmp_path / "out.h5").exists()
    infer()
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["segmentation"].shape == (5, 40, 48, 52)
    shutil.rmtree(tmp_path / "snemi3d", ignore_errors=True)

"""Damaged inputs through every reader: each refused or read right, within time and memory."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import input_files
from mutations import OWN, mutant

SOAK = Path(__file__).parents[1] / "benchmarks/soak.py"


def test_a_mutant_depends_on_its_seed_alone(tmp_path):
    """Only so can one that failed be made again; and most are no longer what they were made of."""
    input_files.write_all(tmp_path / "one")
    input_files.write_all(tmp_path / "two")
    for name, kind in {"volume.nii.gz": "nifti", "jpegls.dcm": "dicom", "gzip.h5": "hdf5",
                       "ome.ome.tif": "tiff", "colour.png": "picture", "splits.csv": "csv"}.items():
        one, two = ((tmp_path / folder / name / name).read_bytes() for folder in ("one", "two"))
        mutants = [mutant(one, kind, random.Random(f"0/{number}")) for number in range(40)]
        assert mutants == [mutant(two, kind, random.Random(f"0/{number}")) for number in range(40)], name
        assert sum(data != one for data, _ in mutants) > 20 and OWN[kind].__name__ in str(mutants), name


def test_damaged_inputs_are_refused_in_one_line_or_read_right(tmp_path):
    """A short part of the soak: no traceback, no hang, no memory beyond the file's, no wrong answer."""
    command = [sys.executable, SOAK, "inputs", "--count", "60", "--seed", "7", "--output", tmp_path]
    result = subprocess.run(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"},
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "60 of 60 survived" in result.stdout and not list(tmp_path.iterdir())


def test_a_reader_that_fails_is_found_out(tmp_path, monkeypatch, capfd):
    """Each kind of failure is told apart, and the mutant is kept: a soak that finds nothing must mean it."""
    import soak_inputs

    def crashes(path):
        os.kill(os.getpid(), signal.SIGTERM)

    def greedy(path):
        return {"size": len(bytearray(200_000_000))}

    def wrong(path):
        return {"image": input_files.BYTES[0] + 1}

    def broken(path):
        raise KeyError("a traceback")

    def hangs(path):
        while True:
            pass

    monkeypatch.setattr(soak_inputs, "SECONDS", 1)
    peer = soak_inputs.SAMPLES[0].peer
    folder = tmp_path / "image.nii"
    folder.mkdir()
    input_files.save_nifti(folder / "image.nii", input_files.BYTES[0].T, affine=input_files.SLICE)
    for read, outcome in ((crashes, "ends the process"), (greedy, "too much memory"), (wrong, "wrong"),
                          (broken, "traceback"), (hangs, "hangs")):
        sample = soak_inputs.Sample("nifti", "image.nii", read, peer)
        result = soak_inputs.attempt(sample, folder / "image.nii", {"image": input_files.BYTES[0]})
        assert result["outcome"] == outcome, read

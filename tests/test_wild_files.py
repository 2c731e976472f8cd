"""The test files of pydicom and nibabel themselves: read as these read them, or refused in one line."""

import sys
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import input_readers as readers

from datasets.dicom import read_frames, read_stored
from datasets.em_files import open_volume
from datasets.io import read_image
from datasets.photo_files import read_photo
from datasets.slice_series import read_series
from datasets.volumes import read_nifti
from utils.config import BadFile, UserError

FOLDERS = [Path(pydicom.__file__).parent / "data", *sorted(Path(nibabel.__file__).parent.rglob("tests/data"))]
FILES = [path for folder in FOLDERS for path in sorted(folder.rglob("*"))
         if path.is_file() and path.suffix not in (".py", ".pyc")]


def whole_volume(path):
    """As electron microscopy is read."""
    return open_volume(path)[:]


def answer(read, path):
    """What a reader returns, or None where it refuses in one line that names the file or its folder."""
    try:
        return read(path)
    except UserError as error:
        line = str(error)
        assert len(line.splitlines()) == 1 and str(path.parent) in line, line
        assert isinstance(error, BadFile) or read is whole_volume, line        # of an unknown suffix
        return None


def assert_equal(found, expected):
    """To the precision of float32."""
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))


def test_there_are_files_of_both():
    """A package without its tests would make the others pass on nothing."""
    assert sum("pydicom" in path.parts for path in FILES) > 100
    assert sum(path.name.endswith((".nii", ".nii.gz")) for path in FILES) > 7


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_of_the_wild_are_read_right_or_refused(path):
    """What the makers of these libraries met in the world must never be taken for something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # of pydicom, when it is asked itself
        image = answer(read_image, path)
        if image is not None and path.name.endswith((".nii", ".nii.gz")):
            assert_equal(image, readers.image_nifti_peer(path)["image"])
        elif image is not None:
            assert_equal(image, readers.dicom_peer(path)["image"])
        frames = answer(lambda path: read_stored(read_frames(path, {})), path)
        if frames is not None:
            stored = pydicom.dcmread(path, force=True).pixel_array
            np.testing.assert_array_equal(np.stack(frames), stored.reshape(-1, *frames[0].shape))
        volume = answer(read_nifti, path)
        if volume is not None:
            data, affine = readers.nifti_peer(path)
            assert_equal(volume.data, data)
            np.testing.assert_array_equal(volume.affine, affine)
        series = answer(read_series, path)
        if series is not None:
            assert_equal(series.data, readers.series_peer(path)["data"])
        em = answer(whole_volume, path)
        if em is not None:
            assert_equal(em, readers.nifti_peer(path)[0].T)
        assert answer(read_photo, path) is None      # none of them is a photograph

"""What makers of demo data share: the marker, whole folders, missing folders, DICOM images."""

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, generate_uid

from datasets.demo_files import dicom_image, is_complete, make_missing, whole_folder, write_marker
from utils.config import UserError


def test_a_folder_tells_whether_it_is_whole_and_refuses_other_settings(tmp_path):
    """Data made with other settings are neither mixed nor deleted."""
    output = tmp_path / "demo"
    assert not is_complete(output, {"seed": 0})
    write_marker(output, {"seed": 0, "size": None}, complete=False)
    assert not is_complete(output, {"seed": 0, "size": None})
    write_marker(output, {"seed": 0, "size": None}, complete=True)
    assert is_complete(output, {"seed": 0, "size": None})
    with pytest.raises(UserError, match="another seed, size"):
        is_complete(output, {"seed": 1, "size": 64})
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds other things"):
        is_complete(tmp_path, {"seed": 0})


def test_a_folder_that_was_not_finished_does_not_get_its_name(tmp_path):
    """An interrupted run leaves whole folders only."""
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == [".a"]
    with whole_folder(tmp_path / "a") as folder:
        (folder / "half").write_text("whole")
    assert (tmp_path / "a" / "half").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_missing_folders_are_made(tmp_path):
    """What a stopped run finished is kept."""
    jobs = [(tmp_path / name, name) for name in ("a", "b", "c")]
    (tmp_path / "b").mkdir()
    made = []
    make_missing(lambda job: made.append(job[1]), jobs, workers=0, unit="folder")
    assert made == ["a", "c"]


@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_pixels_and_elements_come_back(tmp_path, dtype):
    """Signed and unsigned pixels; elements given by keyword replace those that are assumed."""
    pixels = np.random.default_rng(0).integers(0, 16000, (3, 5)).astype(dtype) - np.array(9, dtype)
    item = dicom_image(pixels, CTImageStorage, generate_uid(entropy_srcs=["a"]), BitsStored=15, HighBit=14,
                       PhotometricInterpretation="MONOCHROME1", PatientID="p")
    item.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    read = pydicom.dcmread(tmp_path / "a.dcm")
    assert np.array_equal(read.pixel_array, pixels) and read.BitsStored == 15 and read.PatientID == "p"
    assert read.PhotometricInterpretation == "MONOCHROME1"
    assert read.file_meta.MediaStorageSOPInstanceUID == read.SOPInstanceUID

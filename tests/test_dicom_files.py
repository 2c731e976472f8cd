"""DICOM files whose elements claim to be longer than the file."""

import struct
import tracemalloc

import numpy as np
import pydicom
import pytest
from test_dicom import make_slice, write_dicom

from datasets.dicom import read_frames
from datasets.dicom_files import read_dataset
from utils.config import BadFile

GREY = np.arange(35, dtype="u2").reshape(5, 7)


def test_a_sound_file_is_read_as_pydicom_does(tmp_path):
    """Deferred values too, which are read when they are asked for."""
    path = write_dicom(tmp_path / "a.dcm", make_slice(GREY, (0, 0, 0)))
    assert read_dataset(path) == pydicom.dcmread(path)
    deferred = read_dataset(path, defer_size=16)
    assert deferred.PixelData == pydicom.dcmread(path).PixelData


def test_no_more_memory_is_asked_for_than_the_file_is_long(tmp_path):
    """A flipped bit in a length must not end a run on a small machine: 4 GB would be made room for."""
    path = write_dicom(tmp_path / "a.dcm", make_slice(GREY, (0, 0, 0)))
    data = bytearray(path.read_bytes())
    at = data.index(b"\x08\x00\x60\x00CS")           # Modality
    data[at + 4:at + 6] = b"OB"
    data[at + 6:at + 12] = bytes(2) + struct.pack("<I", 0xF0000000)
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(BadFile):
            read_frames(path, {})
        assert "PixelData" not in read_dataset(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()

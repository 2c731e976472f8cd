"""DICOM files whose elements claim to be longer than the file, and modality lookup tables."""

import itertools
import random
import struct
import tracemalloc

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_modality_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from test_dicom import make_slice, read_real, refusal, write_dicom

from datasets.dicom import read_frames
from datasets.dicom_files import read_dataset
from utils.config import BadFile

GREY = np.arange(35, dtype="u2").reshape(5, 7)
RNG = np.random.default_rng(0)


def make_table(entries, vr="OW", first=0, due=None, bits=16, order="<"):
    """A modality LUT of whole numbers [n] from stored number ``first``; due: how many it says it has."""
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "SS" if first < 0 else "US", [(due or len(entries)) % 65536, first, bits])
    table.ModalityLUTType = "US"
    table.add_new("LUTData", vr, entries.astype(f"{order}u2").tobytes() if vr == "OW" else entries.tolist())
    return table


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


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian,
                                    DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("vr", ["US", "SS", "OW"])
@pytest.mark.parametrize("count", [4, 200, 480, 4096, 65536])
def test_a_lookup_table_is_applied_however_it_is_written(tmp_path, syntax, vr, count):
    """Deferred, of a type that other tags tell, or longer than the first read: stored numbers came out."""
    if count == 65536 and vr != "OW":
        return                                       # has no place in another
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    entries = RNG.integers(0, 65536 if vr == "US" else 32768, count)
    stored = RNG.integers(0, min(count + 20, 65536), (20, 30))
    for undefined in (False, True):
        item = make_slice(stored.astype(f"{order}u2"), (0, 0, 0),
                          ModalityLUTSequence=[make_table(entries, vr, order=order)])
        item["ModalityLUTSequence"].is_undefined_length = undefined
        path = write_dicom(tmp_path / "a", item, syntax)
        found, whole = read_real(path)[0], pydicom.dcmread(path)
        np.testing.assert_array_equal(found, entries[np.minimum(stored, count - 1)])
        np.testing.assert_array_equal(found, apply_modality_lut(whole.pixel_array, whole))


@pytest.mark.parametrize("dtype, first", [("u1", 0), ("i1", -128), ("u2", 100), ("i2", -500), ("i2", -32768)])
def test_numbers_outside_a_lookup_table_take_its_ends(tmp_path, dtype, first):
    """Whatever their type holds: pydicom's own wrap round, or overflow."""
    limits = np.iinfo(dtype)
    stored = np.linspace(limits.min, limits.max, 35).astype(dtype).reshape(5, 7)
    entries = RNG.integers(0, 32768, 480)
    item = make_slice(stored, (0, 0, 0), ModalityLUTSequence=[make_table(entries, first=first)])
    np.testing.assert_array_equal(read_real(write_dicom(tmp_path / "a", item))[0],
                                  entries[(stored.astype(int) - first).clip(0, 479)])


def test_an_empty_sequence_is_no_lookup_table(tmp_path):
    """Some writers leave it there; the rescale stands then."""
    for undefined in (False, True):
        item = make_slice(GREY, (0, 0, 0), RescaleSlope=2, RescaleIntercept=-5, ModalityLUTSequence=[])
        item["ModalityLUTSequence"].is_undefined_length = undefined
        np.testing.assert_array_equal(read_real(write_dicom(tmp_path / "a", item))[0], GREY * 2.0 - 5)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_damaged_lookup_table_is_refused(tmp_path, syntax):
    """In one line, also where no pixel asks for the entries that are not there."""
    entries = np.arange(200)
    cases = [make_table(entries, vr, due=due) for vr, due in itertools.product(("US", "OW"), (201, 65536))]
    cases += [make_table(entries, bits=12), make_table(entries + 100, bits=8), pydicom.Dataset()]
    for name in ("LUTDescriptor", "LUTData"):
        cases += [make_table(entries), make_table(entries)]
        delattr(cases[-1], name)
        setattr(cases[-2], name, None)
    cases.append(make_table(entries))
    cases[-1].LUTDescriptor = [200, 0]
    for table in cases:
        for undefined in (False, True):
            item = make_slice(GREY, (0, 0, 0), ModalityLUTSequence=[table])
            item["ModalityLUTSequence"].is_undefined_length = undefined
            assert "modality LUT" in refusal(write_dicom(tmp_path / "a", item, syntax)), table


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("undefined", [False, True])
def test_flipped_bits_of_a_lookup_table_end_in_one_line_at_most(tmp_path, syntax, undefined):
    """One broken file must not end a run over thousands."""
    item = make_slice(GREY, (0, 0, 0), ModalityLUTSequence=[make_table(np.arange(50), "US")])
    item["ModalityLUTSequence"].is_undefined_length = undefined
    path, generator = write_dicom(tmp_path / "a", item, syntax), random.Random(0)
    data = path.read_bytes()
    at = data.index(b"\x28\x00\x00\x30")
    for _ in range(300):
        broken = bytearray(data)
        broken[generator.randrange(at, at + 80)] ^= 1 << generator.randrange(8)
        path.write_bytes(broken)
        try:
            assert read_real(path).shape == (1, 5, 7)
        except BadFile as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_long_sequence_of_undefined_length_is_passed_over(tmp_path, syntax):
    """An icon or a maker's tables reach beyond the first read; the file was taken for damaged."""
    icon = pydicom.Dataset()
    icon.add_new("LUTData", "OW", bytes(100_000))
    item = make_slice(GREY, (0, 0, 0), IconImageSequence=[icon])
    item["IconImageSequence"].is_undefined_length = True
    path = write_dicom(tmp_path / "a", item, syntax)
    assert path.read_bytes().index(b"\xfe\xff\xdd\xe0") > 65_536      # the end of the sequence
    np.testing.assert_array_equal(read_real(path)[0], GREY)

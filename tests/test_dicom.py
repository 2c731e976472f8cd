"""Frames of DICOM files: where they lie, what their pixels measure, and files that are refused."""

import random
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)
from test_io import recode_dicom

from datasets.dicom import LOWEST_HU, read_frames, read_stored, real_dtype, write_real
from utils.config import BadFile

AXIAL, CORONAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]
SPACING = [0.5, 0.75]                                # mm, of rows and columns
TEST_FILES = Path(get_testdata_file("CT_small.dcm")).parent
RNG = np.random.default_rng(0)


def make_slice(stored, position, orientation=AXIAL, **tags):
    """A dataset of one slice [H, W]; tags set to None are left out."""
    item = pydicom.Dataset()
    item.file_meta = pydicom.dataset.FileMetaDataset()
    item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item.SOPClassUID, item.SOPInstanceUID = CTImageStorage, generate_uid()
    item.StudyInstanceUID, item.SeriesInstanceUID, item.SeriesNumber = "1.2.3", "1.2.3.4", 7
    item.Modality, item.ImageType = "MR", ["ORIGINAL", "PRIMARY"]
    item.Rows, item.Columns = stored.shape[-2:]
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.PixelRepresentation = int(stored.dtype.kind == "i")
    item.BitsAllocated = item.BitsStored = 8 * stored.itemsize
    item.HighBit = item.BitsStored - 1
    item.PixelSpacing, item.ImageOrientationPatient = SPACING, list(orientation)
    item.ImagePositionPatient = [float(mm) for mm in position]
    data = stored.tobytes()
    item.PixelData = data + b"\0" * (len(data) % 2)
    item["PixelData"].VR = "OW" if stored.itemsize > 1 else "OB"
    for name, value in tags.items():
        if value is not None:
            setattr(item, name, value)
        elif name in item:
            delattr(item, name)
    return item


def write_dicom(path, item, syntax=None):
    """Save a dataset under an uncompressed syntax, deflated or RLE; returns the path."""
    if syntax == RLELossless:
        item.compress(syntax, encoding_plugin="pydicom")             # GDCM aborts on odd sizes
    elif syntax:
        item.file_meta.TransferSyntaxUID = syntax
    item.save_as(path, enforce_file_format=True)
    return path


def make_enhanced(stored, positions, orientation=AXIAL, slopes=None, **tags):
    """A multi-frame dataset of ``stored`` [F, H, W], each frame with its own position and rescale."""
    item = make_slice(stored, positions[0], orientation, SOPClassUID=EnhancedMRImageStorage, **tags)
    for name in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"):
        delattr(item, name)
    item.NumberOfFrames = len(stored)

    def group(**macros):
        whole = pydicom.Dataset()
        for name, values in macros.items():
            macro = pydicom.Dataset()
            for key, value in values.items():
                setattr(macro, key, value)
            setattr(whole, name, [macro])
        other = pydicom.Dataset()
        other.ImagePositionPatient, other.RescaleSlope = [9.0, 9.0, 9.0], 9
        whole.private_block(0x2005, "A MAKER", create=True).add_new(0x0F, "SQ", [other])
        return whole

    item.SharedFunctionalGroupsSequence = [group(
        PixelMeasuresSequence={"PixelSpacing": SPACING, "SliceThickness": 2.0},
        PlaneOrientationSequence={"ImageOrientationPatient": list(orientation)})]
    item.PerFrameFunctionalGroupsSequence = [group(
        PlanePositionSequence={"ImagePositionPatient": [float(mm) for mm in position]},
        PixelValueTransformationSequence={"RescaleSlope": 1.0 if slopes is None else slopes[number],
                                          "RescaleIntercept": 0.0})
        for number, position in enumerate(positions)]
    return item


def read_real(path):
    """The real values [F, H, W] of a file's frames."""
    frames = read_frames(path, {})
    out = np.empty((len(frames), *frames[0].form.geometry[:2]), real_dtype({frame.form for frame in frames}))
    for frame, stored, real in zip(frames, read_stored(frames), out, strict=True):
        write_real(frame, stored, real)
    return out


def refusal(path):
    """The message of the BadFile that reading ``path`` raises: one line that begins with the path."""
    with pytest.raises(BadFile) as error:
        read_real(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype, bits, high_bit", [
    ("u2", 16, 15), ("i2", 16, 15), ("u2", 12, 11), ("i2", 12, 11), ("u2", 12, 15), ("i2", 12, 15),
    ("u1", 8, 7), ("i1", 8, 7), ("i4", 32, 31)])
def test_signs_and_uncounted_bits(tmp_path, dtype, bits, high_bit):
    """Overlays and junk in the other bits are no pixels; a negative number of 12 bits stays negative."""
    low, high = (0, 2 ** bits) if dtype[0] == "u" else (-2 ** (bits - 1), 2 ** (bits - 1))
    true = RNG.integers(low, high, (5, 7))
    junk = RNG.integers(0, 2 ** (8 * int(dtype[1])), (5, 7))
    shift, mask = high_bit + 1 - bits, (2 ** bits - 1) << (high_bit + 1 - bits)
    stored = ((true << shift) & mask | junk & ~mask).astype(f"u{dtype[1]}").view(dtype)
    path = write_dicom(tmp_path / "a.dcm", make_slice(stored, (0, 0, 0), BitsStored=bits, HighBit=high_bit))
    np.testing.assert_array_equal(read_real(path)[0], true.astype(np.float32) if bits == 32 else true)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian,
                                    DeflatedExplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize("dtype", ["u1", "i2"])
def test_every_encoding_reads_the_same(tmp_path, syntax, dtype):
    """Byte order, padding to an even length, deflation and run lengths leave no trace in the pixels."""
    stored = RNG.integers(0, 100, (5, 7)).astype(dtype)
    item = make_slice(stored, (0, 0, 0))
    if syntax == ExplicitVRBigEndian:
        item.PixelData = stored.astype(f">{dtype}").tobytes() + b"\0" * (stored.nbytes % 2)
        item["PixelData"].VR = "OB" if dtype == "u1" else "OW"
    np.testing.assert_array_equal(read_real(write_dicom(tmp_path / "a", item, syntax))[0], stored)


def test_compressed_slices_equal_the_uncompressed(tmp_path):
    """The lossless syntaxes of archives, of signed numbers too."""
    syntaxes = gdcm.TransferSyntax
    for dtype in ("u2", "i2"):
        stored = (1000 * np.sin(np.arange(480).reshape(24, 20) / 50) + 1000 * (dtype == "u2")).astype(dtype)
        plain = write_dicom(tmp_path / f"{dtype}.dcm", make_slice(stored, (0, 0, 0)))
        for syntax in (syntaxes.JPEGLosslessProcess14_1, syntaxes.JPEGLSLossless, syntaxes.JPEG2000Lossless):
            path = recode_dicom(plain, tmp_path / f"{dtype}_{syntax}", syntax)
            np.testing.assert_array_equal(read_real(path)[0], stored, err_msg=str(path))


@pytest.mark.parametrize("tags", [
    {}, {"RescaleSlope": "", "SliceThickness": ""}, {"RescaleSlope": 1, "RescaleIntercept": -1024},
    {"RescaleSlope": 2.5, "RescaleIntercept": -1000.5}])
@pytest.mark.parametrize("modality", ["MR", "CT"])
@pytest.mark.parametrize("dtype", ["u2", "i2"])
def test_real_values_are_the_formula_of_the_standard(tmp_path, tags, modality, dtype):
    """PS3.3 C.7.6.16.2.9: stored * slope + intercept, over all of 16 bits; HU are held above air."""
    stored = np.linspace(0 if dtype == "u2" else -2 ** 15, 2 ** 16 - 1 if dtype == "u2" else 2 ** 15 - 1,
                         35).astype(dtype).reshape(5, 7)
    path = write_dicom(tmp_path / "a", make_slice(stored, (0, 0, 0), Modality=modality, **tags))
    slope = tags.get("RescaleSlope") or 1
    expected = stored.astype(float) * slope + tags.get("RescaleIntercept", 0)
    if modality == "CT":
        expected = expected.clip(-1024, 32767)
    np.testing.assert_allclose(read_real(path)[0], expected, atol=3, rtol=1e-6)
    if slope == 1:
        np.testing.assert_array_equal(read_real(path)[0], expected)


def test_a_lookup_table_is_applied(tmp_path):
    """A modality LUT stands where a rescale would."""
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [4, 0, 16], "US", [7, 100, 9, 50]
    stored = np.array([[0, 1, 2, 3], [3, 3, 1, 0]], "u2")
    item = make_slice(stored, (0, 0, 0), ModalityLUTSequence=[table])
    item.ModalityLUTSequence[0]["LUTDescriptor"].VR = item.ModalityLUTSequence[0]["LUTData"].VR = "US"
    np.testing.assert_array_equal(read_real(write_dicom(tmp_path / "a", item))[0],
                                  np.array([7, 100, 9, 50])[stored])


@pytest.mark.parametrize("padding, limit, hidden", [(-2000, None, [-2000]), (0, None, [0]), (5, 40, [5, 40]),
                                                    (40, 5, [5, 40])])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_padding_of_a_ct_becomes_air(tmp_path, padding, limit, hidden, syntax):
    """Padding is no measurement: the corners of a CT would be dense bone or water, or skew every average."""
    stored = np.array([[-2000, 0, 5], [40, 41, 1000]], "i2")
    item = make_slice(stored, (0, 0, 0), Modality="CT")
    for name, value in (("PixelPaddingValue", padding), ("PixelPaddingRangeLimit", limit)):
        if value is not None:
            item.add_new(name, "SS", value)
    expected = np.where(np.isin(stored, hidden) | (stored < LOWEST_HU), LOWEST_HU, stored)
    np.testing.assert_array_equal(read_real(write_dicom(tmp_path / "a", item, syntax))[0], expected)


def test_padding_of_the_wrong_sign_is_taken_bit_by_bit(tmp_path):
    """63536 in a signed image is -2000 written as unsigned."""
    item = make_slice(np.array([[300, -36], [5, 6]], "i2"), (0, 0, 0), Modality="CT")
    item.add_new("PixelPaddingValue", "US", 65500)                             # -36
    np.testing.assert_array_equal(read_real(write_dicom(tmp_path / "a", item))[0], [[300, LOWEST_HU], [5, 6]])


def test_an_enhanced_file_is_read_frame_by_frame(tmp_path):
    """Each has its own position and rescale; orientation and spacing are shared; a maker's copies lie."""
    stored, slopes = RNG.integers(0, 900, (6, 5, 7)).astype("u2"), np.linspace(0.5, 3, 6)
    positions = [(1.0, 2.0, 3.0 * number) for number in (4, 0, 2, 1, 5, 3)]
    for syntax in (ExplicitVRLittleEndian, RLELossless, DeflatedExplicitVRLittleEndian):
        item = make_enhanced(stored, positions, CORONAL, slopes)
        path = write_dicom(tmp_path / "a", item, syntax)
        frames = read_frames(path, {})
        np.testing.assert_allclose([frame.position for frame in frames], positions)
        assert {frame.form.geometry for frame in frames} == {(5, 7, *CORONAL, *SPACING)}
        assert {frame.form.thickness for frame in frames} == {2.0}
        np.testing.assert_allclose(read_real(path), stored * slopes[:, None, None], rtol=1e-6)


def test_what_is_no_grey_slice_is_refused(tmp_path):
    """Each with its own reason."""
    grey, colour = np.ones((5, 7), "u2"), np.ones((5, 7, 3), "u1")
    cases = {
        "without complete pixel data": make_slice(grey, (0, 0, 0), PixelData=None),
        "colour pixels (RGB)": make_slice(colour, (0, 0, 0), Rows=5, Columns=7, SamplesPerPixel=3,
                                          PlanarConfiguration=0, PhotometricInterpretation="RGB"),
        "segmentation": make_slice(grey, (0, 0, 0), Modality="SEG"),
        "without ImagePositionPatient": make_slice(grey, (0, 0, 0), ImagePositionPatient=None),
        "without ImageOrientationPatient, PixelSpacing":
            make_slice(grey, (0, 0, 0), ImageOrientationPatient=None, PixelSpacing=None),
        "without SeriesInstanceUID": make_slice(grey, (0, 0, 0), SeriesInstanceUID=None),
        "two perpendicular directions": make_slice(grey, (0, 0, 0), [1, 0, 0, 1, 0, 0]),
        "is not two lengths": make_slice(grey, (0, 0, 0), PixelSpacing=[0, 1]),
        "RescaleSlope 0": make_slice(grey, (0, 0, 0), RescaleSlope=0, RescaleIntercept=0),
        "cut short: 70 bytes": make_slice(grey, (0, 0, 0), Rows=6),
        "2 frames that does not tell": make_slice(np.ones((2, 5, 7), "u2"), (0, 0, 0), NumberOfFrames=2),
        "PixelRepresentation 2": make_slice(grey, (0, 0, 0), PixelRepresentation=2),
        "70 bytes of pixels where 28 are due": make_slice(grey, (0, 0, 0), Rows=2),
        "3 frames, but 2 descriptions": make_enhanced(np.ones((2, 5, 7), "u2"), [(0, 0, 0), (0, 0, 1)]),
    }
    cases["3 frames, but 2 descriptions"].NumberOfFrames = 3
    for reason, item in cases.items():
        assert reason in refusal(write_dicom(tmp_path / "a.dcm", item)), reason
    (tmp_path / "text.dcm").write_text("no image " * 100)
    (tmp_path / "empty.dcm").touch()
    for name in ("text.dcm", "empty.dcm", "absent.dcm"):
        refusal(tmp_path / name)


def test_cut_and_damaged_files_are_read_or_refused_and_nothing_else(tmp_path):
    """One broken file must not end a run over thousands; a cut one is never taken for whole."""
    stored = RNG.integers(0, 900, (6, 5, 7)).astype("u2")
    positions = [(0, 0, number) for number in range(6)]
    items = {"plain": (make_slice(stored[0], (0, 0, 0), RescaleSlope=2, RescaleIntercept=1), None),
             "rle": (make_slice(stored[0], (0, 0, 0)), RLELossless),
             "enhanced": (make_enhanced(stored, positions), None),
             "deflated": (make_slice(stored[0], (0, 0, 0)), DeflatedExplicitVRLittleEndian)}
    for path in [write_dicom(tmp_path / name, *item) for name, item in items.items()]:
        data, generator = path.read_bytes(), random.Random(path.name)
        for length in (1, 131, 140, len(data) // 3, len(data) // 2, len(data) - 40, len(data) - 10):
            path.write_bytes(data[:length])
            refusal(path)
        for _ in range(60):
            broken = bytearray(data)
            broken[generator.randrange(128, len(data))] ^= 1 << generator.randrange(8)
            path.write_bytes(broken)
            try:
                assert read_real(path).ndim == 3
            except BadFile as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@pytest.mark.filterwarnings("ignore:The pixel data")
@pytest.mark.parametrize("name", sorted(path.name for path in TEST_FILES.glob("*.dcm")
                                        if path.stat().st_size < 150_000))
def test_files_of_the_wild_equal_pydicom_or_are_refused(name):
    """pydicom's own collection of odd files: what can be read must be read as pydicom reads it."""
    try:
        frames = read_frames(TEST_FILES / name, {})
        stored = np.stack(read_stored(frames))
    except BadFile as error:
        assert str(error).startswith(f"{TEST_FILES / name}: ")
        return
    expected = pydicom.dcmread(TEST_FILES / name).pixel_array
    np.testing.assert_array_equal(stored, expected.reshape(stored.shape))

"""DICOM series as volumes: order, place in the patient, spacing, and series that are refused."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless
from test_dicom import AXIAL, CORONAL, SAGITTAL, SPACING, make_enhanced, make_slice, write_dicom

from datasets.dicom_series import read_series
from datasets.intensity import mri_to_uint8
from utils.config import BadFile

BRAIN = Path(__file__).parents[2] / "shared" / "data" / "brain"
TILT = np.radians(18.0)
TILTED = [1, 0, 0, 0, np.cos(TILT), -np.sin(TILT)]
OBLIQUE = [0.6, 0.8, 0, 0, 0, -1]
RNG = np.random.default_rng(0)
STORED = RNG.integers(0, 900, (8, 5, 7)).astype("u2")


def places(orientation=AXIAL, at=range(8), direction=None):
    """Positions [n, 3] at these distances (mm) along the normal, or along another ``direction``."""
    normal = np.cross(*np.reshape(orientation, (2, 3)).astype(float))
    return np.array([-40.0, 25.0, 10.0]) + np.outer(at, normal if direction is None else direction)


def write_series(folder, stored=STORED, positions=None, orientation=AXIAL, each=None, syntax=None, **tags):
    """Slices in files of shuffled names and InstanceNumbers; each: {number of a slice: tags of its own}."""
    folder.mkdir(parents=True, exist_ok=True)
    positions = places(orientation) if positions is None else positions
    names, paths = np.random.default_rng(1).permutation(len(stored)), []
    for number, (pixels, position) in enumerate(zip(stored, positions, strict=True)):
        item = make_slice(pixels, position, orientation, InstanceNumber=len(stored) - int(names[number]),
                          **{**tags, **(each or {}).get(number, {})})
        paths.append(write_dicom(folder / f"{names[number]:03d}.dcm", item, syntax))
    return paths


def refusal(paths):
    """The message of the BadFile that reading the series raises; it begins with the folder."""
    with pytest.raises(BadFile) as error:
        read_series(paths)
    assert str(error.value).startswith(f"{paths[0].parent}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("orientation, direction", [
    (AXIAL, None), (CORONAL, None), (SAGITTAL, None), (OBLIQUE, None), (TILTED, None), (TILTED, (0, 0, 1)),
    (AXIAL, (0, 0, -1))])
def test_every_voxel_lies_where_the_standard_says(tmp_path, orientation, direction):
    """PS3.3 C.7.6.2.1-1 gives each pixel's place; the affine must give it back, whatever the files' order."""
    positions = places(orientation, np.arange(8) * 1.5, direction)
    paths = write_series(tmp_path, positions=positions, orientation=orientation, BitsStored=12, HighBit=11)
    data, affine, modality, notes = read_series(paths)
    assert data.shape == (7, 5, 8) and data.dtype == np.int16 and modality == "MR" and notes == []
    found = {tuple(np.round((affine @ [*index, 1])[:3], 3)): value for index, value in np.ndenumerate(data)}
    rows, columns = np.reshape(orientation, (2, 3))
    for number, position in enumerate(positions):
        for row in range(5):
            for column in range(7):
                left, back, head = position + rows * SPACING[1] * column + columns * SPACING[0] * row
                assert found[tuple(np.round((-left, -back, head), 3))] == STORED[number, row, column]


@pytest.mark.parametrize("syntax", [None, RLELossless])
def test_slopes_differ_from_slice_to_slice(tmp_path, syntax):
    """PET and some MR scale each slice to its own maximum; one slope for all would make stripes."""
    slopes = RNG.uniform(0.1, 3, 8).round(4)
    each = {number: {"RescaleSlope": slopes[number], "RescaleIntercept": -number} for number in range(8)}
    data, *_ = read_series(write_series(tmp_path, each=each, syntax=syntax))
    expected = [STORED[number] * slopes[number] - number for number in range(8)]
    np.testing.assert_allclose(data.T, expected, rtol=1e-5)


def test_monochrome1_is_turned_over_except_in_ct(tmp_path):
    """It tells a display to show low numbers bright.  HU are HU all the same."""
    plain, *_ = read_series(write_series(tmp_path / "a"))
    turned, *_ = read_series(write_series(tmp_path / "b", PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(turned, STORED.max() + STORED.min() - plain.astype(int))
    ct, *_ = read_series(write_series(tmp_path / "c", PhotometricInterpretation="MONOCHROME1", Modality="CT"))
    np.testing.assert_array_equal(ct, plain)
    mixed = write_series(tmp_path / "d", each={3: {"PhotometricInterpretation": "MONOCHROME1"}})
    assert "MONOCHROME1 and MONOCHROME2" in refusal(mixed)


def test_turning_over_does_not_overflow(tmp_path):
    """Smallest plus largest need not fit into the numbers' own type."""
    stored = np.full((4, 2, 2), 32767, "i2")
    stored[0, 0, 0] = 32000
    data, *_ = read_series(write_series(tmp_path, stored, places(at=range(4)),
                                        PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(data.T, 32767 + 32000 - stored.astype(int))
    stored = np.linspace(-32768, 32767, 16).astype("i2").reshape(4, 2, 2)
    for slope in (1, 3):
        data, *_ = read_series(write_series(tmp_path, stored, places(at=range(4)), RescaleSlope=slope,
                                            PhotometricInterpretation="MONOCHROME1"))
        np.testing.assert_array_equal(data.T, (-1 - stored.astype(int)) * slope)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("dtype, padding, limit", [
    ("i2", -32768, None), ("i2", 32767, None), ("u2", 65535, None), ("i2", -32768, -30000), ("u2", 0, None)])
@pytest.mark.parametrize("slope", [1, -0.5])
def test_padding_outside_ct_is_background(tmp_path, photometric, dtype, padding, limit, slope):
    """-32768 among 0..1499 left the tissue 12 of 256 grey levels, and was the brightest of all if turned."""
    measured = RNG.integers(10, 1500, (8, 25, 40))
    hidden = RNG.random(measured.shape) < 0.06
    hidden[2] = True                                 # a slice without any measurement
    ends = sorted((padding, padding if limit is None else limit))
    stored = np.where(hidden, RNG.integers(ends[0], ends[1] + 1, hidden.shape), measured).astype(dtype)
    tags = {"PixelPaddingValue": padding, "PixelPaddingRangeLimit": limit, "RescaleSlope": slope,
            "PhotometricInterpretation": photometric}
    data, *_ = read_series(write_series(tmp_path, stored, **tags))
    real = measured * slope
    low, high = real[~hidden].min(), real[~hidden].max()
    if photometric == "MONOCHROME1":
        real = low + high - real
    np.testing.assert_array_equal(data.T, np.where(hidden, low, real))
    levels = [len(np.unique(mri_to_uint8(values))) for values in (data, real[~hidden])]
    assert levels[0] > 0.95 * levels[1] > 200


def test_padding_of_a_lookup_table_is_background(tmp_path):
    """It is told by stored numbers, before the table gives them another meaning."""
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [1000, 0, 16])
    table.ModalityLUTType = "US"
    table.add_new("LUTData", "US", list(range(2000, 1000, -1)))
    stored = np.where(STORED == STORED[0, 0, 0], 950, STORED)
    data, *_ = read_series(write_series(tmp_path, stored, PixelPaddingValue=950,
                                        ModalityLUTSequence=[table]))
    measured = 2000.0 - STORED
    np.testing.assert_array_equal(data.T, np.where(stored == 950, measured[stored != 950].min(), measured))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_series_of_padding_alone_is_constant(tmp_path, photometric):
    """Nothing was measured: the check of whole images refuses it, and nothing ends in a traceback."""
    data, *_ = read_series(write_series(tmp_path, PixelPaddingValue=0, PixelPaddingRangeLimit=900,
                                        PhotometricInterpretation=photometric))
    assert len(np.unique(data)) == 1


def test_an_enhanced_file_equals_the_slices(tmp_path):
    """One file of many frames, in any order, is the same volume as many files of one frame."""
    positions = places(SAGITTAL, np.arange(8) * 3.0)
    expected = read_series(write_series(tmp_path / "a", positions=positions, orientation=SAGITTAL))
    order = RNG.permutation(8)
    item = make_enhanced(STORED[order], positions[order], SAGITTAL)
    for syntax in (None, RLELossless):
        data, affine, *_ = read_series([write_dicom(tmp_path / "b.dcm", item, syntax)])
        np.testing.assert_array_equal(data, expected[0])
        np.testing.assert_allclose(affine, expected[1], atol=1e-9)


def test_other_modalities_are_said_and_ct_is_named(tmp_path):
    """Only MR and CT are known further on."""
    assert read_series(write_series(tmp_path / "a", Modality="CT"))[2:] == ("CT", [])
    assert read_series(write_series(tmp_path / "b", Modality="PT"))[2:] == (None, ["DICOM modality PT"])


def test_uneven_slices_are_interpolated(tmp_path):
    """Against numpy's interpolation of each pixel's line: 2 mm at the base, 3 mm above, and an overlap."""
    at = np.array([0, 2, 4, 6, 6.5, 9.5, 12.5, 15.5])
    paths = write_series(tmp_path, positions=places(TILTED, at / np.cos(TILT), (0, 0, 1)), orientation=TILTED,
                         SliceThickness=3)
    data, affine, _, (note,) = read_series(paths)
    assert note == "uneven slice spacing, 0.50 to 3.00 mm, resampled to 2.00 mm"
    new = np.minimum(np.arange(9) * 2.0, 15.5)
    expected = [[np.interp(new, at, STORED[:, row, column]) for row in range(5)] for column in range(7)]
    np.testing.assert_allclose(data, expected, rtol=1e-5)
    np.testing.assert_allclose(affine[:3, 2], [0, 0, 2 / np.cos(TILT)], atol=1e-6)


def test_rounded_positions_are_even(tmp_path):
    """Two decimals of a 0.625 mm spacing are no reason to interpolate."""
    positions = places(at=np.round(np.arange(8) * 0.625, 2))
    data, affine, _, notes = read_series(write_series(tmp_path, positions=positions))
    assert notes == [] and affine[2, 2] == pytest.approx(0.625, abs=1e-3)
    np.testing.assert_array_equal(data.T, STORED)


@pytest.mark.parametrize("tags, gap, missing", [
    ({}, 2.0, True), ({}, 1.4, False), ({"SliceThickness": 2}, 2.0, False),
    ({"SpacingBetweenSlices": 2}, 2.9, False), ({"SpacingBetweenSlices": 2}, 3.1, True)])
def test_a_missing_slice_is_refused(tmp_path, tags, gap, missing):
    """Interpolating over a gap invents anatomy; thick slices may lie further apart than most."""
    at = np.array([0, 1, 2, 3, 3, 4, 5, 6]) + gap * (np.arange(8) > 3)
    paths = write_series(tmp_path, positions=places(at=at), **tags)
    if missing:
        assert f"missing slice(s): a gap of {gap:.2f} mm" in refusal(paths)
    else:
        assert "uneven" in read_series(paths)[3][0]


@pytest.mark.parametrize("thickness", [(4, 7), (0, 0)])
@pytest.mark.parametrize("lost, gap", [(5, 8), (14, 14), (None, None)])
def test_a_slice_missing_from_a_series_of_two_spacings_is_refused(tmp_path, lost, gap, thickness):
    """8 mm are a hole among slices every 4 mm, though most of the series has 7: the gaps near by tell."""
    at = np.cumsum([0, *[4] * 8, 1, *[7] * 13])
    each = {number: {"SliceThickness": thickness[number > 8]} for number in range(len(at))}
    paths = write_series(tmp_path, np.resize(STORED, (len(at), 5, 7)), places(at=at), each=each)
    if lost is None:
        assert "uneven" in read_series(paths)[3][0]
        return
    numbers = np.random.default_rng(1).permutation(len(at))
    paths.remove(tmp_path / f"{numbers[lost]:03d}.dcm")
    assert f"missing slice(s): a gap of {gap:.2f} mm, not {gap / 2:.2f}" in refusal(paths)


def test_slices_given_twice_are_dropped(tmp_path):
    """The same slice exported into two folders."""
    paths = write_series(tmp_path / "a") + write_series(tmp_path / "b")[2:5]
    data, _, _, notes = read_series(paths)
    assert notes == ["3 repeated slice(s) dropped"]
    np.testing.assert_array_equal(data.T, STORED)


@pytest.mark.parametrize("name, values", [("EchoTime", (10, 80)), ("AcquisitionNumber", (1, 2))])
def test_several_volumes_at_the_same_positions_are_refused(tmp_path, name, values):
    """Diffusion, echoes and time are volumes of their own; sorting would interleave them."""
    paths = [path for value, stored in zip(values, (STORED, STORED + 1), strict=True)
             for path in write_series(tmp_path / str(value), stored, **{name: value})]
    with pytest.raises(BadFile, match=rf"several volumes at the same positions .*\({name} differs\)"):
        read_series(paths)


def test_localizers_and_an_odd_slice_are_dropped(tmp_path):
    """Scouts share a series with their slices on some scanners."""
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    stored, positions = np.concatenate([STORED, STORED[:2]]), np.concatenate([places(), places()[:2]])
    paths = write_series(tmp_path / "a", stored, positions, each={8: scout, 9: scout})
    data, _, _, notes = read_series(paths)
    assert notes == ["2 localizer(s) dropped"]
    np.testing.assert_array_equal(data.T, STORED)
    paths = write_series(tmp_path / "b")
    paths.append(write_dicom(tmp_path / "b" / "scout", make_slice(STORED[0], (0, 0, 4), CORONAL)))
    data, _, _, notes = read_series(paths)
    assert notes == ["one slice of another size or direction dropped"]
    np.testing.assert_array_equal(data.T, STORED)
    paths[-1] = write_dicom(tmp_path / "b" / "scout", make_slice(STORED[0, :4], (0, 0, 4)))
    np.testing.assert_array_equal(read_series(paths)[0].T, STORED)


def test_what_is_no_volume_is_refused(tmp_path):
    """Each with its own reason."""
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    assert "a localizer" in refusal(write_series(tmp_path / "a", **scout))
    assert "1 slice(s), at least 4" in refusal(write_series(tmp_path / "b", STORED[:1], places()[:1]))
    assert "3 slice(s), at least 4" in refusal(write_series(tmp_path / "c", STORED[:3], places()[:3]))
    three = [write_dicom(tmp_path / f"{number}.dcm", make_slice(STORED[number], [number] * 3, axes))
             for number, axes in enumerate([AXIAL, CORONAL, SAGITTAL] * 2)]
    assert "different directions" in refusal(three)
    spacings = write_series(tmp_path / "d", each=dict.fromkeys((2, 5), {"PixelSpacing": [0.6, 0.6]}))
    assert "different pixel spacings" in refusal(spacings)
    two = write_series(tmp_path / "e", each=dict.fromkeys((6, 7), {"SeriesInstanceUID": "1.2.9"}))
    assert "2 DICOM series" in refusal(two)
    bent = places()
    bent[4, 0] += 3
    assert "straight line" in refusal(write_series(tmp_path / "f", positions=bent))


@pytest.mark.skipif(not BRAIN.is_dir(), reason="no shared data")
def test_a_tilted_head_of_two_slice_thicknesses():
    """A real CT: 13 slices every 4 mm, one that overlaps, 13 every 7 mm, a tilt of 18.5 degrees, padding."""
    paths = sorted((BRAIN / "ct_ge_head_dcm").glob("*.dcm"))
    data, affine, modality, (note,) = read_series(paths)
    assert modality == "CT" and "1.08 to 7.00 mm, resampled to 4.00 mm" in note
    first = [pydicom.dcmread(path) for path in paths[:10]]
    np.testing.assert_array_equal(data.T[:10], [np.maximum(item.pixel_array, -1024) for item in first])
    for number, item in enumerate(first):
        left, back, head = item.ImagePositionPatient
        np.testing.assert_allclose((affine @ [0, 0, number, 1])[:3], [-left, -back, head], atol=1e-2)
    assert data.min() == -1024 and data.shape[2] == 37


@pytest.mark.skipif(not BRAIN.is_dir(), reason="no shared data")
def test_a_sagittal_head_runs_from_left_to_right():
    """A real MR: every slice at its place, its pixels unchanged."""
    paths = list((BRAIN / "mr_prisma_hfs_t1sag_dcm").glob("*.dcm"))
    data, affine, modality, notes = read_series(paths)
    assert modality == "MR" and notes == [] and data.shape == (256, 256, 28)
    for path in paths[::9]:
        item = pydicom.dcmread(path)
        left, back, head = item.ImagePositionPatient
        index = np.linalg.solve(affine, [-left, -back, head, 1])[:3]
        np.testing.assert_allclose(index, [0, 0, index[2].round()], atol=1e-3)
        np.testing.assert_array_equal(data[..., int(index[2].round())].T, item.pixel_array)

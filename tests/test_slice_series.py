"""Series from NIfTI, DICOM and pictures: slices as films are hung, and masks on the source's own voxels."""

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import inv_ornt_aff
from PIL import Image
from test_dicom import AXIAL, CORONAL, SAGITTAL, TEST_FILES
from test_dicom_series import OBLIQUE, STORED, TILTED, places, write_series

from datasets.io import read_image
from datasets.slice_series import (
    AXES,
    read_series,
    slices_along,
    spacing_along,
    spacing_of,
    stored_axis,
    to_source,
    view_of,
    write_mask,
)
from utils.config import BadFile, UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
VOXELS = np.random.default_rng(0).integers(0, 2000, (5, 6, 7)).astype(np.int16)       # x, y, z
ORIENTATIONS = [np.column_stack([axes, signs]) for axes in itertools.permutations(range(3))
                for signs in itertools.product((1, -1), repeat=3)]


def write_nifti(path, voxels=VOXELS, affine=None):
    """A NIfTI of voxels [x, y, z]; the affine of 1 x 1 x 3 mm, RAS, where none is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 3, 1]) if affine is None else affine), path)
    return path


def oriented(order, turn=0.0):
    """(voxels, affine): the volume VOXELS stored in another of the 48 orders, in one place in the patient."""
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(turn, turn / 2, -turn) @ np.diag([1, 2, 3]),
                                     [-10, 20, 5])
    return nib.orientations.apply_orientation(VOXELS, order), affine @ inv_ornt_aff(order, VOXELS.shape)


def picture(path, seed=0, size=(8, 9), colour=False):
    """A grey picture of (height, width) of noise, or one with coloured writing; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    if colour:
        pixels = np.stack([pixels] * 3, -1)
        pixels[2:6, 2:7] = 255, 220, 0
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("turn", [0.0, 0.2])
def test_masks_land_on_the_sources_voxels_in_all_48_orientations(tmp_path, turn):
    """A mask drawn on slices must cover what it covered there, whatever order the source stores voxels in."""
    assert len(ORIENTATIONS) == 48
    for order in ORIENTATIONS:
        source = write_nifti(tmp_path / "a.nii", *oriented(order, turn))
        series, peer = read_series(source), nib.load(source)
        due = np.asarray(peer.dataobj) > 1000
        for axis in AXES:
            mask = to_source(series, axis, (slices_along(series, axis) > 1000).astype(np.uint8))
            np.testing.assert_array_equal(mask.T, due)
        write_mask(tmp_path / "mask.nii.gz", mask, series)
        written = nib.load(tmp_path / "mask.nii.gz")
        np.testing.assert_array_equal(np.asarray(written.dataobj), due)
        np.testing.assert_array_equal(written.affine, peer.affine)
        np.testing.assert_allclose(written.get_qform(coded=True)[0], peer.affine, atol=1e-4)
        assert written.get_data_dtype() == np.uint8


@pytest.mark.parametrize("turn", [0.0, 0.2])
def test_slices_hang_as_films_whatever_the_orientation(tmp_path, turn):
    """Against nibabel's closest canonical axes: to the left, the back, the feet, in all 48 orientations."""
    for order in ORIENTATIONS:
        path = write_nifti(tmp_path / "a.nii", *oriented(order, turn))
        series, canonical = read_series(path), nib.as_closest_canonical(nib.load(path)).get_fdata()
        left_back_feet = canonical[::-1, ::-1, ::-1]
        due = {"sagittal": [left_back_feet[i].T for i in range(5)],
               "coronal": [left_back_feet[:, j].T for j in range(6)],
               "axial": [left_back_feet[:, :, k].T for k in reversed(range(7))]}
        for axis, images in due.items():
            np.testing.assert_array_equal(slices_along(series, axis), images)
        np.testing.assert_allclose(spacing_along(series, "sagittal"), (1, 3, 2), rtol=1e-5)
        np.testing.assert_allclose(spacing_along(series, "coronal"), (2, 3, 1), rtol=1e-5)
        np.testing.assert_allclose(spacing_along(series, "axial"), (3, 2, 1), rtol=1e-5)


def test_the_affine_is_that_of_the_data(tmp_path):
    """affine @ (d, h, w) is the place of data[d, h, w]; nibabel's counts x, y, z."""
    path = write_nifti(tmp_path / "a.nii.gz", *oriented(ORIENTATIONS[13], 0.1))
    series, peer = read_series(path), nib.load(path)
    assert series.data.dtype == np.float32 and series.placed and series.notes == []
    for d, h, w in ((0, 0, 0), (1, 2, 3), (4, 3, 2)):
        assert series.data[d, h, w] == peer.dataobj[w, h, d]
        np.testing.assert_allclose(series.affine @ [d, h, w, 1], peer.affine @ [w, h, d, 1])
    np.testing.assert_allclose(spacing_of(series), np.array(peer.header.get_zooms())[::-1], rtol=1e-5)


def test_stored_slices_lie_across_the_widest_spacing_in_the_order_of_the_source(tmp_path):
    """That is how the scanner took them; of equal spacings, up to rounding, the file's own slices count."""
    for axis in range(3):
        spacing = np.where(np.arange(3) == axis, 3.0, 1.0)
        series = read_series(write_nifti(tmp_path / "a.nii", affine=np.diag([*spacing, 1])))
        assert stored_axis(series) == 2 - axis
        slices = slices_along(series, "stored")
        assert view_of(series) == AXES[axis] and len(slices) == VOXELS.shape[axis]
        for number, image in enumerate(slices):
            stored = np.flip(VOXELS.take(number, axis), (0, 1)).T               # R, A, S: both run backwards
            np.testing.assert_array_equal(image, stored)
    series = read_series(write_nifti(tmp_path / "b.nii", affine=np.diag([0.8334, 0.8333, 0.8333, 1])))
    assert stored_axis(series) == 0 and view_of(series) == "axial"
    series = read_series(write_nifti(tmp_path / "c.nii", affine=np.diag([1, 1, -3, 1])))
    np.testing.assert_array_equal(slices_along(series, "stored"), slices_along(series, "axial")[::-1])


def test_the_view_comes_from_the_affine(tmp_path):
    """An oblique slice is called after the plane it lies nearest to; pictures do not say."""
    for orientation, view in ((AXIAL, "axial"), (CORONAL, "coronal"), (SAGITTAL, "sagittal"),
                              (OBLIQUE, "sagittal"), (TILTED, "axial")):
        folder = tmp_path / str(orientation)
        write_series(folder, positions=places(orientation, np.arange(8) * 3.0), orientation=orientation)
        series = read_series(folder)
        assert view_of(series) == view and view_of(series, "coronal") == "coronal"
    assert view_of(read_series(picture(tmp_path / "a.png"))) is None


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL])
def test_dicom_and_nifti_of_one_series_look_the_same(tmp_path, orientation):
    """Converters store rows from the other end; the slices, and masks written for them, do not change."""
    write_series(tmp_path / "dicom", positions=places(orientation, np.arange(8) * 3.0),
                 orientation=orientation)
    dicom = read_series(tmp_path / "dicom")
    image = nib.Nifti1Image(dicom.data.T, dicom.affine[:, [2, 1, 0, 3]])
    nib.save(nib.as_closest_canonical(image), tmp_path / "a.nii")
    nifti = read_series(tmp_path / "a.nii")
    for axis in AXES[:3]:
        np.testing.assert_array_equal(slices_along(dicom, axis), slices_along(nifti, axis))
        np.testing.assert_allclose(spacing_along(dicom, axis), spacing_along(nifti, axis))
    np.testing.assert_array_equal(dicom.data, STORED)
    write_mask(tmp_path / "mask.nii.gz", (dicom.data > 500).astype(np.uint8), dicom)
    mask = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), STORED.T > 500)


def test_a_tilted_gantry_has_no_qform(tmp_path):
    """A quaternion holds no shear: programs that read it alone would shift the mask against the image."""
    write_series(tmp_path / "dicom", positions=places(AXIAL, np.arange(8) * 3.0, (0, 0.3, 0.95)))
    series = read_series(tmp_path / "dicom")
    write_mask(tmp_path / "mask.nii", np.ones((8, 5, 7), np.uint8), series)
    header = nib.load(tmp_path / "mask.nii").header
    assert header["qform_code"] == 0 and header["sform_code"] == 1
    np.testing.assert_allclose(header.get_sform(), series.affine[:, [2, 1, 0, 3]], atol=1e-5)


def test_masks_are_whole_and_fit(tmp_path):
    """A mask of another shape or type is a fault of the caller; no half file is left behind."""
    series = read_series(write_nifti(tmp_path / "a.nii"))
    for mask in (np.zeros((5, 6, 7), np.uint8), np.zeros((7, 6, 5), np.int64)):
        with pytest.raises(ValueError, match=r"where uint8 \(7, 6, 5\) is due"):
            write_mask(tmp_path / "mask.nii", mask, series)
    write_mask(tmp_path / "mask.nii", np.zeros((7, 6, 5), np.uint8), series)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii", "mask.nii"]


def test_dicom_series_of_one_folder_are_told_apart(tmp_path):
    """By SeriesInstanceUID; without one the user is told which there are, and none stands for all."""
    for folder, uid, factor in (("a", "1.2.3.4", 1), ("b", "1.2.3.5", 2)):
        for path in write_series(tmp_path / folder, STORED * factor, SeriesInstanceUID=uid):
            path.rename(tmp_path / f"{folder}{path.name}")
    for uid, factor in (("1.2.3.4", 1), ("1.2.3.5", 2)):
        np.testing.assert_array_equal(read_series(tmp_path, uid).data, STORED * factor)
    with pytest.raises(BadFile, match="2 DICOM series in one folder; .* 1.2.3.4, 1.2.3.5"):
        read_series(tmp_path)
    with pytest.raises(BadFile, match="holds no DICOM slice of the series 1.2.3.6"):
        read_series(tmp_path, "1.2.3.6")


def test_what_is_no_slice_in_a_dicom_folder_is_left_out_and_said(tmp_path):
    """Colour screenshots and reports of a study often lie beside its slices; text is passed over."""
    write_series(tmp_path)
    for name in ("examples_palette.dcm", "examples_rgb_color.dcm", "reportsi.dcm"):
        (tmp_path / name).write_bytes((TEST_FILES / name).read_bytes())
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("text")
    picture(tmp_path / "screen.png", colour=True)
    series = read_series(tmp_path)
    np.testing.assert_array_equal(series.data, STORED)
    assert series.notes == ["4 DICOM file(s) without a grey slice left out: empty.dcm, examples_palette.dcm, "
                            "examples_rgb_color.dcm, ..."]


def test_a_dicom_file_with_a_tag_of_another_size_is_left_out_and_said(tmp_path):
    """Of two bytes one is left: pydicom finds out when the tag is asked for, not when it is read."""
    write_series(tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    data = path.read_bytes()
    at = data.index(b"\x28\0\x10\0US")              # Rows
    (tmp_path / "other.dcm").write_bytes(data[:at + 6] + b"\1\0" + data[at + 8:at + 9] + data[at + 10:])
    series = read_series(tmp_path)
    np.testing.assert_array_equal(series.data, STORED)
    assert series.notes == ["1 DICOM file(s) without a grey slice left out: other.dcm"]


def test_mixed_orientations_in_a_dicom_series_are_refused(tmp_path):
    """A stack of slices that cross each other is no volume."""
    write_series(tmp_path, each={number: {"ImageOrientationPatient": CORONAL} for number in range(3)})
    with pytest.raises(BadFile, match="slices of different directions in one series"):
        read_series(tmp_path)


def test_pictures_of_a_folder_are_slices_in_natural_order(tmp_path):
    """slice2 comes before slice10; values stay as they are, grey saved as RGB included."""
    paths = [picture(tmp_path / f"slice{number}.png", number) for number in range(12)]
    Image.open(paths[5]).convert("RGB").save(paths[5])
    (tmp_path / ".thumb.png").write_bytes(b"hidden")
    (tmp_path / "notes.txt").write_text("text")
    series = read_series(tmp_path)
    np.testing.assert_array_equal(series.data, np.stack([read_image(path) for path in paths]))
    assert series.notes == [] and not series.placed and spacing_of(series).tolist() == [1, 1, 1]
    np.testing.assert_array_equal(slices_along(series, "stored"), series.data)
    with pytest.raises(UserError, match='pictures do not tell what is axial; cut them along "stored"'):
        slices_along(series, "axial")
    write_mask(tmp_path / "mask.nii", np.ones(series.data.shape, np.uint8), series)
    assert nib.load(tmp_path / "mask.nii").shape == series.data.shape[::-1]


def test_colour_screenshots_among_pictures_are_left_out_and_said(tmp_path):
    """A window of a viewer is no slice; neither is a single picture of another size."""
    for number in range(5):
        picture(tmp_path / f"{number}.png", number)
    picture(tmp_path / "3a.png", colour=True)
    picture(tmp_path / "9.png", size=(20, 9))
    series = read_series(tmp_path)
    assert series.data.shape == (5, 8, 9)
    assert series.notes == ["1 colour picture(s) among the slices left out: 3a.png",
                            "1 picture(s) of another size left out: 9.png"]
    picture(tmp_path / "8.png", size=(8, 8))
    with pytest.raises(BadFile, match=r"slices of different sizes in one series \(5 of 8 x 9, 2 of others\)"):
        read_series(tmp_path)


def test_one_picture_is_one_slice(tmp_path):
    """Colour becomes luminance, as Pillow says, and a note tells."""
    for colour, notes in ((False, []), (True, ["colour, taken as luminance"])):
        path = picture(tmp_path / "a.jpg", colour=colour)
        series = read_series(path)
        np.testing.assert_array_equal(series.data[0], np.asarray(Image.open(path).convert("L")))
        assert series.notes == notes


@pytest.mark.parametrize("count", [1, 3])
def test_series_under_four_slices_are_refused(tmp_path, count):
    """They give no vote and no volume: NIfTI, DICOM and pictures alike, with pixels and without."""
    write_nifti(tmp_path / "a.nii.gz", VOXELS.reshape(7, 30, 1).repeat(count, 2), np.diag([1, 1, 9, 1]))
    write_series(tmp_path / "dicom", STORED[:count], places()[:count])
    for number in range(count):
        picture(tmp_path / "pictures" / f"{number}.png")
    for name, pixels in itertools.product(("a.nii.gz", "dicom", "pictures"), (True, False)):
        with pytest.raises(BadFile, match=f"{name}: {count} slice.s., at least 4 make a"):
            read_series(tmp_path / name, pixels=pixels)


def test_headers_tell_the_shape_without_pixels(tmp_path):
    """So that large folders are searched quickly; shape, place and notes are those of the whole series."""
    write_nifti(tmp_path / "a.nii.gz", *oriented(ORIENTATIONS[7], 0.1))
    write_series(tmp_path / "dicom")
    for number in range(5):
        picture(tmp_path / "pictures" / f"{number}.png", colour=number == 2)
    (tmp_path / "b.png").write_bytes((tmp_path / "pictures" / "0.png").read_bytes())
    for name in ("a.nii.gz", "dicom", "pictures", "b.png"):
        whole, bare = read_series(tmp_path / name), read_series(tmp_path / name, pixels=False)
        assert bare.data.shape == whole.data.shape and bare.notes == whole.notes
        assert bare.placed == whole.placed
        np.testing.assert_array_equal(bare.affine, whole.affine)
        if name != "dicom":
            assert not bare.data.any() and bare.data.strides == (0, 0, 0)


def test_a_nifti_without_orientation_is_said_to_be(tmp_path):
    """Left and right are then a guess, also where headers alone are read."""
    image = nib.Nifti1Image(VOXELS, None)
    nib.save(image, tmp_path / "a.nii")
    for pixels in (True, False):
        notes = read_series(tmp_path / "a.nii", pixels=pixels).notes
        assert notes == ["no orientation in the header, taken as LAS"]


def test_unusable_sources_are_refused_in_one_line(tmp_path):
    """The message begins with the path and says what is wrong."""
    write_nifti(tmp_path / "labels.nii.gz", (VOXELS > 1000).astype(np.uint8))
    write_nifti(tmp_path / "two.nii.gz", np.stack([VOXELS] * 2, -1))
    write_nifti(tmp_path / "flat.nii.gz", VOXELS[..., 0])
    cut = write_nifti(tmp_path / "cut.nii.gz")
    cut.write_bytes(cut.read_bytes()[:-30])
    (tmp_path / "cut.png").write_bytes(picture(tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "colour" / "a.png", colour=True)
    for name, reason in (("labels.nii.gz", "a label map"), ("two.nii.gz", "4D NIfTI of 2 volumes"),
                         ("flat.nii.gz", "2D image"), ("cut.nii.gz", "damaged NIfTI"),
                         ("cut.png", "cannot be read|damaged"), ("notes.txt", "neither NIfTI, DICOM nor"),
                         ("empty", "neither DICOM nor grey pictures in this folder"),
                         ("colour", "1 colour picture.s. among the slices left out: a.png"),
                         ("nowhere", "no such file or folder")):
        with pytest.raises(BadFile, match=reason) as error:
            read_series(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(error.value)
    with pytest.raises(UserError, match='axis "sideways": must be one of sagittal, coronal, axial, stored'):
        slices_along(read_series(tmp_path / "a.png"), "sideways")


@pytest.mark.skipif(not (SHARED / "spine").is_dir(), reason="no real data beside the repository")
def test_real_series_hang_upright():
    """The cord of a sagittal slice runs down the rows, and lies before the muscles of the neck."""
    for name, view in (("t2/t2", "sagittal"), ("t2s/t2s", "axial"), ("mt/mt0", "axial")):
        series = read_series(SHARED / "spine" / "errsm30" / f"{name}.nii.gz")
        assert view_of(series) == view and series.notes == []
    folder = SHARED / "spine" / "fake_lesion"
    series, cord = read_series(folder / "t2_fake_lesion.nii.gz"), folder / "t2_fake_lesion_sc_seg.nii.gz"
    series.data = np.asarray(nib.load(cord).dataobj).T
    mask = slices_along(series, "sagittal").any(0)
    rows, columns = mask.any(1).sum(), mask.any(0).sum()
    assert rows > 2 * columns
    head = read_series(SHARED / "brain" / "mr_prisma_hfs_t1sag_dcm")
    slices = slices_along(head, "sagittal")
    assert view_of(head) == "sagittal" and slices.shape == (28, 256, 256)
    middle = slices[14]
    assert middle[:40].mean() < 0.2 * middle[100:180].mean()         # above the head is air

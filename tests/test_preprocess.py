"""From a scan to the common grid: axes, spline, crop, and where every voxel lies in mm."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from datasets.intensity import ct_to_uint8, mri_background, mri_to_uint8
from datasets.preprocess import check_image, preprocess, reorient, slice_axis, spline_weights, to_grid
from datasets.volumes import Volume
from utils.config import BadFile

SETTINGS = {"spacing": [4.0, 1.0], "percentiles": [0.5, 99.5], "mri_background": 10.0,
            "ct_background": -500.0}
SHAPE, SPACING = (36, 40, 12), (1.0, 1.0, 4.0)
RNG = np.random.default_rng(0)
CODES = ["RPI", "LAS", "RAS", "PSR", "AIL", "SRP"]


def volume_of(data, spacing=SPACING, codes="RPI", turn=None):
    """A Volume whose array runs right, posterior, inferior, stored in another order and turned by 3x3."""
    rpi = np.diag([*(np.array([1, -1, -1]) * spacing), 1.0])
    rpi[:3, 3] = [-15.0, 21.0, 30.0]
    if turn is not None:
        rpi[:3, :3] = turn @ rpi[:3, :3]
    data, affine = reorient(np.asarray(data), rpi, codes)
    assert "".join(nib.aff2axcodes(affine)) == codes
    return Volume(data, affine, None, [])


def rotation(degrees):
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])


@pytest.mark.parametrize("shape, spacing, axis", [
    ((256, 240, 176), (1.0, 1.0, 1.0), 2),
    ((256, 256, 30), (1.0, 1.005, 1.0), 2),                       # equal to 1 %
    ((176, 256, 240), (1.2, 1.0, 1.0), 0),
    ((200, 30, 180), (1.0, 5.0, 1.1), 1),
    ((256, 256, 180), (1.2, 1.2, 0.9), 2),                        # the unique size, though not the largest
    ((28, 256, 256), (1.0, 0.9, 0.9), 0),
    ((64, 64, 64), (1.0, 3.0, 1.0), 1),
])
def test_the_slice_axis_follows_spacings_then_sizes(shape, spacing, axis):
    """Every word of the rule once."""
    assert slice_axis(shape, spacing) == axis


@pytest.mark.parametrize("codes", CODES)
def test_reorienting_moves_voxels_and_never_places(codes):
    """Each voxel keeps its mm; only its index changes."""
    data = RNG.integers(0, 9999, (3, 4, 5))
    volume = volume_of(data, (1.0, 2.0, 3.0), codes, rotation(10))
    back, affine = reorient(volume.data, volume.affine)
    assert np.array_equal(back, data)
    index = np.array([1, 3, 2, 1])
    stored = np.linalg.inv(volume.affine) @ affine @ index
    assert volume.data[tuple(np.rint(stored[:3]).astype(int))] == data[1, 3, 2]


@pytest.mark.parametrize("size, step, first, count", [(20, 1.6, 0, 12), (20, 0.45, 3, 40), (9, 1.0, 2, 5)])
def test_the_weights_are_those_of_the_interpolating_cubic_spline(size, step, first, count):
    """scipy.ndimage voxel by voxel, ends included."""
    line = RNG.standard_normal(size)
    expected = ndimage.map_coordinates(line, [(first + np.arange(count)) * step], order=3, mode="nearest")
    np.testing.assert_allclose(spline_weights(size, step, first, count).numpy() @ line, expected, atol=1e-5)


@pytest.mark.parametrize("shape, spacing, view", [
    ((50, 40, 7), (0.7, 0.9, 5.0), "axial"), ((50, 6, 41), (0.8, 5.5, 0.8), "coronal"),
    ((5, 33, 37), (6.0, 1.3, 1.1), "sagittal"),
])
def test_the_grid_is_what_a_spline_says_at_its_own_places_in_mm(shape, spacing, view):
    """Axes, step, crop and affine at once: sampling the scan at the grid's mm gives the grid's values."""
    data = ndimage.gaussian_filter(RNG.standard_normal(shape), 1.0).astype(np.float32)
    for codes in ("RPI", "PSR"):
        volume = volume_of(data, spacing, codes, rotation(7))
        grid = to_grid("x", volume, (4.0, 1.0))
        assert grid.view == view and grid.spacing == (4.0, 1.0, 1.0) and grid.data.dtype == np.float32
        assert all(n % token == 0 for n, token in zip(grid.data.shape, (4, 16, 16), strict=True))
        np.testing.assert_allclose(np.linalg.norm(grid.affine[:3, :3], axis=0), [4, 1, 1])
        index = np.indices(grid.data.shape).reshape(3, -1)
        places = np.linalg.inv(volume.affine) @ grid.affine @ np.vstack([index, np.ones(index.shape[1])])
        expected = ndimage.map_coordinates(volume.data, places[:3], order=3, mode="nearest")
        expected = expected.clip(data.min(), data.max())
        np.testing.assert_allclose(grid.data.ravel(), expected, atol=1e-4)


def test_the_new_size_is_cut_about_the_centre_to_whole_tokens():
    """int(size * spacing / target), then multiples of 4 and 16; spacings are stored with rounding errors."""
    data = np.arange(35 * 50 * 6, dtype=np.float32).reshape(35, 50, 6)
    grid = to_grid("x", volume_of(data, (1.0, 1.0, 4.0)), (4.0, 1.0))
    assert np.array_equal(grid.data, data.transpose(2, 1, 0)[1:5, 1:49, 1:33])
    grid = to_grid("x", volume_of(np.ones((32, 48, 4)), (0.9999999, 0.9999999, 3.9999998)), (4.0, 1.0))
    assert grid.data.shape == (4, 48, 32)


@pytest.mark.parametrize("view, spacing", [("axial", (1.0, 1.0, 4.0)), ("coronal", (1.0, 4.0, 1.0)),
                                           ("sagittal", (4.0, 1.0, 1.0))])
@pytest.mark.parametrize("codes", CODES[:4])
def test_slices_stand_upright(view, spacing, codes):
    """The front of a head is up in axial slices, its top in the others; sagittal ones look to the left."""
    shape = [round(64 / mm) for mm in spacing]
    right, back, down = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    rows, columns = {"axial": (back, right), "coronal": (down, right), "sagittal": (down, back)}[view]
    for ramp, axis in ((rows, 1), (columns, 2)):
        grid = to_grid("x", volume_of(ramp, spacing, codes), (4.0, 1.0))
        assert grid.view == view
        assert (np.diff(grid.data, axis=axis).mean((0, 1, 2)) > 0.01)
        others = tuple(k for k in range(3) if k != axis)
        assert np.ptp(grid.data, axis=others).max() < 1e-4


@pytest.mark.parametrize("codes, turn", list(itertools.product(CODES, [0, 12])))
def test_a_bright_point_stays_at_its_mm(codes, turn):
    """Attention maps go back to the scan through this affine."""
    data = np.zeros((40, 50, 12), np.float32)
    point = (17, 29, 6)
    data[point] = 100
    data = ndimage.gaussian_filter(data, (2, 2, 1.0))
    volume = volume_of(data, (0.9, 0.8, 4.6), codes, rotation(turn))
    reference = volume_of(data, (0.9, 0.8, 4.6), "RPI", rotation(turn)).affine @ [*point, 1]
    grid = to_grid("x", volume, (4.0, 1.0))
    where = grid.affine @ [*ndimage.center_of_mass(grid.data), 1]
    np.testing.assert_allclose(where[:3], reference[:3], atol=0.15)


def test_padding_does_not_ring_and_the_range_stays():
    """Beside a padding of -3000 HU a spline would swing air up to soft tissue."""
    data = np.full((40, 40, 6), -1000, np.int16)
    data[:20] = -3000
    volume = volume_of(data, (1.3, 1.3, 4.0))
    assert to_grid("x", volume, (4.0, 1.0)).data.max() <= -1000
    grid = to_grid("x", volume, (4.0, 1.0), lowest=-1024)
    assert grid.data.min() == -1024 and grid.data.max() <= -1000
    assert volume.data.min() == -3000                              # the volume itself is left alone
    floats = volume_of(data.transpose(2, 1, 0).astype(np.float32), (4.0, 1.0, 1.0))
    to_grid("x", floats, (4.0, 1.0), lowest=-1024)
    assert floats.data.min() == -3000


@pytest.mark.parametrize("shape", [(36, 36, 3), (15, 36, 8), (36, 15, 8)])
def test_less_than_a_token_is_too_small(shape):
    """D < 4, H < 16 or W < 16."""
    with pytest.raises(BadFile, match="^a/x.nii: too small"):
        to_grid("a/x.nii", volume_of(np.ones(shape)), (4.0, 1.0))


def test_label_maps_and_constants_are_no_images():
    """A segmentation beside its scan must not be learned from; few values that are no whole numbers may."""
    labels = RNG.integers(0, 5, (30, 30, 30))
    for data in (labels, labels.astype(np.float32), RNG.integers(0, 32, (8, 8, 8))):
        with pytest.raises(BadFile, match=r"^x: a label map \((5|32) values\), not an image"):
            check_image("x", data)
    with pytest.raises(BadFile, match="^x: constant"):
        check_image("x", np.full((8, 8, 8), 3.5))
    regions = np.arange(1, 65).reshape(4, 4, 4).repeat(8, 0).repeat(8, 1).repeat(8, 2)      # as FreeSurfer's
    with pytest.raises(BadFile, match=r"a label map \(64 values\)"):
        check_image("x", regions)
    smooth = np.indices((40, 40, 40)).sum(0)                         # of an image, even a smooth one
    check_image("x", smooth)
    check_image("x", labels * 0.5)
    check_image("x", RNG.integers(0, 33, (30, 30, 30)))
    hidden = np.zeros((80, 80, 80), np.int16)
    hidden[40, 40, :70] = np.arange(70)                # a sample of voxels sees few of them
    check_image("x", hidden)


def test_an_mri_gives_one_image_and_its_darkest_tenth():
    """Ties belong to it: all of an air of zeros, which resampling leaves at zero but for the edge."""
    data = ndimage.gaussian_filter(RNG.standard_normal(SHAPE), 1.5) * 1000
    data[2:20, 4:20] += 4000
    grid, images, background = preprocess("x", volume_of(data), "mri", SETTINGS)
    assert list(images) == ["mri"] and background.dtype == bool
    assert np.array_equal(images["mri"], mri_to_uint8(grid.data))
    assert np.array_equal(background, mri_background(grid.data))
    stripped = np.zeros((90, 60, 12))
    stripped[50:90, 20:60] = RNG.uniform(50, 100, (40, 40, 12))
    _, _, background = preprocess("x", volume_of(stripped, (1.3, 1.3, 4.3)), "mri", SETTINGS)
    assert background[:, :, :40].all() and background.mean() < 0.8


def test_a_ct_gives_three_windows_and_its_air():
    """Also below the lowest HU."""
    data = ndimage.gaussian_filter(RNG.standard_normal(SHAPE), 2) * 1500
    data[:6], data[-18:] = -2000, 40
    grid, images, background = preprocess("x", volume_of(data), "ct", SETTINGS)
    assert list(images) == ["brain", "blood", "bone"] and grid.data.min() == -1024
    for window, image in images.items():
        assert np.array_equal(image, ct_to_uint8(grid.data, window))
    assert np.array_equal(background, grid.data <= -500) and background.any()


def test_a_ct_not_in_hu_is_refused_unless_its_window_is_named():
    """A window of HU cut out of other units is a wrong picture; one cut by the sender is right as it is."""
    data = RNG.integers(0, 3795, SHAPE).astype(np.float32)
    data[:3], data[-18:] = 0, np.maximum(data[-18:], 100)
    data.flat[-1] = 3794
    for path in ("study/scct.nii.gz", "study/brainy.nii", "carbone/x.nii"):
        with pytest.raises(BadFile, match=r"^.*: not in Hounsfield units \(0 to 3794\)"):
            preprocess(path, volume_of(data), "ct", SETTINGS)
    for path, window in (("s/bone.nii.gz", "bone"), ("brain_ct/a_BloodWindow.nii", "blood"),
                         ("s/headBrainWindow/1.dcm", "brain")):
        grid, images, background = preprocess(path, volume_of(data), "ct", SETTINGS)
        assert list(images) == [window]
        assert np.abs(images[window] - grid.data * 255 / 3794).max() <= 0.51
        assert np.array_equal(background, images[window] == 0)
    data[:-18] -= 1000
    assert list(preprocess("s/bone.nii.gz", volume_of(data), "ct", SETTINGS)[1]) == ["brain", "blood", "bone"]


def test_a_volume_without_contrast_is_refused():
    """A single voxel that is not zero lies outside the percentiles: nothing would be left to see."""
    data = np.zeros(SHAPE)
    data[3, 3, :3] = [0.5, 1.5, 2.5]
    with pytest.raises(BadFile, match="^x: no contrast"):
        preprocess("x", volume_of(data), "mri", SETTINGS)


def test_a_volume_without_a_token_of_foreground_is_refused():
    """A token with any background voxel is background; training would find nothing in this one."""
    with pytest.raises(BadFile, match="^x: background in every token of 4x16x16 voxels"):
        preprocess("x", volume_of(RNG.uniform(0, 100, SHAPE)), "mri", SETTINGS)


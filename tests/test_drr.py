"""CT volumes, findings in three dimensions, and their projections."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from datasets.drr import (
    difference_target,
    draw_angles,
    lung_mask_ct,
    make_ct_pair,
    project,
    read_ct,
    rotate,
    write_ct_pairs,
)
from datasets.io import read_image
from datasets.phantom import LABELS, thorax_ct
from utils.config import BadFile, UserError

SPACING = 5.0
KINDS = ("consolidation", "nodule", "effusion", "pneumothorax", "cardiomegaly")
SETTINGS = {
    "probabilities": dict.fromkeys(KINDS, 0.0), "both_probability": 0.0,
    "consolidation_clusters": [[25, 70, 0.02, 0.09], [1, 3, 0.08, 0.25]],
    "consolidation_hu": [[150, -30], [520, -400]], "nodule_radius_mm": [10.0, 16.0],
    "effusion_height": [0.1, 0.4], "pneumothorax_rim_mm": [25.0, 45.0],
    "cardiomegaly_growth_mm": [15.0, 30.0],
    "max_angle": 17.5, "max_angle_sum": 37.5, "angle_power": 1.75, "margin_mm": 25.0,
    "devices": 1.0, "exposure": 0.3, "local_contrast": 0.5, "noise": 0.02, "blur": 0.5}


@pytest.fixture(scope="module")
def patient():
    """(hu, labels, lungs) of a coarse phantom."""
    hu, labels = thorax_ct(np.random.default_rng(1), (72, 44, 77), (SPACING,) * 3)
    return hu, labels, lung_mask_ct(hu, SPACING)


def pair_of(patient, seed, size=96, **changes):
    hu, _, lungs = patient
    return make_ct_pair(hu, SPACING, np.random.default_rng(seed), size, {**SETTINGS, **changes}, lungs)


def test_lung_mask_agrees_with_the_labels_and_tells_the_sides(patient):
    """Dice above 0.9 for each lung, with trachea, stomach gas and the air around the patient left out."""
    _, labels, lungs = patient
    for side, name in ((1, "right_lung"), (2, "left_lung")):
        found, true = lungs == side, labels == LABELS[name]
        assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.9
    trachea = (labels == LABELS["airway"]) & (np.arange(len(labels)) < 15)[:, None, None]
    assert (lungs[trachea] > 0).mean() < 0.1


def test_a_volume_without_two_lungs_is_refused():
    """A head or an abdomen must not be taken for a chest."""
    with pytest.raises(UserError, match="two lungs"):
        lung_mask_ct(np.full((40, 40, 40), 30.0), SPACING)


def test_projection_is_the_plain_ray_sum(patient):
    """Against loops over rays, without cropping and at the volume's own size; head up, right on the left."""
    hu = patient[0][:20, :10, :20].astype(np.float32) - 100                # with values below -1000
    expected = np.zeros((20, 20))
    for row in range(20):
        for column in range(20):
            expected[row, column] = sum(max(value, -1000) + 1000 for value in hu[row, :, column])
    np.testing.assert_allclose(project(hu, 20, (0, 0, 20)), expected, rtol=1e-5)


def test_a_quarter_turn_is_a_quarter_turn():
    """Rotation about each axis by 90 degrees against np.rot90 in its plane."""
    volume = np.random.default_rng(0).random((9, 9, 9)).astype(np.float32)
    for axis, plane in enumerate(((1, 2), (2, 0), (0, 1))):
        angles = [0.0, 0.0, 0.0]
        angles[axis] = 90.0
        np.testing.assert_allclose(rotate(volume, angles), np.rot90(volume, 1, plane), atol=1e-4)


def test_angles_keep_their_limits_and_prefer_small_ones():
    """|angle| <= 17.5, their sum <= 37.5, and u^1.75 has its median at 0.5^1.75 of the limit."""
    rng = np.random.default_rng(0)
    angles = np.array([draw_angles(rng, 17.5, 37.5, 1.75) for _ in range(2000)])
    assert np.abs(angles).max() <= 17.5 and np.abs(angles).sum(1).max() <= 37.5
    assert np.median(np.abs(angles)) == pytest.approx(17.5 * 0.5 ** 1.75, rel=0.12)
    assert abs((angles > 0).mean() - 0.5) < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_an_unchanged_pair_has_a_zero_target_whatever_pose_and_devices(patient, seed):
    """Pose, tubes and exposure are no findings; nor is one that is there both times."""
    pair = pair_of(patient, seed, both_probability=1.0, probabilities=dict.fromkeys(KINDS, 0.6))
    assert not pair["diff"].any()
    assert np.abs(pair["prior"] - pair["current"]).mean() > 0.01
    assert all(pair["params"]["devices"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_finding_has_its_sign_and_an_old_one_the_opposite(patient, kind):
    """Fluid and tissue are bright, so new ones are positive; air in the pleura is dark, so negative."""
    for seed in range(3):
        pair = pair_of(patient, seed, probabilities={kind: 1.0})
        finding, = pair["params"]["findings"]
        sign = (1 if finding["time"] == "current" else -1) * (-1 if kind == "pneumothorax" else 1)
        total = np.abs(pair["diff"]).sum()
        assert total > 0
        assert (sign * pair["diff"]).clip(min=0).sum() > 0.9 * total


def test_a_pair_is_what_the_contract_says_and_repeats(patient):
    """float32, [0, 1] and [-1, 1], and the same pair from the same seed."""
    first, again = (pair_of(patient, 5, 64, probabilities=dict.fromkeys(KINDS, 0.5)) for _ in range(2))
    for name in ("prior", "current", "diff"):
        assert first[name].dtype == np.float32 and first[name].shape == (64, 64)
        assert np.array_equal(first[name], again[name])
    assert first["prior"].min() >= 0 and first["prior"].max() <= 1 and np.abs(first["diff"]).max() <= 1


def test_target_is_zero_where_normalisation_alone_made_a_difference():
    """A bright spot rescales the whole image; only the spot, and only inside the lungs, is a change."""
    registered = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    registered[20:30, 20:30] = 0.4
    current = registered.copy()
    current[20:30, 20:30] += 2
    lungs = np.zeros((64, 64), bool)
    lungs[:25] = True
    diff = difference_target(current, registered, lungs)
    assert (diff[20:25, 20:30] > 0).all()
    diff[20:25, 20:30] = 0
    assert not diff.any()


def test_nifti_is_read_in_any_orientation(patient, tmp_path):
    """The same volume stored to the left-back-head or to the right-front-head reads the same."""
    hu = patient[0].astype(np.float32)
    for name, flips in (("a.nii.gz", (1, 1, 1)), ("b.nii.gz", (-1, 1, -1))):
        array = hu.T[::flips[0], ::flips[1], ::flips[2]]          # to the left, back and feet
        affine = np.diag([*(-SPACING * flip for flip in flips), 1])
        nib.save(nib.Nifti1Image(array, affine), tmp_path / name)
        np.testing.assert_allclose(read_ct(tmp_path / name, SPACING), hu, atol=1e-2)


def write_series(folder, hu, modality="CT"):
    """An axial DICOM series of ``hu`` in shuffled file order; slices SPACING mm apart."""
    folder.mkdir()
    series = generate_uid()
    for number in range(len(hu)):
        item = pydicom.Dataset()
        item.file_meta = pydicom.dataset.FileMetaDataset()
        item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        item.SOPClassUID, item.SOPInstanceUID, item.SeriesInstanceUID = CTImageStorage, generate_uid(), series
        item.Modality, item.PhotometricInterpretation, item.SamplesPerPixel = modality, "MONOCHROME2", 1
        item.Rows, item.Columns = hu.shape[1:]
        item.BitsAllocated = item.BitsStored = 16
        item.HighBit, item.PixelRepresentation = 15, 0
        item.RescaleSlope, item.RescaleIntercept = 1, -1024
        item.PixelSpacing, item.ImageOrientationPatient = [SPACING, SPACING], [1, 0, 0, 0, 1, 0]
        item.ImagePositionPatient = [0, 0, -SPACING * number]
        item.PixelData = (hu[number] + 1024).astype(np.uint16).tobytes()
        item.save_as(folder / f"{(number * 7) % len(hu):03d}.dcm", enforce_file_format=True)


def test_a_dicom_series_is_sorted_by_position_and_rescaled(patient, tmp_path):
    """File names say nothing about the order of slices; stored values are not HU."""
    hu = patient[0][10:50, ::2, ::2]
    write_series(tmp_path / "ct", hu)
    np.testing.assert_allclose(read_ct(tmp_path / "ct", SPACING), hu, atol=1e-2)


def test_what_is_not_a_ct_in_hounsfield_units_is_refused(patient, tmp_path):
    """Wrong units or another modality would give a plausible but wrong X-ray; a damaged file a traceback."""
    hu = patient[0][:16, :20, :20]
    nib.save(nib.Nifti1Image(hu.astype(np.float32) + 1000, np.eye(4)), tmp_path / "units.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "units.nii.gz").read_bytes()[:2000])
    nib.save(nib.Nifti1Image(hu[0].astype(np.float32), np.eye(4)), tmp_path / "flat.nii.gz")
    write_series(tmp_path / "mr", hu, modality="MR")
    (tmp_path / "empty").mkdir()
    for name in ("units.nii.gz", "cut.nii.gz", "flat.nii.gz", "mr", "empty", "missing.nii.gz"):
        with pytest.raises(BadFile, match=name):
            read_ct(tmp_path / name, SPACING)


def test_resampling_keeps_the_size_in_millimetres(patient, tmp_path):
    """Anisotropic slices end isotropic, with lungs of the same volume."""
    hu, _, lungs = patient
    nib.save(nib.Nifti1Image(hu.T[::-1, ::-1, ::-1].astype(np.float32),
                             np.diag([SPACING, SPACING, 0.6 * SPACING, 1])), tmp_path / "a.nii.gz")
    volume = read_ct(tmp_path / "a.nii.gz", SPACING)
    assert volume.shape[1:] == hu.shape[1:] and abs(volume.shape[0] - 0.6 * hu.shape[0]) <= 1
    assert (lung_mask_ct(volume, SPACING) > 0).sum() == pytest.approx(0.6 * (lungs > 0).sum(), rel=0.08)


def test_pairs_are_written_per_volume_and_kept_on_a_second_run(patient, tmp_path):
    """One case folder per pair; a bad volume is listed; what is there is not made again."""
    affine = np.diag([SPACING, SPACING, SPACING, 1])
    nib.save(nib.Nifti1Image(patient[0].T[::-1, ::-1, ::-1], affine), tmp_path / "chest.nii.gz")
    nib.save(nib.Nifti1Image(np.full((20, 20, 20), -900, np.int16), np.eye(4)), tmp_path / "air.nii.gz")
    sources = [("p1", tmp_path / "chest.nii.gz"), ("p2", tmp_path / "air.nii.gz")]
    settings = {**SETTINGS, "spacing_mm": SPACING, "probabilities": dict.fromkeys(KINDS, 0.5)}
    count = write_ct_pairs(sources, tmp_path / "pairs", 2, 64, 0, 0, settings)
    assert count == {"made": 2, "kept": 0, "bad": 1}
    assert write_ct_pairs(sources, tmp_path / "pairs", 2, 64, 0, 0, settings)["kept"] == 2
    cases = sorted((tmp_path / "pairs").glob("p1_*"))
    assert len(cases) == 2
    assert read_image(cases[0] / "diff_map.nii.gz").shape == (64, 64)
    assert "angles_deg" in (cases[0] / "params.json").read_text()

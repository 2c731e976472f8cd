"""The procedural thorax: anatomy in the right places, repeatable, different between patients."""

import numpy as np
import pytest

from datasets.phantom import LABELS, splat, thorax_ct, tube

SHAPE, SPACING = (60, 36, 64), (6.0, 6.0, 6.0)


@pytest.fixture(scope="module")
def patients():
    return [thorax_ct(np.random.default_rng(seed), SHAPE, SPACING) for seed in range(4)]


def middle(labels, name):
    """Mean (z, y, x) index of one organ."""
    return np.argwhere(labels == LABELS[name]).mean(0)


def test_the_same_seed_gives_the_same_patient_and_another_seed_another(patients):
    """Demo data must be the same on every machine, and a patient must not be a copy of the next."""
    hu, labels = thorax_ct(np.random.default_rng(0), SHAPE, SPACING)
    assert np.array_equal(hu, patients[0][0]) and np.array_equal(labels, patients[0][1])
    assert (labels != patients[1][1]).mean() > 0.02


def test_organs_lie_where_they_do_in_a_patient(patients):
    """Head first, front first, the patient's right first; findings and projections rely on it."""
    for _, labels in patients:
        heart, spine = middle(labels, "heart"), middle(labels, "spine")
        right, left = middle(labels, "right_lung"), middle(labels, "left_lung")
        assert right[2] < spine[2] < left[2]
        assert spine[2] < heart[2] and heart[1] < spine[1]             # to the left of and before the spine
        assert middle(labels, "clavicles")[0] < heart[0]
        assert set(np.unique(labels)) == set(LABELS.values())


def test_tissues_have_their_hounsfield_units(patients):
    """Thresholds in HU (lung mask, bone) must work as on a real CT."""
    for hu, labels in patients:
        assert hu.dtype == np.int16 and labels.dtype == np.uint8 and hu.min() >= -1000
        assert -900 < np.median(hu[labels == LABELS["right_lung"]]) < -700
        assert 0 < np.median(hu[labels == LABELS["heart"]]) < 90
        assert np.median(hu[labels == LABELS["ribs"]]) > 200
        assert np.median(hu[labels == LABELS["outside"]]) < -950


def test_lung_volume_is_that_of_an_adult(patients):
    """2 to 7 litres in deep inspiration, the right lung not much smaller than the left."""
    for _, labels in patients:
        voxels = [(labels == LABELS[side]).sum() for side in ("right_lung", "left_lung")]
        right, left = np.array(voxels) * np.prod(SPACING) / 1e6
        assert 2 < right + left < 7 and right > 0.85 * left


def test_resolution_changes_the_grid_and_not_the_anatomy():
    """Organ volumes in mm^3 agree between voxel sizes."""
    volumes = []
    for factor in (1, 2):
        shape, spacing = [n * factor for n in SHAPE], [step / factor for step in SPACING]
        _, labels = thorax_ct(np.random.default_rng(3), shape, spacing)
        counts = [(labels == LABELS[name]).sum() for name in ("right_lung", "heart")]
        volumes.append(np.array(counts) * np.prod(spacing))
    np.testing.assert_allclose(volumes[0], volumes[1], rtol=0.06)


def test_splat_keeps_mass_and_its_centre():
    """Trilinear shares sum to one and balance at the point, so thin vessels absorb what they should."""
    volume = np.zeros(4 * 5 * 6, np.float32)
    splat(volume, (4, 5, 6), np.array([[1.25, 2.5, 3.75]]), np.array([2.0]))
    volume = volume.reshape(4, 5, 6)
    assert volume.sum() == pytest.approx(2.0)
    centre = [(volume * grid).sum() / 2 for grid in np.indices(volume.shape)]
    assert centre == pytest.approx([1.25, 2.5, 3.75])


def test_distance_to_a_tube_is_that_to_a_capsule():
    """Against the formula at points beside, beyond and inside a straight piece of constant radius."""
    z, y, x = np.array([0.0, 0.0, 0.0]), np.array([3.0, 0.0, 0.0]), np.array([5.0, 14.0, 5.0])
    distance = tube(z, y, x, [(0, 0, 0), (0, 0, 10)], [1, 1])
    np.testing.assert_allclose(distance, [2, 3, -1], atol=1e-6)

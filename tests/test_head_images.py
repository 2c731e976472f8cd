"""CT and MRI of heads: Hounsfield units, contrasts, noise."""

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from datasets.head_images import SEQUENCES, compose, ct, mri
from datasets.head_phantom import LABELS, Head, draw_head, make_head

SHAPE, SPACING = (36, 60, 52), (5.0, 4.0, 4.0)


@pytest.fixture(scope="module")
def head():
    axes = ((np.arange(n) - (n - 1) / 2) * step for n, step in zip(SHAPE, SPACING, strict=True))
    points = np.meshgrid(*axes, indexing="ij", sparse=True)
    patient = draw_head(np.random.default_rng(0))
    return make_head({**patient, "table": 112.0, "turn": np.zeros(3), "shift": np.zeros(3)}, points, 4.0)


def medians(head, image):
    """{organ: median inside}, away from its border where it is thick enough."""
    found = {}
    for name, label in LABELS.items():
        inside = head.labels == label
        core = binary_erosion(inside)
        found[name] = np.median(image[core if core.sum() > 30 else inside])
    return found


def test_tissues_have_their_hounsfield_units(head):
    """Windows and thresholds in HU must work as on a real CT."""
    hu = ct(head, np.random.default_rng(0))
    assert hu.dtype == np.int16 and hu.min() >= -1024 and hu.max() < 2500
    found = medians(head, hu)
    assert found["outside"] < -950 and found["air"] < -500
    assert 500 < found["skull"] and np.percentile(hu[head.labels == LABELS["skull"]], 90) < 1500
    assert -5 < found["ventricles"] < 15 and 25 < found["white"] < 32
    assert 34 < found["deep_grey"] < 40 and found["white"] < found["grey"] + 3
    fat = hu[(head.labels == LABELS["soft_tissue"])]
    assert np.percentile(fat, 15) < -50 and np.percentile(fat, 85) > 20


def test_the_table_lies_behind_the_head_on_ct_and_is_not_seen_on_mri(head):
    """It is what a mask of the background has to deal with."""
    behind = ct(head, np.random.default_rng(0))[:, -5:, 20:32]
    assert (behind > -700).any()
    signal = mri(head, "t1", np.random.default_rng(0), noise=0.0)
    assert signal[:, -3:, 20:32].max() < 0.1 * np.percentile(signal, 99)


def test_tissue_contrast_is_that_of_the_sequence(head):
    """T1: fluid < grey < white; T2: white < grey < fluid; FLAIR: fluid < white < deep grey."""
    t1, t2, flair = (medians(head, mri(head, sequence, np.random.default_rng(1), noise=0.0))
                     for sequence in SEQUENCES)
    assert t1["ventricles"] < t1["deep_grey"] < t1["white"] and t1["grey"] < t1["white"]
    assert t2["white"] < t2["grey"] < t2["ventricles"] and t2["white"] < t2["deep_grey"]
    assert flair["ventricles"] < flair["white"] < flair["deep_grey"]
    assert t2["eyes"] > t2["grey"] and t1["eyes"] < t1["grey"]


def test_air_has_rayleigh_noise(head):
    """The magnitude of two normal channels: mean sigma sqrt(pi / 2), deviation sigma sqrt(2 - pi / 2)."""
    nothing = Head((20, 40, 40))
    signal = mri(nothing, "t2", np.random.default_rng(2), noise=1.0)       # far above the signal of air
    assert signal.dtype == np.float32 and signal.min() >= 0
    assert signal.mean() / signal.std() == pytest.approx((np.pi / (4 - np.pi)) ** 0.5, rel=0.02)


def test_each_scan_has_its_own_gain_and_shading_and_the_generator_alone_decides(head):
    """A network must not read the sequence off absolute values; demo data must be repeatable."""
    scans = [mri(head, "t1", np.random.default_rng(seed), noise=0.0) for seed in (3, 3, 4)]
    assert np.array_equal(scans[0], scans[1])
    ratio = (scans[2] / scans[0])[head.labels == LABELS["white"]]
    assert abs(np.log(np.median(ratio))) > 0.05 and ratio.std() / ratio.mean() > 0.02
    assert np.array_equal(ct(head, np.random.default_rng(3)), ct(head, np.random.default_rng(3)))


def test_noise_of_a_ct_has_the_asked_deviation(head):
    """Noise of real scans is 3 to 6 HU in the brain."""
    clean = ct(head, np.random.default_rng(5), noise=0.0).astype(float)
    for noise in (2.0, 6.0):
        difference = ct(head, np.random.default_rng(5), noise=noise) - clean
        assert difference[head.labels == LABELS["white"]].std() == pytest.approx(noise, rel=0.1)


def test_layers_are_blended_one_over_another():
    """Against a loop over voxels."""
    rng, head = np.random.default_rng(6), Head((2, 3, 4))
    for tissue in ("csf", "grey", "csf"):
        head.paint(tissue, rng.random((2, 3, 4)).astype(np.float32))
    values = {"air": 1.0, "csf": 5.0, "grey": -2.0}
    image = compose(head, values)
    for index in np.ndindex(2, 3, 4):
        expected = values["air"]
        for tissue, occupancy in head.layers:
            expected = (1 - occupancy[index]) * expected + occupancy[index] * values[tissue]
        assert image[index] == pytest.approx(expected, abs=1e-5)

"""The procedural head: anatomy in the right places, repeatable, different between patients."""

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, binary_fill_holes

from datasets.head_phantom import LABELS, draw_head, make_head

SHAPE, SPACING = (36, 60, 52), (5.0, 4.0, 4.0)
BRAIN = ("grey", "white", "deep_grey", "ventricles", "cerebellum", "brainstem")


def points(shape=SHAPE, spacing=SPACING):
    """z, y, x of an axial grid around the middle of the head, mm."""
    return np.meshgrid(*((np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)),
                       indexing="ij", sparse=True)


def patient(seed, **changes):
    return {**draw_head(np.random.default_rng(seed)), **changes}


@pytest.fixture(scope="module")
def heads():
    return [make_head(patient(seed), points(), 4.0) for seed in range(3)]


def inside(head, *names):
    """bool [D, H, W] of one or several organs."""
    return np.isin(head.labels, [LABELS[name] for name in names])


def middle(head, name):
    """Mean (z, y, x) index of one organ."""
    return np.argwhere(inside(head, name)).mean(0)


def test_the_same_seed_gives_the_same_head_and_another_seed_another(heads):
    """Demo data must be the same on every machine, and a patient must not be a copy of the next."""
    again = make_head(patient(0), points(), 4.0)
    assert np.array_equal(again.labels, heads[0].labels)
    assert all(a[0] == b[0] and np.array_equal(a[1], b[1])
               for a, b in zip(again.layers, heads[0].layers, strict=True))
    assert (heads[0].labels != heads[1].labels).mean() > 0.05
    assert heads[0].masks == {}


def test_every_structure_is_there_and_lies_where_it_does_in_a_patient(heads):
    """z runs to the crown and y to the back, as DICOM's coordinates do; series in any view rely on it."""
    for head in heads:
        assert set(np.unique(head.labels)) == set(LABELS.values())
        z, y, x = middle(head, "white")
        assert middle(head, "eyes")[1] < y and middle(head, "air")[0] < z and middle(head, "eyes")[0] < z
        assert middle(head, "cerebellum")[1] > y and middle(head, "cerebellum")[0] < z
        assert middle(head, "brainstem")[0] < middle(head, "deep_grey")[0] < z + 2
        assert abs(middle(head, "ventricles")[2] - x) < 2


def test_ventricles_lie_in_the_brain_and_the_brain_in_the_skull(heads):
    """Slice by slice above the base: whatever is brain is ringed by fluid and bone."""
    for head in heads:
        for level in range(SHAPE[0] // 2 + 1, SHAPE[0]):
            brain, skull = inside(head, *BRAIN)[level], inside(head, "skull")[level]
            if not brain.any():
                continue
            assert not (brain & ~binary_fill_holes(skull)).any()
            assert not (binary_dilation(brain) & inside(head, "soft_tissue", "outside")[level]).any()
            ventricles = inside(head, "ventricles")[level]
            tissue = inside(head, "grey", "white", "deep_grey", "brainstem")[level]
            assert not (ventricles & ~binary_fill_holes(tissue | ventricles)).any()
            assert not (binary_dilation(ventricles) & skull).any()


def test_the_cortex_covers_the_white_matter(heads):
    """White matter hardly ever touches the fluid around the brain."""
    for head in heads:
        rim = binary_dilation(inside(head, "csf")) & inside(head, "grey", "white")
        assert inside(head, "grey")[rim].mean() > 0.8


def test_volumes_are_those_of_an_adult(heads):
    """Brain about 1.0 to 1.7 litres, ventricles 10 to 100 ml, more cortex than white matter."""
    for head in heads:
        litres = {name: inside(head, name).sum() * np.prod(SPACING) / 1e6 for name in BRAIN}
        assert 0.9 < sum(litres.values()) < 1.8
        assert 0.01 < litres["ventricles"] < 0.1
        assert 0.8 < litres["grey"] / litres["white"] < 2.2


def test_resolution_changes_the_grid_and_not_the_anatomy():
    """Volumes in mm^3 agree between voxel sizes."""
    volumes = []
    for factor in (1, 2):
        shape, spacing = [n * factor for n in (30, 40, 40)], [step / factor for step in (5, 5, 5)]
        head = make_head(patient(3), points(shape, spacing), spacing[0])
        volumes.append([inside(head, name).sum() * np.prod(spacing) for name in ("skull", "cerebellum")])
    np.testing.assert_allclose(volumes[0], volumes[1], rtol=0.08)


def test_two_series_of_one_head_show_the_same_anatomy():
    """Axial and sagittal slices, where they cross, hold the same tissues."""
    z, y, x = points((24, 40, 40), (5, 5, 5))
    axial = make_head(patient(4), (z, y, x), 4.0)
    turned = z.transpose(1, 0, 2), y.transpose(0, 2, 1), x.transpose(2, 0, 1)          # [x, z, y]
    sagittal = make_head(patient(4), turned, 4.0)
    assert sagittal.labels.shape == (40, 24, 40)
    assert np.array_equal(sagittal.labels.transpose(1, 2, 0), axial.labels)


def test_pose_moves_the_head_and_atrophy_and_ventricles_change_it():
    """Each measure has the effect that its name promises."""
    still = {"turn": np.zeros(3), "shift": np.zeros(3)}
    head = make_head(patient(5, **still), points(), 4.0)
    moved = make_head(patient(5, **{**still, "shift": np.array([10.0, 8.0, -12.0])}), points(), 4.0)
    assert np.array_equal(moved.labels[2:, 2:, :-3], head.labels[:-2, :-2, 3:])
    turned = make_head(patient(5, **{**still, "turn": np.array([20.0, 0, 0])}), points(), 4.0)
    eyes = np.argwhere(inside(turned, "eyes")).mean(0) - np.argwhere(inside(head, "eyes")).mean(0)
    assert abs(eyes[2]) > 3 and abs(eyes[0]) < 1                           # about z: to one side
    wide = make_head(patient(5, **still, ventricles=np.array([2.0, 2.0])), points(), 4.0)
    assert inside(wide, "ventricles").sum() > 1.3 * inside(head, "ventricles").sum()
    shrunk = make_head(patient(5, **still, gap=6.0, sulci=2.0), points(), 4.0)
    assert inside(shrunk, "csf").sum() > 1.3 * inside(head, "csf").sum()

"""Findings and devices: sign, place, growth, and what an X-ray allows."""

import numpy as np
import pytest
from scipy import ndimage
from test_lungs import draw_chest

from datasets.devices import DEVICES, draw_devices
from datasets.findings import FINDINGS, absorb, add_ball, extent

OPACITIES = [kind for kind in FINDINGS if kind != "pneumothorax"]


@pytest.fixture(scope="module")
def chest():
    return draw_chest()


def change_of(kind, chest, seed, **options):
    image, lungs = chest
    return FINDINGS[kind](image, lungs, np.random.default_rng(seed), **options)


@pytest.mark.parametrize("kind", FINDINGS)
def test_a_finding_stays_in_or_at_the_lungs(kind, chest):
    """Beyond a soft border of a few pixels the rest of the body does not change; nothing is NaN."""
    near = ndimage.binary_dilation(chest[1].any(0), iterations=16)
    for seed in range(8):
        change = change_of(kind, chest, seed)
        assert change.dtype == np.float32 and change.shape == chest[0].shape and np.isfinite(change).all()
        assert np.abs(change[~near]).max() < 0.015
        assert np.abs(change).max() > 0.03


@pytest.mark.parametrize("kind", OPACITIES)
def test_opacities_only_brighten(kind, chest):
    """Added tissue cannot let more rays through."""
    assert min(change_of(kind, chest, seed).min() for seed in range(5)) >= 0


def test_a_pneumothorax_darkens_the_side_it_is_on(chest):
    """Air replaces lung: the sum is negative, in one lung only."""
    for seed in range(5):
        change = change_of("pneumothorax", chest, seed)
        sides = [np.minimum(change, 0)[lung].sum() for lung in chest[1]]
        assert min(sides) < -20 * abs(max(sides)) and change[change < -0.05].size > 50


@pytest.mark.parametrize("kind", FINDINGS)
def test_larger_and_denser_is_more_of_the_same_finding(kind, chest):
    """A grown finding is made with the same seed, so it must lie in the same place with more effect."""
    for seed in range(4):
        small = change_of(kind, chest, seed, size=0.7, strength=0.6)
        large = change_of(kind, chest, seed, size=1.2, strength=1.3)
        assert np.abs(large).sum() > 1.2 * np.abs(small).sum()
        strong = np.abs(small) > 0.7 * np.abs(small).max()
        assert np.abs(large)[strong].mean() > 0.02
        assert np.array_equal(large, change_of(kind, chest, seed, size=1.2, strength=1.3))


def test_attenuation_saturates_where_it_is_bright_already(chest):
    """Two layers in a row give what one of twice the thickness gives, and bright tissue hardly moves."""
    image, lungs = chest
    once = absorb(image, lungs, np.full_like(image, 0.4))
    body = image[~lungs.any(0) & (image > 0.05)]
    tissue = np.quantile(body[::7], 0.75)
    again = once + np.maximum(tissue - image - once, 0) * -np.expm1(-0.4)
    np.testing.assert_allclose(again, absorb(image, lungs, np.full_like(image, 0.8)), atol=1e-6)
    assert (once[image >= tissue] == 0).all() and once[lungs.any(0)].mean() > 0.05


@pytest.mark.parametrize("row, column", [(20, 20), (0, 0), (39.6, 3), (-30, 20), (20, 100)])
def test_a_ball_projects_to_its_chords_wherever_it_lies(row, column):
    """Against the formula on the whole picture; a ball beyond the border leaves it alone."""
    drawn = np.zeros((40, 50), np.float32)
    add_ball(drawn, row, column, 6.5, 2.0)
    rows, columns = np.mgrid[:40, :50]
    chord = 2.0 * np.sqrt(np.maximum(1 - ((rows - row) ** 2 + (columns - column) ** 2) / 6.5 ** 2, 0))
    np.testing.assert_allclose(drawn, chord, atol=1e-5)


@pytest.mark.parametrize("kind", DEVICES)
def test_devices_are_thin_bright_and_inside_the_picture(kind, chest):
    """A device covers little of the image, and its brightness is a share."""
    lungs = chest[1]
    for seed in range(5):
        drawn = DEVICES[kind](lungs.shape[1:], extent(lungs.any(0)), np.random.default_rng(seed))
        assert drawn.shape == lungs.shape[1:] and drawn.min() >= 0 and drawn.max() <= 1
        assert (drawn > 0.1).mean() < 0.12


def test_devices_depend_on_the_generator_alone(chest):
    """The same seed must draw the same tube into both images."""
    first, names = draw_devices(chest[1], np.random.default_rng(3))
    second, same = draw_devices(chest[1], np.random.default_rng(3))
    assert names == same and np.array_equal(first, second)
    assert not np.array_equal(first, draw_devices(chest[1], np.random.default_rng(4))[0])

"""Augmentation of a pair: what moves together, what leaves the target alone, where the randomness is from."""

import math

import pytest
import torch

from datasets.augment import XrayAugment

SETTINGS = {"flip": 1.0, "rotation": 10.0, "shift": 0.1, "scale": 0.2,
            "clahe": 1.0, "sharpness": 1.0, "exposure": 0.3, "noise": 0.05}
PHOTOMETRIC = ("clahe", "sharpness", "exposure", "noise")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blob(row, column, size=64):
    """[1, size, size] with a gaussian spot of 4 pixels at (row, column)."""
    r, c = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.exp(-((r - row) ** 2 + (c - column) ** 2) / 32.0)[None]


def centroid(image):
    """(row, column) of the centre of mass of [1, S, S]."""
    r, c = torch.meshgrid(*map(torch.arange, image.shape[-2:]), indexing="ij")
    return torch.stack([(image[0] * r).sum(), (image[0] * c).sum()]) / image.sum()


@pytest.fixture
def pair():
    """Two different textured images from 0 to 1, and their difference."""
    prior, current = torch.rand(2, 1, 64, 64, generator=seeded(9)) * 0.5 + 0.5 * blob(20, 40)
    return prior, current, current - prior


def test_everything_off_changes_nothing(pair):
    """Bitwise, so that a part's constant at 0 is the same as no such part."""
    for before, after in zip(pair, XrayAugment()(*pair, seeded()), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("part", SETTINGS)
def test_each_part_does_something_of_its_own(pair, part):
    """No setting is dead, and switching one part on leaves the draws of the others as they were."""
    alone = XrayAugment(**{part: SETTINGS[part]})(*pair, seeded())
    assert not torch.equal(alone[0], pair[0]) and not torch.equal(alone[1], pair[1])
    without = XrayAugment(**{**SETTINGS, part: 0.0})(*pair, seeded())
    with_all = XrayAugment(**SETTINGS)(*pair, seeded())
    assert not torch.equal(without[1], with_all[1])
    assert torch.equal(without[2], with_all[2]) == (part in PHOTOMETRIC)


@pytest.mark.parametrize("part", PHOTOMETRIC)
def test_photometric_parts_leave_the_target_alone(pair, part):
    """How an image was exposed is no finding."""
    augmented = XrayAugment(**{part: SETTINGS[part]})(*pair, seeded())
    assert torch.equal(augmented[2], pair[2])
    for image in augmented[:2]:
        assert image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize("seed", range(6))
def test_pose_moves_images_and_target_alike(seed):
    """A finding and its target must stay one above the other: three equal spots stay equal, and do move."""
    spot = blob(24, 36)
    augment = XrayAugment(flip=0.5, rotation=10, shift=0.1, scale=0.2)
    prior, current, diff = augment(spot, spot, spot, seeded(seed))
    assert torch.equal(prior, current) and torch.equal(current, diff)
    assert (centroid(diff) - centroid(spot)).norm() > 0.5


@pytest.mark.parametrize("seed", range(6))
def test_settings_are_the_largest_change_in_their_units(seed):
    """Degrees, fractions of the side, fractions of the size; measured on spots far from the border."""
    middle, right = blob(31.5, 31.5), blob(31.5, 45.5)

    def positions(**settings):
        augment = XrayAugment(**settings)
        return [centroid(image) for image in augment(middle, right, right, seeded(seed))[:2]]

    centre, other = positions(rotation=20)
    angle = math.degrees(math.atan2(*(other - centre)))
    assert 0.1 < abs(angle) <= 20.1 and (other - centre).norm() == pytest.approx(14, abs=0.1)
    centre, other = positions(shift=0.1)
    assert (centre - 31.5).abs().max() <= 6.5 and other - centre == pytest.approx([0, 14], abs=0.1)
    centre, other = positions(scale=0.25)
    assert 14 / 1.26 <= (other - centre).norm() <= 14 * 1.26
    assert centre == pytest.approx([31.5, 31.5], abs=0.1)


def test_flip_mirrors_left_and_right(pair):
    """Rows stay where they are; applied always at probability 1, about half the time at 0.5."""
    for before, after in zip(pair, XrayAugment(flip=1.0)(*pair, seeded()), strict=True):
        assert torch.equal(after, before.flip(-1))
    augment = XrayAugment(flip=0.5)
    flipped = sum(not torch.equal(augment(*pair, seeded(seed))[0], pair[0]) for seed in range(100))
    assert 30 < flipped < 70


def test_the_images_of_a_pair_are_exposed_differently():
    """Two visits never share their exposure: equal images come out different, the target says no change."""
    image, zero = blob(30, 30), torch.zeros(1, 64, 64)
    for part in ("exposure", "noise"):
        prior, current, diff = XrayAugment(**{part: SETTINGS[part]})(image, image, zero, seeded())
        assert not torch.equal(prior, current) and not diff.any()


def test_clahe_differs_between_the_images_half_the_time():
    """Two visits are often, not always, processed alike; at 256 px the clip limit acts."""
    image = torch.rand(1, 256, 256, generator=seeded(1)) * blob(128, 128, 256)
    differs = 0
    for seed in range(24):
        prior, current, _ = XrayAugment(clahe=1.0)(image, image, image, seeded(seed))
        differs += not torch.equal(prior, current)
    assert 0 < differs < 24


def test_draws_come_from_the_given_generator_alone(pair):
    """The global generator is neither read nor moved."""
    augment = XrayAugment(**SETTINGS)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = augment(*pair, seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = augment(*pair, seeded(5)), augment(*pair, seeded(6))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_the_inputs_are_not_overwritten(pair):
    """A caller may keep them, for a picture of before and after."""
    before = [image.clone() for image in pair]
    XrayAugment(**SETTINGS)(*pair, seeded())
    assert all(torch.equal(a, b) for a, b in zip(before, pair, strict=True))


def test_constant_images_stay_finite():
    """Blank exposures exist; equalising one must not divide by zero."""
    zero = torch.zeros(1, 64, 64)
    for seed in range(4):
        for image in XrayAugment(**SETTINGS)(zero, zero, zero, seeded(seed)):
            assert torch.isfinite(image).all()

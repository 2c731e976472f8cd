"""Grey values: to 8 bits, background, normalisation and its augmentation."""

import math

import numpy as np
import pytest
import torch

from datasets.intensity import (
    CT_WINDOWS,
    MEANS,
    MODES,
    STDS,
    augment_intensity,
    ct_background,
    ct_to_uint8,
    mri_background,
    mri_to_uint8,
    normalise,
)

NOTHING = {"gamma": 0.0, "brightness": 0.0, "contrast": 0.0, "noise": 0.0}


@pytest.fixture
def volume():
    return torch.randint(0, 256, (4, 16, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def augment(volume, mode="mri", seed=0, **amounts):
    return augment_intensity(volume, mode, torch.Generator().manual_seed(seed), **{**NOTHING, **amounts})


def grey(normalised, mode="mri"):
    """Back to [0, 1]."""
    return normalised * STDS[mode] + MEANS[mode]


def test_an_mri_spans_its_percentiles():
    """A few glowing voxels, as of a vessel, must not take the whole range."""
    values = np.random.default_rng(0).normal(1000, 100, 4000).astype(np.float32).reshape(10, 20, 20)
    values[0, 0, 0] = 1e6
    low, high = np.percentile(values, [0.5, 99.5])
    expected = [round(255 * min(max((value - low) / (high - low), 0), 1)) for value in values.flat]
    image = mri_to_uint8(values)
    assert image.dtype == np.uint8 and image.min() == 0 and image.max() == 255
    assert np.abs(image.ravel().astype(int) - expected).max() <= 1               # rounding of halves
    assert (image.ravel() == expected).mean() > 0.999
    assert not mri_to_uint8(np.full((2, 2, 2), 7.0)).any()


@pytest.mark.parametrize("window, black, white",
                         [("brain", 0, 80), ("blood", -20, 180), ("bone", -800, 2000)])
def test_a_ct_window_is_linear_between_its_ends(window, black, white):
    """width and level as a radiologist says them; brain, for one, shows 0 to 80 HU."""
    hu = np.array([-3000, black, black + (white - black) / 5, white, 3000])
    assert ct_to_uint8(hu, window).tolist() == [0, 0, 51, 255, 255]
    assert CT_WINDOWS[window] == (white - black, (white + black) / 2)


def test_background_is_the_darkest_tenth_of_an_mri_and_the_air_of_a_ct():
    """True = background; ties belong to it, so all of an air of zeros does."""
    values = np.random.default_rng(0).permutation(1000).reshape(10, 10, 10)
    assert mri_background(values).sum() == 100 and (mri_background(values) == (values < 100)).all()
    assert (mri_background(np.maximum(values - 500, 0)) == (values <= 500)).all()
    assert ct_background(np.array([-1024, -500, -499, 0])).tolist() == [True, True, False, False]


@pytest.mark.parametrize("mode", MODES)
def test_normalising_is_that_of_the_mode(volume, mode):
    """uint8 and float in [0, 255] alike; never divided twice."""
    expected = [(value / 255 - MEANS[mode]) / STDS[mode] for value in volume.flatten().tolist()]
    for tensor in (volume, volume.float(), volume.double()):
        normalised = normalise(tensor, mode)
        assert normalised.dtype == torch.float32
        torch.testing.assert_close(normalised.flatten(), torch.tensor(expected))


def test_amounts_of_zero_change_nothing_at_all(volume):
    """An augmentation that is switched off must not even round."""
    for mode in MODES:
        assert torch.equal(augment(volume, mode), normalise(volume, mode))


@pytest.mark.parametrize("name", NOTHING)
def test_each_amount_changes_the_picture_and_comes_from_the_generator(volume, name):
    """No option does nothing, and equal seeds give equal volumes."""
    one, same, other = (augment(volume, seed=seed, **{name: 0.3}) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(one, normalise(volume, "mri"))
    assert one.dtype == torch.float32 and one.shape == volume.shape


def test_gamma_is_a_power_within_its_bounds(volume):
    """Black and white stay; the powers of many draws fill exp(-gamma) to exp(gamma)."""
    powers = []
    for seed in range(200):
        image = grey(augment(volume, seed=seed, gamma=0.3))
        assert image[volume == 0].abs().max() < 1e-6 and (image[volume == 255] - 1).abs().max() < 1e-6
        middle = volume == 100
        powers.append(math.log(image[middle][0]) / math.log(100 / 255))
    assert math.exp(-0.3) - 1e-4 <= min(powers) < 0.8 and 1.25 < max(powers) <= math.exp(0.3) + 1e-4
    assert np.mean(np.log(powers)) == pytest.approx(0, abs=0.05)


def test_brightness_adds_and_contrast_stretches_about_the_mean(volume):
    """Within [0, 1], where the result is clipped."""
    middle = 100 + volume % 50                                    # so that nothing is clipped
    before = middle.float() / 255
    shifts, factors = [], []
    for seed in range(200):
        shift = grey(augment(middle, seed=seed, brightness=0.2)) - before
        factor = (grey(augment(middle, seed=seed, contrast=0.2)) - before.mean()) / (before - before.mean())
        assert shift.std() < 1e-6 and factor.std() < 1e-4
        shifts.append(shift.mean().item())
        factors.append(factor.mean().item() - 1)
    for drawn in (shifts, factors):
        assert -0.2001 < min(drawn) < -0.18 and 0.18 < max(drawn) < 0.2001
        assert np.mean(drawn) == pytest.approx(0, abs=0.025)
    image = grey(augment(volume, seed=1, brightness=2.0))
    assert -1e-6 < image.min() and image.max() < 1 + 1e-6


def test_noise_is_added_to_normalised_values_and_not_clipped(volume):
    """Its deviation is uniform in [0, noise]."""
    still = normalise(volume, "bone")
    noises = [augment(volume, "bone", seed=seed, noise=0.5) - still for seed in range(200)]
    deviations = [noise.std().item() for noise in noises]
    assert 0 < min(deviations) < 0.03 and 0.47 < max(deviations) < 0.53
    assert np.mean(deviations) == pytest.approx(0.25, abs=0.04)
    assert abs(torch.stack(noises).mean()) < 0.005
    assert augment(torch.zeros_like(volume), "bone", noise=0.5).min() < normalise(torch.zeros(1), "bone")

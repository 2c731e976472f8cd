"""Views of a pair that are moved back, and their spread."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from utils.tta import mirror_mean, predict_tta


@pytest.fixture
def pair():
    """Two batches [2, 1, 64, 64] of smooth images in [0, 1]."""
    noise = np.random.default_rng(0).standard_normal((2, 2, 1, 64, 64))
    noise = ndimage.gaussian_filter(noise, (0, 0, 0, 5, 5))
    return torch.from_numpy((noise - noise.min()) / np.ptp(noise)).float()


def subtract(prior, current):
    """A network that commutes with every movement of the frame."""
    return current - prior


def test_one_view_is_the_plain_prediction_without_spread(pair):
    mean, deviation = predict_tta(subtract, *pair, n=1)
    torch.testing.assert_close(mean, subtract(*pair), atol=0, rtol=0)
    assert not deviation.any()


def test_two_views_average_the_image_and_its_mirror(pair):
    """The second view is the left-right flip, undone on the map."""
    ramp = torch.linspace(0, 1, 64)
    mean, deviation = predict_tta(lambda prior, current: (current - prior) * ramp, *pair, n=2)
    torch.testing.assert_close(mean, subtract(*pair) / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, (subtract(*pair) * (2 * ramp - 1) / 2).abs(), atol=1e-5, rtol=0)


def test_every_movement_is_undone_on_the_map(pair, monkeypatch):
    """With equal exposure the views of a network that commutes with movements agree, up to interpolation."""
    monkeypatch.setattr("utils.tta.MAX_LOG_GAMMA", 0.0)
    mean, deviation = predict_tta(subtract, *pair, n=9)
    torch.testing.assert_close(mean, subtract(*pair), atol=0.02, rtol=0)
    assert deviation.max() < 0.03 and deviation.mean() < 0.005


def test_a_pixel_counts_only_in_the_views_that_saw_it(pair):
    """A constant map has no spread at the rim either, and an image's edge is not smeared into the mean."""
    mean, deviation = predict_tta(lambda prior, current: torch.full_like(prior, 0.3), *pair, n=8)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.3))
    assert deviation.max() < 1e-6


def test_exposure_shows_in_the_spread_and_images_stay_in_range(pair):
    """What the map owes to exposure alone is uncertainty; the network never sees values outside [0, 1]."""
    seen = []

    def model(prior, current):
        seen.extend([prior, current])
        return current - prior

    _, deviation = predict_tta(model, pair[0], pair[0], n=4)
    assert deviation.mean() > 0.005
    assert min(image.min() for image in seen) >= 0 and max(image.max() for image in seen) <= 1


def test_the_same_call_gives_the_same_maps(pair):
    """Views depend on their number alone, so a batch of one pair gives what it gives among others."""
    first, alone = predict_tta(subtract, *pair, n=5), predict_tta(subtract, *pair[:, :1], n=5)
    for many, one in zip(first, alone, strict=True):
        torch.testing.assert_close(many[:1], one)
    assert torch.equal(predict_tta(subtract, *pair, n=5)[0], first[0])


def test_no_view_is_refused(pair):
    with pytest.raises(ValueError, match="at least 1"):
        predict_tta(subtract, *pair, n=0)


@pytest.mark.parametrize("depth", [1, 3])
def test_mirror_images_are_averaged_where_they_belong(depth):
    """A map that grows along an axis is level in the mean; the embedding is that of the image itself."""
    seen = []

    def predict(images):
        seen.append(images)
        ramp = sum(torch.arange(n).view([n if a == axis else 1 for a in range(5)]) for axis, n in
                   enumerate(images.shape) if axis > 1)
        return images + ramp, images

    images = torch.randn(2, 1, depth, 4, 5)
    mean, embedding = mirror_mean(predict, images)
    assert len(seen) == (8 if depth > 1 else 4) and embedding is images
    torch.testing.assert_close(mean, images + (depth - 1 + 3 + 4) / 2)

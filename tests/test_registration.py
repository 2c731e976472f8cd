"""Alignment of two images, and the subtraction baseline."""

import math

import numpy as np
import pytest
import torch
from kornia.geometry.transform import warp_affine
from scipy import ndimage
from skimage.filters import gaussian

from utils.registration import align, best_baseline, register, registered_difference


def texture(height=160, width=160, seed=0):
    """A textured image [H, W] in [0, 1] with coarse and fine structure that fades out at the rim."""
    noise = np.random.default_rng(seed).standard_normal((height, width))
    image = sum(sigma * ndimage.gaussian_filter(noise, sigma) for sigma in (1.5, 4, 10))
    return torch.from_numpy((image - image.min()) / np.ptp(image)).float()


def transform(angle, scale, x, y, height=160, width=160, shear=0.0):
    """[3, 3] pixel matrix: rotation (degrees), scale and shear about the centre, then a shift in pixels."""
    a, centre = math.radians(angle), np.array([(width - 1) / 2, (height - 1) / 2])
    rotation = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    linear = scale * rotation @ [[1, shear], [0, 1]]
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, centre - linear @ centre + [x, y]
    return torch.from_numpy(matrix)


def warp(image, matrix):
    """image [H, W] moved by the pixel matrix, by kornia."""
    return warp_affine(image[None, None], matrix[None, :2].float(), image.shape, padding_mode="border")[0, 0]


def mean_error(found, true, height=160, width=160):
    """Mean distance in pixels between where the two matrices send the pixels of the image."""
    y, x = np.mgrid[:height, :width]
    points = torch.from_numpy(np.stack([x.ravel(), y.ravel(), np.ones(x.size)]).astype(np.float64))
    return ((found @ points)[:2] - (true @ points)[:2]).norm(dim=0).mean().item()


@pytest.mark.parametrize("pose", [(4, 1.05, 6, -5), (-8, 0.9, -10, 12), (0, 1.2, 20, 0), (0, 1, 0.5, 0.25)])
@pytest.mark.parametrize("gamma", [1.0, 0.6, 1.7])
def test_a_known_pose_is_found_again_under_another_exposure(pose, gamma):
    """The true answer is known here; exposure differs between visits and must not move the result."""
    moving, true = texture(), transform(*pose)
    result = register(moving, 0.2 + 0.6 * warp(moving, true) ** gamma)
    assert result.aligned
    assert mean_error(result.matrix, true) < 1.5


def test_an_image_that_is_not_square_turns_without_shear():
    """Normalised coordinates have other units in x than in y."""
    moving, true = texture(120, 200), transform(6, 0.95, -8, 5, 120, 200)
    result = register(moving, warp(moving, true))
    assert mean_error(result.matrix, true, 120, 200) < 1.5
    linear = result.matrix[:2, :2]
    torch.testing.assert_close(linear @ linear.T, linear.det() * torch.eye(2).double(), atol=1e-6, rtol=0)


def test_affine_finds_a_shear_that_similarity_cannot():
    """The word must change what is estimated."""
    moving, true = texture(), transform(3, 1.05, 5, -4, shear=0.1)
    fixed = warp(moving, true)
    similarity = mean_error(register(moving, fixed).matrix, true)
    affine = mean_error(register(moving, fixed, "affine").matrix, true)
    assert affine < 1.0 < similarity


def test_the_matrix_is_the_warp_that_was_applied():
    """Users move landmarks and masks by the matrix: kornia's warp by it gives the warped image."""
    moving = texture()
    result = register(moving, warp(moving, transform(5, 1.1, 7, 3)))
    torch.testing.assert_close(result.warped, warp(moving, result.matrix), atol=2e-3, rtol=0)


def test_the_result_is_never_worse_than_the_identity():
    """Where nothing better is found the image comes back untouched, and the result says so."""
    image = texture()
    for moving, fixed in [(image, torch.zeros_like(image)), (torch.zeros_like(image), image), (image, image)]:
        result = register(moving, fixed)
        assert result.similarity >= result.identity_similarity
        if not result.aligned:
            torch.testing.assert_close(result.warped, moving, atol=0, rtol=0)
            torch.testing.assert_close(result.matrix, torch.eye(3).double())
    assert not register(image, torch.zeros_like(image)).aligned


def test_no_black_wedges_and_the_same_result_twice():
    """A shifted frame must not look like a finding; outside it the edge is repeated."""
    moving = 0.5 + 0.5 * texture()
    fixed = warp(moving, transform(7, 0.85, 12, -9))
    first, second = register(moving[None], fixed[None]), register(moving[None], fixed[None])
    assert first.warped.shape == (1, 160, 160) and first.warped.min() >= 0.5
    assert torch.equal(first.warped, second.warped) and torch.equal(first.matrix, second.matrix)


def test_bars_around_the_images_neither_guide_nor_follow_the_alignment():
    """Images of two aspect ratios: the picture lies where the current's is, and so do the bars."""
    moving, true = texture(), transform(3, 1.05, 5, -4)
    fixed = warp(moving, true)
    prior, current = torch.zeros(160, 160), torch.zeros(160, 160)
    prior[:, 20:150], current[25:140] = moving[:, 20:150], fixed[25:140]
    framed, covered, aligned = align(prior.numpy(), current.numpy())
    assert aligned and not framed[:25].any() and not framed[140:].any()
    assert np.abs(framed - current.numpy())[30:135, 40:130].mean() < 0.01 and framed[25:140].min() > 0

    columns = torch.zeros(160, 160)
    columns[:, 20:150] = 1.0                                # what the prior shows, moved as it was
    expected = warp_affine(columns[None, None], true[None, :2].float(), (160, 160))[0, 0].numpy() > 0.5
    assert (covered == expected).mean() > 0.98


def changed_pairs(count=3):
    """(prior, current, truth): a pose, an exposure and one added and one removed blob."""
    y, x = np.mgrid[:160, :160]
    pairs = []
    for seed in range(count):
        still = 0.5 * texture(seed=seed)
        spots = [torch.from_numpy(np.exp(-((x - cx) ** 2 + (y - 60) ** 2) / 200)).float() for cx in (50, 110)]
        pose = transform(2 * seed - 2, 1.03, 4, -3)
        prior = warp(still + 0.3 * spots[1], pose) ** 0.9
        pair = prior, still + 0.3 * spots[0], 0.3 * (spots[0] - spots[1])
        pairs.append(tuple(image.numpy() for image in pair))
    return pairs


def test_the_baseline_finds_a_change_through_pose_and_exposure():
    """It must be a fair opponent: what was added is positive, what is gone is negative."""
    prior, current, truth = changed_pairs(1)[0]
    diff = gaussian(registered_difference(prior, current), 2)
    assert diff[truth > 0.15].mean() > 0.1 and diff[truth < -0.15].mean() < -0.1
    assert abs(diff[np.abs(truth) < 0.01].mean()) < 0.02


def test_the_best_baseline_is_the_best_of_all_choices():
    """No pair of sigma and threshold among those offered scores higher than the one that is returned."""
    pairs, thresholds, sigmas = changed_pairs(), (0.02, 0.06, 0.1), (0.01, 0.03)
    chosen = best_baseline(pairs, thresholds=thresholds, sigmas=sigmas)
    single = {(160 * s, t): best_baseline(pairs, thresholds=[t], sigmas=[s])["metrics"]["dice"]
              for s in sigmas for t in thresholds}
    assert single[chosen["sigma"], chosen["threshold"]] == max(single.values()) == chosen["metrics"]["dice"]
    assert len(set(single.values())) == len(single)


def test_rescaling_puts_the_chosen_threshold_where_the_models_is():
    """Dice at 0.05 of the rescaled map is that of the map at its own threshold; errors are the map's own."""
    prior, current, truth = changed_pairs(1)[0]
    predicted = np.abs(gaussian(registered_difference(prior, current), 2)) > 0.08
    chosen = best_baseline([(prior, current, truth)], thresholds=[0.08], sigmas=[2 / 160])
    true = np.abs(truth) > 0.05
    expected = 2 * (predicted & true).sum() / (predicted.sum() + true.sum())
    assert chosen["metrics"]["dice_pooled"] == pytest.approx(expected, abs=1e-3)
    error = np.abs(gaussian(registered_difference(prior, current), 2) - truth)[true].mean()
    assert chosen["metrics"]["mae_inside"] == pytest.approx(error, rel=1e-4)

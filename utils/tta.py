"""Test-time augmentation: the mean of several views of a pair, or of the mirror images of a volume."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

MAX_ANGLE = 5.0             # degrees
MAX_SHIFT = 0.04            # of the image side
MAX_LOG_GAMMA = 0.15        # exposure of prior and current, each by itself


@torch.no_grad()
def predict_tta(model, prior, current, n):
    """Mean and standard deviation of the maps that n views of the same pairs give.

    model(prior, current) -> [B, 1, S, S]; prior, current [B, 1, S, S] in [0, 1]. The first view is the pair
    as it is, the second its mirror image; the others turn, shift and mirror both images alike, and change
    the exposure of each. What was moved is moved back before averaging, and a view counts only where it saw
    the pixel. Returns float32 (mean, deviation), both [B, 1, S, S]; for n = 1 the deviation is zero.
    Deterministic. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    maps = [model(prior, current).float()]
    weights = [torch.ones_like(maps[0])]
    for theta, gammas in map(view_of, range(1, n)):
        moved = [warp(image.float(), theta).clamp(0, 1) ** gamma
                 for image, gamma in zip((prior, current), gammas, strict=True)]
        inverse = np.linalg.inv(theta)
        maps.append(warp(model(*moved).float(), inverse))
        weights.append((grid_of(inverse, prior).abs() <= 1).all(-1)[:, None].float())
    maps, weights = torch.stack(maps), torch.stack(weights)                                 # [n, B, 1, S, S]
    mean = (weights * maps).sum(0) / weights.sum(0)
    variance = (weights * (maps - mean) ** 2).sum(0) / weights.sum(0)
    return mean, variance.sqrt()


def view_of(index):
    """(theta float64 [3, 3], gammas of prior and current) of view 1, 2, ...: always the same for an index."""
    if index == 1:
        return np.diag([-1.0, 1.0, 1.0]), (1.0, 1.0)
    rng = np.random.default_rng(index)
    angle = math.radians(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
    shift = 2 * rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2)                       # the frame's side is 2
    mirror = -1.0 if index % 2 else 1.0
    theta = np.array([[mirror * math.cos(angle), -mirror * math.sin(angle), shift[0]],
                      [math.sin(angle), math.cos(angle), shift[1]],
                      [0.0, 0.0, 1.0]])
    return theta, tuple(np.exp(rng.uniform(-MAX_LOG_GAMMA, MAX_LOG_GAMMA, 2)))


def grid_of(theta, images):
    """Sampling grid [B, H, W, 2] of theta [3, 3] for images [B, 1, H, W]."""
    theta = torch.as_tensor(theta[:2], dtype=torch.float32, device=images.device).expand(len(images), -1, -1)
    return F.affine_grid(theta, list(images.shape), align_corners=False)


def warp(images, theta):
    """Images [B, 1, H, W] seen through theta; outside the frame the edge is repeated."""
    return F.grid_sample(images, grid_of(theta, images), padding_mode="border", align_corners=False)


def mirror_mean(predict, images):
    """Class probabilities averaged over the mirror images along every axis of more than one voxel.

    predict(images [B, 1, D, H, W]) -> (probabilities [B, C, D, H, W], embedding [B, E, D, H, W]).  Returns
    both; the embedding is that of the images as they are, since those of two views share no frame.
    """
    axes = [axis for axis in (2, 3, 4) if images.shape[axis] > 1]
    total, embedding = predict(images)
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            total = total + predict(images.flip(chosen))[0].flip(chosen)
    return total / 2 ** len(axes), embedding

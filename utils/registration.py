"""Alignment of a prior image to the current one, and the baseline that subtracts the two."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from scipy.optimize import minimize
from skimage.exposure import match_histograms
from skimage.filters import gaussian

from utils.metrics import ChangeMetrics

LEVELS = (32, 64, 128)                              # longer side in pixels, coarse to fine
MAX_STEPS = 30                                      # of the optimiser, per level
TOLERANCE = 1e-5                                    # relative gain below which a level is left
SEARCH_ANGLES = (-0.2, -0.1, 0.0, 0.1, 0.2)         # radians
SEARCH_SCALES = (-0.3, -0.15, 0.0, 0.15, 0.3)       # log of the scale: 0.74 to 1.35
SEARCH_SHIFTS = (-0.3, -0.15, 0.0, 0.15, 0.3)       # half image sides
STARTS = 4                                          # best of the search, all followed on the coarsest level
THRESHOLDS = (0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3)        # offered to the baseline
SIGMAS = (0.004, 0.008, 0.016, 0.032)                                   # of the image side


class Registration(NamedTuple):
    """What ``register`` returns."""

    warped: torch.Tensor            # moving in the frame of fixed; outside it the edge is repeated
    matrix: torch.Tensor            # [3, 3] float64: (x, y, 1) pixel of moving -> pixel of fixed
    similarity: float               # of warped and fixed, in [-1, 1]
    identity_similarity: float      # of moving and fixed as they came
    aligned: bool                   # False: nothing better than the identity was found: unchanged


def register(moving, fixed, model="similarity"):
    """Align the moving image to the fixed one.

    moving, fixed: tensors [H, W] or [1, H, W] of one shape and any range. model: "similarity" (rotation,
    scale, shift) or "affine". Coarse to fine: a search over rotations, scales and shifts, then L-BFGS on each
    level, maximising the correlation of locally normalised images, which exposure and gamma hardly change.
    Where that ends below the identity's, the image comes back as it was. Deterministic, on the CPU.
    """
    if model not in ("similarity", "affine"):
        raise ValueError(f'model is "similarity" or "affine", not {model!r}')
    if moving.shape != fixed.shape:
        raise ValueError(f"moving {tuple(moving.shape)} and fixed {tuple(fixed.shape)} differ in shape")
    image = moving.detach().float().cpu().view(1, 1, *moving.shape[-2:])
    target = fixed.detach().float().cpu().view(1, 1, *moving.shape[-2:])
    aspect = torch.tensor(moving.shape[:-3:-1]) / max(moving.shape[-2:])                   # (x, y)

    pair = normalised(image, LEVELS[0]), normalised(target, LEVELS[0])
    reached = [climb(start, *pair, aspect, free=4) for start in search(*pair, aspect)]
    parameters = max(reached, key=lambda end: correlation(*pair, end[None], aspect).item())       # [6]
    for size in LEVELS[1:]:
        pair = normalised(image, size), normalised(target, size)
        parameters = climb(parameters, *pair, aspect, free=4 if model == "similarity" else 6)

    similarity, identity = correlation(*pair, torch.stack([parameters, 0 * parameters]), aspect).tolist()
    if similarity <= identity:
        return Registration(moving, torch.eye(3, dtype=torch.float64), identity, identity, False)
    grid = F.affine_grid(theta_of(parameters[None], aspect), image.shape, align_corners=False)
    warped = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    matrix = pixel_matrix(parameters, aspect, image.shape[-2:])
    return Registration(warped.view(moving.shape).to(moving), matrix, similarity, identity, True)


def normalised(image, size):
    """Image [1, 1, H, W], its longer side reduced to ``size``, its local mean and contrast made even."""
    factor = min(1.0, size / max(image.shape[-2:]))
    small = F.interpolate(image, [max(8, round(n * factor)) for n in image.shape[-2:]], mode="area")
    sigma = max(small.shape[-2:]) / 12
    radius = min(round(2 * sigma), min(small.shape[-2:]) - 1)
    window = (2 * radius + 1, 2 * radius + 1), (sigma, sigma)
    centred = small - gaussian_blur2d(small, *window)
    spread = gaussian_blur2d(centred ** 2, *window).sqrt()
    # The added part keeps flat regions, such as the black around a film, from becoming amplified noise.
    return centred / (spread + 0.3 * spread.mean() + 1e-8)


def theta_of(parameters, aspect):
    """[N, 2, 3] for affine_grid, from normalised coordinates in fixed to those in moving.

    parameters [N, 6]: angle, log scale, shift x, shift y, log ratio of scales, shear. Zeros: the identity.
    """
    angle, scale, x, y, ratio, shear = parameters.unbind(1)
    cos, sin, wide, high = angle.cos(), angle.sin(), (scale + ratio).exp(), (scale - ratio).exp()
    linear = torch.stack([cos * wide, (cos * shear - sin) * high, sin * wide, (sin * shear + cos) * high], 1)
    linear = linear.view(-1, 2, 2) * aspect / aspect[:, None]           # turns by the same angle in x and y
    return torch.cat([linear, torch.stack([x, y], 1)[..., None]], 2)


def pixel_matrix(parameters, aspect, shape):
    """[3, 3] float64 from pixels (x, y, 1) of moving to those of fixed."""
    height, width = shape
    # affine_grid's coordinates run from -1 to 1 between the outer edges of the pixels.
    normalise = torch.tensor([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]],
                             dtype=torch.float64)
    theta = torch.eye(3, dtype=torch.float64)
    theta[:2] = theta_of(parameters[None].double(), aspect.double())[0]
    return torch.linalg.inv(normalise) @ torch.linalg.inv(theta) @ normalise


def correlation(moving, fixed, parameters, aspect):
    """[N] correlation of moving, warped by each of parameters [N, 6], with fixed.

    What leaves the frame counts as zero in the sum of products but not in the norm of fixed, so that a small
    overlap scores low however well it matches.
    """
    shape = [len(parameters), *moving.shape[1:]]
    grid = F.affine_grid(theta_of(parameters, aspect), shape, align_corners=False)
    warped = F.grid_sample(moving.expand(shape), grid, align_corners=False)            # [N, 1, H, W]
    product, power = (warped * fixed).sum((1, 2, 3)), (warped ** 2).sum((1, 2, 3))
    return product / (power * (fixed ** 2).sum() + 1e-8).sqrt()


def search(moving, fixed, aspect):
    """The identity and the STARTS best of a coarse grid of parameters, [STARTS + 1, 6]."""
    grid = torch.tensor([(0.0,) * 6] + [(*start, 0.0, 0.0) for start in itertools.product(
        SEARCH_ANGLES, SEARCH_SCALES, SEARCH_SHIFTS, SEARCH_SHIFTS)])
    best = correlation(moving, fixed, grid, aspect).topk(STARTS).indices
    return torch.cat([grid[:1], grid[best]])


def climb(parameters, moving, fixed, aspect, free):
    """L-BFGS from parameters [6] to the nearest maximum of the correlation; the first ``free`` change."""
    def loss(values):
        x = torch.cat([torch.from_numpy(values).float(), parameters[free:]]).requires_grad_()
        value = -correlation(moving, fixed, x[None], aspect)[0]
        gradient, = torch.autograd.grad(value, x)
        return value.item(), gradient[:free].double().numpy()

    with torch.enable_grad():
        end = minimize(loss, parameters[:free].double().numpy(), jac=True, method="L-BFGS-B",
                       options={"maxiter": MAX_STEPS, "ftol": TOLERANCE})
    return torch.cat([torch.from_numpy(end.x).float(), parameters[free:]])


def align(prior, current):
    """Register two images by what they show, not by the black bars that a letterbox puts around.

    prior, current: float arrays [H, W] >= 0. Returns (the prior in the current's frame, zero outside of the
    current's picture; bool [H, W], where the prior saw anything; whether a better pose than its own was
    found).
    """
    boxes = picture_box(prior), picture_box(current)
    filled = []
    for image, (rows, columns) in zip((prior, current), boxes, strict=True):
        bars = [(s.start, n - s.stop) for s, n in zip((rows, columns), image.shape, strict=True)]
        filled.append(torch.from_numpy(np.pad(image[rows, columns], bars, mode="edge")))
    result = register(*filled)
    framed = np.zeros_like(prior)
    framed[boxes[1]] = result.warped.numpy()[boxes[1]]
    rows, columns = np.indices(prior.shape, np.float32)
    back = torch.linalg.inv(result.matrix).numpy()[:2].astype(np.float32)                 # current -> prior
    covered = np.ones(prior.shape, bool)
    for (a, b, c), inside in zip(back, boxes[0][::-1], strict=True):                      # x, then y
        position = a * columns + b * rows + c
        covered &= (position > inside.start - 1) & (position < inside.stop)
    return framed, covered, result.aligned


def picture_box(image):
    """Slices (rows, columns) of an image [H, W] >= 0 without the rows and columns of zeros around it."""
    box = []
    for axis in (1, 0):
        used = np.flatnonzero(image.max(axis=axis))
        box.append(slice(used[0], used[-1] + 1) if len(used) else slice(0, image.shape[1 - axis]))
    return tuple(box)


def registered_difference(prior, current):
    """current - prior, the prior registered to it and brought to its histogram.

    prior, current: float arrays [H, W] in [0, 1] -> array [H, W] in [-1, 1].
    """
    return current - match_histograms(align(prior, current)[0], current)


def best_baseline(pairs, target_threshold=0.05, min_area=None, thresholds=THRESHOLDS, sigmas=SIGMAS):
    """``registered_difference``, smoothed, at its strongest on pairs (prior, current, truth) of [H, W].

    Of all sigmas (shares of the image side) and thresholds it takes those with the highest mean Dice over
    both signs on the very pairs that are measured, which is generous to the baseline. Returns dict(metrics,
    sigma in pixels, threshold). For what counts pixels the maps are rescaled so that the chosen threshold
    lies at ``target_threshold``, where the model's is; errors and SSIM are those of the maps as they are.
    """
    raw = [registered_difference(prior, current) for prior, current, _ in pairs]
    truths = [truth for _, _, truth in pairs]
    best = (-math.inf,)
    for sigma in [share * max(raw[0].shape) for share in sigmas]:
        smooth = [gaussian(diff, sigma) for diff in raw]
        for threshold in thresholds:
            maps = [np.clip(diff * (target_threshold / threshold), -1, 1) for diff in smooth]
            dice = [signed_dice(*pair, target_threshold) for pair in zip(maps, truths, strict=True)]
            score = np.mean([value for value in dice if value is not None] or [0.0])
            if score > best[0]:
                best = score, maps, smooth, sigma, threshold
    _, maps, smooth, sigma, threshold = best
    rescaled, plain = ChangeMetrics(target_threshold, min_area), ChangeMetrics(target_threshold, min_area)
    for pred, diff, truth in zip(maps, smooth, truths, strict=True):
        rescaled.update(pred[None, None], truth[None, None])
        plain.update(diff[None, None], truth[None, None])
    of_values = {name: plain.compute()[name] for name in ("mae_inside", "mae_outside", "ssim")}
    return {"metrics": {**rescaled.compute(), **of_values}, "sigma": sigma, "threshold": threshold}


def signed_dice(pred, truth, threshold):
    """Dice of maps [H, W] over both signs together; None where the truth has no change."""
    true = (np.abs(truth) > threshold).sum()
    new, resolved = (pred > threshold) & (truth > threshold), (pred < -threshold) & (truth < -threshold)
    return 2 * (new | resolved).sum() / (true + (np.abs(pred) > threshold).sum()) if true else None

"""What differs between two X-rays of one patient without a change of health: pose, breath and appearance."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from datasets.findings import extent, smooth_noise


def draw_pose(rng, rotation, shift, scale, breath):
    """A pose as a dict of numbers, each u^1.75 times its limit with a random sign (u uniform): mostly near 0.

    rotation: degrees; shift: (down, right) as parts of the longer side; scale: a factor, its limit holds for
    the logarithm; breath: how far the diaphragm moves down, as a part of the longer side; bend: seed of a
    slight smooth warp.
    """
    def signed(limit):
        return float(rng.choice((-1, 1)) * rng.random() ** 1.75 * limit)

    return {"rotation": signed(rotation), "shift": [signed(shift), signed(shift)],
            "scale": float(np.exp(signed(scale))), "breath": signed(breath),
            "bend": int(rng.integers(2 ** 31))}


def pose_grid(shape, lungs, pose, bend):
    """Where each pixel of the posed image comes from: float32 [1, H, W, 2] as grid_sample wants it.

    bend: amplitude of the smooth warp, as a part of the longer side.
    """
    height, width = shape
    longest = max(shape)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    down = rows - (height - 1) / 2 - pose["shift"][0] * longest
    right = columns - (width - 1) / 2 - pose["shift"][1] * longest
    angle = np.deg2rad(pose["rotation"])
    zoom = pose["scale"] * (1 + 0.03)                # slightly larger, so that little lies beyond the border
    source_row = (np.cos(angle) * down + np.sin(angle) * right) / zoom + (height - 1) / 2
    source_column = (-np.sin(angle) * down + np.cos(angle) * right) / zoom + (width - 1) / 2
    top, bottom, left, outer = extent(lungs.any(0))
    reach = np.clip((source_row - top) / (bottom - top), 0, None)       # 0 at the apex, 1 at the diaphragm
    moved = reach ** 1.5 * np.exp(-np.maximum(reach - 1, 0) * 2)        # the belly follows less and less
    centre = 0.5 * (left + outer)
    source_column = source_column - pose["breath"] * 0.25 * moved * (source_column - centre)     # ribs open
    rng = np.random.default_rng(pose["bend"])
    source_row = source_row - pose["breath"] * longest * moved + bend * longest * smooth_noise(rng, shape, 5)
    source_column = source_column + bend * longest * smooth_noise(rng, shape, 5)
    grid = np.stack([(source_column + 0.5) / width, (source_row + 0.5) / height], -1) * 2 - 1
    return torch.from_numpy(grid[None].astype(np.float32))


def warp(image, grid):
    """``image`` [H, W] sampled at ``pose_grid``; mirrored beyond its border, so no wedge tells the pose."""
    tensor = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None, None]
    return F.grid_sample(tensor, grid, "bicubic", "reflection", align_corners=False)[0, 0].numpy()


def change_appearance(image, rng, exposure, local_contrast, noise, blur):
    """Another exposure, local contrast, sharpness and noise of an image [H, W] in [0, 1]; min-max normalised.

    exposure: limit of |log gamma|, and the scale of the slow brightness field and of the cut at either end;
    local_contrast: limit of the gain of details; noise: largest standard deviation; blur: largest sigma in
    pixels of a 256-pixel image.  Returns (image float32 [H, W] in [0, 1], settings).
    """
    scale = max(image.shape) / 256
    chosen = {"gamma": float(np.exp(rng.uniform(-exposure, exposure))),
              "detail": float(rng.uniform(-0.4, 1.0) * local_contrast),
              "noise": float(rng.random() * noise), "blur": float(rng.random() * blur)}
    image = np.clip(image, 0, 1) ** chosen["gamma"]
    image = image + 0.25 * exposure * smooth_noise(rng, image.shape, 4)
    image = image + chosen["detail"] * (image - ndimage.gaussian_filter(image, 8 * scale, truncate=2.5))
    image = ndimage.gaussian_filter(image, chosen["blur"] * scale)
    grain = ndimage.gaussian_filter(rng.normal(size=image.shape).astype(np.float32), 0.5)
    image = image + chosen["noise"] / grain.std() * grain
    cuts = 2 * exposure * rng.random(2)              # percent
    low, high = np.percentile(image[::2, ::2], (cuts[0], 100 - cuts[1]))
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1).astype(np.float32), chosen

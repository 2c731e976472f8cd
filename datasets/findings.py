"""Findings drawn into the lung fields of a chest X-ray, as signed changes of intensity.

Every function takes (image, lungs, rng, size, strength) and returns the change to add to the image: float32
[H, W] in its units.  image: float32 [H, W] in [0, 1].  lungs: bool [2, H, W], the patient's right and left.
size scales the extent, strength the attenuation; both are 1.0 for the finding as drawn.  Random numbers do
not depend on them, so the same seed with another size gives the same finding, grown or shrunk.

Attenuation adds up along a ray, so an opacity moves a dark lung far and tissue that is already bright hardly:
change = (tissue - image) * (1 - exp(-thickness)), where tissue is the image's level of soft tissue.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage


def nodules(image, lungs, rng, size=1.0, strength=1.0):
    """1 to 5 round opacities with radii of 2 to 6 % of the lung's height."""
    height = lung_height(lungs)
    thickness = np.zeros(image.shape, np.float32)
    for _ in range(rng.integers(1, 6)):
        row, column = random_point(lungs, rng, margin=0.03 * height)
        radius = height * rng.uniform(0.02, 0.06) * size
        peak = rng.uniform(0.35, 1.0) * strength
        add_ball(thickness, row, column, radius, peak)
    thickness = ndimage.gaussian_filter(deform(thickness, rng, 0.01 * height), 0.5)
    return absorb(image, lungs, thickness * soft(lungs.any(0), 1.0))


# Range of the count and of the radius over the lung's height: from many small balls to few large ones.
CLUSTERS = (((80, 400), (0.02, 0.05)), ((25, 70), (0.02, 0.09)),
            ((1, 3), (0.08, 0.25)), ((1, 2), (0.12, 0.40)))


def consolidation(image, lungs, rng, size=1.0, strength=1.0):
    """Patchy opacity: a cluster of balls, deformed smoothly, mottled like partly aired lung."""
    height = lung_height(lungs)
    counts, radii = CLUSTERS[rng.integers(len(CLUSTERS))]
    row, column = random_point(lungs, rng, margin=0.05 * height)
    spread = height * rng.uniform(0.06, 0.16, 2) * size
    peak = rng.uniform(0.6, 1.8) * strength
    thickness = np.zeros(image.shape, np.float32)
    count = rng.integers(counts[0], counts[1] + 1)
    places = rng.normal(size=(count, 2)).clip(-1.8, 1.8) * (spread if count > 3 else 0.4 * spread)
    for place, radius in zip(places, rng.uniform(*radii, count) * height * size, strict=True):
        add_ball(thickness, row + place[0], column + place[1], radius, radius)
    thickness = deform(thickness, rng, 0.05 * height)
    dense = np.quantile(thickness[thickness > 0], 0.8) if (thickness > 0).any() else 1.0
    mottle = np.exp(0.35 * smooth_noise(rng, image.shape, 28) + 0.3 * smooth_noise(rng, image.shape, 10))
    thickness = np.minimum(thickness / dense, 1.5) * mottle * peak
    return absorb(image, lungs, ndimage.gaussian_filter(thickness, 0.008 * height) * soft(lungs.any(0), 1.5))


def effusion(image, lungs, rng, size=1.0, strength=1.0):
    """Fluid at the base of one or both lungs; its upper border is a meniscus that rises to the chest wall."""
    peak = rng.uniform(1.2, 2.5) * strength
    sides = ([0], [1], [0, 1])[rng.integers(3)]
    thickness = np.zeros(image.shape, np.float32)
    for side in (0, 1):
        level, rise = rng.uniform(0.10, 0.45) * size, rng.uniform(0.05, 0.25)
        if side not in sides:
            continue
        top, bottom, left, right = extent(lungs[side])
        height = bottom - top
        drop = max(round(0.05 * height), 1)
        rows, columns = np.mgrid[:image.shape[0], :image.shape[1]].astype(np.float32)
        lateral = np.clip((columns - left) / (right - left), 0, 1)
        lateral = 1 - lateral if side == 0 else lateral                  # 0 at the heart, 1 at the chest wall
        surface = bottom - height * min(level, 0.85) * (1 - rise + 2 * rise * lateral ** 3)
        depth = (rows - surface) / (0.07 * height)                       # in widths of the blurred surface
        behind = np.zeros_like(lungs[side])                              # the diaphragm
        behind[drop:] = lungs[side][:-drop]
        region = soft(lungs[side] | behind, 1.5)
        thickness += region * peak / (1 + np.exp(-np.clip(2.5 * depth, -30, 30)))
    return absorb(image, lungs, thickness)


def pneumothorax(image, lungs, rng, size=1.0, strength=1.0):
    """Air around a lung: a darker rim with few markings, widest at the apex, and a thin line."""
    side = rng.integers(2)
    collapse = min(rng.uniform(0.10, 0.35) * size, 0.6)
    darker = min(rng.uniform(0.3, 0.6) * strength, 0.9)
    top, bottom, left, right = extent(lungs[side])
    hilum = bottom - 0.15 * (bottom - top), (right if side == 0 else left)       # the lung shrinks towards it
    field = soft(lungs[side], 1.0)
    rows, columns = np.mgrid[:image.shape[0], :image.shape[1]].astype(np.float32)
    source = [point + (at - point) / (1 - collapse) for at, point in zip((rows, columns), hilum, strict=True)]
    lung = ndimage.map_coordinates(field, source, order=1)                       # what is left of it
    rim = field * (1 - lung)
    markings = image - ndimage.gaussian_filter(image, 0.012 * lung_height(lungs))
    air = np.quantile(image[lungs[side]], 0.05) - 0.05
    loss = 0.25 * np.tanh(darker * np.maximum(image - air, 0) / 0.25)       # the chest wall's shadow stays
    change = -rim * (loss + 0.4 * markings)          # so do ribs; vessels go
    line = 4 * lung * (1 - lung) * field
    return (change + 0.04 * line + 0.15 * collapse * lung * field).astype(np.float32)


def cardiomegaly(image, lungs, rng, size=1.0, strength=1.0):
    """A heart that is wider to both sides, more to the patient's left."""
    widen = rng.uniform(0.04, 0.13, 2) * size * (0.5, 1.0)
    peak = rng.uniform(1.2, 2.2) * strength
    top, bottom, left, right = extent(lungs.any(0))
    height, width = bottom - top, right - left
    centre = top + rng.uniform(0.66, 0.76) * height, 0.5 * (extent(lungs[0])[3] + extent(lungs[1])[2])
    tall = height * rng.uniform(0.26, 0.34)
    near = slice(int(centre[0] - 0.3 * tall), int(centre[0] + 0.3 * tall) + 1)
    borders = extent_or_none(lungs[0][near], 3), extent_or_none(lungs[1][near], 2)    # the heart as it is
    reach = [abs(centre[1] - (centre[1] if border is None else border)) + part * width
             for border, part in zip(borders, widen, strict=True)]
    rows, columns = np.mgrid[:image.shape[0], :image.shape[1]].astype(np.float32)
    across = (columns - centre[1]) / np.where(columns < centre[1], reach[0], reach[1])
    radius = np.sqrt(across ** 2 + ((rows - centre[0]) / tall) ** 2)
    heart = 1 / (1 + np.exp(np.clip((radius - 1) * 25, -30, 30)))
    return absorb(image, lungs, deform(heart, rng, 0.015 * height) * peak * soft(lungs.any(0), 1.5))


FINDINGS = {
    "nodules": nodules,
    "consolidation": consolidation,
    "effusion": effusion,
    "pneumothorax": pneumothorax,
    "cardiomegaly": cardiomegaly,
}


def absorb(image, lungs, thickness):
    """Change of intensity by a thickness (optical depth >= 0) of soft tissue; see the module's docstring."""
    body = image[~lungs.any(0) & (image > 0.05)]
    tissue = np.quantile(body[::7], 0.75) if body.size > 50 else 1.0
    return (np.maximum(tissue - image, 0) * -np.expm1(-thickness)).astype(np.float32)


def add_ball(thickness, row, column, radius, peak):
    """Add the projection of a ball, 0 at its border and ``peak`` in the middle, to thickness in place."""
    top, left = (max(int(at - radius), 0) for at in (row, column))
    patch = thickness[top:max(int(row + radius) + 2, 0), left:max(int(column + radius) + 2, 0)]
    rows, columns = np.ogrid[top:top + patch.shape[0], left:left + patch.shape[1]]
    patch += peak * np.sqrt(np.maximum(1 - ((rows - row) ** 2 + (columns - column) ** 2) / radius ** 2, 0))


def deform(values, rng, amplitude):
    """``values`` [H, W] under a smooth random displacement of ``amplitude`` pixels (standard deviation)."""
    shape = values.shape
    at = [grid + amplitude * smooth_noise(rng, shape, 6) for grid in np.indices(shape, np.float32)]
    return ndimage.map_coordinates(values, at, order=1)


def smooth_noise(rng, shape, cells):
    """Smooth random field [H, W], mean 0, deviation about 0.7, with ``cells`` bumps along each side."""
    coarse = torch.from_numpy(rng.normal(size=(1, 1, cells, cells)).astype(np.float32))
    return F.interpolate(coarse, shape, mode="bicubic", align_corners=True)[0, 0].numpy()


def soft(mask, sigma):
    """A mask with a soft border, float32 in [0, 1]; ``sigma`` is in pixels of a 256-pixel image."""
    return ndimage.gaussian_filter(mask.astype(np.float32), sigma * max(mask.shape) / 256, mode="nearest")


def random_point(lungs, rng, margin):
    """A (row, column) inside the lungs, ``margin`` pixels from their border where they are wide enough."""
    inner = ndimage.distance_transform_edt(lungs.any(0)) > margin
    rows, columns = np.nonzero(inner if inner.any() else lungs.any(0))
    at = int(rng.random() * len(rows))
    return rows[at], columns[at]


def extent(mask):
    """First and last row, first and last column of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def extent_or_none(mask, which):
    """One number of ``extent``, None when the mask is empty."""
    return extent(mask)[which] if mask.any() else None


def lung_height(lungs):
    """Rows from the apex to the base of both lungs, in pixels."""
    top, bottom, _, _ = extent(lungs.any(0))
    return bottom - top

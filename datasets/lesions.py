"""Synthetic lesions inside the spinal cord, to train a network on where real ones are few."""

import math

import numpy as np
from scipy import ndimage
from skimage.draw import ellipse

from datasets.simclr_views import between, check_settings

SIDE = 320                       # of the slice whose pixels the lengths below are meant in
LEAST = 1.0                      # pixels: a texture finer than that is noise, and no scanner blends less
CUT = 4                          # scipy's Gaussian ends at this many standard deviations


def paint_lesions(image, cord, rng, count=(1, 3), semi_axis=(5.0, 20.0), flatness=(0.6, 1.0),
                  factor=(1.25, 2.25), ceiling=200 / 255, texture=(0.75, 1.25), grain=2.0, blend=1.0):
    """Paint bright ellipses into the cord -> (image float32 [H, W] in [0, 1], lesion bool [H, W]), both new.

    image float32 [H, W] in [0, 1]; cord bool [H, W]; rng: numpy Generator, the only source of the draws.
    Lengths are pixels of a slice of SIDE, and scale with the longer side of this one; grain and blend do not
    fall below LEAST, unless they are given so.

    count: range of the number of ellipses, which may overlap; their centres are pixels of the cord
    semi_axis: range of the first semi-axis, pixels; flatness: range of the second one's share of it
    factor: range of the lesions' intensity / the cord's median; one for the slice
    ceiling: no lesion is brighter, texture apart, but a cord that is about as bright itself has lesions of
        the lowest factor, for a lesion as dark as its surroundings would be a wrong label
    texture: range of the factors of smooth noise that multiply the intensity; grain: its smoothness, pixels
    blend: standard deviation of the Gaussian that blends the border, pixels

    The lesions end where the cord does: no other pixel of the image changes.  They have one pixel at least,
    whatever the cord's width.  A cord without a pixel, or of median 0 (nothing shows on it), stays as it is,
    with an empty lesion mask.  Raises UserError for ranges that make no sense, ValueError for other shapes
    or a cord that is no bool.
    """
    check_settings("lesions", {}, {"grain": grain, "blend": blend},
                   {"count": count, "semi_axis": semi_axis, "flatness": flatness, "factor": factor,
                    "texture": texture, "ceiling": (ceiling, 1.0)})
    if image.shape != cord.shape or image.ndim != 2 or cord.dtype != bool:
        raise ValueError(f"image {image.shape}, cord {cord.dtype} {cord.shape}: not [H, W] and bool [H, W]")
    median = float(np.median(image[cord])) if cord.any() else 0.0
    if not median > 0:
        return image.copy(), np.zeros(cord.shape, bool)
    scale = max(image.shape) / SIDE
    number = int(rng.integers(count[0], count[1] + 1))
    lesion = draw_ellipses(cord, number, np.multiply(semi_axis, scale), flatness, rng)
    level = min(rng.uniform(*factor) * median, max(ceiling, factor[0] * median), 1.0)
    grain, blend = (max(length * scale, min(length, LEAST)) for length in (grain, blend))
    margin = math.ceil(CUT * blend)
    box = tuple(slice(max(part.start - margin, 0), part.stop + margin)
                for part in ndimage.find_objects(lesion.astype(np.uint8))[0])
    bright = level * draw_texture(lesion[box].shape, texture, grain, rng)
    share = ndimage.gaussian_filter(lesion[box].astype(np.float32), blend, truncate=CUT) * cord[box]
    painted = image.astype(np.float32)
    painted[box] += share * (bright - painted[box])
    return painted.clip(0, 1), lesion


def draw_ellipses(cord, number, semi_axis, flatness, rng):
    """The part of ``number`` random ellipses that lies in the cord: bool like cord, never empty.

    cord bool [H, W], not empty; semi_axis: range, pixels of this slice; flatness: see ``paint_lesions``.
    """
    places = np.argwhere(cord)
    lesion = np.zeros(cord.shape, bool)
    for _ in range(number):
        row, column = places[rng.integers(len(places))]
        first, second, turn = rng.uniform(*semi_axis), rng.uniform(*flatness), rng.uniform(0, np.pi)
        lesion[ellipse(row, column, first, first * second, shape=cord.shape, rotation=turn)] = True
        lesion[row, column] = True                          # an ellipse of less than a pixel has none
    return lesion & cord


def draw_texture(shape, limits, grain, rng):
    """Smooth noise float32 of ``shape`` that spans ``limits``; grain: of the Gaussian filter, pixels."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), grain)
    span = max(float(np.ptp(noise)), np.finfo(np.float32).tiny)
    return between((noise - noise.min()) / span, *limits)

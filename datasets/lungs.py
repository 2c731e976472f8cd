"""Lung fields of a frontal chest X-ray, without a trained network.

A template of two lungs is first fitted by normalised correlation, which finds the thorax in spite of black
margins, text and opacities.  The fields then grow from the dark areas near the template.  A field that is
implausible is replaced by the template's own, and the answer says so.
"""

import numpy as np
from scipy import ndimage
from scipy.signal import fftconvolve
from skimage.draw import polygon
from skimage.morphology import convex_hull_image, disk
from skimage.transform import resize

WORK = 96                                            # pixels per side of the image that is searched
WIDTHS = (0.60, 0.69, 0.78, 0.87, 0.96)              # of the thorax, over the image's width
HEIGHTS = (0.46, 0.56, 0.66, 0.76, 0.86)       # of the lungs, over the image's height

# Outlines in the box of the thorax: (x, y) from the image's left and the apex, 0 to 1.
RIGHT_LUNG = ((.26, .00), (.33, .03), (.38, .10), (.40, .20), (.41, .35), (.39, .50), (.38, .65), (.38, .79),
              (.32, .81), (.22, .84), (.12, .90), (.03, .98), (.00, .92), (.01, .70), (.03, .50), (.07, .30),
              (.13, .12), (.19, .03))
LEFT_LUNG = ((.74, .00), (.67, .03), (.62, .10), (.60, .20), (.60, .35), (.63, .50), (.70, .65), (.75, .78),
             (.80, .84), (.88, .91), (.97, .98), (1.0, .92), (.99, .70), (.97, .50), (.93, .30), (.87, .12),
             (.81, .03))


def lung_mask(image):
    """Both lung fields of a frontal chest X-ray.

    image: float [H, W] in [0, 1], bright = attenuating, the patient's right on the image's left.
    Returns (mask, method).  mask: bool [2, H, W]; channel 0 is the patient's right lung, channel 1 the
    left; they are disjoint.  method: dict(right, left: "contrast" where the dark field was followed,
    "template" where the fitted outline was taken; score: correlation of the template, 0.3 to 0.7 on a usual
    X-ray).
    """
    image = np.asarray(image, np.float32)
    frame = body_frame(image)
    small = resize(image[frame], (WORK, WORK), order=1, anti_aliasing=True)
    contrast, body = local_contrast(small)
    template, score = fit_template(contrast, body)
    fields, method = [], {"score": round(float(score), 3)}
    for side, outline in zip(("right", "left"), template, strict=True):
        field = grow_field(contrast, body, outline)
        usable = is_plausible(field, outline, contrast)
        fields.append(smooth_field(field if usable else outline))
        method[side] = "contrast" if usable else "template"
    soft = np.zeros((2, *image.shape), np.float32)
    soft[(slice(None), *frame)] = [resize(field, image[frame].shape, order=1) for field in fields]
    mask = soft > 0.5
    mask[1] &= soft[1] > soft[0]
    mask[0] &= ~mask[1]
    return mask, method


def body_frame(image):
    """Slices of the rows and columns that are not a black margin; the whole image when too little is left."""
    bright = image > 0.06
    frame = []
    for axis in (1, 0):
        lines = np.flatnonzero(bright.mean(axis) > 0.25)
        if len(lines) < image.shape[1 - axis] / 3:
            return slice(None), slice(None)
        frame.append(slice(lines[0], lines[-1] + 1))
    return tuple(frame)


def local_contrast(image):
    """Brightness against the surroundings in local deviations, and the body without the air around it."""
    dark, _ = ndimage.label(np.pad(image < 0.1, 1, constant_values=True))
    body = dark[1:-1, 1:-1] != dark[0, 0]            # air is dark and reaches the image's border
    if body.mean() < 0.3:                            # then it was no air
        body = np.ones_like(body)
    weight = ndimage.gaussian_filter(body.astype(np.float32), WORK / 6) + 1e-3
    low = np.minimum(image, np.percentile(image[body], 97))                          # text and metal
    mean = ndimage.gaussian_filter(low * body, WORK / 6) / weight
    variance = ndimage.gaussian_filter((low - mean) ** 2 * body, WORK / 6) / weight
    contrast = (low - mean) / np.sqrt(variance + 1e-4)
    return np.where(body, np.clip(contrast, -2.5, 2.5), 0.0).astype(np.float32), body


def draw_template(height, width, margin):
    """Both outlines in a box with a margin around it: bool [2, height + 2 margin, width + 2 margin]."""
    drawn = np.zeros((2, height + 2 * margin, width + 2 * margin), bool)
    for lung, outline in zip(drawn, (RIGHT_LUNG, LEFT_LUNG), strict=True):
        x, y = np.array(outline).T
        lung[polygon(y * height + margin, x * width + margin, lung.shape)] = True
    return drawn


def fit_template(contrast, body):
    """The outlines of the size and place that correlate best.  Returns (bool [2, WORK, WORK], score)."""
    margin = WORK // 12
    rows, columns = np.mgrid[-0.5:0.5:WORK * 1j, -0.5:0.5:WORK * 1j]
    centre = [weighted.sum() / body.sum() for weighted in (rows * body, columns * body)]
    prior = 0.5 * ((columns - centre[1]) ** 2 * 2 + (rows - centre[0]) ** 2)     # lungs lie near the middle
    pad = WORK // 4
    padded, padded_square = (np.pad(values, pad) for values in (contrast, contrast ** 2))
    best = None
    for height in HEIGHTS:
        for width in WIDTHS:
            lungs = draw_template(round(height * WORK), round(width * WORK), margin)
            inside = lungs.any(0)
            kernel = np.where(inside, -1.0 / inside.sum(), 1.0 / (~inside).sum())
            kernel /= np.linalg.norm(kernel)
            match = fftconvolve(padded, kernel[::-1, ::-1], mode="same")[pad:-pad, pad:-pad]
            energy = fftconvolve(padded_square, np.ones_like(kernel), mode="same")[pad:-pad, pad:-pad]
            value = match / np.sqrt(np.maximum(energy, 1.0)) * np.sqrt(height * width) ** 0.5 - prior
            place = np.unravel_index(value.argmax(), value.shape)
            if best is None or value[place] > best[0]:
                best = value[place], place, lungs
    score, place, lungs = best
    return np.stack([paste(lung, place) for lung in lungs]), score


def paste(lung, place):
    """``lung`` drawn with its middle at ``place`` on an empty [WORK, WORK] image, cut at the edges."""
    target = np.pad(np.zeros((WORK, WORK), bool), WORK)
    top, left = (WORK + p - (s - 1) // 2 for p, s in zip(place, lung.shape, strict=True))
    target[top:top + lung.shape[0], left:left + lung.shape[1]] = lung
    return target[WORK:-WORK, WORK:-WORK]


def grow_field(contrast, body, outline):
    """Dark area in and around an outline.  bool [WORK, WORK], empty when there is none."""
    distance = ndimage.distance_transform_edt(outline) - ndimage.distance_transform_edt(~outline)
    smooth = ndimage.gaussian_filter(contrast, 1.5)
    ring = (distance < -2) & (distance > -9)
    middle = 0.5 * (np.median(smooth[outline]) + np.median(smooth[ring]))
    evidence = (middle - smooth) + np.where(distance > 0, 0.12 * np.minimum(distance, 4), 0.22 * distance)
    dark = ndimage.binary_opening(evidence > 0, disk(2)) & (distance > -7) & body
    labels, count = ndimage.label(dark)
    if count == 0:
        return dark
    shared = np.bincount(labels[outline], minlength=count + 1)
    shared[0] = 0
    field = ndimage.binary_fill_holes(labels == shared.argmax())
    # An opacity leaves a bay in the dark field: the hull closes it, but not beyond the outline.
    return field | (convex_hull_image(field) & (distance > -1)) if field.any() else field


def smooth_field(field):
    """Soft version of a field, float32 [WORK, WORK]; 0.5 is its border."""
    closed = ndimage.binary_closing(np.pad(field, 8), disk(4))[8:-8, 8:-8]
    return ndimage.gaussian_filter(closed.astype(np.float32), 1.5, mode="nearest")


def is_plausible(field, outline, contrast):
    """A field of about the outline's area that covers most of it, without arms, darker than its rim."""
    overlap = (field & outline).sum() / (field | outline).sum()
    if overlap <= 0.5 or not 0.55 < field.sum() / outline.sum() < 1.6:
        return False
    around = ndimage.binary_dilation(field, iterations=5) & ~field
    darkness = np.median(contrast[around]) - np.median(contrast[field])        # local standard deviations
    return bool(darkness > 0.3 and field.sum() > 0.84 * convex_hull_image(field).sum())

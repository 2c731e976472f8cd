"""How a slice of any shape becomes a square in [0, 1]."""

import numpy as np

from datasets.io import resize

FITS = ("letterbox", "squash")


def to_unit(image, limits):
    """float32 in [0, 1]: the values from limits (low, high), clipped; all 0 where these are equal."""
    low, high = limits
    if low == high:
        return np.zeros(image.shape, np.float32)
    return np.clip((image - np.float32(low)) / np.float32(high - low), 0, 1)


def fit_box(shape, spacing, size, fit, field=0.0):
    """(top, left, height, width) in a square of ``size`` pixels of a slice of a shape and its mm per pixel.

    fit, field: see SliceDataset.  io.undo_letterbox cuts a map of the square back to the box and the shape.
    """
    if fit == "squash":
        return 0, 0, size, size
    extent = np.multiply(shape, spacing)                                       # mm
    height, width = (max(1, round(side)) for side in (size * extent / max(extent.max(), field)).tolist())
    return (size - height) // 2, (size - width) // 2, height, width


def into_box(image, box, size):
    """float32 [size, size]: the image resized to its box, bilinear and antialiased, zeros around it."""
    top, left, height, width = box
    square = np.zeros((size, size), np.float32)
    square[top:top + height, left:left + width] = resize(image, (height, width))
    return square

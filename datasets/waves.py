"""A smooth random field in space that needs no grid: a sum of plane waves of one wavelength."""

import numpy as np


def draw_waves(rng, count, wavelength):
    """(wave vectors [count, 3] in 1/mm, phases [count]) of a field; see ``waves``.  wavelength: mm."""
    directions = rng.normal(size=(count, 3))
    directions *= 2 * np.pi / wavelength / np.linalg.norm(directions, axis=1, keepdims=True)
    return directions, rng.uniform(0, 2 * np.pi, count)


def waves(drawn, z, y, x):
    """The field at the points z, y, x (arrays that broadcast, mm): mean 0, variance 1 over its phases."""
    vectors, phases = (array.tolist() for array in drawn)      # Python's floats keep float32 points float32
    total = sum(np.cos(a * z + b * y + c * x + phase)
                for (a, b, c), phase in zip(vectors, phases, strict=True))
    return total * (2 / len(phases)) ** 0.5

"""Grey values of brain MRI and CT: to 8 bits for the cache, and normalised for the network.

An image has one of four modes: an MRI, or a CT seen through one of three windows.  Backgrounds are bool,
True = background.
"""

import numpy as np
import torch

MODES = ("mri", "brain", "blood", "bone")            # a mode's place here is its index
CT_WINDOWS = {"brain": (80, 40), "blood": (200, 80), "bone": (2800, 600)}         # width, level in HU
# Of foreground values in [0, 1] (the public NeuroVFM code, of arXiv 2511.18640).
MEANS = {"mri": 0.3141, "brain": 0.4139, "blood": 0.3184, "bone": 0.2719}
STDS = {"mri": 0.2623, "brain": 0.4059, "blood": 0.3605, "bone": 0.1875}


def mri_to_uint8(volume, low=0.5, high=99.5):
    """Clip an array to its percentiles ``low`` and ``high`` and scale it to 0..255, rounded, uint8.

    All zeros when the two percentiles are equal.
    """
    return to_uint8(volume, *np.percentile(volume, [low, high]))


def ct_to_uint8(hu, window):
    """CT in HU seen through a window of CT_WINDOWS -> uint8, 0..255 from level - width / 2 to + width / 2."""
    width, level = CT_WINDOWS[window]
    return to_uint8(hu, level - width / 2, level + width / 2)


def to_uint8(volume, low, high):
    """Scale [low, high] to 0..255, rounded and clipped, uint8; all zeros when low equals high."""
    if low == high:
        return np.zeros(np.shape(volume), np.uint8)
    scaled = (np.asarray(volume, np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def mri_background(volume, percentile=10):
    """Where an array is not above its percentile; of an air of zeros all is."""
    return volume <= np.percentile(volume, percentile)


def ct_background(hu, threshold=-500):
    """Where a CT in HU is air."""
    return hu <= threshold


def normalise(volume, mode):
    """Tensor in [0, 255], uint8 or float -> float32 with mean 0 and deviation 1 over images of this mode."""
    return standardise(volume.float() / 255, mode)


def standardise(volume, mode):
    """Tensor in [0, 1] -> (volume - mean) / standard deviation of the mode."""
    return (volume - MEANS[mode]) / STDS[mode]


def augment_intensity(volume, mode, generator, gamma, brightness, contrast, noise):
    """Change the grey values of a uint8 tensor, of any shape, at random -> float32, normalised.

    On [0, 1] in this order: the power exp(u), |u| <= gamma; the distance from the mean times 1 + u,
    |u| <= contrast; plus u, |u| <= brightness; clipped to [0, 1].  After the normalisation Gaussian noise is
    added, its deviation uniform in [0, noise].  Every u is uniform and comes from the torch.Generator.
    An amount of 0 changes nothing; with all of them 0 the result equals normalise().  Background is treated
    like the rest: it is told by the mask, never by its value.
    """
    u = 2 * torch.rand(3, generator=generator) - 1
    deviation = noise * torch.rand(1, generator=generator)
    volume = (volume.float() / 255) ** torch.exp(u[0] * gamma)
    volume = volume + u[1] * contrast * (volume - volume.mean()) + u[2] * brightness
    volume = standardise(volume.clamp(0, 1), mode)
    if noise > 0:
        volume = volume + deviation * torch.randn(volume.shape, generator=generator)
    return volume

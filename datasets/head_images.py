"""CT and MRI of a head of head_phantom.py."""

import numpy as np
from scipy.ndimage import gaussian_filter

# Tissue: HU, and signal on T1, T2 and FLAIR relative to white matter on T1.
TISSUES = {
    "air": (-1000, 0.02, 0.02, 0.02), "table": (-250, 0.02, 0.02, 0.02), "fat": (-90, 1.35, 0.75, 0.75),
    "muscle": (52, 0.5, 0.28, 0.35), "bone": (1250, 0.06, 0.05, 0.05), "marrow": (500, 0.75, 0.4, 0.4),
    "tooth": (2000, 0.04, 0.03, 0.03), "calcium": (200, 0.4, 0.2, 0.2), "dura": (60, 0.45, 0.3, 0.35),
    "vitreous": (8, 0.22, 1.35, 0.15), "lens": (75, 0.5, 0.25, 0.3),
    "csf": (5, 0.2, 1.3, 0.14), "grey": (37.5, 0.66, 0.68, 0.74), "white": (28.5, 1.0, 0.45, 0.56),
    "deep_grey": (36, 0.76, 0.55, 0.66), "brainstem": (31, 0.92, 0.48, 0.58),
    "blood": (78, 1.6, 0.1, 0.12), "oedema": (16, 0.7, 1.0, 1.1), "tumour": (30, 0.62, 0.85, 1.0),
    "enhancing": (38, 1.6, 0.85, 1.0), "necrosis": (12, 0.3, 1.45, 0.35), "infarct": (14, 0.52, 1.1, 1.3),
}
SEQUENCES = {"t1": 1, "t2": 2, "flair": 3}           # column of TISSUES


def ct(head, rng, noise=4.0):
    """CT of a Head, int16 [D, H, W] in HU within [-1024, 3071].  noise: HU, standard deviation."""
    hu = compose(head, {name: values[0] for name, values in TISSUES.items()})
    grain = gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (0, 0.6, 0.6))
    hu += grain * (noise / grain.std())
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)


def mri(head, sequence, rng, noise=0.025):
    """MRI of a Head, float32 [D, H, W] >= 0 in the scanner's own units; each call is another scanner.

    sequence: a name in SEQUENCES.  noise: of both channels, relative to white matter on T1; the magnitude is
    Rician.  Contrast, coil sensitivity and gain are drawn.
    """
    column = SEQUENCES[sequence]
    signal = compose(head, {name: values[column] * rng.normal(1, 0.03) for name, values in TISSUES.items()})
    signal *= coil(signal.shape, rng)
    real, imaginary = rng.standard_normal((2, *signal.shape), dtype=np.float32) * noise
    return np.hypot(signal + real, imaginary) * np.float32(rng.uniform(300, 1500))


def compose(head, values):
    """float32 [D, H, W]: the layers of a head, each of its tissue's value, over air."""
    image = np.full(head.labels.shape, values["air"], np.float32)
    for tissue, occupancy in head.layers:
        image += occupancy * (np.float32(values[tissue]) - image)
    return image


def coil(shape, rng):
    """Sensitivity of a coil, about 1: the exponential of a random polynomial of degree 2."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32).reshape([-1 if i == k else 1 for i in range(3)])
            for k, n in enumerate(shape)]
    slope, bend = rng.normal(0, 0.1, (2, 3)).astype(np.float32)
    return np.exp(sum(a * axis + b * (axis * axis - 1 / 3)
                      for a, b, axis in zip(slope, bend, axes, strict=True)))

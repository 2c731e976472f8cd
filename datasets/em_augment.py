"""Random changes of a crop of electron microscopy: pose and deformation with the labels, defects without.

Image: float32 [D, H, W] in [0, 1]; labels: {name: integer array [D, H, W]}.  D is the direction of the
sections, 1 for a slice.  Every function takes and returns such arrays and draws from a numpy Generator.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from utils.config import UserError

PARTS = ("flip", "rotate", "elastic", "shift", "gamma", "contrast", "defects", "noise", "missing")
LONGEST_GAP = 3                   # sections missing in a row, at most; Lee et al. 2017 go to 5


class EMAugment:
    """Augment one crop; a part whose probability is 0 changes nothing, and no draw of another part.

    Probabilities, each of a crop; image and labels alike:
        flip      of mirroring each of the three axes
        rotate    of turning in the plane: by a multiple of 90 degrees and by an angle within max_angle more;
                  before it, a cube of cubic voxels has its axes put in any order: its sections are no others
        elastic   of bending each section in its plane; elastic_alpha, elastic_sigma: see bending
        shift     of misaligned sections, by at most max_shift pixels; see misalign
    Image only:
        gamma     of an exponent within gamma_range
        contrast  of a change of contrast and brightness of up to contrast_amount
        defects   of sections with a fold, a stain, another intensity or blur
        noise     of additive Gaussian noise, of a standard deviation of up to noise_std
        missing   of sections without image
    fill: {name: value} of label voxels that come from outside the crop, where there is image only because it
    is mirrored at the border: the value that means "not known" (IGNORE for classes); 0, no instance, for
    names not given.  Raises UserError for a probability outside [0, 1] and for ranges that make no sense.
    """

    def __init__(self, flip=0.5, rotate=0.5, elastic=0.5, elastic_alpha=100.0, elastic_sigma=10.0, noise=0.3,
                 noise_std=0.1, gamma=0.3, gamma_range=(0.7, 1.3), contrast=0.3, contrast_amount=0.2,
                 missing=0.1, shift=0.1, max_shift=10, defects=0.3, max_angle=15.0, fill=None):
        self.probability = {"flip": flip, "rotate": rotate, "elastic": elastic, "shift": shift,
                            "gamma": gamma, "contrast": contrast, "defects": defects, "noise": noise,
                            "missing": missing}
        for part, value in self.probability.items():
            if not 0 <= value <= 1:
                raise UserError(f"EM augmentation: {part} = {value} is no probability; give 0 to 1")
        amounts = {"elastic_alpha": elastic_alpha, "noise_std": noise_std, "contrast_amount": contrast_amount,
                   "max_shift": max_shift, "max_angle": max_angle}
        for name, value in amounts.items():
            if not value >= 0:
                raise UserError(f"EM augmentation: {name} = {value}; give 0 or more")
        if elastic_sigma <= 0 or not 0 < gamma_range[0] <= gamma_range[1]:
            raise UserError(f"EM augmentation: elastic_sigma = {elastic_sigma}, gamma_range = {gamma_range}; "
                            "give numbers above 0, the range in order")
        self.elastic_alpha, self.elastic_sigma, self.max_angle = elastic_alpha, elastic_sigma, max_angle
        self.noise_std, self.gamma_range, self.contrast_amount = noise_std, gamma_range, contrast_amount
        self.max_shift, self.fill = max_shift, fill or {}

    def __call__(self, image, labels, spacing_nm, generator):
        """-> (image, labels, lost): new contiguous arrays of the same types, and bool [D], sections without
        image of their own.  H and W are never swapped unless they are equal.

        spacing_nm: (D, H, W).  All draws come from one number of the torch.Generator ``generator``.
        """
        seed = int(torch.randint(2 ** 63 - 1, (), generator=generator))
        draws = dict(zip(PARTS, np.random.default_rng(seed).spawn(len(PARTS)), strict=True))
        image, labels = self.move(image, labels, spacing_nm, draws)
        if self.happens("gamma", draws):
            image = image ** np.float32(draws["gamma"].uniform(*self.gamma_range))
        if self.happens("contrast", draws):
            image = change_contrast(image, self.contrast_amount, draws["contrast"])
        if self.happens("defects", draws):
            image = add_defects(image, draws["defects"])
        if self.happens("noise", draws):
            image = add_noise(image, self.noise_std, draws["noise"])
        lost = np.zeros(len(image), bool)
        if self.happens("missing", draws):
            image, lost = lose_sections(image, draws["missing"])
        image, labels = each(lambda array: np.array(array, order="C"), image, labels)
        return image, labels, lost

    def happens(self, part, draws):
        """Whether the crop gets this part; probability 0 never, 1 always."""
        return draws[part].random() < self.probability[part]

    def move(self, image, labels, spacing_nm, draws):
        """All that moves the labels, resampling at most once."""
        axes = [axis for axis in range(3) if self.happens("flip", draws)]
        image, labels = each(lambda array: np.flip(array, tuple(axes)), image, labels)
        offsets, angle = None, 0.0
        if self.happens("rotate", draws):
            order, turns = draw_turns(image.shape, spacing_nm, draws["rotate"])
            image, labels = each(lambda array: np.rot90(array.transpose(order), turns, (1, 2)), image, labels)
            angle = draws["rotate"].uniform(-self.max_angle, self.max_angle)
        if self.happens("elastic", draws):
            offsets = bending(image.shape, spacing_nm, self.elastic_alpha, self.elastic_sigma,
                              draws["elastic"])
        if angle or offsets is not None:
            rows, columns = sources(image.shape, spacing_nm, angle, offsets)
            image, labels = resample(image, labels, rows, columns, self.fill)
        if self.happens("shift", draws):
            image, labels = misalign(image, labels, self.max_shift, self.fill, draws["shift"])
        return image, labels


def each(change, image, labels):
    """(image, labels) with every array changed alike."""
    return change(image), {name: change(label) for name, label in labels.items()}


def draw_turns(shape, spacing_nm, rng):
    """(order of the axes, quarter turns in the plane) that leave the size and the spacing as they are.

    Turns are 1 to 3, or 2 where H and W differ; axes keep their places unless all three are alike.
    """
    sides = list(zip(shape, spacing_nm, strict=True))
    order = tuple(rng.permutation(3)) if sides[0] == sides[1] == sides[2] else (0, 1, 2)
    return order, int(rng.integers(1, 4)) if sides[1] == sides[2] else 2


def bending(shape, spacing_nm, alpha, sigma, rng):
    """Displacements of the pixels of each section along H and W: float32 [2, D, H, W], pixels.

    Gaussian-filtered white noise (Simard et al. 2003, ICDAR, section 2): sigma is the filter's standard
    deviation and alpha the factor, so that the root mean square of each displacement is
    alpha / sqrt(12 pi) / sigma, which is what theirs has in an image.  It must stay below a third of sigma,
    or tissue is folded over itself.  sigma is in pixels along H and the same length in nm along D and W, so
    that sections a few nm apart bend alike, and distant ones on their own.
    """
    smooth = [smoothing(size, sigma * spacing_nm[1] / spacing)
              for size, spacing in zip(shape, spacing_nm, strict=True)]
    noise = rng.standard_normal((2, *(matrix.shape[1] for matrix in smooth)), dtype=np.float32)
    along_d = np.einsum("zk,ckij->czij", smooth[0], noise)
    field = (smooth[1] @ along_d) @ smooth[2].T                                    # [2, D, H, W]
    scale = alpha / np.sqrt(12 * np.pi) / sigma * np.array([1, spacing_nm[1] / spacing_nm[2]])
    return field * scale.astype(np.float32)[:, None, None, None]


def smoothing(size, sigma):
    """float32 [size, K]: noise of variance 1 at K points, a sigma apart, -> smooth values of variance 1."""
    step = max(sigma, 1.0)
    points = step * np.arange(-np.ceil(3 * sigma / step), np.ceil((size - 1 + 3 * sigma) / step) + 1)
    weights = np.exp(-0.5 * ((np.arange(size)[:, None] - points) / sigma) ** 2)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def sources(shape, spacing_nm, angle, offsets):
    """Where each voxel's value comes from, in its section: rows and columns, float32 [D, H, W], pixels.

    angle: degrees about the centre, in nm, so that a circle stays one.  offsets: see bending; None for none.
    """
    depth, height, width = shape
    ratio = spacing_nm[2] / spacing_nm[1]
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    y = np.arange(height)[:, None] - (height - 1) / 2
    x = np.arange(width) - (width - 1) / 2
    rows = (cos * y - sin * ratio * x + (height - 1) / 2).astype(np.float32)
    columns = (sin / ratio * y + cos * x + (width - 1) / 2).astype(np.float32)
    if offsets is None:
        return np.broadcast_to(rows, shape), np.broadcast_to(columns, shape)
    return rows + offsets[0], columns + offsets[1]


def resample(image, labels, rows, columns, fill):
    """Values at ``rows``, ``columns`` of the same section: the image bilinear, labels of the nearest pixel.

    Beyond the border the image is mirrored, so that no edge is invented, but its labels are ``fill``.
    """
    depth, height, width = image.shape
    grid = np.stack([2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], axis=-1)
    moved = F.grid_sample(torch.from_numpy(np.array(image, order="C")[:, None]), torch.from_numpy(grid),
                          padding_mode="reflection", align_corners=True)[:, 0].numpy()
    y, x = np.rint(rows).astype(np.int32), np.rint(columns).astype(np.int32)
    outside = (y < 0) | (y >= height) | (x < 0) | (x >= width)
    index = np.arange(depth)[:, None, None] * (height * width) + y * width + x
    index[outside] = 0
    moved_labels = {name: label.reshape(-1)[index] for name, label in labels.items()}
    for name, label in moved_labels.items():
        label[outside] = fill.get(name, 0)
    return moved.clip(0, 1), moved_labels


def misalign(image, labels, max_shift, fill, rng):
    """Sections out of place by 1 to max_shift pixels in the plane (Lee et al. 2017, arXiv:1706.00120).

    Half the time a step: from a section on, all are displaced, with their labels.  Else a slip: one section
    is displaced alone, its labels stay, as the neighbours say where things are.  A single section stays.
    """
    depth = len(image)
    limits = np.minimum(max_shift, np.array(image.shape[1:]) // 4)
    if depth == 1 or limits.max() < 1:
        return image, labels
    shift = np.zeros(2, int)
    while not shift.any():
        shift = rng.integers(-limits, limits + 1)
    first, step = int(rng.integers(1, depth)), rng.random() < 0.5
    moving = np.arange(depth) >= first if step else np.arange(depth) == first
    rows, columns = (np.broadcast_to(places, image.shape).astype(np.float32) for places in (
        np.arange(image.shape[1])[:, None] + shift[0] * moving[:, None, None],
        np.arange(image.shape[2]) + shift[1] * moving[:, None, None]))
    moved, moved_labels = resample(image, labels, rows, columns, fill)
    return moved, moved_labels if step else labels


def change_contrast(image, amount, rng):
    """Contrast about the mean by a factor, and brightness, changed by up to ``amount``; clipped to [0, 1]."""
    factor, brightness = 1 + rng.uniform(-amount, amount), rng.uniform(-amount, amount)
    mean = float(image.mean())
    return np.clip((image - np.float32(mean)) * np.float32(factor) + np.float32(mean + brightness), 0, 1)


def add_noise(image, largest, rng):
    """Independent Gaussian noise of one standard deviation in [0, largest]; clipped to [0, 1]."""
    deviation = np.float32(rng.uniform(0, largest))
    return np.clip(image + deviation * rng.standard_normal(image.shape, dtype=np.float32), 0, 1)


def add_defects(image, rng):
    """Spoil about one section in eight, at least one, each by one of DEFECTS; a copy."""
    image = np.array(image)
    count = int(rng.integers(1, max(1, len(image) // 8) + 1))
    for section in rng.choice(len(image), count, replace=False):
        defect = DEFECTS[rng.integers(len(DEFECTS))]
        image[section] = np.clip(defect(image[section], rng), 0, 1)
    return image


def fold(section, rng):
    """A dark line of 2 to 8 pixels' width across [H, W]: tissue that folded over itself."""
    height, width = section.shape
    angle, half = rng.uniform(0, np.pi), rng.uniform(1, 4)
    y = np.arange(height)[:, None] - rng.uniform(0.2, 0.8) * height
    x = np.arange(width) - rng.uniform(0.2, 0.8) * width
    distance = (np.abs(np.cos(angle) * y + np.sin(angle) * x) / half).astype(np.float32)
    return section * (1 - np.float32(rng.uniform(0.6, 1)) * np.exp(-distance ** 4))


def stain(section, rng):
    """One to three dark round blobs on [H, W]: precipitate of the stain, or dirt."""
    height, width = section.shape
    for _ in range(rng.integers(1, 4)):
        radius = rng.uniform(0.03, 0.12) * max(height, width) + 1
        y = np.arange(height)[:, None] - rng.uniform(0, height)
        x = np.arange(width) - rng.uniform(0, width)
        blob = np.exp(-0.5 * (y ** 2 + x ** 2) / radius ** 2).astype(np.float32)
        section = section * (1 - np.float32(rng.uniform(0.5, 1)) * blob)
    return section


def jump(section, rng):
    """Lower contrast and another brightness of one section (Funke et al. 2018, arXiv:1709.02974)."""
    mean = section.mean()
    return (section - mean) * np.float32(rng.uniform(0.2, 0.8)) + mean + np.float32(rng.uniform(-0.2, 0.2))


def blur(section, rng):
    """[H, W] out of focus (Lee et al. 2017): Gaussian of 1 to 3 pixels."""
    return ndimage.gaussian_filter(section, rng.uniform(1, 3))


DEFECTS = (fold, stain, jump, blur)


def lose_sections(image, rng):
    """(image, lost bool [D]): one to LONGEST_GAP sections in a row have no image (Lee et al. 2017).

    They are black, or of the crop's mean, or, for want of better, a copy of the section before (of the one
    after, at the beginning).  At least one section keeps its image; a single section is never lost.
    """
    depth = len(image)
    lost = np.zeros(depth, bool)
    if depth == 1:
        return image, lost
    count = int(rng.integers(1, min(LONGEST_GAP, depth - 1) + 1))
    first = int(rng.integers(depth - count + 1))
    neighbour = image[first - 1] if first else image[count]
    content = (np.float32(0), image.mean(), neighbour)[rng.integers(3)]
    image, lost[first:first + count] = np.array(image), True
    image[lost] = content
    return image, lost

"""Random changes of photographs for supervised training, their plain views for evaluation, and mixing.

Everything works on batches where they lie.  What moves an image moves its spectral channels alike.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from datasets.simclr_views import (
    between,
    change_colours,
    check_settings,
    crop_resize,
    draw_uniform,
    gaussian_blur,
    jitter_factors,
)
from utils.config import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # ImageNet's, of RGB in [0, 1]
CROP = 0.875                              # side of a crop / the image's shorter side, as 224 of 256
LIGHT = {"flip": 0.5}
MODERATE = LIGHT | {"jitter": 0.8, "blur": 0.25, "angle": 25.0}
AGGRESSIVE = MODERATE | {"blur": 0.3, "angle": 35.0, "randaugment": 2, "cutout": 0.5, "distortion": 0.5}
SEVERITIES = {"light": LIGHT, "moderate": MODERATE, "aggressive": AGGRESSIVE}
OFF = {"flip": 0.0, "jitter": 0.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1,
       "blur": 0.0, "sigma": (0.1, 2.0), "angle": 0.0, "randaugment": 0, "magnitude": 9.0, "cutout": 0.0,
       "hole": 0.4, "distortion": 0.0, "stretch": 0.3}

MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
RECOLOURS = ("identity", "brightness", "saturation", "contrast", "sharpness", "posterize", "solarize",
             "autocontrast", "equalize")
CELLS = 5                                 # of the distortion's grid, along each side
PARTS = ("top", "left", "flip", "jitter", "brightness", "contrast", "saturation", "hue", "blur", "sigma",
         "angle", "cutout", "hole_y", "hole_x", "distortion")


class PhotoAugment:
    """Augment photographs by one of three severities, or by settings that differ from it.

    light       a random crop of CROP of the shorter side, resized to ``size``; mirrored with probability
                flip
    moderate    + colour jitter: probability jitter; brightness, contrast, saturation, hue: see SimCLRViews
                + Gaussian blur: probability blur; sigma: range, pixels of the result
                + rotation by up to +- angle degrees, the surroundings filled by mirroring
    aggressive  + RandAugment: randaugment changes out of MOVES and RECOLOURS, of a magnitude of 0 to 30
                  (Cubuk et al. 2020, arXiv:1909.13719; strengths as in torchvision)
                + Cutout: probability cutout of a square hole of side hole * size with its centre anywhere
                  (DeVries & Taylor 2017, arXiv:1708.04552), filled with the mean
                + grid distortion: probability distortion of CELLS x CELLS cells whose sides are stretched
                  by factors within 1 +- stretch
    ``settings``: any of the names in OFF.  Raises UserError for another severity or impossible settings.
    Moves come first, in one resampling, then colours, blur, RandAugment's other changes, and the hole.
    """

    def __init__(self, severity, size, **settings):
        if severity not in SEVERITIES:
            raise UserError(f'HVIT_SEVERITY = "{severity}": must be one of {", ".join(SEVERITIES)}')
        if unknown := settings.keys() - OFF.keys():
            raise TypeError(f"no setting named {', '.join(unknown)}")
        self.size, self.settings = size, OFF | SEVERITIES[severity] | settings
        of = self.settings.get
        check_settings("photo augmentation",
                       {name: of(name) for name in ("flip", "jitter", "blur", "cutout", "distortion")},
                       {name: of(name) for name in ("brightness", "contrast", "saturation", "hue", "angle",
                                                    "randaugment", "magnitude", "hole", "stretch")},
                       {"sigma": of("sigma")})
        if of("stretch") >= 1 or of("magnitude") > 30 or of("hue") > 0.5:
            raise UserError(f"photo augmentation: stretch = {of('stretch')}, magnitude = {of('magnitude')}, "
                            f"hue = {of('hue')}; give below 1, up to 30, and up to 0.5")

    @torch.no_grad()
    def __call__(self, images, seeds, spectral=None):
        """-> (images float32 [B, 3, size, size], normalised; spectral float32 [B, K, size, size] or None).

        images: uint8, or float in [0, 1], [B, 3, H, W] or a list of [3, H_i, W_i]; seeds: B integers, each
        the only source of its image's draws; spectral: float, of the same heights and widths, or None.  It
        gets the same crop, moves and hole (filled with its channels' means), and no change of colour.
        """
        uniform = draw_uniform(seeds, len(PARTS) + 2 * CELLS + 2 * self.settings["randaugment"])
        draws = dict(zip(PARTS, uniform.T, strict=False))
        cells, ops = np.split(uniform[:, len(PARTS):], [2 * CELLS], axis=1)
        ops = list(zip((len(MOVES + RECOLOURS) * ops[:, ::2]).astype(int), ops[:, 1::2] < 0.5, strict=True))
        boxes = square_boxes(images, draws["top"], draws["left"])
        grid = self.grid(draws, cells, ops)
        views = [None if batch is None else
                 self.move(batch, boxes, draws["flip"] < self.settings["flip"], grid)
                 for batch in (images, spectral)]
        unit = 1 if images[0].is_floating_point() else 255
        with torch.autocast(views[0].device.type, enabled=False):
            views[0] = normalise(self.recolour(views[0], unit, draws, ops))
        return self.cut_out(*views, draws)

    def move(self, batch, boxes, flips, grid):
        """Crop, resize and mirror images or spectral channels, and resample them by a grid or None."""
        views = crop_resize(batch, boxes, flips, self.size)
        if grid is None:
            return views
        return F.grid_sample(views, grid.to(views.device), padding_mode="reflection", align_corners=False)

    def grid(self, draws, cells, ops):
        """Where each pixel comes from, for grid_sample: float32 [B, size, size, 2]; None if nothing moves."""
        of = self.settings
        if not (of["angle"] or of["distortion"] or of["randaugment"]):
            return None
        places = [stretched(part, of["stretch"] * (draws["distortion"] < of["distortion"]), self.size)
                  for part in np.split(cells, 2, axis=1)]                               # x, y: [B, size]
        x, y = places[0][:, None, :], places[1][:, :, None]
        turns = between(draws["angle"], -of["angle"], of["angle"])
        matrices = np.stack([affine("rotate", turn) for turn in turns])
        for matrix, (numbers, signs) in zip(matrices, ops, strict=True):
            for number, negative in zip(numbers, signs, strict=True):
                if number < len(MOVES):
                    matrix[:] = matrix @ affine(MOVES[number], strength(MOVES[number], of["magnitude"],
                                                                        negative))
        a = matrices[..., None, None]                                                   # [B, 3, 3, 1, 1]
        moved = [a[:, row, 0] * x + a[:, row, 1] * y + a[:, row, 2] for row in (0, 1)]
        return torch.from_numpy(np.stack(moved, -1)).float()

    def recolour(self, images, unit, draws, ops):
        """Colour jitter, blur, and what RandAugment does without moving: [0, unit] -> [0, 1]."""
        of = self.settings
        factors = jitter_factors(draws, of, draws["jitter"] < of["jitter"])
        images = change_colours(images, unit, **factors)
        sigma = np.where(draws["blur"] < of["blur"], between(draws["sigma"], *of["sigma"]), 0)
        images = gaussian_blur(images, sigma, of["sigma"][1])
        for image, (numbers, signs) in zip(images, ops, strict=True):
            for number, negative in zip(numbers, signs, strict=True):
                if number >= len(MOVES):
                    word = RECOLOURS[number - len(MOVES)]
                    image.copy_(change(image, word, strength(word, of["magnitude"], negative)))
        return images

    def cut_out(self, images, spectral, draws):
        """The hole of Cutout in normalised images and in spectral channels, in place."""
        places = np.arange(self.size) + 0.5
        inside = [np.abs(places - self.size * draws[name][:, None]) < self.settings["hole"] * self.size / 2
                  for name in ("hole_y", "hole_x")]                                     # [B, size] each
        inside[0] &= (draws["cutout"] < self.settings["cutout"])[:, None]
        if inside[0].any():
            hole = torch.from_numpy(inside[0][:, None, :, None] & inside[1][:, None, None])
            images.masked_fill_(hole.to(images.device), 0)
            if spectral is not None:
                means = spectral.mean((2, 3), keepdim=True)
                spectral = torch.where(hole.to(spectral.device), means, spectral)
        return images, spectral


def square_boxes(images, top, left):
    """Squares of CROP of each image's shorter side, int64 [B, 4]; top, left: places [B] in [0, 1)."""
    shapes = np.array([image.shape[1:] for image in images])
    sides = np.maximum(np.rint(CROP * shapes.min(1)), 1)[:, None]
    return np.c_[np.c_[top, left] * (shapes - sides + 1), sides, sides].astype(int)


def stretched(uniform, amount, size):
    """Where ``size`` pixels of a line come from when its cells have other widths, [B, size] in [-1, 1].

    uniform [B, cells]: draws of the widths, which are 1 +- amount [B] before they share the line.
    """
    widths = 1 + amount[:, None] * between(uniform, -1, 1)
    knots = np.concatenate([np.zeros_like(widths[:, :1]), widths.cumsum(1)], 1)
    knots = 2 * knots / knots[:, -1:] - 1
    places, even = (2 * np.arange(size) + 1) / size - 1, np.linspace(-1, 1, knots.shape[1])
    return np.stack([np.interp(places, even, knot) for knot in knots])


def strength(word, magnitude, negative):
    """How much one of RandAugment's changes does at a magnitude of 0 to 30, as torchvision has it.

    Degrees, tangent of the shear, share of the side, factor, bits, or threshold.  negative: the other sign.
    """
    share, sign = magnitude / 30, -1 if negative else 1
    if word == "posterize":
        return 8 - round(4 * share)
    if word == "solarize":
        return 1 - share
    if word in MOVES:
        return sign * share * {"rotate": 30, "shear_x": 0.3, "shear_y": 0.3}.get(word, 150 / 331)
    return 1 + sign * 0.9 * share


def affine(word, amount):
    """One of MOVES about the centre: float64 [3, 3], from places of the result to the image's, sides of 2."""
    matrix = np.eye(3)
    if word == "rotate":
        cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
        matrix[:2, :2] = (cos, -sin), (sin, cos)
    else:
        row = int(word.endswith("y"))
        column, value = (2, -2 * amount) if word.startswith("translate") else (1 - row, amount)
        matrix[row, column] = value
    return matrix


def change(image, word, amount):
    """One of RECOLOURS: image [3, H, W] in [0, 1] -> the same; amount as ``strength`` gives it."""
    if word in ("brightness", "saturation", "contrast", "sharpness"):
        return getattr(TF, f"adjust_{word}")(image, amount)
    if word in ("posterize", "solarize"):
        return getattr(TF, word)(image, amount)
    return image if word == "identity" else getattr(TF, word)(image)


def normalise(images):
    """RGB [..., 3, H, W] in [0, 1] -> ImageNet's mean 0 and standard deviation 1, channel by channel."""
    return TF.normalize(images, list(MEAN), list(STD))


def denormalise(images):
    """The inverse of ``normalise``, limited to [0, 1]: for pictures."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)


def evaluation_view(images, size, spectral=None):
    """The middle square of CROP of each image's shorter side, resized: what PhotoAugment returns, not random.

    images: uint8, or float in [0, 1], [B, 3, H, W] or a list of [3, H_i, W_i]; spectral float or None ->
    (float32 [B, 3, size, size], normalised; spectral float32 [B, K, size, size] or None).
    """
    middle = np.full(len(images), 0.5)
    boxes, flips = square_boxes(images, middle, middle), middle > 1
    unit = 1 if images[0].is_floating_point() else 255
    views = normalise(crop_resize(images, boxes, flips, size) / unit)
    return views, None if spectral is None else crop_resize(spectral, boxes, flips, size)


def tta_views(images, spectral=None, n=2):
    """n views for test-time augmentation, a list of (images, spectral): as it is, mirrored, then the others.

    images [B, 3, S, S], spectral [B, K, S, S] or None; n is 1 to 8: a square has eight positions.
    Raises UserError for another n.
    """
    if not 1 <= n <= 8:
        raise UserError(f"{n} views for test-time augmentation: a square has 1 to 8")
    flips = ((), (-1,), (-2,), (-2, -1))
    return [tuple(batch if batch is None else (batch.mT if i > 3 else batch).flip(flips[i % 4])
                  for batch in (images, spectral)) for i in range(n)]


def mix(images, targets, mixup_alpha, mixup_prob, cutmix_alpha, cutmix_prob, generator, spectral=None):
    """-> (images, targets, spectral): a batch mixed with itself, by MixUp, by CutMix, or not at all.

    MixUp (Zhang et al. 2018, arXiv:1710.09412) comes with probability mixup_prob, CutMix (Yun et al. 2019,
    arXiv:1905.04899) with cutmix_prob, of a batch; the shares follow Beta(alpha, alpha), CutMix's corrected
    to the area that was pasted.  images [B, C, H, W] float; targets [B, classes] soft, float; spectral
    [B, K, H, W] or None, mixed alike.  Partners are neighbours in the batch.  Two draws of the
    torch.Generator ``generator`` decide all; torch's own generator stays as it is.
    Raises UserError for settings that make no sense.
    """
    check_settings("mixing", {"HVIT_MIXUP_PROB": mixup_prob, "HVIT_CUTMIX_PROB": cutmix_prob,
                              "their sum": mixup_prob + cutmix_prob}, {}, {})
    for name, alpha, used in (("HVIT_MIXUP_ALPHA", mixup_alpha, mixup_prob),
                              ("HVIT_CUTMIX_ALPHA", cutmix_alpha, cutmix_prob)):
        if used and not alpha > 0:
            raise UserError(f"{name} = {alpha}: must be above 0; to switch it off, set its probability to 0")
    choice = float(torch.rand((), generator=generator, dtype=torch.float64))
    seed = int(torch.randint(2 ** 63 - 1, (), generator=generator))
    if choice >= mixup_prob + cutmix_prob:
        return images, targets, spectral
    mixing = v2.MixUp(alpha=mixup_alpha) if choice < mixup_prob else v2.CutMix(alpha=cutmix_alpha)
    layers = images if spectral is None else torch.cat([images, spectral], 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers, targets = mixing(layers, targets)
    return layers[:, :images.shape[1]], targets, None if spectral is None else layers[:, images.shape[1]:]

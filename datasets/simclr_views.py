"""Two random views of every photograph of a batch, for contrastive learning, made where the batch lies.

Chen et al. 2020, arXiv:2002.05709, appendix A.  Crops are cut from uint8 and resized one by one; colours and
blur are then changed for the whole batch at once, each image by its own amounts.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from utils.config import UserError

ATTEMPTS = 10                             # at a crop that fits into the image, as in torchvision
CUT = 3.0                                 # a Gaussian ends at this many of the largest standard deviation
LUMA = (0.299, 0.587, 0.114)              # of red, green and blue, ITU-R BT.601
YIQ = (LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
PARTS = ("flip", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "sigma",
         "top", "left")
DRAWS = len(PARTS) + 2 * ATTEMPTS         # for one view of an image


class SimCLRViews:
    """Make two views of each image; a part whose probability or amount is 0 changes nothing.

    size: side of the views, pixels
    scale, ratio: ranges of a crop's share of the image's area, uniform, and of its width / height, uniform
        in the logarithm; drawn again when the crop does not fit, as torchvision's RandomResizedCrop does
    flip: probability of mirroring left and right
    jitter: probability of all four changes of colour; brightness, contrast, saturation: factors are uniform
        within 1 +- amount, not below 0; hue: turns are uniform within +- amount of the whole circle, <= 0.5
    grayscale: probability of losing the colours
    blur: probability of a Gaussian blur; sigma: range of its standard deviation, uniform, pixels of the view
    Raises UserError for settings that make no sense.

    Where torchvision's ColorJitter differs: it turns the hue in HSV, and limits to [0, 1] after each change,
    so that it draws their order.  Here hue is a turn in the plane of I and Q, which keeps the luma as
    contrast and saturation do; the four commute, are one 3 x 3 matrix and an offset for each image, and are
    limited once.
    """

    def __init__(self, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, jitter=0.8, brightness=0.8,
                 contrast=0.8, saturation=0.8, hue=0.2, grayscale=0.2, blur=0.5, sigma=(0.1, 2.0)):
        self.amounts = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        self.probability = {"flip": flip, "jitter": jitter, "grayscale": grayscale, "blur": blur}
        check_settings("SimCLR views", self.probability, self.amounts,
                       {"scale": scale, "ratio": ratio, "sigma": sigma})
        if scale[1] > 1 or hue > 0.5:
            raise UserError(f"SimCLR views: scale = {scale}, hue = {hue}; give at most 1 and 0.5")
        self.size, self.scale, self.ratio, self.sigma = size, scale, ratio, sigma

    @torch.no_grad()
    def __call__(self, images, seeds):
        """images -> (first, second), float32 [B, 3, size, size] in [0, 1] on the device of the images.

        images: uint8, or float in [0, 1], [B, 3, H, W] or a list of [3, H_i, W_i] of one type and device;
        seeds: B integers of 64 bits, each the only source of its image's draws.
        """
        uniform = draw_uniform(seeds, 2 * DRAWS)
        return tuple(self.view(images, part) for part in np.split(uniform, 2, axis=1))

    def view(self, images, uniform):
        """One view of each image, from draws in [0, 1), float64 [B, DRAWS]."""
        draws = self.draw(uniform, [image.shape[1:] for image in images])
        views = crop_resize(images, draws["boxes"], draws["flip"], self.size)
        unit = 1 if images[0].is_floating_point() else 255
        with torch.autocast(views.device.type, enabled=False):
            views = change_colours(views, unit, *(draws[name] for name in self.amounts))
            return gaussian_blur(views, draws["sigma"], self.sigma[1])

    def draw(self, uniform, shapes):
        """What happens to images of ``shapes`` [B, 2]: dict of numpy arrays, a row for each image.

        boxes: int64 [B, 4], top, left, height, width; flip: bool [B]; brightness, contrast, saturation:
        factors [B], 1 without change; hue: turns [B]; sigma: pixels [B], 0 without blur.
        """
        columns = dict(zip(PARTS, uniform.T, strict=False))
        happens = {name: columns[name] < value for name, value in self.probability.items()}
        draws = jitter_factors(columns, self.amounts, happens["jitter"])
        draws["saturation"] = np.where(happens["grayscale"], 0, draws["saturation"])
        draws["sigma"] = np.where(happens["blur"], between(columns["sigma"], *self.sigma), 0)
        draws["boxes"] = random_boxes(uniform[:, len(PARTS):], columns["top"], columns["left"],
                                      np.array(shapes), self.scale, self.ratio)
        return draws | {"flip": happens["flip"]}


def check_settings(where, probabilities, amounts, ranges):
    """UserError unless probabilities lie in [0, 1], amounts are >= 0 and ranges in order and above 0."""
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise UserError(f"{where}: {name} = {value} is no probability; give 0 to 1")
    for name, value in amounts.items():
        if not value >= 0:
            raise UserError(f"{where}: {name} = {value}; give 0 or more")
    for name, (low, high) in ranges.items():
        if not 0 < low <= high:
            raise UserError(f"{where}: {name} = {(low, high)}; give two numbers above 0, the lower one first")


def draw_uniform(seeds, count):
    """float64 [B, count] in [0, 1); row i depends on seeds[i] alone, all 64 bits of it."""
    return np.stack([np.random.default_rng(int(seed)).random(count) for seed in seeds])


def between(uniform, low, high):
    """Draws in [0, 1) brought to [low, high)."""
    return low + (high - low) * uniform


def jitter_factors(columns, amounts, happens):
    """Factors of brightness, contrast and saturation, and turns of hue, from draws [B] of each.

    happens: bool [B]; the others get factors of 1 and a turn of 0.
    """
    factors = {name: between(columns[name], max(0.0, 1 - amounts[name]), 1 + amounts[name])
               for name in ("brightness", "contrast", "saturation")}
    factors = {name: np.where(happens, value, 1.0) for name, value in factors.items()}
    return factors | {"hue": np.where(happens, between(columns["hue"], -amounts["hue"], amounts["hue"]), 0)}


def random_boxes(uniform, top, left, shapes, scale, ratio):
    """Crops (top, left, height, width), int64 [B, 4], of images of shapes [B, 2] (height, width).

    uniform [B, 2 * ATTEMPTS]: draws for areas and ratios; the first crop that fits is taken, and the largest
    one of a ratio within the range where none does.  top, left [B]: draws for the place.
    """
    height, width = shapes[:, :1], shapes[:, 1:]
    areas = height * width * between(uniform[:, :ATTEMPTS], *scale)
    ratios = np.exp(between(uniform[:, ATTEMPTS:], *np.log(ratio)))
    aspect = np.clip(width / height, *ratio)
    w = np.c_[np.sqrt(areas * ratios), np.minimum(width, height * aspect)].round().astype(int)
    h = np.c_[np.sqrt(areas / ratios), np.minimum(height, width / aspect)].round().astype(int)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(1)[:, None]
    sides = np.c_[np.take_along_axis(h, first, 1), np.take_along_axis(w, first, 1)]
    places = np.c_[top, left] * (shapes - sides + 1)
    return np.c_[places.astype(int), sides]


def crop_resize(images, boxes, flips, size):
    """Cut out of each image its box, resize it with antialiasing, mirror it where flips is True.

    images [B, C, H, W] or a list of [C, H_i, W_i]; boxes int [B, 4]: top, left, height, width; flips bool [B]
    -> float32 [B, C, size, size] in the images' own unit: 0 to 255 from uint8, which the CPU rounds to
    integers and a GPU does not.
    """
    views = images[0].new_empty(len(images), len(images[0]), size, size, dtype=torch.float32)
    for view, image, (top, left, height, width), flip in zip(views, images, boxes.tolist(), flips.tolist(),
                                                             strict=True):
        crop = image[None, :, top:top + height, left:left + width]
        if crop.device.type != "cpu":
            crop = crop.float()                             # only the CPU resizes uint8
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        view.copy_(crop.flip(-1) if flip else crop)
    return views


def change_colours(images, unit, brightness, contrast, saturation, hue):
    """Images [B, 3, H, W] in [0, unit] -> [0, 1], each with its own changes, numpy [B] each.

    brightness: factor; contrast: factor of the distance to the image's mean luma; saturation: factor of
    the distance to each pixel's luma, 0 = gray; hue: turns of the colours from red towards yellow.
    """
    luma, yiq = torch.tensor(LUMA, dtype=torch.float64), torch.tensor(YIQ, dtype=torch.float64)
    angle = torch.from_numpy(-2 * math.pi * hue)
    turn = torch.zeros(len(angle), 3, 3, dtype=torch.float64)
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 2, 1] = angle.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    brightness, contrast, saturation = map(torch.from_numpy, (brightness, contrast, saturation))
    chroma = torch.linalg.inv(yiq) @ turn @ yiq                                         # [B, 3, 3]
    factors = (brightness * contrast)[:, None, None] * (luma + saturation[:, None, None] * chroma) / unit
    offsets = (brightness * (1 - contrast))[:, None] * luma / unit                      # [B, 3], of the means
    factors, offsets = (value.float().to(images.device) for value in (factors, offsets))
    offsets = (offsets * images.mean((2, 3))).sum(1)[:, None, None]
    return torch.baddbmm(offsets, factors, images.flatten(2)).view_as(images).clamp_(0, 1)


def gaussian_blur(images, sigma, largest):
    """Blur images [B, C, S, S] in [0, 1], in place: sigma numpy [B], pixels, 0 for none; largest: of all.

    Separable, the image mirrored at its borders.  A kernel is as wide as the half of the range to which its
    sigma belongs needs, whatever the other images of the batch need.
    """
    for low, high in ((0, largest / 2), (largest / 2, largest)):
        chosen = torch.from_numpy(np.flatnonzero((low < sigma) & (sigma <= high)))
        radius = min(math.ceil(CUT * high), min(images.shape[2:]) - 1)
        if len(chosen) and radius:
            images[chosen] = blur(images[chosen], torch.from_numpy(sigma)[chosen], radius)
    return images


def blur(images, sigma, radius):
    """Images [B, C, S, S] under Gaussians of sigma [B], pixels, cut at a radius below S."""
    taps = torch.softmax(-(torch.arange(-radius, radius + 1) / sigma[:, None]).square() / 2, 1)
    groups = images.shape[0] * images.shape[1]              # each channel of each image has its own kernel
    taps = taps.float().to(images.device).repeat_interleave(images.shape[1], 0)[:, None, None]
    padded = F.pad(images, (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    blurred = F.conv2d(F.conv2d(padded, taps, groups=groups), taps.mT, groups=groups)
    return blurred.view_as(images).clamp_(0, 1)

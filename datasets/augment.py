"""Random changes of a training pair of X-rays: how they were exposed and processed, how the patient stood."""

import math

import torch
import torch.nn.functional as F
from kornia.enhance import equalize_clahe
from torchvision.transforms.v2.functional import adjust_sharpness

CLAHE_CLIP = (0.9, 1.25)          # range of the clip limit, in kornia's units
CLAHE_GRID = (8, 8)               # tiles per image
SHARPNESS = (0.5, 4.0)            # range of the factor: below 1 blurs, 1 changes nothing


class XrayAugment:
    """Augment one pair; a part whose setting is 0 changes nothing at all.

    For both images and the difference map alike:
        flip       probability of mirroring left and right
        rotation   largest angle, degrees
        shift      largest displacement, fraction of the side
        scale      largest change of size, fraction
    For the images only, never the difference map:
        clahe      probability of local histogram equalisation; half the time with two clip limits
        sharpness  probability of sharpening or blurring, by one factor for both
        exposure   largest absolute logarithm of gamma, and of a gain below 1; each image has its own
        noise      largest standard deviation of gaussian noise, in image units; each image has its own
    """

    def __init__(self, flip=0.0, rotation=0.0, shift=0.0, scale=0.0,
                 clahe=0.0, sharpness=0.0, exposure=0.0, noise=0.0):
        self.flip, self.rotation, self.shift, self.scale = flip, rotation, shift, scale
        self.clahe, self.sharpness, self.exposure, self.noise = clahe, sharpness, exposure, noise

    def __call__(self, prior, current, diff, generator):
        """prior, current in [0, 1], diff in [-1, 1], float32 [1, S, S] -> the same three, in new tensors.

        All draws come from ``generator``, and as many whatever the settings: switching one part off leaves
        the draws of the others as they were.  CLAHE needs more than 8 pixels a side.
        """
        uniform = torch.rand(17, generator=generator).tolist()
        pair = self.move(torch.cat([prior, current, diff]), uniform[:5])           # [3, S, S]
        images = self.equalise(pair[:2], uniform[5:9])                             # [2, S, S]
        images = self.sharpen(images, uniform[9:11])
        images = self.expose(images, torch.tensor(uniform[11:15]))
        images = self.add_noise(images, torch.tensor(uniform[15:]), generator)
        return images[:1], images[1:], pair[2:]

    def move(self, pair, uniform):
        """Flip, rotate, scale and shift all channels of [3, S, S] alike; zeros enter from outside."""
        if uniform[0] < self.flip:
            pair = pair.flip(-1)
        if self.rotation == self.shift == self.scale == 0:
            return pair
        angle, zoom, x, y = (2 * value - 1 for value in uniform[1:])
        angle, zoom = math.radians(self.rotation * angle), (1 + self.scale) ** zoom
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        theta = torch.tensor([[[cos, -sin, 2 * self.shift * x], [sin, cos, 2 * self.shift * y]]])
        grid = F.affine_grid(theta, (1, *pair.shape), align_corners=False)
        return F.grid_sample(pair[None], grid, align_corners=False)[0]

    def equalise(self, images, uniform):
        """Contrast-limited adaptive histogram equalisation of [2, S, S]."""
        if uniform[0] >= self.clahe:
            return images
        low, high = CLAHE_CLIP
        first = low + (high - low) * uniform[1]
        second = low + (high - low) * uniform[2] if uniform[3] < 0.5 else first
        return torch.cat([equalize_clahe(images[:1], first, CLAHE_GRID),
                          equalize_clahe(images[1:], second, CLAHE_GRID)])

    def sharpen(self, images, uniform):
        """Sharpen or blur [2, S, S]; the result stays in [0, 1]."""
        if uniform[0] >= self.sharpness:
            return images
        low, high = SHARPNESS
        return adjust_sharpness(images[:, None], low + (high - low) * uniform[1])[:, 0]

    def expose(self, images, uniform):
        """Gamma, and a gain that only darkens, so that nothing saturates; each image has its own."""
        if self.exposure == 0:
            return images
        gamma = (self.exposure * (2 * uniform[:2] - 1)).exp()
        gain = (-self.exposure * uniform[2:]).exp()
        return gain[:, None, None] * images ** gamma[:, None, None]

    def add_noise(self, images, uniform, generator):
        """Gaussian noise of one standard deviation per image; the result stays in [0, 1]."""
        if self.noise == 0:
            return images
        noise = torch.randn(images.shape, generator=generator)
        return (images + self.noise * uniform[:, None, None] * noise).clamp_(0, 1)

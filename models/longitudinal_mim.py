"""Difference map of two chest X-rays: shared encoder, difference attention, U-Net decoder."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.efficientnet import EfficientNetScales
from models.vit import ViT, init_linear
from utils.config import UserError

HEAD_CHANNELS = 16                              # at full resolution, where every channel costs most


class DifferenceAttention(nn.Module):
    """What each time shows that cannot be found in the other, wherever it has moved to.

    Each token looks up its counterpart in the other time by cross-attention.  The output is its own value
    minus the value found, so that anatomy displaced by pose cancels.  Both directions share the weights.
    Multi-head attention of Vaswani et al. 2017, arXiv:1706.03762, eq. 1, heads of 64, pre-norm.
    """

    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.norm = nn.LayerNorm(width)
        self.query_key = nn.Linear(width, 2 * width)
        self.value = nn.Linear(width, width, bias=False)                                # a bias would cancel
        self.project = nn.Linear(width, width)
        self.apply(init_linear)

    def forward(self, tokens):
        """tokens [2B, N, E], the priors first -> [2B, N, E], each row in the frame of its own image."""
        x = self.norm(tokens)
        query, key, value = (t.unflatten(2, (self.heads, 64)).transpose(1, 2)           # [2B, heads, N, 64]
                             for t in (*self.query_key(x).chunk(2, dim=2), self.value(x)))
        found = F.scaled_dot_product_attention(query, other_time(key), other_time(value))
        return self.project((value - found).transpose(1, 2).flatten(2))                 # [2B, N, E]


def other_time(x):
    """Swap the halves of a batch [2B, ...] that holds the priors first and the currents second."""
    return x.roll(len(x) // 2, 0)


class LongitudinalMIMModelBig(nn.Module):
    """Map of what changed between two chest X-rays, in the frame of the current one.

    efficientnet: "b0" ... "b7"; vit: "tiny" | "small" | "base"; decoder_channels: widths at strides 32,
    16, 8, 4, 2, multiples of 8; mask_patch_size: side in pixels of the learned tile that hides patches;
    antisymmetric: swapping the images negates the map, and identical images give zero, at twice the
    decoder's cost; drop: rate of the channel dropout on the deepest features; checkpoint_activations:
    recompute encoder and ViT in the backward pass.  Raises UserError for an unknown word or an image size
    that is not a multiple of 32.  U-Net: Ronneberger et al. 2015, arXiv:1505.04597.
    """

    def __init__(self, efficientnet="b7", vit="base", decoder_channels=(256, 192, 128, 64, 32),
                 mask_patch_size=128, antisymmetric=False, drop=0.1, checkpoint_activations=False):
        super().__init__()
        self.antisymmetric = antisymmetric
        self.mask_token = nn.Parameter(torch.zeros(1, 1, mask_patch_size, mask_patch_size))
        self.encoder = EfficientNetScales(efficientnet, checkpoint_activations)
        skips, widths = self.encoder.channels, tuple(decoder_channels)[::-1]         # strides 2, 4, 8, 16, 32
        self.vit = ViT(vit, skips[3], checkpoint_activations=checkpoint_activations)
        self.attention = DifferenceAttention(self.vit.width)
        self.change = nn.Conv2d(2 * self.vit.width, widths[3], 1)
        self.dropout = nn.Dropout2d(drop)
        self.fuse = nn.ModuleList([nn.Conv2d(2 * skip, width, 1)
                                   for skip, width in zip(skips, widths, strict=True)])
        self.blocks = nn.ModuleList([conv_block(widths[i + 1] + widths[i], widths[i]) for i in range(4)])
        last = nn.Conv2d(HEAD_CHANNELS, 1, 3, padding=1, bias=False)
        nn.init.normal_(last.weight, std=1e-3)                                         # starts near no change
        self.head = nn.Sequential(*conv_norm(widths[0] + 2, HEAD_CHANNELS), last)

    def forward(self, prior, current, mask=None):
        """prior, current [B, 1, H, W] in [0, 1] -> [B, 1, H, W] float32 in [-1, 1], positive = new finding.

        mask: bool [B, 2, H, W] (channel 0 prior, 1 current), True = hidden behind the mask token.
        """
        height, width = prior.shape[-2:]
        if height % 32 or width % 32:
            raise UserError(f"images are {height} x {width} pixels; IMG_SIZE must be a multiple of 32")
        images = torch.cat([prior, current])                                            # [2B, 1, H, W]
        if mask is not None:
            hidden = mask.transpose(0, 1).reshape(images.shape)
            images = torch.where(hidden, self.mask_tile(height, width), images)
        scales = self.encoder(images)
        change = self.attention(self.vit(scales[3]))                                    # [2B, N, E]
        change = change.transpose(1, 2).unflatten(2, scales[3].shape[-2:])              # [2B, E, H/16, W/16]
        maps = [images, *scales, change]
        if self.antisymmetric:
            forth, back = self.decode(maps, [other_time(m) for m in maps]).float().chunk(2)
            return torch.tanh(forth - back)
        first, second = zip(*(m.chunk(2) for m in maps), strict=True)
        return torch.tanh(self.decode(first, second).float())

    def mask_tile(self, height, width):
        """The mask token repeated over an image, cut at its right and lower edges: [1, 1, height, width]."""
        side = self.mask_token.shape[-1]
        return self.mask_token.repeat(1, 1, -(-height // side), -(-width // side))[..., :height, :width]

    def decode(self, first, second):
        """Change from ``first`` to ``second``, before tanh: [B, 1, H, W].

        Each is [image, five scales, change features] of one time, batch first.
        """
        change = self.dropout(self.change(torch.cat([first[-1], second[-1]], 1)))
        image, *scales = (torch.cat([b, b - a], 1) for a, b in zip(first[:-1], second[:-1], strict=True))
        skips = [fuse(scale) for fuse, scale in zip(self.fuse, scales, strict=True)]
        skips[3] = skips[3] + change
        x = self.dropout(skips[4])
        for block, skip in zip(self.blocks[::-1], skips[3::-1], strict=True):
            x = block(torch.cat([upsample(x), skip], 1))                                # strides 16, 8, 4, 2
        return self.head(torch.cat([upsample(x), image.to(x.dtype)], 1))


def upsample(x):
    """Twice the height and width, bilinear."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def conv_norm(in_channels, out_channels):
    """3x3 convolution, GroupNorm in groups of 8 (training equals inference, at any batch size), SiLU."""
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.GroupNorm(out_channels // 8, out_channels), nn.SiLU()]


def conv_block(in_channels, out_channels):
    """Two layers of conv_norm."""
    return nn.Sequential(*conv_norm(in_channels, out_channels), *conv_norm(out_channels, out_channels))

"""A transformer over tokens of volumes as the encoder of a U-Net: features of every voxel."""

import torch
import torch.nn as nn

from models.segresnet import CONV, InstanceNorm, ResBlock, run_blocks

TOKEN = (4, 16, 16)                             # voxels of a token, as datasets/tokens.py cuts them
STEPS = ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))     # from voxels to tokens: what each level halves
MEAN, STD = 0.5, 0.25                           # of an image in [0, 1]; about those of JEPA's volumes


class TokenUNet(nn.Module):
    """A TokenViT reads 4x16x16 voxels a token; convolutions bring its features back to the voxels.

    vit: TokenViT for tokens of 1024 values; features: channels at the voxels and of the output, doubled at
    each of four coarser levels, of which the last is the grid of tokens.  The levels of a U-Net (UNETR,
    Hatamizadeh et al. 2022, arXiv:2103.10504, figure 2) come from the transformer after a quarter, a half and
    three quarters of its blocks, the finest from the image itself; they are added, not put beside each other.
    Sections are thick in electron microscopy, as in brain studies, so that the plane is halved first: voxels
    of 30x6x6 nm are cubes of about 100 nm in the coarsest levels.
    checkpoint_activations: recompute the convolutions' blocks in the backward pass; the transformer has its
    own switch.  ``vit`` has a name of its own in the state, so that pretraining starts it alone.
    """

    multiple = TOKEN                            # each side of the input is one of it

    def __init__(self, vit, features, checkpoint_activations=False):
        super().__init__()
        self.vit, self.checkpoint_activations = vit, checkpoint_activations
        depth, widths = len(vit.blocks), [features * 2 ** level for level in range(4)]
        self.after = tuple(max(1, depth * quarter // 4) for quarter in (1, 2, 3))
        self.image = nn.Sequential(conv(1, features), block(features))
        self.rise = nn.ModuleList(rise(vit.dim, widths[level], STEPS[level:]) for level in (1, 2, 3))
        self.up, self.blocks = nn.ModuleList(), nn.ModuleList()
        for step, width, below in zip(STEPS, widths, [*widths[1:], vit.dim], strict=True):
            self.up.append(grow(below, width, step))
            self.blocks.append(block(width))

    def forward(self, image):
        """image [B, 1, D, H, W] in [0, 1], sides multiples of TOKEN -> features [B, F, D, H, W]."""
        recompute = self.checkpoint_activations and self.training
        grid = [side // t for side, t in zip(image.shape[2:], TOKEN, strict=True)]
        tokens = self.vit(*pack((image - MEAN) / STD, grid), self.after)
        *maps, x = (values.unflatten(0, (len(image), *grid)).movedim(-1, 1) for values in tokens)
        skips = [self.image, *self.rise]
        for level in (3, 2, 1, 0):
            skip = run_blocks([skips[level]], maps[level - 1] if level else image, recompute)
            x = run_blocks([self.blocks[level]], self.up[level](x) + skip, recompute)
        return x


def pack(image, grid):
    """image [B, 1, D, H, W] -> tokens [B N, 1024], their places int64 [B N, 3], cu_seqlens int32 [B + 1].

    grid: tokens along D, H, W.  The order is that of datasets.tokens.tokenize; each image is a sequence.
    """
    d, h, w = grid
    blocks = image.reshape(-1, d, TOKEN[0], h, TOKEN[1], w, TOKEN[2])
    tokens = blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(0, 3)
    axes = [torch.arange(size, device=image.device) for size in grid]
    places = torch.cartesian_prod(*axes).repeat(len(image), 1)
    return tokens, places, torch.arange(len(image) + 1, dtype=torch.int32, device="cpu") * (d * h * w)


def conv(inputs, outputs=None):
    """A convolution 3 wide."""
    return CONV[3](inputs, outputs or inputs, 3, padding=1, bias=False)


def block(width):
    """Two convolutions with a residual, in instance norm."""
    return ResBlock(width, InstanceNorm, conv)


def grow(inputs, outputs, step):
    """A transposed convolution that makes ``step`` voxels of each."""
    return nn.ConvTranspose3d(inputs, outputs, step, stride=step, bias=False)


def rise(dim, width, steps):
    """From the grid of tokens up to a level: a transposed convolution and a block for each of its steps."""
    layers = []
    for step in reversed(steps):
        layers += [grow(width if layers else dim, width, step), block(width)]
    return nn.Sequential(*layers)

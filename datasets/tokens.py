"""Volumes as tokens: cut, crop, flip and swap, with the mask and the coordinates carried along.

A token is a block of 4x16x16 voxels, which is a cube of 16 mm where a voxel measures 4x1x1 mm.
"""

import math

import torch

TOKEN = (4, 16, 16)              # voxels of a token along D, H, W
CROP_TRIES = 5
CROP_FOREGROUND = 0.1            # a crop needs a larger share of foreground tokens


def grid_size(shape):
    """Tokens (d, h, w) of a volume of ``shape`` voxels.  Raises ValueError when they are not whole."""
    if any(side % t for side, t in zip(shape, TOKEN, strict=True)):
        raise ValueError(f"a volume of {tuple(shape)} voxels is not made of whole tokens {TOKEN}")
    return tuple(side // t for side, t in zip(shape, TOKEN, strict=True))


def tokenize(volume):
    """Volume [D, H, W] of any dtype -> [N, 1024]: tokens in the order d, h, w, and so the voxels of each."""
    d, h, w = grid_size(volume.shape)
    blocks = volume.reshape(d, TOKEN[0], h, TOKEN[1], w, TOKEN[2])
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(-1, math.prod(TOKEN))


def untokenize(tokens, size):
    """Tokens [N, 1024] -> volume [D, H, W]; the inverse of ``tokenize``.  size: tokens along D, H, W."""
    blocks = tokens.reshape(*size, *TOKEN).permute(0, 3, 1, 4, 2, 5)           # [d, 4, h, 16, w, 16]
    return blocks.reshape([n * t for n, t in zip(size, TOKEN, strict=True)])


def token_background(mask):
    """bool [N], True = background: tokens that hold any background voxel of mask, bool [D, H, W]."""
    d, h, w = grid_size(mask.shape)
    eights = torch.as_tensor(mask).contiguous().view(torch.int64)    # [D, H, W / 8]: four times faster
    return eights.view(d, TOKEN[0], h, TOKEN[1], w, -1).any(1).any(2).any(3).flatten()


def crop_tokens(foreground, max_size, generator):
    """A random box with more than 10 % foreground, as three slices in tokens; the whole grid after 5 misses.

    foreground: bool [d, h, w], True = foreground token.  max_size: largest sides in tokens; each side is
    uniform in [1, min(max, size)], and so is the place of the box.
    """
    def draw(n):
        return int(torch.randint(n, (1,), generator=generator))

    for _ in range(CROP_TRIES):
        sides = [1 + draw(min(most, n)) for most, n in zip(max_size, foreground.shape, strict=True)]
        starts = [draw(n - side + 1) for n, side in zip(foreground.shape, sides, strict=True)]
        box = tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
        if foreground[box].float().mean() > CROP_FOREGROUND:
            return box
    return whole(foreground.shape)


def whole(size):
    """The box of all tokens of a grid of ``size`` tokens."""
    return tuple(slice(0, int(n)) for n in size)


def draw_orientation(generator):
    """(flips, swap): whether to flip D, H, W (three bools), and then to swap H and W; each with p = 0.5."""
    draws = (torch.rand(4, generator=generator) < 0.5).tolist()
    return draws[:3], draws[3]


def orient(grid, flips, swap):
    """Flip the first three axes (D, H, W) of a tensor where ``flips`` says so, then swap H and W."""
    grid = grid.flip([axis for axis in range(3) if flips[axis]])
    return grid.transpose(1, 2) if swap else grid


def cut_tokens(volume, foreground, box, flips=(False, False, False), swap=False):
    """The tokens of a box of a volume, as if the whole volume had been flipped and swapped before the cut.

    volume: [D, H, W] of any dtype; of a memory-mapped one only the box is read.
    foreground: bool [d, h, w] of the whole volume.  box: three slices in tokens of the volume as stored.
    Returns (tokens [N, 1024], coords int64 [N, 3] in the grid of the volume as it lies afterwards,
    foreground bool [N], size int64 [3] of that grid).
    """
    voxels = tuple(slice(s.start * t, s.stop * t) for s, t in zip(box, TOKEN, strict=True))
    size = torch.tensor(foreground.shape)
    coords = torch.stack(torch.meshgrid(*(torch.arange(s.start, s.stop) for s in box), indexing="ij"), -1)
    coords = torch.where(torch.tensor(flips), size - 1 - coords, coords)        # [d, h, w, 3]
    axes = [0, 2, 1] if swap else [0, 1, 2]
    return (tokenize(orient(volume[voxels], flips, swap)),
            orient(coords, flips, swap)[..., axes].flatten(0, 2),
            orient(foreground[box], flips, swap).flatten(),
            size[axes])

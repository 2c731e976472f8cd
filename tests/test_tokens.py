"""Tokens, and the crops, flips and swaps that carry masks and coordinates."""

import pytest
import torch
from conftest import grid_coords

from datasets.tokens import (
    TOKEN,
    crop_tokens,
    cut_tokens,
    draw_orientation,
    orient,
    token_background,
    tokenize,
    untokenize,
    whole,
)

SIZE = (3, 2, 4)                 # tokens: no two sides are equal
SHAPE = tuple(n * t for n, t in zip(SIZE, TOKEN, strict=True))
ORIENTATIONS = [([bool(code & 1), bool(code & 2), bool(code & 4)], bool(code & 8)) for code in range(16)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def positions():
    """A volume whose every voxel holds its own index."""
    return torch.arange(SHAPE[0] * SHAPE[1] * SHAPE[2]).view(SHAPE)


def test_tokens_are_the_blocks_of_the_grid_in_its_order():
    """The coordinates and the weights rely on the order (d, h, w), of tokens and of the voxels in each."""
    volume = positions()
    expected = [volume[4 * d:4 * d + 4, 16 * h:16 * h + 16, 16 * w:16 * w + 16].flatten()
                for d in range(3) for h in range(2) for w in range(4)]
    assert torch.equal(tokenize(volume), torch.stack(expected))
    assert grid_coords(SIZE).tolist() == [[d, h, w] for d in range(3) for h in range(2) for w in range(4)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.int64])
def test_untokenize_is_the_exact_inverse(dtype):
    """Attention maps go back to the voxels they came from; also from a view that is not contiguous."""
    volume = torch.randint(256, SHAPE, generator=generator(0)).to(dtype).transpose(1, 2)
    tokens = tokenize(volume)
    assert tokens.dtype == dtype and tokens.shape == (24, 1024)
    assert torch.equal(untokenize(tokens, (3, 4, 2)), volume)
    assert torch.equal(tokenize(untokenize(tokens, (3, 4, 2))), tokens)


@pytest.mark.parametrize("shape", [(5, 16, 16), (4, 8, 16), (4, 16, 17)])
def test_a_volume_of_broken_tokens_is_refused(shape):
    """A reshape would mix voxels of different places."""
    with pytest.raises(ValueError, match="whole tokens"):
        tokenize(torch.zeros(shape))


def test_one_background_voxel_makes_the_token_background():
    """The rule of the method: a token holds either anatomy alone or is left out."""
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[7, 31, 16] = True
    assert grid_coords(SIZE)[token_background(mask)].tolist() == [[1, 1, 1]]
    assert torch.equal(token_background(mask.numpy()), token_background(mask))
    for seed in range(5):                                    # also of a mask that is not contiguous
        mask = (torch.rand(SHAPE, generator=generator(seed)) < 5e-4).transpose(1, 2)
        assert torch.equal(token_background(mask), tokenize(mask).any(1))


@pytest.mark.parametrize("flips, swap", ORIENTATIONS)
def test_coordinates_and_mask_follow_flips_swaps_and_crops(flips, swap):
    """A token is the one at its coordinates in the whole volume flipped and swapped, also when not square."""
    volume, mask = positions(), torch.rand(SHAPE, generator=generator(1)) < 5e-4
    foreground = ~token_background(mask).view(SIZE)
    turned, turned_mask = orient(volume, flips, swap), orient(mask, flips, swap)
    box = (slice(1, 3), slice(0, 1), slice(1, 4))
    for part in (box, whole(SIZE)):
        tokens, coords, kept, size = cut_tokens(volume, foreground, part, flips, swap)
        assert size.tolist() == [n // t for n, t in zip(turned.shape, TOKEN, strict=True)]
        for token, (d, h, w), front in zip(tokens, coords.tolist(), kept, strict=True):
            place = (slice(4 * d, 4 * d + 4), slice(16 * h, 16 * h + 16), slice(16 * w, 16 * w + 16))
            assert torch.equal(token, turned[place].flatten())
            assert front == (not turned_mask[place].any())
    stored = volume[4:12, 0:16, 16:64]                       # the crop holds the voxels of its box, once each
    tokens = cut_tokens(volume, foreground, box, flips, swap)[0]
    assert torch.equal(tokens.flatten().sort().values, stored.flatten().sort().values)


def test_the_whole_volume_has_the_coordinates_of_its_grid():
    """In the order of ``tokenize``, whatever the orientation."""
    foreground = torch.ones(SIZE, dtype=torch.bool)
    for flips, swap in ORIENTATIONS:
        coords, _, size = cut_tokens(positions(), foreground, whole(SIZE), flips, swap)[1:]
        assert torch.equal(coords, grid_coords(size))


def test_orientations_are_drawn_evenly():
    """Three flips and a swap, each in half of the draws and by itself: 16 ways."""
    draws = [draw_orientation(generator(seed)) for seed in range(1600)]
    counts = [draws.count(orientation) for orientation in ORIENTATIONS]
    assert sum(counts) == 1600 and min(counts) > 60 and max(counts) < 145


def test_crops_lie_inside_and_reach_every_size_and_place():
    """Each side is uniform in [1, min(max, size)]."""
    foreground = torch.ones(6, 3, 2, dtype=torch.bool)
    boxes = [crop_tokens(foreground, (4, 20, 1), generator(seed)) for seed in range(600)]
    assert all(0 <= s.start < s.stop <= n for box in boxes for s, n in zip(box, (6, 3, 2), strict=True))
    for axis, most in enumerate((4, 3, 1)):
        sides = [box[axis].stop - box[axis].start for box in boxes]
        counts = [sides.count(side) for side in range(1, most + 1)]
        assert sum(counts) == 600 and min(counts) > 0.75 * 600 / most
    assert {(box[0].start, box[0].stop) for box in boxes} == \
        {(start, start + side) for side in range(1, 5) for start in range(7 - side)}


def test_a_crop_has_more_than_a_tenth_of_foreground():
    """Its own tokens count, found in the mask of the whole volume; a tenth itself is too little."""
    foreground = torch.zeros(10, 10, 10, dtype=torch.bool)
    foreground[6:, 5:, :4] = True
    shares = []
    for seed in range(300):
        box = crop_tokens(foreground, (5, 5, 5), generator(seed))
        if box != whole(foreground.shape):
            shares.append(float(foreground[box].float().mean()))
    assert 100 < len(shares) < 300 and min(shares) > 0.1
    tenth = torch.zeros(1, 1, 11, dtype=torch.bool)
    tenth[0, 0, 3] = True
    sides = {box[2].stop - box[2].start for box in (crop_tokens(tenth, (1, 1, 20), generator(seed))
                                                    for seed in range(200))}
    assert sides == {1, 2, 3, 4, 5, 6, 7, 8, 9, 11}          # 11: the whole


def test_after_five_misses_the_whole_volume_is_taken():
    """A series that is nearly all background is still seen."""
    foreground = torch.zeros(8, 8, 8, dtype=torch.bool)
    foreground[7, 7, 7] = True
    boxes = [crop_tokens(foreground, (2, 2, 2), generator(seed)) for seed in range(50)]
    assert whole((8, 8, 8)) in boxes
    found = [box for box in boxes if box != whole((8, 8, 8))]
    assert all(foreground[box].any() for box in found)
    draws = iter(range(1000))                                # five tries of six numbers each, no more

    def count(n, size, generator):
        next(draws)
        return torch.zeros(size, dtype=torch.int64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", count)
        assert crop_tokens(foreground, (2, 2, 2), generator(0)) == whole((8, 8, 8))
    assert next(draws) == 30

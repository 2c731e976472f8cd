"""Attention as volumes and pictures: every weight must lie where its token was."""

import nibabel
import numpy as np
import pytest
import torch
from conftest import grid_coords
from PIL import Image

from datasets.tokens import untokenize
from utils.attention_maps import attention_sheet, heat, to_source_space, token_map
from utils.overlay import CAPTION_HEIGHT

SIZE = (3, 2, 4)                                # tokens


def some_tokens(count=7, seed=0):
    """attention [count], coords [count, 3] of some of the tokens of the grid."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.randperm(24, generator=generator)[:count]
    return torch.rand(count, generator=generator), grid_coords(SIZE)[keep]


def test_the_map_is_that_of_tokens_put_back():
    """Each token's value over its own 1024 voxels, zero elsewhere."""
    attention, coords = some_tokens()
    tokens = torch.zeros(24, 1024)
    for value, (d, h, w) in zip(attention, coords.tolist(), strict=True):
        tokens[(d * SIZE[1] + h) * SIZE[2] + w] = value
    result = token_map(attention, coords, torch.tensor(SIZE))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, untokenize(tokens, SIZE).numpy())


def test_tokens_at_the_same_place_add_up():
    """The windows of a CT share their coordinates."""
    attention, coords = some_tokens()
    twice = token_map(torch.cat([attention, attention]).requires_grad_(), torch.cat([coords, coords]), SIZE)
    np.testing.assert_allclose(twice, 2 * token_map(attention.numpy(), coords.numpy(), SIZE))


def rotation(degrees, axis):
    """Affine of a rotation about one of the axes."""
    matrix, (i, j) = np.eye(4), [k for k in range(3) if k != axis]
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix[i, i], matrix[j, j], matrix[i, j], matrix[j, i] = c, c, -s, s
    return matrix


def cached_affine():
    """A cached grid: index (d, h, w) in steps of 4, 1, 1 mm -> superior, posterior, right; off the origin."""
    affine = np.array([[0, 0, 1, -30], [0, -1, 0, 25], [4, 0, 0, -12], [0, 0, 0, 1]], float)
    return rotation(7, 2) @ affine


# The space of the file: voxel axes flipped, in the order P S R, turned against the cached grid.
SOURCES = {
    "ras": np.diag([1.5, 1.2, 3, 1]),
    "flipped": np.diag([-1.5, 1.2, -3, 1]),
    "psr": np.array([[0, 0, 1.2, 0], [-1.5, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1]]),
    "turned": rotation(20, 0) @ rotation(-15, 1) @ np.diag([-1, 1.5, 2, 1]),
}


@pytest.mark.parametrize("orientation", SOURCES)
def test_a_hot_spot_lies_at_the_same_millimetre_in_the_source(orientation):
    """Seen over the user's own file, the weight must be where the model looked; elsewhere is nothing."""
    affine, source_affine = cached_affine(), SOURCES[orientation].copy()
    source_shape = (60, 70, 72)
    centre = affine @ [5.5, 15.5, 31.5, 1]
    source_affine[:, 3] += centre - source_affine @ [*(n / 2 for n in source_shape), 1]
    for token in ((0, 1, 0), (2, 0, 3)):
        values = token_map(torch.ones(1), torch.tensor([token]), SIZE)
        image = to_source_space(values, affine.tolist(), source_shape, source_affine.tolist())
        data = image.get_fdata()
        assert image.shape == source_shape and image.get_data_dtype() == np.float32
        np.testing.assert_allclose(image.affine, source_affine)
        middle = affine @ [4 * token[0] + 1.5, 16 * token[1] + 7.5, 16 * token[2] + 7.5, 1]
        found = [(data * grid).sum() / data.sum() for grid in np.indices(source_shape)]
        np.testing.assert_allclose(source_affine @ [*found, 1], middle, atol=0.7)
        volume = data.sum() * abs(np.linalg.det(source_affine))
        assert volume == pytest.approx(16 ** 3, rel=0.15)
        assert data.max() == pytest.approx(1, abs=0.05) and data.min() >= 0


def test_the_image_survives_a_file(tmp_path):
    """A viewer reads shape, place and values as written."""
    source_affine = np.diag([3.0, 3, 3, 1])
    image = to_source_space(token_map(*some_tokens(), SIZE), cached_affine(), (20, 20, 20), source_affine)
    nibabel.save(image, tmp_path / "attention.nii.gz")
    read = nibabel.load(tmp_path / "attention.nii.gz")
    np.testing.assert_allclose(read.get_fdata(), image.get_fdata())
    np.testing.assert_allclose(read.affine, source_affine)


def test_attention_tints_and_the_rest_stays_grey():
    """Colour is the message; a slice that nobody looked at is the image itself."""
    image, strength = np.full((320, 320), 100, np.uint8), np.zeros((320, 320), np.float32)
    strength[:160, :160], strength[160:, 160:] = 1, 0.4
    picture = heat(image, strength).astype(int)
    assert (picture[:150, 170:] == 100).all() and (picture[170:, :150] == 100).all()
    tint = np.abs(picture - 100).sum(2)
    assert tint[80, 80] > tint[240, 240] > 20


@pytest.mark.parametrize("count, columns, rows", [(2, 2, 1), (5, 4, 2), (9, 4, 2)])
def test_the_sheet_shows_the_most_attended_layers_in_order(tmp_path, count, columns, rows):
    """Six layers, each of a grey of its own, with attention growing with depth: the last ones are shown."""
    greys = np.repeat(np.arange(30, 90, 10), 4).astype(np.uint8)
    volume = np.broadcast_to(greys[:, None, None], (24, 320, 320))
    attention = np.zeros((24, 320, 320), np.float32)
    attention[:, 160:, 160:] = np.repeat(np.arange(1, 7), 4)[:, None, None] * 1e-4
    attention_sheet(tmp_path / "sheet.png", volume, attention, count, "study 7, mass 0.93")
    with Image.open(tmp_path / "sheet.png") as picture:
        sheet = np.asarray(picture)
    top = 2 * CAPTION_HEIGHT
    left, below = sheet.shape[1] / columns, (sheet.shape[0] - top) / rows
    shown = [sheet[int(top + (i // 4 + 0.4) * below), int((i % 4 + 0.3) * left), 0]
             for i in range(min(count, 6))]
    assert shown == [80 - 10 * i for i in range(min(count, 6))][::-1]
    assert (sheet[:CAPTION_HEIGHT] > 200).any() and (sheet[CAPTION_HEIGHT:top] > 200).any()


def test_a_series_without_attention_is_drawn_all_the_same(tmp_path):
    """All of a study's weight may lie on another series; nothing divides by zero."""
    volume = np.full((8, 32, 32), 90, np.uint8)
    with np.errstate(all="raise"):
        attention_sheet(tmp_path / "sheet.png", volume, np.zeros((8, 32, 32)), 4, "nothing")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert (np.asarray(picture)[200] == 90).any()

"""Pictures of change maps: colours where the map says, and readable sizes."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import utils.overlay
from utils.overlay import CAPTION_HEIGHT, GAP, PANEL_PIXELS, overlay, sample_sheet, save_overlay


@pytest.fixture
def case():
    """Grey images and a map with one new and one resolved square, [400, 360]."""
    diff = np.zeros((400, 360), np.float32)
    diff[50:100, 50:100], diff[200:250, 200:250] = 0.3, -0.3
    return np.full_like(diff, 0.4), np.full_like(diff, 0.6), diff


def panel(picture, index, width=360):
    return picture[CAPTION_HEIGHT:, index * (width + GAP):index * (width + GAP) + width].astype(int)


def test_new_is_red_resolved_is_green_and_the_rest_is_the_current_image(case):
    """The colours are the message: a swapped sign would tell the reader the opposite."""
    prior, current, diff = case
    picture = overlay(prior, current, diff)
    assert (panel(picture, 0) == 102).all() and (panel(picture, 1) == 153).all()
    red, green, blue = np.moveaxis(panel(picture, 2), 2, 0)
    assert (red > green + 30)[50:100, 50:100].all() and (green > red + 30)[200:250, 200:250].all()
    same = (red == 153) & (green == 153) & (blue == 153)
    np.testing.assert_array_equal(same, diff == 0)


def test_a_stronger_change_is_a_stronger_colour(case):
    """A larger change is more opaque; below the threshold nothing is drawn."""
    prior, current, diff = case
    faint = [panel(overlay(prior, current, factor * diff), 2)[75, 75] for factor in (0.1, 0.3, 1.0)]
    assert (faint[0] == 153).all()
    assert 153 < faint[1][0] < faint[2][0]


def test_the_caption_says_when_nothing_is_marked(case, monkeypatch):
    """A case without changes must not look like one that failed; else the legend has the threshold."""
    captions = []
    monkeypatch.setattr(utils.overlay, "row", lambda panels, words: captions.append(words[2]))
    prior, current, diff = case
    for factor, threshold in ((1, 0.05), (0, 0.05), (1, 0.3), (-1, 0.299)):
        overlay(prior, current, factor * diff, threshold=threshold)
    assert [caption.startswith("no change above") for caption in captions] == [False, True, True, False]
    assert captions[:2] == ["denser: new (red), less: resolved (green), > 0.05", "no change above 0.05"]
    font = ImageFont.load_default(size=14)
    assert all(font.getlength(caption) < PANEL_PIXELS[0] - 8 for caption in captions)


def test_truth_and_uncertainty_add_a_panel_each(case):
    """The panels stand side by side, whatever the arrays come as."""
    prior, current, diff = (torch.from_numpy(x)[None] for x in case)
    for extra in ({}, {"truth": diff}, {"uncertainty": diff.abs()}, {"truth": diff, "uncertainty": 0 * diff}):
        picture = overlay(prior, current, diff, **extra)
        assert picture.dtype == np.uint8
        assert picture.shape == (400 + CAPTION_HEIGHT, (3 + len(extra)) * (360 + GAP) - GAP, 3)


@pytest.mark.parametrize("side, shown", [(64, 320), (3000, 768)])
def test_small_images_are_enlarged_and_large_ones_reduced(tmp_path, side, shown):
    """A reader can see a 64 px map, and a radiograph of 3000 px fits on the screen."""
    image = np.linspace(0, 1, side * side, dtype=np.float32).reshape(side, side)
    save_overlay(tmp_path / "case.png", image, image, image - 0.5)
    with Image.open(tmp_path / "case.png") as picture:
        assert picture.size == (3 * (shown + GAP) - GAP, shown + CAPTION_HEIGHT)


def test_the_sample_sheet_has_a_row_per_pair(case, tmp_path):
    """Target and prediction stand beside the images of their own pair."""
    prior, current, diff = (torch.from_numpy(x)[None] for x in case)
    rows = [(prior, current, diff, 0 * diff), (prior, current, 0 * diff, diff)]
    sample_sheet(tmp_path / "epoch_1.png", rows, 0.05)
    with Image.open(tmp_path / "epoch_1.png") as picture:
        sheet = np.asarray(picture)
    assert sheet.shape == (CAPTION_HEIGHT + 2 * (400 + GAP), 4 * (360 + GAP) - GAP, 3)
    first, second = sheet[:CAPTION_HEIGHT + 400], sheet[400 + GAP:]
    np.testing.assert_array_equal(panel(first, 2), panel(second[:CAPTION_HEIGHT + 400], 3))

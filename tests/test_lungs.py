"""Lung fields found in drawn chests, in spite of margins, exposure and text."""

import numpy as np
import pytest
from scipy import ndimage

from datasets.lungs import draw_template, is_plausible, lung_mask


def draw_chest(shape=(200, 220), seed=0):
    """(image [H, W] in [0, 1], lungs [2, H, W]): a bright body with two dark lungs, ribs and grain."""
    rng = np.random.default_rng(seed)
    lungs = np.zeros((2, *shape), bool)
    box = draw_template(int(0.66 * shape[0]), int(0.74 * shape[1]), 0)
    top, left = int(0.14 * shape[0]), int(0.13 * shape[1])
    lungs[:, top:top + box.shape[1], left:left + box.shape[2]] = box
    field = ndimage.gaussian_filter(lungs.any(0).astype(float), 2)
    rows = np.arange(shape[0])[:, None]
    image = 0.75 - 0.45 * field + 0.04 * np.sin(rows / 5) + 0.02 * rng.normal(size=shape)
    return np.clip(image, 0, 1).astype(np.float32), lungs


def overlap(mask, truth):
    return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())


@pytest.mark.parametrize("change", ["none", "low contrast", "dark exposure", "margin", "text", "opacity"])
def test_both_lungs_are_found_whatever_the_exposure_and_the_border(change):
    """The findings are drawn into these fields; a mask elsewhere would put them into the belly or the air."""
    image, lungs = draw_chest()
    if change == "low contrast":
        image = 0.4 + 0.2 * image
    if change == "dark exposure":
        image = image ** 2.2
    if change == "margin":
        image, lungs = np.pad(image, ((40, 0), (30, 30))), np.pad(lungs, ((0, 0), (40, 0), (30, 30)))
    if change == "text":
        image[5:20, 150:210] = 1.0
    if change == "opacity":
        image[110:150, 40:80] = 0.7
    mask, method = lung_mask(image)
    for found, truth in zip(mask, lungs, strict=True):
        assert overlap(found, truth) > 0.8
    assert set(method) == {"right", "left", "score"}
    assert not (mask[0] & mask[1]).any()


def test_mirroring_the_image_swaps_the_lungs():
    """Channel 0 is the image's left side, the patient's right, by place and not by shape."""
    image, _ = draw_chest()
    mask, _ = lung_mask(image[:, ::-1])
    columns = [np.nonzero(lung)[1].mean() for lung in mask]
    assert columns[0] < image.shape[1] / 2 < columns[1]


@pytest.mark.parametrize("kind", ["constant", "noise", "zeros"])
def test_an_image_without_lungs_still_gives_two_fields(kind):
    """Pairs are made from whatever is given; the record then says that the template stood in."""
    image = {"constant": np.full((128, 128), 0.5, np.float32), "zeros": np.zeros((128, 128), np.float32),
             "noise": np.random.default_rng(0).random((128, 128), np.float32)}[kind]
    mask, method = lung_mask(image)
    assert mask.any((1, 2)).all()
    if kind != "noise":
        assert method["right"] == method["left"] == "template"


def test_implausible_fields_are_refused():
    """Too small, too large, elsewhere, with arms, not dark, or nothing at all."""
    outline = np.zeros((96, 96), bool)
    outline[20:70, 20:45] = True
    arms = outline.copy()
    arms[66:70, 20:90] = True
    moved = np.roll(outline, 20, 1)
    dark = np.where(outline, -1.0, 1.0)
    assert is_plausible(outline, outline, dark)
    assert not is_plausible(outline, outline, np.zeros(outline.shape))
    small = ndimage.binary_erosion(outline, iterations=6)
    for field in (np.zeros_like(outline), small, np.ones_like(outline), arms, moved):
        assert not is_plausible(field, outline, np.where(field, -1.0, 1.0))

"""Pictures of electron microscopy: colours that tell, outlines that lie right, proportions that are true."""

from itertools import combinations
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage.segmentation import find_boundaries

from datasets.em_labels import IGNORE
from utils.em_pictures import (
    CLASS_COLOURS,
    SIDE,
    class_colours,
    colours,
    legend,
    nearest,
    orthogonal_slices,
    overlay_labels,
    renamed,
    sheet,
)
from utils.overlay import CAPTION_HEIGHT, GAP

DATA = Path(__file__).parents[2] / "shared/data/em"


def test_an_id_has_one_colour_whatever_else_is_in_the_picture():
    """Blocks of a volume and epochs of a run are compared by colour; wide and signed ids count too."""
    ids = np.array([[0, 7, 2 ** 40], [3, 7, 12]], np.uint64)
    picture = colours(ids)
    assert picture.dtype == np.uint8 and picture.shape == (2, 3, 3)
    for dtype in (np.uint8, np.int32, np.int64, np.uint64):
        np.testing.assert_array_equal(colours(np.array([7], dtype))[0], picture[0, 1])
    assert (picture[0, 1] == picture[1, 1]).all() and not picture[0, 0].any()
    np.testing.assert_array_equal(colours(np.array([2 ** 63 + 5], np.uint64)),
                                  colours(np.array([2 ** 63 + 5, 1, 0], np.uint64))[:1])
    assert not colours(np.array([False])).any() and colours(np.array([True])).any()


def test_ids_that_follow_each_other_differ_in_colour():
    """Ids are given in the order of place, so neighbours have near ones; no id is lost in black."""
    table = colours(np.arange(1, 3000)).astype(int)
    assert table.max(1).min() > 150
    for step in (1, 2, 3):
        assert np.abs(table[step:] - table[:-step]).max(1).min() > 40, step
    assert len(np.unique(table[:256], axis=0)) == 256


def test_outlines_are_where_labels_meet_and_nothing_is_drawn_outside():
    """Both sides of a border between instances are outlined; the image stays clear where the label is 0."""
    labels = np.random.default_rng(0).integers(0, 4, (6, 7)).repeat(5, 0).repeat(5, 1)
    image = np.full(labels.shape, 0.5, np.float32)
    picture = overlay_labels(image, torch.from_numpy(labels))
    assert picture.dtype == np.uint8 and picture.shape == (*labels.shape, 3)
    assert (picture[labels == 0] == 128).all()
    rim = find_boundaries(labels, connectivity=1, mode="thick") & (labels > 0)
    np.testing.assert_array_equal(picture[rim], colours(labels)[rim])
    inner = (labels > 0) & ~rim
    mixed = 0.6 * 128 + 0.4 * colours(labels)[inner].astype(float)
    np.testing.assert_allclose(picture[inner], mixed, atol=0.51)
    assert (overlay_labels(image[:1, :1], np.array([[0]])) == 128).all()


def test_the_image_shows_through_the_tint():
    """A segmentation is judged by the membranes under it."""
    image = np.linspace(0, 1, 20, dtype=np.float32)[None].repeat(20, 0)
    picture = overlay_labels(image, np.ones((20, 20), int)).astype(int)
    assert (np.diff(picture[5, 1:-1].sum(1)) > 0).all()


def test_classes_have_their_colours_and_what_is_no_class_is_dark():
    """Ignored voxels and the network's spare classes must not look like one of the five."""
    np.testing.assert_array_equal(class_colours(np.arange(5)), CLASS_COLOURS)
    assert not class_colours(np.array([-100, 5, 15])).any()
    assert len(set(CLASS_COLOURS)) == 5


class Reader:
    """A volume that notes what is read of it, and gives blocks alone."""

    def __init__(self, values):
        self.values, self.shape, self.read = values, values.shape, []

    def __getitem__(self, block):
        assert all(isinstance(part, slice) and part.step is None for part in block) and len(block) == 3
        self.read.append(self.values[block].size)
        return self.values[block]


def test_three_sections_are_read_and_nothing_else():
    """The volume may be larger than memory."""
    image = Reader(np.random.default_rng(0).random((20, 60, 40)))
    labels = Reader(np.ones((20, 60, 40), np.uint32))
    orthogonal_slices(image, labels, (30, 6, 6))
    assert image.read == labels.read == [60 * 40, 20 * 40, 20 * 60]


def cuts(picture, shape, spacing):
    """The three sections of the right half of a picture, by the lengths in nm."""
    depth, height, width = lengths = np.array(shape) * spacing
    scale = SIDE / max(lengths[0] + lengths[1], lengths[0] + lengths[2])
    depth, height, width = (round(scale * n) for n in (depth, height, width))
    picture = picture[CAPTION_HEIGHT:, (picture.shape[1] + GAP) // 2:]
    return (picture[:height, :width], picture[height + CAPTION_HEIGHT:, :width], picture[:height, -depth:])


@pytest.mark.parametrize("shape, spacing", [((12, 50, 40), (40, 8, 8)), ((40, 30, 50), (10, 10, 10)),
                                            ((50, 20, 40), (8, 20, 10))])
def test_a_ball_in_nm_is_round_in_all_three_sections(shape, spacing):
    """Sections stand several pixels apart; drawn voxel by voxel a ball would be a lens."""
    spacing = np.array(spacing, float)
    axes = [(np.arange(n) + 0.5 - n / 2) * step for n, step in zip(shape, spacing, strict=True)]
    radius = np.sqrt(sum(axis ** 2 for axis in np.meshgrid(*axes, indexing="ij")))
    labels = (radius < 0.4 * min(np.array(shape) * spacing)).astype(np.uint8)
    picture = orthogonal_slices(np.random.default_rng(0).random(shape), labels, tuple(spacing))
    sizes = []
    for cut in cuts(picture, shape, spacing):
        coloured = ndimage.binary_opening(np.ptp(cut, axis=2) > 20)
        rows, columns = np.flatnonzero(coloured.any(1)), np.flatnonzero(coloured.any(0))
        sizes += [np.ptp(rows) + 1, np.ptp(columns) + 1]
    assert max(sizes) < 1.3 * min(sizes), sizes


def test_sections_lie_on_the_same_axes():
    """x is left to right in the sections of z and y, y top to bottom in those of z and x."""
    labels = np.zeros((30, 40, 50), np.uint8)
    labels[:, :10] = 1                                          # the first rows of y
    labels[:, 10:, :10] = 2
    labels[:5, 10:, 10:] = 3
    picture = orthogonal_slices(np.zeros(labels.shape), labels, (10, 10, 10))
    at_z, at_y, at_x = ((cut.max(2) > 0, cut) for cut in cuts(picture, labels.shape, (10, 10, 10)))
    assert at_z[0][:80].all() and at_z[0][:, :80].all() and not at_z[0][90:, 90:].any()
    assert at_y[0][:, :80].all() and at_y[0][:35].all() and not at_y[0][60:, 100:].any()
    assert at_x[0][:80].all() and at_x[0][:, :35].all() and not at_x[0][90:, 60:].any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 64), (200, 3, 5)])
def test_constant_and_thin_volumes_make_a_picture(shape):
    """A single section, a needle and a volume of one value are no reason to lose a finished segmentation."""
    picture = orthogonal_slices(np.full(shape, 7, np.int16), np.zeros(shape, np.uint32), (30, 6, 6))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and min(picture.shape[:2]) > 20


@pytest.mark.parametrize("shape", [(40, 160, 160), (1, 64, 64), (200, 3, 5)])
def test_every_panel_of_a_volume_has_its_caption_and_none_is_cut(shape, monkeypatch):
    """The width in um stands there once; text neither ends at the picture's edge nor runs into another."""
    drawn, plain = [], ImageDraw.ImageDraw.text

    def text(draw, corner, words, **how):
        left, top, right, bottom = draw.textbbox(corner, words, font=how["font"])
        assert left >= 0 and right <= draw.im.size[0] and bottom <= draw.im.size[1]
        drawn.append((words, top // CAPTION_HEIGHT, left, right))
        plain(draw, corner, words, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    orthogonal_slices(np.zeros(shape), np.zeros(shape, int), (10, 8, 8))
    z, y, x = (n // 2 for n in shape)
    names = [f"y = {y}", f"x = {x}"]
    assert [words for words, *_ in drawn] == [
        f"section {z} of {shape[0]}, {0.008 * shape[2]:.3g} um wide", *names, "segmentation", *names]
    for one, other in combinations(drawn, 2):
        assert one[1] != other[1] or one[3] < other[2] or other[3] < one[2]


def test_bright_specks_do_not_darken_the_picture():
    """One hot pixel would leave the rest black if the range were that of all values."""
    image = np.random.default_rng(0).integers(1000, 1200, (30, 40, 40), dtype=np.uint16)
    image[15, 5, 5] = 65535
    picture = orthogonal_slices(image, np.zeros(image.shape, int), (10, 10, 10))
    assert picture[CAPTION_HEIGHT:CAPTION_HEIGHT + 200, :200].std() > 30


def test_a_predicted_instance_takes_the_colour_of_the_true_one_it_covers():
    """Ids of prediction and truth are unrelated; split parts and false instances get colours of their own."""
    true = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    predicted = np.array([[9, 9, 9, 1, 5, 5, 5, 2]], np.uint32)
    output = renamed(predicted, true)
    assert output[0, :3].tolist() == [1, 1, 1] and output[0, 4:7].tolist() == [2, 2, 2]
    assert len({1, 2, 0, output[0, 3], output[0, 7]}) == 5
    merged = renamed(np.array([[4, 4, 4, 4, 4, 0]]), np.array([[1, 1, 3, 3, 3, 3]]))
    assert merged.tolist() == [[3, 3, 3, 3, 3, 0]]
    assert not renamed(np.zeros((3, 3), int), true[:, :3].repeat(3, 0)).any()


@pytest.mark.parametrize("shape", [(9, 64, 48), (64, 48)])
def test_a_sheet_has_a_row_per_sample_of_volumes_and_of_slices(tmp_path, shape):
    """Tensors as a batch holds them; of a volume the middle section is shown."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(2):
        labels = torch.randint(0, 5, shape, generator=generator)
        rows.append({"image": torch.rand(1, *shape, generator=generator), "classes": labels,
                     "instances": labels.int(), "predicted_classes": labels,
                     "predicted_instances": labels.int()})
    sheet(tmp_path / "all.png", rows)
    sheet(tmp_path / "some.png", [{"image": rows[0]["image"], "predicted_classes": rows[0]["classes"]}])
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("all.png", "some.png")]
    assert pictures[0].shape == (2 * CAPTION_HEIGHT + 2 * 320 + 3 * GAP, 5 * (240 + GAP) - GAP, 3)
    assert pictures[1].shape[0] == 2 * CAPTION_HEIGHT + 320 + 2 * GAP
    middle = rows[0]["classes"][4 if len(shape) == 3 else ...].numpy()
    panel = pictures[0][CAPTION_HEIGHT:CAPTION_HEIGHT + 320, 244:484]
    large = nearest(middle, (320, 240))
    rim = find_boundaries(large, connectivity=1) & (large > 0)
    np.testing.assert_array_equal(panel[rim], class_colours(large)[rim])
    first, second = (pictures[0][CAPTION_HEIGHT:CAPTION_HEIGHT + 320, left:left + 240] for left in (488, 976))
    np.testing.assert_array_equal(first, second)                # equal instances have equal colours


def panels_of(path, number, shape):
    """The panels of a sheet of ``number`` columns with one row, of images [H, W] of at least 320 rows."""
    picture = np.asarray(Image.open(path))[CAPTION_HEIGHT:CAPTION_HEIGHT + shape[0]]
    return [picture[:, (shape[1] + GAP) * k:][:, :shape[1]] for k in range(number)]


def test_a_sheet_shows_a_section_that_has_a_truth(tmp_path):
    """A crop deeper than its volume is mirrored at the end and not annotated there: no picture of that."""
    classes, ids = np.full((16, 320, 320), IGNORE), np.zeros((16, 320, 320), int)
    image = np.zeros(classes.shape, np.float32)
    for z in range(6):
        classes[z], ids[z], image[z] = z % 2 + 1, z + 1, z / 10
    classes[3, :100] = IGNORE
    sheet(tmp_path / "a.png", [{"image": image, "classes": classes, "instances": ids,
                                "predicted_classes": classes, "predicted_instances": ids}])
    shown, true, instances, predicted, found = panels_of(tmp_path / "a.png", 5, (320, 320))
    assert (shown == round(255 * 0.3)).all()                                            # section 3 of 0 to 5
    assert (true[:98] < shown[:98]).all()                                     # not annotated: darker
    assert (np.ptp(true[150:], axis=2) > 0).all() and (np.ptp(instances, axis=2) > 0).all()
    np.testing.assert_array_equal(true, predicted)
    np.testing.assert_array_equal(instances, found)


def test_a_crop_without_any_annotation_is_drawn_all_the_same(tmp_path):
    """A volume of which nobody has looked at a part."""
    empty = torch.full((4, 320, 320), IGNORE)
    sheet(tmp_path / "a.png", [{"image": torch.rand(1, 4, 320, 320), "classes": empty}])
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_legend_names_what_has_no_colour_and_fits():
    """Background is the bare image and what is not annotated is dark: neither would be guessed."""
    picture = legend()
    assert picture.shape[0] == CAPTION_HEIGHT and not picture[:, -10:].any() and picture[:, 500:].any()


@pytest.mark.skipif(not DATA.exists(), reason="the development data are not here")
def test_a_real_volume_is_drawn_from_its_files():
    """HDF5 arrays are such readers; all of a dense segmentation is tinted."""
    with h5py.File(DATA / "fib25_sample2/fib25_inputs.h5") as image, \
            h5py.File(DATA / "fib25_sample2/fib25_labels.h5") as labels:
        picture = orthogonal_slices(image["main"], labels["main"], (10, 10, 10))
    alone = picture[CAPTION_HEIGHT:, :picture.shape[1] // 2 - GAP]
    assert (np.ptp(alone, axis=2) == 0).all()
    for cut in cuts(picture, (150, 200, 200), (10, 10, 10)):
        assert (np.ptp(cut, axis=2) > 0).mean() > 0.99

"""Painted lesions: where they lie, how large and how bright they are, and cords that hardly hold one."""

import cc3d
import numpy as np
import pytest
from scipy import ndimage

from datasets.lesions import draw_ellipses, draw_texture, paint_lesions
from utils.config import UserError

SIDE = 320


def rng(seed=0):
    return np.random.default_rng(seed)


def slice_of(size=96, level=0.3, width=0.25):
    """(image, cord): a vertical cord of one grey with a little noise on a darker ground."""
    columns = np.abs((np.arange(size) + 0.5) / size - 0.5) < width / 2
    cord = np.broadcast_to(columns, (size, size)).copy()
    image = np.where(cord, level, 0.1) + 0.01 * rng(1).standard_normal((size, size))
    return image.clip(0, 1).astype(np.float32), cord


def everywhere(size=SIDE):
    """A cord that fills the slice, so that nothing is clipped but at its border."""
    return np.full((size, size), 0.3, np.float32), np.ones((size, size), bool)


def test_the_lesions_lie_in_the_cord_and_nothing_else_changes():
    """Elsewhere bitwise, blended borders too; the arrays that came in stay as they are."""
    image, cord = slice_of()
    before = image.copy(), cord.copy()
    for seed in range(30):
        painted, lesion = paint_lesions(image, cord, rng(seed))
        assert lesion.any() and not (lesion & ~cord).any() and lesion.dtype == bool
        assert np.array_equal(painted[~cord], image[~cord])
        assert painted.dtype == np.float32 and painted.shape == lesion.shape == image.shape
        assert painted.min() >= 0 and painted.max() <= 1
        assert painted[lesion].mean() > image[lesion].mean() + 0.01
    assert np.array_equal(before[0], image) and np.array_equal(before[1], cord)


def test_the_generator_decides_alone():
    """Of equal generators equal lesions, of others others; numpy's global one plays no part."""
    image, cord = slice_of()
    one, again, other = (paint_lesions(image, cord, rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(one[0], again[0]) and np.array_equal(one[1], again[1])
    assert not np.array_equal(one[1], other[1])


@pytest.mark.parametrize("count", [(1, 3), (2, 2)])
def test_the_number_of_ellipses_is_drawn_from_its_range(count):
    """Each number in it about equally often: small ellipses on a wide cord rarely touch."""
    image, cord = everywhere()
    found = [cc3d.connected_components(paint_lesions(image, cord, rng(seed), count, (2.0, 3.0))[1]).max()
             for seed in range(90)]
    shares = np.bincount(found, minlength=4)[1:] / len(found)
    expected = [1 / 3] * 3 if count == (1, 3) else [0, 1, 0]
    assert shares == pytest.approx(expected, abs=0.17) and sum(shares) == pytest.approx(1)


def test_an_ellipse_has_the_axes_that_were_asked_for():
    """By its moments: the first semi-axis in the range, the second one's share of it in its range."""
    _, cord = everywhere()
    ratios, turns = [], []
    for seed in range(60):
        lesion = draw_ellipses(cord, 1, (12.0, 20.0), (0.6, 1.0), rng(seed))
        places = np.argwhere(lesion)
        if (places == 0).any() or (places == SIDE - 1).any():              # cut by the slice's border
            continue
        values, vectors = np.linalg.eigh(np.cov(places.T))
        short, long = 2 * np.sqrt(values)                    # of an ellipse the variance is a quarter of a^2
        assert 11.8 < long < 20.2 and 0.57 < short / long <= 1
        assert np.pi * short * long == pytest.approx(len(places), rel=0.05)
        ratios.append(short / long)
        turns.append(np.arctan2(*vectors[:, 1]) % np.pi)
    assert min(ratios) < 0.7 and max(ratios) > 0.9
    assert min(turns) < 0.4 and max(turns) > np.pi - 0.4 and np.std(turns) > 0.5


def lengths(size):
    """Of discs of a radius of 16 of 320: largest area, median blended area, and the texture's steps."""
    image, cord = everywhere(size)
    cord[:size // 8] = cord[-size // 8:] = cord[:, :size // 8] = cord[:, -size // 8:] = False
    areas, borders, steps = [], [], []
    for seed in range(12):
        disc = {"count": (1, 1), "flatness": (1.0, 1.0), "grain": 10}
        painted, lesion = paint_lesions(image, cord, rng(seed), **disc, semi_axis=(16, 16), blend=10)
        areas.append(lesion.sum() / size ** 2)
        borders.append((painted > image + 0.05).sum() / size ** 2)
        painted, lesion = paint_lesions(image, cord, rng(seed), **disc, semi_axis=(60, 60), blend=0)
        steps.append(np.abs(ndimage.sobel(painted))[ndimage.binary_erosion(lesion)].mean() * size)
    return np.max(areas), np.median(borders), np.median(steps)


def test_lengths_scale_with_the_slice():
    """Semi-axes, blended border and grain are the same shares of any side."""
    expected = lengths(SIDE)
    assert expected[0] == pytest.approx(np.pi / 400, rel=0.05)
    for size in (64, 160, 640):
        assert lengths(size) == pytest.approx(expected, rel=0.35)


def test_the_intensity_follows_the_cords_median():
    """Without texture and blending it is the median times a factor of the range, one for the slice."""
    levels = []
    for seed in range(60):
        image, cord = slice_of(level=0.3)
        painted, lesion = paint_lesions(image, cord, rng(seed), texture=(1, 1), blend=0)
        assert np.ptp(painted[lesion]) < 1e-5
        levels.append(painted[lesion][0] / np.median(image[cord]))
    assert 1.25 <= min(levels) < 1.35 and 2.1 < max(levels) <= 2.2501
    one, two = (paint_lesions(*slice_of(), rng(0), factor=(value, value))[0].max() for value in (1.3, 2.0))
    assert two > one + 0.1


def test_no_lesion_is_brighter_than_the_ceiling():
    """200 of 255; where the cord is nearly as bright itself its lesions still stand out from it."""
    plain = {"texture": (1, 1), "blend": 0}
    for level, expected in ((0.6, 200 / 255), (0.75, 0.75 * 1.25), (0.9, 1.0)):
        image, cord = np.full((32, 32), level, np.float32), np.ones((32, 32), bool)
        painted, lesion = paint_lesions(image, cord, rng(), factor=(1.25, 2.25), **plain)
        bound = [paint_lesions(image, cord, rng(seed), **plain)[0].max() for seed in range(20)]
        assert max(bound) == pytest.approx(expected, abs=1e-5) and painted[lesion].min() > level
    low = paint_lesions(*slice_of(), rng(), ceiling=0.4, factor=(1.5, 3.0), **plain)
    high = paint_lesions(*slice_of(), rng(), ceiling=1.0, factor=(3.0, 3.0), **plain)
    assert low[0].max() < 0.46 < high[0].max()


def test_the_texture_is_smooth_and_spans_its_range():
    """Neighbouring pixels are alike, more so with a larger grain; a constant range gives no texture."""
    steps = []
    for grain in (0.0, 2.0, 6.0):
        texture = draw_texture((60, 60), (0.75, 1.25), grain, rng())
        assert texture.dtype == np.float32
        assert texture.min() == pytest.approx(0.75) and texture.max() == pytest.approx(1.25)
        steps.append(np.abs(np.diff(texture)).mean())
    assert steps[0] > 3 * steps[1] > 6 * steps[2]
    image, cord = everywhere(96)
    rough, smooth = (paint_lesions(image, cord, rng(), (1, 1), (20.0, 20.0), blend=0, grain=grain)
                     for grain in (0.1, 8.0))
    assert np.array_equal(rough[1], smooth[1])
    inside = ndimage.binary_erosion(rough[1])
    roughness = [np.abs(painted - ndimage.uniform_filter(painted, 3))[inside].mean() for painted, _ in
                 (rough, smooth)]
    assert roughness[0] > 2 * roughness[1]
    assert np.isfinite(draw_texture((1, 1), (0.75, 1.25), 2.0, rng())).all()


def test_the_border_is_blended():
    """By a Gaussian filter of the mask: the share of the lesion is what scipy makes of the whole slice."""
    image, cord = everywhere()
    image[:], cord[:, :40] = 0.3, False
    for blend in (0.0, 1.0, 3.0):
        painted, lesion = paint_lesions(image, cord, rng(2), texture=(1, 1), blend=blend)
        share = ndimage.gaussian_filter(lesion.astype(np.float32), blend) * cord
        level = (painted[lesion].max() - 0.3) / share.max() + 0.3
        np.testing.assert_allclose(painted, image + share * (level - image), atol=1e-5)
        changed = np.abs(painted - image) > 1e-6
        assert (changed & ~lesion).any() == (blend > 0)


def test_a_cord_without_a_pixel_or_without_signal_stays_as_it_is():
    """No lesion can be seen there, so none may be labelled; the image is a copy."""
    image, cord = slice_of()
    for picture, mask in ((image, np.zeros_like(cord)), (np.where(cord, 0, image), cord)):
        painted, lesion = paint_lesions(picture, mask, rng())
        assert np.array_equal(painted, picture) and painted is not picture
        assert lesion.shape == cord.shape and lesion.dtype == bool and not lesion.any()


@pytest.mark.parametrize("place", [(0, 0), (40, 95), (95, 3)])
def test_a_cord_of_one_pixel_is_its_lesion(place):
    """In the corner of the slice too."""
    image, cord = slice_of()
    cord[:] = False
    cord[place] = True
    painted, lesion = paint_lesions(image, cord, rng())
    assert np.array_equal(lesion, cord) and (painted != image).sum() <= 1


def test_a_cord_thinner_than_an_ellipse_clips_it():
    """A line of one pixel, and ellipses of less than a pixel of a small slice: each has a pixel at least."""
    image, cord = slice_of()
    cord[:] = False
    cord[:, 40] = True
    painted, lesion = paint_lesions(image, cord, rng(), (1, 1), (20.0, 20.0))
    assert lesion[:, 40].sum() > 4 and lesion.sum() == lesion[:, 40].sum()
    small = np.full((8, 6), 0.4, np.float32)
    for seed in range(10):
        painted, lesion = paint_lesions(small, np.ones((8, 6), bool), rng(seed))
        assert lesion.any() and np.isfinite(painted).all()
    painted, lesion = paint_lesions(np.full((1, 1), 0.4, np.float32), np.ones((1, 1), bool), rng())
    assert lesion.all() and 0.3 < painted[0, 0] < 1


def test_an_oblong_slice_is_measured_by_its_longer_side():
    """It is what is brought to the size of the slices, the rest being padding."""
    image, cord = everywhere()
    _, whole = paint_lesions(image, cord, rng(), (1, 1), (10.0, 10.0), (1.0, 1.0))
    narrow = image[:, :100], cord[:, :100]
    areas = [paint_lesions(*narrow, rng(seed), (1, 1), (10.0, 10.0), (1.0, 1.0))[1].sum()
             for seed in range(6)]
    assert max(areas) == pytest.approx(whole.sum(), rel=0.1)


@pytest.mark.parametrize("settings", [
    {"count": (0, 2)}, {"count": (3, 1)}, {"semi_axis": (0, 5)}, {"flatness": (1.0, 0.6)},
    {"factor": (-1, 2)}, {"texture": (0, 1)}, {"grain": -1}, {"blend": -1}, {"ceiling": 0}, {"ceiling": 1.5}])
def test_settings_that_make_no_sense_are_refused(settings):
    """With the name of the setting, in one line."""
    with pytest.raises(UserError, match=next(iter(settings))) as error:
        paint_lesions(*slice_of(), rng(), **settings)
    assert "\n" not in str(error.value)


def test_shapes_and_types_that_do_not_fit_are_refused():
    """An integer mask, in which -1 is "unknown", would be read as a cord everywhere."""
    image, cord = slice_of()
    for picture, mask in ((image[None], cord[None]), (image[:, :-1], cord), (image, cord.astype(int) - 1)):
        with pytest.raises(ValueError, match="cord"):
            paint_lesions(picture, mask, rng())


@pytest.mark.parametrize("size", [64, 96, 320])
def test_textures_are_smooth_from_pixel_to_pixel(size):
    """Else a network finds painted lesions of small slices by their checkerboard, and no others."""
    image, cord = everywhere(size)
    likeness = []
    for seed in range(8):
        painted, lesion = paint_lesions(image, cord, rng(seed), count=(1, 1), semi_axis=(40, 40), blend=0)
        inside = ndimage.binary_erosion(lesion)
        likeness.append(np.corrcoef(painted[inside], np.roll(painted, 1, 1)[inside])[0, 1])
    assert np.mean(likeness) > 0.6

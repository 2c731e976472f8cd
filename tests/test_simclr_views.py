"""The two views of contrastive learning: distributions, torchvision's operations, independence of images."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from datasets.simclr_views import DRAWS, SimCLRViews, change_colours, crop_resize, draw_uniform, gaussian_blur
from utils.config import UserError

SEEDS = range(10 ** 12, 10 ** 12 + 3000)
OFF = {"flip": 0, "jitter": 0, "grayscale": 0, "blur": 0}
ON = {"flip": 1, "jitter": 1, "grayscale": 0, "blur": 1}


def photos(n=3, height=40, width=52, seed=0):
    """Smooth coloured uint8 images [n, 3, H, W]: noise that is enlarged."""
    noise = torch.rand(n, 3, 6, 7, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)).byte()


def draws_of(shape=(4000, 4000), seeds=SEEDS, view=0, **settings):
    """What is drawn for one of the views of len(seeds) images of that shape."""
    uniform = np.split(draw_uniform(seeds, 2 * DRAWS), 2, axis=1)[view]
    return SimCLRViews(32, **settings).draw(uniform, [shape] * len(seeds))


def uniform(values, low, high):
    """p-value of values being uniform within low and high."""
    return stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue


@pytest.mark.parametrize("view", [0, 1])
def test_factors_are_uniform_and_parts_as_probable_as_asked(view):
    """Of both views, over many images; p-values of true hypotheses, so 1e-3 is rarely missed, and seeded."""
    draws = draws_of(view=view, ratio=(1, 1))
    jittered = draws["brightness"] != 1
    for name in ("brightness", "contrast", "saturation"):
        values = draws[name][jittered & (draws[name] > 0)]
        assert uniform(values, 0.2, 1.8) > 1e-3, name
    assert uniform(draws["hue"][jittered], -0.2, 0.2) > 1e-3
    assert uniform(draws["sigma"][draws["sigma"] > 0], 0.1, 2.0) > 1e-3
    assert (draws["hue"][~jittered] == 0).all() and (draws["contrast"][~jittered] == 1).all()
    for happens, probability in ((draws["flip"], 0.5), (jittered, 0.8), (draws["saturation"] == 0, 0.2),
                                 (draws["sigma"] > 0, 0.5)):
        assert stats.binomtest(int(happens.sum()), len(SEEDS), probability).pvalue > 1e-3


def test_crops_are_uniform_in_area_and_in_the_logarithm_of_their_ratio():
    """Where every crop fits; their places are uniform too."""
    top, left, height, width = draws_of(scale=(0.2, 0.7))["boxes"].T
    assert uniform(height * width / 4000 ** 2, 0.2, 0.7) > 1e-3
    assert uniform(np.log(width / height), np.log(3 / 4), np.log(4 / 3)) > 1e-3
    for place, side in ((top, height), (left, width)):
        assert uniform(place / (4000 - side), 0, 1) > 1e-3


@pytest.mark.parametrize("shape", [(200, 200), (300, 100), (64, 500)])
def test_crops_that_do_not_fit_are_drawn_again_as_torchvision_does(shape):
    """Same distributions of area and ratio, also of elongated images, where few crops fit."""
    top, left, height, width = draws_of(shape)["boxes"].T
    assert (top >= 0).all() and (top + height <= shape[0]).all() and (left + width <= shape[1]).all()
    peer = v2.RandomResizedCrop(32, scale=(0.2, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [peer.make_params([torch.empty(3, *shape)]) for _ in range(len(SEEDS))]
    their_h, their_w = np.array([(crop["height"], crop["width"]) for crop in theirs]).T
    assert stats.ks_2samp(height * width, their_h * their_w).pvalue > 1e-3
    assert stats.ks_2samp(width / height, their_w / their_h).pvalue > 1e-3


def test_draws_of_parts_views_and_neighbouring_seeds_are_unrelated():
    """No part follows another, the views do not follow each other, nor images of neighbouring seeds."""
    columns = draw_uniform(SEEDS, 2 * DRAWS)
    columns = np.c_[columns, np.roll(columns, 1, axis=0)]
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(len(SEEDS))


def test_crop_and_resize_is_torchvisions():
    """To the bit, from uint8, mirrored where asked, and of images of different sizes."""
    images = [*photos(2), *photos(1, 90, 31)]
    boxes = np.array([[3, 5, 30, 20], [0, 0, 40, 52], [60, 1, 7, 30]])
    views = crop_resize(images, boxes, np.array([False, True, False]), 24)
    for i, (image, box) in enumerate(zip(images, boxes.tolist(), strict=True)):
        expected = TF.resized_crop(image, *box, size=[24, 24], antialias=True)
        assert torch.equal(views[i], (TF.hflip(expected) if i == 1 else expected).float())


@pytest.mark.parametrize("name, factors", [("brightness", (0.3, 1.7)), ("contrast", (0.2, 1.8)),
                                           ("saturation", (0.0, 1.8))])
def test_each_change_of_colour_is_torchvisions(name, factors):
    """Each alone, clipping included, each image by its own factor."""
    images = photos(2) / 255
    settings = dict.fromkeys(("brightness", "contrast", "saturation"), np.ones(2)) | {"hue": np.zeros(2)}
    ours = change_colours(images, 1, **settings | {name: np.array(factors)})
    for image, view, factor in zip(images, ours, factors, strict=True):
        torch.testing.assert_close(view, getattr(TF, f"adjust_{name}")(image, factor), atol=3e-4, rtol=0)


def test_grayscale_is_torchvisions():
    """Weights of three digits instead of four: a difference of 1e-4."""
    images = photos(1)
    view = SimCLRViews(40, scale=(1, 1), ratio=(1.3, 1.3), **OFF | {"grayscale": 1})(images, [5])[0]
    crop = TF.resize(images, [40, 40], antialias=True)
    torch.testing.assert_close(view, TF.rgb_to_grayscale(crop / 255, 3), atol=3e-4, rtol=0)


@pytest.mark.parametrize("order", [("brightness", "contrast", "saturation"),
                                   ("saturation", "contrast", "brightness"),
                                   ("contrast", "saturation", "brightness")])
def test_changes_of_colour_commute(order):
    """Where nothing is clipped torchvision's give the same in every order: none needs to be drawn."""
    images = 0.4 + 0.2 * photos(1) / 255
    factors = {"brightness": 1.2, "contrast": 0.7, "saturation": 1.5}
    expected = images[0]
    for name in order:
        expected = getattr(TF, f"adjust_{name}")(expected, factors[name])
    ours = change_colours(images, 1, **{name: np.array([value]) for name, value in factors.items()},
                          hue=np.zeros(1))
    torch.testing.assert_close(ours[0], expected, atol=3e-4, rtol=0)


def test_hue_turns_colours_and_keeps_luma():
    """The turn is the one that was asked for, in HSV's direction; grays stay, and a whole turn is none."""
    images, one = 0.45 + 0.1 * photos(1) / 255, np.ones(1)

    def turned(images, hue):
        return change_colours(images, 1, one, one, one, np.array([hue]))

    torch.testing.assert_close(turned(images, 0.0), images)
    torch.testing.assert_close(turned(images, 1.0), images)
    torch.testing.assert_close(turned(turned(images, 0.13), 0.2), turned(images, 0.33))
    for hue in (-1 / 3, 0.1, 1 / 3):
        view = turned(images, hue)
        torch.testing.assert_close(TF.rgb_to_grayscale(view), TF.rgb_to_grayscale(images), atol=2e-4, rtol=0)
        theirs = TF.adjust_hue(images.clone(), hue if abs(hue) < 0.5 else 0)
        chroma = [(x - TF.rgb_to_grayscale(x)).flatten() for x in (view, theirs)]
        assert torch.corrcoef(torch.stack(chroma))[0, 1] > 0.85
    gray = images.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    torch.testing.assert_close(turned(gray, 0.2), gray)


def test_blur_is_torchvisions():
    """Each image by its own deviation, mirrored at its borders; deviation 0 leaves the image's bits."""
    images = photos(3, 40, 40) / 255
    before, sigma = images.clone(), np.array([0.7, 0.0, 2.0])
    after = gaussian_blur(images, sigma, 2.0)
    assert torch.equal(after[1], before[1])
    for i in (0, 2):
        torch.testing.assert_close(after[i], TF.gaussian_blur(before[i], [13, 13], [sigma[i]] * 2))


def test_the_widest_gaussian_is_cut_where_little_is_left():
    """What is cut off is below 1 % of its weight."""
    radius = 6
    weights = stats.norm(scale=2.0).cdf(radius + 0.5) - stats.norm(scale=2.0).cdf(-radius - 0.5)
    assert weights > 0.99
    spike = torch.zeros(1, 1, 33, 33)
    spike[..., 16, 16] = 1
    assert int((gaussian_blur(spike, np.array([2.0]), 2.0)[0, 0, 16] > 0).sum()) == 2 * radius + 1


def test_views_do_not_depend_on_the_rest_of_the_batch():
    """An image and its seed give its views, in any batch and place, given as a batch or in a list."""
    images, views = photos(5), SimCLRViews(24)
    whole = views(images, [11, 12, 13, 14, 15])
    part = views([images[3], photos(1, 30, 30)[0], images[1]], torch.tensor([14, 99, 12]))
    for one, two in zip(whole, part, strict=True):
        torch.testing.assert_close(one[[3, 1]], two[[0, 2]], atol=1e-6, rtol=0)


def test_equal_seeds_give_equal_views_and_nothing_else_is_disturbed():
    """The two views of an image differ, so do two images' draws; torch's and numpy's generators stay."""
    images, views = photos(1).expand(3, -1, -1, -1), SimCLRViews(24)
    torch.manual_seed(1), np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = views(images, [7, 7, 2 ** 62 + 7])
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    torch.manual_seed(2), np.random.seed(2)
    again = views(images, [7, 7, 2 ** 62 + 7])
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    torch.testing.assert_close(first[0], first[1], atol=1e-6, rtol=0)
    assert not torch.allclose(first[0], first[2], atol=0.01)
    assert not torch.allclose(first[0], second[0], atol=0.01)


def test_views_lie_within_0_and_1():
    """Of black and white noise with the strongest changes, and of images of one pixel."""
    noise = 255 * torch.randint(0, 2, (8, 3, 32, 32), dtype=torch.uint8)
    for images in (noise, [*noise[:3], torch.full((3, 1, 1), 255, dtype=torch.uint8), noise[0, :, :1]]):
        for view in SimCLRViews(24, **ON)(images, range(len(images))):
            assert view.dtype == torch.float32 and view.shape == (len(images), 3, 24, 24)
            assert view.is_contiguous() and view.min() >= 0 and view.max() <= 1


def test_float_images_give_what_uint8_gives():
    """But for the rounding of the resized uint8, which the strongest contrast and brightness enlarge."""
    images = photos(4)
    for one, two in zip(SimCLRViews(24)(images, range(4)), SimCLRViews(24)(images / 255, range(4)),
                        strict=True):
        torch.testing.assert_close(one, two, atol=0.02, rtol=0)


def test_views_are_float32_under_autocast():
    """Rounded to bfloat16 they would lose the steps of uint8."""
    images, views = photos(2), SimCLRViews(24, **ON)
    with torch.autocast("cpu", torch.bfloat16):
        under = views(images, [1, 2])
    assert torch.equal(torch.cat(under), torch.cat(views(images, [1, 2])))


@pytest.mark.parametrize("base, change", [
    (OFF, {"flip": 1}), (OFF, {"jitter": 1}), (OFF, {"grayscale": 1}), (OFF, {"blur": 1}),
    (OFF, {"scale": (0.9, 1.0)}), (OFF, {"ratio": (1, 1)}), (ON, {"brightness": 0}), (ON, {"contrast": 0}),
    (ON, {"saturation": 0}), (ON, {"hue": 0}), (ON, {"sigma": (2.0, 2.0)})])
def test_every_setting_has_an_effect_and_leaves_the_other_draws(base, change):
    """An option that does nothing, or that shuffles what other options do, would mislead a comparison."""
    images = photos(4)
    one, two = (torch.cat(SimCLRViews(24, **settings)(images, range(4)))
                for settings in (base, base | change))
    assert not torch.allclose(one, two, atol=0.01)
    before, after = draws_of(seeds=range(50), **base), draws_of(seeds=range(50), **base | change)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    (name,) = change
    allowed = {"jitter": {"brightness", "contrast", "saturation", "hue"}, "grayscale": {"saturation"},
               "blur": {"sigma"}, "scale": {"boxes"}, "ratio": {"boxes"}}.get(name, {name})
    assert changed == allowed


def test_the_size_is_that_of_the_views():
    """Whatever the size of the images."""
    assert SimCLRViews(17)(photos(2), [1, 2])[1].shape == (2, 3, 17, 17)


@pytest.mark.parametrize("settings", [
    {"flip": 1.1}, {"jitter": -0.1}, {"grayscale": float("nan")}, {"blur": 2}, {"brightness": -1},
    {"hue": 0.6}, {"scale": (0.5, 1.5)}, {"scale": (0, 1)}, {"ratio": (2, 1)}, {"sigma": (0, 1)}])
def test_settings_that_make_no_sense_are_refused(settings):
    """With the name of the setting, in one line."""
    with pytest.raises(UserError, match=next(iter(settings))) as error:
        SimCLRViews(24, **settings)
    assert "\n" not in str(error.value)

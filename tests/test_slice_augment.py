"""Augmentation of slices: masks move as their images do, every part acts and alone, draws are per image."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage, stats
from torchvision.transforms.v2 import functional as TF

from datasets import slice_augment
from datasets.em_augment import bending
from datasets.slice_augment import CHANGES, MOVES, OFF, PARTS, SEVERITIES, SIDE, SliceAugment, affine_maps
from utils.config import UserError

SIZE = 64
COLOURS = tuple(CHANGES)


def slices(n=4, size=SIZE, seed=0):
    """(images, masks): smooth grey noise in [0.2, 0.8], masks of classes 0 to 2 with an unknown margin."""
    noise = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    images = F.interpolate(noise, (size, size), mode="bicubic").clamp(0, 1) * 0.6 + 0.2
    masks = (images[:, 0] > 0.45).long() + (images[:, 0] > 0.6)
    masks[:, :, -3:] = -1
    return images, masks


def augment(images, masks=None, seeds=None, severity="none", **settings):
    seeds = range(len(images)) if seeds is None else seeds
    return SliceAugment(severity, images.shape[-1], **settings)(images, masks, seeds)


def ramps(n, size=SIZE):
    """Images [n, 1, S, S] that rise along a side, and masks that number its pixels: x then y."""
    places = torch.arange(size).expand(n, size, size)
    for masks in (places, places.mT):
        yield (masks[:, None] + 0.5).float() / size, masks.contiguous()


def follow(**settings):
    """Whether moved masks number the pixels next to where the images were sampled, and how many moved."""
    moved_pixels = 0
    for images, masks in ramps(6):
        moved, numbers = augment(images, masks, **settings)
        whole = augment(torch.ones_like(images), **settings)[0][:, 0] > 1 - 1e-6   # no outside mixed in
        assert whole.float().mean() > 0.4 and (numbers[whole] >= 0).all()
        # The image says where it was sampled; no pixel is nearer than one within half a pixel.
        assert ((moved[:, 0] * SIZE - 0.5 - numbers).abs()[whole] <= 0.5 + 1e-3).all()
        moved_pixels += int((numbers != masks)[whole].sum())
    return moved_pixels


@pytest.mark.parametrize("part", MOVES)
def test_a_mask_moves_exactly_as_its_image(part):
    """The nearest pixel's number is never farther than half a pixel from where the image was sampled."""
    assert follow(**{part: 1.0, "stretch": 0.6, "optical_amount": 0.3, "elastic_alpha": 900.0}) > 1000


def test_all_moves_together_are_one_resampling(monkeypatch):
    """A second one would blur the image and widen the error of the mask: half a pixel remains the bound."""
    assert follow(**dict.fromkeys(MOVES, 1.0)) > 1000
    calls, resample = [], F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda *args, **more: calls.append(1) or resample(*args, **more))
    augment(*slices(), **dict.fromkeys(MOVES, 1.0))
    assert len(calls) == 2                                             # of images and of masks


def test_an_image_that_is_its_mask_stays_its_mask():
    """All over the slice, for heavy geometry: where the image is whole, the mask is the same class."""
    masks = (slices(40)[1] > 0).long()
    heavy = {part: SEVERITIES["heavy"].get(part, 0.5) for part in MOVES}
    moved, numbers = augment(masks[:, None].float(), masks, **heavy)
    inside = numbers >= 0
    assert (numbers[inside] == 1)[moved[:, 0][inside] > 0.999].all()
    assert (numbers[inside] == 0)[moved[:, 0][inside] < 0.001].all()
    away = (moved[:, 0] > 0.5) != (numbers == 1)
    assert away.float().mean() < 0.02 and (moved[:, 0][~inside] <= 0.5).all()


def test_what_comes_from_outside_is_black_and_unknown():
    """As the padding of a slice that is no square: neither image nor label is invented."""
    images, masks = torch.full((8, 1, SIZE, SIZE), 0.7), torch.ones(8, SIZE, SIZE, dtype=torch.int64)
    moved, known = augment(images, masks, rotate=1.0)
    outside = known == -1
    assert 0.02 < outside.float().mean() < 0.4 and set(known.unique().tolist()) == {-1, 1}
    moved = moved[:, 0] / 0.7                                          # the share of the slice in each pixel
    assert (moved[outside] <= 0.5 + 1e-3).all() and (moved[~outside] >= 0.25 - 1e-3).all()
    assert ((moved == 0) == outside).float().mean() > 0.95 and ((moved - 1).abs() < 1e-5).float().mean() > 0.6
    _, kept = augment(images, masks - 2, rotate=1.0)
    assert (kept == -1).all()                                          # unknown stays unknown


@pytest.mark.parametrize("part", [*MOVES, *COLOURS])
def test_each_part_acts_and_alone(part):
    """One that does nothing would mislead a comparison; only those that move an image move its mask."""
    images, masks = slices(6)
    settings = {part: 1.0, "sigma": (4.0, 10.0)}
    changed, moved = augment(images, masks, **settings)
    assert ((changed - images).abs().amax((1, 2, 3)) > 2e-3).sum() >= 4
    assert torch.equal(moved, masks) == (part not in MOVES)
    alone = augment(images, **settings)                                # also without masks
    assert torch.equal(changed, alone[0]) and alone[1] is None


@pytest.mark.parametrize("part", [*MOVES, *COLOURS])
@pytest.mark.parametrize("size", [1, 2, 17, 40])
def test_shapes_types_and_ranges_stay(part, size):
    """Tiny slices and images that touch 0 and 1; masks hold old values or -1; the originals stay."""
    images, masks = slices(3, size)
    images = (3 * images - 1).clamp(0, 1)
    before = images.clone(), masks.clone()
    changed, moved = augment(images, masks, **{part: 1.0})
    assert changed.shape == images.shape and changed.dtype == torch.float32 and changed.isfinite().all()
    assert changed.min() >= 0 and changed.max() <= 1
    assert moved.dtype == torch.int64 and set(moved.unique().tolist()) <= {-1, 0, 1, 2}
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])


def test_none_changes_nothing():
    """Bitwise, in tensors of their own; so does every part of probability 0."""
    images, masks = slices()
    changed, moved = augment(images, masks)
    assert torch.equal(changed, images) and torch.equal(moved, masks)
    assert changed.data_ptr() != images.data_ptr() and moved.data_ptr() != masks.data_ptr()
    off = dict.fromkeys((*MOVES, *COLOURS), 0.0)
    assert torch.equal(augment(images, masks, severity="heavy", **off)[0], images)


def test_an_image_depends_on_its_seed_alone():
    """Not on its neighbours, on torch's or numpy's generators, or on masks."""
    images, masks = slices(12)
    everything = dict.fromkeys((*MOVES, *COLOURS), 0.7)
    seeds = torch.arange(12) * 2 ** 57 + 3
    whole, numbers = augment(images, masks, seeds, **everything)
    torch.manual_seed(1)
    np.random.seed(1)
    for i in (0, 5, 11):
        one, mask = augment(images[i:i + 1], masks[i:i + 1], seeds[i:i + 1], **everything)
        torch.testing.assert_close(one[0], whole[i], atol=1e-5, rtol=0)
        assert torch.equal(mask[0], numbers[i])
    same = augment(images[:1].expand(12, -1, -1, -1), None, seeds, **everything)[0]
    distance = (same[:, None] - same[None]).abs().amax((2, 3, 4)) + torch.eye(12)
    assert distance.min() > 0.01                                       # all 64 bits of a seed count


@pytest.mark.parametrize("base, change", [
    ({"crop": 1}, {"crop_side": 0.6}), ({"rotate": 1}, {"rotate_angle": 5.0}),
    ({"affine": 1}, {"shift": 0.3}), ({"affine": 1}, {"scale": 0.5}), ({"affine": 1}, {"angle": 60.0}),
    ({"elastic": 1}, {"elastic_alpha": 2000.0}), ({"elastic": 1}, {"elastic_sigma": 60.0}),
    ({"grid": 1}, {"stretch": 0.8}), ({"optical": 1}, {"optical_amount": 0.4}),
    ({"bias": 1}, {"bias_coefficients": (0.1, 5.0)}), ({"bias": 1}, {"bias_range": (0.4, 0.9)}),
    ({"gamma": 1}, {"gamma_range": (2.0, 3.0)}), ({"multiply": 1}, {"multiply_range": (0.4, 0.5)}),
    ({"jitter": 1}, {"brightness": 0.0}), ({"jitter": 1}, {"contrast": 0.9}),
    ({"blur": 1}, {"sigma": (8.0, 9.0)}), ({"noise": 1}, {"noise_variance": (500.0, 600.0)}),
    ({"holes": 1}, {"hole_count": (9, 9)}), ({"holes": 1}, {"hole_side": (60.0, 90.0)})])
def test_every_setting_has_an_effect(base, change):
    """An option that does nothing would mislead a comparison."""
    images, _ = slices(6)
    one, two = (augment(images, **settings)[0] for settings in (base, base | change))
    assert ((one - two).abs().amax((1, 2, 3)) > 5e-3).sum() >= 4


def test_every_setting_is_tested():
    """Parts by their own test, amounts by the one above; a new name must come with a test."""
    marks = test_every_setting_has_an_effect.pytestmark[0].args[1]
    changed = {name for _, change in marks for name in change}
    assert changed | set(MOVES) | set(COLOURS) == set(OFF)
    assert set(SEVERITIES["heavy"]) | {"rotate"} == set(MOVES) | set(COLOURS)
    assert all(settings.keys() <= OFF.keys() for settings in SEVERITIES.values())


@pytest.mark.parametrize("word", ["light", "heavy"])
def test_parts_are_as_probable_as_the_severity_says(word):
    """Of 600 images, within four standard deviations; each part by itself."""
    image = slices(1, 24)[0].expand(600, -1, -1, -1)
    for part in (*MOVES, *COLOURS):
        chance = SEVERITIES[word].get(part, 0.0)
        settings = dict.fromkeys(set(MOVES + COLOURS) - {part}, 0.0)
        changed = augment(image, severity=word, elastic_alpha=1e4, sigma=(20.0, 30.0), **settings)[0]
        count = int(((changed - image).abs().amax((1, 2, 3)) > 1e-4).sum())
        assert abs(count - 600 * chance) <= 4 * math.sqrt(600 * chance * (1 - chance)), part


def maps(part, n=200, **settings):
    """Affine maps of one part alone, from n seeds: float64 [n, 2, 3]."""
    draws = dict(zip(PARTS, slice_augment.draw_uniform(range(n), len(PARTS)).T, strict=True))
    happens = {name: np.full(n, name == part) for name in MOVES}
    return affine_maps(draws, happens, OFF | settings)


def test_the_flip_is_a_mirror():
    """Left and right, of image and mask."""
    images, masks = slices()
    changed, moved = augment(images, masks, flip=1.0)
    torch.testing.assert_close(changed, images.flip(-1), atol=1e-4, rtol=0)
    assert torch.equal(moved, masks.flip(-1))


def test_rotations_are_torchvisions_and_uniform():
    """Counterclockwise by angles anywhere within +- 90 degrees, sizes kept."""
    images, _ = slices(6)
    turns = maps("rotate")
    angles = np.rad2deg(np.arctan2(turns[:, 1, 0], turns[:, 0, 0]))
    assert stats.kstest(angles, stats.uniform(-90, 180).cdf).pvalue > 1e-3
    np.testing.assert_allclose(np.linalg.det(turns[:, :, :2]), 1, atol=1e-12)
    changed = augment(images, rotate=1.0)[0]
    inner = slice(20, 44)
    for image, result, angle in zip(images, changed, angles, strict=False):
        theirs = TF.rotate(image, angle, interpolation=TF.InterpolationMode.BILINEAR)
        torch.testing.assert_close(result[:, inner, inner], theirs[:, inner, inner], atol=0.02, rtol=0)


def test_the_affine_part_shifts_scales_and_turns_within_its_limits():
    """Uniformly, as torchvision's affine with the same amounts does."""
    moved = maps("affine", 400)
    angles = np.rad2deg(np.arctan2(moved[:, 1, 0], moved[:, 0, 0]))
    larger = 1 / np.sqrt(np.linalg.det(moved[:, :, :2]))
    for values, limit, middle in ((angles, 15, 0), (larger, 0.1, 1), (moved[:, 0, 2] / 2, 0.0625, 0),
                                  (moved[:, 1, 2] / 2, 0.0625, 0)):
        assert stats.kstest(values, stats.uniform(middle - limit, 2 * limit).cdf).pvalue > 1e-3
    images, inner = slices(6)[0], slice(20, 44)
    changed = augment(images, affine=1.0)[0]
    for image, result, one, zoom, turn in zip(images, changed, moved, larger, angles, strict=False):
        pixels = -np.linalg.inv(one[:, :2]) @ one[:, 2] * SIZE / 2
        theirs = TF.affine(image, -float(turn), [0, 0], float(zoom), [0.0, 0.0],
                           interpolation=TF.InterpolationMode.BILINEAR)
        theirs = torch.from_numpy(ndimage.shift(theirs[0].numpy(), pixels[::-1], order=1))
        torch.testing.assert_close(result[0, inner, inner], theirs[inner, inner], atol=0.03, rtol=0)


def test_the_crop_is_a_square_within_the_slice():
    """Anywhere in it, of the same share of the side, enlarged to the whole: no outside, nothing unknown."""
    boxes = maps("crop", 400, crop_side=0.75)
    np.testing.assert_allclose(boxes[:, :, :2], np.broadcast_to(0.75 * np.eye(2), (400, 2, 2)))
    for axis in (0, 1):
        assert stats.kstest(boxes[:, axis, 2], stats.uniform(-0.25, 0.5).cdf).pvalue > 1e-3
    images, masks = slices()
    changed, moved = augment(images, (masks >= 0).long(), crop=1.0, crop_side=0.75)
    assert moved.min() >= 0
    for image, result, box in zip(images, changed, boxes, strict=False):
        left, top = (SIZE * (box[:, 2] + 1 - 0.75) / 2)
        y, x = (start + 0.75 * (np.arange(SIZE) + 0.5) - 0.5 for start in (top, left))
        naive = ndimage.map_coordinates(image[0].numpy(), np.meshgrid(y, x, indexing="ij"), order=1)
        inner = slice(2, -2)
        np.testing.assert_allclose(result[0].numpy()[inner, inner], naive[inner, inner], atol=1e-3)


def test_several_affine_parts_are_done_one_after_another():
    """Moved and turned, mirrored, then the slice of it that the crop takes: as the product of their maps."""
    def whole(part):
        return np.concatenate([maps(part, 20), np.broadcast_to([[[0, 0, 1]]], (20, 1, 3))], 1)

    together = {name: np.full(20, name in ("crop", "flip", "rotate")) for name in MOVES}
    draws = dict(zip(PARTS, slice_augment.draw_uniform(range(20), len(PARTS)).T, strict=True))
    expected = whole("crop") @ whole("flip") @ whole("rotate")
    np.testing.assert_allclose(affine_maps(draws, together, OFF), expected[:, :2], atol=1e-12)


def test_elastic_displacements_are_those_of_bending():
    """In pixels of the slice, rows and columns not swapped, scaled with its side; folding nothing."""
    size, scale = 96, 96 / SIDE
    x, y = (augment(images, seeds=[7], elastic=1.0)[0][0, 0].numpy() * size - 0.5
            for images, _ in ramps(1, size))
    offsets = bending((1, size, size), (1, 1, 1), OFF["elastic_alpha"] * scale ** 2,
                      OFF["elastic_sigma"] * scale, slice_augment.generator(7, 0))[:, 0]
    inner = slice(8, -8)
    places = np.arange(size)
    np.testing.assert_allclose((y - places[:, None])[inner, inner], offsets[0][inner, inner], atol=1e-3)
    np.testing.assert_allclose((x - places)[inner, inner], offsets[1][inner, inner], atol=1e-3)
    moved = [bending((1, side, side), (1, 1, 1), 300 * (side / SIDE) ** 2, 20 * side / SIDE,
                     np.random.default_rng(0)).std() / side for side in (160, 320)]
    assert moved[0] == pytest.approx(moved[1], rel=0.2) and SIDE * moved[1] == pytest.approx(2.4, rel=0.2)
    assert np.diff(y[inner, inner], axis=0).min() > 0 and np.diff(x[inner, inner], axis=1).min() > 0


def test_the_grid_stretches_rows_and_columns_on_their_own():
    """A place's column depends on the column alone; places stay in order and the borders at the border."""
    (columns, _), (rows, _) = ramps(5)
    x = augment(columns, grid=1.0)[0][:, 0] * SIZE - 0.5
    y = augment(rows, grid=1.0)[0][:, 0] * SIZE - 0.5
    inner = slice(1, -1)
    torch.testing.assert_close(x[:, 2, inner], x[:, -3, inner])
    torch.testing.assert_close(y[:, inner, 2], y[:, inner, -3])
    steps = x[:, 2, 2:-2].diff()
    assert steps.min() > 0.5 and steps.max() < 2.0 and (steps - 1).abs().max() > 0.1
    assert not torch.allclose(x[0, 2], x[1, 2], atol=0.5)


def test_optical_distortion_moves_along_the_radius():
    """By k r^2 of it, with k of either sign: the middle stays and the angle too."""
    size = 65
    (columns, _), (rows, _) = ramps(40, size)
    x, y = (2 * augment(images, optical=1.0, optical_amount=0.2)[0][:, 0] - 1 for images in (columns, rows))
    places = (2 * torch.arange(size) + 1) / size - 1
    inner = slice(12, -12)
    x, y, left = x[:, inner, inner], y[:, inner, inner], places[inner]
    cross = x * left[:, None] - y * left
    assert cross.abs().max() < 1e-4                                    # (x, y) beside its own place
    square = left.square() + left.square()[:, None]
    k = ((x / left - 1) / square)[:, 3, 3]
    torch.testing.assert_close(x, left * (1 + k[:, None, None] * square), atol=1e-4, rtol=0)
    assert k.min() < -0.1 and k.max() > 0.1 and k.abs().max() <= 0.2 + 1e-3


def test_the_bias_field_is_a_cubic_that_spans_its_range():
    """Exactly: fitted by the ten monomials nothing is left; brightest in any corner."""
    images = torch.full((40, 1, SIZE, SIZE), 0.5)
    fields = augment(images, bias=1.0)[0][:, 0] / 0.5
    torch.testing.assert_close(fields.amin((1, 2)), torch.full((40,), 0.8))
    torch.testing.assert_close(fields.amax((1, 2)), torch.full((40,), 1.2))
    places = (2 * np.arange(SIZE) + 1) / SIZE - 1
    monomials = [np.outer(places ** i, places ** j).ravel() for i in range(4) for j in range(4 - i)]
    basis, fields = np.stack(monomials, 1), fields.flatten(1).double().numpy().T
    fit, *_ = np.linalg.lstsq(basis, fields, rcond=None)
    np.testing.assert_allclose(basis @ fit, fields, atol=1e-4)
    corners = {int(place) for place in fields.argmax(0)}
    assert len(corners & {0, SIZE - 1, SIZE * (SIZE - 1), SIZE ** 2 - 1}) == 4
    ratios = np.abs(fit[1:] / np.abs(fit[1:]).max(0))                  # all scaled alike
    assert ratios.min() > 0.3 / 0.7 - 1e-3


def test_gamma_factor_and_contrast_are_the_formulas():
    """The same exponent, factor, contrast and brightness all over an image, spread over their ranges."""
    images = slices(60)[0]
    gamma = augment(images, gamma=1.0)[0].log() / images.log()
    factor = augment(images, multiply=1.0)[0] / images
    for values, low, high in ((gamma, 0.7, 1.5), (factor, 0.85, 1.15)):
        values = values.flatten(1).double()
        assert values.std(1).max() < 1e-3
        assert stats.kstest(values.mean(1).numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3
    changed = augment(images, jitter=1.0)[0].flatten(1)
    plain, brightness, contrast = images.flatten(1), [], []
    for one, other in zip(plain, changed, strict=True):
        whole = (other > 0) & (other < 1)
        slope, offset = np.polyfit(one[whole].double(), other[whole].double(), 1)
        torch.testing.assert_close(other[whole], slope * one[whole] + offset, atol=1e-4, rtol=0)
        contrast.append(slope - 1)
        brightness.append(slope * one.mean().item() + offset - one.mean().item())
    for values in (contrast, brightness):
        assert stats.kstest(values, stats.uniform(-0.2, 0.4).cdf).pvalue > 1e-3


def test_blur_is_scipys_gaussian():
    """Of a standard deviation in pixels of a slice of 320, scaled with the side."""
    images = slices(1, 160)[0] + 0.1 * torch.rand(1, 1, 160, 160)
    for sigma in (2.0, 6.0):
        blurred = augment(images, blur=1.0, sigma=(sigma, sigma))[0]
        theirs = ndimage.gaussian_filter(images[0, 0].numpy(), sigma / 2, mode="mirror",
                                         radius=math.ceil(1.5 * sigma))
        np.testing.assert_allclose(blurred[0, 0].numpy(), theirs, atol=2e-3)


def test_noise_is_white_and_of_the_variance_that_was_asked_for():
    """In grey levels of 255; another field for each seed, and one that no other draw repeats."""
    images = torch.full((80, 1, SIZE, SIZE), 0.5)
    noise = (augment(images, noise=1.0)[0] - 0.5)[:, 0] * 255
    variance = noise.double().var((1, 2))
    assert 9 < variance.min() < 15 and 45 < variance.max() < 55
    assert stats.kstest(variance.numpy(), stats.uniform(10, 40).cdf).pvalue > 1e-3
    flat = noise.flatten(1) / noise.flatten(1).norm(dim=1, keepdim=True)
    assert (flat @ flat.T - torch.eye(80)).abs().max() < 0.1
    neighbours = (noise[:, :, 1:] * noise[:, :, :-1]).mean() / noise.square().mean()
    assert abs(neighbours) < 0.01
    assert stats.kstest((noise[0] / noise[0].std()).flatten().numpy(), "norm").pvalue > 1e-3


def test_holes_are_as_many_and_as_large_as_asked_and_spare_the_mask():
    """Black rectangles within the slice; the mask says what they hide."""
    images, masks = torch.ones(80, 1, 160, 160), torch.ones(80, 160, 160, dtype=torch.int64)
    holed, kept = augment(images, masks, holes=1.0)
    assert torch.equal(kept, masks) and set(holed.unique().tolist()) == {0, 1}
    areas = (holed == 0).sum((1, 2, 3))
    assert areas.min() >= 4 * 4 and areas.max() <= 4 * 17 ** 2
    single = augment(images, holes=1.0, hole_count=(1, 1))[0][:, 0] == 0
    sides = torch.stack([single.any(2).sum(1), single.any(1).sum(1)])
    assert torch.equal(sides[0] * sides[1], single.sum((1, 2)))        # a full rectangle
    assert 3 <= sides.min() <= 5 and 15 <= sides.max() <= 17 and not torch.equal(sides[0], sides[1])
    small = augment(images, holes=1.0, hole_side=(8, 8))[0][:, 0].numpy() == 0
    assert {ndimage.label(hole)[1] for hole in small} == {1, 2, 3, 4}
    places = single.nonzero()[:, 1:]
    assert places.min() < 10 and places.max() > 149


def test_autocast_changes_nothing():
    """Rounded to bfloat16 the slices would lose their grey levels."""
    images, masks = slices()
    everything = dict.fromkeys((*MOVES, *COLOURS), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        under = augment(images, masks, **everything)
    plain = augment(images, masks, **everything)
    assert torch.equal(under[0], plain[0]) and torch.equal(under[1], plain[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_does_what_the_cpu_does():
    """The draws are the same; only the last bits of the arithmetic differ."""
    images, masks = slices(16)
    everything = dict.fromkeys((*MOVES, *COLOURS), 0.5)
    ours, theirs = augment(images, masks, **everything), augment(images.cuda(), masks.cuda(), **everything)
    torch.testing.assert_close(theirs[0].cpu(), ours[0], atol=1e-3, rtol=0)
    assert (theirs[1].cpu() != ours[1]).float().mean() < 1e-3


@pytest.mark.parametrize("settings", [
    {"flip": 2}, {"noise": -0.1}, {"rotate": float("nan")}, {"bias": 1.5}, {"holes": -1}, {"crop_side": 1.2},
    {"crop_side": 0}, {"scale": 1.0}, {"stretch": 1.0}, {"optical_amount": 1}, {"angle": -3}, {"shift": -0.1},
    {"elastic_sigma": 0}, {"elastic_alpha": -1}, {"bias_range": (1.2, 0.8)}, {"gamma_range": (0, 1)},
    {"sigma": (0, 1)}, {"noise_variance": (5, 1)}, {"hole_count": (0, 3)}, {"hole_side": (-1, 3)},
    {"multiply_range": (-1, 1)}, {"bias_coefficients": (0, 1)}, {"brightness": -1}, {"contrast": -1},
    {"rotate_angle": -1}])
def test_settings_that_make_no_sense_are_refused(settings):
    """With the name of the setting, in one line."""
    with pytest.raises(UserError, match=next(iter(settings))) as error:
        SliceAugment("light", SIZE, **settings)
    assert "\n" not in str(error.value)


def test_unknown_words_are_refused():
    """A misspelt severity or setting must not train with another one."""
    with pytest.raises(UserError, match="SPINE_SEVERITY.*none, light, heavy"):
        SliceAugment("strong", SIZE)
    with pytest.raises(UserError, match='"rotation".*"rotate"'):
        SliceAugment("light", SIZE, rotation=1.0)


def test_shapes_that_do_not_fit_are_refused():
    """Broadcasting would give every image the same mask."""
    images, masks = slices()
    for one, two, seeds in ((images[:, 0], masks, range(4)), (images, masks[:1], range(4)),
                            (images, masks, range(3)), (images[..., :-1], masks, range(4))):
        with pytest.raises(ValueError, match="not"):
            SliceAugment("light", SIZE)(one, two, seeds)

"""Augmentation of photographs by severity, their views for evaluation, and mixing of batches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from datasets import photo_augment
from datasets.photo_augment import (
    MOVES,
    RECOLOURS,
    PhotoAugment,
    affine,
    change,
    denormalise,
    evaluation_view,
    mix,
    normalise,
    square_boxes,
    strength,
    stretched,
    tta_views,
)
from datasets.samplers import item_generator
from utils.config import UserError

NOT_LIGHT = {"jitter": 0.0, "blur": 0.0, "angle": 0.0, "randaugment": 0, "cutout": 0.0, "distortion": 0.0}


def photos(n=3, height=40, width=52, seed=0):
    """Smooth coloured uint8 images [n, 3, H, W]: noise that is enlarged."""
    noise = torch.rand(n, 3, 6, 7, generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)).byte()


def augment(images, seeds, severity="light", size=32, spectral=None, **settings):
    """Images in [0, 1] and spectral channels, augmented."""
    images, spectral = PhotoAugment(severity, size, **settings)(images, seeds, spectral)
    return denormalise(images), spectral


def test_an_unknown_severity_is_refused_by_the_constants_name():
    """A misspelt severity must not train with another one."""
    with pytest.raises(UserError, match="HVIT_SEVERITY") as error:
        PhotoAugment("strong", 32)
    assert "light, moderate, aggressive" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TypeError, match="rotation"):
        PhotoAugment("light", 32, rotation=3)


@pytest.mark.parametrize("settings", [
    {"flip": 2}, {"jitter": -1}, {"blur": 1.5}, {"cutout": 3}, {"distortion": -0.1}, {"stretch": 1.0},
    {"angle": -3}, {"magnitude": 31}, {"randaugment": -1}, {"sigma": (0, 1)}, {"hole": -1}, {"hue": 0.7},
    {"brightness": -0.1}])
def test_settings_that_make_no_sense_are_refused(settings):
    """With the name of the setting, in one line."""
    with pytest.raises(UserError, match=next(iter(settings))) as error:
        PhotoAugment("light", 32, **settings)
    assert "\n" not in str(error.value)


def test_light_is_a_crop_of_the_resized_image_and_a_mirror():
    """The result is torchvision's crop and resize at one of all places, mirrored half the time."""
    images = photos(1, 16, 18).expand(60, -1, -1, -1)
    out, spectral = augment(images, range(60), size=14)
    assert spectral is None
    boxes = [(top, left, 14, 14) for top in range(3) for left in range(5)]
    crops = torch.stack([TF.crop(images[0], *box) for box in boxes])
    known = torch.cat([crops, crops.flip(-1)]) / 255
    error, nearest = (out[:, None] - known).abs().amax((2, 3, 4)).min(1)
    assert error.max() < 1e-5
    assert len((nearest % 15).unique()) == 15 and 15 < int((nearest < 15).sum()) < 45


def test_places_of_crops_are_uniform_and_the_largest_are_reached():
    """Up to the border of elongated images, whose shorter side gives the size."""
    draws = np.random.default_rng(0).random((2, 4000))
    image = torch.empty(3, 80, 200)
    boxes = square_boxes([image] * 4000, *draws)
    assert (boxes[:, 2:] == 70).all() and boxes[:, 0].max() == 10 and boxes[:, 1].max() == 130
    for column, count in ((0, 11), (1, 131)):
        assert stats.chisquare(np.bincount(boxes[:, column], minlength=count)).pvalue > 1e-3


@pytest.mark.parametrize("one, two", [
    ({}, {"flip": 1.0}), ({}, {"jitter": 1.0}), ({}, {"blur": 1.0}), ({}, {"angle": 20.0}),
    ({}, {"randaugment": 3}), ({}, {"cutout": 1.0}), ({}, {"distortion": 1.0}),
    *(({"jitter": 1.0}, {name: 0.0}) for name in ("brightness", "contrast", "saturation", "hue")),
    ({"blur": 1.0}, {"sigma": (2.0, 2.0)}), ({"randaugment": 3}, {"magnitude": 25.0}),
    ({"randaugment": 1}, {"randaugment": 2}),
    ({"cutout": 1.0}, {"hole": 0.2}), ({"distortion": 1.0}, {"stretch": 0.05})])
def test_every_setting_has_an_effect(one, two):
    """An option that does nothing would mislead a comparison."""
    one = {"flip": 0.0} | one
    outs = [augment(photos(8), range(8), **settings)[0] for settings in (one, one | two)]
    assert (outs[0] - outs[1]).abs().amax((1, 2, 3)).max() > 0.02


def test_parts_are_as_probable_as_asked():
    """Of 600 images, within four standard deviations of 0.3."""
    images = photos(1, 16, 16).expand(600, -1, -1, -1)
    plain = augment(images, range(600), size=8, flip=0.0)[0]
    for part in ("flip", "jitter", "blur", "cutout", "distortion"):
        base = augment(images, range(600), size=8, flip=0.0, distortion=1e-9)[0] if part == "distortion" \
            else plain
        settings = {"flip": 0.0, part: 0.3, "hole": 1.0, "sigma": (1.0, 2.0)}
        out = augment(images, range(600), size=8, **settings)[0]
        count = int(((out - base).abs().amax((1, 2, 3)) > 2e-3).sum())
        assert 180 - 45 < count < 180 + 45, part


def test_severities_add_to_each_other():
    """Each keeps the parts of the lighter one; the light one changes no colour, the middle one no shape."""
    plain = torch.full((6, 3, 40, 40), 120, dtype=torch.uint8)
    plain[:, 0] = 60
    light, moderate, aggressive = (augment(plain, range(6), word)[0] for word in photo_augment.SEVERITIES)
    torch.testing.assert_close(light, torch.tensor([60, 120, 120])[:, None, None].expand_as(light) / 255)
    assert moderate.std((2, 3)).max() < 1e-5 < 0.01 < (moderate - light).abs().max()
    assert aggressive.std((2, 3)).max() > 0.01
    names = [set(settings) for settings in photo_augment.SEVERITIES.values()]
    assert names[0] < names[1] < names[2] <= set(photo_augment.OFF)


def test_spectral_channels_move_with_the_image(monkeypatch):
    """Where colours stay, channels that hold the image's own values come out as the image does."""
    monkeypatch.setattr(photo_augment, "RECOLOURS", ("identity",) * 5)
    images = photos(12)
    channels = torch.cat([images, images.flip(1)[:, :2]], 1) / 255
    out, spectral = augment(images, range(12), "aggressive", spectral=channels, jitter=0.0, blur=0.0,
                            cutout=0.0)
    assert spectral.shape == (12, 5, 32, 32)
    torch.testing.assert_close(spectral[:, :3], out, atol=6e-3, rtol=0)           # uint8 was rounded
    torch.testing.assert_close(spectral[:, 3], out[:, 2], atol=6e-3, rtol=0)


def test_spectral_channels_keep_their_colours():
    """Jitter, blur and what RandAugment does to colours leave their bits."""
    images = photos(12)
    channels = torch.rand(12, 4, 40, 52)
    settings = {"spectral": channels, "angle": 0.0, "distortion": 0.0, "cutout": 0.0}
    _, moved = augment(images, range(12), "light", **settings)
    _, coloured = augment(images, range(12), "moderate", **settings, jitter=1.0, blur=1.0)
    assert torch.equal(moved, coloured)
    _, before = augment(images, range(12), "light", **settings, randaugment=2, magnitude=0.0)
    torch.testing.assert_close(moved, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("word", MOVES)
@pytest.mark.parametrize("negative", [False, True])
def test_moves_are_torchvisions(word, negative):
    """RandAugment's shear, translation and rotation about the centre, away from the border."""
    image, amount = photos(1, 48, 48) / 255, strength(word, 12, negative)
    theta = torch.from_numpy(affine(word, amount))[None, :2].float()
    ours = F.grid_sample(image, F.affine_grid(theta, [1, 3, 48, 48], align_corners=False),
                         align_corners=False)
    kind, _, axis = word.partition("_")
    pair = [0.0, 0.0]
    if kind == "rotate":
        theirs = TF.rotate(image, amount, interpolation=TF.InterpolationMode.BILINEAR)
    else:
        pair["xy".index(axis)] = 48 * amount if kind == "translate" else math.degrees(math.atan(amount))
        settings = {"translate": [0, 0], "shear": [0.0, 0.0]} | {kind: pair}
        theirs = TF.affine(image, 0.0, scale=1.0, interpolation=TF.InterpolationMode.BILINEAR, **settings)
    inner = slice(14, 34)
    torch.testing.assert_close(ours[..., inner, inner], theirs[..., inner, inner], atol=0.02, rtol=0)


def test_strengths_are_torchvisions():
    """So that a magnitude means what it means in the literature."""
    space = {name: magnitudes(31, 100, 100)
             for name, (magnitudes, _) in v2.RandAugment._AUGMENTATION_SPACE.items()}
    names = {"ShearX": "shear_x", "ShearY": "shear_y", "TranslateX": "translate_x",
             "TranslateY": "translate_y", "Color": "saturation", "AutoContrast": "autocontrast"}
    assert {names.get(name, name.lower()) for name in space} == set(MOVES + RECOLOURS)
    for name, magnitudes in space.items():
        word = names.get(name, name.lower())
        if magnitudes is None or word == "identity":
            continue
        for magnitude in (0, 9, 30):
            ours, theirs = strength(word, magnitude, False), float(magnitudes[magnitude])
            if word in ("brightness", "saturation", "contrast", "sharpness"):
                theirs += 1
            elif word.startswith("translate"):
                ours *= 100
            assert ours == pytest.approx(theirs, abs=1e-4), (word, magnitude)


def test_randaugment_draws_all_changes_alike(monkeypatch):
    """Each of the 14 equally often, either sign, and as many as asked."""
    drawn = []
    monkeypatch.setattr(photo_augment, "affine", lambda *move: drawn.append(move) or np.eye(3))
    monkeypatch.setattr(photo_augment, "change", lambda image, *move: drawn.append(move) or image)
    augment(photos(1, 9, 9).expand(500, -1, -1, -1), range(500), size=4, randaugment=3)
    drawn = [(word, amount) for word, amount in drawn if (word, amount) != ("rotate", 0)]
    assert len(drawn) == 1500
    counts = np.unique([word for word, _ in drawn], return_counts=True)[1]
    assert len(counts) == 14 and stats.chisquare(counts).pvalue > 1e-3
    negative = sum(amount < 0 for word, amount in drawn if word in MOVES)
    assert stats.binomtest(negative, sum(word in MOVES for word, _ in drawn)).pvalue > 1e-3


@pytest.mark.parametrize("word", RECOLOURS)
def test_recolouring_stays_within_0_and_1_and_is_called_what_it_does(word):
    """Also at the greatest strength, and for an image of one colour."""
    for image in (photos(1)[0] / 255, torch.full((3, 8, 8), 0.4)):
        out = change(image.clone(), word, strength(word, 30, True))
        assert out.shape == image.shape and 0 <= out.min() and out.max() <= 1
    if word == "posterize":
        assert len(change(photos(1)[0] / 255, word, strength(word, 30, False)).unique()) <= 16
    assert torch.equal(image, change(image, "identity", 1.0))


def test_angles_are_uniform_within_their_limit():
    """Read from the grid of 500 images."""
    augmenter = PhotoAugment("light", 8, angle=30.0)
    draws = {"angle": np.random.default_rng(1).random(500), "distortion": np.ones(500)}
    grid = augmenter.grid(draws, np.full((500, 10), 0.5), [((), ())] * 500)
    step = grid[:, 4, 5] - grid[:, 4, 4]
    angles = torch.rad2deg(torch.atan2(step[:, 1], step[:, 0])).numpy()
    torch.testing.assert_close(step.norm(dim=1), torch.full((500,), 0.25))
    assert stats.kstest(angles, stats.uniform(-30, 60).cdf).pvalue > 1e-3


def test_turns_and_moves_add_up():
    """One resampling does all of them: a turn of 12 degrees and three of RandAugment's, one the other way."""
    augmenter = PhotoAugment("light", 8, angle=30.0, magnitude=9.0)
    numbers, signs = np.full((1, 3), MOVES.index("rotate")), np.array([[False, True, False]])
    draws = {"angle": np.array([0.7]), "distortion": np.ones(1)}
    grid = augmenter.grid(draws, np.full((1, 10), 0.5), list(zip(numbers, signs, strict=True)))
    step = grid[0, 4, 5] - grid[0, 4, 4]
    assert math.degrees(math.atan2(step[1], step[0])) == pytest.approx(12 + 9, abs=1e-3)


def test_distortion_stretches_cells_and_keeps_the_frame():
    """The grid never folds, its ends stay at the image's ends, and no stretch is no change."""
    uniform = np.random.default_rng(0).random((200, 5))
    even = (2 * np.arange(40) + 1) / 40 - 1
    np.testing.assert_allclose(stretched(uniform, np.zeros(200), 40), np.tile(even, (200, 1)), atol=1e-12)
    places = stretched(uniform, np.full(200, 0.3), 40)
    steps = np.diff(places, axis=1)
    assert steps.min() > 0 and places.min() > -1 and places.max() < 1
    cells = steps[:, [3, 11, 19, 27, 35]] / steps[:, [3, 11, 19, 27, 35]].sum(1, keepdims=True)
    widths = 1 + 0.3 * (2 * uniform - 1)
    np.testing.assert_allclose(cells, widths / widths.sum(1, keepdims=True), atol=1e-9)


def test_the_hole_is_a_square_filled_with_the_mean():
    """Zero in the normalised image, the channel's mean in the spectrum, at the same place; of its full size
    unless the border cuts it."""
    images, channels = photos(40, 40, 40), torch.rand(40, 2, 40, 40) + 1
    augmenter = PhotoAugment("light", 40, cutout=1.0, hole=0.25)
    out, spectral = augmenter(images, range(40), channels)
    plain, before = PhotoAugment("light", 40)(images, range(40), channels)
    hole = (out == 0).all(1)
    assert torch.equal(out[~hole[:, None].expand_as(out)], plain[~hole[:, None].expand_as(out)])
    sizes = hole.sum((1, 2))
    assert int((sizes == 100).sum()) > 15 and int(sizes.max()) == 100 and int(sizes.min()) >= 16
    for i in range(40):
        rows, columns = hole[i].any(1), hole[i].any(0)
        assert torch.equal(hole[i], rows[:, None] & columns)
        means = before[i].mean((1, 2))[:, None, None]
        torch.testing.assert_close(spectral[i], torch.where(hole[i], means, before[i]))


def test_images_do_not_depend_on_the_rest_of_the_batch():
    """An image and its seed give its result, in any batch, as a batch or in a list; generators stay."""
    images, channels = photos(6), torch.rand(6, 2, 40, 52)
    augmenter = PhotoAugment("aggressive", 24)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = augmenter(images, torch.arange(20, 26), channels)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    part = augmenter([images[4], photos(1, 30, 30)[0], images[1]], [24, 3, 21],
                     [channels[4], torch.rand(2, 30, 30), channels[1]])
    for one, two in zip(whole, part, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one[[4, 1]], two[[0, 2]], atol=1e-4, rtol=0)
    assert not torch.allclose(augmenter(images[:1], [1])[0], augmenter(images[:1], [2])[0], atol=0.1)


def test_parts_are_drawn_apart():
    """Adding colour changes leaves crops, mirrors and turns as they were."""
    images, channels = photos(6), torch.rand(6, 1, 40, 52)
    one = augment(images, range(6), angle=20.0, spectral=channels)[1]
    two = augment(images, range(6), angle=20.0, jitter=1.0, blur=1.0, spectral=channels)[1]
    assert torch.equal(one, two)


@pytest.mark.parametrize("severity", photo_augment.SEVERITIES)
def test_results_are_finite_and_within_range(severity):
    """Of black and white noise, under autocast too, and of images of one pixel."""
    noise = 255 * torch.randint(0, 2, (12, 3, 30, 30), dtype=torch.uint8)
    one = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = PhotoAugment(severity, 16)([*noise, one], range(13))
    assert out.shape == (13, 3, 16, 16) and out.isfinite().all()
    low, high = normalise(torch.zeros(3, 1, 1)), normalise(torch.ones(3, 1, 1))
    assert (out >= low - 1e-5).all() and (out <= high + 1e-5).all()


def test_normalising_is_imagenets():
    """What pretrained networks of torchvision expect; denormalise brings it back."""
    from torchvision.models import ResNet50_Weights

    preset, images = ResNet50_Weights.DEFAULT.transforms(), photos() / 255
    torch.testing.assert_close(normalise(images), v2.Normalize(preset.mean, preset.std)(images))
    torch.testing.assert_close(denormalise(normalise(images)), images)


def test_evaluation_sees_the_middle_as_torchvision_does():
    """Resize to 256 and centre crop of 224, here an eighth of it, in one step: no pixel far off."""
    images = photos(2, 80, 100)
    out, spectral = evaluation_view(images, 28, images / 255)
    peer = v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.ToDtype(torch.float32, scale=True)])(images)
    difference = (denormalise(out) - peer).abs()
    assert difference.mean() < 0.01 and difference.max() < 0.06
    torch.testing.assert_close(denormalise(out), spectral, atol=6e-3, rtol=0)     # uint8 was rounded
    assert evaluation_view([images[0], photos(1, 20, 20)[0]], 28)[1] is None
    torch.testing.assert_close(evaluation_view([images[1]], 28)[0], out[1:])


def test_tta_views_are_the_positions_of_a_square():
    """The first two are the image and its mirror; all eight differ, and the spectrum turns alike."""
    images = torch.rand(2, 3, 6, 6)
    views = tta_views(images, images[:, :1], 8)
    assert torch.equal(views[0][0], images) and torch.equal(views[1][0], images.flip(-1))
    assert len({view.numpy().tobytes() for view, _ in views}) == 8
    turns = {torch.rot90(base, k, (2, 3)).contiguous().numpy().tobytes()
             for base in (images, images.flip(-1)) for k in range(4)}
    assert {view.contiguous().numpy().tobytes() for view, _ in views} == turns
    for view, spectral in views:
        assert torch.equal(view[:, :1], spectral)
    assert len(tta_views(images)) == 2 and tta_views(images)[0][1] is None
    for n in (0, 9):
        with pytest.raises(UserError, match=str(n)):
            tta_views(images, n=n)


def mixed(seed, images=None, targets=None, **settings):
    """A batch of four images of constant values 0 to 3 and classes 0 to 3, mixed."""
    settings = {"mixup_alpha": 0.8, "mixup_prob": 0.0, "cutmix_alpha": 1.0, "cutmix_prob": 0.0} | settings
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16) if images is None else images
    targets = torch.eye(4) if targets is None else targets
    return mix(images, targets, **settings, generator=item_generator(0, 0, seed))


def test_mixup_mixes_targets_by_the_shares_of_the_images():
    """Each image is share * itself + (1 - share) * its neighbour; shares follow Beta(alpha, alpha)."""
    shares = []
    for seed in range(300):
        images, targets, _ = mixed(seed, mixup_prob=1.0)
        torch.testing.assert_close(images.mean((1, 2, 3)), targets @ torch.arange(4.0))
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        shares.append(float(targets[0, 0]))
    assert stats.kstest(shares, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_cutmix_mixes_targets_by_the_area_that_was_pasted():
    """Also where the box was cut at the border, and spectral channels get the same box."""
    places = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16)
    for seed in range(60):
        images, targets, spectral = mixed(seed, cutmix_prob=1.0, spectral=places[:, :2] + 10)
        assert torch.equal(images[:, :2] + 10, spectral)
        for i in range(4):
            own = (images[i, 0] == i).float().mean()
            assert float(targets[i, i]) == pytest.approx(float(own), abs=1e-6)
            assert set(images[i].unique().tolist()) <= {float(i), float((i - 1) % 4)}


def test_probabilities_of_mixing_are_apart_from_alpha():
    """A quarter MixUp, a half CutMix, the rest as it was, whatever alpha is."""
    kinds = []
    for seed in range(400):
        images, targets, _ = mixed(seed, mixup_prob=0.25, cutmix_prob=0.5, mixup_alpha=50.0,
                                   cutmix_alpha=50.0)
        constant = bool((images.amax((1, 2, 3)) - images.amin((1, 2, 3)) < 1e-6).all())
        kinds.append("none" if torch.equal(targets, torch.eye(4)) and constant else
                     "mixup" if constant else "cutmix")
    counts = [kinds.count(kind) for kind in ("mixup", "cutmix", "none")]
    assert stats.chisquare(counts, [100, 200, 100]).pvalue > 1e-3


def test_alpha_shapes_the_shares():
    """A large alpha mixes by halves, a small one hardly."""
    for kind in ("mixup", "cutmix"):
        spread = {}
        for alpha in (0.05, 100.0):
            settings = {f"{kind}_prob": 1.0, f"{kind}_alpha": alpha}
            shares = [float(mixed(seed, **settings)[1][0, 0]) for seed in range(60)]
            spread[alpha] = np.std(shares)
        assert spread[0.05] > 2 * spread[100.0]


def test_mixing_repeats_itself_and_disturbs_nothing():
    """The generator given decides; a resumed run mixes alike, and torch's own generator stays."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = mixed(3, mixup_prob=0.5, cutmix_prob=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two = mixed(3, mixup_prob=0.5, cutmix_prob=0.5)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    generators = [item_generator(0, 0, 1) for _ in range(2)]
    for generator, probability in zip(generators, (0.0, 1.0), strict=True):
        mix(torch.zeros(2, 3, 8, 8), torch.eye(2), 1.0, probability, 1.0, 0.0, generator)
    assert torch.equal(*(generator.get_state() for generator in generators))


def test_inputs_of_mixing_and_augmenting_stay_as_they_are():
    """A batch may be used again, for pictures or another view."""
    images, targets = photos(4, 16, 16), torch.eye(4)
    before, floats = images.clone(), images / 255
    PhotoAugment("aggressive", 12)(images, range(4), floats)
    mixed(1, floats, targets, mixup_prob=1.0)
    assert torch.equal(images, before) and torch.equal(floats, before / 255)
    assert torch.equal(targets, torch.eye(4))


@pytest.mark.parametrize("settings, name", [
    ({"mixup_prob": 1.2}, "HVIT_MIXUP_PROB"), ({"cutmix_prob": -0.1}, "HVIT_CUTMIX_PROB"),
    ({"mixup_prob": 0.7, "cutmix_prob": 0.7}, "sum"),
    ({"mixup_prob": 1.0, "mixup_alpha": 0.0}, "HVIT_MIXUP_ALPHA"),
    ({"cutmix_prob": 1.0, "cutmix_alpha": -1.0}, "HVIT_CUTMIX_ALPHA")])
def test_mixing_that_makes_no_sense_is_refused(settings, name):
    """With the constant's name; an alpha that is not used may be 0."""
    with pytest.raises(UserError, match=name):
        mixed(0, **settings)
    mixed(0, mixup_alpha=0.0, cutmix_prob=1.0)
